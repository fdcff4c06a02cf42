"""Registries of `pfcr_mm`: children of MMEngine's, plus the project's own tables.

`type='pfcr_mm.X'` in a config makes MMEngine import this module by itself;
`locations` then imports the modules that hold the classes, so that a user needs
no `custom_imports`.
"""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from .errors import UsageError

SCOPE = 'pfcr_mm'

RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope=SCOPE, locations=['pfcr_mm.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope=SCOPE, locations=['pfcr_mm.engine'])
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['pfcr_mm.engine', 'pfcr_mm.analysis'])
MODELS = Registry('model', parent=MMENGINE_MODELS, scope=SCOPE, locations=['pfcr_mm.models'])
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope=SCOPE, locations=['pfcr_mm.datasets'])
METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope=SCOPE, locations=['pfcr_mm.evaluation'])
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope=SCOPE, locations=['pfcr_mm.datasets'])

# The project's own tables: a name in a config picks one entry.
QUANTIZERS = Registry('quantizer', scope=SCOPE, locations=['pfcr_mm.quantizers'])
ROUNDINGS = Registry('rounding', scope=SCOPE, locations=['pfcr_mm.quantizers'])
RECONSTRUCTION_LOSSES = Registry(
    'reconstruction loss', scope=SCOPE, locations=['pfcr_mm.reconstruction'])


def lookup(table, name, key):
    """The entry `name` of a table, or one clear line about config key `key`."""
    entry = table.module_dict.get(name) if isinstance(name, str) else None
    if entry is None:
        table.import_from_location()
        entry = table.module_dict.get(name) if isinstance(name, str) else None
    if entry is None:
        raise UsageError(
            f'{key}={name!r} is not a known {table.name}; '
            f'choose one of {sorted(table.module_dict)}')
    return entry


class TypeTable:
    """Looks a function up by the type of a module, subclasses included.

    Example:
        >>> CHAINS = TypeTable('chain')
        >>> @CHAINS.register('mmdet.models.backbones.swin.SwinTransformer')
        ... def swin_chain(backbone): ...
    """

    def __init__(self, name):
        self.name = name
        self._functions = {}

    def register(self, *type_names):
        """Decorator; types are given by their full dotted names, so nothing is imported."""

        def add(function):
            for type_name in type_names:
                if type_name in self._functions:
                    raise KeyError(f'{self.name} for {type_name} is registered twice')
                self._functions[type_name] = function
            return function

        return add

    def find(self, module):
        """The function for the nearest class in the module's method resolution order, or None."""
        for cls in type(module).__mro__:
            function = self._functions.get(f'{cls.__module__}.{cls.__qualname__}')
            if function is not None:
                return function
        return None

    def same_forward(self, module):
        """Whether `module` computes what the registered class does.

        That is, it has no `forward` of its own, nor an `attend` that `forward` would call.
        """
        for cls in type(module).__mro__:
            if f'{cls.__module__}.{cls.__qualname__}' in self._functions:
                return all(getattr(type(module), name, None) is getattr(cls, name, None)
                           for name in ('forward', 'attend'))
        return False


CONVERTERS = TypeTable('converter')  # float attention -> quantized attention
CHAINS = TypeTable('chain')  # part of a detector -> its ordered leaves
POST_NORM = TypeTable('post-norm pairs')  # block -> (norm, layer, window attention or None)
VALUE_PROJECTIONS = TypeTable('value projections')  # attention -> (qkv, proj), or None
QUERY_KEYS = TypeTable('queries and keys')  # attention -> (qkv, tables of positions), or None
POST_GELU = TypeTable('post-GELU layers')  # MLP -> the layers that read a GELU's output
OUTPUT_NORMS = TypeTable('output norms')  # backbone -> the norm each output map comes from
MAP_READERS = TypeTable('map readers')  # neck -> {input map: the one layer that reads it}
