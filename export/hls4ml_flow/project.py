"""The folder ``hls4ml/``: network, configuration, commands, and the project hls4ml generates.

Source: https://github.com/fastmachinelearning/hls4ml; Duarte et al., "Fast inference of deep neural
networks in FPGAs for particle physics", JINST 2018, https://arxiv.org/abs/1804.06913.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from export.hls4ml_flow.reading import Network
from sdq.errors import RequestError, RunError

FOLDER = "hls4ml"
NETWORK = "network.onnx"
CONFIGURATION = "config.json"
PROJECT = "project"
SPEC = "simulation.json"
NAME = "network"
INSTALL = "pip install 'sdq[hls4ml]'"

_UNKNOWN = "ap_fixed<63,31>"
"""What hls4ml gives a tensor that nobody gave a type, so that it is noticed."""


@dataclass(frozen=True)
class Options:
    """What hardware the project is for.

    Args:
        part: of the FPGA; the default is that of the Zynq-7000 boards PYNQ-Z1 and Z2.
        clock_ns: clock period.
        io_type: whether layers hand over whole tensors at once (``io_parallel``) or pixel by pixel
            (``io_stream``); None: parallel without convolutions, streamed with them.
        parallel_products: most multiplications a layer does at once; one with more weights has the
            strategy ``Resource`` and uses its multipliers several times.
        reuse_factor: how often, for all layers; None: as often as ``parallel_products`` asks for.
        backend: of hls4ml.
    """

    part: str = "xc7z020clg400-1"
    clock_ns: float = 5.0
    io_type: Literal["io_parallel", "io_stream"] | None = None
    parallel_products: int = 4096
    reuse_factor: int | None = None
    backend: str = "Vitis"

    def __post_init__(self) -> None:
        """Refuse what hls4ml would take for something else."""
        whole = {"parallel_products": self.parallel_products, "reuse_factor": self.reuse_factor}
        wrong = [n for n, v in whole.items() if v is not None and not _is_count(v)]
        if wrong:
            raise RequestError(
                f"hls4ml: {wrong[0]} must be a whole number of at least 1, got {whole[wrong[0]]!r}"
            )
        if not (isinstance(self.clock_ns, int | float) and 0 < self.clock_ns < math.inf):
            raise RequestError(
                f"hls4ml: clock_ns must be a positive number of nanoseconds, got {self.clock_ns!r}"
            )
        if self.io_type not in (None, "io_parallel", "io_stream"):
            raise RequestError(
                f"hls4ml: io_type must be io_parallel, io_stream or None, got {self.io_type!r}"
            )
        for name, text in (("part", self.part), ("backend", self.backend)):
            if not isinstance(text, str) or not text.strip():
                raise RequestError(f"hls4ml: {name} must be a name, got {text!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def installed() -> bool:
    """Tell whether the package hls4ml is there."""
    return importlib.util.find_spec("hls4ml") is not None


def write(folder: Path, network: Network, options: Options) -> None:
    """Write the folder; without hls4ml, all of it but the project.

    Args:
        folder: empty.
        network: for hls4ml.
        options: of the hardware.

    Raises:
        RunError: hls4ml fails in the network.
    """
    onnx.save(network.model, folder / NETWORK)
    configuration = _configuration(network, options)
    # hls4ml reads YAML, of which JSON is a part
    _write_json(folder / CONFIGURATION, configuration)
    (folder / "README.md").write_text(_readme(network, options), encoding="utf-8")
    if not installed():
        warnings.warn(
            f"export: hls4ml is not installed: {NETWORK} and {CONFIGURATION} are written, but not "
            f"the project; {INSTALL} and export again, or run hls4ml elsewhere as its README.md "
            "says", stacklevel=2,
        )  # fmt: skip
        return
    layers = _generate(folder, configuration)
    _write_json(folder / SPEC, _spec(network, layers))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _configuration(network: Network, options: Options) -> dict[str, Any]:
    """Return the configuration file of ``hls4ml convert``."""
    return {
        "OnnxModel": NETWORK, "OutputDir": PROJECT, "ProjectName": NAME,
        "Backend": options.backend, "Part": options.part, "ClockPeriod": options.clock_ns,
        "IOType": network.io_type,
        "HLSConfig": {
            "Model": {
                "Precision": {"default": _UNKNOWN}, "ReuseFactor": 1, "Strategy": "Latency",
                "TraceOutput": True,
            },
            "LayerName": network.layers,
        },
    }  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """A layer as hls4ml has made it: its shape and type, and whether a simulation shows it."""

    shape: tuple[int, ...]
    type: tuple[int, int, bool]
    traced: bool


def _generate(folder: Path, configuration: dict[str, Any]) -> dict[str, _Layer]:
    printed = io.StringIO()
    try:
        with _inside(folder), contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import hls4ml

            model = hls4ml.converters.convert_from_config(configuration)
            model.config.trace_output = True  # read from the configuration by no version so far
            model.write()
    except Exception as error:
        last = (printed.getvalue().strip().splitlines() or ["nothing"])[-1]
        raise RunError(f"export: hls4ml failed: {error}; the last it said was: {last}") from error
    return dict(_layers(model))


def _layers(model: Any) -> Iterator[tuple[str, _Layer]]:
    for layer in model.get_layers():
        for name, kind in layer.types.items():
            if (getattr(kind.precision, "width", 0), getattr(kind.precision, "integer", 0)) == (
                63,
                31,
            ):
                raise RunError(f"export: hls4ml guesses the type {name} of {layer.name}")
        precision = layer.get_output_variable().type.precision
        traced = bool(layer.get_attr("function_cpp", None)) and bool(layer.get_attr("trace", False))
        yield layer.name, _Layer(
            tuple(int(n) for n in layer.get_output_variable().shape),
            (precision.width, precision.integer, precision.signed), traced,
        )  # fmt: skip


def _spec(network: Network, layers: dict[str, _Layer]) -> dict[str, Any]:
    """Return what a simulation must know: where codes are, and what values mean."""
    makers = {x: node for node in network.model.graph.node for x in node.output}
    taps = {}
    for name, tap in network.taps.items():
        layer = _layer_of(tap.tensor, makers, layers)
        kind = (tap.type.width, tap.type.integer, tap.type.signed)
        if layer is None or not layers[layer].traced:
            continue
        if layers[layer].type != kind:
            raise RunError(
                f"export: hls4ml gives {name} the type {layers[layer].type}, not {kind}: it has "
                "merged layers that must stay apart"
            )
        taps[name] = {"layer": layer, "shape": tap.shape, "flat": tap.flat, "scale": tap.scale}
    return {
        "function": f"{NAME}_double",
        "input": {"shape": network.input.shape, "unit": network.input.unit},
        "output": {
            "shape": network.output.image or network.output.shape,
            "flat": network.flat,
            "unit": network.output.unit,
        },
        "traced": {name: math.prod(x.shape) for name, x in layers.items() if x.traced},
        "taps": taps,
    }


def _layer_of(
    tensor: str, makers: dict[str, onnx.NodeProto], layers: dict[str, _Layer]
) -> str | None:
    """Return hls4ml's layer that makes a tensor: its own, or the one it was merged into."""
    while tensor in makers:
        node = makers[tensor]
        kinds = ("{}_act", "{}", "Conv2D_{}", "DepthwiseConv2D_{}", "Dense_{}")
        for name in (kind.format(node.name) for kind in kinds):
            if name in layers:
                return name
        tensor = node.input[0]
    return None


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that no path of this machine is written into the project."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _readme(network: Network, options: Options) -> str:
    exact = (
        "Every integer code is the network's."
        if not network.inexact
        else "Not exact:\n\n" + "\n".join(f"- {sentence}" for sentence in network.inexact)
    )
    chosen = asdict(options) | {"io_type": network.io_type}
    if options.reuse_factor is None:
        chosen["reuse_factor"] = f"each layer's own, in {CONFIGURATION}"
    values = "\n".join(f"- {name}: {value}" for name, value in chosen.items())
    shape = " x ".join(str(n) for n in network.input.shape)
    return f"""# The network for hls4ml

- `{NETWORK}`: QONNX, channels last, with constants short enough for hardware.
- `{CONFIGURATION}`: the type of every tensor, and what it is for.
- `{PROJECT}/`: the project that hls4ml made of the two.

{exact}

## Commands

    hls4ml convert -c {CONFIGURATION}     # makes {PROJECT}/ anew, after a change of {CONFIGURATION}
    cd {PROJECT} && ./build_lib.sh        # compiles the C simulation with g++
    cd {PROJECT} && vitis-run --mode hls --tcl build_prj.tcl   # synthesises, with Vitis

The last is for the backend Vitis; `{PROJECT}/build_opt.tcl` says which of its steps are done.

## Numbers

Input: {shape} (height, width, channels), the normalised image divided by {network.input.unit!r}.
It is rounded half to even to `{network.layers[network.input.tensor]["Precision"]["result"]}`.
Output: to be multiplied by {network.output.unit!r}.

## Options

{values}
"""
