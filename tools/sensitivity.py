"""Rank layers, or units, by what quantizing each of them alone does to the model.

    python tools/sensitivity.py CONFIG [FLOAT.pth] [--level block] [--by ap] [--images N]

Writes sensitivity.json, sensitivity.png and sensitivity_overrides.py, a config with more bits
for the most sensitive, to the work dir.
"""
import sys

from pfcr_mm.analysis.cli import sensitivity_main

if __name__ == '__main__':
    sys.exit(sensitivity_main())
