"""QuantizeLinear and DequantizeLinear in the form that onnxruntime fuses into integer kernels.

Its kernels take unsigned activations: it turns signed ones into unsigned ones itself, but not those
that several nodes read, and an addition of a signed and an unsigned tensor stays in float. So all
activations are uint8 here, signed ones with the zero point 128. Nor does it fuse a layer with a
quantizer behind a Relu, unless the zero point is 0; rounding keeps order, so the Relu may as well
come after it, as a Clip of the integers.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import itertools
import re
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor

from export import graph

_OPERATOR = re.compile(r"\.(de)?quantizelinear(?=\.(scale|zero_point)$)")

OFFSET = 128
"""The zero point of signed activations."""


def state_integer_biases_(
    model: onnx.ModelProto, biases: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Store biases as int32 codes with a DequantizeLinear.

    Args:
        model: changed in place. Biases that are added by a node of their own stay as they are.
        biases: codes ``(K,)`` and unit, ``(K,)`` or one value, by layer.
    """
    nodes: list[onnx.NodeProto] = []
    initializers = []
    for node in list(model.graph.node):
        layer = node.name.partition("#")[0]
        if node.op_type not in graph.MULTIPLIES or len(node.input) < 3 or layer not in biases:
            continue
        name = f"{layer}.bias.dequantizelinear"
        node.input[2] = name
        if any(n.name == name for n in nodes):  # the layer is called twice
            continue
        codes, scale = (value.numpy() for value in biases[layer])
        scale = scale if len(scale) > 1 else scale.reshape(())
        inputs = [f"{layer}.bias", f"{name}.scale"]
        initializers += [
            numpy_helper.from_array(value, key)
            for key, value in zip(inputs, (codes, scale), strict=True)
        ]
        axis = {"axis": 0} if scale.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name, **axis))
    graph.remove_unused_(model)  # the float ones, which may have the same names
    model.graph.initializer.extend(initializers)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def act_quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the QuantizeLinear nodes, in execution order: there is one for each activation."""
    return [node for node in model.graph.node if node.op_type == "QuantizeLinear"]


def clips_after(readers: Mapping[str, list[onnx.NodeProto]], tensor: str) -> list[onnx.NodeProto]:
    """Return the Clips that stand one after the other behind a tensor.

    Args:
        readers: of :func:`readers_of`.
        tensor: the output of a QuantizeLinear.
    """
    found: list[onnx.NodeProto] = []
    while True:
        clip = next((n for n in readers.get(tensor, ()) if n.op_type == "Clip"), None)
        if clip is None:
            return found
        found.append(clip)
        tensor = clip.output[0]


def readers_of(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each tensor."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def is_relu(clip: onnx.NodeProto) -> bool:
    """Tell whether a Clip of integers is a Relu: it has no upper end."""
    return len(clip.input) < 3 or not clip.input[2]


def to_unsigned_(model: onnx.ModelProto) -> None:
    """Store signed activations as uint8 with the zero point 128.

    Each DequantizeLinear of an activation reads the QuantizeLinear's own scale and zero point.
    """
    stored = {x.name: x for x in model.graph.initializer}
    readers = readers_of(model)
    for quantize in act_quantizers(model):
        clips = clips_after(readers, quantize.output[0])
        last = clips[-1] if clips else quantize
        for reader in readers.get(last.output[0], ()):
            if reader.op_type == "DequantizeLinear":
                reader.input[1:] = quantize.input[1:]
        zero = stored[quantize.input[2]]
        if numpy_helper.to_array(zero).dtype != np.int8:
            continue
        for name in [zero.name, *(end for clip in clips for end in clip.input[1:])]:
            shifted = numpy_helper.to_array(stored[name]).astype(np.int16) + OFFSET
            stored[name].CopyFrom(numpy_helper.from_array(shifted.astype(np.uint8), name))
    graph.remove_unused_(model)


def quantize_before_relu_(model: onnx.ModelProto) -> None:
    """Move a Relu behind the quantizer that alone reads it, where zero is not the lowest code.

    It becomes a Clip of the integers at the zero point, without an upper end. A MaxPool may stand
    between the two: it keeps order as well.
    """
    values, makers, readers = graph.constants(model), graph.producers(model), readers_of(model)
    outputs = {x.name for x in model.graph.output}

    def read_once(tensor: str) -> bool:
        return tensor not in outputs and len(readers[tensor]) == 1

    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "QuantizeLinear" or not values[node.input[2]].any():
            continue
        reader, relu = node, makers.get(node.input[0])
        while relu is not None and relu.op_type == "MaxPool" and read_once(relu.output[0]):
            reader, relu = relu, makers.get(relu.input[0])
        if relu is None or relu.op_type != "Relu" or not read_once(relu.output[0]):
            continue
        reader.input[0] = relu.input[0]
        name = f"{node.name.removesuffix('.quantizelinear')}.relu"
        after = node.output[0]
        node.output[0] = f"{name}.input"
        nodes.append(helper.make_node("Clip", [node.output[0], node.input[2]], [after], name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    graph.remove_unused_(model)


def flatten_codes_(model: onnx.ModelProto) -> None:
    """Let a Flatten that alone reads a DequantizeLinear have the codes.

    A linear layer is fused with the DequantizeLinear right before it, and with no other.
    """
    makers, readers = graph.producers(model), readers_of(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        maker = makers.get(node.input[0]) if node.op_type == "Flatten" else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        if len(readers[maker.output[0]]) > 1 or "axis" in {a.name for a in maker.attribute}:
            continue
        codes, values = maker.input[0], node.output[0]
        node.input[0], node.output[0] = codes, maker.output[0]
        maker.input[0], maker.output[0] = node.output[0], values
        nodes.remove(maker)
        nodes.append(maker)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def count_inside_(model: onnx.ModelProto) -> None:
    """Let average pooling with ``ceil_mode`` divide by the values that are there.

    onnxruntime's integer kernel with ``count_include_pad`` divides windows that reach beyond the
    map by all they could hold. PyTorch counts padding, but not what is beyond it: so the codes are
    padded, and nothing else is counted. Padded pooling of what is in float stays as it is.
    """
    makers = graph.producers(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        counts = bool(found.get("ceil_mode")) and bool(found.get("count_include_pad"))
        maker, pads = makers.get(node.input[0]), found.get("pads", [])
        codes = maker is not None and maker.op_type == "DequantizeLinear"
        if node.op_type == "AveragePool" and counts and (codes or not any(pads)):
            if maker is not None and any(pads):
                # behind the DequantizeLinear it would be put back into the pooling
                nodes += _padded_codes(model, node, maker, pads)
            kept = [a for a in node.attribute if a.name not in ("pads", "count_include_pad")]
            del node.attribute[:]
            node.attribute.extend(kept)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    graph.remove_unused_(model)


def _padded_codes(
    model: onnx.ModelProto, node: onnx.NodeProto, dequantize: onnx.NodeProto, pads: list[int]
) -> list[onnx.NodeProto]:
    """Return a Pad of an activation's codes and a DequantizeLinear, which the node then reads."""
    name, rank = f"{node.name}.pad", len(pads) // 2
    ends = np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]])
    model.graph.initializer.append(numpy_helper.from_array(ends, f"{name}.pads"))
    codes, *of = dequantize.input
    node.input[0] = f"{name}.values"
    return [
        helper.make_node("Pad", [codes, f"{name}.pads", of[1]], [f"{name}.codes"], name),
        helper.make_node("DequantizeLinear", [f"{name}.codes", *of], [f"{name}.values"],
                         f"{name}.dequantizelinear"),
    ]  # fmt: skip


def shorten_names_(model: onnx.ModelProto) -> None:
    """Number the tensors that nodes make: in a small network long names are a tenth of the file.

    Nodes keep their names, and constants are still named after what they belong to.
    """
    outputs = {x.name for x in model.graph.output}
    taken = {x.name for x in [*model.graph.initializer, *model.graph.input]} | outputs
    made = [name for node in model.graph.node for name in node.output if name not in outputs]
    free = (str(i) for i in itertools.count() if str(i) not in taken)
    names = dict(zip(filter(None, made), free, strict=False))
    for entry in model.graph.initializer:
        short = _OPERATOR.sub("", entry.name)
        if short not in taken:
            taken.add(short)
            names[entry.name] = short
    graph.rename_tensors_(model, names)
