"""docs/config.md: every key is on it, with the defaults of the mix-in and of the code."""
import ast
import inspect
import re
from dataclasses import MISSING, fields

import pytest
from demo_runs import REPO
from mmengine.config import Config

from pfcr_mm.engine import PFCRLoop, settings
from pfcr_mm.models import QuantConfig
from pfcr_mm.reconstruction import POSConfig, UnitConfig

PAGE = (REPO / 'docs' / 'config.md').read_text()
MIXIN = Config.fromfile(REPO / 'configs' / '_base_' / 'pfcr.py').quantize_cfg.to_dict()


def rows(title):
    """{key: what its second column says} of the tables below a heading."""
    section = PAGE.partition(f'## {title}')[2].partition('\n## ')[0]
    return dict(re.findall(r'^\| `([\w.]+)` \|([^|]*)\|', section, re.MULTILINE))


def of_dataclass(cls):
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(cls)}


def of_loop():
    parameters = list(inspect.signature(PFCRLoop.__init__).parameters.values())[2:]
    return {p.name: p.default for p in parameters}


def of_rest():
    return {f'{key}.{name}': value for key, default in (
        ('rois', settings.rois_of(None)), ('evaluate', settings.evaluate_of(None)))
        for name, value in default.items()}


SECTIONS = {
    '`model.quant`': (of_dataclass(QuantConfig), {}),
    '`quantize_cfg`: the run': (of_loop(), MIXIN),
    '`quantize_cfg.calibration`': (settings.calibration_of(None), MIXIN['calibration']),
    '`quantize_cfg.pos`': (of_dataclass(POSConfig), MIXIN['pos']),
    '`quantize_cfg.reconstruction`': (of_dataclass(UnitConfig), MIXIN['reconstruction']),
    '`quantize_cfg.rois`': (of_rest(), {f'rois.{k}': v for k, v in MIXIN['rois'].items()}),
}


@pytest.mark.parametrize('title', SECTIONS)
def test_every_key_has_its_defaults(title):
    of_code, of_mixin = SECTIONS[title]
    found = rows(title)
    assert list(found) == list(of_code)
    for key, text in found.items():
        told = [plain(ast.literal_eval(part)) for part in re.findall('`(.*?)`', text)]
        if told:
            # in brackets what the code has, where the mix-in has something else
            known = [plain(of_mixin.get(key, of_code[key])), plain(of_code[key])]
            assert told == (known if known[0] != known[1] else known[:1]), key
        else:
            assert f'`quantize_cfg.{key}`' in PAGE or key == 'head_reconstruction'


def plain(value):
    return list(value) if isinstance(value, tuple) else value
