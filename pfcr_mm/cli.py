"""The command lines of tools/quant.py and tools/test.py.

They live in the package so that an installed wheel has them too
(`python -m pfcr_mm.cli quant CONFIG`).
"""
import argparse
import json
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from . import parallel
from .errors import UsageError
from .files import disk_full_line, is_disk_full, write_atomically
from .registry import RUNNERS

# Seconds: where a process dies, the others' communication breaks, and the watch says why.
_CONSEQUENCE = 5.0


def quant_main(argv=None):
    """tools/quant.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    args = _quant_arguments(argv)

    def run():
        if args.dry_run:
            _dry_run(args)
            return
        from .engine.lock import WorkDirLock
        cfg = read_config(args)
        cfg.resume = args.resume or bool(cfg.get('resume', False))
        _check_data(cfg, calibrates=True)
        make_work_dir(cfg)
        with WorkDirLock(cfg.work_dir), damage_told(cfg), safe_loading(cfg):
            build_runner(cfg).quantize()

    return guarded('quant.py', run, args)


def quant_config(argv):
    """The config that tools/quant.py runs, given its arguments; raises UsageError."""
    return read_config(_quant_arguments(argv))


def test_main(argv=None):
    """tools/test.py. Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = make_parser('Test a quantized checkpoint.', 'test.py')
    parser.add_argument('checkpoint', help='checkpoint written by tools/quant.py')
    args = parser.parse_args(argv)

    def run():
        cfg = read_config(args)
        _check_data(cfg, calibrates=False)
        from .engine.data import check_images
        from .engine.metrics import counted
        with damage_told(cfg), safe_loading(cfg):
            runner = build_runner(cfg)
            try:
                metrics = runner.test()
            except UsageError:
                raise
            except Exception:
                check_images(runner.test_dataloader.dataset)
                raise
        if parallel.is_main():
            for key, value in counted(metrics).items():
                print(f'{key}: {value:.4f}')

    return guarded('test.py', run, args)


def _quant_arguments(argv):
    parser = make_parser('Quantize a detector with PFCR and measure box and mask AP.', 'quant.py')
    parser.add_argument('checkpoint', nargs='?', help='float checkpoint (default: load_from)')
    parser.add_argument('--dry-run', action='store_true',
                        help='print the plan and stop; needs neither data nor checkpoint')
    parser.add_argument('--resume', action='store_true',
                        help='go on where an unfinished run in the same work dir was')
    return parser.parse_args(argv)


def _dry_run(args):
    """Print the plan. Data and checkpoint are not looked at, the work dir stays as it is."""
    from .engine.hooks.progress import plan_lines
    with tempfile.TemporaryDirectory() as folder:
        args.work_dir = folder
        cfg = read_config(args)
        cfg.visualizer = dict(type='Visualizer', name=folder)  # writes nothing
        loop = build_runner(cfg).build_quantize_loop()
        loop.rehearse()
        if parallel.is_main():
            print('\n'.join([*plan_lines(loop), '  not looked at: data, checkpoint']))


class _Overrides(DictAction):
    """MMEngine's KEY=VALUE action; a word without '=' is an error of the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                raise argparse.ArgumentError(self, f'{value!r} is not KEY=VALUE')
            if 'dict(' in value:
                raise argparse.ArgumentError(
                    self, f"{value!r}: write KEY.SUBKEY=VALUE; dict(...) belongs in a config")
            try:
                self._parse_iterable(value.partition('=')[2])
            except (AssertionError, RecursionError):  # MMEngine's own at brackets and at dicts
                raise argparse.ArgumentError(
                    self, f'{value!r}: this value cannot be read; brackets come in pairs, and '
                    'what is more than a list of words and numbers belongs in a config') from None
        super().__call__(parser, namespace, values, option_string)

    @staticmethod
    def _parse_iterable(value):
        """As MMEngine reads it, but what is no list keeps its blanks, and in quotes its commas."""
        inner = value.strip('\'"')
        brackets = inner[:1] + inner[-1:] in ('[]', '()')
        quoted = inner != value
        if not brackets and (quoted if ',' in inner else ' ' in inner.strip()):
            return inner
        return DictAction._parse_iterable(value)


class _Parser(argparse.ArgumentParser):
    """One of several processes prints usage and errors."""

    def _print_message(self, message, file=None):
        if not parallel.rank_of_environment():
            super()._print_message(message, file)


def make_parser(description, program):
    """A parser with the config and the options that all tools share."""
    parser = _Parser(prog=program, description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where to write (default: work_dirs/CONFIG)')
    parser.add_argument('--cfg-options', nargs='+', action=_Overrides, metavar='KEY=VALUE',
                        help='overrides of the config')
    parser.add_argument('--method', metavar='FILE',
                        help='keys to lay over the config, such as configs/_base_/methods/qdrop.py')
    parser.add_argument('--split', choices=['test', 'val'], default='test',
                        help='evaluate with test_dataloader (default) or with val_dataloader')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='let checkpoints run pickled code; only for your own files')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how this process was started, where it is one of several')
    return parser


def read_config(args):
    """The config with what the command line says, checked as far as it goes by itself."""
    if not os.path.isfile(args.config) and '::' not in args.config:
        raise UsageError(f'config {args.config} is not there; see configs/')
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:  # a config is Python: it raises what it likes
        raise UsageError(
            f'config {args.config} cannot be read: {type(error).__name__}: {error}') from None
    try:
        _lay_over(cfg, args.method)
        cfg.merge_from_dict(args.cfg_options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise UsageError(f'--cfg-options does not fit the config: {error}') from None
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or os.path.join(
        'work_dirs', Path(args.config).stem)
    args.work_dir = cfg.work_dir  # where a traceback would go
    if args.checkpoint:
        cfg.load_from = args.checkpoint
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    for key in ('model', 'model.quant', 'quantize_cfg', 'quantize_cfg.calibration',
                'train_dataloader', 'train_dataloader.dataset', 'test_dataloader',
                'test_dataloader.dataset'):
        parent, _, child = key.rpartition('.')
        value = (cfg.get(parent) or {} if parent else cfg).get(child)
        if value is not None and not isinstance(value, dict):
            raise UsageError(f'config {args.config}: {key} is {str(value)[:60]!r} and no dict')
    model_type = (cfg.get('model') or {}).get('type')
    if str(model_type) != 'pfcr_mm.QuantDetector':
        raise UsageError(
            f"config {args.config}: model.type is {model_type!r}, not "
            "'pfcr_mm.QuantDetector'; see README, 'Your own detector'")
    for key in ('arch', 'quant'):
        if cfg.model.get(key) is None:
            raise UsageError(f"config {args.config}: model.{key} is missing; see README, "
                             "'Your own detector'")
    if cfg.get(f'{args.split}_dataloader') is None:
        raise UsageError(f'the config has no {args.split}_dataloader, which AP is measured on')
    if args.split == 'val':
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.get('val_evaluator')
    from .engine.method import check_name
    check_name(cfg)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg


def _lay_over(cfg, path):
    """Put the keys of a method's file over those of a config, in place."""
    if path is None:
        return
    if not os.path.isfile(path):
        raise UsageError(f'method {path} is not there; see configs/_base_/methods/')
    try:
        over = Config.fromfile(path).to_dict()
    except Exception as error:  # it is Python: it raises what it likes
        raise UsageError(
            f'method {path} cannot be read: {type(error).__name__}: {error}') from None
    cfg.merge_from_dict(over)
    cfg.method, cfg.method_file = over.get('method'), str(path)


def make_work_dir(cfg):
    """Make `cfg.work_dir`, or raise UsageError."""
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
    except OSError as error:
        raise UsageError(f'work dir {cfg.work_dir} cannot be made: {error.strerror}') from None


def build_runner(cfg):
    """The runner of a config; UsageError where it cannot quantize, or no model comes of it."""
    from .engine import QuantRunner
    from .reconstruction.faults import is_out_of_memory
    runner_type = RUNNERS.get(cfg.get('runner_type', 'pfcr_mm.QuantRunner'))
    if runner_type is None or not issubclass(runner_type, QuantRunner):
        raise UsageError(
            f"runner_type={cfg.runner_type!r} cannot quantize; use 'pfcr_mm.QuantRunner'")
    try:
        return runner_type.from_cfg(cfg)
    except (TypeError, AttributeError, ValueError, AssertionError, LookupError, ZeroDivisionError,
            NotImplementedError, RuntimeError) as error:
        misspelt = isinstance(error, KeyError) and 'registry' in str(error)
        if misspelt or isinstance(error, UsageError) or is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or ['no message']
        raise UsageError(
            f'the config cannot be built: {type(error).__name__}: {lines[0][:300]}') from error


def _check_data(cfg, calibrates):
    """Missing annotations end before a log or a folder is written."""
    from .engine.data import calibration_dataset_cfg, check_dataset
    check_dataset(cfg.test_dataloader.dataset, 'test_dataloader')
    own = (cfg.get('quantize_cfg', {}).get('calibration') or {}).get('dataset')
    if calibrates and own:
        check_dataset(own, 'quantize_cfg.calibration.dataset')
    elif calibrates and cfg.get('train_dataloader') is not None:
        check_dataset(calibration_dataset_cfg(cfg), 'train_dataloader')


def safe_loading(cfg):
    """No checkpoint that anything here opens runs code, unless the user trusts it."""
    from .models.safety import only_weights
    return only_weights(bool(cfg.get('trust_checkpoint', False)))


@contextmanager
def damage_told(cfg):
    """Name the annotation file where one turns out to be no JSON."""
    try:
        yield
    except json.JSONDecodeError:
        from .engine.data import annotation_file, innermost
        datasets = [cfg.test_dataloader.dataset]
        if cfg.get('train_dataloader') is not None:
            datasets.append(innermost(cfg.train_dataloader.dataset))
        for dataset in datasets:
            path = annotation_file(dataset)
            try:
                json.loads(path.read_text() if path else 'null')
            except json.JSONDecodeError as error:
                raise UsageError(f'annotation file {path} is damaged: {error}') from None
            except OSError:
                continue
        raise


def guarded(program, run, args):
    """Run a tool; whatever goes wrong ends in one line. Returns the exit code."""
    # mmdet's import says so on stderr, and we use pycocotools
    warnings.filterwarnings('ignore', 'faster_coco_eval is not installed')
    # MMEngine's, from each of several processes
    warnings.filterwarnings('ignore', 'Setting (OMP|MKL)_NUM_THREADS environment variable')
    try:
        advice = f'; {_goes_on(program)}, with any number of processes'
        parallel.start(args.launcher, program, advice if _goes_on(program) else '')
        run()
        parallel.stop()
    except UsageError as error:
        return _refuse(program, error, error.exit_code)
    except KeyboardInterrupt as stop:  # or `Stopped`, which says by what
        signum = signal.Signals(getattr(stop, 'signum', signal.SIGINT))
        more = '; '.join(filter(None, [f'stopped by {signum.name}', _goes_on(program)]))
        return _refuse(program, more, 128 + signum)
    except KeyError as error:  # a misspelt `type` anywhere in the config
        if not re.search(r'is not in the \S+ registry', str(error)):
            return _unexpected(program, error, args)
        return _refuse(program, str(error.args[0]).partition(' Please check')[0])
    except Exception as error:
        return _unexpected(program, error, args)
    return 0


def _goes_on(program):
    """What to do after an early end."""
    return ('the same command with --resume goes on after the last unit that was finished'
            if program == 'quant.py' else '')


def _unexpected(program, error, args):
    """One line on what nobody has thought of; the traceback goes to a file. Returns 1."""
    from .reconstruction.faults import is_out_of_memory
    if is_disk_full(error):
        return _refuse(program, disk_full_line(error), 1)
    if is_out_of_memory(error):
        return _refuse(
            program, 'out of memory: set fewer quantize_cfg.calibration.images or rows, '
            "quantize_cfg.cache_dtype='float16', a smaller test_dataloader.batch_size or smaller "
            'images; --resume goes on', 1)
    folder = args.work_dir if os.path.isdir(args.work_dir or '') else tempfile.gettempdir()
    part = '' if parallel.is_main() else f'.{parallel.rank()}'
    path = Path(folder, f'{program}{part}.traceback.txt')
    try:
        write_atomically(path, ''.join(traceback.format_exception(error)))
    except OSError:
        path = 'nowhere: it could not be written'
    lines = str(error).strip().splitlines() or ['no message']
    return _refuse(
        program, f'{type(error).__name__}: {lines[0][:300]} (the traceback is in {path})', 1,
        _CONSEQUENCE)


def _refuse(program, message, code=2, seconds=0.0):
    """Print one line and return the exit code; of several processes, end them all."""
    line = ' '.join(str(message).split())
    parallel.end(line, code, seconds)
    print(f'{program}: error: {line}', file=sys.stderr)
    return code


if __name__ == '__main__':
    tools = dict(quant=quant_main, test=test_main)
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        print('usage: python -m pfcr_mm.cli {quant,test} ...', file=sys.stderr)
        sys.exit(2)
    sys.exit(tools[sys.argv[1]](sys.argv[2:]))
