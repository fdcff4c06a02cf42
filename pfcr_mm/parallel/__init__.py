"""Several processes at one quantization; on one process nothing of this does anything.

`launch` starts and ends the group, `collectives` is what its processes say to each other,
`gradients` sums those of a step, `watch` ends them all where one of them ends early, `shard`
says who holds what.
"""
from .collectives import (
    copy_from_main,
    from_main,
    gather,
    highest,
    is_main,
    rank,
    sum_in_place,
    total,
    world_size,
)
from .gradients import GradientSum
from .launch import end, rank_of_environment, start, stop
from .shard import Shard, whole

__all__ = [
    'GradientSum', 'Shard', 'copy_from_main', 'end', 'from_main', 'gather', 'highest', 'is_main',
    'rank', 'rank_of_environment', 'start', 'stop', 'sum_in_place', 'total', 'whole',
    'world_size'
]
