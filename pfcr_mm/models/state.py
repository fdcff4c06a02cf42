"""All that a run has made of a model so far: what a state dict holds, and what it leaves out.

A state dict lacks quantizers that are not calibrated, their granularity (which
reparameterisation changes) and roundings that are still open. This has them all.
"""
from dataclasses import asdict

import torch
from torch import nn

from ..errors import UsageError
from ..modules import quantizers_of
from ..quantizers import QuantizerSpec, build_quantizer
from .checkpoint import share_storage


def model_state(model):
    """The state of a model between two units, as plain data that `load_model_state` takes.

    Returns:
        dict: 'tensors' of parameters and buffers (copies on the CPU), 'quantizers' by name.
    """
    tensors = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    return dict(
        tensors=share_storage(tensors),  # a few large tensors are written faster than many
        quantizers={
            name: dict(spec=asdict(q.spec), size=q.log_scale.numel(), axis=q.axis,
                       calibrated=q.calibrated, enabled=q.enabled)
            for name, q in quantizers_of(model)
        })


@torch.no_grad()
def load_model_state(model, state):
    """Give a model, built from the same config, the state that `model_state` took.

    Raises:
        UsageError: it is another model's state.
    """
    _load_quantizers(model, state['quantizers'])
    own = dict(model.named_parameters())
    own.update(model.named_buffers())
    for name, value in state['tensors'].items():
        if not torch.is_tensor(value):
            raise UsageError(f'the state of {name!r} is no tensor')
        if name in own:
            if (own[name].shape, own[name].dtype) != (value.shape, value.dtype):
                raise UsageError(f'the state of {name!r} has another shape or type than the model')
            own[name].copy_(value)
        else:  # variables of a rounding, made when its first unit was opened
            parent, _, leaf = name.rpartition('.')
            device = next(model.parameters()).device
            setattr(_submodule(model, parent), leaf,
                    nn.Parameter(value.to(device, copy=True), requires_grad=False))
    lacking = own.keys() - state['tensors'].keys()
    if lacking:
        raise UsageError(f'the state lacks {min(lacking)!r}')


def _load_quantizers(model, saved):
    own = dict(quantizers_of(model))
    if own.keys() != saved.keys():
        raise UsageError('the state is of a model with other quantizers')
    for name, entry in saved.items():
        quantizer = own[name]
        if (asdict(quantizer.spec), quantizer.log_scale.numel(), quantizer.axis) != (
                entry['spec'], entry['size'], entry['axis']):
            parent, _, leaf = name.rpartition('.')
            quantizer = build_quantizer(
                QuantizerSpec(**entry['spec']), entry['size'], entry['axis']
            ).to(quantizer.log_scale)
            setattr(_submodule(model, parent), leaf, quantizer)
        quantizer.calibrated, quantizer.enabled = entry['calibrated'], entry['enabled']


def _submodule(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UsageError(f'the state is of a model that has {name!r}') from None
