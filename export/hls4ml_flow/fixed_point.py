"""Fixed-point numbers: types that hold given values, and constants short enough for hardware.

Behind a sum of integers stand a factor and an offset (a scale, a bias, a batch normalisation) and a
quantizer. The sum has finitely many values, so the quantizer's steps cut them at finitely many
places. Any other factor and offset that cut them at the same places compute the same codes: among
those, :func:`same_codes` takes ones with few bits.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray


class TooFine(ArithmeticError):
    """No constants that hardware can hold keep all codes."""


TINY = 2.0**-100
"""Stands for the largest of constants that are all zero."""
MOST_BITS = 52
"""Of a constant: a double still holds it."""
SLACK, ROUNDING = 1e-9, 1e-14
"""How near a border, in steps of the sum, float64 can no longer tell the sides apart: absolute, and
relative to the number of steps."""


@dataclass(frozen=True)
class FixedType:
    """A type of the HLS libraries: ``ap_fixed`` or ``ap_ufixed``.

    Args:
        width: bits in all.
        integer: bits left of the point, the sign among them; may be negative or above the width.
        signed: two's complement, or not.
        saturating: rounds half to even and saturates, as quantizers do; else it cuts and wraps.
    """

    width: int
    integer: int
    signed: bool
    saturating: bool = False

    def __str__(self) -> str:
        modes = ",AP_RND_CONV,AP_SAT" if self.saturating else ""
        return f"ap_{'' if self.signed else 'u'}fixed<{self.width},{self.integer}{modes}>"

    @property
    def step(self) -> float:
        """The difference of neighbouring values."""
        return 2.0 ** (self.integer - self.width)

    def quantizer(self) -> "FixedType":
        """Return the same values with rounding and saturation."""
        return replace(self, saturating=True)


def holding(low: float, high: float, step: float) -> FixedType:
    """Return the shortest type with all multiples of a power of two from ``low`` to ``high``.

    >>> str(holding(-1.0, 0.75, 0.25)), str(holding(0, 15, 1)), str(holding(-8, 8, 8))
    ('ap_fixed<3,1>', 'ap_ufixed<4,4>', 'ap_fixed<2,5>')
    """
    exponent = _exponent(step)
    least, most = math.floor(low / step), math.ceil(high / step)
    signed = least < 0
    bits = max(most.bit_length(), (-least - 1).bit_length() if signed else 0) + signed
    bits = max(bits, 1 + signed)
    return FixedType(bits, bits + exponent, signed)


def step_of(values: Array) -> float:
    """Return the largest power of two whose multiples all the values are; 1 if all are zero."""
    mantissas, exponents = np.frexp(np.asarray(values, np.float64).reshape(-1))
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    used = whole != 0
    if not used.any():
        return 1.0
    lowest = whole[used] & -whole[used]
    powers = np.log2(lowest.astype(np.float64)).astype(np.int64) + exponents[used] - 53
    return math.ldexp(1.0, int(powers.min()))


def power_of_two(value: float) -> bool:
    """Tell whether a number is a power of two."""
    return value > 0 and math.frexp(value)[0] == 0.5


def borders(low: int, high: int, scale: float) -> Array:
    """Return where rounding to the codes from ``low`` to ``high`` changes sides, ascending."""
    return (np.arange(low, high) + 0.5) * scale


@dataclass(frozen=True, eq=False)
class Sums:
    """The values that each output channel's sum can have.

    Args:
        least: ``(K,)``.
        most: ``(K,)``.
        step: they are multiples of this power of two.
    """

    least: Array
    most: Array
    step: float


def same_codes(factor: Array, offset: Array, sums: Sums, borders: Array) -> tuple[Array, Array]:
    """Return a short factor and offset with which every sum falls between the same two borders.

    The condition is exact: it is checked for the sums next to every border, of every channel. A
    sum that fell on a border (within 1e-9 of the sums' own step) still falls on it.

    Args:
        factor: of each output channel ``(K,)``; where all are 1 they stay 1.
        offset: likewise ``(K,)``.
        sums: that are multiplied.
        borders: of the quantizer behind, see :func:`borders`.

    Raises:
        TooFine: no factor of at most 52 bits will do.
    """
    cuts = _Cuts.of(factor, offset, sums, borders)
    if bool((factor == 1).all()):
        found = cuts.offsets(factor)
        if found is not None:
            return factor, found
    top = math.frexp(float(np.abs(factor).max()) or 1.0)[1]
    for bits in range(1, MOST_BITS):
        unit = math.ldexp(1.0, top - bits)
        short = np.rint(factor / unit) * unit
        found = cuts.offsets(short) if (np.sign(short) == np.sign(factor)).all() else None
        if found is not None:
            return short, found
    raise TooFine(f"no factor of {MOST_BITS} bits keeps all codes")


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Where borders cut the sums: arrays ``(K, T)`` of sums, the nearest on either side."""

    offset: Array
    borders: Array
    under: Array
    over: Array
    tied: Array

    @classmethod
    def of(cls, factor: Array, offset: Array, sums: Sums, borders: Array) -> "_Cuts":
        """Find them; NaN where no sum is on that side, or none on the border."""
        first, last = (np.rint(x / sums.step)[:, None] for x in (sums.least, sums.most))
        distance = borders[None] - offset[:, None]
        moving = np.where(factor == 0, 1.0, factor)[:, None]
        place = distance / (moving * sums.step)
        # a constant channel is all on one side; only its sign is asked for
        place = np.where(factor[:, None] == 0, np.copysign(math.inf, distance), place)
        nearest = np.rint(np.nan_to_num(place, posinf=0, neginf=0))
        tie = np.abs(place - nearest) <= SLACK + ROUNDING * np.abs(nearest)
        before = np.where(tie, nearest - 1, np.ceil(place) - 1)
        after = np.where(tie, nearest + 1, np.floor(place) + 1)
        before = np.where(before >= first, np.minimum(before, last), math.nan) * sums.step
        after = np.where(after <= last, np.maximum(after, first), math.nan) * sums.step
        on = np.where(tie & (nearest >= first) & (nearest <= last), nearest, math.nan)
        rising = (factor >= 0)[:, None]
        return cls(
            offset, borders, np.where(rising, before, after), np.where(rising, after, before),
            on * sums.step,
        )  # fmt: skip

    def offsets(self, factor: Array) -> Array | None:
        """Return offsets ``(K,)`` that keep every sum on its side, with few bits; or None."""
        upper = self._limits(factor, self.under, math.inf).min(1)
        lower = self._limits(factor, self.over, -math.inf).max(1)
        on = self._limits(factor, self.tied, math.nan)
        equal = np.array(
            [row[~np.isnan(row)][0] if (~np.isnan(row)).any() else math.nan for row in on]
        )
        free = np.isnan(equal)
        same = np.isnan(on) | (on == equal[:, None])
        fits = free | ((lower < equal) & (equal < upper))
        if not (same.all() and fits.all() and (lower < upper).all()):
            return None
        return self._short(lower, upper, equal)

    def _limits(self, factor: Array, sums: Array, none: float) -> Array:
        limits = self.borders[None] - factor[:, None] * sums
        return np.where(np.isnan(sums), none, limits)

    def _short(self, lower: Array, upper: Array, equal: Array) -> Array | None:
        room = float((upper - lower).min())
        unit = math.ldexp(1.0, math.frexp(min(room, 1e9))[1])
        for _ in range(MOST_BITS):
            inside = np.clip(self.offset, lower, upper)
            found = np.rint(inside / unit) * unit
            found = np.where(found <= lower, found + unit, found)
            found = np.where(found >= upper, found - unit, found)
            found = np.where(np.isnan(equal), found, equal)
            if ((lower < found) & (found < upper)).all():
                return found
            unit /= 2
        return None


def _exponent(step: float) -> int:
    mantissa, exponent = math.frexp(step)
    assert mantissa == 0.5, step
    return exponent - 1
