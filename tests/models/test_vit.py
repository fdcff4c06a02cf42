"""Quantized ViTs: one code path for the detection backbone and for timm's classifiers."""
import copy
from pathlib import Path

import pytest
import timm
import torch
from mmcv.cnn import ConvModule
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS
from test_reparam import scale_channels, worst
from tiny_models import calibrated, fold_by, predict, randomise
from torch import nn
from torchvision.ops import roi_align

from pfcr_mm.models import QuantConfig, State, convert, part_chains, reparameterise
from pfcr_mm.models.checkpoint import (
    load_float,
    load_quantized,
    read_checkpoint,
    save_quantized,
)
from pfcr_mm.models.fit import MOVED
from pfcr_mm.models.head_folds import free_heads
from pfcr_mm.models.reparam import make_channelwise, post_norm_pairs
from pfcr_mm.models.vit import classifier_chain
from pfcr_mm.modules import QuantLayer, quantizers_of, set_quantization
from pfcr_mm.reconstruction import calibrate, harden, observe
from pfcr_mm.registry import CHAINS

CONFIGS = Path(__file__).parents[2] / 'configs'
DEPTH = 3


@pytest.fixture(scope='module')
def vit_config(tiny_config):
    """A tiny ViTDet: windows of 3 tokens on maps of 4x4, 4x6 and 6x4, one global block."""
    config = copy.deepcopy(tiny_config)
    config.backbone = dict(
        type='pfcr_mm.TimmViT', model_name='vit_tiny_patch16_224', window_size=3,
        global_blocks=(2, ), rel_pos=True, rel_pos_img_size=64, drop_path_rate=0.1,
        timm_args=dict(depth=DEPTH, embed_dim=32, num_heads=2))
    config.neck = dict(type='pfcr_mm.SimpleFPN', backbone_channel=32, out_channels=16)
    config.rpn_head.num_convs = 2
    norm_cfg = dict(type='pfcr_mm.LN2d')
    config.roi_head.bbox_head.update(
        type='Shared4Conv1FCBBoxHead', conv_out_channels=16, norm_cfg=norm_cfg)
    config.roi_head.mask_head.norm_cfg = norm_cfg
    return config


@pytest.fixture(scope='module')
def build_vit(vit_config, build_quantized):
    """build(**quant): a quantized tiny ViTDet with seeded weights."""
    return lambda **quant: build_quantized(config=vit_config, **quant)


@pytest.fixture(scope='module')
def _vit(build_vit, images):
    return calibrated(build_vit(weight_bits=4, activation_bits=4), images)


@pytest.fixture()
def vit(_vit):
    """A calibrated W4A4 tiny ViTDet, quantizers on."""
    return copy.deepcopy(_vit)


@pytest.fixture(scope='module')
def float_vit(vit_config, _vit):
    """The float detector of the same weights, in which nothing is swapped."""
    detector = MODELS.build(dict(copy.deepcopy(vit_config), _scope_='mmdet'))
    state = _vit.state_dict()
    detector.load_state_dict({key: state[key] for key in detector.state_dict()})
    return detector.requires_grad_(False).eval()


def classifier(**kwargs):
    """A tiny timm classifier with seeded weights."""
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=64, num_classes=5, depth=2, embed_dim=32, num_heads=2,
        **kwargs)
    return randomise(model.requires_grad_(False)).eval()


# --- off is float -------------------------------------------------------------

@pytest.mark.parametrize('index', range(3), ids=['64x64', '64x96', '96x64'])
def test_off_is_bit_identical_to_float(vit, float_vit, images, index):
    set_quantization(vit, False, False)
    inputs, samples = images[index]
    for own, expected in zip(vit.extract_feat(inputs), float_vit.extract_feat(inputs)):
        assert torch.equal(own, expected)
    own, expected = (predict(m, inputs, samples) for m in (vit, float_vit))
    assert len(own) > 0
    assert torch.equal(own.bboxes, expected.bboxes) and torch.equal(own.scores, expected.scores)
    assert torch.equal(own.masks, expected.masks)


def test_on_is_not_float_but_near(vit, float_vit, images):
    inputs = images[1][0]
    own, expected = vit.backbone(inputs)[0], float_vit.backbone(inputs)[0]
    error = ((own - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 0.7


@pytest.mark.parametrize('kwargs', [
    {}, dict(class_token=False, global_pool='avg'), dict(reg_tokens=3), dict(qk_norm=True),
    dict(qkv_bias=False), dict(init_values=0.3), dict(pre_norm=True),
    dict(scale_attn_norm=True, scale_mlp_norm=True), dict(no_embed_class=True),
], ids=lambda kwargs: next(iter(kwargs), 'plain'))
def test_a_classifier_off_is_timms(kwargs):
    model = classifier(**kwargs)
    x = torch.randn(2, 3, 64, 64)
    fused = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    plain = model(x)
    convert(nn.Sequential(model), QuantConfig())
    assert torch.equal(model(x), plain)
    assert (model(x) - fused).abs().max() < 1e-5


def test_a_mask_is_refused():
    model = classifier()
    convert(nn.Sequential(model), QuantConfig())
    with pytest.raises(ValueError, match='mask is not supported'):
        model.blocks[0](torch.randn(1, 4, 32), attn_mask=torch.zeros(4, 4))


@pytest.mark.parametrize('sizes', [[(64, 64), (150, 40), (33, 90)], [(20, 20)]],
                         ids=['different sizes', 'smaller than a window'])
def test_images_of_any_size_in_a_batch(vit, sizes):
    samples = [DetDataSample(metainfo=dict(img_shape=s, ori_shape=s, scale_factor=(1.0, 1.0)))
               for s in sizes]
    pixels = [torch.randint(0, 255, (3, *s), dtype=torch.uint8) for s in sizes]
    data = vit.data_preprocessor(dict(inputs=pixels, data_samples=samples), False)
    found = vit.predict(data['inputs'], data['data_samples'])
    assert len(found) == len(sizes)
    for sample, (height, width) in zip(found, sizes):
        boxes = sample.pred_instances.bboxes
        assert boxes.isfinite().all() and sample.pred_instances.masks.shape[1:] == (height, width)
        assert (boxes <= torch.tensor([width, height, width, height])).all()


# --- census -------------------------------------------------------------------

def test_census_names_every_layer_and_matmul(vit, float_vit):
    records = {r.name: r for r in vit.census}
    assert len(records) == len(vit.census)
    layers = {name for name, m in float_vit.named_modules()
              if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}
    blocks = [f'backbone.blocks.{i}.attn' for i in range(DEPTH)]
    quantized = layers | {f'{b}.{m}' for b in blocks for m in ('matmul_qk', 'matmul_av')}
    assert len([n for n in layers if n.startswith('backbone.')]) == 1 + 4 * DEPTH
    assert len([n for n in layers if n.startswith('neck.')]) == 3 + 8
    assert {n for n, r in records.items() if r.skipped_reason is None} == quantized
    for block in blocks:
        assert records.pop(f'{block}.rel_pos').skipped_reason == 'relative positions stay float'
    assert records.keys() == quantized
    assert {n.rpartition('.')[0] for n, _ in quantizers_of(vit)} == quantized


def test_bits_and_quantizers(vit):
    bits = {r.name: (r.weight_bits, r.activation_bits) for r in vit.census}
    assert bits['backbone.patch_embed.proj'] == (8, 8)
    assert bits['backbone.blocks.1.attn.qkv'] == (4, 4)
    assert bits['backbone.blocks.1.attn.matmul_av'] == (None, 4)
    attention = vit.backbone.blocks[1].attn
    kinds = [getattr(m, side).spec.kind for m in (attention.matmul_qk, attention.matmul_av)
             for side in ('left_quantizer', 'right_quantizer')]
    assert kinds == ['uniform', 'uniform', 'log2', 'uniform']
    assert attention.matmul_qk.left_quantizer.scale.numel() == 2


def test_excluded_matmuls_stay_float(build_vit, images):
    detector = build_vit(exclude=['*.matmul_av'])
    names = [n for n, _ in quantizers_of(detector)]
    assert any('.matmul_qk.' in n for n in names) and not any('.matmul_av.' in n for n in names)
    detector.extract_feat(images[0][0])


def test_an_attention_with_a_forward_of_its_own_is_told():

    class OwnAttention(timm.layers.Attention):

        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x) * 2

    model = nn.Sequential(OwnAttention(8, 2, qkv_bias=True))
    records = {r.name: r for r in convert(model, QuantConfig())}
    assert records['0.matmul_qk'].skipped_reason == 'OwnAttention has a forward of its own'
    assert records['0.matmul_av'].skipped_reason and records['0.qkv'].skipped_reason is None
    assert not hasattr(model[0], 'matmul_qk')


# --- reparameterisation -------------------------------------------------------

@pytest.fixture(scope='module')
def _channelwise(build_vit, images):
    detector = scale_channels(build_vit(weight_bits=4, activation_bits=4))
    make_channelwise(detector)
    return calibrated(detector, images, on=False)


@pytest.fixture()
def channelwise(_channelwise):
    """A detector with calibrated channel-wise post-norm quantizers, off."""
    return copy.deepcopy(_channelwise)


def test_pairs(channelwise):
    pairs = post_norm_pairs(channelwise)
    assert len(pairs) == 2 * DEPTH
    blocks = channelwise.backbone.blocks
    assert [windowed for _, _, windowed in pairs] == [
        blocks[0].attn, None, blocks[1].attn, None, None, None]


@pytest.mark.parametrize('index', range(3), ids=['64x64', '64x96', '96x64'])
def test_folded_agrees_with_float_where_windows_are_padded(channelwise, images, index):
    inputs = images[index][0]
    expected = channelwise.extract_feat(inputs)
    assert len(reparameterise(channelwise)) == 2 * DEPTH
    assert worst(channelwise.extract_feat(inputs), expected) < 1e-5


def test_without_moving_pad_value_it_would_not(channelwise, images):
    inputs = images[0][0]
    expected = channelwise.extract_feat(inputs)
    reparameterise(channelwise)
    for block in channelwise.backbone.blocks[:2]:
        assert block.attn.pad_value.abs().max() > 0.1
        block.attn.pad_value.zero_()
    assert worst(channelwise.extract_feat(inputs), expected) > 1e-2


def test_quantized_function_survives_in_activations(channelwise, images):
    inputs = images[1][0].double()
    channelwise.double()
    set_quantization(channelwise, False, True)
    expected = channelwise.extract_feat(inputs)
    reparameterise(channelwise)
    assert worst(channelwise.extract_feat(inputs), expected) < 1e-9


@pytest.mark.parametrize('kwargs, pairs', [
    ({}, 4), (dict(qkv_bias=False), 4), (dict(norm_layer='rmsnorm'), 0)], ids=str)
def test_folding_a_classifier(kwargs, pairs):
    root = nn.Sequential(classifier(**kwargs))
    convert(root, QuantConfig(weight_bits=4, activation_bits=4))
    found = post_norm_pairs(root)
    assert len(found) == pairs and all(windowed is None for _, _, windowed in found)
    for _, layer, _ in found:
        if layer.bias is None:  # QuantDetector does this for detectors
            layer.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
    make_channelwise(root)
    x = torch.randn(4, 3, 64, 64)
    expected = root(x)
    with observe(root) as seen:
        root(x)
    calibrate(root, seen, 'mse')
    assert len(reparameterise(root)) == pairs
    set_quantization(root, False, False)
    assert ((root(x) - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_heads_fold_exactly_with_tables_of_positions(build_vit, images):
    """Queries meet tables besides keys; windows are padded."""
    model = build_vit(weight_bits=4, activation_bits=4).double()
    tables = [p for name, p in model.named_parameters() if 'rel_pos' in name]
    for seed, table in enumerate(tables):
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)))
    x = images[1][0].double()
    expected = model.backbone(x)
    folds = fold_by(model, lambda: model.backbone(x))
    assert len(folds) == DEPTH and len(tables) == 2 * DEPTH
    assert worst(model.backbone(x), expected) < 1e-10


def test_a_gated_attention_keeps_its_norm():
    """The norm's output also goes into the gate, and the gate into `proj`'s input."""
    model = classifier()
    model.blocks[0].attn.gate = nn.Linear(32, 32)
    root = nn.Sequential(model)
    convert(root, QuantConfig())
    assert len(post_norm_pairs(root)) == 3
    assert [free.proj for free in free_heads(root).values()] == [None, model.blocks[1].attn.proj]


def test_a_norm_before_proj_keeps_the_values():
    root = nn.Sequential(classifier(scale_attn_norm=True))
    convert(root, QuantConfig())
    assert [free.proj for free in free_heads(root).values()] == [None, None]


def test_norms_of_queries_and_keys_keep_them():
    root = nn.Sequential(classifier(qk_norm=True))
    convert(root, QuantConfig())
    assert [free.tables for free in free_heads(root).values()] == [None, None]


# --- statistics ---------------------------------------------------------------

def test_padded_queries_are_left_out_of_statistics(vit, images):
    vit.backbone(images[1][0])  # 4x6 tokens in windows of 3: 2x2 windows of 9
    quantizer = vit.backbone.blocks[0].attn.matmul_av.left_quantizer
    valid = quantizer.valid_rows
    assert valid.shape == (4, 9) and valid.sum() == 4 * 6
    assert valid[:2].all() and torch.equal(valid[2], torch.arange(9) < 3)
    assert vit.backbone.blocks[2].attn.matmul_av.left_quantizer.valid_rows is None
    vit.backbone(torch.randn(1, 3, 96, 96))
    assert quantizer.valid_rows is None


# --- chains -------------------------------------------------------------------

def test_every_part_has_a_chain(vit):
    chains, without = part_chains(vit)
    assert list(chains) == ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head',
                            'roi_head.mask_head'] and without == {}


@pytest.mark.parametrize('index', range(3), ids=['64x64', '64x96', '96x64'])
def test_the_backbone_chain_computes_the_backbone(vit, images, index):
    inputs = images[index][0]
    state, side = part_chains(vit)[0]['backbone'].run(State((inputs, )))
    expected = vit.backbone(inputs)
    assert state.tensors == () and len(side) == len(expected) == 1
    assert torch.equal(side[0].permute(0, 3, 1, 2), expected[0])


def test_the_neck_chain_computes_the_neck(vit, images):
    maps = vit.backbone(images[1][0])
    state, side = part_chains(vit)[0]['neck'].run(State(maps))
    expected = vit.neck(maps)
    assert side == () and len(state.tensors) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, expected))


def test_the_neck_has_all_strides(vit, images):
    maps = vit.neck(vit.backbone(images[1][0]))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert all(m.shape[1] == 16 for m in maps)


@pytest.mark.parametrize('quantized', [False, True], ids=['float', 'quantized'])
def test_roi_heads_see_what_is_on_the_maps(vit, images, quantized):
    """Against torchvision: mmcv's RoIAlign asks nothing of the memory that it is handed."""
    set_quantization(vit, quantized, quantized)
    maps = vit.extract_feat(torch.cat([images[1][0]] * 2) + torch.randn(2, 1, 1, 1))
    assert all(m.is_contiguous() for m in maps)
    boxes = torch.tensor([[0, 3., 5, 30, 40], [1, 20, 2, 90, 60], [1, 0, 0, 8, 8]])
    extractor = vit.roi_head.bbox_roi_extractor
    found = extractor(maps[:4], boxes)
    level, layer = extractor.map_roi_levels(boxes, 4), extractor.roi_layers
    for k, box in enumerate(boxes):
        own = layer[level[k]]
        expected = roi_align(
            maps[level[k]], box[None], own.output_size, own.spatial_scale, own.sampling_ratio or -1,
            aligned=True)[0]
        assert torch.allclose(found[k], expected, atol=1e-5)


def test_without_norms_the_neck_gives_plain_maps_too():
    neck = MODELS.build(dict(type='pfcr_mm.SimpleFPN', backbone_channel=8, out_channels=8))
    for conv in [m for m in neck.modules() if isinstance(m, ConvModule)]:
        conv.with_norm = False
    assert all(m.is_contiguous() for m in neck(torch.randn(2, 8, 6, 5)))


def test_intermediate_maps_are_side_outputs():
    vit = MODELS.build(dict(
        type='pfcr_mm.TimmViT', model_name='vit_tiny_patch16_224', out_indices=(0, 1, 2),
        final_norm=True, timm_args=dict(depth=3, embed_dim=32, num_heads=2)))
    randomise(vit.requires_grad_(False)).eval()
    x = torch.randn(2, 3, 64, 48)
    _, side = CHAINS.find(vit)(vit).run(State((x, )))
    assert len(side) == 3
    for a, b in zip(side, vit(x)):
        assert torch.equal(a.permute(0, 3, 1, 2), b)


@pytest.mark.parametrize('kwargs', [
    {}, dict(reg_tokens=2), dict(global_pool='avg', init_values=0.3), dict(pre_norm=True),
    dict(global_pool='map', class_token=False)], ids=lambda kwargs: next(iter(kwargs), 'plain'))
def test_the_chain_of_a_classifier_computes_it(kwargs):
    model = classifier(**kwargs)
    convert(nn.Sequential(model), QuantConfig())
    assert CHAINS.find(model) is classifier_chain
    x = torch.randn(2, 3, 64, 64)
    state, side = classifier_chain(model).run(State((x, )))
    assert side == () and torch.equal(state.tensors[0], model(x))


def test_every_parameter_of_the_backbone_belongs_to_one_leaf(vit):
    chain = part_chains(vit)[0]['backbone']
    owned = [id(p) for leaf in chain.leaves for m in leaf.modules for p in m.parameters()]
    assert len(owned) == len(set(owned))
    assert {id(p) for p in vit.backbone.parameters()} - set(owned) == {id(vit.backbone.pos_embed)}


def test_gradient_reaches_all_scales_and_weights(vit, images):
    block = vit.backbone.blocks[0]
    wanted = {name: q.log_scale for name, q in quantizers_of(block)
              if 'weight_quantizer' not in name}
    wanted.update({name: m.weight for name, m in block.named_modules()
                   if isinstance(m, QuantLayer)})
    assert len(wanted) == 4 + 4 + 4  # q, k, softmax, v; four inputs; four weights
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    chain = part_chains(vit)[0]['backbone']
    state, _ = chain.run(State((images[1][0], )), 0, 3)
    state.tensors[0].pow(2).sum().backward()
    for name, parameter in wanted.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- checkpoints --------------------------------------------------------------

def test_save_and_load_keep_every_bit_of_the_function(vit, build_vit, images, tmp_path):
    """Also the value that windows are padded with, once it has moved."""
    detector = scale_channels(build_vit(weight_bits=4, activation_bits=4))
    make_channelwise(detector)
    calibrated(detector, images, on=False)
    reparameterise(detector)
    with observe(detector, 256) as seen:
        predict(detector, *images[0])
    calibrate(detector, seen, 'mse', activations=False)
    set_quantization(detector, True, True)
    harden(detector)
    path = str(tmp_path / 'quantized.pth')
    save_quantized(detector, path, {})
    fresh = build_vit(weight_bits=4, activation_bits=4)
    load_quantized(fresh, read_checkpoint(path), path)
    for inputs, _ in images:
        for a, b in zip(fresh.extract_feat(inputs), detector.extract_feat(inputs)):
            assert torch.equal(a, b)


def vitdet_shapes(width, depth, heads, window, grid, pyramid, fc, box_classes, mask_convs):
    """Names and shapes of a checkpoint of mmdet's ViTDet project."""
    head = width // heads
    shapes = {'backbone.pos_embed': (1, 14 * 14 + 1, width)}

    def layer(name, *shape, out=0):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = shape, (shape[out], )

    def conv(name, out, inside, size):
        shapes[f'{name}.conv.weight'] = (out, inside, size, size)
        layer(f'{name}.norm_layer', out)

    layer('backbone.patch_embed.proj', width, 3, 16, 16)
    for i in range(depth):
        block = f'backbone.blocks.{i}'
        side = grid if i % 3 == 2 else window
        for axis in 'hw':
            shapes[f'{block}.attn.rel_pos_{axis}'] = (2 * side - 1, head)
        layer(f'{block}.norm1', width)
        layer(f'{block}.attn.qkv', 3 * width, width)
        layer(f'{block}.attn.proj', width, width)
        layer(f'{block}.norm2', width)
        layer(f'{block}.mlp.fc1', 4 * width, width)
        layer(f'{block}.mlp.fc2', width, 4 * width)
    layer('neck.fpn1.0', width, width // 2, 2, 2, out=1)
    layer('neck.fpn1.1', width // 2)
    layer('neck.fpn1.3', width // 2, width // 4, 2, 2, out=1)
    layer('neck.fpn2.0', width, width // 2, 2, 2, out=1)
    for i, inside in enumerate((width // 4, width // 2, width, width)):
        conv(f'neck.lateral_convs.{i}', pyramid, inside, 1)
        conv(f'neck.fpn_convs.{i}', pyramid, pyramid, 3)
    for i in range(2):
        layer(f'rpn_head.rpn_conv.{i}.conv', pyramid, pyramid, 3, 3)
    layer('rpn_head.rpn_cls', 3, pyramid, 1, 1)
    layer('rpn_head.rpn_reg', 12, pyramid, 1, 1)
    for i in range(4):
        conv(f'roi_head.bbox_head.shared_convs.{i}', pyramid, pyramid, 3)
    layer('roi_head.bbox_head.shared_fcs.0', fc, pyramid * 49)
    layer('roi_head.bbox_head.fc_cls', box_classes + 1, fc)
    layer('roi_head.bbox_head.fc_reg', 4 * box_classes, fc)
    for i in range(mask_convs):
        conv(f'roi_head.mask_head.convs.{i}', pyramid, pyramid, 3)
    layer('roi_head.mask_head.upsample', pyramid, pyramid, 2, 2, out=1)
    layer('roi_head.mask_head.conv_logits', box_classes, pyramid, 1, 1)
    return shapes


def made_up(shapes):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_checkpoint_of_the_vitdet_project_loads(build_vit, tmp_path):
    state = made_up(vitdet_shapes(32, DEPTH, 2, 3, 4, 16, 32, 6, 1))
    path = str(tmp_path / 'vitdet.pth')
    torch.save(dict(meta={}, state_dict=state), path)
    detector = build_vit()
    load_float(detector, read_checkpoint(path), path)
    own = detector.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    created = [n for n in own if n not in state]
    assert all('_quantizer.' in n or n.endswith(MOVED) for n in created)


def test_the_coco_config_has_the_published_names_and_shapes():
    config = Config.fromfile(CONFIGS / 'pfcr_maskrcnn_vit_b_w4a4.py')
    with torch.device('meta'):
        detector = MODELS.build(dict(config.model, _scope_='mmdet'))
    own = {name: tuple(value.shape) for name, value in detector.state_dict().items()
           if '_quantizer.' not in name and not name.endswith(MOVED)}
    assert own == vitdet_shapes(768, 12, 12, 14, 1024 // 16, 256, 1024, 80, 4)
    backbone = detector.backbone
    assert {m.eps for m in backbone.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in detector.neck.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert not backbone.pos_antialias
