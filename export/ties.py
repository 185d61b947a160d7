"""Whether what differs in float32 follows from ties of rounding: a proof by replay.

One code that falls to the other side of a rounding boundary changes every sum it enters, and
behind what mixes a whole map (group normalisation, a global average, attention) every code of the
map. That something began with a tie therefore says little of what came after. So the network is run
once more in float64 with every activation quantizer giving the *runtime's* codes, and each code of
the runtime must be what float64 gives from the runtime's codes before it, or stand on a boundary.

How near a boundary is near enough follows from float32 itself: where some code lies further away
than is usual, the replay is repeated in float32, and what that is off by from float64 is the noise
of the quantizer's inputs in the image.

By induction over the quantizers this is a run in float64 in which the ties, and nothing else, were
forced to the runtime's side: up to the first tie it is the network itself, and from each tie on its
codes are the runtime's. One pass does for any number of ties in a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from export.reference import Reference, Replay

TIE = 1e-3
"""How near a rounding boundary, in codes, a float32 sum can no longer tell the sides apart: sums
of a few thousand terms of up to 255 codes err by some 1e-4 (24 bits of mantissa, the square root
of the number of terms), and batch normalisation may enlarge that."""


WIDEST_TIE = 1e-2
"""Where float32 is measured to be worse, twice its error is a tie, but never more than this. It is
worse behind normalisation of sums whose mean is many times their spread."""

OUTPUT_TIE = 1e-5
"""The same for outputs, relative to the largest: float32's 6e-8 times some hundred roundings in
the last layer's sum."""

TIE_SHARE = 1e-4
"""Most codes that may be ties. About 2 :data:`TIE` of all codes lie that near a boundary, and of
these float32 moves some thousandths. A runtime that moves more, though each by a tie, has another
rule: it rounds halves up, say, where sums are short enough for halves to be frequent."""

FEW_TIES = 10
"""So many are allowed of any number of codes."""


@dataclass(frozen=True)
class Explanation:
    """What a replay showed of one image.

    Args:
        ties: codes that fell to the other side of a boundary near them.
        distance: of the code that is furthest from the boundary it crossed; None if none crossed.
        first: the first activation quantizer with a code that is no tie; None if all codes are
            float64's but for ties.
        output: of the network in float64 from these codes ``(1, ...)``.
    """

    ties: int
    distance: float | None
    first: str | None
    output: Tensor

    @property
    def holds(self) -> bool:
        """Whether ties explain all codes."""
        return self.first is None


def explain(
    reference: Reference, images: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> list[Explanation]:
    """Replay a runtime's codes.

    Two things are asked. Every code of the runtime must be float64's, computed from the runtime's
    codes before it, but for ties. And where the two runs first differ they had the same codes
    before, so that PyTorch must stand on a boundary there, too.

    Args:
        reference: the network.
        images: normalised float images ``(N, C, H, W)``; in float64, so few at a time.
        ours: PyTorch's codes in float32, by quantizer.
        theirs: the runtime's. A quantizer that it no longer has gives float64's codes.

    Returns:
        One for each image.
    """
    exact = reference.replay(images, theirs)
    found = _compare(reference.bits, exact, ours, theirs, None)
    if all(image.holds for image in found):
        return found
    single = reference.replay(images, exact.codes | theirs, single=True)
    return _compare(reference.bits, exact, ours, theirs, single)


def _compare(
    bits: dict[str, int],
    exact: Replay,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    single: Replay | None,
) -> list[Explanation]:
    """Compare codes with a replay, with another in float32 for what is a tie."""
    count = len(exact.output)
    ties, far = torch.zeros(2, count, dtype=torch.float64)
    same = torch.ones(count, dtype=torch.bool)
    first: list[str | None] = [None] * count
    given = exact.codes | theirs
    for name, width in bits.items():
        value, mine, rounded, codes = (
            x[name].reshape(count, -1)  # an image may have several rows
            for x in (exact.before, ours, exact.codes, given)
        )
        other = boundary_distance(value, mine, codes, width)
        other[~same] = 0  # after the first that differ, theirs follow from others than ours
        same &= ~other.any(dim=1)
        distance = torch.maximum(other, boundary_distance(value, rounded, codes, width))
        near = torch.full((count, 1), TIE, dtype=torch.float64)
        if single is not None:
            noise = _noise(value, rounded, single.before[name].reshape(count, -1), width)
            near = (2 * noise).clamp(TIE, WIDEST_TIE)
        # wide codes are that much nearer to each other, so that ties are as much more frequent
        ties += ((distance > 0) & (distance <= near)).sum(dim=1) / _unit(width)
        far = torch.maximum(far, distance.amax(dim=1))
        for index in (~(distance <= near)).any(dim=1).nonzero().reshape(-1).tolist():  # NaN, too
            first[index] = first[index] or name
    return [
        Explanation(
            math.ceil(ties[i]), float(far[i]) if far[i] else None, first[i], exact.output[i : i + 1]
        )
        for i in range(count)
    ]


def _noise(value: Tensor, codes: Tensor, single: Tensor, width: int) -> Tensor:
    """Return how far float32 is off from float64 at most, by image ``(N, 1)``, in codes.

    Values beyond the lowest and the highest code do not count: theirs have no boundary near.
    """
    inside = (codes > codes.min()) & (codes < codes.max())
    error = torch.where(inside, (single.double() - value).abs(), 0.0)
    return error.amax(dim=1, keepdim=True).nan_to_num() / _unit(width)


def boundary_distance(value: Tensor, one: Tensor, other: Tensor, width: int) -> Tensor:
    """Return how far from a rounding boundary values are whose codes differ; 0 where they do not.

    Args:
        value: what was rounded, over the scale, in float64.
        one: its code in one run.
        other: its code in another. A code that moved by more than one counts its whole way.
        width: bits of the quantizer. Of wider codes than 8 bits the distance is that in 8 of them.
    """
    low, high = torch.minimum(one, other).double(), torch.maximum(one, other).double()
    # between neighbours there is one boundary, and it is nearest to both
    far = torch.maximum((value - low - 0.5).abs(), (value - high + 0.5).abs())
    # a value on the boundary itself has moved, too
    moved = (far / _unit(width)).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(one != other, moved, 0.0)


def _unit(width: int) -> int:
    """Return what codes are counted in: float32 errs in proportion to the largest of them."""
    return int(2 ** max(width - 8, 0))
