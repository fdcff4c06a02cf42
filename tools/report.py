"""Write report.html for a quantized checkpoint: whether to trust it, and where it hurts.

    python tools/report.py CONFIG QUANTIZED.pth [--float FLOAT.pth] [--work-dir D]

It goes to the checkpoint's folder, or to D.
"""
import sys

from pfcr_mm.analysis.cli import report_main

if __name__ == '__main__':
    sys.exit(report_main())
