"""ONNX with QuantizeLinear, Clip and DequantizeLinear: what onnxruntime reads.

Weights of every bitwidth are int8 initializers followed by a Clip to their range of codes; one bit
is codes -1 and +1 with a Clip to (-1, 1), because ONNX has no binary type. Quantizers without a
level at zero have odd codes, with a Clip to -(2^b - 1) and 2^b - 1; at 8 bits these reach to 255,
beyond int8, and ``c = 2 q + 1`` is stored as ``q``, with an Add of 1/2 after the DequantizeLinear.
Where the channels of a weight have bits of their own, those of one bitwidth are an initializer with
a Clip, and are put together before the DequantizeLinear (:mod:`export.channels`).
Activations are quantized to 8-bit integers and clipped to theirs; more bits are refused. The batch
size is free.

onnxruntime runs the file as it stands; with all optimisations on it fuses parts of it into integer
kernels, which round in other places: the two are judged apart. On x86 processors without VNNI its
default integer kernels add pairs of products in 16 bits, which overflow where a layer has 8-bit
weights and 8-bit activations; the session option ``session.x64quantprecision`` = ``1`` selects
kernels that do not. The optimised runtime has it set, and what the defaults give on this machine
is reported as well.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from export import channels, graph, qdq, tracing
from export.findings import Finding
from export.float64 import Interpreter
from export.format import Bits, QuantizerInFile, Runner, Trace
from export.tracing import OPSET, trace
from sdq.batches import Normalization
from sdq.errors import RunError
from sdq.quant_model import QuantModel

FILE = "model.onnx"
AS_WRITTEN = "onnxruntime, optimisations off"
OPTIMISED = "onnxruntime, optimisations on"
DEFAULTS = "onnxruntime, default options"
RUNTIMES = (AS_WRITTEN, OPTIMISED, DEFAULTS)
REWRITES = (OPTIMISED, DEFAULTS)
ADVICE = {
    DEFAULTS: "its 8-bit kernels overflow on processors without VNNI: set the session option "
    "session.x64quantprecision to 1"
}

OPSETS = range(13, 26)

metadata = graph.file_metadata

_DEQUANTIZERS = ("DequantizeLinear", "Mul")

_LEVELS = {
    AS_WRITTEN: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    OPTIMISED: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    DEFAULTS: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def check(qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
    """Return the activations of more than 8 bits: QuantizeLinear has them from opset 21 on, and
    there are no integer kernels to gain.
    """
    return tuple(
        Finding(
            name, "must have at most 8 bits in onnx, or 32 for float",
            f"{quantizer.bits}", "--act-bits 8, or --format qonnx",
        )
        for name, quantizer in qmodel.act_quantizers().items()
        if quantizer.bits > 8
    )  # fmt: skip


def rehearse(qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
    """Return what the exporter cannot write; see :func:`export.rehearse`."""
    return tracing.rehearse(qmodel, "qcdq", sample)


def write(
    qmodel: QuantModel,
    folder: Path,
    *,
    sample: Tensor,
    preprocessing: Normalization | None = None,
    metadata: Mapping[str, str],
    opset: int = OPSET,
) -> None:
    """Write the network; see :func:`export.write` for the arguments.

    Raises:
        RunError: the exporter failed, or its graph is not valid ONNX.
    """
    save(graph_of(qmodel, sample, preprocessing, opset), folder / FILE, metadata)


def graph_of(
    qmodel: QuantModel, sample: Tensor, preprocessing: Normalization | None, opset: int
) -> onnx.ModelProto:
    """Return the graph that :func:`write` writes.

    Raises:
        RunError: the exporter failed.
    """
    model = trace(qmodel, "qcdq", sample, opset)
    qdq.to_unsigned_(model)
    qdq.quantize_before_relu_(model)
    qdq.flatten_codes_(model)
    qdq.count_inside_(model)
    qdq.shorten_names_(model)
    if preprocessing is not None:
        graph.prepend_preprocessing_(model, preprocessing)
    return model


def save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph, once it is found valid.

    Raises:
        RunError: it is not valid ONNX.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunError(f"export: the graph must be valid ONNX, but: {error}") from error
    graph.save(model, path, metadata)


def bits(path: Path) -> dict[str, Bits]:
    """Return the bits of each layer's weight and each activation quantizer: from the Clips."""
    return graph.bits_by_name(path, quantizers(path))


def quantizers(path: Path) -> dict[str, QuantizerInFile]:
    """Return the quantizers in the file: weights by layer, activations by path.

    Raises:
        RequestError: not a file of ours.
        RunError: a Clip whose range no bitwidth has.
    """
    model = graph.load(path)
    values, makers = graph.constants(model), graph.producers(model)
    found = {}
    for layer, node in graph.multiplications(model, graph.layers(model)).items():
        dequantizer, transposed = graph.weight_maker(makers, node, _DEQUANTIZERS)
        if dequantizer is not None:
            found[layer] = _weight(layer, node, dequantizer, transposed, values, makers)
    readers = qdq.readers_of(model)
    for quantize in qdq.act_quantizers(model):
        clips = [c for c in qdq.clips_after(readers, quantize.output[0]) if not qdq.is_relu(c)]
        low, high = _range(clips[0] if clips else None, values[quantize.input[2]].dtype, values)
        zero = int(values[quantize.input[2]])
        low, high = low - zero, high - zero
        name = quantize.name.removesuffix(".quantizelinear")
        scale = graph.vector(values[quantize.input[1]])
        found[name] = QuantizerInFile(graph.bits_of_range(name, low, high), scale)
    return found


def container_bytes(path: Path) -> int:
    """Return the bytes that the weights take in the file."""
    return graph.stored_weight_bytes(graph.load(path))


def run(path: Path, inputs: Tensor) -> Tensor:
    """Run the file in onnxruntime, optimisations on, with kernels that do not overflow."""
    return open_runtime(path, OPTIMISED, taps=False)(inputs).output


def open_runtime(path: Path, runtime: str, *, taps: bool) -> Runner:
    """Return a runner in onnxruntime.

    Raises:
        RunError: onnxruntime refuses the file, or fails in it.
    """
    model = graph.load(path)
    tensors = _taps(model) if taps else {}
    for tensor, _ in tensors.values():
        kind = onnx.TensorProto.UINT8
        model.graph.output.append(helper.make_tensor_value_info(tensor, kind, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[runtime]
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    if runtime == OPTIMISED:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise RunError(f"{path}: onnxruntime cannot load it: {error}") from error
    names = [model.graph.output[0].name, *(tensor for tensor, _ in tensors.values())]

    def once(inputs: Tensor) -> Trace:
        try:
            results: list[Any] = session.run(names, {model.graph.input[0].name: inputs.numpy()})
        except Exception as error:
            raise RunError(f"{path}: onnxruntime cannot run it: {error}") from error
        output, *codes = (torch.from_numpy(x) for x in results)
        found = zip(tensors.items(), codes, strict=True)
        return Trace(output, {name: x.int() - zero for (name, (_, zero)), x in found})

    return once


def open_exact(path: Path) -> Runner:
    """Return a runner in float64."""
    model = graph.load(path)
    tensors = _taps(model)
    interpreter = Interpreter(model)

    def once(inputs: Tensor) -> Trace:
        found = interpreter(inputs, [tensor for tensor, _ in tensors.values()])
        codes = {name: found[x].int() - zero for name, (x, zero) in tensors.items()}
        return Trace(found[interpreter.output], codes)

    return once


def _weight(
    layer: str,
    node: onnx.NodeProto,
    dequantizer: onnx.NodeProto,
    transposed: bool,
    values: graph.Constants,
    makers: dict[str, onnx.NodeProto],
) -> QuantizerInFile:
    halved = dequantizer.op_type == "Mul"
    scale = values[dequantizer.input[1]]
    if halved:  # DequantizeLinear, Add, Mul
        add = makers[dequantizer.input[0]]
        dequantizer = makers[add.input[0]]
        if float(values[add.input[1]]) != 0.5 or (values[dequantizer.input[1]] != 1).any():
            raise RunError(f"export: {layer}: the weight must be q + 1/2 times its scale")
    join = channels.Join.of(makers, values, dequantizer.input[0])
    pieces, widths = [], []
    for tensor in join.tensors:
        clip = makers.get(tensor)
        stored = values[clip.input[0] if clip is not None else tensor]
        low, high = _range(clip, stored.dtype, values)
        pieces.append(stored.clip(low, high))
        widths.append(graph.bits_of_range(layer, low, high, pieces[-1], halved=halved))
    codes = join(pieces)
    if len(dequantizer.input) > 2 and values[dequantizer.input[2]].any():
        raise RunError(f"export: {layer}: the weight's zero point must be 0")
    bits = join.bits(widths, pieces)
    if halved:  # q + 1/2 steps are 2 q + 1 code units of half a step
        codes, scale = 2 * codes.astype(np.int16) + 1, scale / 2
    as_torch = graph.output_channels_first(node, codes, transposed)
    return QuantizerInFile(bits, graph.vector(scale), torch.from_numpy(np.array(as_torch)).int())


def _range(
    clip: onnx.NodeProto | None, kind: np.dtype[Any], values: dict[str, np.ndarray]
) -> tuple[int, int]:
    if clip is None:
        return int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    return int(values[clip.input[1]]), int(values[clip.input[2]])


def _taps(model: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    """Return the tensor that holds an activation's codes, by quantizer, and its zero point."""
    values, readers = graph.constants(model), qdq.readers_of(model)
    found = {}
    for quantize in qdq.act_quantizers(model):
        last = [quantize, *qdq.clips_after(readers, quantize.output[0])][-1]
        name = quantize.name.removesuffix(".quantizelinear")
        found[name] = (last.output[0], int(values[quantize.input[2]]))
    return found
