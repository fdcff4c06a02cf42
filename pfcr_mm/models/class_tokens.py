"""Class tokens: which layers get to see them, and quantizers of their own."""
from dataclasses import replace

from ..modules import QuantLinear
from ..quantizers import TokenQuantizer


def class_token_counts(chains):
    """How many class tokens come first in the sequences that a module reads, by module.

    Args:
        chains (dict[str, Chain]): of a model.
    """
    return {module: chain.prefix_tokens for chain in chains.values() for leaf in chain.leaves
            for root in leaf.modules for module in root.modules()}


def give_token_quantizers(chains):
    """Give the linear layers of blocks a quantizer for class tokens (not calibrated), in place.

    Args:
        chains (dict[str, Chain]): of a converted model.
    """
    for layer in _layers_of_blocks(chains):
        spec = replace(layer.input_quantizer.spec, kind='uniform', granularity='tensor', shift=0.0)
        layer.token_quantizer = TokenQuantizer(
            spec, class_token_counts(chains)[layer], layer.in_features)


def _layers_of_blocks(chains):
    return [module for chain in chains.values() if chain.prefix_tokens
            for leaf in chain.leaves if leaf.block is not None
            for root in leaf.modules for module in root.modules()
            if isinstance(module, QuantLinear)]
