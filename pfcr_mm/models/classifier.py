"""`TimmClassifier`: any ViT, DeiT or Swin of timm as a model of MMEngine's."""
import timm
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

from ..errors import UsageError
from ..registry import CHAINS, MODELS
from .timm_names import check_transformer, no_transformer

_PREFIX = 'backbone.'


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """An image classifier of timm, its classifier head included, as the part `backbone`.

    Args:
        model_name (str): a name of timm's, with a tag or without, such as
            'vit_base_patch16_224.augreg_in21k_ft_in1k', 'swin_tiny_patch4_window7_224'.
        num_classes (int): classes of the head.
        timm_args (dict | None): more arguments of timm's model, such as dict(depth=6).
        data_preprocessor (dict | None): stacks images; the pipeline has normalised them.

    Example:
        >>> model = TimmClassifier('vit_tiny_patch16_224')
        >>> model(torch.rand(2, 3, 224, 224)).shape  # (2, 1000)
    """

    def __init__(self, model_name='vit_base_patch16_224', num_classes=1000, timm_args=None,
                 data_preprocessor=None):
        super().__init__(data_preprocessor or dict(type='mmengine.ImgDataPreprocessor'))
        self.model_name = model_name
        self.backbone = build_timm_classifier(model_name, num_classes, timm_args)

    @property
    def input_size(self):
        """(H, W) of the images that the model takes."""
        return tuple(self.backbone.patch_embed.img_size)

    @property
    def last_layers(self):
        """Names of the predictors."""
        found = self.backbone.get_classifier()
        heads = found if isinstance(found, tuple) else (found, )
        return tuple(name for name, m in self.named_modules() if any(m is h for h in heads))

    def own_names(self, state):
        """A state dict in timm's naming, or in that of a model's authors, in this model's."""
        if any(key.startswith(_PREFIX) for key in state):
            return state
        if isinstance(self.backbone, SwinTransformer):
            state = checkpoint_filter_fn(state, self.backbone)
        return {f'{_PREFIX}{key}': value for key, value in state.items()}

    def forward(self, inputs, data_samples=None, mode='tensor'):
        """Classify.

        Args:
            inputs (Tensor): (B, 3, H, W), normalised.
            data_samples (list[BaseDataElement] | None): with `gt_label` where there is one.
            mode (str): 'tensor' gives logits (B, classes), 'predict' the data samples with
                `pred_scores`, 'loss' the cross entropy.
        """
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        logits = self.logits(inputs)
        if mode == 'loss':
            labels = logits.new_tensor([s.gt_label for s in data_samples]).long()
            return dict(loss=F.cross_entropy(logits, labels))
        return logits

    def logits(self, inputs):
        """Class logits (B, classes) of normalised images (B, 3, H, W)."""
        return self.backbone(inputs)

    def predict(self, inputs, data_samples=None, rescale=False):
        """Class probabilities as `pred_scores` (classes,) of each data sample."""
        scores = self.logits(inputs).softmax(-1)
        samples = data_samples or [BaseDataElement() for _ in scores]
        for sample, score in zip(samples, scores):
            sample.pred_scores = score
        return samples


def build_timm_classifier(model_name, num_classes=1000, timm_args=None):
    """Build timm's model `model_name`, without weights.

    Raises:
        UsageError: timm has no such model, or it is no transformer that has a chain.
    """
    check_transformer(model_name)
    try:
        model = timm.create_model(model_name, num_classes=num_classes, **(timm_args or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f'model.timm_args={dict(timm_args or {})} does not fit {model_name}: {error}') from None
    if CHAINS.find(model) is None:
        raise no_transformer(model_name)
    return model
