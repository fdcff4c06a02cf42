"""Shared fixtures: a tiny Swin Mask R-CNN, and images whose windows need padding."""
import copy
from pathlib import Path

import demo_runs
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_models import calibrated, randomise

import pfcr_mm  # noqa: F401
from pfcr_mm.datasets import draw_image

DEMO = Path(__file__).parents[1] / 'configs' / 'demo' / 'mask-rcnn_swin-demo_shapes.py'
SHAPES = ((64, 64), (64, 96), (96, 64))  # token maps 16x16, 16x24, 24x16: no multiple of 7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _tiny(model):
    model.backbone.update(embed_dims=16, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 4],
                          drop_path_rate=0.2)
    model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    head = model.roi_head
    head.bbox_roi_extractor.update(out_channels=16)
    head.mask_roi_extractor.update(out_channels=16)
    head.bbox_head.update(in_channels=16, fc_out_channels=32)
    head.mask_head.update(num_convs=1, in_channels=16, conv_out_channels=16)
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    model.test_cfg.rcnn.update(max_per_img=8)
    return model


@pytest.fixture(scope='session')
def tiny_config():
    """The `model` config of the tiny float detector."""
    return _tiny(Config.fromfile(DEMO).model)


@pytest.fixture(scope='session')
def demo_config():
    """The `model` config of the demo's float detector."""
    return Config.fromfile(DEMO).model


@pytest.fixture(scope='session')
def build_quantized(tiny_config):
    """build(**quant): a quantized tiny detector with seeded weights, in eval mode."""

    def build(config=tiny_config, seed=0, **quant):
        config = copy.deepcopy(config)
        arch = config.pop('type')
        detector = MODELS.build(
            dict(type='pfcr_mm.QuantDetector', arch=arch, quant=quant, **config))
        detector.requires_grad_(False)
        randomise(detector, seed).eval()
        for name, parameter in detector.named_parameters():
            if name.endswith('reduction.bias'):
                parameter.zero_()  # the float patch merging has none
        return detector

    return build


@pytest.fixture(scope='session')
def _float_detector(tiny_config, build_quantized):
    detector = MODELS.build(dict(copy.deepcopy(tiny_config), _scope_='mmdet'))
    state = build_quantized(weight_bits=4, activation_bits=4).state_dict()
    own = {key: state[key] for key in detector.state_dict()}
    detector.load_state_dict(own)
    detector.requires_grad_(False)
    return detector.eval()


@pytest.fixture()
def float_detector(_float_detector):
    """mmdet's own tiny detector with the weights that `build_quantized` gives."""
    return copy.deepcopy(_float_detector)


@pytest.fixture(scope='session')
def _quantized(build_quantized, images):
    detector = build_quantized(weight_bits=4, activation_bits=4)
    return calibrated(detector, images)


@pytest.fixture()
def quantized(_quantized):
    """A calibrated W4A4 tiny detector, quantizers on."""
    return copy.deepcopy(_quantized)


@pytest.fixture(scope='session')
def images():
    """(normalised (1, 3, H, W), data samples) of a few generated images."""
    found = []
    for index, (height, width) in enumerate(SHAPES):
        pixels = torch.from_numpy(draw_image(0, 'test', index, 96)[0]).permute(2, 0, 1)
        inputs = (pixels[None, :, :height, :width].float() - 120) / 58
        sample = DetDataSample(metainfo=dict(
            img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
            batch_input_shape=(height, width), scale_factor=(1.0, 1.0), img_id=index))
        found.append((inputs, [sample]))
    return found


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """A finished run of tools/quant.py on the tiny detector."""
    return demo_runs.tiny_run(tmp_path_factory.getbasetemp() / 'demo_runs')


@pytest.fixture(scope='session')
def demo_run(tmp_path_factory):
    """A finished run of tools/quant.py on the demo detector."""
    if not demo_runs.ASSET.is_file():
        pytest.skip(f'{demo_runs.ASSET.name} is not there yet')
    return demo_runs.demo_run(tmp_path_factory.getbasetemp() / 'demo_runs')
