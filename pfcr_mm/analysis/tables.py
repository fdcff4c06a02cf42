"""Tables of a report: cells carry the number as report.json has it."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text (str): what is shown.
        number (bool): whether it is one; then `value` is what sorts, '' where not known.
        value (object): as in report.json.
    """

    text: str
    number: bool = False
    value: object = ''


@dataclass
class Table:
    """A table of a report.

    Args:
        id (str): in the page.
        caption, head (str, list[str]): what is in it.
        rows (list[list[Cell]]): its cells.
        open (bool): False puts it behind a line that opens it.
    """

    id: str
    caption: str
    head: list
    rows: list = field(default_factory=list)
    open: bool = False


def number(value, digits=1, factor=1.0):
    """A cell with a number; a dash where it is not known.

    Args:
        value (float | None): as in report.json.
        digits (int): behind the point.
        factor (float): on what is shown, such as 100 for percent.
    """
    if value is None:
        return Cell('–', True, '')
    return Cell(f'{factor * value:.{digits}f}', True, value)


def brief(value):
    """A cell with a number of unknown size, to three digits."""
    return Cell('–', True, '') if value is None else Cell(f'{value:.3g}', True, value)


def text(value):
    """A cell with words."""
    return Cell('' if value is None else str(value))
