"""What a run's method is called, in report.json and wherever a result is shown."""
from pathlib import Path

from ..errors import UsageError

DEFAULT = 'PFCR'
NOTHING_LEARNED = 'calibration only'


def check_name(cfg):
    """Raise UsageError where the config's own `method` is no name."""
    name = cfg.get('method')
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise UsageError(f"method={name!r} is not a name; give words such as 'BRECQ', or leave it "
                         'out')


def method_name(cfg, units):
    """The name of what has run.

    Args:
        cfg (Config): of the run; its `method` is a name that somebody gave, its
            `method_file` what `--method` has laid over it.
        units (list): that were reconstructed.

    Returns:
        str: the name given; else 'calibration only' where nothing was reconstructed, the
        stem of the method's file, or 'PFCR'.

    Example:
        >>> method_name(dict(method_file='configs/_base_/methods/brecq.py'), ['a unit'])
        'brecq'
    """
    if cfg.get('method'):
        return cfg['method']
    if not units:
        return NOTHING_LEARNED
    return Path(cfg['method_file']).stem if cfg.get('method_file') else DEFAULT


def labels(report):
    """What the models of a report are called.

    Args:
        report (dict): contents of report.json; an older one does not say its method.

    Returns:
        dict[str, str]: by state.
    """
    return dict(float='float', calibrated='calibrated only',
                quantized=report.get('method') or 'quantized')
