"""Top-k accuracy, by hand."""
import pytest
import torch

from pfcr_mm.evaluation import TopK


def evaluate(metric, rows):
    metric.process(None, [dict(pred_scores=torch.tensor(scores), gt_label=label)
                          for scores, label in rows])
    return metric.evaluate(len(rows))


def test_by_hand():
    rows = [([.1, .6, .3], 1), ([.1, .6, .3], 2), ([.1, .6, .3], 0), ([.5, .2, .3], 0)]
    assert evaluate(TopK((1, 2)), rows) == {'imagenet/top1': 0.5, 'imagenet/top2': 0.75}


def test_of_equal_scores_the_lower_class_wins():
    rows = [([.5, .5], 0), ([.5, .5], 1)]
    assert evaluate(TopK(1), rows) == {'imagenet/top1': 0.5}


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_scores_that_are_no_numbers_are_wrong(value):
    assert evaluate(TopK(1), [([value, value], 0)]) == {'imagenet/top1': 0.0}


def test_more_places_than_classes():
    assert evaluate(TopK((1, 5)), [([.2, .8], 0)]) == {'imagenet/top1': 0.0, 'imagenet/top5': 1.0}
