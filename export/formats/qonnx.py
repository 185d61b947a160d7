"""QONNX: ONNX with Quant and BipolarQuant nodes, what FPGA compilers read.

Weights are float initializers that already hold codes times scale, each with its Quant node (one
bit: BipolarQuant). Odd codes ``c = 2 q + 1``, of quantizers without a level at zero, are a Quant
node of signed ``q`` with a zero point of -1/2 and twice the scale; its weights lie in the middle
between two borders, so that no rounding decides on them.

Where the channels of a weight have bits of their own, those of one bitwidth have a node, and a
Concat and a Gather put them together (:mod:`export.channels`).

The batch size in the file is free. qonnx's own executor wants every shape fixed: it is given a
copy in memory with the batch filled in, the file keeps its free batch. For the same reason the
file has no shapes for the tensors in between; tools that need them infer them
(``qonnx.util.cleanup`` with the batch size of their choice).

Source: https://github.com/fastmachinelearning/qonnx
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from export import channels, graph, tracing
from export.findings import Finding
from export.float64 import Interpreter, fold_constants_
from export.format import Bits, QuantizerInFile, Runner, Trace
from export.tracing import trace
from sdq.batches import Normalization
from sdq.errors import RunError
from sdq.quant_model import QuantModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # qonnx imports deprecated parts of other packages
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit

FILE = "model_qonnx.onnx"
EXECUTOR = "qonnx executor"
RUNTIMES = (EXECUTOR,)
REWRITES: tuple[str, ...] = ()
ADVICE: dict[str, str] = {}
DOMAIN = "qonnx.custom_op.general"

metadata = graph.file_metadata

_QUANTIZERS = ("Quant", "BipolarQuant")
_MAKERS = (*_QUANTIZERS, *channels.JOINS)


def check(qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
    """Return nothing: whatever can be quantized can be written."""
    return ()


def rehearse(qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
    """Return what the exporter cannot write; see :func:`export.rehearse`."""
    return tracing.rehearse(qmodel, "qonnx", sample)


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
    graph.save(network_graph(qmodel, sample, preprocessing), folder / FILE, metadata)


def network_graph(
    qmodel: QuantModel, sample: Tensor, preprocessing: Normalization | None
) -> onnx.ModelProto:
    """Return a network as a QONNX graph with a free batch size.

    Raises:
        RunError: the exporter failed.
    """
    model = trace(qmodel, "qonnx", sample)
    if preprocessing is not None:
        graph.prepend_preprocessing_(model, preprocessing)
    return _cleaned(model)


def bits(path: Path) -> dict[str, Bits]:
    """Return the bits of each layer's weight and each activation quantizer: from Quant nodes."""
    return graph.bits_by_name(path, quantizers(path))


def quantizers(path: Path) -> dict[str, QuantizerInFile]:
    """Return the quantizers in the file: weights by layer, activations by path.

    Raises:
        RequestError: not a file of ours.
        RunError: a Quant node with a bitwidth that is not a whole number.
    """
    model = graph.load(path)
    values, makers = graph.constants(model), graph.producers(model)
    found = {}
    for layer, node in graph.multiplications(model, graph.layers(model)).items():
        quantizer, transposed = graph.weight_maker(makers, node, _MAKERS)
        if quantizer is not None:
            join = channels.Join.of(makers, values, quantizer.output[0])
            pieces = [_quantizer(layer, makers, tensor) for tensor in join.tensors]
            codes, units = zip(*(_codes(layer, x, values) for x in pieces), strict=True)
            widths = [_bits(layer, x, values, 8) for x in pieces]
            whole = graph.output_channels_first(node, join(list(codes)), transposed)
            found[layer] = QuantizerInFile(
                join.bits(widths, list(codes)),
                graph.vector(join(list(units))),
                torch.from_numpy(np.array(whole)).int(),
            )
    for quantizer in _act_quantizers(model, values):
        name = quantizer.name.removesuffix(".quant")
        scale = graph.vector(values[quantizer.input[1]])
        found[name] = QuantizerInFile(_bits(name, quantizer, values, 16), scale)
    return found


def run(path: Path, inputs: Tensor) -> Tensor:
    """Run the file in qonnx's executor."""
    return open_runtime(path, EXECUTOR, taps=False)(inputs).output


def open_runtime(path: Path, runtime: str, *, taps: bool) -> Runner:
    """Return a runner in qonnx's executor.

    Raises:
        RunError: the executor fails in the file.
    """
    file = graph.load(path)
    tensors = tapped_tensors(file) if taps else {}
    fixed: dict[int, ModelWrapper] = {}

    def once(inputs: Tensor) -> Trace:
        try:
            if len(inputs) not in fixed:
                fixed[len(inputs)] = with_batch(file, len(inputs))
            feed = {file.graph.input[0].name: inputs.numpy()}
            context = execute_onnx(fixed[len(inputs)], feed, return_full_exec_context=True)
        except Exception as error:
            raise RunError(f"{path}: qonnx cannot run it: {error}") from error
        codes = {
            name: torch.from_numpy(np.rint(context[tensor] / scale.numpy()).astype(np.int32))
            for name, (tensor, scale) in tensors.items()
        }
        return Trace(torch.from_numpy(context[file.graph.output[0].name]), codes)

    return once


def open_exact(path: Path) -> Runner:
    """Return a runner in float64."""
    model = graph.load(path)
    tensors = tapped_tensors(model)
    interpreter = Interpreter(model)

    def once(inputs: Tensor) -> Trace:
        found = interpreter(inputs, [tensor for tensor, _ in tensors.values()])
        codes = {
            name: torch.round(found[tensor] / scale.double()).int()
            for name, (tensor, scale) in tensors.items()
        }
        return Trace(found[interpreter.output], codes)

    return once


def _cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply qonnx's cleanup, but for the steps that rename, or that would fix the batch size."""
    for node in model.graph.node:
        if node.op_type in _QUANTIZERS:
            node.domain = DOMAIN
    wrapper = ModelWrapper(model)
    # Shape is left alone: its folding would write the free batch size as 0
    for step in (
        InferShapes(),
        FoldConstants([*_QUANTIZERS, "Shape"]),
        FoldTransposeIntoQuantInit(),
    ):
        wrapper = wrapper.transform(step)
    cleaned: onnx.ModelProto = wrapper.model
    graph.remove_unused_(cleaned)
    del cleaned.graph.value_info[:]
    return cleaned


def with_batch(file: onnx.ModelProto, size: int) -> ModelWrapper:
    """Return a copy of a graph with a fixed batch size, and with the shape of every tensor."""
    model = onnx.ModelProto()
    model.CopyFrom(file)
    for entry in [*model.graph.input, *model.graph.output]:
        entry.type.tensor_type.shape.dim[0].dim_value = size
    while _fold_shapes_(model):  # what was folded may show the shapes of more
        pass
    return ModelWrapper(model).transform(InferShapes())


def _fold_shapes_(model: onnx.ModelProto) -> bool:
    """Put constants in the place of Shape nodes and what follows from them; False: there are none.

    The executor wants every shape written down. Its own folding does one node at a time, and takes
    minutes where a network has hundreds.
    """
    standard = onnx.ModelProto()
    standard.CopyFrom(model)
    for node in standard.graph.node:
        if node.op_type in _QUANTIZERS:  # a quantizer keeps shapes
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(standard, data_prop=True).graph
    known = {}
    for entry in [*inferred.input, *inferred.value_info]:
        shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
        if entry.type.tensor_type.HasField("shape") and all(shape):
            known[entry.name] = shape
    found = [n for n in model.graph.node if n.op_type == "Shape" and n.input[0] in known]
    for node in found:
        start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end", 99)
        values = np.array(known[node.input[0]][start:end], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    fold_constants_(model)
    return bool(found)


def _quantizer(layer: str, makers: Mapping[str, onnx.NodeProto], tensor: str) -> onnx.NodeProto:
    maker = makers.get(tensor)
    if maker is None or maker.op_type not in _QUANTIZERS:
        raise RunError(f"export: {layer}: {tensor!r} must be made by a Quant or BipolarQuant")
    return maker


def _bits(name: str, quantizer: onnx.NodeProto, values: dict[str, np.ndarray], most: int) -> int:
    if quantizer.op_type == "BipolarQuant":
        return 1
    width = float(values[quantizer.input[3]])
    if not (width.is_integer() and 2 <= width <= most):
        raise RunError(f"export: {name}: bits of its Quant node must be 2 to {most}, got {width}")
    return int(width)


def _codes(
    layer: str, quantizer: onnx.NodeProto, values: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes a weight's quantizer gives, by its definition, and their scale."""
    single = values[quantizer.input[1]]
    x, scale = values[quantizer.input[0]].astype(np.float64), single.astype(np.float64)
    if quantizer.op_type == "BipolarQuant":
        return np.where(x >= 0, 1.0, -1.0), single
    zero, width = (float(values[name]) for name in quantizer.input[2:4])
    signed, narrow = (
        int(graph.attribute(quantizer, k, d)) for k, d in (("signed", 1), ("narrow", 0))
    )
    low = -(2.0 ** (width - 1)) + narrow if signed else 0.0
    high = 2.0 ** (width - 1) - 1 if signed else 2.0**width - 1 - narrow
    codes: np.ndarray = np.rint(x / scale + zero).clip(low, high)
    if zero == -0.5:  # q + 1/2 steps are 2 q + 1 code units of half a step
        return 2 * codes + 1, single / 2
    if zero:
        raise RunError(f"export: {layer}: the weight's zero point must be 0 or -0.5, got {zero}")
    return codes, single


def _act_quantizers(model: onnx.ModelProto, values: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "Quant" and n.input[0] not in values]


def tapped_tensors(model: onnx.ModelProto) -> dict[str, tuple[str, Tensor]]:
    """Return the output of each activation quantizer, and its scale."""
    values = graph.constants(model)
    return {
        node.name.removesuffix(".quant"): (node.output[0], graph.vector(values[node.input[1]]))
        for node in _act_quantizers(model, values)
    }
