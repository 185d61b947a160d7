"""What an operator is given: a node's attributes, and tensors."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

Attributes = dict[str, Any]
Operator = Callable[..., Any]


def attributes(node: onnx.NodeProto) -> Attributes:
    """Return a node's attributes, and the number of its outputs, on which a Split depends."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {"num_outputs": len(node.output), **found}


def tensor(proto: onnx.TensorProto, single: bool = False) -> Tensor:
    """Return a stored tensor; floats in float64, unless ``single``."""
    stored = numpy_helper.to_array(proto)
    packed = proto.data_type in (TensorProto.INT2, TensorProto.INT4)
    values = torch.from_numpy(np.array(stored, np.int8 if packed else stored.dtype))
    return values.double() if values.is_floating_point() and not single else values


def number(held: float) -> float:
    """Return the number that the network has, of which files hold what float32 rounded.

    That is a fraction of small whole numbers (1/3, 1.25, hard sigmoid's 1/6), or the shortest
    decimal, which float32 rounds to the same. A value that is off by 1e-8 falls to the other side
    of a tie in one of some 100,000 codes.

    >>> number(np.float32(1 / 3)) == 1 / 3, number(np.float32(0.0123))
    (True, 0.0123)
    """
    single = np.float32(held)
    simple = float(Fraction(float(single)).limit_denominator(100))
    return simple if np.float32(simple) == single else float(str(single))


def ints(x: Tensor) -> list[int]:
    """Return the values of a tensor of sizes, axes or the like."""
    return [int(v) for v in x.reshape(-1).tolist()]


def along(axis: int, x: Tensor, parameter: Tensor) -> Tensor:
    """Shape a per-axis parameter so that it broadcasts to ``x``."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)
