"""Whether a file computes what PyTorch computes, and if not, where it first differs.

A low-bit network rounds at every layer, and float32 sums depend on their order: the same network
in two runtimes, or in PyTorch with two batch sizes, gives codes that differ here and there, and
outputs that differ by whole steps. A bound on the largest difference therefore either fails sound
files or passes broken ones. Two questions are asked instead:

1. *Does the file mean the same?* Both sides run in float64, where sums are exact enough that no
   tie is decided by their order: every integer code must be equal.
2. *Does its runtime do what it should?* In float32 its codes must be PyTorch's, or for each image
   where they are not, a run in float64 with the runtime's codes must show that every one of them
   follows from those before it or stands on a rounding boundary, and the output from all.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from export.float32 import Tally, caution, judge
from export.format import (
    Format,
    Runner,
    ToolMissing,
    Trace,
    expected_bits,
    load_format,
    read_record,
)
from export.reference import Reference
from export.report import ExactStage, RuntimeStage, VerifyReport
from export.ties import OUTPUT_TIE
from sdq import integer_bias
from sdq.batches import Normalization
from sdq.errors import RequestError, RunError
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel

OUTPUT_TOLERANCE = 1e-9
"""For the outputs in float64, relative to the largest: its 1e-16 leaves seven digits for sums and
batch normalisation, and one float32 rounding (6e-8) would show."""

FEW_CODES = 4.0
"""How far from a rounding boundary, in codes, a runtime may move a code by rounding float biases
(likewise outputs, in steps). It rounds a bias by at most half a unit of its layer's sums; behind
layers of few bits that were up to 2.2 codes. A kernel that computes something else is off by more:
average pooling that divides by the wrong count, by 50."""

CODES_AT_A_TIME = 30_000_000
"""Activation codes of the images that are compared together: in float64, with what is computed
from them, some gigabytes."""


Watcher = Callable[[str, int, int], None]
"""Takes a stage of the comparison, the images that are done there, and how many there are."""


def verify(
    qmodel: QuantModel,
    folder: str | Path,
    *,
    format: "str | Format",
    inputs: Tensor,
    batch_size: int = 50,
    watch: Watcher | None = None,
) -> VerifyReport:
    """Compare an exported file with the network it was written from.

    Args:
        qmodel: the network; left as it is.
        folder: as given to :func:`export.write`; the file on disk is read, nothing is remembered.
        format: plugin name, or such a module.
        inputs: normalised float images ``(N, C, H, W)``; or, for a file that holds the
            preprocessing, uint8 pixels ``(N, C, H, W)``. A few hundred images will do.
        batch_size: images at a time, fewer where they have many codes; bounds the memory, and
            changes no result in float64.
        watch: called as images have been compared.

    Returns:
        The report. A file that differs, was changed or cannot be run is ``verified=False`` with
        the reason; it is not an error.

    Raises:
        RequestError: no such file, not a file of ours, of another network, or inputs that do not
            fit it.
    """
    name, plugin = load_format(format)
    path = Path(folder) / plugin.FILE
    with _reading(path):
        metadata = plugin.metadata(path)
    prepare = preparation(path, metadata, inputs)
    inputs = inputs.detach()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    recorded = read_record(Path(folder)).get(name)
    reasons = _check_sha256(recorded, sha256)
    reference = Reference(qmodel)
    codes = _check_inputs(reference, prepare(inputs[:1])[0])
    batch_size = max(1, min(batch_size, CODES_AT_A_TIME // max(codes, 1)))
    exact: ExactStage | None = None
    runtimes: list[RuntimeStage] = []
    warnings: list[str] = []
    excused: list[str] = []
    if not isinstance(recorded, dict):
        warnings.append("export.json does not say which file was written: it may be another one")
    try:
        differences, static = _compare_quantizers(plugin, path, reference)
        reasons += differences
        with _reading(path):
            run = plugin.open_exact(path)
        chunks = _chunks(inputs, prepare, batch_size, "float64", watch)
        exact = _compare_exact(path, run, reference, chunks, static)
        reasons += _judge_exact(exact, bool(differences))
        chunks = _chunks(inputs, prepare, batch_size, "float32", watch)
        runtimes, missing = _compare_runtimes(plugin, path, reference, chunks)
        warnings += missing
        rounds = _float_biases(reference)
        for stage in runtimes:
            found = judge(stage)
            advice = _advice(plugin, stage, runtimes, rounds) if found else None
            reasons += found if advice is None else []
            warnings += [f"{sentence}; {advice}" for sentence in found if advice is not None]
            excused += found if advice is not None else []
            warnings += [] if found else caution(stage)
    except RunError as error:
        reasons.append(str(error))
    rest = (
        "what more than ties of rounding moves in float32 is in the warnings"
        if excused
        else "what differs in float32 follows from ties of rounding"
    )
    good = f"every code equals PyTorch's in float64, bits are the policy's, and {rest}"
    return VerifyReport(
        name, path, sha256, len(inputs), not reasons, "; ".join(reasons) or good, exact,
        tuple(runtimes), tuple(warnings),
    )  # fmt: skip


def _advice(
    plugin: Format, stage: RuntimeStage, stages: list[RuntimeStage], rounds: bool
) -> str | None:
    """Return why what is wrong with a runtime is not held against the file; None if it is.

    Args:
        plugin: the format.
        stage: of the runtime.
        stages: of all its runtimes.
        rounds: whether a runtime has float biases to round.
    """
    others = [other for other in stages if other.name not in plugin.ADVICE]
    # a fault of its own is one that no other runtime has
    alone = all(replace(stage, name=other.name) != other for other in others)
    if stage.name in plugin.ADVICE and alone:
        return plugin.ADVICE[stage.name]
    if rounds and stage.name in plugin.REWRITES and _deviates_little(stage):
        return "the runtime rounds float biases where it fuses layers; no decision changed by it"
    return None


def _float_biases(reference: Reference) -> bool:
    """Tell whether a layer with a quantized weight has a bias that is no multiple of its sums'."""
    network = reference.single
    whole = integer_bias.biases(network.net)
    return any(
        getattr(network.layer(bits.name), "bias", None) is not None
        for bits in network.policy
        if bits.weight_bits != FLOAT_BITS and bits.name not in whole
    )


def _deviates_little(stage: RuntimeStage) -> bool:
    """Tell whether rounded biases may be all that a runtime deviates by."""
    if not stage.finite or stage.exceptions != stage.explained:
        return False
    if stage.tail is not None and stage.tail > OUTPUT_TIE:
        if not stage.output_step or not stage.relative_difference:
            return False
        steps = stage.tail * stage.largest_difference / stage.relative_difference
        return steps <= FEW_CODES and (stage.tie_distance or 0) <= FEW_CODES
    return (stage.tie_distance or 0) <= FEW_CODES


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a format and a runtime make of a damaged file into a RunError."""
    try:
        yield
    except (RequestError, RunError):
        raise
    except Exception as error:
        raise RunError(
            f"{path}: must be a file as it was written, but: {type(error).__name__}: "
            f"{error!s:.200}; write it anew"
        ) from error


Preparation = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a chunk of the inputs: images for PyTorch, inputs for the file."""


def preparation(path: Path, metadata: dict[str, str], inputs: Tensor) -> Preparation:
    """Return what makes images for PyTorch and inputs for a file from pixels or images.

    Raises:
        RequestError: the inputs are not what the file takes.
    """
    if not isinstance(inputs, Tensor):
        raise RequestError(
            f"verify: inputs must be a torch.Tensor, got {type(inputs).__name__}; use "
            "torch.from_numpy"
        )
    if inputs.dim() != 4 or not len(inputs):
        raise RequestError(
            f"verify: inputs must be (N, C, H, W) with N at least 1, got {tuple(inputs.shape)}"
        )
    shape = json.dumps(list(inputs.shape[1:]))
    if metadata.get("image_shape", shape) != shape:
        raise RequestError(
            f"verify: inputs must be images (C, H, W) of {metadata['image_shape']:.100}, "
            f"which {path.name} takes, got {shape}; resize them, or export for images of that size"
        )
    if "normalization" not in metadata:
        if not inputs.is_floating_point():
            raise RequestError(
                f"verify: inputs must be normalised float images, got {inputs.dtype}: {path.name} "
                "holds no preprocessing"
            )
        if not bool(inputs.isfinite().all()):
            raise RequestError("verify: inputs must be finite, got NaN or infinity; mend the data")
        return lambda images: (images.float().cpu(), images.float().cpu())
    if inputs.dtype is not torch.uint8:
        raise RequestError(
            f"verify: inputs must be uint8 pixels, got {inputs.dtype}: {path.name} holds the "
            "preprocessing"
        )
    try:
        values = json.loads(metadata["normalization"])
        normalization = Normalization(tuple(values["mean"]), tuple(values["std"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: its normalization must be mean and std: {error}") from None
    return lambda pixels: (
        normalization(pixels.cpu()),
        pixels.cpu().permute(0, 2, 3, 1).contiguous(),  # (N, H, W, C)
    )


def _check_inputs(reference: Reference, image: Tensor) -> int:
    """Return how many activation codes one image has; RequestError if it does not fit."""
    try:
        return sum(codes.numel() for codes in reference.float32(image).codes.values())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise RequestError(
            f"verify: inputs must fit the network, got shape {tuple(image.shape)} (N, C, H, W): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _check_sha256(recorded: object, sha256: str) -> list[str]:
    if isinstance(recorded, dict) and recorded.get("sha256") != sha256:
        return ["the file is not the one that was written: its SHA-256 is not that of export.json"]
    return []


@dataclass
class _Count:
    """Codes compared so far, and how many differ by the place they belong to."""

    compared: int = 0
    different: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, theirs: Tensor | None) -> None:
        self.compared += ours.numel()
        if theirs is None or theirs.shape != ours.shape:
            wrong = ours.numel()
        else:
            wrong = int((ours != theirs).sum())
        if wrong:
            self.different[name] = self.different.get(name, 0) + wrong


def _compare_quantizers(
    plugin: Format, path: Path, reference: Reference
) -> tuple[list[str], _Count]:
    """Compare what the file says of its quantizers: bits, weight codes, scales."""
    with _reading(path):
        bits, found = plugin.bits(path), plugin.quantizers(path)
    expected = expected_bits(reference.single)
    if set(bits) != set(expected):
        odd = sorted(set(bits) ^ set(expected))[0]
        raise RequestError(
            f"verify: the file must hold the network's layers and quantizers, but {odd!r} is only "
            "in one of them; verify with the network it was written from"
        )
    count, reasons = _Count(), []
    for name in expected:
        if bits[name] != expected[name]:
            count.different.setdefault(name, 0)
            reasons.append(
                f"{name}: the file has {bits[name]!r:.100} bits, the policy {expected[name]!r:.100}"
            )
        if name not in found:
            continue
        weight = reference.weight(name) if found[name].codes is not None else None
        if weight is not None:
            codes, scale = weight
            count.add(name, codes, found[name].codes)
            if count.different.get(name):
                reasons.append(f"{name}: {count.different[name]} weight codes differ")
        else:
            scale = reference.single.act_quantizers()[name].scale.detach().reshape(-1)
        if not torch.equal(found[name].scale, scale):
            count.different.setdefault(name, 0)
            reasons.append(f"{name}: the scale differs")
    return reasons, count


def _chunks(
    inputs: Tensor, prepare: Preparation, batch_size: int, stage: str, watch: Watcher | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images in parts; when the next one is asked for, those before it are done."""
    done = 0
    for chunk in torch.split(inputs, batch_size):
        yield prepare(chunk)
        done += len(chunk)
        if watch is not None:
            watch(stage, done, len(inputs))


def _compare_exact(
    path: Path,
    run: Runner,
    reference: Reference,
    chunks: Iterator[tuple[Tensor, Tensor]],
    count: _Count,
) -> ExactStage:
    difference = largest = 0.0
    for images, feed in chunks:
        ours = reference.float64(images)
        with _reading(path):
            theirs = run(feed)
        for name in reference.names:
            count.add(name, ours.codes[name], theirs.codes.get(name))
        _check_output(theirs.output, ours)
        gap = (ours.output - theirs.output).abs().nan_to_num(torch.inf, torch.inf)
        difference = max(difference, float(gap.max()))
        largest = max(largest, float(ours.output.abs().max()))
    order = _execution_order(reference)
    first = next((name for name in order if name in count.different), None)
    total = sum(count.different.values())
    return ExactStage(count.compared, total, first, difference / (largest or 1.0))


def _check_output(output: Tensor, ours: Trace) -> None:
    """Raise RunError unless a file's output has the shape of PyTorch's."""
    if output.shape != ours.output.shape:
        raise RunError(
            f"the file's output must have shape {tuple(ours.output.shape)}, "
            f"got {tuple(output.shape)}"
        )


def _execution_order(reference: Reference) -> list[str]:
    """Return layers and activation quantizers as they come in a forward pass."""
    known = {*reference.names, *(bits.name for bits in reference.single.policy)}
    nodes = reference.single.net.graph.nodes
    return [str(n.target) for n in nodes if n.op == "call_module" and str(n.target) in known]


def _judge_exact(stage: ExactStage, known: bool) -> list[str]:
    if stage.different and not known:
        return [
            f"{stage.different} of {stage.codes} codes differ in float64, "
            f"first at {stage.first_difference}"
        ]
    if not stage.different and not stage.output_difference <= OUTPUT_TOLERANCE:
        return [
            f"the outputs differ in float64 by {stage.output_difference:.1e} of the largest, "
            "after the last quantizer"
        ]
    return []


def _compare_runtimes(
    plugin: Format, path: Path, reference: Reference, chunks: Iterator[tuple[Tensor, Tensor]]
) -> tuple[list[RuntimeStage], list[str]]:
    """Return a stage for each runtime that is installed, and what is to be said of the others."""
    plain: dict[str, Runner] = {}
    tapped: dict[str, Runner] = {}
    missing = []
    for runtime in plugin.RUNTIMES:
        try:
            with _reading(path):
                tapped[runtime] = plugin.open_runtime(path, runtime, taps=True)
                if runtime in plugin.REWRITES:
                    plain[runtime] = plugin.open_runtime(path, runtime, taps=False)
        except ToolMissing as error:
            missing.append(f"{runtime}: not run: {error}")
    tallies = {runtime: Tally(reference) for runtime in tapped}
    for images, feed in chunks:
        ours = reference.float32(images)
        for runtime, tally in tallies.items():
            with _reading(path):
                theirs = tapped[runtime](feed)
                output = plain[runtime](feed).output if runtime in plain else theirs.output
            _check_output(output, ours)
            tally.add(images, ours, output, theirs)
    return [tally.stage(runtime) for runtime, tally in tallies.items()], missing
