"""What a shell offers for an option: the names of plugins, or those and files."""

from collections.abc import Callable
from pathlib import Path

from sdq import plugins

Offer = Callable[[str], list[str]]
"""From what is typed so far to what it may become."""


def of(package: str, *, dashes: bool = False) -> Offer:
    """Return an offer of a package's plugins, and of files where a path is being typed.

    Args:
        package: whose plugins are named.
        dashes: they are written ``like-this``.
    """

    def offer(incomplete: str) -> list[str]:
        names = plugins.names(package)
        shown = [name.replace("_", "-") for name in names] if dashes else names
        return [n for n in shown if n.startswith(incomplete)] or files(incomplete)

    return offer


def several(package: str, *, dashes: bool = False) -> Offer:
    """Return an offer for names separated by commas: of the last one, no name twice."""
    single = of(package, dashes=dashes)

    def offer(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + n for n in single(last) if n not in before.split(",")]

    return offer


def words(*known: str) -> Offer:
    """Return an offer of these words."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def files(incomplete: str) -> list[str]:
    """Return the files and folders that a path may become, folders with a slash."""
    place = Path(incomplete).parent if incomplete and not incomplete.endswith("/") else incomplete
    try:
        found = sorted(Path(place).iterdir())
    except OSError:
        return []
    shown = [f"{path}/" if path.is_dir() else str(path) for path in found]
    return [path for path in shown if path.startswith(incomplete)]
