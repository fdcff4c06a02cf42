"""Checkpoints of an unfinished run: where they lie, which one counts, whose they are."""
import io
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from ..files import remove_partial, write_atomically
from .fingerprint import with_quant_defaults

FORMAT = 'pfcr_mm.run/1'
FOLDER = 'resume'
FINISHED = 'finished.json'
# What a run leaves in its work dir; a new run there moves it aside.
RESULTS = ('quantized.pth', 'quantized.safetensors', 'calibrated.pth', 'report.json', 'report.md',
           'report.html', 'units.jsonl')
FIGURES = 'report_figures'
# How a run is done and watched, not what comes out.
_NO_MATTER = re.compile(
    r'quantize_cfg\.(on_nonfinite|cache_memory_mb|cache_dir|calibration_dir)'
    r'|(test|val)_dataloader\.(num_workers|persistent_workers|pin_memory|prefetch_factor)')
_FOLLOWS = ('seed', 'calibration images')
_NAME = re.compile(r'\d{6}\.pth')


class RunCheckpoints:
    """The folder of a run's checkpoints; the last two are kept.

    Args:
        work_dir (str | Path): of the run.
    """

    def __init__(self, work_dir):
        self.work_dir = Path(work_dir)
        self.folder = self.work_dir / FOLDER

    def files(self):
        """Checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def save(self, state):
        """Write the next checkpoint; those before the last are removed once it is whole."""
        self.folder.mkdir(exist_ok=True)
        files = self.files()
        number = int(files[-1].stem) + 1 if files else 1
        write_run(self.folder / f'{number:06d}.pth', state)
        for path in files[:-1]:
            path.unlink(missing_ok=True)

    def newest(self, warn):
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
            warn (callable): called with a line for each damaged one.

        Raises:
            UsageError: there are some, and all are damaged.
        """
        files = self.files()
        for path in reversed(files):
            try:
                return read_run(path)
            except UsageError as error:
                warn(f'{error}; taking the one before')
        if files:
            raise UsageError(
                f'no checkpoint in {self.folder} is whole; without --resume the run starts over '
                '(what is there is kept aside)')
        return None

    def finished(self):
        """The identity of the finished run, or None."""
        try:
            return json.loads((self.folder / FINISHED).read_text())
        except (OSError, ValueError):
            return None

    def finish(self, identity):
        """The results are written: note whose they are, and drop the checkpoints."""
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / FINISHED, json.dumps(identity, indent=1) + '\n')
        for path in self.files():
            path.unlink(missing_ok=True)

    def set_aside(self):
        """Move what an earlier run left to a folder of its own; nothing is deleted.

        Returns:
            Path | None: the folder, or None where there was nothing.
        """
        remove_partial(self.work_dir)
        there = [self.work_dir / name for name in RESULTS]
        there = [path for path in there if path.is_file() and path.stat().st_size]
        if (self.work_dir / FIGURES).is_dir():
            there.append(self.work_dir / FIGURES)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            remove_partial(self.folder)
            there.append(self.folder)
        if not there:
            return None
        number = 1
        while (self.work_dir / f'previous-{number}').exists():
            number += 1
        target = self.work_dir / f'previous-{number}'
        target.mkdir()
        for path in there:
            path.rename(target / path.name)
        return target


def write_run(path, state):
    """Write the state of a run; the file is whole at any moment."""
    content = io.BytesIO()
    torch.save(dict(state, format=FORMAT), content)
    write_atomically(path, content.getbuffer())


def read_run(path):
    """Read one checkpoint of a run, or raise UsageError where it is damaged.

    The checksums of the archive are compared: torch itself does not look at them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f'checksum of {bad}')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['format'] != FORMAT:
            raise UsageError(
                f"checkpoint {path} has the format {state['format']!r}, this version "
                f'writes {FORMAT!r}')
        return state
    except UsageError:
        raise
    except Exception as error:  # zip and pickle raise all kinds
        raise UsageError(
            f'checkpoint {path} is damaged ({type(error).__name__})') from None


def identity(cfg, **content):
    """What the result depends on, flat: config keys, and hashes of what they point to.

    Args:
        cfg (Config): of the runner.
        **content (str): hashes, by what they are of.

    Returns:
        dict[str, str]: value as text by dotted key.
    """
    names = ['quantize_cfg', 'test_dataloader', 'test_evaluator', 'test_cfg', 'randomness']
    if (cfg.get('quantize_cfg', {}).get('evaluate') or {}).get('val'):
        names += ['val_dataloader', 'val_evaluator', 'val_cfg']
    picked = {key: cfg.get(key) for key in names}
    picked['model'] = with_quant_defaults(cfg.get('model'))
    picked['train_dataloader'] = dict(
        dataset=(cfg.get('train_dataloader') or {}).get('dataset'))
    flat = {}
    _flatten(plain(picked), '', flat)
    flat = {key: value for key, value in flat.items() if not _NO_MATTER.match(key)}
    return {**flat, **content}


def check_identity(saved, own, where):
    """Raise UsageError, naming the keys, where two identitys differ."""
    keys = [k for k in {**saved, **own} if saved.get(k) != own.get(k)]
    if not keys:
        return
    # other images are what another seed or data set leads to
    keys = [k for k in keys if k not in _FOLLOWS] or keys
    shown = ', '.join(
        f'{key} ({_short(saved.get(key))} there, {_short(own.get(key))} now)' for key in keys[:4])
    more = f' and {len(keys) - 4} more' if len(keys) > 4 else ''
    raise UsageError(
        f'{where} is of a run with another config: {shown}{more}; give the config it was started '
        'with, or leave out --resume to start over (what is there is kept aside)')


def random_state():
    """The state of all global random generators, as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, following = random.getstate()
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        numpy=[kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        python=[version, list(numbers), following])


def set_random_state(state):
    """Undo to a `random_state`; generators of GPUs that are not here are left out."""
    torch.set_rng_state(state['torch'])
    if torch.cuda.is_available() and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, following = state['python']
    random.setstate((version, tuple(numbers), following))


def plain(value):
    """The same data in Python's own containers and numbers."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, (np.generic, torch.Tensor)) else value


def _flatten(value, key, flat):
    if isinstance(value, dict) and value:
        for name, child in value.items():
            _flatten(child, f'{key}.{name}' if key else str(name), flat)
    elif isinstance(value, (list, tuple)) and any(isinstance(v, dict) for v in value):
        for index, child in enumerate(value):
            _flatten(child, f'{key}.{index}', flat)
    else:
        flat[key] = repr(value)


def _short(text):
    if text is None:
        return 'nothing'
    return text if len(text) <= 40 else f'{text[:37]}...'
