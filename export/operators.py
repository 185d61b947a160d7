"""What ONNX operators compute, on torch's functions, in whatever precision they are given.

Each takes the node's attributes and its inputs (None where one is left out). Only what our
exporters write is here; an operator with options nobody writes refuses them.

Source: ONNX operator schemas, https://onnx.ai/onnx/operators/; Quant and BipolarQuant:
https://github.com/fastmachinelearning/qonnx/tree/main/docs/qonnx-custom-ops
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from export.layer_operators import LAYER_OPERATORS
from export.operands import Attributes, Operator, along, number, tensor
from export.shape_operators import SHAPE_OPERATORS
from sdq.errors import RunError

_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


def _number(a: Attributes, name: str, default: float) -> float:
    """Return an attribute as the number that the network has, see :func:`number`."""
    return number(a.get(name, default))


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    return (_number(a, "alpha", 0.2) * x + _number(a, "beta", 0.5)).clamp(0, 1)


def _quantize_linear(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = torch.uint8 if zero is None else zero.dtype
    axis = a.get("axis", 1)
    offset = 0 if zero is None else along(axis, x, zero.double())
    codes = torch.round(x / along(axis, x, scale)) + offset
    limits = torch.iinfo(kind)
    return codes.clamp(limits.min, limits.max).to(kind)


def _dequantize_linear(
    a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    axis = a.get("axis", 1)
    offset = 0 if zero is None else along(axis, x, zero.double())
    values = (x.double() - offset) * along(axis, x, scale)
    # a bias is a float32 constant, whose code may take all digits of one: every reader rounds it
    return values.float().double() if x.dtype is torch.int32 else values


def _quant(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor) -> Tensor:
    mode = a.get("rounding_mode", b"ROUND").decode().upper()
    if mode not in ("ROUND", "HALF_EVEN"):
        raise RunError(f"export: Quant: rounding_mode must be ROUND, got {mode!r}")
    signed, narrow, width = a.get("signed", 1), a.get("narrow", 0), float(bits)
    low = -(2.0 ** (width - 1)) + narrow if signed else 0.0
    high = 2.0 ** (width - 1) - 1 if signed else 2.0**width - 1 - narrow
    codes = torch.round(x / scale + zero).clamp(low, high)
    return (codes - zero) * scale


def _extreme(function: Callable[..., Tensor]) -> Operator:
    def apply(a: Attributes, *inputs: Tensor) -> Tensor:
        result, *rest = inputs
        for x in rest:
            result = function(result, x)
        return result

    return apply


def _modulo(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if a.get("fmod", 0) else torch.remainder(x, y)


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", b"none").decode())


def _clip(
    a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    x = x if low is None else torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


def _cast(a: Attributes, x: Tensor) -> Tensor:
    kind = _TYPES.get(a["to"])
    if kind is None:
        raise RunError(f"export: Cast: no type {a['to']} in export/operators.py")
    keeps = kind is torch.float32 and x.dtype is torch.float64  # float64 stays what it is
    return x if keeps else x.to(kind)


def _constant(a: Attributes) -> Tensor:
    if "value" in a:
        return tensor(a["value"])
    (value,) = a.values()
    kind = torch.float64 if isinstance(np.asarray(value).flat[0], np.floating) else torch.int64
    return torch.tensor(value, dtype=kind)


def _div(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


OPERATORS: dict[str, Operator] = {
    **LAYER_OPERATORS,
    **SHAPE_OPERATORS,
    "Abs": lambda a, x: x.abs(),
    "Add": lambda a, x, y: x + y,
    "And": lambda a, x, y: x & y,
    "BipolarQuant": lambda a, x, scale: torch.where(x >= 0, 1.0, -1.0).double() * scale,
    "Cast": _cast,
    "Ceil": lambda a, x: x.ceil(),
    "Celu": lambda a, x: F.celu(x, _number(a, "alpha", 1.0)),
    "Clip": _clip,
    "Constant": _constant,
    "Cos": lambda a, x: x.cos(),
    "DequantizeLinear": _dequantize_linear,
    "Div": _div,
    "Einsum": lambda a, *x: torch.einsum(a["equation"].decode(), *x),
    "Elu": lambda a, x: F.elu(x, _number(a, "alpha", 1.0)),
    "Equal": lambda a, x, y: x == y,
    "Erf": lambda a, x: torch.erf(x),
    "Exp": lambda a, x: x.exp(),
    "Floor": lambda a, x: x.floor(),
    "Gelu": _gelu,
    "Greater": lambda a, x, y: x > y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda a, x: x * (x / 6 + 0.5).clamp(0, 1),
    "Identity": lambda a, x: x,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, _number(a, "alpha", 0.01)),
    "Less": lambda a, x, y: x < y,
    "LessOrEqual": lambda a, x, y: x <= y,
    "Log": lambda a, x: x.log(),
    "LogSoftmax": lambda a, x: torch.log_softmax(x, a.get("axis", -1)),
    "MatMul": lambda a, x, y: x @ y,
    "Max": _extreme(torch.maximum),
    "Min": _extreme(torch.minimum),
    "Mish": lambda a, x: F.mish(x),
    "Mod": _modulo,
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Not": lambda a, x: ~x,
    "Or": lambda a, x, y: x | y,
    "PRelu": lambda a, x, slope: torch.where(x >= 0, x, slope * x),
    "Pow": lambda a, x, y: x**y,
    "Quant": _quant,
    "QuantizeLinear": _quantize_linear,
    "Reciprocal": lambda a, x: 1 / x,
    "Relu": lambda a, x: x.clamp_min(0),
    "Selu": lambda a, x: F.selu(x),
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Sign": lambda a, x: x.sign(),
    "Sin": lambda a, x: x.sin(),
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Softplus": lambda a, x: torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0),
    "Softsign": lambda a, x: F.softsign(x),
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: torch.tanh(x),
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
