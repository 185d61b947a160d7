"""FINN: the QONNX model that FINN+ reads, in a folder that builds the accelerator.

The file is QONNX (:mod:`export.formats.qonnx`) with a batch of one and the shape and datatype of
every tensor. Beside it stand ``build.py``, which runs FINN+ on it, the modules it needs
(``finn_flow``) and a README.

Two runtimes are stages on the way to the device: the graph after streamlining, where scales and
batch normalisation have become integer thresholds, and after conversion to hardware layers. FINN's
own Python executes both. Each threshold knows which quantizer of the file it is, so that integer
codes are compared there too.

Source: Blott et al., "FINN-R", TRETS 2018, https://arxiv.org/abs/1809.04570;
https://github.com/eki-project/finn-plus
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from qonnx.core.modelwrapper import ModelWrapper
from torch import Tensor

from export import finn_codes, finn_folder, finn_rules, finn_simulation, graph
from export.finn_flow import environment
from export.finn_flow.origin import Origin, origin
from export.finn_runtime import Executor
from export.format import Runner, Trace
from export.formats import qonnx
from sdq.batches import Normalization
from sdq.errors import RunError
from sdq.quant_model import QuantModel

FILE = "model_finn.onnx"
STREAMLINED = "FINN after streamlining"
CONVERTED = "FINN after conversion"
RUNTIMES = (STREAMLINED, CONVERTED)
REWRITES: tuple[str, ...] = ()
ADVICE: dict[str, str] = {}

IMAGES = 10
"""How many images pass through FINN's Python at a time: it compares every value with every
threshold at once, up to 255 each."""

BOARDS = finn_folder.BOARDS
board_of = finn_folder.board_of
check = finn_rules.check
metadata = qonnx.metadata
bits = qonnx.bits
quantizers = qonnx.quantizers
open_exact = qonnx.open_exact
build = finn_folder.build
simulate = finn_simulation.simulate


def write(
    qmodel: QuantModel,
    folder: Path,
    *,
    sample: Tensor,
    preprocessing: Normalization | None = None,
    metadata: Mapping[str, str],
) -> None:
    """Write the network; see :func:`export.write` for the arguments.

    Raises:
        RunError: the exporter failed.
    """
    model = qonnx.network_graph(qmodel, sample, preprocessing)
    graph.save(qonnx.with_batch(model, 1).model, folder / FILE, metadata)
    finn_folder.write(folder, metadata)


def run(path: Path, inputs: Tensor) -> Tensor:
    """Run the file in FINN's Python, as hardware layers."""
    return open_runtime(path, CONVERTED, taps=False)(inputs).output


def open_runtime(path: Path, runtime: str, *, taps: bool) -> Runner:
    """Return a runner in FINN's Python.

    Raises:
        ToolMissing: FINN+ is not installed.
        RunError: FINN fails in the graph, or leaves layers that are not hardware.
    """
    finn_folder.check_installed()
    file = graph.load(path)
    compiled: list[_Compiled] = []

    def once(inputs: Tensor) -> Trace:
        if not compiled:
            compiled.append(_Compiled(path, file, runtime, taps=taps))
        traces = [compiled[0](chunk) for chunk in torch.split(inputs, IMAGES)]
        codes = {
            name: torch.cat([trace.codes[name] for trace in traces]) for name in traces[0].codes
        }
        return Trace(torch.cat([trace.output for trace in traces]), codes)

    return once


class _Compiled:
    """A file as FINN has made it."""

    def __init__(self, path: Path, file: onnx.ModelProto, runtime: str, *, taps: bool) -> None:
        model = _front_end(path, file, runtime)
        self.path, self.output = path, model.graph.output[0].name
        self.taps: list[tuple[onnx.NodeProto, Origin]] = []
        for node in model.graph.node if taps else ():
            note = origin(node)
            if note is not None:
                self.taps.append((node, note))
        self.executor = Executor(model.model, [self.output, *(n.output[0] for n, _ in self.taps)])
        self.nodes = {node.name: node for node in file.graph.node}

    def __call__(self, images: Tensor) -> Trace:
        try:
            with environment.finn_environment():
                found = self.executor(images.numpy())
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{self.path}: FINN's Python cannot run it: {reason}") from error
        codes = {
            note.name: finn_codes.read(self.nodes, node, note, found[node.output[0]])
            for node, note in self.taps
        }
        return Trace(torch.from_numpy(found[self.output]), codes)


def _front_end(path: Path, file: onnx.ModelProto, runtime: str) -> ModelWrapper:
    """Return the graph that FINN makes of a file, up to a stage."""
    try:
        model = _streamlined(file.SerializeToString())
        if runtime == STREAMLINED:
            return model
        model, left = _transformed(model, slice(2, None))
    except _StepFails as error:
        raise RunError(f"{path}: FINN+ fails in {error}") from error
    if left:
        nodes = ", ".join(f"{node.name} ({node.op_type})" for node in left)
        raise RunError(
            f"{path}: FINN+ has no hardware for a part of layer {_layer(file, model, left[0])!r}: "
            f"{nodes}; see docs/finn.md for what it takes"
        )
    return model


@functools.lru_cache(maxsize=1)
def _streamlined(content: bytes) -> ModelWrapper:
    """Return the graph after streamlining: what takes longest, and both stages want."""
    model = ModelWrapper(onnx.load_model_from_string(content))
    return _transformed(model, slice(2))[0]


class _StepFails(Exception):
    """A step of FINN's raised; the text has the step and the reason."""


def _transformed(model: ModelWrapper, which: slice) -> tuple[ModelWrapper, list[onnx.NodeProto]]:
    """Return what steps of the front end make of a graph, and what is no hardware layer then."""
    step = "being imported"
    try:
        with environment.finn_environment() as folder:
            from finn.builder.build_dataflow_config import DataflowBuildConfig

            from export.finn_flow import lookup, steps

            settings = DataflowBuildConfig(
                output_dir=str(folder), standalone_thresholds=True, generate_outputs=[]
            )
            model = copy.deepcopy(model)
            with lookup.indexed():
                for function in steps.FRONT_END[which]:
                    step = function.__name__
                    model = function(model, settings)
                return model, steps.left_over(model)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _StepFails(f"{step}: {reason}") from error


def _layer(file: onnx.ModelProto, model: ModelWrapper, node: onnx.NodeProto) -> str:
    """Return the layer that a node of FINN's graph belongs to, by the quantizer it reads."""
    found: Origin | None = None
    while found is None:
        found = origin(node)
        producer = model.find_producer(node.input[0])
        if producer is None:
            break
        node = producer
    if found is None:
        return graph.layers(file)[0]
    made = {f"{found.name}.quant"}
    for later in file.graph.node:
        if made.intersection(later.input):
            if later.op_type in graph.MULTIPLIES:
                return str(later.name.partition("#")[0])
            made.update(later.output)
    return found.name
