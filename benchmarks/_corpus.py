"""Sound files of every kind that is read, and what reads each of them."""

import importlib.util
from collections.abc import Collection
from pathlib import Path

import _corpus_images as images
import _corpus_runs as runs

WRITERS = images.WRITERS | runs.WRITERS
READERS = images.READERS | runs.READERS


def write(home: Path, folders: Collection[str]) -> None:
    """Write these folders of sound files."""
    for name in folders:
        top = name.partition("/")[0]
        (home / top).mkdir()
        WRITERS[top](home / top)


def available() -> list[str]:
    """Return the readers whose packages are installed."""
    return [name for name, x in READERS.items() if importlib.util.find_spec(x.needs) is not None]
