"""Small operations on ONNX graphs: names, constants, metadata, preprocessing, reading back."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper, numpy_helper

from export.format import SCHEMA, Bits, QuantizerInFile
from sdq.batches import Normalization
from sdq.errors import RequestError, RunError
from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.quantizers import code_range, highest_odd_code

MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PREPROCESSING = "sdq_preprocessing"
PIXELS = "pixels"

PACKED = {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4}
"""Types of which several share a byte, with their bits."""

_ROLES = {
    "QuantizeLinear": ("", "scale", "zero_point"),
    "DequantizeLinear": ("", "scale", "zero_point"),
    "Clip": ("", "min", "max"),
    "Quant": ("", "scale", "zero_point", "bits"),
    "BipolarQuant": ("", "scale"),
}
"""What the constant inputs of a quantizer's nodes are called."""

QUANTIZER_NODES = tuple(_ROLES)


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file of ours.

    Raises:
        RequestError: no such file, not ONNX, or not written by this package.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError:
        raise RequestError(f"export: no file {str(path)!r}; write it first") from None
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError):
        model = None  # not ONNX, a folder, or one whose tensors are said to be elsewhere
    if model is None or metadata(model).get("schema") != SCHEMA:
        raise RequestError(
            f"{path}: must be an ONNX file of schema {SCHEMA!r}, got something else; "
            "write it with sdq export"
        )
    return model


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata of a model."""
    return {entry.key: entry.value for entry in model.metadata_props}


def file_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    return metadata(load(path))


def bits_by_name(path: Path, found: Mapping[str, QuantizerInFile]) -> dict[str, Bits]:
    """Return the bits of a file's layers and activation quantizers, given its quantizers."""
    floats: dict[str, Bits] = dict.fromkeys(layers(load(path)), FLOAT_BITS)
    return floats | {name: quantizer.bits for name, quantizer in found.items()}


class Constants(dict[str, np.ndarray]):
    """Constants by name; asking for a tensor that is none raises RunError."""

    def __missing__(self, name: str) -> np.ndarray:
        raise RunError(f"export: tensor {name!r} of the file must be a constant")


def constants(model: onnx.ModelProto) -> Constants:
    """Return the initializers, the outputs of Constant nodes, and what packed codes are cast to."""
    packed = {x.name for x in model.graph.initializer if x.data_type in PACKED}
    found = Constants({x.name: numpy_array(x) for x in model.graph.initializer})
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            found[node.output[0]] = numpy_array(node.attribute[0].t)
        elif node.op_type == "Cast" and node.input[0] in packed:
            found[node.output[0]] = found[node.input[0]]
    return found


def numpy_array(proto: onnx.TensorProto) -> np.ndarray:
    """Return a stored tensor; packed codes in a byte each."""
    values = numpy_helper.to_array(proto)
    return values.astype(np.int8) if proto.data_type in PACKED else values


def stored_weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes that the layers' weights take in a file, without scales and names."""
    stored = {x.name: x for x in model.graph.initializer}
    makers = producers(model)
    waiting = [node.input[1] for node in multiplications(model, layers(model)).values()]
    found = set[str]()
    while waiting:
        tensor = waiting.pop()
        maker = makers.get(tensor)
        if tensor in stored:
            found.add(tensor)
        elif maker is not None:
            waiting += maker.input if maker.op_type == "Concat" else maker.input[:1]
    return sum(tensor_bytes(stored[name]) for name in found)


def tensor_bytes(proto: onnx.TensorProto) -> int:
    """Return the bytes a tensor's values take."""
    count = int(np.prod(proto.dims, dtype=np.int64))
    width = PACKED.get(proto.data_type)
    if width is None:
        return count * helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
    return -(-count * width // 8)


def vector(values: np.ndarray) -> torch.Tensor:
    """Return values as a one-dimensional tensor with memory of its own."""
    return torch.from_numpy(np.array(values).reshape(-1))


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def multiplications(model: onnx.ModelProto, names: Iterable[str]) -> dict[str, onnx.NodeProto]:
    """Return the node that multiplies by each named layer's weight (the first, if called twice)."""
    known = set(names)
    found: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        layer = node.name.partition("#")[0]
        if node.op_type in MULTIPLIES and layer in known:
            found.setdefault(layer, node)
    return found


def layers(model: onnx.ModelProto) -> list[str]:
    """Return the layers' names, in execution order, from the policy in the file's metadata."""
    text = metadata(model).get("policy", "")
    return [bits.name for bits in BitwidthPolicy.from_json(text, "policy in the file")]


def weight_maker(
    makers: Mapping[str, onnx.NodeProto], node: onnx.NodeProto, kinds: Iterable[str]
) -> tuple[onnx.NodeProto | None, bool]:
    """Return the node that makes a layer's quantized weight, and whether it is transposed after.

    Args:
        makers: of :func:`producers`.
        node: of :func:`multiplications`.
        kinds: operators that quantize (or dequantize) a weight; another maker counts as none.
    """
    maker = makers.get(node.input[1])
    transposed = maker is not None and maker.op_type == "Transpose"
    if maker is not None and transposed:
        maker = makers.get(maker.input[0])
    quantized = maker is not None and maker.op_type in kinds
    return (maker if quantized else None), transposed


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return a whole-number attribute of a node, or the default."""
    return next((a.i for a in node.attribute if a.name == name), default)


def output_channels_first(node: onnx.NodeProto, weight: np.ndarray, transposed: bool) -> np.ndarray:
    """Return a layer's weight as PyTorch has it: output channels first, but in a ConvTranspose.

    Args:
        node: the Conv, Gemm or MatMul.
        weight: as the file has it.
        transposed: whether a Transpose stands between the two.
    """
    as_torch = node.op_type.startswith("Conv") or bool(attribute(node, "transB", 0))
    return weight if as_torch != transposed else weight.T


def bits_of_range(
    where: str, low: int, high: int, codes: np.ndarray | None = None, *, halved: bool = False
) -> int:
    """Return the bitwidth that has these lowest and highest codes.

    A range that is symmetric, -1 to 1 or -3 to 3 or the like, is of odd codes alone (2^b codes,
    at one bit -1 and +1); where there are even ones it is two bits without the lowest code. With
    ``halved`` the codes ``2 q + 1`` are stored as ``q``, at one bit -1 and 0.

    Raises:
        RunError: no bitwidth has this range.
    """
    odd = codes is not None and bool((codes % 2 != 0).all())
    for bits in range(1, 9):
        if odd and (low, high) == (-highest_odd_code(bits), highest_odd_code(bits)):
            return bits
    if halved and (low, high) == (-1, 0):
        return 1
    if (low, high) == (-1, 1):
        return 2
    for bits in range(2, 9):
        if (low, high) in (code_range(bits, True), code_range(bits, False)):
            return bits
    raise RunError(f"export: {where}: codes {low} to {high} are of no bitwidth from 1 to 8")


def restore_names_(model: onnx.ModelProto, names: list[str], label: re.Pattern[str]) -> None:
    """Name nodes and tensors after the layers and quantizers they belong to.

    Args:
        model: changed in place.
        names: of layers and activation quantizers; a label holds an index into them.
        label: finds that index in a node's name.
    """
    own = Counter[str]()
    tensors: dict[str, str] = {}
    outputs = {x.name for x in model.graph.output}
    for node in model.graph.node:
        node.doc_string = ""  # may hold paths of the machine that exported
        match = label.search(node.name)
        if not match:
            continue
        name = _node_name(names[int(match[1])], node)
        own[name] += 1
        node.name = name if own[name] == 1 else f"{name}#{own[name]}"
        for i, output in enumerate(node.output):
            if output not in outputs:
                tensors[output] = node.name if i == 0 else f"{node.name}.{i}"
    for entry in model.graph.initializer:
        match = label.match(f"/{entry.name.replace('.', '/', 1)}")
        if match:
            tensors[entry.name] = names[int(match[1])] + entry.name[entry.name.index(".") :]
    rename_tensors_(model, tensors)
    _name_parameters_(model)
    del model.graph.value_info[:]  # shapes under the old names; readers infer them


def _node_name(name: str, node: onnx.NodeProto) -> str:
    if node.op_type in MULTIPLIES:
        return name
    part = "weight." if "/weight_quant/" in node.name else ""
    return f"{name}.{part}{node.op_type.lower()}"


def _name_parameters_(model: onnx.ModelProto) -> None:
    """Give every quantizer parameters of its own, and every layer's weight the layer's name."""
    stored = {x.name: x for x in model.graph.initializer}
    for node in list(model.graph.node):
        if node.name.startswith("/"):  # a node of no layer
            continue
        for i, role in enumerate(_ROLES.get(node.op_type, ())):
            if role and i < len(node.input) and node.input[i] in stored:
                own = onnx.TensorProto()
                own.CopyFrom(stored[node.input[i]])
                own.name = node.input[i] = f"{node.name}.{role}"
                model.graph.initializer.append(own)
        if node.op_type in ("Clip", "DequantizeLinear") and node.input[0] in stored:
            _move_(model, stored, node, 0, node.name.rpartition(".")[0])
        if node.op_type in MULTIPLIES and node.input[1] in stored:
            _move_(model, stored, node, 1, f"{node.name.partition('#')[0]}.weight")
    remove_unused_(model)


def _move_(
    model: onnx.ModelProto,
    stored: dict[str, onnx.TensorProto],
    node: onnx.NodeProto,
    index: int,
    name: str,
) -> None:
    own = onnx.TensorProto()
    own.CopyFrom(stored[node.input[index]])
    node.input[index] = own.name = name
    if name not in stored:
        model.graph.initializer.append(own)
        stored[name] = own


def rename_tensors_(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename tensors wherever they stand."""
    for node in model.graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
    for entry in [*model.graph.initializer, *model.graph.input, *model.graph.output]:
        entry.name = names.get(entry.name, entry.name)


def remove_unused_(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers that nothing reads."""
    needed = {x.name for x in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    initializers = [x for x in model.graph.initializer if x.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(initializers)


def merge_twins_(model: onnx.ModelProto) -> None:
    """Let a layer that is called twice have its weight, and the weight's quantizer, once."""
    content = {
        x.name: (x.data_type, tuple(x.dims), numpy_helper.to_array(x).tobytes())
        for x in model.graph.initializer
    }
    seen: dict[object, str] = {}
    names: dict[str, str] = {}
    fixed: dict[str, object] = dict(content)
    for node in model.graph.node:
        if not all(x in fixed for x in node.input) or len(node.output) != 1:
            continue
        owner = node.name.partition("#")[0]
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
        key = (owner, node.op_type, attributes, tuple(fixed[x] for x in node.input))
        if owner.startswith("/"):  # a node of no layer
            continue
        first = seen.setdefault(key, node.output[0])
        fixed[node.output[0]] = first
        if first != node.output[0]:
            names[node.output[0]] = first
    for node in model.graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
    remove_unused_(model)


def add_half_a_step_(model: onnx.ModelProto, layers: Iterable[str]) -> None:
    """Let weights that are stored as ``q`` be ``(q + 1/2)`` times the scale.

    DequantizeLinear has no such zero point: it gets the scale 1, and an Add and a Mul follow, which
    round once, as PyTorch does. Wider integers would need no Add; but onnxruntime's optimiser takes
    every DequantizeLinear before a multiplication for int8, and quantizes constants of float anew.

    Args:
        model: changed in place.
        layers: whose weights these are.
    """
    stored = {x.name: x for x in model.graph.initializer}
    names = {f"{layer}.weight.dequantizelinear": f"{layer}.weight" for layer in layers}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.name not in names:
            continue
        weight = names[node.name]
        entry = stored[node.input[1]]
        scale = numpy_helper.to_array(entry)
        entry.CopyFrom(numpy_helper.from_array(np.ones_like(scale), entry.name))
        if scale.ndim:  # one a channel: of PyTorch's weight, whose output channels come first
            rank = len(stored[weight].dims)
            scale = scale.reshape([-1] + [1] * (rank - 1))
        output = node.output[0]
        node.output[0] = f"{node.name}.output"
        for op, factor, result in (
            ("Add", np.array(0.5, np.float32), f"{weight}.add.output"),
            ("Mul", scale, output),
        ):
            name = f"{weight}.{op.lower()}"
            constant = numpy_helper.from_array(factor, f"{name}.constant")
            model.graph.initializer.append(constant)
            inputs = [nodes[-1].output[0], constant.name]
            nodes.append(helper.make_node(op, inputs, [result], name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def prepend_preprocessing_(model: onnx.ModelProto, normalization: Normalization) -> None:
    """Let the graph take uint8 pixels ``(N, H, W, C)`` and normalise them itself.

    The operations are those of :class:`sdq.batches.Normalization`, in float32 and in its order, so
    that the normalised images are the same to the last bit.

    Raises:
        RequestError: the normalisation is for another number of channels.
    """
    old = model.graph.input[0]
    batch, channels, height, width = old.type.tensor_type.shape.dim
    if channels.dim_value != len(normalization.mean):
        raise RequestError(
            f"export: preprocessing must have one value a channel ({channels.dim_value}), "
            f"got {len(normalization.mean)}"
        )
    shape = [batch.dim_param or batch.dim_value, height.dim_value, width.dim_value]
    parameters = {
        "divisor": np.array(255.0, np.float32),
        "mean": np.array(normalization.mean, np.float32),
        "std": np.array(normalization.std, np.float32),
    }
    steps = [("Cast", ""), ("Div", "divisor"), ("Sub", "mean"), ("Div", "std"), ("Transpose", "")]
    nodes, tensor = [], PIXELS
    for i, (op, parameter) in enumerate(steps):
        name = f"{PREPROCESSING}.{parameter or op.lower()}"
        inputs = [tensor] + ([f"{PREPROCESSING}.{parameter}"] if parameter else [])
        tensor = old.name if i == len(steps) - 1 else f"{name}.output"
        extra = {"Cast": {"to": onnx.TensorProto.FLOAT}, "Transpose": {"perm": [0, 3, 1, 2]}}
        nodes.append(helper.make_node(op, inputs, [tensor], name=name, **extra.get(op, {})))
    rest = list(model.graph.node)
    pixels = helper.make_tensor_value_info(
        PIXELS, onnx.TensorProto.UINT8, [*shape, channels.dim_value]
    )
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes + rest)
    model.graph.input.append(pixels)
    for key, value in parameters.items():
        model.graph.initializer.append(numpy_helper.from_array(value, f"{PREPROCESSING}.{key}"))


def save(model: onnx.ModelProto, path: Path, texts: Mapping[str, str]) -> None:
    """Write a model with its metadata."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    helper.set_model_props(model, dict(texts))
    model.producer_name, model.producer_version = "sdq", ""
    path.write_bytes(model.SerializeToString(deterministic=True))
