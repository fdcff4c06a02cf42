"""The detection ViT computes what timm computes, and loads what timm and ViTDet saved."""
import copy

import pytest
import timm
import torch
from mmengine.registry import MODELS
from timm.models.vision_transformer_sam import Block as SamBlock
from tiny_models import randomise

from pfcr_mm.errors import UsageError
from pfcr_mm.models.backbones.attention import GridAttention

TI = 'vit_tiny_patch16_224'
TINY = dict(depth=3, embed_dim=32, num_heads=2)
SIZES = [(224, 224), (96, 160), (250, 70)]


def build(model_name=TI, seed=0, **kwargs):
    kwargs.setdefault('timm_args', TINY)
    vit = MODELS.build(dict(type='pfcr_mm.TimmViT', model_name=model_name, **kwargs))
    return randomise(vit.requires_grad_(False), seed).eval()


def twin(vit, **kwargs):
    """timm's own model without a class token, with the weights of `vit`."""
    model = timm.create_model(
        TI, num_classes=0, class_token=False, global_pool='', dynamic_img_size=True,
        dynamic_img_pad=True, **TINY, **kwargs).eval().requires_grad_(False)
    state = vit.state_dict()
    state['pos_embed'] = state['pos_embed'][:, 1:]
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all(key.startswith('norm.') for key in missing)
    return model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'plain'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_is_timm_at_any_size(size, fused):
    vit = build()
    model = twin(vit)
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, *size)
    expected = model.forward_intermediates(x, 1, intermediates_only=True)[0]
    assert relative(vit(x)[0], expected) < 1e-5


@pytest.mark.parametrize('kwargs', [
    dict(qkv_bias=False), dict(qk_norm=True), dict(init_values=0.5), dict(proj_bias=False),
    dict(scale_attn_norm=True, scale_mlp_norm=True), dict(pre_norm=True), dict(mlp_ratio=2.0),
], ids=lambda kwargs: next(iter(kwargs)))
def test_options_of_timm_work(kwargs):
    vit = build(timm_args=dict(TINY, **kwargs))
    x = torch.randn(1, 3, 64, 96)
    expected = twin(vit, **kwargs).forward_intermediates(x, 1, intermediates_only=True)[0]
    assert relative(vit(x)[0], expected) < 1e-5


def test_real_weights_agree_with_timm():
    """The published size, at timm's own resolution and another."""
    torch.manual_seed(1)
    model = timm.create_model(
        TI, num_classes=0, class_token=False, global_pool='', dynamic_img_size=True,
        depth=4).eval()
    vit = MODELS.build(dict(
        type='pfcr_mm.TimmViT', model_name=TI, timm_args=dict(depth=4))).eval()
    state = model.state_dict()
    state['pos_embed'] = torch.cat([torch.zeros(1, 1, 192), state['pos_embed']], 1)
    vit.load_state_dict(state, strict=False)
    for size in ((224, 224), (160, 272)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model.forward_intermediates(x, 1, intermediates_only=True)[0]
            assert (vit(x)[0] - expected).abs().max() < 1e-4


def sam_blocks(vit):
    """timm's SAM blocks, another writing of ViTDet's, with the weights of `vit`."""
    blocks = torch.nn.Sequential(*(
        SamBlock(32, 2, qkv_bias=True, use_rel_pos=True, window_size=b.attn.window_size,
                 input_size=(14, 14), norm_layer=torch.nn.LayerNorm) for b in vit.blocks))
    for block, own in zip(blocks, vit.blocks):
        block.load_state_dict({k: v for k, v in own.state_dict().items()})
        block.norm1.eps, block.norm2.eps = own.norm1.eps, own.norm2.eps
    return blocks.eval()


@pytest.mark.parametrize('size', [(224, 224), (96, 160), (250, 70), (32, 32)], ids=str)
def test_windows_and_relative_positions_are_vitdets(size):
    """Padded windows, an image smaller than a window, interpolated tables of global blocks."""
    vit = build(window_size=4, global_blocks=(2, ), rel_pos=True, rel_pos_img_size=224)
    x = torch.randn(2, 3, *size)
    expected = sam_blocks(vit)(vit.embed(x)).permute(0, 3, 1, 2)
    assert relative(vit(x)[0], expected) < 1e-5


def test_relative_positions_by_hand():
    """One head, d = 1: logits get q (table_h[row distance] + table_w[column distance])."""
    attention = timm.layers.Attention(1, 1, qkv_bias=True)
    GridAttention.adopt(attention, 0, 2).requires_grad_(False)
    attention.qkv.weight.copy_(torch.tensor([[1.0], [1.0], [1.0]]))
    attention.qkv.bias.zero_()
    attention.proj.weight.fill_(1.0)
    attention.proj.bias.zero_()
    attention.rel_pos_h.copy_(torch.tensor([[-0.5], [0.1], [0.7]]))  # distance -1, 0, 1
    attention.rel_pos_w.copy_(torch.tensor([[0.3], [-0.2], [0.4]]))
    tokens = torch.tensor([1.0, 2.0, 3.0, 4.0])
    logits = torch.empty(4, 4)
    for q in range(4):
        for k in range(4):
            rows, columns = q // 2 - k // 2, q % 2 - k % 2
            logits[q, k] = tokens[q] * tokens[k] + tokens[q] * (
                [-0.5, 0.1, 0.7][rows + 1] + [0.3, -0.2, 0.4][columns + 1])
    expected = logits.softmax(-1) @ tokens
    found = attention(tokens.view(1, 2, 2, 1))
    assert torch.allclose(found.flatten(), expected, atol=1e-6)


def test_windows_do_not_see_each_other():
    vit = build(window_size=2, timm_args=dict(TINY, depth=1))
    x = torch.randn(1, 3, 64, 64)  # 4x4 tokens, 2x2 windows
    before = vit(x)[0]
    x[:, :, 40:, 40:] += 1
    changed = (vit(x)[0] != before).any(1)[0]
    assert changed[2:, 2:].all() and changed.sum() == 4


@pytest.mark.parametrize('size', [(1, 1), (16, 16), (30, 500)], ids=str)
def test_images_smaller_than_a_window(size):
    vit = build(window_size=14, global_blocks=(1, ), rel_pos=True)
    found, = vit(torch.randn(2, 3, *size))
    assert found.shape == (2, 32, -(-size[0] // 16), -(-size[1] // 16))
    assert found.isfinite().all()


def test_positions_are_interpolated_once_a_size_and_follow_the_weights():
    vit = build()
    x = torch.randn(1, 3, 64, 80)
    before = vit(x)[0]
    assert vit.positions(4, 5) is vit.positions(4, 5)
    for size in range(2, 8):
        vit.positions(size, size)
    assert len(vit._positions) == 4
    vit.pos_embed.mul_(2)
    assert relative(vit(x)[0], before) > 1e-3
    vit.pos_embed.mul_(0.5)
    assert torch.allclose(vit(x)[0], before)
    assert vit.double().positions(4, 5).dtype == torch.float64


def test_positions_learn():
    vit = build().requires_grad_(True)
    vit(torch.randn(1, 3, 64, 80))[0].sum().backward()
    vit(torch.randn(1, 3, 64, 80))[0].sum().backward()
    assert vit.pos_embed.grad[:, 1:].abs().sum() > 0


def test_two_ways_of_interpolating():
    vit = build()
    patches = vit.pos_embed[:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        patches, (20, 30), mode='bicubic', align_corners=False).permute(0, 2, 3, 1)
    assert relative(vit.positions(20, 30), expected) > 1e-3
    assert relative(build(pos_antialias=False).positions(20, 30), expected) < 1e-6


def test_final_norm_intermediate_maps_and_eps():
    vit = build(final_norm=True, out_indices=(0, -1), norm_eps=1e-3)
    x = torch.randn(1, 3, 64, 80)
    first, last = vit(x)
    tokens = vit.blocks[0](vit.embed(x))
    assert torch.allclose(first.permute(0, 2, 3, 1), vit.norm(tokens), atol=1e-6)
    assert vit.blocks[1].norm2.eps == vit.norm.eps == 1e-3
    assert last.shape == first.shape


def test_drop_path_rises_to_its_rate():
    vit = build(drop_path_rate=0.2)
    assert [getattr(b.drop_path2, 'drop_prob', 0.0) for b in vit.blocks] == pytest.approx(
        [0, 0.1, 0.2])
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(vit(x)[0], vit(x)[0])


def test_deep_copies_and_training_mode():
    vit = copy.deepcopy(build(window_size=2))
    assert vit.train() is vit and vit.training


# --- weights ------------------------------------------------------------------

@pytest.fixture()
def classifier(tmp_path):
    """(state dict of a timm classifier, file that holds it)."""
    state = timm.create_model(TI, num_classes=5, **TINY).state_dict()
    torch.save(state, tmp_path / 'vit.pth')
    return state, tmp_path / 'vit.pth'


def test_loads_a_classifier(classifier):
    state, path = classifier
    vit = build(pretrained=str(path), window_size=7, rel_pos=True)
    vit.init_weights()
    own = {k: v for k, v in vit.state_dict().items() if '.rel_pos_' not in k}
    assert len(own) == 3 + 3 * 12
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_loads_a_training_file_with_the_key_model(classifier, tmp_path):
    state, _ = classifier
    torch.save(dict(model=state), tmp_path / 'mae.pth')
    vit = build(pretrained=str(tmp_path / 'mae.pth'))
    vit.init_weights()
    assert torch.equal(vit.pos_embed, state['pos_embed'])


@pytest.mark.parametrize('name, rows', [('deit_tiny_distilled_patch16_224', 198),
                                        ('vit_tiny_patch16_384', 577)])
def test_loads_positions_of_another_model(tmp_path, name, rows):
    state = timm.create_model(name, num_classes=0, **TINY).state_dict()
    assert state['pos_embed'].shape[1] == rows
    torch.save(state, tmp_path / 'vit.pth')
    vit = build(pretrained=str(tmp_path / 'vit.pth'))
    vit.init_weights()
    if rows == 198:
        assert torch.equal(vit.pos_embed[:, 1:], state['pos_embed'][:, 2:])
    assert vit.pos_embed.shape == (1, 197, 32)


def test_averaging_models_call_the_last_norm_otherwise(tmp_path):
    state = timm.create_model(TI, global_pool='avg', **TINY).state_dict()
    state['fc_norm.weight'] = torch.rand(32)
    torch.save(state, tmp_path / 'vit.pth')
    vit = build(pretrained=str(tmp_path / 'vit.pth'), final_norm=True)
    vit.init_weights()
    assert torch.equal(vit.norm.weight, state['fc_norm.weight'])


def spoil(state, how):
    state = dict(state)
    if how == 'lacks':
        del state['blocks.1.mlp.fc1.weight']
    elif how == 'width':
        state['patch_embed.proj.weight'] = torch.zeros(16, 3, 16, 16)
    elif how == 'depth':
        state['blocks.3.norm1.weight'] = torch.zeros(32)
    return state


@pytest.mark.parametrize('how, message', [
    ('lacks', "it has no 'blocks.1.mlp.fc1.weight'"),
    ('width', "it has another shape of 'patch_embed.proj.weight'"),
    ('depth', "it has beyond it 'blocks.3.norm1.weight'"),
])
def test_weights_of_another_model(classifier, tmp_path, how, message):
    torch.save(spoil(classifier[0], how), tmp_path / 'bad.pth')
    with pytest.raises(UsageError, match='backbone.pretrained=.*' + message):
        build(pretrained=str(tmp_path / 'bad.pth')).init_weights()


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match='backbone.pretrained: checkpoint .*no.pth is not there'):
        build(pretrained=str(tmp_path / 'no.pth')).init_weights()


def test_timm_has_no_weights_to_give(monkeypatch):
    def fail(*_, **__):
        raise OSError('no network\nat all')

    vit = build(pretrained=True)
    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(UsageError, match=r"pretrained=True: timm has no weights .*\(no network\)"):
        vit.init_weights()


# --- bad input ----------------------------------------------------------------

@pytest.mark.parametrize('kwargs, message', [
    (dict(model_name='vit_tiny_patch16_225'),
     "model_name='vit_tiny_patch16_225' is not a model of timm .*'vit_tiny_patch16_224'"),
    (dict(model_name='vit'), 'is not a model of timm'),
    (dict(model_name=3), 'model_name=3 is not a model of timm'),
    (dict(model_name='resnet50', timm_args=None), "model_name='resnet50' is not a plain ViT"),
    (dict(model_name='samvit_base_patch16'), 'is not a plain ViT'),
    (dict(model_name='vit_base_patch16_rpn_224'), 'is not a plain ViT'),
    (dict(timm_args=dict(deep=3)), r"timm_args=\{'deep': 3\} does not fit vit_tiny_patch16_224"),
    (dict(timm_args=dict(TINY, attn_layer='diff')), 'is not a plain ViT'),
    (dict(window_size=-1), 'window_size=-1 is not a number of tokens'),
    (dict(window_size='14'), "window_size='14'"),
    (dict(window_size=14, global_blocks=(2, 3)), r'global_blocks has 3; the blocks are .* 0 to 2'),
    (dict(out_indices=(0, 1)), r'out_indices=\(0, 1\) lacks the last block 2'),
], ids=lambda v: str(v)[:50] if isinstance(v, dict) else '')
def test_a_mistake_is_one_line_that_names_the_key(kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(**kwargs)
    assert str(caught.value).startswith('backbone.') and '\n' not in str(caught.value)
