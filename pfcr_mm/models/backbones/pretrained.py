"""Weights of timm's classifiers for the detection ViT, as a start of training."""
import re

import timm
from timm.layers import resample_abs_pos_embed

from ...errors import UsageError
from ..checkpoint import read_checkpoint

# What a classifier has and a backbone drops.
_DROPPED = re.compile(
    r'(head|head_dist|norm|fc_norm|pre_logits|attn_pool)\.|(cls|dist|reg|mask)_token$')
# What a backbone has and a classifier lacks: starts at zero.
_ADDED = re.compile(r'.*\.rel_pos_[hw]$')


def load_pretrained(vit, source):
    """Load a classifier's weights into a `TimmViT`.

    Position embeddings of another size are interpolated.

    Args:
        vit (TimmViT): as built.
        source (str | bool): a file or URL, or True for timm's own weights.

    Raises:
        UsageError: nothing to be had there, or weights of another model.
    """
    state = _download(vit.model_name) if source is True else _read(source)
    own = vit.state_dict()
    state = {_own_name(key): value for key, value in state.items()}
    if 'pos_embed' in own and 'pos_embed' in state:
        state['pos_embed'] = _fit_positions(vit, state['pos_embed'])
    missing = [k for k in own if k not in state and not _ADDED.match(k)]
    extra = [k for k in state if k not in own and not _DROPPED.match(k)]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    for found, what in ((wrong, 'another shape of'), (missing, 'no'), (extra, 'beyond it')):
        if found:
            raise UsageError(
                f'backbone.pretrained={source!r} does not fit {vit.model_name!r}: it has {what} '
                f'{found[0]!r}')
    vit.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def _own_name(key):
    """Names of timm's; models that pool by averaging call the last norm fc_norm."""
    key = re.sub(r'^(module|backbone)\.', '', key)
    return re.sub(r'^fc_norm\.', 'norm.', key)


def _fit_positions(vit, embedding):
    """Bring a position embedding (1, N, C) to the rows that `vit` has."""
    own = vit.pos_embed
    if embedding.shape == own.shape or embedding.shape[-1] != own.shape[-1]:
        return embedding
    side = int(embedding.shape[1]**0.5)  # a square map, and a few class or register tokens
    patches = resample_abs_pos_embed(
        embedding[:, -side * side:], vit.patch_embed.grid_size, (side, side), num_prefix_tokens=0)
    fitted = own.detach().clone()
    fitted[:, -patches.shape[1]:] = patches
    return fitted


def _read(path):
    try:
        return read_checkpoint(path)['state_dict']
    except UsageError as error:
        raise UsageError(f'backbone.pretrained: {error}') from None


def _download(model_name):
    try:
        return timm.create_model(model_name, pretrained=True).state_dict()
    except Exception as error:  # no weights, no network, a broken download
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise UsageError(
            f'backbone.pretrained=True: timm has no weights of {model_name!r} to give '
            f'({reason}); give the path of a state dict') from None
