"""A page: everything it says as values, and the HTML made of them.

The template escapes whatever it is given. The page has no script and refers to nothing outside
itself; its policy (``Content-Security-Policy``) forbids both to a browser, too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from sdq.report.charts import Chart
from sdq.report.classes import ClassRow
from sdq.report.intervals import Interval
from sdq.report.layers import LayerRow
from sdq.report.overlays import Overlays
from sdq.report.tables import NBSP, Table, signed
from sdq.report.thumbnails import Changed
from sdq.report.verdict import Verdict

MOST_CLASSES = 30
"""Up to which confusion matrices are shown whole."""


@dataclass(frozen=True)
class Confusion:
    """How many images of each class were taken for which.

    Args:
        title: whose answers.
        names: of the classes, in the order of rows and columns.
        counts: a row for each true class.
    """

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Page:
    """What a report says; what is empty is left out.

    Args:
        title: of the page.
        paragraphs: what was done, in plain words.
        verdict: what came of it.
        tables: networks or methods beside each other.
        charts: below them.
        classes: the rare ones first.
        quantized: whether the classes are compared before and after.
        confusions: of each network.
        reliability: how far confidence can be believed.
        changed: images with another answer.
        changed_count: how many there are in all.
        overlays: images with outlines, of networks that give maps.
        layers: first to last.
        course: of the search.
        details: tables that few will read.
        exports: files for other runtimes.
        command: that repeats the run.
        setting: what the run was made of.
        missing: what is not on the page, and why.
    """

    title: str
    paragraphs: Sequence[str]
    verdict: Verdict
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    classes: Sequence[ClassRow] = ()
    quantized: bool = False
    confusions: Sequence[Confusion] = ()
    reliability: Chart | None = None
    changed: Sequence[Changed] = ()
    changed_count: int = 0
    overlays: Overlays | None = None
    layers: Sequence[LayerRow] = ()
    course: Sequence[Chart] = ()
    details: Sequence[Table] = ()
    exports: Table | None = None
    command: str | None = None
    setting: Table | None = None
    missing: Sequence[str] = ()


def render(page: Page) -> str:
    """Return the page as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "bar": _bar, "shade": _shade, "signed": signed}
    return environment.get_template("page.html.j2").render(page=page)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{NBSP}%"


def _bar(interval: Interval) -> dict[str, float]:
    """Return left end and width of an interval in percent of a bar."""
    return {"x": 100 * interval.low, "width": max(100 * (interval.high - interval.low), 0.5)}


def _shade(count: int, row: Sequence[int]) -> int:
    """Return which of the shades 0 to 5 a cell of a row of counts has."""
    return -(-5 * count // max(sum(row), 1))


def encoded(html: str) -> bytes:
    """Return a page's bytes; a path that the locale could not decode keeps its own.

    JSON can have halves of characters that no encoding has: a question mark stands for them.
    """
    whole = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", html)
    return whole.encode(errors="surrogateescape")
