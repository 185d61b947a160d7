"""Live progress on standard error, and tables and JSON on standard output."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sdq.run_folder import RunFolder
from sdq.train import StepReport


def _progress(figures: str, quiet: bool) -> Progress:
    """Return bars with the time left, on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn(figures)
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet)


@contextlib.contextmanager
def stages(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show stages of some work as bars; what is given takes a stage, what is done, and of how many.

    Args:
        title: of the work.
        quiet: show nothing.
    """
    tasks: dict[str, TaskID] = {}
    with _progress("{task.completed}/{task.total}", quiet) as progress:

        def told(stage: str, done: int, count: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"{title} {stage}", total=count)
            progress.update(tasks[stage], completed=done)

        yield told


class Watch:
    """Shows steps as a bar with the time left, and writes each epoch to the run's log.

    Use as a context manager.
    """

    def __init__(self, run: RunFolder, *, quiet: bool) -> None:
        self.run = run
        self.progress = _progress("{task.percentage:>3.0f}% loss {task.fields[loss]:.4f}", quiet)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, report: StepReport) -> None:
        """Take a report of the training loop."""
        if report.phase not in self.tasks:
            self.tasks[report.phase] = self.progress.add_task(
                report.phase, total=report.epochs * report.steps, loss=report.loss
            )
        self.progress.update(
            self.tasks[report.phase],
            completed=report.epoch * report.steps + report.step,
            description=f"{report.phase} {report.epoch + 1}/{report.epochs}",
            loss=report.loss,
        )
        if report.end_of_epoch is not None:
            self.run.log(
                {
                    "phase": report.phase,
                    "epoch": report.epoch + 1,
                    "time": round(time.time(), 3),
                    **report.end_of_epoch,
                }
            )


def show_table(title: str, rows: Sequence[Mapping[str, object]], *, quiet: bool = False) -> None:
    """Print rows with the keys of the first as columns."""
    if quiet or not rows:
        return
    table = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    # a pipe or a file has no width; cutting names off would make it useless
    (console if console.is_terminal else Console(width=160)).print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def finite(document: Any) -> Any:
    """Return JSON values with None for what is NaN or infinite, which JSON cannot say."""
    if isinstance(document, Mapping):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def show_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    print(json.dumps(document, allow_nan=False), flush=True)
