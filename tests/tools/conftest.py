"""Fixtures of the command-line tests."""
import demo_runs
import pytest
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def _fresh_logger():
    """Runs of one second share a logger by name, and it would write to a closed stream."""
    MMLogger._instance_dict.clear()


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """A finished run of tools/quant.py on the tiny detector."""
    return demo_runs.tiny_run(tmp_path_factory.getbasetemp() / 'demo_runs')


@pytest.fixture(scope='session')
def demo_run(tmp_path_factory):
    """A finished run of tools/quant.py on the demo detector."""
    if not demo_runs.ASSET.is_file():
        pytest.skip(f'{demo_runs.ASSET.name} is not there yet')
    return demo_runs.demo_run(tmp_path_factory.getbasetemp() / 'demo_runs')


@pytest.fixture()
def tiny_options(tmp_path):
    """Options of a quick run of the tiny detector, with data of the test's own."""
    return (*demo_runs.TINY, *demo_runs.quick_options(tmp_path / 'shapes'), *demo_runs.QUICK)
