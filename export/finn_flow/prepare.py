"""Exact rewriting of a QONNX graph into what FINN+ has hardware for.

Every rule keeps all integer codes as they are. Each is written for one thing that FINN+ 1.6.1
refuses, or that would leave floating-point layers in the hardware:

- a quantizer behind a max pooling or a flattening moves in front of it (rounding is monotone),
- a ReLU before a signed quantizer makes that an unsigned one of one bit less,
- a ReLU6 (Clip) becomes a ReLU, and thresholds above its bound cannot be reached,
- a mean over rows and columns becomes a global average pooling,
- an average pooling becomes a depthwise convolution with weights of 2 and a division,
- strided slices and padded channels become a 1x1 convolution with weights of 0 and 2, halved,
- quantized weights become integers (:mod:`weights`),
- a convolution's rows and columns of taps that meet nothing but padding are left out,
- a cast of pixels is taken away: FINN's graphs hold integers in float32.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto, TensorProto, helper
from qonnx.core.datatype import DataType
from qonnx.core.modelwrapper import ModelWrapper

from .graph_edits import attribute, constant, insert_, replace_, set_attribute_
from .origin import FLATTEN, Origin, origin, set_origin_
from .weights import integer_weight_


def prepare_(model: ModelWrapper) -> None:
    """Rewrite a graph with static shapes, and note at each activation quantizer where it is from.

    Args:
        model: changed in place.
    """
    for quant in model.graph.node:
        if _is_act_quant(model, quant):
            set_origin_(quant, Origin(quant.name.removesuffix(".quant"), _lowest(model, quant)))
    for rule in _RULES:
        while any(rule(model, node) for node in list(model.graph.node)):
            pass


def _lowest(model: ModelWrapper, quant: NodeProto) -> int:
    if not attribute(quant, "signed", 1):
        return 0
    width = int(model.get_initializer(quant.input[3]))
    return int(-(2 ** (width - 1)) + attribute(quant, "narrow", 0))


def _is_act_quant(model: ModelWrapper, node: NodeProto) -> bool:
    return node.op_type == "Quant" and model.get_initializer(node.input[0]) is None


def _move_quantizer_forward_(model: ModelWrapper, quant: NodeProto) -> bool:
    """``quantize(pool(x))`` is ``pool(quantize(x))`` where the scale is one number."""
    if not _is_act_quant(model, quant) or model.get_initializer(quant.input[1]).size != 1:
        return False
    before = model.find_producer(quant.input[0])
    if before is None or before.op_type not in ("MaxPool", "Flatten", "Reshape"):
        return False
    flattens = before.op_type != "MaxPool"
    if flattens and len(model.get_tensor_shape(before.output[0])) != 2:
        return False
    inputs = {entry.name for entry in model.graph.input}
    if before.input[0] in inputs or len(model.find_consumers(before.output[0])) != 1:
        return False
    found = origin(quant)
    if found is not None:
        name = FLATTEN if flattens else before.name
        set_origin_(quant, replace(found, behind=(name, *found.behind)))
    middle, output = before.output[0], quant.output[0]
    quant.input[0], quant.output[0] = before.input[0], middle
    before.input[0], before.output[0] = middle, output
    model.set_tensor_shape(middle, model.get_tensor_shape(quant.input[0]))
    nodes = list(model.graph.node)
    first, second = nodes.index(before), nodes.index(quant)
    model.graph.node.remove(quant)
    model.graph.node.insert(first, quant)
    assert first < second
    return True


def _share_no_relu_(model: ModelWrapper, relu: NodeProto) -> bool:
    """FINN takes a quantizer's ReLU away, whoever else reads it: give each reader its own."""
    if relu.op_type not in ("Relu", "Clip"):
        return False
    readers = model.find_consumers(relu.output[0])
    if len(readers) < 2:
        return False
    own = NodeProto()
    own.CopyFrom(relu)
    own.name, own.output[0] = f"{relu.name}.again", f"{relu.output[0]}.again"
    while model.get_node_from_name(own.name) is not None:
        own.name, own.output[0] = f"{own.name}.again", f"{own.output[0]}.again"
    model.set_tensor_shape(own.output[0], model.get_tensor_shape(relu.output[0]))
    for i, name in enumerate(readers[-1].input):
        if name == relu.output[0]:
            readers[-1].input[i] = own.output[0]
    insert_(model, relu, [own])
    return True


def _clip_to_relu_(model: ModelWrapper, clip: NodeProto) -> bool:
    """A bound above is a threshold that is never reached."""
    if clip.op_type != "Clip" or len(clip.input) < 3:
        return False
    low, high = (model.get_initializer(name) for name in clip.input[1:3])
    readers = model.find_consumers(clip.output[0])
    if low is None or high is None or float(low) != 0 or len(readers) != 1:
        return False
    found = origin(readers[0])
    if found is None:
        return False
    set_origin_(readers[0], replace(found, ceiling=float(high)))
    relu = helper.make_node("Relu", clip.input[:1], list(clip.output), clip.name)
    replace_(model, clip, [relu])
    return True


def _drop_the_sign_(model: ModelWrapper, quant: NodeProto) -> bool:
    """Behind a ReLU the codes of ``b`` signed bits are those of ``b - 1`` bits without sign."""
    if not _is_act_quant(model, quant) or not attribute(quant, "signed", 1):
        return False
    before = model.find_producer(quant.input[0])
    width = float(model.get_initializer(quant.input[3]))
    if before is None or before.op_type != "Relu" or width < 2:
        return False
    set_attribute_(quant, "signed", 0)
    set_attribute_(quant, "narrow", 0)
    bits = np.asarray(width - 1, np.float32)
    quant.input[3] = constant(model, f"{quant.name}.unsigned.bits", bits)
    found = origin(quant)
    if found is not None:
        set_origin_(quant, replace(found, low=0))
    return True


def _mean_to_pool_(model: ModelWrapper, mean: NodeProto) -> bool:
    """Averaging rows and columns is global average pooling."""
    shape = model.get_tensor_shape(mean.input[0]) if mean.op_type == "ReduceMean" else None
    if shape is None or len(shape) != 4:
        return False
    axes = sorted(axis % 4 for axis in attribute(mean, "axes", []))
    if axes != [2, 3]:
        return False
    output = mean.output[0]
    if attribute(mean, "keepdims", 1):
        nodes = [helper.make_node("GlobalAveragePool", mean.input[:1], [output], mean.name)]
    else:
        middle = f"{output}.pooled"
        model.set_tensor_shape(middle, [*shape[:2], 1, 1])
        nodes = [
            helper.make_node("GlobalAveragePool", mean.input[:1], [middle], mean.name),
            helper.make_node("Flatten", [middle], [output], f"{mean.name}.flatten", axis=1),
        ]
    replace_(model, mean, nodes)
    return True


def _average_to_conv_(model: ModelWrapper, pool: NodeProto) -> bool:
    """An average is a sum, which is a depthwise convolution, divided by the window's size."""
    if pool.op_type != "AveragePool":
        return False
    kernel = attribute(pool, "kernel_shape", [])
    pads = attribute(pool, "pads", [0] * 4)
    padded = any(pads) and not attribute(pool, "count_include_pad", 0)
    if len(kernel) != 2 or padded or attribute(pool, "ceil_mode", 0):
        return False
    shape = model.get_tensor_shape(pool.input[0])
    assert shape is not None
    channels = shape[1]
    ones = np.ones((channels, 1, *kernel), np.float32)
    weight = _integers(model, f"{pool.name}.weight", ones)
    size = constant(model, f"{pool.name}.size", np.asarray(2 * np.prod(kernel), np.float32))
    middle = f"{pool.output[0]}.sum"
    model.set_tensor_shape(middle, model.get_tensor_shape(pool.output[0]))
    conv = helper.make_node(
        "Conv", [pool.input[0], weight], [middle], pool.name, group=channels, kernel_shape=kernel,
        pads=pads, strides=attribute(pool, "strides", [1, 1]), dilations=[1, 1],
    )  # fmt: skip
    divide = helper.make_node("Div", [middle, size], list(pool.output), f"{pool.name}.divide")
    replace_(model, pool, [conv, divide])
    return True


def _integers(model: ModelWrapper, name: str, values: np.ndarray) -> str:
    """Store weights of 0 and 1 doubled: FINN narrows types, and has no layer for binary ones."""
    model.set_initializer(name, 2 * values)
    model.set_tensor_datatype(name, DataType["INT3"])
    return name


def _subsample_to_conv_(model: ModelWrapper, first: NodeProto) -> bool:
    """Every other pixel, and channels of zeros around the others: a 1x1 convolution selects."""
    shape = model.get_tensor_shape(first.input[0]) if first.op_type in _SELECTS else None
    if shape is None or len(shape) != 4:
        return False
    chain, strides, front = [first], [1, 1], 0
    while True:
        taken = _stride(model, chain[-1]) or _front(model, chain[-1])
        if taken is None:
            return False
        if chain[-1].op_type == "Slice":
            strides = [a * b for a, b in zip(strides, taken, strict=True)]
        else:
            front += taken[0]
        readers = model.find_consumers(chain[-1].output[0])
        if len(readers) != 1 or readers[0].op_type not in _SELECTS:
            break
        chain.append(readers[0])
    output = model.get_tensor_shape(chain[-1].output[0])
    assert output is not None
    select = np.zeros((output[1], shape[1], 1, 1), np.float32)
    select[front + np.arange(shape[1]), np.arange(shape[1])] = 1
    same = output[1] == shape[1]
    weight = _integers(model, f"{first.name}.select", select[:, :1] * 0 + 1 if same else select)
    middle = f"{chain[-1].output[0]}.doubled"
    model.set_tensor_shape(middle, output)
    half = constant(model, f"{first.name}.half", np.asarray(0.5, np.float32))
    halve = helper.make_node("Mul", [middle, half], list(chain[-1].output), f"{first.name}.halve")
    conv = helper.make_node(
        "Conv", [first.input[0], weight], [middle], first.name,
        group=shape[1] if same else 1, kernel_shape=[1, 1], pads=[0] * 4, strides=strides,
        dilations=[1, 1],
    )  # fmt: skip
    replace_(model, chain[-1], [conv, halve])
    for node in chain[:-1]:
        model.graph.node.remove(node)
    return True


_SELECTS = ("Slice", "Pad")


def _stride(model: ModelWrapper, node: NodeProto) -> list[int] | None:
    """Return the strides of a Slice that takes every n-th row and column from the first on."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return None
    values = [model.get_initializer(name) for name in node.input[1:]]
    if any(value is None for value in values):
        return None
    starts, ends, axes = values[:3]
    steps = values[3] if len(values) > 3 else np.ones_like(axes)
    shape = model.get_tensor_shape(node.input[0])
    assert shape is not None
    found = {2: 1, 3: 1}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        whole = start == 0 and end >= shape[axis % 4]
        if not whole or step < 1 or (axis % 4 not in found and step != 1):
            return None
        if axis % 4 in found:
            found[axis % 4] *= int(step)
    return [found[2], found[3]]


def _front(model: ModelWrapper, node: NodeProto) -> list[int] | None:
    """Return how many channels of zeros a Pad puts in front, if it pads nothing but channels."""
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return None
    pads = model.get_initializer(node.input[1])
    fill = model.get_initializer(node.input[2]) if len(node.input) > 2 and node.input[2] else 0
    if pads is None or fill is None or np.any(fill) or len(pads) != 8:
        return None
    others = np.delete(pads, [1, 5])
    return None if others.any() or (pads < 0).any() else [int(pads[1])]


def _trim_kernel_(model: ModelWrapper, conv: NodeProto) -> bool:
    """On a map of one row or column, all taps but one row or column meet the padding.

    FINN takes a map of height 1 for a signal, and refuses a padded 3x3 convolution on it.
    """
    if conv.op_type != "Conv":
        return False
    shape, weight = model.get_tensor_shape(conv.input[0]), model.get_initializer(conv.input[1])
    if shape is None or len(shape) != 4 or weight is None:
        return False
    output = model.get_tensor_shape(conv.output[0])
    assert output is not None
    pads, strides = attribute(conv, "pads", [0] * 4), attribute(conv, "strides", [1, 1])
    dilations = attribute(conv, "dilations", [1, 1])
    changed = False
    for i in (0, 1):
        tap, between = divmod(pads[i], dilations[i])
        taps = weight.shape[i + 2]
        if shape[i + 2] != 1 or output[i + 2] != 1 or between or not (pads[i] or taps > 1):
            continue
        weight = weight.take([tap], i + 2)
        pads[i] = pads[i + 2] = 0
        strides[i] = dilations[i] = 1
        changed = True
    if changed:
        kind = model.get_tensor_datatype(conv.input[1])
        conv.input[1] = constant(model, f"{conv.input[1]}.trimmed", weight)
        model.set_tensor_datatype(conv.input[1], kind)
        values = {"pads": pads, "strides": strides, "dilations": dilations}
        for name, value in (values | {"kernel_shape": weight.shape[2:]}).items():
            set_attribute_(conv, name, value)
    return changed


def _unread_(model: ModelWrapper, node: NodeProto) -> bool:
    """Remove what nobody reads any more: FINN refuses quantizers it has no use for."""
    results = {entry.name for entry in model.graph.output}
    if any(name in results or model.find_consumers(name) for name in node.output):
        return False
    model.graph.node.remove(node)
    return True


def _pixels_to_float_(model: ModelWrapper, cast: NodeProto) -> bool:
    """Let a graph of uint8 pixels take the same integers in float32."""
    entry = model.graph.input[0]
    kind = entry.type.tensor_type
    if cast.op_type != "Cast" or cast.input[0] != entry.name:
        return False
    kind.elem_type = TensorProto.FLOAT
    for reader in model.find_consumers(cast.output[0]):
        for i, name in enumerate(reader.input):
            if name == cast.output[0]:
                reader.input[i] = entry.name
    model.graph.node.remove(cast)
    model.set_tensor_datatype(entry.name, DataType["UINT8"])
    model.set_tensor_layout(entry.name, ["N", "H", "W", "C"])
    return True


_RULES: tuple[Callable[[ModelWrapper, NodeProto], bool], ...] = (
    _pixels_to_float_,
    integer_weight_,
    _unread_,
    _mean_to_pool_,
    _move_quantizer_forward_,
    _share_no_relu_,
    _clip_to_relu_,
    _drop_the_sign_,
    _subsample_to_conv_,
    _average_to_conv_,
    _trim_kernel_,
)
