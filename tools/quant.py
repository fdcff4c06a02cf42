"""Quantize a detector with PFCR and measure box and mask AP.

    python tools/quant.py CONFIG [CHECKPOINT] [--work-dir D] [--cfg-options k=v ...]
"""
import sys

from pfcr_mm.cli import quant_main

if __name__ == '__main__':
    sys.exit(quant_main())
