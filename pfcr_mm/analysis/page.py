"""`report.html`: one file with all in it, and its figures as PNGs in a folder beside it."""
import base64
import json
import struct
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..engine.hooks.report import finite
from ..engine.resume import FIGURES
from ..files import write_atomically
from .checks import run_checks
from .sections import sections
from .style import png

PAGE = 'report.html'
_TEMPLATES = Path(__file__).with_name('templates')


def write_page(folder, report, diagnostics, material, curves, limits=None):
    """Write report.html and its figures, and what they say into report.json.

    Where there is no report.json of the run, the numbers go to diagnostics.json.

    Args:
        folder (Path): where to.
        report (dict): contents of report.json, or what is known without.
        diagnostics (dict), material (Material): from `diagnose`.
        curves (list[dict]): lines of units.jsonl.
        limits (Limits | None): of the checks.

    Returns:
        list[dict]: the checks that found something.

    Raises:
        OSError, FaultError: something could not be written; what was there is whole.
    """
    report = finite(dict(report, diagnostics=diagnostics))
    report['checks'] = run_checks(report, limits)
    folder = Path(folder)
    page, pictures = render(report, material, curves)
    target = folder / FIGURES
    target.mkdir(exist_ok=True)
    for name, content in pictures.items():
        write_atomically(target / f'{name}.png', content)
    for path in target.glob('*.png'):
        if path.stem not in pictures:
            path.unlink()
    text = json.dumps(report, indent=1, allow_nan=False)
    write_atomically(folder / _numbers(report), text + '\n')
    write_atomically(folder / PAGE, page)
    return report['checks']


def render(report, material, curves):
    """The page.

    Args:
        report (dict): finite, with `diagnostics` and `checks`.
        material (Material): what figures draw.
        curves (list[dict]): lines of units.jsonl.

    Returns:
        tuple[str, dict[str, bytes]]: HTML; PNGs by name.
    """
    found = sections(report, material, curves)
    pictures = {}
    for section in found:
        drawn = []
        for name, figure, caption in section.figures:
            content = pictures[name] = png(figure)
            width, height = struct.unpack('>II', content[16:24])
            drawn.append(dict(data=base64.b64encode(content).decode(), width=width, height=height,
                              alt=figure.get_suptitle(), caption=caption))
        section.figures = drawn
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template('report.html.j2').render(
        heading=_heading(report), summary=_summary(report), sections=found,
        checks=report['checks'], checked='propagation' in report['diagnostics'],
        notes=[*(report.get('notes') or ()), *report['diagnostics']['notes']])
    return page, pictures


def _numbers(report):
    return 'report.json' if 'units' in report else 'diagnostics.json'


def _heading(report):
    bits = report['bits']
    return ', '.join([report['model'], f"W{bits['weight']}A{bits['activation']}",
                      *filter(None, [report.get('method')])])


def _summary(report):
    found = report['diagnostics']
    words = []
    if 'units' in report:
        words.append(
            f"Calibrated on {report['calibration']['images']} images of the "
            f"{report['calibration']['split']} split, POS {report['pos']}, seed "
            f"{report['seed']}, {report['seconds']:.0f} s, peak memory "
            f"{report['peak_memory_mb']:.0f} MB.")
    if found['images']:
        words.append(
            f"Signals were compared on {len(found['images'])} images and predictions on "
            f"{found['compared_images']} images of the test split, evenly spread over it: none "
            'of them was calibrated on; the result is measured on them, among others. Figures '
            f"are also in {FIGURES}/, numbers in {_numbers(report)}.")
    return ' '.join(words)
