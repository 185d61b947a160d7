"""The comparison in float32: which decisions differ, and whether rounding explains them.

That two outputs lie closer together than the runtimes differ explains nothing: it holds whenever
a decision differs, by arithmetic. An exception is explained by where it began.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from export.format import Trace
from export.reference import Reference
from export.report import RuntimeStage

TIE = 1e-3
"""How near a rounding boundary, in codes, a float32 sum can no longer tell the sides apart: sums
of a few thousand terms of up to 255 codes err by some 1e-4 (24 bits of mantissa, the square root
of the number of terms), and batch normalisation may enlarge that."""

OUTPUT_TIE = 1e-5
"""The same for two outputs, relative to the largest: float32's 6e-8 times some hundred roundings
in the last layer's sum."""


@dataclass
class Tally:
    """What the comparison of one runtime with PyTorch has seen so far."""

    reference: Reference
    equal: int = 0
    decisions: int = 0
    images: int = 0
    flipped: int = 0
    codes: int = 0
    different: dict[str, int] = field(default_factory=dict)
    readable: bool = True
    finite: bool = True
    ties: int = 0
    exceptions: int = 0
    explained: int = 0
    tie_distance: float | None = None
    largest: float = 0.0
    differences: list[Tensor] = field(default_factory=list)

    def add(self, images: Tensor, ours: Trace, output: Tensor, theirs: Trace) -> None:
        """Count a batch.

        Args:
            images: normalised float images ``(N, C, H, W)``.
            ours: PyTorch's trace.
            output: of the file as it is.
            theirs: the runtime's trace. Reading the codes may keep a runtime from fusing; if its
                output is not ``output``, its codes prove nothing and are not used.
        """
        readable = bool(theirs.codes) and torch.equal(output, theirs.output)
        same = (decisions(ours.output) == decisions(output)).reshape(len(images), -1)
        differing = ~same
        self.readable &= readable
        self.equal += int(same.sum())
        self.decisions += same.numel()
        self.images += len(images)
        self.finite &= bool(torch.isfinite(output).all())
        self.largest = max(self.largest, float(ours.output.abs().max()))
        self.differences.append((ours.output - output).abs().reshape(-1))
        flipped = self._count(ours, theirs)
        exceptions = differing.any(dim=1)
        odd = (exceptions | (flipped & readable)).nonzero().reshape(-1)
        for some in odd.split(8) if len(odd) else ():  # in float64, so few at a time
            mine = _of_images(ours, some)
            others = _of_images(theirs, some) if readable else mine
            self._explain(images[some], mine, others, differing[some])

    def _count(self, ours: Trace, theirs: Trace) -> Tensor:
        """Count codes that differ, by quantizer; return ``(N,)``: the images that have one."""
        flipped = torch.zeros(len(ours.output), dtype=torch.bool)
        for name, codes in theirs.codes.items():
            moved = ours.codes[name] != codes
            self.codes += moved.numel()
            self.different[name] = self.different.get(name, 0) + int(moved.sum())
            flipped |= moved.reshape(len(flipped), -1).any(dim=1)
        self.flipped += int(flipped.sum())
        return flipped

    def _explain(
        self,
        images: Tensor,
        ours: dict[str, Tensor],
        theirs: dict[str, Tensor],
        differing: Tensor,
    ) -> None:
        """Find what the differences of images began with; ``differing`` are their decisions."""
        output, before = self.reference.replay(images, ours)
        for index, exception in enumerate(differing.any(dim=1).tolist()):
            one = torch.tensor([index])
            mine, other, values = (_rows(x, len(images), one) for x in (ours, theirs, before))
            distance = first_flip_distance(self.reference.bits, mine, other, values)
            if distance is not None:
                tie = distance <= TIE
                self.ties += tie
                if exception:
                    self.tie_distance = max(self.tie_distance or 0.0, distance)
            else:
                tie = near_tie(output[one], differing[index])
            if exception:
                self.exceptions += 1
                self.explained += tie

    def stage(self, name: str) -> RuntimeStage:
        """Return what was counted for the runtime of this name."""
        step = self.reference.output_step()
        gaps = torch.cat(self.differences)
        differences = gaps / (step or 1.0)
        first = next((x for x in self.reference.names if self.different.get(x)), None)
        return RuntimeStage(
            name, self.equal / self.decisions,
            self.flipped / self.images if self.readable else None,
            self.codes if self.readable else 0,
            sum(self.different.values()) if self.readable else 0,
            first if self.readable else None,
            self.ties if self.readable else 0,
            float(differences.median()), float(differences.max()),
            float(gaps.max()) / (self.largest or 1.0), step, self.finite,
            self.exceptions, self.explained, self.tie_distance,
        )  # fmt: skip


def decisions(output: Tensor) -> Tensor:
    """Return the class of each image: the largest output, or the sign of a single one.

    Of maps, each of which has a sigmoid of its own, the sign at every pixel of every map.

    Args:
        output: ``(N, K)`` or ``(N, K, H, W)``.
    """
    if _by_sign(output):
        return output > 0
    return output.argmax(dim=1)


def _by_sign(output: Tensor) -> bool:
    return output.dim() in (1, 4) or output.shape[1] == 1


def first_flip_distance(
    bits: Mapping[str, int],
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    before: dict[str, Tensor],
) -> float | None:
    """Return how far from a rounding boundary the first codes that flipped were, in codes.

    Up to the first quantizer (in execution order) whose codes differ, both runs had the same
    codes; so its exact input, computed in float64 from those, must lie on a boundary between two
    codes, or something else than rounding is at work.

    Args:
        bits: of the quantizers by name, in execution order.
        ours: PyTorch's codes.
        theirs: the runtime's codes.
        before: PyTorch's inputs over scale, in float64.

    Returns:
        The largest distance among the codes that flipped there, in codes; a code that moved by
        more than one counts its whole way. Float32 errs in proportion to the largest code, so of
        wider codes than 8 bits it is that in 8 of their bits. None if no code differs.
    """
    for name, width in bits.items():
        if name not in theirs:  # the runtime no longer has it
            continue
        moved = ours[name] != theirs[name]
        if moved.any():
            low = torch.minimum(ours[name], theirs[name])[moved].double()
            high = torch.maximum(ours[name], theirs[name])[moved].double()
            value = before[name][moved]
            # between neighbours there is one boundary, and it is nearest to both
            far = torch.maximum((value - low - 0.5).abs(), (value - high + 0.5).abs()).max()
            return float(far) / 2 ** max(width - 8, 0)
    return None


def near_tie(output: Tensor, differing: Tensor) -> bool:
    """Tell whether all those decisions of one image that differ stand on a boundary."""
    if _by_sign(output):
        margins = output.abs()
    else:
        top = output.topk(2, dim=1).values
        margins = top[:, 0] - top[:, 1]
    return bool(margins.reshape(-1)[differing].max() <= OUTPUT_TIE * output.abs().max())


def _of_images(trace: Trace, indices: Tensor) -> dict[str, Tensor]:
    return _rows(trace.codes, len(trace.output), indices)


def _rows(tensors: Mapping[str, Tensor], count: int, indices: Tensor) -> dict[str, Tensor]:
    """Return what belongs to some of ``count`` images, which may have several rows each."""
    return {
        name: x.reshape(count, len(x) // count, *x.shape[1:])[indices].flatten(0, 1)
        for name, x in tensors.items()
    }
