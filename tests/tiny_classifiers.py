"""Tiny timm classifiers, and folders of generated images for them."""
import numpy as np
import torch
from mmengine.registry import MODELS
from PIL import Image
from tiny_models import randomise

from pfcr_mm.models.fit import MOVED

CLASSES = 5
ARGS = dict(
    vit=dict(model_name='vit_tiny_patch16_224',
             timm_args=dict(img_size=64, depth=4, embed_dim=32, num_heads=2)),
    deit=dict(model_name='deit_tiny_distilled_patch16_224',
              timm_args=dict(img_size=64, depth=2, embed_dim=32, num_heads=2)),
    # maps of 18x18 and 9x9 tokens: no multiple of the window, 7
    swin=dict(model_name='swin_tiny_patch4_window7_224',
              timm_args=dict(img_size=72, embed_dim=16, depths=(2, 2), num_heads=(2, 2))))


def build_classifier(kind, seed=0, **quant):
    """A quantized tiny classifier with seeded weights, in eval mode."""
    model = MODELS.build(dict(
        type='pfcr_mm.QuantDetector', arch='pfcr_mm.TimmClassifier', quant=quant,
        num_classes=CLASSES, **ARGS[kind]))
    model.requires_grad_(False)
    randomise(model, seed).eval()
    for name, parameter in model.named_parameters():
        if name in model.created_biases:
            parameter.zero_()  # the float model has none
    return model


def float_state(model):
    """What a float checkpoint of the model holds, in timm's naming."""
    return {name.removeprefix('backbone.'): value for name, value in model.state_dict().items()
            if '_quantizer.' not in name and not name.endswith(MOVED)
            and name not in model.created_biases}


def pictures(kind, count=4, seed=0):
    """Inputs (count, 3, H, W) for a tiny classifier."""
    size = ARGS[kind]['timm_args']['img_size']
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def write_folder(root, each=4, classes=CLASSES, size=80):
    """Write `classes` folders of `each` JPEGs, and labels.txt; returns the root."""
    rng = np.random.default_rng(0)
    lines = []
    for label in range(classes):
        folder = root / f'n{label:04d}'
        folder.mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) // 2 + 25 * label
            path = folder / f'{number}.JPEG'
            Image.fromarray(pixels.astype(np.uint8)).resize((size, size + 16)).save(path)
            lines.append(f'{path.relative_to(root)} {label} n{label:04d}\n')
    (root / 'labels.txt').write_text(''.join(lines))
    return root
