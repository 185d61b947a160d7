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
    readable: bool = True
    finite: bool = True
    exceptions: int = 0
    explained: int = 0
    tie_distance: float | None = None
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
        self.readable &= readable
        self.equal += int(same.sum())
        self.decisions += same.numel()
        self.images += len(images)
        self.finite &= bool(torch.isfinite(output).all())
        self.differences.append((ours.output - output).abs().reshape(-1))
        self.flipped += int(_flipped(ours, theirs).sum())
        for index in (~same.all(dim=1)).nonzero().reshape(-1).tolist():
            codes = _of_image(ours, index)
            others = _of_image(theirs, index) if readable else codes
            self._explain(images[index : index + 1], codes, others)

    def _explain(self, image: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        self.exceptions += 1
        output, before = self.reference.replay(image, ours)
        distance = first_flip_distance(self.reference.bits, ours, theirs, before)
        if distance is not None:
            self.explained += distance <= TIE
            self.tie_distance = max(self.tie_distance or 0.0, distance)
        elif output.dim() > 1 and output.shape[1] > 1:
            top = output.topk(2, dim=1).values
            self.explained += bool((top[:, 0] - top[:, 1]).min() <= OUTPUT_TIE * output.abs().max())
        else:
            self.explained += bool(output.abs().min() <= OUTPUT_TIE * output.abs().max())

    def stage(self, name: str) -> RuntimeStage:
        """Return what was counted for the runtime of this name."""
        step = self.reference.output_step()
        differences = torch.cat(self.differences) / (step or 1.0)
        return RuntimeStage(
            name, self.equal / self.decisions,
            self.flipped / self.images if self.readable else None,
            float(differences.median()), float(differences.max()), step, self.finite,
            self.exceptions, self.explained, self.tie_distance,
        )  # fmt: skip


def decisions(output: Tensor) -> Tensor:
    """Return the class of each image (or pixel): the largest output, or the sign of a single one.

    Args:
        output: ``(N, K)`` or ``(N, K, H, W)``.
    """
    if output.dim() < 2 or output.shape[1] == 1:
        return output > 0
    return output.argmax(dim=1)


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


def _of_image(trace: Trace, index: int) -> dict[str, Tensor]:
    """Return the codes of one image, also where it has several rows (windows, say)."""
    found = {}
    for name, codes in trace.codes.items():
        rows = len(codes) // len(trace.output)
        found[name] = codes[index * rows : (index + 1) * rows]
    return found


def _flipped(ours: Trace, theirs: Trace) -> Tensor:
    """Return for each image ``(N,)`` whether it has a code that differs."""
    count = len(ours.output)
    flipped = torch.zeros(count, dtype=torch.bool)
    for name, codes in theirs.codes.items():
        flipped |= (ours.codes[name] != codes).reshape(count, -1).any(dim=1)
    return flipped
