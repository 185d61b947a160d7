"""What stands for tensors and sizes while a network is followed (:mod:`sdq.tracer`)."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

if TYPE_CHECKING:
    from sdq.tracer import Tracer

_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}

_SHAPE_METHODS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "get_device",
}  # fmt: skip

_SHAPE_FUNCTIONS = {len, torch.numel, torch.is_floating_point}


def of_shapes(node: fx.Node) -> bool:
    """Tell whether a value follows from the shapes of tensors, whatever is in them."""
    if node.op == "call_function":
        if node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES:
            return True
        if node.target in _SHAPE_FUNCTIONS:
            return True
    elif node.op == "call_method":
        if node.target in _SHAPE_METHODS:
            return True
    else:
        return False
    return bool(node.all_input_nodes) and all(of_shapes(n) for n in node.all_input_nodes)


class _Number(fx.Proxy):
    """A value that Python may ask for a number, where it follows from shapes."""

    tracer: "Tracer"

    def _number(self) -> Any:
        return self.tracer.concrete(self.node, "a number")

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return operator.index(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._number(), dtype)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number(), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __len__(self) -> int:
        return sum(1 for _ in self.tracer.iter(self))


class StandIn(_Number):
    """Stands for a tensor; ``isinstance`` takes it for one."""

    def __getattr__(self, name: str) -> Any:
        known = name in _SHAPE_ATTRIBUTES or name in _SHAPE_METHODS
        if self.node.op == "get_attr" and known:
            return getattr(self.tracer.attribute(self.node), name)
        if name == "ndim":  # may be a key of a dict, and never changes
            return int(_Attribute(self, name))
        if name.startswith("__"):  # what NumPy and others look for does not exist
            raise AttributeError(name)
        return _Attribute(self, name)

    def dim(self) -> int:
        """Return the number of dimensions, as a number."""
        return int(_Attribute(self, "ndim"))

    @property  # type: ignore[misc]  # what isinstance asks
    def __class__(self) -> Any:
        return self.tracer.class_of(self)


def _in_place(name: str) -> Callable[[StandIn, Any], Any]:
    def method(x: StandIn, other: Any) -> Any:
        if of_shapes(x.node):  # a number has no place
            return getattr(operator, name)(x, other)
        return x.tracer.create_proxy("call_function", getattr(operator, f"i{name}"), (x, other), {})

    return method


IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")

for _name in IN_PLACE:  # torch.fx has none: Python would take ``x += y`` for ``x = x + y``
    setattr(StandIn, f"__i{_name}__", _in_place(_name))


class _Attribute(_Number, fx.proxy.Attribute):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attribute(self, name)
