"""Folders of images with a class each: layouts, the draw, preprocessing, bad input."""
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from tiny_classifiers import CLASSES, write_folder

from pfcr_mm.datasets import TimmPreprocess
from pfcr_mm.errors import UsageError

PIPELINE = [dict(type='pfcr_mm.TimmPreprocess', model_name='vit_tiny_patch16_224',
                 timm_args=dict(img_size=32))]


@pytest.fixture()
def root(tmp_path):
    return write_folder(tmp_path / 'images')


def folder(root, **kwargs):
    return DATASETS.build(dict(
        type='pfcr_mm.ImageFolder', data_root=str(root), num_classes=CLASSES, **kwargs))


def pairs(dataset):
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(info['img_path'], info['gt_label']) for info in infos]


def test_folders_are_classes_in_order_of_names(root):
    found = pairs(folder(root))
    assert len(found) == 4 * CLASSES
    assert found[0] == (str(root / 'n0000' / '0.JPEG'), 0)
    assert found[-1] == (str(root / 'n0004' / '3.JPEG'), 4)


def test_a_list_of_labels_gives_the_same(root):
    (root / 'note.txt').write_text('')  # no folder, so no class
    assert pairs(folder(root, ann_file='labels.txt')) == pairs(folder(root))
    elsewhere = root.parent / 'val.txt'
    elsewhere.write_text('n0002/1.JPEG 3\n\n')
    assert pairs(folder(root, ann_file=str(elsewhere))) == [(str(root / 'n0002' / '1.JPEG'), 3)]


@pytest.mark.parametrize('ann_file', ['', 'labels.txt'], ids=['folders', 'list'])
def test_drawn_images_and_the_rest_share_none(root, ann_file):
    whole = set(pairs(folder(root, ann_file=ann_file)))
    draws = []
    for seed in (0, 1):
        drawn = pairs(folder(root, ann_file=ann_file, draw=dict(count=7, seed=seed)))
        rest = pairs(folder(root, ann_file=ann_file, draw=dict(count=7, seed=seed, rest=True)))
        assert len(drawn) == 7 and not set(drawn) & set(rest)
        assert set(drawn) | set(rest) == whole
        draws.append(drawn)
    assert draws[0] != draws[1]
    assert draws[0] == pairs(folder(root, ann_file=ann_file, draw=dict(count=7)))


def test_preprocessing_by_hand(tmp_path):
    path = tmp_path / 'x.png'
    Image.new('RGB', (300, 400), (255, 127, 0)).save(path)
    step = TimmPreprocess('vit_tiny_patch16_224')
    found = step(dict(img_path=str(path), gt_label=3))
    assert found['inputs'].shape == (3, 224, 224)
    assert torch.allclose(found['inputs'][:, 5, 7], torch.tensor([1, 127 / 127.5 - 1, -1]))
    assert found['data_samples'].gt_label == 3
    assert found['data_samples'].img_path == str(path)
    resize = step.transform.transforms[0]
    assert resize.size == 248 and resize.interpolation.value == 'bicubic'


def test_grey_and_transparent_images_are_read(tmp_path):
    step = TimmPreprocess('vit_tiny_patch16_224', dict(img_size=32))
    for mode in ('L', 'RGBA', 'CMYK'):
        path = tmp_path / ('x.png' if mode == 'RGBA' else 'x.jpg')
        Image.new(mode, (40, 40)).save(path)
        assert step(dict(img_path=str(path), gt_label=0))['inputs'].shape == (3, 32, 32)


# --- bad input ----------------------------------------------------------------

def refused(match, root, **kwargs):
    with pytest.raises(UsageError, match=match) as error:
        folder(root, **kwargs)
    assert '\n' not in str(error.value)


def test_too_few_classes(root):
    with pytest.raises(UsageError, match='has 5 class folders, the model has 9 classes'):
        DATASETS.build(dict(type='pfcr_mm.ImageFolder', data_root=str(root), num_classes=9))


def test_an_empty_class(root):
    for path in (root / 'n0003').iterdir():
        path.unlink()
    refused(r'class folder .*n0003 has no image', root)


def test_nothing_there(root):
    refused(r'image folder .*nowhere is missing', root / 'nowhere')


@pytest.mark.parametrize('line, match', [
    ('n0000/0.JPEG 5', r'labels.txt:1: class 5 is out of range; .* 0 to 4'),
    ('n0000/0.JPEG -1', r'class -1 is out of range'),
    ('n0000/0.JPEG', r'is not an image path and a class number'),
    ('n0000/0.JPEG tench', r'is not an image path and a class number'),
    ('', r'labels.txt lists no image'),
], ids=['high', 'negative', 'no class', 'no number', 'empty'])
def test_labels(line, match, root):
    (root / 'labels.txt').write_text(line + '\n')
    refused(match, root, ann_file='labels.txt')


@pytest.mark.parametrize('draw, match', [
    (dict(count=20), r'draw.count=20 leaves nothing of the 20 images'),
    (dict(count=0), r'draw.count=0'), (dict(seed=1), r'draw.count=None'),
    (dict(count=3, side=1), r'draw.side is not a known key')], ids=str)
def test_draw(draw, match, root):
    refused(match, root, draw=draw)


@pytest.mark.parametrize('content', [b'', b'no image', None], ids=['empty', 'text', 'cut off'])
def test_a_broken_image_is_named(content, root):
    path = root / 'n0001' / '2.JPEG'
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    dataset = folder(root, pipeline=PIPELINE, test_mode=True)
    index = [p for p, _ in pairs(dataset)].index(str(path))
    dataset.check_image(index - 1)
    with pytest.raises(UsageError, match=r'n0001/2.JPEG cannot be read as an image'):
        dataset.check_image(index)
    with pytest.raises(OSError):
        dataset[index]
    path.unlink()
    with pytest.raises(UsageError, match=r'n0001/2.JPEG is missing'):
        dataset.check_image(index)
