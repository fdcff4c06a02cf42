"""AP by class, which the evaluators compute and do not tell."""
from contextlib import contextmanager

from pycocotools.cocoeval import COCOeval

PREFIX = 'class/'


@contextmanager
def per_class():
    """Collect AP by class of every COCO evaluation inside the block.

    Yields:
        dict: filled with AP (0 to 1, None where a class has no objects) by
        'class/<bbox or segm>/<name>'.
    """
    found, accumulate = {}, COCOeval.accumulate

    def accumulate_and_tell(self, p=None):
        accumulate(self, p)
        if not self.params.useCats:
            return
        names = {c['id']: c['name'] for c in self.cocoGt.loadCats(self.params.catIds)}
        for index, category in enumerate(self.params.catIds):
            # (IoU, recall, class, area, detections): all areas, most detections; -1: none
            precision = self.eval['precision'][:, :, index, 0, -1]
            precision = precision[precision > -1]
            found[f'{PREFIX}{self.params.iouType}/{names[category]}'] = (
                float(precision.mean()) if precision.size else None)

    COCOeval.accumulate = accumulate_and_tell
    try:
        yield found
    finally:
        COCOeval.accumulate = accumulate


def split_classes(metrics):
    """Metrics without those of classes, and these as {metric: {class: AP}}."""
    plain, classes = {}, {}
    for key, value in metrics.items():
        if key.startswith(PREFIX):
            metric, _, name = key[len(PREFIX):].partition('/')
            classes.setdefault(metric, {})[name] = value
        else:
            plain[key] = value
    return plain, classes
