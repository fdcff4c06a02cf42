"""The images that a report looks at."""
import io
from contextlib import redirect_stdout

from mmengine.dataset import pseudo_collate

from ..engine.data import load_sample
from ..errors import UsageError
from ..registry import DATASETS


def probe_images(cfg, model, count):
    """Images of the test split, evenly spread over it.

    None of them calibrates (a run refuses to share images); AP is measured on them, among
    others.

    Args:
        cfg (Config): with `test_dataloader`.
        model (nn.Module): its data preprocessor normalises and pads.
        count (int): how many; fewer where the split is smaller or images are gone.

    Returns:
        tuple[list, dict, list[str]]: (inputs (1, 3, H, W), data samples) pairs; the
        metainfo of the dataset; a line for each image that could not be read.
    """
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset = DATASETS.build(cfg.test_dataloader.dataset)
    except (UsageError, OSError) as error:
        return [], {}, [f'the test split cannot be read: {error}']
    images, missing = [], []
    for index in evenly(count, len(dataset)):
        try:
            sample = load_sample(dataset, index)
        except (UsageError, OSError) as error:
            missing.append(str(error))
            continue
        data = model.data_preprocessor(pseudo_collate([sample]), False)
        images.append((data['inputs'], data['data_samples']))
    return images, dict(getattr(dataset, 'metainfo', None) or {}), missing


def evenly(count, size):
    """`count` indices spread over 0 to `size` - 1, all where there are fewer."""
    count = min(count, size)
    return [i * size // count for i in range(count)]


def on_device(model, inputs):
    """`inputs` where the model is."""
    return inputs.to(next(model.parameters()).device)


def name_of(samples):
    """A short name of an image, from its data samples: the end of its path, else its number."""
    path = str(samples[0].metainfo.get('img_path') or '')
    return path.rpartition('/')[2] or f"image {samples[0].metainfo.get('img_id', '?')}"
