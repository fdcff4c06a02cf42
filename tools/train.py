"""Train a float detector with MMEngine's stock Runner (used for the demo detector)."""
import argparse

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import pfcr_mm  # noqa: F401  registers the `pfcr_mm` scope


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.work_dir = args.work_dir or cfg.get('work_dir', './work_dirs/train')
    # -100 masks give denormal attention weights, which slow a CPU down
    torch.set_flush_denormal(True)
    Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
