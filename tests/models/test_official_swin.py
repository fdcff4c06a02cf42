"""Checkpoints in the official naming: a round trip, and patch merging by hand."""
import re

import pytest
import tiny_cascade
import torch
from mmdet.models.backbones.swin import swin_converter
from mmdet.models.layers import PatchMerging
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.models.checkpoint import load_float
from pfcr_mm.models.official_swin import from_official_swin, is_official_swin


def official_merging(x, norm, reduction):
    """Patch merging as the Swin paper's code joins four maps.

    Args:
        x (Tensor): (B, H, W, C), even H and W.

    Returns:
        Tensor: (B, H / 2 * W / 2, 2C).
    """
    x0, x1 = x[:, 0::2, 0::2], x[:, 1::2, 0::2]
    x2, x3 = x[:, 0::2, 1::2], x[:, 1::2, 1::2]
    joined = torch.cat([x0, x1, x2, x3], dim=-1)
    return reduction(norm(joined.flatten(1, 2)))


def official_state(state):
    """A made-up official checkpoint: mmdet's state, renamed back and unordered by hand."""
    found = {}
    for key, value in state.items():
        new = key
        if key.startswith('backbone.'):
            new = key.replace('.stages.', '.layers.').replace('.attn.w_msa.', '.attn.')
            new = new.replace('.ffn.layers.0.0.', '.mlp.fc1.')
            new = new.replace('.ffn.layers.1.', '.mlp.fc2.')
            new = new.replace('patch_embed.projection.', 'patch_embed.proj.')
        if '.downsample.' in key:
            quarter = value.shape[-1] // 4
            pixel = dict(zip(range(4), (0, 2, 1, 3)))  # official map -> row * 2 + column
            order = [c * 4 + pixel[m] for m in range(4) for c in range(quarter)]
            value = value[..., order]
        found[new] = value
    return found


@pytest.fixture(scope='module')
def floating():
    return tiny_cascade.build_float()


@pytest.fixture(scope='module')
def official(floating):
    return official_state(floating.state_dict())


def test_patch_merging_equals_the_papers(floating):
    torch.manual_seed(0)
    channels = 6
    norm, reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    state = {f'backbone.layers.0.downsample.{name}.{key}': value
             for name, module in (('norm', norm), ('reduction', reduction))
             for key, value in module.state_dict().items()}
    merging = PatchMerging(channels, 2 * channels)
    merging.load_state_dict({key.partition('downsample.')[2]: value
                             for key, value in from_official_swin(state).items()})
    x = torch.randn(2, 8, 6, channels)
    with torch.no_grad():
        ours, size = merging(x.flatten(1, 2), (8, 6))
        expected = official_merging(x, norm, reduction)
    assert size == (4, 3)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_round_trip(floating, official):
    """Official names in, the float detector's tensors out, bit for bit."""
    assert is_official_swin(official) and not is_official_swin(floating.state_dict())
    converted = from_official_swin(official)
    expected = {k: v for k, v in floating.state_dict().items()
                if not k.endswith('relative_position_index')}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[k], expected[k]) for k in expected)
    names = [k for k in official if k.startswith('backbone.')]
    assert not any(re.search(r'stages|w_msa|ffn|projection', k) for k in names)


def test_agrees_with_mmdets_converter(official):
    backbone = {k[len('backbone.'):]: v for k, v in official.items() if k.startswith('backbone.')}
    theirs = swin_converter(backbone)
    ours = from_official_swin(official)
    for key, value in theirs.items():
        if not key.endswith('relative_position_index'):
            assert torch.equal(ours[key], value), key


def test_position_index_is_the_same():
    """What both models compute by themselves, by the official formula."""
    window = 7
    grid = torch.stack(torch.meshgrid(
        torch.arange(window), torch.arange(window), indexing='ij')).flatten(1)
    relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
    expected = relative[..., 0] * (2 * window - 1) + relative[..., 1]
    detector = tiny_cascade.build_quantized()
    index = detector.backbone.stages[0].blocks[0].attn.w_msa.relative_position_index
    assert torch.equal(index, expected)


def test_load_float_takes_it(floating, official, images):
    detector = tiny_cascade.build_quantized()
    state = {f'module.{k}': v for k, v in official.items()}
    load_float(detector, dict(state_dict=state, meta={}), 'official.pth')
    inputs = images[1][0]
    for ours, theirs in zip(detector.extract_feat(inputs), floating.extract_feat(inputs)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_wrong_order_would_show(floating, official, images):
    """The test above is no empty one: without the reordering, maps differ."""
    detector = tiny_cascade.build_quantized()
    state = from_official_swin(official)
    for key in state:
        if '.downsample.' in key:
            state[key] = official[key.replace('.stages.', '.layers.')]
    load_float(detector, dict(state_dict=state, meta={}), 'official.pth')
    ours, theirs = (d.extract_feat(images[1][0])[0] for d in (detector, floating))
    assert (ours - theirs).abs().max() > 0.01


@pytest.mark.parametrize('change, message', [
    (lambda s: {k.replace('backbone.', 'trunk.').replace('neck.', 'fpn.').replace(
        'rpn_head.', 'rpn.').replace('roi_head.', 'roi.'): v for k, v in s.items()},
     "fits neither mmdet's naming .* official Swin"),
    (lambda s: {k: v for k, v in s.items() if 'layers.1.' not in k}, r"lacks .*stages\.1"),
    (lambda s: {}, 'fits neither'),
], ids=['neither naming', 'half of it', 'empty'])
def test_another_checkpoint_is_one_clear_line(change, message, official):
    detector = tiny_cascade.build_quantized()
    with pytest.raises(UsageError, match=message) as caught:
        load_float(detector, dict(state_dict=change(official), meta={}), 'mine.pth')
    assert 'mine.pth' in str(caught.value) and '\n' not in str(caught.value)
