"""Intervals around shares of images: what a number of images can show, and what it cannot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(right: int, images: int, level: float = 0.95) -> Interval:
    """Return the score interval of a share of ``images``; 0 to 1 without any.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22, 1927.

    >>> found = wilson(1, 10)
    >>> round(found.low, 4), round(found.high, 4)
    (0.0179, 0.4042)
    """
    if not images:
        return Interval(0.0, 1.0)
    z = _z(level)
    share, spread = right / images, z * z / images
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    # at the ends the bound is the share itself, but for rounding
    low = 0.0 if right == 0 else (centre - half) / (1 + spread)
    high = 1.0 if right == images else (centre + half) / (1 + spread)
    return Interval(low, high)


@dataclass(frozen=True)
class Paired:
    """How often two networks are right on the same images.

    Args:
        both: images that both get right.
        first: that only the first gets right.
        second: that only the second gets right.
        neither: that none gets right.
    """

    both: int
    first: int
    second: int
    neither: int

    @property
    def images(self) -> int:
        """How many there are."""
        return self.both + self.first + self.second + self.neither

    @property
    def loss(self) -> float:
        """The share of right answers of the first less that of the second."""
        return (self.first - self.second) / self.images if self.images else 0.0

    def interval(self, level: float = 0.95) -> Interval:
        """Return the interval of the loss; -1 to 1 without images.

        Source: Newcombe, "Improved confidence intervals for the difference between binomial
        proportions based on paired data", Statistics in Medicine 17, 1998, method 10.
        """
        n = self.images
        if not n:
            return Interval(-1.0, 1.0)
        of_first, of_second = self.both + self.first, self.both + self.second
        one, two = wilson(of_first, n, level), wilson(of_second, n, level)
        p, q = of_first / n, of_second / n
        phi = self._phi()
        below = _combined(p - one.low, two.high - q, phi)
        above = _combined(one.high - p, q - two.low, phi)
        return Interval(self.loss - below, self.loss + above)

    def _phi(self) -> float:
        """Return the correlation of the two, corrected for continuity."""
        n, (a, b, c, d) = self.images, (self.both, self.first, self.second, self.neither)
        product = (a + b) * (c + d) * (a + c) * (b + d)
        if not product:
            return 0.0
        lead = a * d - b * c
        corrected = max(lead - n / 2, 0.0) if lead > 0 else float(lead)
        return corrected / math.sqrt(product)


def mean_loss(pairs: Sequence[Paired], level: float = 0.95) -> tuple[float, Interval]:
    """Return the mean of the losses of several classes, every class counted alike.

    The intervals of the classes are put together by their squares, each side by itself (MOVER).

    Args:
        pairs: of the classes, each with images.
        level: of the interval.

    Source: Zou and Donner, "Construction of confidence limits about effect measures: a general
    approach", Statistics in Medicine 27, 2008, equation 2.
    """
    count = len(pairs)
    mean = sum(p.loss for p in pairs) / count
    each = [(p.loss, p.interval(level)) for p in pairs]
    below = math.sqrt(sum((loss - found.low) ** 2 for loss, found in each)) / count
    above = math.sqrt(sum((found.high - loss) ** 2 for loss, found in each)) / count
    return mean, Interval(mean - below, mean + above)


def _combined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
