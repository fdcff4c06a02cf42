"""Measuring a model on the test split, or on another."""
import io
from contextlib import redirect_stdout

from mmengine.runner import TestLoop

from ..errors import UsageError
from .data import check_images, check_worker
from .metrics import counted
from .per_class import per_class


def measure(runner, model, loop):
    """Test `model`.

    Args:
        runner (QuantRunner): its own model is put back afterwards.
        model (nn.Module): what is measured.
        loop (TestLoop): of the runner, see `test_loop`.

    Returns:
        tuple[dict, dict]: what counts, and all there is, AP by class included.

    Raises:
        UsageError: an image is missing or damaged.
    """
    current, runner.model = runner.model, model
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            with per_class() as classes:
                result = loop.run()
    except UsageError:
        raise
    except Exception as error:
        check_worker(error)
        check_images(loop.dataloader.dataset)
        raise
    finally:
        runner.model = current
    return counted(result), {**result, **classes}


def test_loop(runner, split):
    """The loop that tests on the dataloader and the evaluator of 'test' or 'val'."""
    if split == 'test':
        loop = runner._test_loop = runner.build_test_loop(runner._test_loop)
        return loop
    return TestLoop(runner, runner.cfg[f'{split}_dataloader'], runner.cfg[f'{split}_evaluator'])
