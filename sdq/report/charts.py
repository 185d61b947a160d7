"""Charts as shapes in a plane of pixels, which the page draws as SVG.

Colours are left to the page's style sheet, so that a chart is light or dark as the page is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdq.report.tables import NBSP, scaled, share

WIDTH, HEIGHT = 420.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 70.0, 22.0, 12.0, 46.0
COLOURS, DASHES = 6, 3
"""Colours that can be told apart, and strokes that multiply them."""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Args:
        name: in the legend.
        points: x and y; without a line between them if there is one alone.
        line: whether points are joined.
        colour: number of its colour; None: by its place.
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    colour: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A series in pixels.

    Args:
        name: in the legend.
        path: of the line, as SVG has it; empty without one.
        marks: places of its points.
        texts: what each point says.
        style: class names of colour and stroke.
    """

    name: str
    path: str
    marks: list[tuple[float, float]]
    texts: list[str]
    style: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn.

    Args:
        title: of the figure.
        description: what is to be seen, for those who do not see it.
        x_label: with unit.
        y_label: with unit.
        series: with something to draw.
        x_ticks: along the bottom.
        y_ticks: along the left.
        diagonal: ends of the line on which both axes are equal, or None.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    series: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    diagonal: tuple[float, float, float, float] | None = None

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


@dataclass(frozen=True)
class Axis:
    """How values become places.

    Args:
        low: value at the start.
        high: value at the end.
        start: place of ``low``.
        end: place of ``high``.
        log: whether equal ratios are equally far apart.
        percent: whether ticks are shares.
        unit: of the values, with a prefix where they are large or small; None: plain numbers.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    percent: bool = False
    unit: str | None = None

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        a, b, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (v - a) / (b - a) * (self.end - self.start), 2)

    def ticks(self) -> list[Tick]:
        """Return ticks at round values."""
        values = _log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)
        return [Tick(self.place(v), self._text(v, values)) for v in values]

    def _text(self, value: float, values: Sequence[float]) -> str:
        if self.percent:
            step = abs(values[1] - values[0]) if len(values) > 1 else 0.1
            return f"{100 * value:.{0 if step >= 0.0099 else 1}f}{NBSP}%"
        return self.text(value).replace(f".0{NBSP}", NBSP)

    def text(self, value: float) -> str:
        """Return a value as it is told."""
        if self.percent:
            return share(value).text
        return f"{value:,.6g}" if self.unit is None else scaled(value, self.unit).text


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)) + 1)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, digits) for i in range(count)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [f * 10.0**p for p in powers for f in factors]
        inside = [v for v in found if low <= v * (1 + 1e-9) and v <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside
    return inside


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    description: str,
    log_x: bool = False,
    percent: bool = True,
    percent_x: bool = False,
    x_unit: str | None = None,
    full: bool = False,
) -> Chart | None:
    """Lay out series in a plane; None where there is no point to draw.

    Args:
        title: of the figure.
        series: drawn one over the other.
        x_label: with unit.
        y_label: with unit.
        description: for those who do not see the chart.
        log_x: equal ratios of x are equally far apart; all x are then positive.
        percent: y are shares.
        percent_x: x are shares.
        x_unit: of x, if these are written with prefixes.
        full: both axes go from 0 to 1, and the diagonal is drawn.
    """
    points = [p for s in series for p in s.points]
    if not points:
        return None
    x_range = (0.0, 1.0) if full else _reach([p[0] for p in points], log=log_x, pad=False)
    y_range = (0.0, 1.0) if full else _reach([p[1] for p in points], log=False, pad=True)
    if percent and not full:
        y_range = (max(y_range[0], 0.0), min(y_range[1], 1.0))
    x = Axis(*x_range, LEFT, WIDTH - RIGHT, log=log_x, percent=percent_x, unit=x_unit)
    y = Axis(*y_range, HEIGHT - BOTTOM, TOP, percent=percent)
    drawn = [_drawn(s, i, x, y) for i, s in enumerate(series) if s.points]
    ends = (x.place(0.0), y.place(0.0), x.place(1.0), y.place(1.0)) if full else None
    return Chart(title, description, x_label, y_label, drawn, x.ticks(), y.ticks(), ends)


def _drawn(series: Series, index: int, x: Axis, y: Axis) -> Drawn:
    marks = [(x.place(a), y.place(b)) for a, b in series.points]
    path = " ".join(f"{'L' if i else 'M'}{a:g} {b:g}" for i, (a, b) in enumerate(marks))
    colour = index if series.colour is None else series.colour
    style = f"c{colour % COLOURS} d{colour // COLOURS % DASHES}"
    texts = [f"{series.name}: {x.text(a)}, {y.text(b)}" for a, b in series.points]
    return Drawn(series.name, path if series.line and len(marks) > 1 else "", marks, texts, style)


def _reach(values: Sequence[float], *, log: bool, pad: bool) -> tuple[float, float]:
    """Return the ends of an axis around values."""
    low, high = min(values), max(values)
    if log:
        return (low / 1.6, high * 1.6)
    room = (high - low) * 0.08 if pad else 0.0
    if high == low:
        room = abs(high) * 0.1 or 1.0
    return low - room, high + room
