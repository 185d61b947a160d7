"""Tensors of the file while they are on their way into the new network."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from export.findings import Finding
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.fixed_point import Array, Sums
from export.hls4ml_flow.tensors import Value, Weights
from sdq.errors import RequestError

OTHER_FORMAT = "use the format onnx or qonnx"


class Unsupported(RequestError):
    """Something of the network that hls4ml cannot be given.

    Args:
        node: as the file names it.
        rule: what must be.
        got: what is there.
        repair: what would mend it.
    """

    def __init__(self, node: str, rule: str, got: object, repair: str = OTHER_FORMAT) -> None:
        self.finding = Finding(_path(node), f"must {rule}", str(got), repair)
        super().__init__(f"export: hls4ml: {self.finding}")


def _path(node: str) -> str:
    """Return a module's path where the exporter has made an address of it."""
    path, _, operation = node.strip("/").rpartition("/")
    return (path or operation).partition("#")[0].replace("/", ".")


Operation = Callable[[Builder, Value], Value]


@dataclass(frozen=True)
class After:
    """An operation that keeps the order of values, and so commutes with a quantizer.

    Args:
        apply: adds it.
        relu: it only takes away what is negative.
    """

    apply: Operation
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor of the file, as far as the new network has it.

    It is ``after(factor * source + offset)``, where the source is a tensor of the new network, or
    the sums of weights with one.

    Args:
        value: a tensor of the new network.
        factor: of each channel ``(K,)``.
        offset: of each channel ``(K,)``.
        path: the layer's name, if weights are still to be multiplied.
        weights: them.
        after: what comes after the offset.
    """

    value: Value
    factor: Array
    offset: Array
    path: str = ""
    weights: Weights | None = None
    after: tuple[After, ...] = ()

    @classmethod
    def of(cls, value: Value) -> "Pending":
        """Return a tensor of the new network as it is."""
        return cls(value, np.full(value.channels, value.unit), np.zeros(value.channels))

    def sums(self) -> Sums:
        """Return what the source can be."""
        if self.weights is not None:
            return self.weights.sums(self.value)
        ones = np.ones(len(self.factor))
        return Sums(ones * self.value.least, ones * self.value.most, self.value.step)

    def then(self, operation: Operation, *, relu: bool = False) -> "Pending":
        """Return this with one more operation that keeps the order of values."""
        return replace(self, after=(*self.after, After(operation, relu)))

    @property
    def quantized(self) -> bool:
        """Whether it is a tensor of the new network, but for what comes after."""
        whole = self.weights is None and bool(self.value.tensor)
        return whole and bool((self.factor == self.value.unit).all()) and not self.offset.any()
