"""`TopK`: the share of images whose class is among the k most probable."""
from mmengine.evaluator import BaseMetric

from ..registry import METRICS


@METRICS.register_module()
class TopK(BaseMetric):
    """Top-k accuracies, from 0 to 1, as 'imagenet/top1' and so on.

    Reads `pred_scores` (classes,) and `gt_label` of every data sample. Of equal scores
    the lower class counts as the more probable one.

    Args:
        topk (Sequence[int]): numbers of classes that an image's class may be among.
    """

    default_prefix = 'imagenet'

    def __init__(self, topk=(1, 5), collect_device='cpu', prefix=None):
        super().__init__(collect_device, prefix)
        self.topk = (topk, ) if isinstance(topk, int) else tuple(topk)

    def process(self, data_batch, data_samples):
        """Keep how many classes come before each image's own."""
        for sample in data_samples:
            scores, label = sample['pred_scores'], int(sample['gt_label'])
            ahead = (scores > scores[label]).sum() + (scores[:label] == scores[label]).sum()
            finite = bool(scores.isfinite().all())
            self.results.append(int(ahead) if finite else len(scores))

    def compute_metrics(self, results):
        """Dict of 'top1', 'top5', ..."""
        return {f'top{k}': sum(rank < k for rank in results) / max(1, len(results))
                for k in self.topk}
