"""The quantized detector is the mmdet detector: mmdet's own tools take it."""
import demo_runs
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS

from pfcr_mm.engine import QuantRunner
from pfcr_mm.modules import QuantLayer, quantizers_of

USER = """
_base_ = ['mmdet::{base}', 'pfcr_mm::_base_/pfcr.py']
model = dict(type='pfcr_mm.QuantDetector', arch='{arch}',
             quant=dict(weight_bits=6, activation_bits=6))
"""


@pytest.fixture(scope='module')
def run(tiny_run, request):
    """The demo's run where its checkpoint is there, else the tiny one's."""
    return request.getfixturevalue('demo_run') if demo_runs.ASSET.is_file() else tiny_run


@pytest.fixture(scope='module')
def image(run):
    root = run.config().val_dataloader.dataset.data_root
    return f'{root}val/000001.png'


@pytest.fixture(scope='module')
def detector(run):
    return init_detector(run.config(), str(run.quantized), device='cpu')


def test_init_detector_loads_the_integers(detector):
    assert all(m.hardened for m in detector.modules() if isinstance(m, QuantLayer))
    assert all(q.enabled and q.calibrated for _, q in quantizers_of(detector))


def test_weights_have_few_levels(detector):
    for layer in (m for m in detector.modules() if isinstance(m, QuantLayer)):
        rows = layer.weight.movedim(layer.weight_axis, 0).flatten(1)
        assert all(row.unique().numel() <= 2**layer.weight_quantizer.bits for row in rows)


def test_dataset_meta(detector):
    from pfcr_mm.datasets import CLASSES
    assert tuple(detector.dataset_meta['classes']) == CLASSES


def test_inference_detector_equals_the_runners_model(run, detector, image, tmp_path):
    cfg = run.config()
    cfg.load_from, cfg.work_dir = str(run.quantized), str(tmp_path)
    runner = QuantRunner.from_cfg(cfg)
    runner.load_or_resume()
    runner.model.eval()
    with torch.no_grad():
        expected = {
            sample.img_path: sample.pred_instances
            for batch in runner.test_dataloader for sample in runner.model.test_step(batch)
        }[image]
    found = inference_detector(detector, image).pred_instances
    assert len(found) > 0
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])), key


def test_inferencer(run, detector, image):
    inferencer = DetInferencer(
        model=str(run.folder / demo_runs.W4A4.name), weights=str(run.quantized), device='cpu',
        show_progress=False)
    scores = inferencer(image)['predictions'][0]['scores']
    expected = inference_detector(detector, image).pred_instances.scores
    assert scores == pytest.approx(expected.tolist())


@pytest.mark.parametrize('base, arch', [
    ('swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'MaskRCNN'),
    ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'FasterRCNN'),
    ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', 'CascadeRCNN'),
], ids=['mask-rcnn-swin', 'faster-rcnn', 'cascade-mask-rcnn'])
def test_users_own_config(base, arch, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(USER.format(base=base, arch=arch))
    cfg = Config.fromfile(config)
    cfg.model.backbone.init_cfg = None
    detector = MODELS.build(cfg.model)
    assert type(detector).__name__ == arch
    layers = {name: m for name, m in detector.named_modules() if isinstance(m, QuantLayer)}
    quantized = {record.name for record in detector.census if record.weight_bits is not None}
    assert set(layers) == quantized
    assert {m.weight_quantizer.bits for m in layers.values()} == {6, 8}  # ends keep 8
