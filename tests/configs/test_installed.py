"""A user's config inherits `pfcr_mm::...`, from an editable install and from a wheel."""
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
USER_CONFIG = """
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'pfcr_mm::_base_/pfcr.py']
model = dict(type='pfcr_mm.QuantDetector', arch='MaskRCNN',
             quant=dict(weight_bits=5, activation_bits=6))
"""
SCRIPT = """
import sys
from pathlib import Path
import pfcr_mm
from mmengine.config import Config
from mmengine.registry import MODELS
from pfcr_mm.models.checkpoint import ASSETS
print(Path(pfcr_mm.__file__).resolve().parent)
cfg = Config.fromfile(sys.argv[1])
assert cfg.runner_type == 'pfcr_mm.QuantRunner' and cfg.quantize_cfg.type == 'pfcr_mm.PFCRLoop'
assert ASSETS == Path(pfcr_mm.__file__).parent / 'assets'
cfg.model.backbone.init_cfg = None
detector = MODELS.build(dict(cfg.model, _scope_='mmdet'))
assert detector.quant_config.weight_bits == 5 and detector.quant_config.activation_bits == 6
"""


def run_script(python, folder):
    """Run SCRIPT away from the repository; returns the folder pfcr_mm came from."""
    config = folder / 'mine.py'
    config.write_text(USER_CONFIG)
    done = subprocess.run([str(python), '-c', SCRIPT, str(config)], cwd=folder, text=True,
                          capture_output=True, env=environment())
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def environment():
    import os
    return {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel, built from a copy so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    shutil.copytree(REPO / 'pfcr_mm', source / 'pfcr_mm', symlinks=True,
                    ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(REPO / 'configs', source / 'configs',
                    ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'README.md', 'model-index.yml'):
        shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', str(source), '--no-deps',
                    '--no-build-isolation', '-w', str(folder)], check=True)
    return next(folder.glob('pfcr_mm-*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """(python, site-packages) of a clean environment with the wheel and our dependencies."""
    folder = tmp_path_factory.mktemp('clean') / 'env'
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob('lib/python*/site-packages'))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index',
                    '--target', str(site), str(wheel)], check=True)
    # A plain line adds the folder of the dependencies, but none of its own .pth files,
    # so an editable install of pfcr_mm stays out of sight.
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return folder / 'bin' / 'python', site


def test_wheel_holds_configs_index_and_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f'pfcr_mm/.mim/configs/{p.relative_to(REPO / "configs")}'
                for p in (REPO / 'configs').rglob('*') if p.suffix in ('.py', '.yml')}
    expected |= {f'pfcr_mm/assets/{p.name}' for p in (REPO / 'pfcr_mm' / 'assets').glob('*')}
    expected |= {f'pfcr_mm/{p.relative_to(REPO / "pfcr_mm")}'
                 for p in (REPO / 'pfcr_mm').rglob('*.py') if '.mim' not in p.parts}
    expected |= {'pfcr_mm/.mim/model-index.yml', 'pfcr_mm/analysis/templates/report.html.j2'}
    assert expected <= names, expected - names


def test_wheel_install_resolves(installed, tmp_path):
    python, site = installed
    assert run_script(python, tmp_path) == (site / 'pfcr_mm').resolve()


def test_wheel_install_has_the_command_line(installed, tmp_path):
    python, site = installed
    config = site / 'pfcr_mm' / '.mim' / 'configs' / 'pfcr_maskrcnn_swin_t_w4a4.py'
    done = subprocess.run([str(python), '-m', 'pfcr_mm.cli', 'quant', str(config)], cwd=tmp_path,
                          text=True, capture_output=True, env=environment())
    assert done.returncode == 2 and 'data/coco' in done.stderr


def test_editable_install_resolves(tmp_path):
    assert run_script(sys.executable, tmp_path) == REPO / 'pfcr_mm'
