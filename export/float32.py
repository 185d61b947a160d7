"""The comparison in float32: what differs, and whether rounding explains it.

That two outputs lie closer together than the runtimes differ explains nothing: it holds whenever
a decision differs, by arithmetic. A difference is explained by replaying it (:mod:`export.ties`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from export.format import Trace
from export.reference import Reference
from export.report import RuntimeStage
from export.ties import FEW_TIES, OUTPUT_TIE, TIE, TIE_SHARE, Explanation, explain

AGREEMENT = 0.998
"""Least share of equal decisions where a runtime's codes cannot be read: two in a thousand images
(or a single one of fewer) may fall on the other side of a boundary without anything being wrong."""


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
    tie_codes: int = 0
    tie_distance: float | None = None
    unexplained: dict[str, int] = field(default_factory=dict)
    exceptions: int = 0
    explained: int = 0
    largest: float = 0.0
    tail: float = 0.0
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
        gaps = (ours.output - output).abs().reshape(len(images), -1)
        self.differences.append(gaps.reshape(-1))
        flipped = self._count(ours, theirs) & readable
        exceptions = differing.any(dim=1)
        self.exceptions += int(exceptions.sum())
        for index in (exceptions & ~flipped).nonzero().reshape(-1).tolist():
            one = ours.output[index : index + 1]
            self.explained += near_tie(one, differing[index], self.largest)
        self._tail(gaps[~flipped])
        odd = flipped.nonzero().reshape(-1)
        for some in odd.split(8) if len(odd) else ():  # in float64, so few at a time
            mine, others = _of_images(ours, some), _of_images(theirs, some)
            found = explain(self.reference, images[some], mine, others)
            for index, explanation in zip(some.tolist(), found, strict=True):
                self._replayed(explanation, bool(exceptions[index]))
                self._tail((explanation.output - output[index : index + 1]).abs())

    def _replayed(self, found: Explanation, exception: bool) -> None:
        """Count an image whose codes differ."""
        self.ties += found.holds
        self.tie_codes += found.ties
        self.explained += found.holds and exception
        if found.first is not None:
            self.unexplained[found.first] = self.unexplained.get(found.first, 0) + 1
        if found.distance is not None:
            self.tie_distance = max(self.tie_distance or 0.0, found.distance)

    def _tail(self, gaps: Tensor) -> None:
        """Note how far outputs are from those that follow from the runtime's own codes."""
        if gaps.numel():
            self.tail = max(self.tail, float(gaps.max()))

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

    def stage(self, name: str) -> RuntimeStage:
        """Return what was counted for the runtime of this name."""
        step = self.reference.output_step()
        gaps, largest = torch.cat(self.differences), self.largest or 1.0
        differences = gaps / (step or 1.0)
        read = self.readable
        first = next((x for x in self.reference.names if self.different.get(x)), None)
        wrong = next((x for x in self.reference.names if x in self.unexplained), None)
        return RuntimeStage(
            name, self.equal / self.decisions,
            self.flipped / self.images if read else None,
            self.codes if read else 0, sum(self.different.values()) if read else 0,
            first if read else None, self.ties if read else 0, self.tie_codes if read else 0,
            self.tie_distance if read else None, wrong if read else None,
            self.tail / largest if read else None,
            float(differences.median()), float(differences.max()), float(gaps.max()) / largest,
            step, self.finite, self.images, self.exceptions, self.explained,
        )  # fmt: skip


def judge(stage: RuntimeStage) -> list[str]:
    """Return what is wrong with a runtime; empty if nothing is."""
    if not stage.finite:
        return [f"{stage.name}: outputs must be finite"]
    if stage.flipped is None or stage.tail is None:
        return _judge_decisions(stage)
    images = round(stage.flipped * stage.images)
    found = []
    if stage.unexplained_at is not None:
        found.append(
            f"{stage.name}: {images - stage.ties} of {stage.images} images have codes that do not "
            f"follow from ties, first at {stage.unexplained_at}, up to {stage.tie_distance:.2g} "
            f"codes from a rounding boundary; a tie is within {TIE:g}, or twice float32's error"
        )
    if stage.tie_codes > max(TIE_SHARE * stage.codes, FEW_TIES):
        found.append(
            f"{stage.name}: at most {TIE_SHARE:.2%} of the codes may be ties, got "
            f"{stage.tie_codes} of {stage.codes}: the runtime rounds by another rule"
        )
    if stage.tail > OUTPUT_TIE:
        found.append(
            f"{stage.name}: outputs must be within {OUTPUT_TIE:g} of what follows from the "
            f"runtime's codes, relative to the largest, got {stage.tail:.1e}"
        )
    return found


def _judge_decisions(stage: RuntimeStage) -> list[str]:
    """Judge a runtime that cannot be asked for its codes: nothing can be shown of exceptions."""
    unexplained = stage.exceptions - stage.explained
    if stage.agreement < AGREEMENT and (unexplained or stage.exceptions > 1):
        return [
            f"{stage.name}: its codes cannot be read, and at least {AGREEMENT:.1%} of the "
            f"decisions must agree, got {stage.agreement:.2%}"
        ]
    return []


def caution(stage: RuntimeStage) -> list[str]:
    """Return what must be said of a runtime with which nothing is wrong."""
    if stage.agreement < AGREEMENT and stage.exceptions > 1:
        return [
            f"{stage.name}: {stage.agreement:.2%} of the decisions agree; the runtime is right, "
            "but this network makes other decisions of single roundings"
        ]
    return []


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


def near_tie(output: Tensor, differing: Tensor, largest: float) -> bool:
    """Tell whether all those decisions of one image that differ stand on a boundary.

    Args:
        output: of the image ``(1, ...)``.
        differing: its decisions, flat.
        largest: output of any image.
    """
    if _by_sign(output):
        margins = output.abs()
    else:
        top = output.topk(2, dim=1).values
        margins = top[:, 0] - top[:, 1]
    return bool(margins.reshape(-1)[differing].max() <= OUTPUT_TIE * largest)


def _of_images(trace: Trace, indices: Tensor) -> dict[str, Tensor]:
    """Return the codes of some images, which may have several rows each."""
    count = len(trace.output)
    return {
        name: x.reshape(count, len(x) // count, *x.shape[1:])[indices].flatten(0, 1)
        for name, x in trace.codes.items()
    }
