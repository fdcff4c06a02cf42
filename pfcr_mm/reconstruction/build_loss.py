"""A loss from what a config says: a name, or a dict with options or terms."""
from .. import parallel
from ..errors import UsageError
from ..registry import RECONSTRUCTION_LOSSES, lookup
from .views import UNIT


def parse_loss(cfg, key='loss'):
    """(class, options) of a loss config; UsageError for an unknown name."""
    options = dict(cfg) if isinstance(cfg, dict) else dict(type=cfg)
    cls = lookup(RECONSTRUCTION_LOSSES, options.pop('type', None), key)
    return cls, options


def check_loss(cfg, key='loss'):
    """Raise UsageError unless a loss can be built from `cfg`."""
    cls, options = parse_loss(cfg, key)
    check = getattr(cls, 'check', None)
    if check is not None:
        check(options, key)
    elif options:
        raise UsageError(f'{key}: {sorted(options)[0]!r} is not a known key; '
                         f"{cfg['type']!r} takes none")


def loss_wants(cfg):
    """What a loss looks at, of UNIT, LAYERS and FINAL."""
    cls, options = parse_loss(cfg)
    wants = getattr(cls, 'wants', (UNIT, ))
    return set(wants(options) if callable(wants) else wants)


def losses_in(cfg):
    """Configs of a loss and of all that it is made of (`parts` of its class)."""
    cls, options = parse_loss(cfg)
    yield cfg
    for part in cls.parts(options) if hasattr(cls, 'parts') else ():
        yield from losses_in(part)


def check_shareable(loss, cfg):
    """Raise UsageError where several processes cannot compute a loss as one would.

    Args:
        loss (object): the loss or its class; `shares_batches` says that they can.
        cfg (str | dict): what the config says.
    """
    if parallel.world_size() > 1 and not getattr(loss, 'shares_batches', False):
        raise UsageError(
            f'quantize_cfg.reconstruction.loss={cfg!r} cannot be computed by several processes; '
            'use one (--launcher none)')


def build_loss(cfg, targets, channel_axis, context=None):
    """Build the loss of one unit.

    Args:
        cfg (str | dict): of the config.
        targets (Sequence[tuple[Tensor]]): the unit's targets, one tuple an entry.
        channel_axis (int): axis of the channels.
        context (LossContext | None): the unit, for losses that ask for it.
    """
    cls, options = parse_loss(cfg)
    if hasattr(cls, 'from_context'):
        return cls.from_context(targets, channel_axis, context, options)
    return cls(targets, channel_axis, **options)
