"""`TimmPreprocess`: images as timm prepares them for a model."""
from mmengine.structures import BaseDataElement
from PIL import Image
from timm.data import create_transform

from ..models.timm_names import preprocessing_of
from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
class TimmPreprocess:
    """Read, resize, crop and normalise an image as timm evaluates `model_name` on it.

    Args:
        model_name (str): as in the model; tags of one model may differ in this.
        timm_args (dict | None): as in the model; `img_size` is another input size.
    """

    def __init__(self, model_name, timm_args=None):
        self.data_config = preprocessing_of(model_name, timm_args=timm_args)
        self.transform = create_transform(**self.data_config, is_training=False)

    def __call__(self, results):
        """dict(img_path, gt_label) to dict(inputs (3, H, W), data_samples)."""
        path = results['img_path']
        with Image.open(path) as image:
            inputs = self.transform(image.convert('RGB'))
        sample = BaseDataElement(metainfo=dict(img_path=path))
        sample.gt_label = results['gt_label']
        return dict(inputs=inputs, data_samples=sample)

    def __repr__(self):
        return f'{type(self).__name__}({self.data_config})'
