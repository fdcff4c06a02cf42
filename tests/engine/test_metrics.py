"""Which metrics count."""
from pfcr_mm.engine.metrics import counted, titles


def test_counted():
    result = {'coco/bbox_mAP': .4, 'coco/bbox_mAP_50': .6, 'coco/segm_mAP': .3, 'time': 2}
    assert counted(result) == dict(bbox_mAP=.4, segm_mAP=.3)
    assert counted({'imagenet/top1': .7, 'imagenet/top5': .9}) == dict(top1=.7, top5=.9)


def test_titles():
    detector = dict(bbox_mAP='box AP', segm_mAP='mask AP')
    assert titles(None, dict(bbox_mAP=.1)) == detector == titles(None)
    assert titles(dict(top1=.1)) == dict(top1='top-1', top5='top-5')
