"""Chains of mmdet's neck and heads: FPN, RPN, box heads, mask heads.

State tensors are NCHW maps or (n, C) rows; the channel axis is 1 throughout.
"""
import torch.nn.functional as F

from ..registry import CHAINS, MAP_READERS
from .chain import Chain, Leaf, State


@CHAINS.register('mmdet.models.necks.fpn.FPN')
def fpn_chain(fpn):
    """Two leaves: the lateral convolutions; the output convolutions after the top-down sum.

    Input: the backbone's maps. Output: all FPN levels. Extra levels are pooled from the
    last, or convolved from the backbone's last map (which the first leaf then hands on),
    the last lateral map or the last output.
    """
    levels = len(fpn.lateral_convs)
    extra_convs = fpn.fpn_convs[levels:]
    hands_on = len(extra_convs) > 0 and fpn.add_extra_convs == 'on_input'

    def lateral(state):
        maps = state.tensors[fpn.start_level:fpn.start_level + levels]
        kept = (state.tensors[fpn.backbone_end_level - 1], ) if hands_on else ()
        return State(tuple(conv(x) for conv, x in zip(fpn.lateral_convs, maps)) + kept), ()

    def output(state):
        maps = list(state.tensors[:levels])
        for i in range(levels - 1, 0, -1):
            size = {} if 'scale_factor' in fpn.upsample_cfg else dict(size=maps[i - 1].shape[2:])
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], **size, **fpn.upsample_cfg)
        outputs = [conv(x) for conv, x in zip(fpn.fpn_convs, maps)]
        source = dict(
            on_input=state.tensors[-1], on_lateral=maps[-1]).get(fpn.add_extra_convs, outputs[-1])
        for number, conv in enumerate(extra_convs):
            if number > 0:
                source = outputs[-1].relu() if fpn.relu_before_extra_convs else outputs[-1]
            outputs.append(conv(source))
        while len(outputs) < fpn.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return State(tuple(outputs)), ()

    return Chain('neck', [
        Leaf('lateral_convs', lateral, tuple(fpn.lateral_convs)),
        Leaf('fpn_convs', output, tuple(fpn.fpn_convs)),
    ], channel_axis=1)


@MAP_READERS.register('mmdet.models.necks.fpn.FPN')
def fpn_map_readers(fpn):
    """The lateral convolution of each input map, where nothing else reads that map."""
    readers = {fpn.start_level + k: conv.conv for k, conv in enumerate(fpn.lateral_convs)}
    if fpn.add_extra_convs == 'on_input':
        readers.pop(fpn.backbone_end_level - 1, None)
    return readers


@CHAINS.register('mmdet.models.dense_heads.rpn_head.RPNHead')
def rpn_chain(head):
    """Two leaves, shared by all levels: the convolution; both predictors.

    Input: all FPN levels. Output: scores of every level, then deltas of every level.
    """

    def hidden(state):
        return State(tuple(F.relu(head.rpn_conv(x)) for x in state.tensors)), ()

    def predict(state):
        scores = tuple(head.rpn_cls(x) for x in state.tensors)
        return State(scores + tuple(head.rpn_reg(x) for x in state.tensors)), ()

    return Chain('rpn_head', [
        Leaf('rpn_conv', hidden, (head.rpn_conv, )),
        Leaf('rpn_cls+rpn_reg', predict, (head.rpn_cls, head.rpn_reg)),
    ], channel_axis=1)


@CHAINS.register('mmdet.models.roi_heads.bbox_heads.convfc_bbox_head.ConvFCBBoxHead')
def bbox_chain(head):
    """One leaf a shared layer, one for everything after the branches part.

    Input: RoI features (n, C, h, w). Output: class logits and box deltas.
    """
    leaves = [
        Leaf(f'shared_convs.{i}', _apply(conv), (conv, ))
        for i, conv in enumerate(head.shared_convs)
    ]
    for i, fc in enumerate(head.shared_fcs):
        leaves.append(Leaf(f'shared_fcs.{i}', _flat_fc(head, fc, first=i == 0), (fc, )))

    def branch(x, convs, fcs, predictor):
        for conv in convs:
            x = conv(x)
        if x.dim() > 2:
            x = (head.avg_pool(x) if head.with_avg_pool else x).flatten(1)
        for fc in fcs:
            x = head.relu(fc(x))
        return predictor(x)

    def predict(state):
        x, = state.tensors
        outputs = ()
        if head.with_cls:
            outputs += (branch(x, head.cls_convs, head.cls_fcs, head.fc_cls), )
        if head.with_reg:
            outputs += (branch(x, head.reg_convs, head.reg_fcs, head.fc_reg), )
        return State(outputs), ()

    predictors = [head.fc_cls] * head.with_cls + [head.fc_reg] * head.with_reg
    owned = (head.cls_convs, head.cls_fcs, head.reg_convs, head.reg_fcs, *predictors)
    leaves.append(Leaf('fc_cls+fc_reg', predict, owned))
    return Chain('bbox_head', leaves, channel_axis=1)


@CHAINS.register('mmdet.models.roi_heads.mask_heads.fcn_mask_head.FCNMaskHead')
def mask_chain(head):
    """One leaf a convolution, one for upsampling and logits.

    Input: RoI features (n, C, h, w). Output: mask logits.
    """
    leaves = [Leaf(f'convs.{i}', _apply(conv), (conv, )) for i, conv in enumerate(head.convs)]

    def predict(state):
        x, = state.tensors
        if head.upsample is not None:
            x = head.upsample(x)
            if head.upsample_method == 'deconv':
                x = head.relu(x)
        return State((head.conv_logits(x), )), ()

    owned = (head.conv_logits, ) + (() if head.upsample is None else (head.upsample, ))
    leaves.append(Leaf('upsample+conv_logits', predict, owned))
    return Chain('mask_head', leaves, channel_axis=1)


def _apply(module):

    def forward(state):
        return State((module(state.tensors[0]), )), ()

    return forward


def _flat_fc(head, fc, first):

    def forward(state):
        x, = state.tensors
        if first:
            x = (head.avg_pool(x) if head.with_avg_pool else x).flatten(1)
        return State((head.relu(fc(x)), )), ()

    return forward
