"""What a verification found: plain values, one line a stage, JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExactStage:
    """The file against PyTorch, both in float64.

    Args:
        codes: integer codes compared: of all weights, and of every activation quantizer for every
            image.
        different: how many of them differ.
        first_difference: the layer or activation quantizer where the file first differs, in
            execution order, in bits, codes or scale; None if it does not.
        output_difference: largest difference of the outputs, relative to the largest output.
    """

    codes: int
    different: int
    first_difference: str | None
    output_difference: float

    @property
    def line(self) -> str:
        """One line for people."""
        where = f", first at {self.first_difference}" if self.first_difference else ""
        return (
            f"float64: {self.different} of {self.codes} codes differ{where}; "
            f"outputs within {self.output_difference:.1e}"
        )


@dataclass(frozen=True)
class RuntimeStage:
    """The file in a float32 runtime against PyTorch in float32.

    Args:
        name: of the runtime.
        agreement: share of equal decisions (the class of an image, or each pixel of each map).
        flipped: share of the images with a code that differs; None where reading the codes would
            change how the runtime computes, and flips show in the outputs alone.
        codes: integer codes of activations that were compared: of the quantizers that the runtime
            still has.
        different: how many of them differ.
        first_difference: the first activation quantizer, in execution order, with one that does.
        ties: images with such a code that are explained: replayed in float64 with the runtime's
            codes, each code is what follows from those before it, or stands on a rounding boundary.
        tie_codes: how many codes stood on one, in those replays.
        tie_distance: of the code that is furthest from the boundary it crossed, in codes, in any
            replay; None if none crossed one.
        unexplained_at: the first activation quantizer, in execution order, at which an image has a
            code that does not follow; None if there is none.
        tail: largest difference of an output from what float64 gives for the runtime's codes (from
            PyTorch's float32 where they have the same codes), over the largest output; None where
            codes cannot be read.
        median_difference: of an output value; in output steps, or absolute without a step.
        largest_difference: likewise.
        relative_difference: the largest, over the largest output.
        output_step: input scale times the smallest weight scale of the last layer; None if that
            is float.
        finite: whether all outputs are.
        images: how many were passed through.
        exceptions: images with another decision than PyTorch's.
        explained: of them, those that are shown to follow from ties.
    """

    name: str
    agreement: float
    flipped: float | None
    codes: int
    different: int
    first_difference: str | None
    ties: int
    tie_codes: int
    tie_distance: float | None
    unexplained_at: str | None
    tail: float | None
    median_difference: float
    largest_difference: float
    relative_difference: float
    output_step: float | None
    finite: bool
    images: int
    exceptions: int
    explained: int

    @property
    def line(self) -> str:
        """One line for people."""
        unit = "output steps" if self.output_step else "(no output step)"
        text = (
            f"{self.name}: {self.agreement:.2%} of the decisions agree; {self._codes}; "
            f"difference {self.median_difference:.2g} median, {self.largest_difference:.2g} "
            f"largest {unit}"
        )
        if self.exceptions:
            text += f"; {self.explained} of {self.exceptions} exceptions follow from ties"
        return text

    @property
    def _codes(self) -> str:
        if self.flipped is None:
            return "codes not readable"
        where = f" (first at {self.first_difference})" if self.first_difference else ""
        text = f"{self.different} of {self.codes} codes differ{where}"
        if self.different:
            text += f", in {self.flipped:.1%} of the images"
        if self.ties:
            text += f", {self.ties} of them explained by replay ({self.tie_codes} ties)"
        if self.unexplained_at:
            text += f", unexplained from {self.unexplained_at} on"
        return text


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on an exported file.

    Args:
        format: plugin name.
        path: of the file.
        sha256: of the file as it was read.
        images: how many were passed through.
        verified: every code equal in float64, the file's bits those of the policy, and in the
            runtimes' float32 everything equal but for ties and what float64 makes of them.
        reason: why, in a sentence.
        exact: the comparison in float64; None if the file could not be run.
        runtimes: one for each runtime of the format.
        warnings: what a user of the file must know of a runtime; not held against the file.
    """

    format: str
    path: Path
    sha256: str
    images: int
    verified: bool
    reason: str
    exact: ExactStage | None
    runtimes: tuple[RuntimeStage, ...]
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The verdict and one line a stage."""
        verdict = "verified" if self.verified else "NOT verified"
        stages = [stage.line for stage in (self.exact, *self.runtimes) if stage is not None]
        warnings = [f"warning: {sentence}" for sentence in self.warnings]
        return [f"{self.path.name}: {verdict}: {self.reason}", *stages, *warnings]

    def to_json(self) -> dict[str, Any]:
        """Return a document that ``json.dumps`` takes."""
        return asdict(self) | {"path": self.path.name}
