"""Figures: what their axes are."""
import pytest
import torch

from pfcr_mm.analysis.signal_figures import grids, ranges
from pfcr_mm.analysis.taps import grid
from pfcr_mm.quantizers import QuantizerSpec, build_quantizer

LABELS = dict(float='float', quantized='PFCR')


def entry(role, kind, shift, **more):
    return dict(dict(name=f'backbone.{role}', role=role, kind=kind, bits=2, scales=1, shift=shift,
                     sqnr_db=15.0, worst_group=0, float_low=-0.2, float_q1=0.0, float_q3=1.0,
                     float_high=2.0, low=-0.2, q1=0.0, q3=1.0, high=2.0, grid_low=-0.2,
                     grid_high=2.0, clipped=0.0), **more)


def test_a_logarithmic_grid_has_a_logarithmic_axis():
    """Levels 0, 1/4, 1/2, 1 of value + 0.17 are equidistant there; 0 is the left end."""
    adalog = build_quantizer(QuantizerSpec(kind='adalog', bits=2, shift=0.17))
    adalog.set_grid(torch.ones(1), torch.ones(1))
    uniform = build_quantizer(QuantizerSpec(bits=2))
    uniform.set_scale(torch.ones(1), torch.ones(1))
    entries = [entry('post-LN', 'uniform', None), entry('post-GELU', 'adalog', 0.17)]
    values = torch.linspace(-0.17, 0.8, 200)[:, None]
    made = grids(entries, {e['name']: (values, values) for e in entries},
                 {e['name']: grid(q) for e, q in zip(entries, (uniform, adalog))}, LABELS)
    plain, logarithmic = made.axes
    assert (plain.get_xscale(), plain.get_xlabel()) == ('linear', 'value')
    assert (logarithmic.get_xscale(), logarithmic.get_xlabel()) == ('log', 'value + 0.17')
    drawn = [[line[0][0] for line in axis.collections[-1].get_segments()] for axis in made.axes]
    assert drawn[0] == pytest.approx([-1, 0, 1, 2])
    assert drawn[1][1:] == pytest.approx([0.25, 0.5, 1.0]) and drawn[1][0] < 0.125


def test_one_wide_range_leaves_room_for_the_others():
    chosen = [entry('post-GELU', 'adalog', 0.17, name=f'backbone.{i}') for i in range(5)]
    levels = {e['name']: torch.tensor([[-0.2, 0.5, 1.0, 2.0]]) for e in chosen}
    axis = ranges(chosen, levels, LABELS).axes[0]
    assert axis.get_yscale() == 'linear'
    assert axis.lines[0].get_ydata() == pytest.approx([-0.2, 0.5, 1.0, 2.0] * 5)
    chosen[3]['grid_high'] = 187.0
    axis = ranges(chosen, levels, LABELS).axes[0]
    assert axis.get_yscale() == 'symlog' and 'logarithmic beyond 2.0' in axis.get_ylabel()
    assert -1 < axis.get_ylim()[0] < -0.2
