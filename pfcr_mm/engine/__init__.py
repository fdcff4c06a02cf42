"""MMEngine citizens: the runner, the loop, the hooks."""
from .hooks import ExpectedMetricsHook, ManifestGuardHook, ProgressHook, ReportHook, UnitLogHook
from .loops import PFCRLoop
from .runner import QuantRunner

__all__ = [
    'ExpectedMetricsHook', 'ManifestGuardHook', 'PFCRLoop', 'ProgressHook', 'QuantRunner',
    'ReportHook', 'UnitLogHook'
]
