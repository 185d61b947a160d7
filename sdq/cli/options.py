"""The options that several verbs share, each written once."""

import math
import shlex
from pathlib import Path
from typing import Annotated

import click
import typer
from click.core import ParameterSource

from sdq import config
from sdq.cli import completion
from sdq.errors import RequestError
from sdq.parallel import Precision as PrecisionKind


def finite(option: typer.CallbackParam, value: float) -> float:
    """Return the value of a floating-point option; RequestError if it is infinite or NaN."""
    if not math.isfinite(value):
        raise RequestError(f"{option.opts[0]}: must be a finite number, got {value!r}")
    return value


def given(parameter: str) -> bool:
    """Tell whether an option of the running verb was given, and not left at its default."""
    context = click.get_current_context(silent=True)
    source = None if context is None else context.get_parameter_source(parameter)
    return source is not None and source is not ParameterSource.DEFAULT


def command_line() -> str | None:
    """Return the command that is running, as a shell takes it; None if it is not ``sdq``'s.

    Without ``--resume``: the command that would make the same run anew.
    """
    context = click.get_current_context(silent=True)
    arguments = context.find_root().obj if context is not None else None
    if not isinstance(arguments, list):
        return None
    return shlex.join(["sdq", *(a for a in arguments if a != "--resume")])


def verb() -> str:
    """Return the name of the running verb."""
    return str(click.get_current_context().info_name)


Model = Annotated[
    str | None,
    typer.Option(
        help="A name (see `sdq list models`) or path/to/file.py:function.",
        autocompletion=completion.of("sdq.models"),
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="A name (see `sdq list datasets`), an .npz, a folder with a CSV or class folders, "
        "or path/to/file.py:function.",
        autocompletion=completion.of("sdq.datasets"),
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Another data set than the run's own.",
        autocompletion=completion.of("sdq.datasets"),
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(envvar="SDQ_DATA", help="Folder that holds the data sets read by name."),
]
Out = Annotated[Path, typer.Option(help="Run folder to write; must be new or empty.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Devices = Annotated[
    int, typer.Option(min=1, help="GPUs, or processes on a CPU; each takes its share of a batch.")
]
Precision = Annotated[
    PrecisionKind, typer.Option(help="bf16: forward passes under autocast; scales stay float32.")
]
TRAINING = config.TrainConfig()
"""Whose defaults are those of the options below."""

Optimizer = Annotated[config.OptimizerKind, typer.Option(help="sgd has Nesterov momentum 0.9.")]
WeightDecay = Annotated[
    float, typer.Option(callback=finite, help="Decoupled; not on scales, biases and batch norm.")
]
Schedule = Annotated[
    config.Schedule, typer.Option(help="How the learning rate goes on after its rise.")
]
EmaDecay = Annotated[
    float,
    typer.Option(callback=finite, help="Keep the moving average of the weights; 0: the last ones."),
]
BnBatches = Annotated[
    int,
    typer.Option(min=0, help="Batches to estimate batch norm's statistics anew from; 0: not anew."),
]
Select = Annotated[
    config.Selection | None,
    typer.Option(
        help="Validation metric that chooses the epoch to keep (last: none); default: auc, of "
        "segmentation dice."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1)]
ImageSize = Annotated[
    int | None, typer.Option(min=4, help="Side in pixels to resize to; default: the data's own.")
]
Mean = Annotated[
    str | None,
    typer.Option(help="Of pixels in 0..1: one value, or one a channel; default: from the data."),
]
Std = Annotated[str | None, typer.Option(help="As --mean.")]
Split = Annotated[
    str, typer.Option(help="Shares of train, val and test for data that has no splits.")
]
Augment = Annotated[
    bool, typer.Option(help="Random flips and shifts in training (flips as the data allow).")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")]
Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON line.")]
Plots = Annotated[
    bool, typer.Option("--plots/--no-plots", help="Draw what the run did, into OUT/plots.")
]
Report = Annotated[
    bool, typer.Option("--report/--no-report", help="Write OUT/report.html at the end.")
]
ShownTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Also on a device (see `sdq list targets`, or path/to/file.py).",
        autocompletion=completion.of("hw.targets"),
    ),
]
"""Of verbs that only tell what a network costs there."""

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no tables.")]

Weights = Annotated[
    Path | None, typer.Option(help="Float weights of --model, a .safetensors file.")
]
From = Annotated[
    Path | None, typer.Option("--from", help="Run folder of `sdq train`, instead of --weights.")
]
Bits = Annotated[
    float | None, typer.Option(help="Budget: average weight bits of the searched layers.")
]
WeightKb = Annotated[
    float | None, typer.Option(help="Budget: kilobytes (1000 bytes) of all quantized weights.")
]
BopsG = Annotated[
    float | None, typer.Option(help="Budget: bit operations of one sample, in units of 1e9.")
]
Choices = Annotated[str, typer.Option(help="Candidate weight bitwidths, ascending, from 1..8.")]
ActBits = Annotated[
    int, typer.Option(help="Bits of activations entering searched layers: 2..8, 16, or 32: none.")
]
FirstLastBits = Annotated[
    int, typer.Option(help="Of the first and last layer; 0 searches them too, 32 leaves float.")
]
WeightScale = Annotated[
    config.ScaleGranularity, typer.Option(help="One scale a tensor or a channel.")
]
Scale = Annotated[config.ScaleKind, typer.Option(help="What a scale may be.")]
SearchMethod = Annotated[
    str,
    typer.Option(
        help="How the bitwidths are chosen: sdq, or what it is compared with "
        "(see `sdq list search_methods`); with --ptq sensitivity, unless given.",
        autocompletion=completion.of("sdq.search_methods"),
    ),
]
Granularity = Annotated[config.Granularity, typer.Option(help="What gets a bitwidth of its own.")]
LearnActBits = Annotated[
    bool,
    typer.Option(
        "--learn-act-bits",
        help="Learn activation bitwidths as well; --act-bits is then their mean's budget.",
    ),
]
ActChoices = Annotated[
    str, typer.Option(help="Candidate activation bitwidths, with --learn-act-bits.")
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        help="'PATTERN=BITS': layers that keep these weight bits (32: float). Repeatable."
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN: modules that stay in float with all that is in them, whatever they compute. "
        "Repeatable."
    ),
]
BatchNorm = Annotated[
    config.BatchNorm,
    typer.Option(help="Goes on being trained, is frozen, or is folded into the layer before it."),
]
IntegerDatapath = Annotated[
    bool,
    typer.Option(
        "--integer-datapath",
        help="Quantize also the operands of additions (one scale), concatenations and products, "
        "and what averaging and upsampling take and give.",
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Quantize so that finn, hls4ml or onnxruntime takes the network: sets what matters to "
        "it, refuses what contradicts it.",
        autocompletion=completion.words("finn", "hls4ml", "onnxruntime"),
    ),
]
IntegerBias = Annotated[
    bool,
    typer.Option(
        "--integer-bias",
        help="Round biases to the grid of the products, as integer kernels hold them.",
    ),
]
LayerChoices = Annotated[
    list[str] | None,
    typer.Option(help="'PATTERN=1,2,4': candidates of the layers that match. Repeatable."),
]
ConfigPath = Annotated[
    Path | None,
    typer.Option(
        help="JSON file with fields of the configurations that have no option of their own, by "
        'part: {"quant": {...}, "search": {...}}; a part that the verb has not is refused.'
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="A device (see `sdq list targets`, or path/to/file.py): its bitwidths, and for the "
        "next three.",
        autocompletion=completion.of("hw.targets"),
    ),
]
LatencyMs = Annotated[
    float | None, typer.Option(help="Budget: milliseconds of one sample on --target, at most.")
]
Fps = Annotated[float | None, typer.Option(help="Budget: samples a second on --target, at least.")]
ResourceBudget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", help="'NAME=VALUE': limit of a cost that --target names, as lut. Repeatable."
    ),
]
WeightQuantizer = Annotated[
    config.WeightQuantizerKind, typer.Option(help="Of the searched layers' weights.")
]
SearchEpochs = Annotated[int, typer.Option(min=1, help="Passes of phase 1.")]

Ptq = Annotated[
    bool,
    typer.Option(
        "--ptq", help="After training: learn how to round from a few images; no labels, no phase 2."
    ),
]
PtqImages = Annotated[int, typer.Option(min=1, help="Training images that --ptq looks at.")]
PtqSteps = Annotated[int, typer.Option(min=0, help="Of --ptq, a block; 0 rounds to nearest.")]


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read ``1,2.5`` as numbers; RequestError naming the option if it is anything else."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{option}: must be numbers separated by commas, got {text!r}") from None
    if not all(math.isfinite(value) for value in values):
        raise RequestError(f"{option}: must be finite numbers, got {text!r}")
    return values


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read ``1,2,3`` as integers; RequestError naming the option if it is anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"{option}: must be integers separated by commas, got {text!r}"
        ) from None


def rules(texts: list[str] | None, option: str) -> list[tuple[str, str]]:
    """Read ``pattern=value`` texts; RequestError naming the option if one has no ``=``."""
    found = []
    for text in texts or []:
        pattern, equals, value = text.rpartition("=")
        if not (pattern and equals and value):
            raise RequestError(f"{option}: must be 'PATTERN=VALUE', got {text!r}")
        found.append((pattern, value))
    return found
