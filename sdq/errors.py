"""The two ways a run can end badly, and the sentence every message follows.

A message reads ``{where}: {what} must be {rule}, got {value!r}; {repair}``, so that it names the
place, the rule that was broken, what came instead, and what to do.
"""

import difflib
from collections.abc import Iterable
from typing import Protocol, TypeVar


class RequestError(ValueError):
    """The request is wrong: the caller can mend it. The command line exits with code 2."""


class RunError(RuntimeError):
    """The request was sound but the run failed. The command line exits with code 1."""


class Named(Protocol):
    """What goes by a name."""

    @property
    def name(self) -> str:
        """The name."""


NamedT = TypeVar("NamedT", bound=Named)


def named(name: str, items: Iterable[NamedT], otherwise: str) -> NamedT:
    """Return the item of this name, or raise RequestError.

    Args:
        name: that is looked for.
        items: to look in.
        otherwise: the error, to which the nearest name is added.
    """
    items = list(items)
    for item in items:
        if item.name == name:
            return item
    raise RequestError(f"{otherwise}; {nearest(name, [item.name for item in items])}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the nearest known name, or the list of all of them.

    >>> nearest("resnet02", ["mlp", "resnet20"])
    "did you mean 'resnet20'? Known: mlp, resnet20"
    """
    known = sorted(known)
    listed = "Known: " + (", ".join(known) or "none")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? {listed}" if close else listed
