"""CUDA graphs, as models see them."""
import torch


def is_recorded(device):
    """Whether operations on `device` are put into a CUDA graph just now.

    What they give is no result before the graph is launched, and its memory is the graph's: it
    must not be kept for later, nor taken from what may be forgotten before the graph is.
    """
    return torch.device(device).type == 'cuda' and torch.cuda.is_current_stream_capturing()
