"""Fixtures of the command-line tests."""
import demo_runs
import pytest
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def _fresh_logger():
    """Runs of one second share a logger by name, and it would write to a closed stream."""
    MMLogger._instance_dict.clear()


@pytest.fixture()
def tiny_options(tmp_path):
    """Options of a quick run of the tiny detector, with data of the test's own."""
    return (*demo_runs.TINY, *demo_runs.quick_options(tmp_path / 'shapes'), *demo_runs.QUICK)
