"""Test a quantized checkpoint: the AP of the run that saved it.

    python tools/test.py CONFIG QUANTIZED.pth [--work-dir D] [--cfg-options k=v ...]
"""
import sys

from pfcr_mm.cli import test_main

if __name__ == '__main__':
    sys.exit(test_main())
