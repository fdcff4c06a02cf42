"""The generated data set."""
import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from pfcr_mm.datasets import CLASSES, ShapesDataset, draw_image, write_shapes


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(root, 'val', 30, seed=1, image_size=64)
    return root


def test_an_image_is_a_function_of_seed_split_and_index():
    image, objects = draw_image(0, 'train', 3)
    again, same = draw_image(0, 'train', 3)
    assert np.array_equal(image, again) and objects == same
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    for other in ((1, 'train', 3), (0, 'val', 3), (0, 'train', 4)):
        assert not np.array_equal(image, draw_image(*other)[0])


def test_coco_reads_the_annotations(root):
    coco = COCO(root / 'annotations' / 'instances_val.json')
    assert len(coco.getImgIds()) == 30
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.anns) > 40
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 64) and mask.sum() > 0
        x, y, w, h = annotation['bbox']
        rows, columns = np.nonzero(mask)
        assert abs(columns.min() - x) <= 1 and abs(columns.max() + 1 - x - w) <= 2
        assert abs(rows.min() - y) <= 1 and abs(rows.max() + 1 - y - h) <= 2
        assert mask.sum() == pytest.approx(annotation['area'], rel=0.3, abs=8)


def test_objects_do_not_overlap(root):
    coco = COCO(root / 'annotations' / 'instances_val.json')
    for image in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image, iscrowd=False))
        cover = sum((coco.annToMask(a).astype(int) for a in annotations), np.zeros((64, 64), int))
        assert (cover > 1).mean() < 0.02  # polygons of neighbours may share a border


def test_all_segmentation_kinds_appear():
    kinds = set()
    for index in range(80):
        for obj in draw_image(0, 'train', index)[1]:
            segmentation = obj['segmentation']
            if isinstance(segmentation, list):
                kinds.add('polygon')
            else:
                kinds.add('rle' if isinstance(segmentation['counts'], str) else 'crowd')
                assert obj['iscrowd'] == isinstance(segmentation['counts'], list)
    assert kinds == {'polygon', 'rle', 'crowd'}


def test_nothing_is_drawn_twice(root):
    image = root / 'val' / '000000.png'
    stamp = image.stat().st_mtime_ns
    write_shapes(root, 'val', 30, seed=1, image_size=64)
    assert image.stat().st_mtime_ns == stamp


def test_another_size_is_drawn_anew(tmp_path):
    write_shapes(tmp_path, 'a', 3, image_size=32)
    file = write_shapes(tmp_path, 'a', 2, image_size=48)
    content = json.loads(file.read_text())
    assert len(content['images']) == 2 and content['info']['image_size'] == 48
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['000000.png', '000001.png']
    assert cv2.imread(str(tmp_path / 'a' / '000001.png')).shape == (48, 48, 3)


def test_a_damaged_annotation_file_is_replaced(tmp_path):
    file = write_shapes(tmp_path, 'a', 2, image_size=32)
    before = file.read_text()
    file.write_text(before[:100])
    assert write_shapes(tmp_path, 'a', 2, image_size=32).read_text() == before


def test_dataset_draws_itself(tmp_path):
    dataset = ShapesDataset(
        data_root=str(tmp_path / 'new'), split='val', num_images=5, image_size=64, pipeline=[],
        test_mode=True)
    assert len(dataset) == 5
    assert dataset.metainfo['classes'] == CLASSES
    info = dataset.get_data_info(0)
    assert info['height'] == 64 and info['img_path'].endswith('val/000000.png')
    assert (tmp_path / 'new' / 'val' / '000004.png').exists()


def test_hard_scenes_are_other_images_with_smaller_objects():
    sizes = {}
    for scene in ('normal', 'hard'):
        objects = [o for i in range(60) for o in draw_image(0, 'x', i, scene=scene)[1]
                   if not o['iscrowd']]
        sizes[scene] = np.median([o['area'] for o in objects])
    assert sizes['hard'] < sizes['normal']
    with pytest.raises(KeyError):
        draw_image(0, 'x', 0, scene='easy')
