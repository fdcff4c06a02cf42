"""What the terms of a mixed loss are divided by, alike in all processes."""
import itertools
import math

import torch

from .. import parallel
from .capture import split
from .faults import BatchLimit
from .feed import collate

_LEAST = 1e-12


def take_first_values(loss_of, mixed, chain, unit, inputs, targets, config, held_out, device,
                      tell=print, at_once=None):
    """Give mixed losses the values of their terms in the first batch of held-out images.

    Each process computes what it holds of that batch, weighted by its share of the rows;
    one process by itself takes what it would take anyway.

    Args:
        loss_of (callable): the unit's loss.
        mixed (list[MixedLoss]): in it, at any depth; as many in all processes.
        chain, unit, inputs, targets, config, held_out, device, at_once: see `reconstruct`.
        tell (callable): takes a line where memory runs out.
    """
    if not mixed:
        return
    roll = inputs.roll_call()
    wanted = set(split(roll.rows, held_out)[1])
    buckets = ([number for number in bucket if number in wanted] for bucket in roll.buckets)
    chosen = next(filter(None, buckets))[:config.batch_size]
    mine = inputs.held(chosen)

    @torch.no_grad()
    def compute(size):
        found = [[[] for _ in loss.terms] for loss in mixed]
        for k in range(0, len(mine), size):
            pick = mine[k:k + size]
            for loss in mixed:
                loss.first = [None] * len(loss.terms)
            state, side = chain.run(inputs.batch(pick, device), unit.start, unit.stop)
            loss_of(state.tensors + side, collate((targets[i] for i in pick), device))
            rows = sum(inputs.states[i].rows for i in pick)
            share = rows / roll.rows_of(chosen)
            for columns, loss in zip(found, mixed):
                for values, value in zip(columns, loss.first):
                    values.append(share * float(value or 0.0))
        return found

    limit = BatchLimit(config.batch_size, unit.name, tell, at_once)
    shares = parallel.gather(limit.run(compute))
    for number, loss in enumerate(mixed):
        loss.first = [max(math.fsum(itertools.chain(*column)), _LEAST)
                      for column in zip(*(share[number] for share in shares))]
