"""The project's tables, and how a mistake is told."""
import pytest
from torch import nn

from pfcr_mm.errors import UsageError
from pfcr_mm.registry import QUANTIZERS, RECONSTRUCTION_LOSSES, ROUNDINGS, TypeTable, lookup


class Base(nn.Module):
    pass


class Child(Base):
    pass


def test_tables_fill_themselves():
    assert lookup(QUANTIZERS, 'uniform', 'kind').__name__ == 'UniformQuantizer'
    assert lookup(ROUNDINGS, 'adaround', 'rounding').__name__ == 'AdaRound'
    assert lookup(RECONSTRUCTION_LOSSES, 'channel_mse', 'loss').__name__ == 'ChannelMSELoss'


@pytest.mark.parametrize('name', ['log4', None, 3, ['uniform']], ids=str)
def test_unknown_names_are_one_line_that_names_the_key(name):
    with pytest.raises(UsageError, match=r"^quant\.x=.* is not a known quant.*'log2'") as caught:
        lookup(QUANTIZERS, name, 'quant.x')
    assert '\n' not in str(caught.value)


def test_usage_errors_are_value_errors():
    assert issubclass(UsageError, ValueError)  # MMEngine hides TypeErrors of hooks


def test_type_table_finds_the_nearest_class():
    table = TypeTable('thing')
    name = f'{Base.__module__}.Base'
    table.register(name)(lambda: 'base')
    assert table.find(Child())() == table.find(Base())() == 'base'
    table.register(f'{Child.__module__}.Child')(lambda: 'child')
    assert table.find(Child())() == 'child' and table.find(Base())() == 'base'
    assert table.find(nn.Linear(1, 1)) is None
    with pytest.raises(KeyError, match='registered twice'):
        table.register(name)(lambda: 'again')
