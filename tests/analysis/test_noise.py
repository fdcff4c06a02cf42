"""SQNR against values computed by hand."""
import math

import pytest
import torch

from pfcr_mm.analysis.noise import Noise, plain_db, sqnr_db


def test_sqnr_of_a_tenth():
    noise = Noise()
    noise.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))  # 25 / 0.25
    assert noise.db == pytest.approx(20.0)
    noise.add(torch.tensor([5.0]), torch.tensor([2.0]))  # (25 + 25) / (0.25 + 9)
    assert noise.db == pytest.approx(10 * math.log10(50 / 9.25))


@pytest.mark.parametrize('signal, noise, db, plain', [
    (1.0, 0.0, math.inf, None), (0.0, 0.0, math.inf, None), (0.0, 1.0, -math.inf, -100.0),
    (1.0, 1.0, 0.0, 0.0), (1.0, 10.0, -10.0, -10.0), (1.0, 1e30, -300.0, -100.0),
    (1.0, math.inf, -math.inf, -100.0)])
def test_sqnr_at_the_ends(signal, noise, db, plain):
    found = sqnr_db(signal, noise)
    assert found == pytest.approx(db) and plain_db(found) == plain


def test_what_is_no_number_is_the_floor():
    assert math.isnan(sqnr_db(math.nan, 1.0)) and plain_db(math.nan) == -100.0
