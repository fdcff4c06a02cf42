"""What kernels share: which tensors they take, and large ones in blocks that stay in the cache."""
import functools
import math

import torch

SIZE = 2**16  # numbers in a block


def fit_together(x, keep, scale, *others):
    """Whether tensors are what kernels of one pass take, all on one device.

    Args:
        x (Tensor): float32, not empty.
        keep (Tensor | None): uint8, shaped like it.
        scale (Tensor): float32, along one axis of `x` at most.
        others (Tensor): like the scale, such as zero points.
    """
    return (_broadcasts(x.shape, scale.shape)
            and all(t.dtype is torch.float32 and t.device == x.device for t in (x, scale, *others))
            and all(t.shape == scale.shape for t in others)
            and (keep is None or (
                keep.dtype is torch.uint8 and keep.device == x.device and keep.shape == x.shape)))


@functools.lru_cache(4096)
def _broadcasts(shape, scale):
    """Whether scales broadcast against a tensor that is not empty, along one axis at most."""
    many = [axis for axis, count in enumerate(reversed(scale), 1) if count > 1]
    return (math.prod(shape) > 0 and len(scale) <= max(1, len(shape)) and len(many) <= 1
            and all(scale[-axis] == shape[-axis] for axis in many))


def dense_like(x):
    """An empty tensor shaped like `x` without gaps; a transposed matrix stays transposed."""
    if x.dim() > 1 and x.stride(-1) != 1 and x.stride(-2) == 1:
        return torch.empty_like(x.mT, memory_format=torch.contiguous_format).mT
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def blocks(tensors, scales):
    """Parts of tensors of one shape, along the first axis, with what belongs of the scales.

    Tensors on a GPU come in one piece, and so does what is small.

    Args:
        tensors (tuple[Tensor]): all of one shape; a part is a view.
        scales (tuple[Tensor]): all of one shape that broadcasts against the tensors.

    Yields:
        list[Tensor]: a part of each tensor and of each scale.
    """
    first = tensors[0]
    if first.device.type != 'cpu' or first.numel() < 2 * SIZE:
        yield [*tensors, *scales]
        return
    if scales[0].numel() == 1 and all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1) for t in tensors]
        scales = [s.view(1) for s in scales]
    rows = max(1, SIZE * len(tensors[0]) // first.numel())
    sliced = scales[0].dim() == tensors[0].dim() and len(scales[0]) > 1
    for start in range(0, len(tensors[0]), rows):
        part = slice(start, start + rows)
        yield [*(t[part] for t in tensors), *(s[part] if sliced else s for s in scales)]


def between(grad, x, low, high, out):
    """`grad` where low < x < high, else 0 (also where it is no number there).

    The lower end may be a tensor. One pass where it is one number throughout, and can be read
    without waiting for a GPU.
    """
    if torch.is_tensor(low):
        if low.device.type != 'cpu' or (low != low.view(-1)[0]).any():
            inside = (x > low) & (x < high)
            return torch.where(inside, grad, grad.new_zeros(()), out=out)
        low = low.view(-1)[0].item()
    return torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=out)


def dot(a, b):
    """Sum of the products of two tensors without gaps; nothing is allocated."""
    return torch.dot(a.view(-1), b.view(-1))


def mixed(x, values, keep):
    """`values` where `keep` is 1 (or None), `x` where it is 0 (QDrop)."""
    # by weights of 0 and 1, which is faster than to choose by a boolean
    return values if keep is None else torch.lerp(x, values, keep.to(x.dtype))


def parted(grad, keep):
    """What of the gradient of `mixed` is that of `values`, and what that of `x` (or None)."""
    if keep is None:
        return grad, None
    kept = grad * keep.to(grad.dtype)
    return kept, grad - kept


def joined(grad, passed):
    """The whole gradient of `x`, of what `parted` gave."""
    return grad if passed is None else grad.add_(passed)
