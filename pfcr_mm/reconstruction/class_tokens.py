"""Rows of a layer's inputs where class tokens count as more than one in hundreds."""
import torch

PREFIX_SHARE = 0.1  # of class tokens in all rows, whatever the number of patches


def prefixes(chains):
    """Number of class tokens first in a sequence, by module.

    Args:
        chains (dict[str, Chain]): of a model.
    """
    return {module: chain.prefix_tokens for chain in chains.values() for leaf in chain.leaves
            for root in leaf.modules for module in root.modules()}


def weighted_rows(layer, x, count, generator, limit):
    """All class tokens of a layer's input and a random sample of its other rows.

    Args:
        layer (QuantLayer): that reads it.
        x (Tensor): the input; class tokens are told apart in sequences (B, N, C) alone.
        count (int): class tokens, first along axis 1.
        generator (torch.Generator): draws.
        limit (int): other rows at most.

    Returns:
        tuple[Tensor, Tensor]: rows (n, fan_in), and how often each counts (n,).
    """
    count = count if x.dim() == 3 else 0
    rows = layer.input_rows(x[:, count:] if count else x, generator, limit)
    weights = torch.ones_like(rows[:, 0])
    if count:
        first = x[:, :count].flatten(0, 1)
        weight = PREFIX_SHARE / (1 - PREFIX_SHARE) * len(rows) / len(first)
        rows = torch.cat([first, rows])
        weights = torch.cat([torch.full_like(first[:, 0], weight), weights])
    return rows, weights
