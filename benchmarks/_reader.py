"""What reads files, and which: the form of an entry of the corpus."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """What reads files, and which.

    Args:
        read: is given the folder; a RequestError or a RunError is a good answer to damage.
        folder: of the sound files, below the corpus.
        files: those that are damaged.
        needs: a package that may be absent.
        writes: whether the reader may write into its folder.
    """

    read: Callable[[Path], object]
    folder: str
    files: tuple[str, ...]
    needs: str = "torch"
    writes: bool = False
