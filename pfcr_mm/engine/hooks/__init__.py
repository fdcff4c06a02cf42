"""Hooks of the quantization loop; each listens to the loop's own stages."""
from .agreement import AgreementHook
from .expected import ExpectedMetricsHook
from .guard import ManifestGuardHook
from .progress import ProgressHook
from .report import ReportHook
from .scalars import ScalarsHook
from .unit_checkpoint import UnitCheckpointHook
from .unit_log import UnitLogHook

__all__ = [
    'AgreementHook', 'ExpectedMetricsHook', 'ManifestGuardHook', 'ProgressHook', 'ReportHook',
    'ScalarsHook', 'UnitCheckpointHook', 'UnitLogHook'
]
