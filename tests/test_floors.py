"""The floors: imports inside `pfcr_mm` only go down."""
import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'pfcr_mm'
FLOORS = dict(
    __init__=0, parallel=0, registry=0, errors=0, files=0, compat=0, version=0, quantizers=1,
    modules=2, models=3, reconstruction=4, engine=5, datasets=6, evaluation=6, export=6,
    analysis=6, benchmark=6, cli=6)
TORCH_ONLY = ('quantizers', 'modules')


def module_name(path):
    """Dotted parts of a file, the package itself included."""
    parts = ('pfcr_mm', *path.relative_to(PACKAGE).with_suffix('').parts)
    return parts


def imported(source, parts):
    """Dotted names that a module imports, anywhere in it, made absolute."""
    package = parts[:-1]  # of a plain module and of an __init__ alike
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            base = '.'.join((*base, *(node.module.split('.') if node.module else ())))
            for alias in node.names:
                yield f'{base}.{alias.name}'
        elif isinstance(node, ast.Call):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name in ('import_module', '__import__') and node.args:
                argument = node.args[0]
                yield argument.value if isinstance(argument, ast.Constant) else '?'


def floor_of(dotted):
    """Floor of a name such as 'pfcr_mm.models.swin', None outside the package."""
    first, *rest = dotted.split('.')
    if first != 'pfcr_mm':
        return None
    return FLOORS.get(rest[0], 0) if rest else 0


def upward(source, parts):
    own = FLOORS[parts[1]]
    return [name for name in imported(source, parts) if (floor_of(name) or 0) > own]


FILES = sorted(PACKAGE.rglob('*.py'))
FILES = [f for f in FILES if '.mim' not in f.parts]
IDS = [str(f.relative_to(PACKAGE)) for f in FILES]


@pytest.mark.parametrize('path', FILES, ids=IDS)
def test_imports_only_go_down(path):
    parts = module_name(path)
    assert parts[1] in FLOORS, f'{parts[1]} has no floor; add it to FLOORS'
    assert upward(path.read_text(), parts) == []


@pytest.mark.parametrize('path', [f for f in FILES if module_name(f)[1] in TORCH_ONLY],
                         ids=lambda f: str(f.relative_to(PACKAGE)))
def test_numbers_and_modules_need_torch_only(path):
    allowed = {'torch', 'pfcr_mm'} | set(sys.stdlib_module_names)
    if path.name == 'triton_kernels.py':  # comes with torch for GPUs, and is imported for one alone
        allowed.add('triton')
    used = {name.split('.')[0] for name in imported(path.read_text(), module_name(path))}
    assert used <= allowed


@pytest.mark.parametrize('line', [
    'from ..models import swin', 'from ..models.swin import QuantWindowMSA',
    'from .. import engine', 'import pfcr_mm.engine', 'from pfcr_mm.reconstruction import units',
    'def f():\n    from ..models import reparam',
    'import importlib\nimportlib.import_module("pfcr_mm.models")',
], ids=['relative', 'deep', 'package', 'absolute', 'absolute-from', 'in-a-function', 'importlib'])
def test_an_upward_import_is_seen(line):
    assert upward(line, ('pfcr_mm', 'modules', 'linear'))


@pytest.mark.parametrize('line', [
    'from .base import QuantLayer', 'from ..quantizers import search', 'from ..errors import X',
    'import torch', 'from pfcr_mm.registry import lookup', 'from . import base'])
def test_a_downward_import_passes(line):
    assert not upward(line, ('pfcr_mm', 'modules', 'linear'))
    assert not upward(line, ('pfcr_mm', 'modules', '__init__'))
