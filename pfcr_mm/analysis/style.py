"""How figures look: colours that colour-blind people tell apart, sizes fit for print."""
import io
import textwrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours; each state also has a marker of its own, for print in grey.
COLOURS = dict(float='#000000', calibrated='#E69F00', quantized='#0072B2', bad='#D55E00',
               good='#009E73', grey='#8A8A8A')
MARKERS = dict(float='s', calibrated='^', quantized='o')
WIDTH = 9.0  # inches
DPI = 110


def figure(height, rows=1, columns=1, **options):
    """A figure of the report's width without pyplot's global state.

    Args:
        height (float): in inches.
        rows, columns (int): of axes.

    Returns:
        tuple[Figure, ndarray]: axes as a (rows, columns) array.
    """
    made = Figure(figsize=(WIDTH, height), layout='constrained')
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
        axis.tick_params(labelsize=8)
    return made, axes


def title(made, text):
    """The finding, above the figure."""
    made.suptitle(textwrap.fill(text, 104), fontsize=10.5, fontweight='bold', x=0.01, ha='left')


def png(made):
    """The figure as bytes of a PNG."""
    buffer = io.BytesIO()
    made.savefig(buffer, format='png', dpi=DPI)
    return buffer.getvalue()


def brief_part(part):
    """A part's name that fits above a narrow strip: 'roi_head.bbox_head.1' is 'box 1'."""
    part = part.removeprefix('roi_head.').replace('_head', '').replace('bbox', 'box')
    return part.replace('.', ' ')


def short(name, length=34):
    """A layer's name without what all names share."""
    for long, brief in (('backbone.', ''), ('stages.', 's'), ('.blocks.', '.b'),
                        ('blocks.', 'b'), ('roi_head.', ''), ('w_msa.', ''),
                        ('.input_quantizer', ''), ('matmul_qk.left_quantizer', 'q'),
                        ('matmul_qk.right_quantizer', 'k'),
                        ('matmul_av.left_quantizer', 'softmax'),
                        ('matmul_av.right_quantizer', 'v')):
        name = name.replace(long, brief)
    return name if len(name) <= length else f'...{name[3 - length:]}'
