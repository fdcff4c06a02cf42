"""What quantization did: diagnostics, the report, checks."""
from .hook import DiagnosticsHook

__all__ = ['DiagnosticsHook']
