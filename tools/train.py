"""Train a float detector with MMEngine's stock Runner (the detectors that ship as configs)."""
import argparse
import sys

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from pfcr_mm.cli import safe_loading  # importing the package registers its scope
from pfcr_mm.errors import UsageError


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='let checkpoints run pickled code; only for your own files')
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    cfg.work_dir = args.work_dir or cfg.get('work_dir', './work_dirs/train')
    # -100 masks give denormal attention weights, which slow a CPU down
    torch.set_flush_denormal(True)
    try:
        with safe_loading(cfg):
            Runner.from_cfg(cfg).train()
    except UsageError as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
