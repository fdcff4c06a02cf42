"""What knows mmdet and timm: conversion, chains, reparameterisation, the manifest."""
from . import backbones, classifier, heads, necks, swin, timm_swin, vit  # noqa: F401  fill the tables
from .chain import Chain, Leaf, State
from .convert import QuantConfig, convert
from .detector import QuantDetector, part_chains
from .manifest import build_manifest
from .reparam import reparameterise
from .whole import whole_chain

__all__ = [
    'Chain', 'Leaf', 'QuantConfig', 'QuantDetector', 'State', 'build_manifest', 'convert',
    'part_chains', 'reparameterise', 'whole_chain'
]
