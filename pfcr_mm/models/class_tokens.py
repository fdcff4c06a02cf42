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
    for chain in chains.values():
        for leaf in chain.leaves if chain.prefix_tokens else ():
            for root in leaf.modules if leaf.block is not None else ():
                for layer in root.modules():
                    if isinstance(layer, QuantLinear):
                        layer.token_quantizer = _quantizer_of(layer, chain.prefix_tokens)


def _quantizer_of(layer, tokens):
    spec = replace(layer.input_quantizer.spec, kind='uniform', granularity='tensor', shift=0.0)
    return TokenQuantizer(spec, tokens, layer.in_features, layer.out_features)
