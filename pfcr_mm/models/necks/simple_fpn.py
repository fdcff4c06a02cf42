"""The simple feature pyramid of ViTDet (arXiv 2203.16527), and its norm and chain."""
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import nn

from ...registry import CHAINS, MODELS
from ..chain import Chain, Leaf, State


@MODELS.register_module()
class LN2d(LayerNorm2d):
    """LayerNorm over the channels of a map (B, C, H, W), for `norm_cfg` of necks and heads.

    The result lies in memory as its axes say. timm's has channels last, and mmcv's RoIAlign takes
    what it is given for a map without asking: heads would see something else than the map.
    """

    _abbr_ = 'norm_layer'  # the name it has inside a ConvModule, also in ViTDet's checkpoints

    def forward(self, x):
        """Args: x (B, C, H, W). Returns: the same shape, contiguous."""
        return super().forward(x).contiguous()


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """All levels of a pyramid out of one map.

    From a map of stride 16 come strides 4, 8, 16 and 32, then coarser ones by
    subsampling. Names as in mmdet's ViTDet project, so its checkpoints load.

    Args:
        backbone_channel (int): channels of the backbone's map.
        out_channels (int): channels of every level.
        num_outs (int): number of levels, 4 or more.
        norm_cfg (dict): norm of all convolutions.
        act_cfg (dict | None): activation behind them; ViTDet has none.
    """

    def __init__(self, backbone_channel, out_channels, num_outs=5,
                 norm_cfg=None, act_cfg=None, init_cfg=None):
        super().__init__(init_cfg)
        norm_cfg = norm_cfg or dict(type='pfcr_mm.LN2d')
        half, quarter = backbone_channel // 2, backbone_channel // 4
        self.num_outs = num_outs
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(backbone_channel, half, 2, 2), build_norm_layer(norm_cfg, half)[1],
            nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2))
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(backbone_channel, half, 2, 2))
        self.fpn3 = nn.Sequential(nn.Identity())
        self.fpn4 = nn.Sequential(nn.MaxPool2d(2, 2))

        def convs(widths, size):
            return nn.ModuleList(
                ConvModule(width, out_channels, size, padding=size // 2, norm_cfg=norm_cfg,
                           act_cfg=act_cfg, inplace=False) for width in widths)

        self.lateral_convs = convs((quarter, half, backbone_channel, backbone_channel), 1)
        self.fpn_convs = convs((out_channels, ) * 4, 3)

    def forward(self, maps):
        """Args: maps (tuple[Tensor] | Tensor): the last one is used. Returns: tuple of maps."""
        x = maps if not isinstance(maps, (tuple, list)) else maps[-1]
        return self.convolved(self.laterals(self.rescaled(x)))

    def rescaled(self, x):
        """One map (B, C, H, W) at strides 4, 8, 16 and 32."""
        return self.fpn1(x), self.fpn2(x), self.fpn3(x), self.fpn4(x)

    def laterals(self, maps):
        """Every map at `out_channels`."""
        return tuple(conv(x) for conv, x in zip(self.lateral_convs, maps))

    def convolved(self, maps):
        """The last convolution of every map, and the coarser levels."""
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps)]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)


@CHAINS.register('pfcr_mm.models.necks.simple_fpn.SimpleFPN')
def simple_fpn_chain(neck):
    """Three leaves: transposed convolutions; laterals; output convolutions.

    Input: the backbone's maps. Output: all levels.
    """

    def leaf(name, function, modules):
        return Leaf(name, lambda state: (State(tuple(function(state.tensors))), ()), modules)

    return Chain('neck', [
        leaf('fpn1+fpn2', lambda maps: neck.rescaled(maps[-1]), (neck.fpn1, neck.fpn2)),
        leaf('lateral_convs', neck.laterals, tuple(neck.lateral_convs)),
        leaf('fpn_convs', neck.convolved, tuple(neck.fpn_convs)),
    ], channel_axis=1)
