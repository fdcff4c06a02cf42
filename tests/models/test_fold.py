"""Batch norms go into convolutions, whoever loads the checkpoint."""
import copy

import pytest
import tiny_cascade
import torch
from mmcv.cnn import ConvModule
from mmengine.runner.checkpoint import load_state_dict
from tiny_cascade import with_statistics
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models.checkpoint import load_float
from pfcr_mm.models.fold import Folded, fold_batch_norms, fold_state
from pfcr_mm.modules import QuantLayer


def block(norm='BN', **options):
    torch.manual_seed(0)
    return with_statistics(ConvModule(3, 4, 3, norm_cfg=dict(type=norm), **options)).eval()


# --- one block ---------------------------------------------------------------

def test_a_value_by_hand():
    """(3 x - 1) / sqrt(3 + 1) * 4 + 5 = 6 x + 3."""
    state = {
        'c.weight': torch.full((1, 1, 1, 1), 3.), 'n.running_mean': torch.tensor([1.]),
        'n.running_var': torch.tensor([3.]), 'n.weight': torch.tensor([4.]),
        'n.bias': torch.tensor([5.]), 'n.num_batches_tracked': torch.tensor(7)}
    fold_state(state, [Folded('c', 'n', eps=1.)])
    assert state.keys() == {'c.weight', 'c.bias'}
    assert state['c.weight'].item() == pytest.approx(6) and state['c.bias'].item() == 3


@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
@pytest.mark.parametrize('options', [
    {}, dict(bias=True), dict(act_cfg=None), dict(order=('act', 'conv', 'norm')),
    dict(padding=1, padding_mode='reflect')],
    ids=['plain', 'bias', 'no act', 'act first', 'reflect'])
def test_outputs_stay(norm, options):
    model = nn.Sequential(block(norm, **options))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        assert len(fold_batch_norms(model)) == 1
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert isinstance(model[0].norm, nn.Identity) and model[0].conv.bias is not None


@pytest.mark.parametrize('build', [
    lambda: ConvModule(4, 4, 3, norm_cfg=dict(type='GN', num_groups=2)),
    lambda: ConvModule(3, 4, 3, norm_cfg=dict(type='BN', track_running_stats=False)),
    lambda: ConvModule(3, 3, 3, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')),
    lambda: ConvModule(3, 4, 3),
], ids=['group norm', 'no statistics', 'norm first', 'no norm'])
def test_other_blocks_stay(build):
    model = nn.Sequential(build())
    keys = list(model.state_dict())
    assert fold_batch_norms(model) == [] and list(model.state_dict()) == keys


def test_a_convolution_with_several_norms_stays():
    model = nn.ModuleList([block(), block()])
    model[1].conv = model[0].conv
    assert fold_batch_norms(model) == []


def test_a_block_under_two_names():
    model = nn.ModuleDict(dict(a=block(), b=nn.Identity()))
    model['b'] = model['a']
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model['a'](x)
        folded = fold_batch_norms(model)
        assert [fold.conv for fold in folded] == ['a.conv', 'b.conv']
        fold_state(state, folded)
        model.load_state_dict(state)
        torch.testing.assert_close(model['a'](x), expected, atol=1e-5, rtol=1e-5)


# --- the cascade -------------------------------------------------------------

@pytest.fixture(scope='module')
def floating():
    return tiny_cascade.build_float()


@pytest.fixture(scope='module')
def rois():
    return torch.randn(5, 16, 7, 7, generator=torch.Generator().manual_seed(1))


def same_heads(detector, floating, rois):
    for ours, theirs in zip(detector.roi_head.bbox_head, floating.roi_head.bbox_head):
        for a, b in zip(ours(rois), theirs(rois)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_every_norm_of_the_cascade_is_folded():
    detector = tiny_cascade.build_quantized()
    names = {fold.conv for fold in detector.folded}
    assert names == {f'roi_head.bbox_head.{stage}.shared_convs.{i}.conv'
                     for stage in range(3) for i in range(2)}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in detector.modules())
    convs = [detector.get_submodule(name) for name in names]
    assert all(isinstance(conv, QuantLayer) and conv.bias is not None for conv in convs)


@pytest.mark.parametrize('how', ['torch', 'torch strict keys', 'mmengine', 'load_float'])
def test_a_float_checkpoint_is_folded_by_any_loader(how, floating, rois):
    detector = tiny_cascade.build_quantized()
    state = floating.state_dict()
    kept = dict(state)
    if how == 'mmengine':
        load_state_dict(detector, state, strict=False, logger='silent')
    elif how == 'load_float':
        load_float(detector, dict(state_dict=state, meta={}), 'float.pth')
    else:
        keys = detector.load_state_dict(state, strict=False)
        if how == 'torch strict keys':
            assert not keys.unexpected_keys
    same_heads(detector, floating, rois)
    assert state.keys() == kept.keys()  # the caller's dict is left alone


def test_folded_weights_load_again(floating, rois):
    first = tiny_cascade.build_quantized(floating.state_dict())
    second = tiny_cascade.build_quantized(first.state_dict())
    same_heads(second, floating, rois)
    copied = copy.deepcopy(first)  # the copy's hook folds too
    copied.load_state_dict(floating.state_dict(), strict=False)
    same_heads(copied, floating, rois)


def test_a_checkpoint_without_statistics_is_refused(floating):
    detector = tiny_cascade.build_quantized()
    state = {k: v for k, v in floating.state_dict().items() if 'running_var' not in k}
    with pytest.raises(UsageError, match=r'lacks .*shared_convs\.0\.conv\.bias') as caught:
        load_float(detector, dict(state_dict=state, meta={}), 'float.pth')
    assert '\n' not in str(caught.value)


def test_a_resnet_keeps_its_norms():
    """Its norms are no ConvModules': they stay, and still work."""
    from mmdet.models.backbones import ResNet
    backbone = ResNet(18, base_channels=8)
    backbone.eval()
    assert fold_batch_norms(backbone) == []
    assert len(backbone(torch.randn(1, 3, 32, 32))) == 4
