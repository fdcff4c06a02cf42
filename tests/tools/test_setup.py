"""Set-up files agree with each other and with what is installed."""
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).parents[2]
MAKEFILE = (REPO / 'Makefile').read_text()
# that `make setup` starts again for
SOURCES = ('setup.py', 'constraints.txt', 'pfcr_mm/version.py', 'pfcr_mm/quantizers/native.c')


def pins():
    """Name -> version, as constraints.txt says."""
    lines = (REPO / 'constraints.txt').read_text().splitlines()
    return dict(line.split('==') for line in lines if line and not line.startswith('#'))


@pytest.mark.skipif(
    not (REPO / '.venv' / '.setup-done').exists(), reason='not the environment of `make setup`')
def test_pins_are_what_is_installed():
    versions = {name: metadata.version(name).partition('+')[0] for name in pins()
                if installed(name)}
    assert versions == {name: pins()[name] for name in versions}
    assert len(versions) > 50


def test_every_requirement_is_pinned():
    """The whole stack below us: an open version is another stack tomorrow."""
    pinned = {normal(name) for name in pins()}
    open_ends, waiting, seen = set(), ['pfcr_mm'], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name != 'pfcr_mm' and name not in pinned:
            open_ends.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            extra = 'dev' if name == 'pfcr_mm' else ''
            if requirement.marker is None or requirement.marker.evaluate({'extra': extra}):
                waiting.append(normal(requirement.name))
    assert {name for name in open_ends if installed(name)} == set()


def normal(name):
    return re.sub(r'[-_.]+', '-', name).lower() if name != 'pfcr_mm' else name


def installed(name):
    try:
        return bool(metadata.version(name)) and not name.startswith(('nvidia-', 'cuda-', 'triton'))
    except metadata.PackageNotFoundError:
        return False


def test_every_install_step_is_pinned():
    steps = [line for line in MAKEFILE.splitlines() if '$(PIP) install' in line]
    assert len(steps) == 4
    assert all('$(PIP) install $(PINS) ' in line for line in steps)


def test_ci_runs_the_readmes_test_command():
    script = REPO / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().splitlines()[-1] == 'make test'
    assert re.search(r'^\s*(\$ )?make test\b', (REPO / 'README.md').read_text(), re.MULTILINE)


def test_demo_runs_the_demo_config():
    from mmengine.config import Config
    config = re.search(r'^DEMO := (.*)$', MAKEFILE, re.MULTILINE).group(1)
    assert Config.fromfile(REPO / config).work_dir == 'work_dirs/demo'


@pytest.fixture()
def checkout(tmp_path):
    """A folder with our Makefile, and a stand-in for pip and python."""
    (tmp_path / 'Makefile').write_text(MAKEFILE)
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('')
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >> calls\ncase "$*" in *onedl-mmcv*) exit ${FAIL:-0};; esac\n')
    python.chmod(0o755)
    return tmp_path


def make(folder, *args, **env):
    return subprocess.run(['make', *args], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **env})


def test_setup_is_not_repeated(checkout):
    assert make(checkout, 'setup').returncode == 0
    calls = (checkout / 'calls').read_text()
    assert make(checkout, 'setup').returncode == 0
    assert (checkout / 'calls').read_text() == calls


@pytest.mark.parametrize('name', SOURCES)
def test_setup_runs_again_after_a_change(name, checkout):
    make(checkout, 'setup')
    (checkout / 'calls').unlink()
    later = (checkout / '.venv' / '.setup-done').stat().st_mtime + 5
    os.utime(checkout / name, (later, later))
    assert make(checkout, 'setup').returncode == 0
    assert 'install' in (checkout / 'calls').read_text()


def test_half_finished_setup_does_not_look_complete(checkout):
    make(checkout, 'setup')
    later = (checkout / '.venv' / '.setup-done').stat().st_mtime + 5
    os.utime(checkout / 'setup.py', (later, later))
    assert make(checkout, 'demo', FAIL='1').returncode != 0
    assert not (checkout / '.venv' / '.setup-done').exists()
    assert 'tools/quant.py' not in (checkout / 'calls').read_text()


def test_old_python_is_refused(checkout):
    done = make(checkout, 'setup', 'PYTHON=false')
    assert done.returncode != 0 and 'PYTHON=python3.11' in done.stdout


def test_help_is_the_default(checkout):
    done = make(checkout)
    for target in ('setup', 'demo', 'test', 'lint', 'clean'):
        assert f'make {target}' in done.stdout
    assert not (checkout / 'calls').exists()
