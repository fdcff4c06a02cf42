"""Early stop: a unit that has learned what it can takes no more iterations."""
from dataclasses import dataclass, fields

from ..errors import UsageError, check_keys, is_number


@dataclass(frozen=True)
class EarlyStop:
    """When the held-out loss of a unit counts as a plateau.

    Args:
        every (int): iterations between two looks at it.
        patience (int): looks in a row without a gain that end the unit.
        min_delta (float): the least gain, as a share of the best loss seen so far.
    """

    every: int = 50
    patience: int = 3
    min_delta: float = 0.01

    def __post_init__(self):
        for name in ('every', 'patience'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f'early_stop.{name}={value!r} is not an integer of 1 or more')
        value = self.min_delta
        if not (is_number(value) and 0 <= value < 1):
            raise UsageError(f'early_stop.min_delta={value!r} is not from 0 to below 1')

    @classmethod
    def build(cls, given):
        """From the `early_stop` of a UnitConfig, a dict or None; None is never."""
        if given is None:
            return None
        if not isinstance(given, dict):
            raise UsageError(f'early_stop={given!r} is neither None nor a dict')
        check_keys(given, [f.name for f in fields(cls)], 'early_stop')
        return cls(**given)


class Plateau:
    """The looks at one unit.

    Args:
        rule (EarlyStop | None): None sees no plateau.

    Example:
        >>> plateau = Plateau(EarlyStop(every=10, patience=2))
        >>> [plateau.reached(step, lambda: 1.0) for step in (10, 15, 20, 30)]
        [False, False, False, True]
    """

    def __init__(self, rule):
        self.rule, self.best, self.vain = rule, float('inf'), 0

    def reached(self, step, look):
        """Whether to stop after `step` iterations; `look` gives the loss where it is wanted.

        It follows from losses that are the same in all processes, and so is the same there.
        """
        rule = self.rule
        if rule is None or step % rule.every:
            return False
        loss = look()
        if loss < self.best * (1 - rule.min_delta):
            self.best, self.vain = loss, 0
        else:
            self.vain += 1
        return self.vain >= rule.patience
