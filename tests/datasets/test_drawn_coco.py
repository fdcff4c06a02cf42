"""A random part of a COCO file, and the rest of it."""
import json

import pytest

from pfcr_mm.datasets import DrawnCoco, write_shapes
from pfcr_mm.datasets.draw import checked_draw
from pfcr_mm.datasets.drawn_coco import write_part
from pfcr_mm.errors import UsageError

DRAW = dict(count=3, seed=0, rest=False)


@pytest.fixture()
def source(tmp_path):
    write_shapes(tmp_path, 'train', 8)
    return tmp_path / 'annotations' / 'instances_train.json'


def part(source, path, **draw):
    dataset = DrawnCoco(str(source), draw, str(path), test_mode=True, metainfo=None,
                        data_prefix=dict(img=str(source.parents[1] / 'train')), pipeline=[])
    return {dataset.get_data_info(i)['img_path'] for i in range(len(dataset))}


def test_part_and_rest_share_no_image_and_lose_none(source, tmp_path):
    drawn = part(source, tmp_path / 'a.json', count=3)
    rest = part(source, tmp_path / 'b.json', count=3, rest=True)
    assert (len(drawn), len(rest)) == (3, 5) and not drawn & rest
    assert part(source, tmp_path / 'c.json', count=3, seed=1) != drawn
    whole = json.loads(source.read_text())
    parts = [json.loads((tmp_path / name).read_text()) for name in ('a.json', 'b.json')]
    for key in ('images', 'annotations'):
        ids = sorted(item['id'] for p in parts for item in p[key])
        assert ids == sorted(item['id'] for item in whole[key])
    assert parts[0]['categories'] == whole['categories']
    assert {a['image_id'] for a in parts[0]['annotations']} <= {i['id'] for i in parts[0]['images']}


def test_no_draw_is_all_of_it(source, tmp_path):
    path, whole = tmp_path / 'all.json', json.loads(source.read_text())
    dataset = DrawnCoco(str(source), None, str(path), test_mode=True, pipeline=[],
                        data_prefix=dict(img=str(source.parents[1] / 'train')))
    assert len(dataset) == 8
    written = json.loads(path.read_text())
    assert all(written[key] == whole[key] for key in ('images', 'annotations', 'categories'))
    write_part(source, DRAW, path)  # another draw of the same source takes its place
    assert len(json.loads(path.read_text())['images']) == 3


@pytest.mark.parametrize('draw, words', [
    (3, 'draw=3 is no dict; .* or None for all images'), (['count'], 'is no dict'),
    ({}, 'draw.count=None is not an integer of 1'), (dict(count=0), 'draw.count=0 is not'),
    (dict(count=True), 'draw.count=True is not'), (dict(count=1, seed='x'), "draw.seed='x' is not"),
    (dict(count=1, rest='no'), "draw.rest='no' is not True or False"),
    (dict(counts=1), 'draw.counts is not a known key')], ids=str)
def test_a_bad_draw(draw, words):
    with pytest.raises(UsageError, match=words):
        checked_draw(draw)


def test_what_is_there_is_kept_and_another_draw_is_written_anew(source, tmp_path):
    path = tmp_path / 'a.json'
    write_part(source, DRAW, path)
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    write_part(source, DRAW, path)
    assert path.stat().st_mtime_ns == when
    write_part(source, dict(DRAW, seed=1), path)
    assert path.read_bytes() != first


def test_another_file_is_not_overwritten(source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(UsageError, match='was not drawn from'):
        write_part(source, DRAW, source)
    assert source.read_bytes() == before


@pytest.mark.parametrize('content, words', [
    (None, 'is missing'), ('{', 'no COCO annotation file'), ('[]', 'no COCO annotation file')])
def test_a_bad_source(content, words, tmp_path):
    path = tmp_path / 'source.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=words):
        write_part(path, DRAW, tmp_path / 'part.json')


def test_nothing_left(source, tmp_path):
    with pytest.raises(UsageError, match=r'draw.count=8 leaves nothing of the 8 images'):
        write_part(source, dict(DRAW, count=8), tmp_path / 'part.json')
