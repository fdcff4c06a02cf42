"""Fixtures of the engine tests."""
import demo_runs
import pytest


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
