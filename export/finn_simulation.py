"""The hardware layers of a FINN build in Verilator, each beside FINN's Python.

FINN+ builds some layers from its library of SystemVerilog: thresholds, padding, sliding windows,
and matrix-vector units where the bits suit a DSP. These sources need no vendor tool. A layer gets
the integers that reach it in FINN's Python, and has to give the integers that Python gives. Layers
of C++ (HLS) are Verilog only after Vitis HLS, and cannot be simulated here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import finn_codes, finn_folder, graph, verilator
from export.finn_flow import environment
from export.finn_flow.build import MODEL, RESULTS, WORK
from export.finn_flow.origin import Origin, origin
from export.finn_runtime import Arrays, Executor
from export.simulate import SimulatedLayer
from sdq.errors import RequestError, RunError

PADDING, WINDOWS = "FMPadding_rtl", "ConvolutionInputGenerator_rtl"

CONVERTED = "step_sdq_convert_to_hw"
SOURCES = "step_hw_codegen"
"""The graphs of the build: hardware layers that FINN's Python runs; and those with sources."""

PAUSES = 0.3
"""Of the cycles, in the second run: many enough that every state meets both a pause and none."""

IMAGES = 10
"""At a time in FINN's Python; see :data:`export.formats.finn.IMAGES`."""


@dataclass(frozen=True)
class Stream:
    """One side of a layer: how its values are cut into words.

    Args:
        bits: of a value.
        elements: values in a word.
        width: of a word, in bits, with what pads it to bytes.
        signed: whether negative values occur.
        real: whether a value is the 32 bits of a float.
    """

    bits: int
    elements: int
    width: int
    signed: bool
    real: bool

    def pack(self, values: np.ndarray) -> verilator.Words:
        """Return values of any shape, last dimension last, as words ``(words, bytes)``."""
        if self.real:
            whole = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.int64)
        else:
            whole = np.rint(values).astype(np.int64)
        return verilator.pack(whole.reshape(-1, self.elements), self.bits, self.width)

    def unpack(self, words: verilator.Words) -> NDArray[np.int64]:
        """Return the integers in words."""
        return verilator.unpack(words, self.bits, self.elements, signed=self.signed)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer in the last graph of the build: node, FINN's object for it, generated sources."""

    node: onnx.NodeProto
    custom: Any
    sources: Path

    @property
    def input(self) -> str:
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        return str(self.node.output[0])

    @property
    def can_be_streamed(self) -> bool:
        """Return whether one stream goes in and one of integers comes out."""
        ports = self.custom.get_verilog_top_module_intf_names()
        names = [[name for name, _ in ports[side]] for side in ("s_axis", "m_axis")]
        into, out = self.custom.get_input_datatype(0), self.custom.get_output_datatype(0)
        return (
            names == [["in0_V"], ["out0_V"]]
            and "BIPOLAR" not in (into.name, out.name)
            and (into.is_integer() or into.name == "FLOAT32")
            and out.is_integer()
        )

    @property
    def source(self) -> Stream:
        kind, width = self.custom.get_input_datatype(0), self.custom.get_instream_width_padded(0)
        return _stream(kind, self.custom.get_folded_input_shape(0), width)

    @property
    def sink(self) -> Stream:
        kind, width = self.custom.get_output_datatype(0), self.custom.get_outstream_width_padded(0)
        return _stream(kind, self.custom.get_folded_output_shape(0), width)


def _stream(kind: Any, folded: Any, width: int) -> Stream:
    real = kind.name == "FLOAT32"
    return Stream(kind.bitwidth(), int(folded[-1]), int(width), bool(kind.signed()), real)


def simulate(folder: Path, layer: str, feed: Tensor) -> list[tuple[SimulatedLayer, Tensor | None]]:
    """Simulate layers of the build in an export folder.

    Args:
        folder: of :func:`export.write`, in which :func:`export.finn_folder.build` has run.
        layer: see :func:`export.simulate_layers`.
        feed: what the file takes.

    Returns:
        What was found of each layer, in execution order, and the codes its quantizer has in
        hardware, if it is one.

    Raises:
        ToolMissing: FINN+, Verilator or a compiler is not installed.
        RequestError: no build, an older build, or no such layer.
        RunError: a layer does not compile, or does not give as many words as it should.
    """
    verilator.check_installed()
    finn_folder.check_installed()
    file = {node.name: node for node in graph.load(folder / MODEL).graph.node}
    python = _Python(onnx.load_model(_graph(folder, CONVERTED)))
    found: list[tuple[SimulatedLayer, Tensor | None]] = []
    with environment.finn_environment() as work:
        chosen = _choose(_layers(folder), python, layer)
        values = python.values({x for each in chosen for x in (each.input, each.output)}, feed)
        for x in chosen:
            expected, note = values[x.output], python.quantizer(x)
            given, cycles = _simulate(x, values[x.input], expected.shape, work)
            report = SimulatedLayer(
                x.node.name, x.node.op_type, note.name if note else None, len(feed),
                given.size, int((given != expected).sum()), None, cycles / len(feed),
                x.custom.get_nodeattr("cycles_estimate"),
            )  # fmt: skip
            codes = None
            if note is not None:
                floats = given.astype(np.float32)
                codes = finn_codes.read(file, python.makers[x.output], note, floats)
            found.append((report, codes))
    return found


class _Python:
    """The graph of hardware layers that FINN's Python runs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.start = model, model.graph.input[0].name
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def has(self, layer: _Layer) -> bool:
        """Return whether what a layer reads and gives has kept its name."""
        return layer.input in {self.start, *self.makers} and layer.output in self.makers

    def quantizer(self, layer: _Layer) -> Origin | None:
        """Return the activation quantizer that a layer computes, None if it is none."""
        return origin(self.makers[layer.output])

    def values(self, names: set[str], feed: Tensor) -> Arrays:
        """Return tensors for what the file takes."""
        executor = Executor(self.model, names - {self.start})
        found = [executor(chunk.numpy()) for chunk in torch.split(feed, IMAGES)]
        values = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        return {self.start: feed.numpy(), **values}


def _graph(folder: Path, step: str) -> Path:
    path = folder / RESULTS / "intermediate_models" / f"{step}.onnx"
    if not path.exists():
        raise RequestError(
            f"simulate: {folder} must hold a build with sources, got none; run sdq export with "
            "--build, or its build.py"
        )
    if path.stat().st_mtime < (folder / MODEL).stat().st_mtime:
        raise RequestError(
            f"simulate: the build in {folder} must be of {MODEL}, got an older one; build again"
        )
    return path


def _layers(folder: Path) -> list[_Layer]:
    """Return the layers whose sources are SystemVerilog, in execution order."""
    from qonnx.custom_op.registry import getCustomOp

    found = []
    for node in onnx.load_model(_graph(folder, SOURCES)).graph.node:
        if not node.domain.endswith(".rtl"):
            continue
        custom = getCustomOp(node)
        sources = Path(custom.get_nodeattr("code_gen_dir_ipgen"))
        if not sources.exists():  # the folder was moved since
            sources = folder.resolve() / RESULTS / WORK / sources.name
            custom.set_nodeattr("code_gen_dir_ipgen", str(sources))
        found.append(_Layer(node, custom, sources))
    return found


def _choose(layers: list[_Layer], python: _Python, wanted: str) -> list[_Layer]:
    known = {x.node.name: x for x in layers if x.can_be_streamed and python.has(x)}
    quantizers = {note.name: x for x in known.values() if (note := python.quantizer(x))}
    if wanted == "all":
        return list(known.values())
    if wanted == "first":
        sums = [x for x in quantizers.values() if not x.source.real]
        return (sums or list(known.values()))[:1]
    found = known.get(wanted, quantizers.get(wanted))
    if found is None:
        names = ", ".join(["first", "all", *known, *quantizers])
        raise RequestError(f"simulate: layer must be one of {names}, got {wanted!r}")
    return [found]


def _simulate(
    layer: _Layer, values: np.ndarray, shape: tuple[int, ...], folder: Path
) -> tuple[NDArray[np.int64], int]:
    """Return what a layer makes of values, and in how many cycles.

    It runs twice: without pauses, which gives the cycles, and with pauses on both sides.
    """
    source, sink = layer.source, layer.sink
    files = [Path(name) for name in layer.custom.get_rtl_file_list(abspath=True)]
    bench = verilator.Bench(
        layer.custom.get_verilog_top_module_name(), files, layer.sources, folder
    )
    words = source.pack(values)
    count = int(np.prod(shape)) // sink.elements
    runs = [
        bench(words, out_bytes=sink.width // 8, count=count, pauses=pauses)
        for pauses in (0.0, PAUSES)
    ]
    for run in runs:
        _check_surplus(layer, run.words[count:])
    if not np.array_equal(runs[0].words[:count], runs[1].words[:count]):
        raise RunError(f"{layer.node.name}: gives other values when its streams pause")
    given = sink.unpack(runs[0].words[:count]).reshape(-1)
    return _as_in_python(layer, given).reshape(shape), runs[0].cycles


def _check_surplus(layer: _Layer, words: verilator.Words) -> None:
    """Words after the last image: only padding may begin the next image before it has come."""
    if len(words) and (layer.node.op_type != PADDING or words.any()):
        raise RunError(f"{layer.node.name}: gives {len(words)} words after the last image")


def _as_in_python(layer: _Layer, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Windows of one channel after the other come in another order than in FINN's Python.

    Source: finn-plus 1.6.1, finn/custom_op/fpgadataflow/rtl/convolutioninputgenerator_rtl.py
    """
    if layer.node.op_type != WINDOWS or not layer.custom.get_nodeattr("depthwise"):
        return values
    window = int(np.prod(layer.custom.get_nodeattr("ConvKernelDim")))
    channels, parallel = (layer.custom.get_nodeattr(name) for name in ("IFMChannels", "SIMD"))
    folded = values.reshape(-1, channels // parallel, window, parallel)
    return folded.transpose(0, 2, 1, 3)
