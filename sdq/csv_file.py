"""CSV files as people keep them: UTF-8 with or without a mark, spaces around cells."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

from sdq.errors import RequestError


@contextlib.contextmanager
def open_lines(path: Path, errors: str = "strict") -> Iterator[Iterator[list[str]]]:
    """Open a CSV and give its lines that are not empty, each a list of cells.

    Args:
        path: of the file; cells of a ``.tab`` or ``.tsv`` are separated by tabs.
        errors: what is done with bytes that are no UTF-8, as of :func:`open`.

    Raises:
        RequestError: it cannot be read.
    """
    delimiter = "\t" if path.suffix in (".tab", ".tsv") else ","  # Dataverse gives tables as .tab
    try:
        with path.open(newline="", encoding="utf-8-sig", errors=errors) as stream:
            yield filter(None, csv.reader(stream, delimiter=delimiter))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path}: must be a CSV in UTF-8, got {error}; save it again") from error


def rows_under(header: list[str], lines: Iterator[list[str]]) -> Iterator[dict[str, str]]:
    """Yield lines as rows by column; a short line lacks the last columns."""
    for line in lines:
        yield dict(zip(header, map(str.strip, line), strict=False))


def lower_names(line: list[str]) -> list[str]:
    """Return the first line's cells as names of columns, in lower case."""
    return [cell.strip().lower() for cell in line]


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV one after another, by column in lower case.

    Raises:
        RequestError: it cannot be read.
    """
    with open_lines(path) as lines:
        yield from rows_under(lower_names(next(lines, [])), lines)
