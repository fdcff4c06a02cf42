"""`ImageFolder`: images with a class each, in a folder a class or listed in a file."""
from pathlib import Path

from mmengine.dataset import BaseDataset
from PIL import Image

from ..errors import UsageError
from ..registry import DATASETS
from .draw import checked_draw, drawn

EXTENSIONS = ('.jpeg', '.jpg', '.png', '.webp', '.bmp')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Images of a classification task.

    Without `ann_file` every folder below `data_root` is a class, numbered by the order
    of names, as ImageNet's training set comes. With it, each of its lines is an image's
    path and the number of its class (more columns are ignored), as a validation set
    without folders needs.

    One folder can serve for calibration and evaluation: `draw=dict(count=128, seed=0)`
    takes 128 images at random, `draw=dict(count=128, seed=0, rest=True)` all others.

    Args:
        data_root (str): folder that paths start from.
        ann_file (str): list of paths and classes, absolute or below `data_root`.
        num_classes (int): classes of the model.
        draw (dict | None): `count` and `seed` of images drawn, and `rest`.
        pipeline (list[dict]): transforms of dict(img_path, gt_label).

    Raises:
        UsageError: nothing there, too few classes, an empty class, labels out of range.
    """

    skips_broken = True  # calibration leaves out, and names, what cannot be read

    def __init__(self, data_root, ann_file='', num_classes=1000, draw=None, pipeline=(),
                 **kwargs):
        self.num_classes = num_classes
        self.draw = checked_draw(draw)
        super().__init__(ann_file=ann_file, data_root=data_root, pipeline=list(pipeline), **kwargs)

    def load_data_list(self):
        """dict(img_path, gt_label) of every image, or of those drawn."""
        root = Path(self.data_root)
        if not root.is_dir():
            raise UsageError(
                f'image folder {root} is missing; say where it is with data_root')
        pairs = self._listed(root) if self.ann_file else self._folders(root)
        if self.draw is not None:
            pairs = drawn(pairs, self.draw, self.data_root)
        return [dict(img_path=str(path), gt_label=label) for path, label in pairs]

    def check_image(self, index):
        """Raise UsageError with the path of an image that cannot be read."""
        path = self.get_data_info(index)['img_path']
        if not Path(path).exists():
            raise UsageError(f'image {path} is missing')
        try:
            with Image.open(path) as image:
                image.convert('RGB')
        except Exception as error:  # decoders raise all kinds
            raise UsageError(f'image {path} cannot be read as an image ({error})') from None

    def _folders(self, root):
        classes = sorted(path for path in root.iterdir() if path.is_dir())
        if len(classes) != self.num_classes:
            raise UsageError(
                f'image folder {root} has {len(classes)} class folders, the model has '
                f'{self.num_classes} classes')
        pairs = []
        for label, folder in enumerate(classes):
            paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
            if not paths:
                raise UsageError(f'class folder {folder} has no image')
            pairs += [(path, label) for path in paths]
        return pairs

    def _listed(self, root):
        pairs = []
        for number, line in enumerate(Path(self.ann_file).read_text().splitlines(), 1):
            if not line.strip():
                continue
            columns = line.split()
            where = f'{self.ann_file}:{number}'
            if len(columns) < 2 or not columns[1].lstrip('-').isdigit():
                raise UsageError(f'{where}: {line!r} is not an image path and a class number')
            label = int(columns[1])
            if not 0 <= label < self.num_classes:
                raise UsageError(
                    f'{where}: class {label} is out of range; the model has {self.num_classes} '
                    f'classes, 0 to {self.num_classes - 1}')
            pairs.append((root / columns[0], label))
        if not pairs:
            raise UsageError(f'annotation file {self.ann_file} lists no image')
        return pairs
