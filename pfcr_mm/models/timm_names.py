"""What is known of a timm model by its name alone: whether it is there, weights, preprocessing."""
from difflib import get_close_matches

import timm
from timm.data import resolve_data_config

from ..errors import UsageError

_FILES = ('vision_transformer', 'deit', 'swin_transformer')


def check_transformer(model_name):
    """Raise UsageError unless timm has a ViT, DeiT or Swin of that name."""
    known = isinstance(model_name, str) and timm.is_model(model_name)
    if not known or ('.' in model_name and not timm.list_pretrained(model_name)):
        base = str(model_name).partition('.')[0]
        names = [*timm.list_models(['*vit*', 'deit*', 'swin*']), *timm.list_pretrained(f'{base}.*')]
        close = get_close_matches(str(model_name), names, n=3) or ['vit_base_patch16_224']
        raise UsageError(
            f'model.model_name={model_name!r} is not a model of timm {timm.__version__}; '
            f'it has {", ".join(map(repr, close))}')
    module = timm.model_entrypoint(model_name.partition('.')[0]).__module__
    if module.rpartition('.')[2] not in _FILES:
        raise no_transformer(model_name)


def no_transformer(model_name):
    """The error for a model that PFCR has no chain for."""
    return UsageError(
        f"model.model_name={model_name!r} is no plain transformer; choose a ViT, DeiT or Swin, "
        "like 'vit_base_patch16_224', 'deit_small_patch16_224' or 'swin_tiny_patch4_window7_224'")


def preprocessing_of(model_name, timm_args=None):
    """timm's own preprocessing of a model.

    Args:
        model_name (str): with its tag, where tags differ in this.
        timm_args (dict | None): `img_size` is another input size.

    Returns:
        dict: input_size, interpolation, mean, std, crop_pct, crop_mode.
    """
    check_transformer(model_name)
    cfg = timm.models.get_pretrained_cfg(model_name).to_dict()
    size = (timm_args or {}).get('img_size')
    if size is not None:
        cfg['input_size'] = (3, *(size if isinstance(size, (tuple, list)) else (size, size)))
    return resolve_data_config({}, pretrained_cfg=cfg)


def timm_weights(model_name):
    """The state dict of timm's own weights, over the network.

    Raises:
        UsageError: no weights, no network, a broken download.
    """
    try:
        return timm.create_model(model_name, pretrained=True).state_dict()
    except Exception as error:  # all kinds
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise UsageError(
            f'checkpoint timm://{model_name}: timm has no weights to give ({reason}); fetch them '
            'by other means and give the path as CHECKPOINT') from None
