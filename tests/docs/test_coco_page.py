"""docs/coco.md: every config is on it, and its figures are not ours."""
import csv
import re

import pytest
from demo_runs import REPO, load_tool
from mmengine.config import Config

PAGE = (REPO / 'docs' / 'coco.md').read_text()
FAMILIES = sorted({re.sub(r'_w\da\d$', '', path.stem)
                   for path in (REPO / 'configs').glob('pfcr_*.py')})
ROWS = dict(re.findall(r'^\| `(\w+)_\*` \| .*? \| ([^|]*) \|$', PAGE, re.MULTILINE))


def test_every_family_has_a_row_and_a_command():
    assert sorted(ROWS) == FAMILIES
    for family in FAMILIES:
        assert f'python tools/quant.py configs/{family}_w4a4.py' in PAGE


@pytest.mark.parametrize('family', FAMILIES)
def test_float_figures_are_what_the_config_expects(family):
    expected = Config.fromfile(REPO / 'configs' / f'{family}_w4a4.py').quantize_cfg.get('expected')
    text = '-' if not expected else ' / '.join(
        f'{100 * expected[key]:.1f}' for key in ('bbox_mAP', 'segm_mAP'))
    assert ROWS[family].strip() == text


def test_commands_name_files_that_are_there():
    for pattern in re.findall(r'(?:configs|tools)/[\w?*]+\.py', PAGE):
        assert list(REPO.glob(pattern)), pattern


def test_results_are_the_tools():
    """Until there is a measured file the page says so; then it has the tool's columns."""
    results = REPO / 'results' / 'coco.csv'
    if not results.exists():
        assert 'No run on COCO has\nbeen made yet' in PAGE
        return
    matrix = load_tool('run_matrix')
    with results.open(newline='') as file:
        assert tuple(csv.DictReader(file).fieldnames) == matrix.COLUMNS
