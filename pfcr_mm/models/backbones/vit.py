"""`TimmViT`: any plain ViT or DeiT of timm as the backbone of an mmdet detector."""
from collections import OrderedDict
from difflib import get_close_matches

import timm
import torch
from mmengine.model import BaseModule
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from ...errors import UsageError
from ...registry import MODELS
from ..recording import is_recorded
from .attention import GridAttention
from .pretrained import load_pretrained

# Files of timm whose models are plain: patches, equal blocks, one resolution.
_PLAIN = ('timm.models.vision_transformer', 'timm.models.deit')
_CACHED_SIZES = 4


@MODELS.register_module()
class TimmViT(BaseModule):
    """A plain ViT that gives maps instead of classes (ViTDet, arXiv 2203.16527).

    Patch embedding, position embedding and blocks are timm's own modules under timm's
    names; class and register tokens are dropped. Images of any size work: they are
    padded to whole patches, positions are interpolated.

    Args:
        model_name (str): a name of timm's, such as 'vit_base_patch16_224',
            'vit_tiny_patch16_224', 'deit_small_patch16_224'.
        window_size (int): tokens along a window's side; 0 attends globally everywhere.
        global_blocks (Sequence[int]): numbers of the blocks that attend globally,
            where there are windows.
        rel_pos (bool): learned relative positions in every attention, as ViTDet has.
        rel_pos_img_size (int): image size that the tables of global blocks are made
            for; windows have their own size.
        out_indices (Sequence[int]): blocks whose maps are given out; the last has to be
            among them. -1 is the last.
        final_norm (bool): timm's last LayerNorm over the maps; ViTDet has none.
        norm_eps (float | None): eps of all LayerNorms; None is timm's.
        pos_antialias (bool): interpolate positions as timm does; False as ViTDet does.
        drop_path_rate (float): of the last block, rising linearly from the first.
        pretrained (str | bool | None): float weights for training: a file with a timm
            state dict, or True for timm's own over the network.
        timm_args (dict | None): more arguments of timm's model, such as dict(depth=6).

    Example:
        >>> vit = TimmViT('vit_tiny_patch16_224', window_size=14, global_blocks=(2, 5, 8, 11))
        >>> vit(torch.rand(1, 3, 480, 640))[0].shape  # (1, 192, 30, 40)
    """

    def __init__(self, model_name='vit_base_patch16_224', window_size=0, global_blocks=(),
                 rel_pos=False, rel_pos_img_size=1024, out_indices=(-1, ), final_norm=False,
                 norm_eps=None, pos_antialias=True, drop_path_rate=0.0, pretrained=None,
                 timm_args=None, init_cfg=None):
        super().__init__(init_cfg)
        vit = build_timm_vit(model_name, drop_path_rate, timm_args)
        self.model_name = model_name
        self.pretrained = pretrained
        self.embed_dims = vit.embed_dim
        self.patch_embed = vit.patch_embed
        self.pos_embed = vit.pos_embed
        self.norm_pre = vit.norm_pre
        self.blocks = nn.ModuleList(vit.blocks)
        norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        self.norm = norm if final_norm else nn.Identity()
        self.pos_antialias = pos_antialias
        self._positions = OrderedDict()  # (H, W) -> what belongs to it

        depth = len(self.blocks)
        self.window_size = _window_size(window_size)
        self.global_blocks = _block_numbers(global_blocks, depth, 'global_blocks')
        self.out_indices = _block_numbers(out_indices, depth, 'out_indices')
        if not self.out_indices or self.out_indices[-1] != depth - 1:
            raise UsageError(
                f'backbone.out_indices={tuple(out_indices)} lacks the last block {depth - 1}; '
                'make timm_args.depth smaller, or add it')
        for i, block in enumerate(self.blocks):
            window = 0 if i in self.global_blocks else self.window_size
            side = window or max(1, rel_pos_img_size // self.patch_embed.patch_size[0])
            GridAttention.adopt(block.attn, window, side if rel_pos else None)
        if norm_eps is not None:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps

    def init_weights(self):
        """Weights to train from: `pretrained`, or timm's own initialisation as built."""
        if self.pretrained:
            load_pretrained(self, self.pretrained)

    def forward(self, x):
        """Args: x (B, 3, H, W). Returns: tuple of maps (B, C, H/16, W/16), rounded up."""
        x = self.embed(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.out_indices:
                maps.append(self.norm(x).permute(0, 3, 1, 2).contiguous())
        return tuple(maps)

    def embed(self, x):
        """Image (B, 3, H, W) to a map of tokens with their positions, (B, h, w, C)."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.positions(*x.shape[1:3])
        return self.norm_pre(x)

    def positions(self, height, width):
        """The position embedding of a map, (1, height, width, C).

        Interpolated once a size while it is not being learned.
        """
        embedding = self.pos_embed
        learned = embedding.requires_grad and torch.is_grad_enabled()
        if learned or is_recorded(embedding.device):
            return self._interpolated(height, width)
        key, state = (height, width), (embedding._version, embedding.device, embedding.dtype)
        if self._positions.get(key, (None, ))[0] != state:
            self._positions[key] = (state, self._interpolated(height, width).detach())
            if len(self._positions) > _CACHED_SIZES:
                self._positions.popitem(last=False)
        return self._positions[key][1]

    def _interpolated(self, height, width):
        rows, columns = self.patch_embed.grid_size
        patches = self.pos_embed[:, -rows * columns:]  # class and register tokens come first
        return resample_abs_pos_embed(
            patches, (height, width), (rows, columns), num_prefix_tokens=0,
            antialias=self.pos_antialias).view(1, height, width, -1)


def build_timm_vit(model_name, drop_path_rate=0.0, timm_args=None):
    """Build timm's model `model_name`, for images of any size, without a classifier.

    Raises:
        UsageError: timm has no such model, or it is no plain ViT.
    """
    if not isinstance(model_name, str) or not timm.is_model(model_name):
        close = get_close_matches(str(model_name), timm.list_models('*vit*') +
                                  timm.list_models('deit*'), n=3) or ['vit_base_patch16_224']
        raise UsageError(
            f'backbone.model_name={model_name!r} is not a model of timm {timm.__version__}; '
            f'it has {", ".join(map(repr, close))}')
    plain = timm.model_entrypoint(model_name).__module__ in _PLAIN
    if plain:
        try:
            vit = timm.create_model(
                model_name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True,
                drop_path_rate=drop_path_rate, **(timm_args or {}))
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(
                f'backbone.timm_args={dict(timm_args or {})} does not fit {model_name}: {error}') \
                from None
        plain = isinstance(vit, VisionTransformer) and all(
            type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
    if not plain:
        raise UsageError(
            f"backbone.model_name={model_name!r} is not a plain ViT; choose one like "
            "'vit_base_patch16_224' or 'deit_small_patch16_224', or use a backbone of mmdet's")
    return vit


def _window_size(size):
    if not isinstance(size, int) or size < 0:
        raise UsageError(
            f'backbone.window_size={size!r} is not a number of tokens; 0 is no windows')
    return size


def _block_numbers(numbers, depth, key):
    """Block numbers in order, negative ones counted from the end."""
    found = set()
    for number in numbers:
        if not isinstance(number, int) or not -depth <= number < depth:
            raise UsageError(
                f'backbone.{key} has {number!r}; the blocks are numbered 0 to {depth - 1}')
        found.add(number % depth)
    return tuple(sorted(found))
