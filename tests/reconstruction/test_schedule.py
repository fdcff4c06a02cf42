"""Units and the order in which they are reconstructed."""
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models import Chain, Leaf, QuantConfig, convert, part_chains
from pfcr_mm.models.backbones import TimmViT
from pfcr_mm.models.swin import swin_chain
from pfcr_mm.models.vit import vit_chain
from pfcr_mm.reconstruction import build_schedule, traversal_string, units_of

ALL = ['leaf', 'block', 'pair', 'stage', 'backbone']
POST_ORDER = (
    'E1 A1 M1 B1 A2 M2 B2 P1 D1 S1 '
    'A3 M3 B3 A4 M4 B4 P2 D2 S2 '
    'A5 M5 B5 A6 M6 B6 P3 A7 M7 B7 A8 M8 B8 P4 A9 M9 B9 A10 M10 B10 P5 D3 S3 '
    'A11 M11 B11 A12 M12 B12 P6 S4 ALL')
LEVEL_ORDER = (
    'E1 A1 M1 A2 M2 D1 A3 M3 A4 M4 D2 A5 M5 A6 M6 A7 M7 A8 M8 A9 M9 A10 M10 D3 A11 M11 A12 M12 '
    'B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 P1 P2 P3 P4 P5 P6 S1 S2 S3 S4 ALL')


@pytest.fixture(scope='module')
def chain():
    """The backbone of Swin-T, in narrow."""
    torch.manual_seed(0)
    model = nn.Sequential(SwinTransformer(
        embed_dims=8, depths=(2, 2, 6, 2), num_heads=(1, 1, 2, 2)))
    convert(model, QuantConfig())
    return swin_chain(model[0])


def test_golden_post_order(chain):
    assert traversal_string(build_schedule(chain, ALL)) == POST_ORDER


def test_golden_level_order(chain):
    assert traversal_string(build_schedule(chain, ALL, 'level_order')) == LEVEL_ORDER


def test_golden_with_quads(chain):
    found = traversal_string(build_schedule(chain, ['pair', 'quad', 'stage']))
    assert found == 'P1 S1 P2 S2 P3 P4 Q1 P5 S3 P6 S4'


@pytest.mark.parametrize('levels', [
    ALL, ['leaf', 'block'], ['block', 'stage'],
    ['leaf', 'block', 'pair', 'quad', 'stage', 'backbone']], ids=str)
def test_a_coarse_unit_follows_its_last_child(chain, levels):
    """All units inside come before it, and the one right before ends where it ends."""
    schedule = build_schedule(chain, levels)
    for i, unit in enumerate(schedule):
        inside = [u for u in schedule
                  if u != unit and unit.start <= u.start and u.stop <= unit.stop
                  and u.stop - u.start < unit.stop - unit.start]
        assert all(schedule.index(u) < i for u in inside)
        if inside:
            last = schedule[i - 1]
            assert last in inside
            # nothing but a leaf without quantizers may lie behind the last child
            assert all(leaf.letter == 'N' for leaf in chain.leaves[last.stop:unit.stop])


def test_units_of_each_level(chain):
    count = {level: len(units_of(chain, level)) for level in
             ('leaf', 'block', 'pair', 'quad', 'stage', 'backbone', 'chain')}
    assert count == dict(leaf=28, block=12, pair=6, quad=1, stage=4, backbone=1, chain=1)


def test_units_of_a_level_do_not_overlap_and_a_block_is_its_leaves(chain):
    for level in ALL:
        units = units_of(chain, level)
        assert all(a.stop <= b.start for a, b in zip(units, units[1:]))
    for unit in units_of(chain, 'block'):
        assert [leaf.letter for leaf in chain.leaves[unit.start:unit.stop]] == ['A', 'M']
    for unit in units_of(chain, 'pair'):
        assert unit.stop - unit.start == 4
        assert len({leaf.stage for leaf in chain.leaves[unit.start:unit.stop]}) == 1


def test_stages_hold_their_downsampling_and_last_norm(chain):
    ends = [chain.leaves[unit.stop - 1].letter for unit in units_of(chain, 'stage')]
    assert ends == ['D', 'D', 'D', 'N']
    whole, = units_of(chain, 'backbone')
    assert (whole.start, whole.stop) == (0, len(chain.leaves))


def test_names(chain):
    schedule = {u.label: u.name for u in build_schedule(chain, ALL)}
    assert schedule['E1'] == 'backbone.patch_embed'
    assert schedule['A5'] == 'backbone.stages.2.blocks.0.attn'
    assert schedule['B5'] == 'backbone.stages.2.blocks.0'
    assert schedule['P4'] == 'backbone.stages.2.blocks.2-3'
    assert schedule['S3'] == 'backbone.stages.2'
    assert schedule['ALL'] == 'backbone'
    assert len(set(schedule.values())) == len(schedule)


def test_heads(quantized):
    schedules = {
        name: traversal_string(build_schedule(chain, ['leaf', 'chain']))
        for name, chain in part_chains(quantized)[0].items() if name != 'backbone'
    }
    assert schedules == {
        'neck': 'L1 L2 ALL', 'rpn_head': 'L1 L2 ALL', 'roi_head.bbox_head': 'L1 L2 L3 ALL',
        'roi_head.mask_head': 'L1 L2 ALL'}


def test_levels_are_sorted_and_unique(chain):
    shuffled = ['backbone', 'pair', 'leaf', 'stage', 'block', 'leaf']
    assert traversal_string(build_schedule(chain, shuffled)) == POST_ORDER


def test_leaves_without_quantizers_are_no_units():
    chain = Chain('x', [Leaf('a', None, (nn.Linear(2, 2), )), Leaf('b', None)], 1)
    assert units_of(chain, 'leaf') == []


def test_a_chain_of_one_leaf_has_no_coarser_unit():
    assert units_of(Chain('x', [Leaf('a', None)], 1), 'chain') == []


def test_unknown_level_and_traversal(chain):
    with pytest.raises(UsageError, match="quantize_cfg.levels has 'blok', which is no level"):
        build_schedule(chain, ['leaf', 'blok'], key='quantize_cfg.levels')
    with pytest.raises(UsageError, match="traversal='random' is not known.*post_order"):
        build_schedule(chain, ['leaf'], 'random')


# --- plain ViTs: quads, or groups that end with a global block -----------------

VIT_LEVELS = ['leaf', 'block', 'pair', 'quad', 'group', 'double', 'backbone']
VIT_POST_ORDER = (
    'E1 A1 M1 B1 A2 M2 B2 P1 A3 M3 B3 A4 M4 B4 P2 Q1 '
    'A5 M5 B5 A6 M6 B6 P3 A7 M7 B7 A8 M8 B8 P4 Q2 '
    'A9 M9 B9 A10 M10 B10 P5 A11 M11 B11 A12 M12 B12 P6 Q3 ALL')
VITDET_POST_ORDER = (
    'E1 A1 M1 B1 A2 M2 B2 P1 A3 M3 B3 G1 A4 M4 B4 A5 M5 B5 P2 A6 M6 B6 G2 GG1 '
    'A7 M7 B7 A8 M8 B8 P3 A9 M9 B9 G3 A10 M10 B10 A11 M11 B11 P4 A12 M12 B12 G4 GG2 ALL')
VITDET_LEVEL_ORDER = (
    'E1 A1 M1 A2 M2 A3 M3 A4 M4 A5 M5 A6 M6 A7 M7 A8 M8 A9 M9 A10 M10 A11 M11 A12 M12 '
    'B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 P1 P2 P3 P4 G1 G2 G3 G4 GG1 GG2 ALL')


def vit(depth=12, **kwargs):
    """The chain of a ViT-B, in narrow."""
    model = nn.Sequential(TimmViT(
        'vit_base_patch16_224', timm_args=dict(depth=depth, embed_dim=8, num_heads=2), **kwargs))
    convert(model, QuantConfig())
    return vit_chain(model[0])


def test_golden_plain_vit():
    assert traversal_string(build_schedule(vit(), VIT_LEVELS)) == VIT_POST_ORDER


def test_golden_vit_with_global_blocks():
    chain = vit(window_size=2, global_blocks=(2, 5, 8, 11))
    assert traversal_string(build_schedule(chain, VIT_LEVELS)) == VITDET_POST_ORDER
    assert traversal_string(build_schedule(chain, VIT_LEVELS, 'level_order')) == VITDET_LEVEL_ORDER


@pytest.mark.parametrize('kwargs, expected', [
    (dict(window_size=2), 'P1 P2 Q1 P3 ALL'),
    (dict(window_size=2, global_blocks=range(6)), 'P1 P2 Q1 P3 ALL'),
    (dict(global_blocks=(2, 5)), 'P1 P2 Q1 P3 ALL'),
    (dict(window_size=2, global_blocks=(5, )), 'P1 P2 P3 G1 ALL'),
    (dict(window_size=2, global_blocks=(3, )), 'P1 P2 G1 P3 G2 GG1 ALL'),
], ids=['windows', 'all global', 'no windows', 'one group', 'blocks behind the last global'])
def test_groups_of_other_patterns(kwargs, expected):
    units = build_schedule(vit(6, **kwargs), VIT_LEVELS[2:])
    assert traversal_string(units) == expected


def test_names_of_groups():
    chain = vit(window_size=2, global_blocks=(2, 5, 8, 11))
    names = {u.label: u.name for u in build_schedule(chain, VIT_LEVELS)}
    assert names['E1'] == 'backbone.patch_embed' and names['M4'] == 'backbone.blocks.3.mlp'
    assert names['P2'] == 'backbone.blocks.3-4' and names['G2'] == 'backbone.blocks.3-5'
    assert names['GG2'] == 'backbone.blocks.6-11' and names['ALL'] == 'backbone'
    assert len(set(names.values())) == len(names)
