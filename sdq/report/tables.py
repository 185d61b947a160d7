"""Tables of a page: cells that keep the number beside its text, and how numbers are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS: dict[str, tuple[str, bool]] = {
    "accuracy": ("accuracy", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "macro_f1": ("macro F1", True),
    "auc": ("AUC", False),
    "dice": ("Dice", True),
    "iou": ("IoU", True),
    "dice_nonempty": ("Dice, images with something to mark", True),
    "hd95": ("boundary distance (HD95), pixels", False),
    "ece": ("calibration error (ECE)", True),
}
"""Known metrics: what they are called, and whether they are shares."""

MEANINGS = {
    "accuracy": "Accuracy: the share of images that are right.",
    "balanced_accuracy": "Balanced accuracy: the same, every class counted alike, so that rare "
    "classes count.",
    "macro_f1": "Macro F1: misses and false alarms together, every class counted alike.",
    "auc": "AUC: 1 is perfect, 0.5 is guessing.",
    "dice": "Dice and IoU: how far the marked areas overlap with the true ones.",
    "hd95": "Boundary distance: how far the marked outline is from the true one, but for the worst "
    "twentieth; less is better.",
    "ece": "Calibration error: how far the stated confidence is from the share that is right; less "
    "is better.",
}
"""What metrics are, for those who do not know them."""

NBSP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""

HEADLINES = ("balanced_accuracy", "dice", "accuracy")
"""The metric that stands for a network in charts: the first of these that it has."""


@dataclass(frozen=True)
class Cell:
    """One field: its text, and the number it stands for, if it is one.

    Args:
        text: as people read it.
        value: as a machine reads it.
        mark: ``good``, ``bad`` or ``unsure``, as a style; empty for none.
    """

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its name.

    Args:
        caption: what it shows.
        columns: names, with unit.
        rows: as many cells each as there are columns.
        note: a sentence below.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def text(value: object) -> Cell:
    """Return a cell of plain text; a dash for what is absent."""
    return Cell("–" if value in (None, "") else str(value))


def share(value: float | None, mark: str = "") -> Cell:
    """Return a share in percent."""
    return text(None) if value is None else Cell(f"{100 * value:.1f}{NBSP}%", value, mark)


def points(value: float | None, mark: str = "") -> Cell:
    """Return a difference of shares in percentage points, with its sign."""
    return text(None) if value is None else Cell(signed(100 * value, f"{NBSP}points"), value, mark)


def signed(value: float, unit: str = "", digits: int = 1) -> str:
    """Return a difference with its sign; what rounds to zero has none."""
    shown = f"{abs(value):.{digits}f}"
    sign = "" if float(shown) == 0 else "−" if value < 0 else "+"
    return f"{sign}{shown}{unit}"


def number(value: float | None, digits: int = 2) -> Cell:
    """Return a number; whole ones without a fraction."""
    if value is None:
        return text(None)
    whole = float(value).is_integer()
    return Cell(f"{value:,.0f}" if whole else f"{value:,.{digits}f}", value)


def scaled(value: float | None, unit: str) -> Cell:
    """Return a quantity with a prefix to its unit: 66,832 bytes are 66.8 kB.

    >>> scaled(66_832, "B").text.split(NBSP), scaled(0.0042, "s").text.split(NBSP)
    (['66.8', 'kB'], ['4.2', 'ms'])
    """
    if value is None:
        return text(None)
    if not value:
        return Cell(f"0{NBSP}{unit}", value)
    steps = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}
    step = min(max(math.floor(math.log10(abs(value)) / 3 + 1e-9), 0 if unit == "B" else -3), 4)
    scale = value / 1000.0**step
    digits = 0 if abs(scale) >= 100 or (step == 0 and float(value).is_integer()) else 1
    return Cell(f"{scale:,.{digits}f}{NBSP}{steps[step]}{unit}".rstrip(NBSP), value)


def transposed(caption: str, name: str, table: Table) -> Table:
    """Return a table with rows for columns: of few things with many figures, for narrow screens.

    Args:
        caption: of the new table.
        name: of its first column.
        table: whose first column names its rows.
    """
    rows = [[text(c), *(row[i] for row in table.rows)] for i, c in enumerate(table.columns)][1:]
    return Table(caption, [name, *(row[0].text for row in table.rows)], rows, table.note)


def metric_names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the single numbers that metrics have, the known ones first."""
    present = [
        name
        for found in metrics
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    rest = [n for n in present if n not in METRICS and n not in ("num_examples", "worst_client")]
    return [*(n for n in METRICS if n in present), *dict.fromkeys(rest)]


def metric_cell(name: str, value: float | None) -> Cell:
    """Return a metric: a share where it is known to be one."""
    return share(value) if METRICS.get(name, ("", False))[1] else number(value, 3)


def metric_label(name: str) -> str:
    """Return what a metric is called."""
    return METRICS[name][0] if name in METRICS else name.replace("_", " ")


def headline(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the metric by which networks are drawn; None if they share none of those known."""
    return next((n for n in HEADLINES if all(m.get(n) is not None for m in metrics)), None)
