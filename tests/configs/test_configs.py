"""Every config parses, builds, and says in its name what it does."""
import copy
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

from pfcr_mm.models import part_chains
from pfcr_mm.modules import QuantLayer
from pfcr_mm.reconstruction import POSConfig, UnitConfig, build_schedule
from pfcr_mm.reconstruction.units import check_levels

REPO = Path(__file__).parents[2]
CONFIGS = REPO / 'configs'
MIM = REPO / 'pfcr_mm' / '.mim'
ALL = sorted(CONFIGS.rglob('*.py'))
BASES = [path for path in ALL if '_base_' in path.parts]
QUANT = [path for path in ALL if path.name.startswith('pfcr_') and path not in BASES]
BLOCK = [path for path in ALL if path.name.startswith('block_')]  # the baseline of the demo
FLOAT = [path for path in ALL if path not in BASES + QUANT + BLOCK]

COCO = ('pfcr_maskrcnn_swin_t', 'pfcr_maskrcnn_swin_s', 'pfcr_maskrcnn_swin_t_official',
        'pfcr_maskrcnn_swin_s_official', 'pfcr_cascade_maskrcnn_swin_t',
        'pfcr_cascade_maskrcnn_swin_s', 'pfcr_maskrcnn_vit_b', 'pfcr_cascade_maskrcnn_vit_b')


CLASSIFIERS = dict(pfcr_vit_s=.8139, pfcr_vit_b=.8454, pfcr_deit_t=.7221, pfcr_deit_s=.7985,
                   pfcr_deit_b=.8180, pfcr_swin_t=.8135, pfcr_swin_s=.8323, pfcr_swin_b=.8527,
                   pfcr_vit_ti=None)


@cache
def parsed(path):
    return Config.fromfile(path)


def load(path):
    """A config of one's own; the file is parsed once."""
    return copy.deepcopy(parsed(path))


def ids(paths):
    return [str(path.relative_to(CONFIGS).with_suffix('')) for path in paths]


def bits_in(path):
    """(weight bits, activation bits) that the file's name promises."""
    return tuple(map(int, re.search(r'_w(\d)a(\d)$', path.stem).groups()))


@pytest.mark.parametrize('path', ALL, ids=ids(ALL))
def test_parses(path):
    assert load(path)


ONE_A_FAMILY = [path for path in QUANT if path.stem.endswith('w4a4')]


@pytest.mark.parametrize('path', ONE_A_FAMILY, ids=ids(ONE_A_FAMILY))
def test_survives_a_dump(path, tmp_path):
    cfg = load(path)
    cfg.dump(tmp_path / 'flat.py')
    assert Config.fromfile(tmp_path / 'flat.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('path', FLOAT + QUANT + BLOCK, ids=ids(FLOAT + QUANT + BLOCK))
def test_builds_its_model(path):
    cfg = load(path)
    if 'init_cfg' in cfg.model.get('backbone', {}):
        cfg.model.backbone.init_cfg = None  # nothing to download
    # a ViT-B takes seconds to initialise: shapes do (mmdet's Swin cannot be built so)
    quick = 'vit' in path.stem or path.parent.name == 'classification'
    with torch.device('meta' if quick else 'cpu'):
        detector = MODELS.build(dict(cfg.model, _scope_='mmdet'))
    assert type(detector).__name__ == cfg.model.get('arch', cfg.model.type).rpartition('.')[2]
    layers = [m for m in detector.modules() if isinstance(m, QuantLayer)]
    assert bool(layers) == (path in QUANT + BLOCK)


@pytest.mark.parametrize('path', QUANT, ids=ids(QUANT))
def test_bits_are_the_names(path):
    weight, activation = bits_in(path)
    cfg = load(path)
    assert cfg.model.type == 'pfcr_mm.QuantDetector'
    assert (cfg.model.quant.weight_bits, cfg.model.quant.activation_bits) == (weight, activation)
    docstring = path.read_text().splitlines()[0]
    assert f'{weight}-bit weights' in docstring and f'{activation}-bit activations' in docstring


@pytest.mark.parametrize('path', QUANT, ids=ids(QUANT))
def test_is_a_few_lines(path):
    assert len(path.read_text().splitlines()) <= 5


@pytest.mark.parametrize('path', QUANT, ids=ids(QUANT))
def test_quantize_cfg_is_legal(path):
    cfg = load(path)
    assert cfg.runner_type == 'pfcr_mm.QuantRunner'
    quantize = cfg.quantize_cfg
    check_levels(quantize.levels, 'levels')
    POSConfig(**quantize.pos)
    UnitConfig.check(quantize.reconstruction, 'reconstruction')
    UnitConfig.check(quantize.get('head_reconstruction', {}), 'head_reconstruction')
    assert 0 < quantize.calibration.held_out < quantize.calibration.images


@pytest.mark.parametrize('path', QUANT, ids=ids(QUANT))
def test_calibrates_on_the_training_split(path):
    cfg = load(path)
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    while 'dataset' in train:
        train = train.dataset
    if 'draw' in test:  # one folder for both
        assert test.draw == dict(train.draw, rest=True) and train.draw.count > 0
        return
    for key in ('ann_file', 'split'):
        if key in test:
            assert 'train' in train[key] and 'val' in test[key]


@pytest.mark.parametrize('path', QUANT, ids=ids(QUANT))
def test_types_carry_their_scope(path):
    """Scopes never search siblings: our own types need the prefix."""
    cfg = load(path)
    assert cfg.default_scope == 'mmdet'
    assert cfg.quantize_cfg.type.startswith('pfcr_mm.')
    assert all(hook.type.startswith('pfcr_mm.') for hook in cfg.quantize_hooks)


def test_mix_in_defines_new_keys_only():
    """Sibling `_base_` files may not share a top-level key."""
    mix_in = set(Config.fromfile(CONFIGS / '_base_' / 'pfcr.py').to_dict())
    detector = set(Config.fromfile(FLOAT[0]).to_dict())
    assert not mix_in & detector


def test_only_the_bits_differ_within_a_family():
    families = {}
    for path in QUANT:
        cfg = load(path).to_dict()
        cfg['model']['quant'] = None
        cfg.pop('work_dir', None)  # results of one width must not overwrite another's
        families.setdefault(re.sub(r'_w\da\d$', '', path.stem), []).append(cfg)
    assert {'pfcr_maskrcnn_swin_demo', *COCO} <= set(families)
    for name, configs in families.items():
        assert len(configs) >= (3 if name in CLASSIFIERS else 4) or 'demo' in name
        assert all(cfg == configs[0] for cfg in configs)


@pytest.mark.parametrize('family', COCO)
def test_every_coco_row_has_four_widths(family):
    widths = [bits_in(path) for path in QUANT if re.sub(r'_w\da\d$', '', path.stem) == family]
    assert sorted(widths) == [(3, 3), (4, 4), (6, 6), (8, 8)]


@pytest.mark.parametrize('family', CLASSIFIERS)
def test_every_classifier_has_three_widths(family):
    paths = [path for path in QUANT if re.sub(r'_w\da\d$', '', path.stem) == family]
    assert sorted(map(bits_in, paths)) == [(3, 3), (4, 4), (6, 6)]
    cfg = load(paths[0])
    name, expected = cfg.model.model_name, CLASSIFIERS[family]
    steps = [loader.dataset.pipeline for loader in (cfg.train_dataloader, cfg.test_dataloader)]
    assert [[step.model_name for step in pipeline] for pipeline in steps] == [[name], [name]]
    assert timm.is_model(name) and timm.models.get_pretrained_cfg(name) is not None
    if expected is not None:
        assert cfg.quantize_cfg.expected.to_dict() == dict(top1=expected)
        assert cfg.load_from == f'timm://{name}'


@pytest.mark.parametrize('family, bbox, segm', [
    ('maskrcnn_swin_t_official', 0.460, 0.416), ('maskrcnn_swin_s_official', 0.485, 0.433),
    ('cascade_maskrcnn_swin_t', 0.504, 0.437), ('cascade_maskrcnn_swin_s', 0.519, 0.450)])
def test_official_weights(family, bbox, segm):
    """The rows that published tables use, and the float AP that they are known for."""
    cfg = Config.fromfile(CONFIGS / f'pfcr_{family}_w4a4.py')
    assert 'github.com/SwinTransformer/storage/releases/download/v1.0.2/' in cfg.load_from
    assert cfg.quantize_cfg.expected.to_dict() == dict(bbox_mAP=bbox, segm_mAP=segm)
    size = 'tiny' if '_t' in family else 'small'
    assert f'{size}_patch4_window7.pth' in cfg.load_from
    assert ('cascade' in cfg.load_from) == ('cascade' in family)
    assert cfg.model.backbone.depths == [2, 2, 6 if size == 'tiny' else 18, 2]
    assert cfg.test_pipeline[1].scale == (1333, 800) and cfg.test_pipeline[1].keep_ratio
    assert cfg.model.test_cfg.rcnn.max_per_img == 100


# --- what mm tools read -----------------------------------------------------

def index():
    """Entries of the model index, as MMEngine collects them."""
    entries = []
    for name in yaml.safe_load((MIM / 'model-index.yml').read_text())['Import']:
        entries += yaml.safe_load((MIM / name).read_text())['Models']
    return entries


def test_model_index_is_the_one_at_the_top():
    assert (MIM / 'model-index.yml').resolve() == REPO / 'model-index.yml'
    assert (MIM / 'configs').resolve() == CONFIGS


def test_model_index_lists_every_quantized_config():
    listed = [entry['Config'] for entry in index()]
    assert len(listed) == len(set(listed))
    assert set(listed) >= {f'configs/{path.relative_to(CONFIGS)}' for path in QUANT}


@pytest.mark.parametrize('entry', index(), ids=lambda entry: entry['Name'])
def test_model_index_entry(entry):
    path = MIM / entry['Config']
    assert path.stem == entry['Name']
    if path.name.startswith('pfcr_'):
        metadata = entry['Metadata']
        assert (metadata['Weight Bits'], metadata['Activation Bits']) == bits_in(path)
        cfg = load(path)
        assert metadata['Calibration Images'] == cfg.quantize_cfg.calibration.images
        assert 'Weights' not in entry  # float weights in a quantized model run in float


def test_resolves_by_package_name():
    assert Config.fromfile(MIM / 'configs' / '_base_' / 'pfcr.py').runner_type
    from mmengine.hub import get_config
    cfg = get_config('pfcr_mm::demo/pfcr_maskrcnn_swin_demo_w4a4.py')
    assert cfg.model.quant.weight_bits == 4


@pytest.mark.parametrize('path', BLOCK, ids=ids(BLOCK))
def test_block_baseline_has_the_iterations_of_pfcr(path):
    """PFCR and block-only reconstruction are compared at the same total of iterations."""
    totals = []
    for name in (path.name, path.name.replace('block_', 'pfcr_')):
        cfg = Config.fromfile(path.with_name(name))
        chain = part_chains(MODELS.build(dict(cfg.model, _scope_='mmdet')))[0]['backbone']
        loop = cfg.quantize_cfg
        total = 0
        for stage in POSConfig(**loop.pos).stages(loop.levels):
            for unit in build_schedule(chain, stage.levels):
                iters = UnitConfig.build(unit.level, loop.reconstruction).iters
                total += max(1, round(iters * stage.shrink))
        totals.append(total)
    assert totals[0] == pytest.approx(totals[1], rel=0.005)
