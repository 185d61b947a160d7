"""Whether a device's numbers can be those of a device: a user's file may say anything."""

from collections.abc import Collection, Mapping
from typing import TypeGuard

from sdq.errors import RequestError, nearest

MOST = 1e30
"""More than any device has of anything."""


def check_positive(device: str, **numbers: object) -> None:
    """Raise RequestError unless all are numbers above 0."""
    for name, value in numbers.items():
        if not _number(value) or not 0 < value < MOST:
            raise _refusal(device, name, "a number above 0", value)


def check_counts(device: str, least: int = 1, **numbers: object) -> None:
    """Raise RequestError unless all are whole numbers, of at least ``least``."""
    for name, value in numbers.items():
        if not _number(value) or not least <= value < MOST or value != int(value):
            raise _refusal(device, name, f"a whole number of at least {least}", value)


def check_widths(device: str, **widths: object) -> None:
    """Raise RequestError unless all are collections of bitwidths, 1 to 32."""
    for name, value in widths.items():
        if not isinstance(value, Collection) or isinstance(value, str | bytes):
            raise _refusal(device, name, "a tuple of bitwidths", value)
        for bits in value:
            if type(bits) is not int or not 1 <= bits <= 32:
                raise _refusal(device, name, "of bitwidths from 1 to 32", bits)


def check_mapping(device: str, name: str, value: object) -> None:
    """Raise RequestError unless it is a mapping."""
    if not isinstance(value, Mapping):
        raise _refusal(device, name, "a dictionary", value)


def check_amount(device: str, name: str, value: object) -> None:
    """Raise RequestError unless it is the name of something and how much of it there is."""
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
        raise _refusal(device, name, "a pair of a name and a number", value)
    check_positive(device, **{f"{name} {value[0]}": value[1]})


def check_name(device: str, name: str, value: object, known: Collection[str]) -> None:
    """Raise RequestError unless it is one of the known names."""
    if value not in known:
        raise RequestError(
            f"{device}: {name} must be one of {', '.join(known)}, got {value!r:.100}; "
            f"{nearest(str(value)[:100], known)}"
        )


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refusal(device: str, name: str, rule: str, value: object) -> RequestError:
    return RequestError(
        f"{device}: {name} must be {rule}, got {value!r:.100}; see docs/how-to/own-device.md"
    )
