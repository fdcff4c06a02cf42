"""MMEngine citizens: the runner, the loop, the hooks."""
from .hooks import (
    ExpectedMetricsHook,
    ManifestGuardHook,
    ProgressHook,
    ReportHook,
    ScalarsHook,
    UnitCheckpointHook,
    UnitLogHook,
)
from .loops import PFCRLoop
from .runner import QuantRunner
from .signals import Stopped

__all__ = [
    'ExpectedMetricsHook', 'ManifestGuardHook', 'PFCRLoop', 'ProgressHook', 'QuantRunner',
    'ReportHook', 'ScalarsHook', 'Stopped', 'UnitCheckpointHook', 'UnitLogHook'
]
