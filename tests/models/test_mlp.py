"""Which layers read a GELU's output, and what quantizes it."""
import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from timm.layers import Mlp
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models import QuantConfig, convert
from pfcr_mm.models.mlp import post_gelu_layers

GELU = dict(type='GELU')


def kinds(model, **quant):
    """Kind of the input quantizer by layer."""
    convert(model, QuantConfig.from_dict(quant))
    return {n.rpartition('.')[0]: m.spec.kind for n, m in model.named_modules()
            if n.endswith('input_quantizer')}


def test_mmcv_ffn():
    assert kinds(FFN(4, 8, num_fcs=2, act_cfg=GELU)) == {
        'layers.0.0': 'uniform', 'layers.1': 'adalog'}
    assert kinds(FFN(4, 8, num_fcs=3, act_cfg=GELU)) == {
        'layers.0.0': 'uniform', 'layers.1.0': 'adalog', 'layers.2': 'adalog'}


def test_timm_mlp():
    assert kinds(Mlp(4, 8)) == {'fc1': 'uniform', 'fc2': 'adalog'}


@pytest.mark.parametrize('mlp', [
    FFN(4, 8, act_cfg=dict(type='ReLU')), Mlp(4, 8, act_layer=nn.ReLU),
    Mlp(4, 8, norm_layer=nn.LayerNorm)], ids=['relu ffn', 'relu mlp', 'normed'])
def test_no_gelu_just_before(mlp):
    assert post_gelu_layers(mlp) == [] and set(kinds(mlp).values()) == {'uniform'}


def test_an_mlp_of_another_forward_is_left_alone():

    class Gated(Mlp):

        def forward(self, x):
            return self.fc2(x[..., :8] * self.act(self.fc1(x)))

    assert post_gelu_layers(Gated(4, 8)) == []


def test_bits_excludes_and_other_kinds():
    mlp = Mlp(4, 8)
    convert(mlp, QuantConfig.from_dict(dict(
        activation_bits=4, overrides=[dict(pattern='fc2', activation_bits=6)])))
    spec = mlp.fc2.input_quantizer.spec
    assert (spec.kind, spec.bits, spec.shift, spec.granularity) == ('adalog', 6, 0.17, 'tensor')
    mlp = Mlp(4, 8)
    convert(mlp, QuantConfig.from_dict(dict(exclude=['fc2'])))
    assert type(mlp.fc2) is nn.Linear
    assert kinds(Mlp(4, 8), post_gelu=None)['fc2'] == 'uniform'
    assert kinds(Mlp(4, 8), post_gelu=dict(kind='uniform'))['fc2'] == 'uniform'
    assert kinds(Mlp(4, 8), post_gelu=dict(kind='log_sqrt2'))['fc2'] == 'log_sqrt2'


def test_values_after_a_gelu_are_above_the_shift():
    x = nn.functional.gelu(torch.linspace(-6, 6, 100_001, dtype=torch.float64))
    assert -0.17 < x.min() < -0.1699


@pytest.mark.parametrize('post_gelu, message', [
    (dict(kind='log3'), r"quant\.post_gelu\.kind='log3' is not a known quantizer"),
    (dict(bits=3), r'quant\.post_gelu\.bits is not a known key'),
    (dict(shift=-1), r'shift=-1 is out of range'),
    (dict(granularity='channel'), r"quant\.post_gelu\.granularity has to be 'tensor'"),
    ('adalog', r"quant\.post_gelu='adalog' is no dict"),
])
def test_mistakes(post_gelu, message):
    with pytest.raises(UsageError, match=message):
        QuantConfig.from_dict(dict(post_gelu=post_gelu))
