"""The method: units, schedule, calibration, optimisation, POS."""
from . import detections_loss, guided_losses, losses  # noqa: F401  fill the table
from .attended import AttendedValues
from .calibrate import calibrate, observe
from .class_tokens import TokenRows, calibrate_tokens
from .faults import Faults
from .fit_weights import MomentObserver, compensate_weights, not_fitted, round_weights
from .norm_rows import NormRows
from .optimize import UnitRecord
from .pfcr import ChainReconstructor, harden
from .pos import POSConfig, Stage
from .schedule import build_schedule, share_iterations, traversal_string
from .unit_config import UnitConfig
from .units import LEVELS, Unit, units_of

__all__ = [
    'AttendedValues', 'ChainReconstructor', 'Faults', 'LEVELS', 'MomentObserver', 'NormRows',
    'POSConfig', 'Stage', 'TokenRows', 'Unit', 'UnitConfig', 'UnitRecord', 'build_schedule',
    'calibrate', 'calibrate_tokens', 'compensate_weights', 'harden', 'not_fitted', 'observe',
    'round_weights', 'share_iterations', 'traversal_string', 'units_of'
]
