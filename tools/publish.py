"""Strip a training checkpoint to its weights in half precision, ready to ship.

    python tools/publish.py IN.pth OUT.pth
"""
import argparse

import torch

from pfcr_mm.models.checkpoint import DERIVED, read_checkpoint, save_atomically


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint of a training run')
    parser.add_argument('target', help='file to write')
    args = parser.parse_args()

    checkpoint = read_checkpoint(args.source)
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in checkpoint['state_dict'].items() if not DERIVED.match(key)
    }
    classes = checkpoint['meta'].get('dataset_meta', {}).get('classes', ())
    meta = dict(dataset_meta=dict(classes=list(classes)))
    size = save_atomically(dict(meta=meta, state_dict=state), args.target)
    print(f'{args.target}: {size / 1e6:.2f} MB, '
          f'{sum(torch.numel(v) for v in state.values()) / 1e6:.2f} M values')


if __name__ == '__main__':
    main()
