"""Tensors and weights of the network for hls4ml: their shapes, and the numbers they can hold."""

import math
from dataclasses import dataclass, replace

import numpy as np

from export.hls4ml_flow import fixed_point
from export.hls4ml_flow.fixed_point import Array, FixedType, holding

Pads = tuple[int, int, int, int]
"""Top, left, bottom, right."""


@dataclass(frozen=True)
class Value:
    """A tensor of the new network.

    Args:
        tensor: its name.
        shape: without the batch, channels last: ``(H, W, C)`` or ``(F,)``.
        unit: what 1 in this tensor is in the network it was made from.
        least: smallest value it can have.
        most: largest.
        step: the power of two whose multiples its values are.
        image: if flattened, the shape ``(H, W, C)`` it had.
        traced: the tensor with the same values that a simulation can show.
    """

    tensor: str
    shape: tuple[int, ...]
    unit: float
    least: float
    most: float
    step: float
    image: tuple[int, ...] | None = None
    traced: str = ""

    @property
    def type(self) -> FixedType:
        """The shortest type for it."""
        return holding(self.least, self.most, self.step)

    @property
    def channels(self) -> int:
        """Number of channels, or of features."""
        return self.shape[-1]


@dataclass(frozen=True, eq=False)
class Weights:
    """The constants of a convolution or linear layer, and where they go.

    Args:
        values: ``(K, kh, kw, C)``, of a depthwise layer ``(C, kh, kw, 1)``, or ``(K, F)``.
        type: that holds all codes the quantizer has.
        strides: of a convolution.
        pads: top, left, bottom, right.
        depthwise: one filter for each channel.
    """

    values: Array
    type: FixedType
    strides: tuple[int, int] = (1, 1)
    pads: Pads = (0, 0, 0, 0)
    depthwise: bool = False

    def scaled(self, factor: float) -> "Weights":
        """Return the weights times a power of two."""
        shift = math.frexp(factor)[1] - 1
        kind = replace(self.type, integer=self.type.integer + shift)
        return replace(self, values=self.values * factor, type=kind)

    def sums(self, value: Value) -> fixed_point.Sums:
        """Return what the sums can be, for inputs within a tensor's range."""
        axes = tuple(range(1, self.values.ndim))
        most = np.maximum(self.values, 0).sum(axes)
        least = np.minimum(self.values, 0).sum(axes)
        low, high = value.least, value.most
        if any(self.pads):
            low, high = min(low, 0.0), max(high, 0.0)
        return fixed_point.Sums(
            most * low + least * high, most * high + least * low, value.step * self.type.step
        )

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the shape of the sums."""
        if self.values.ndim == 2:
            return (self.values.shape[0],)
        top, left, bottom, right = self.pads
        sizes = (value.shape[0] + top + bottom, value.shape[1] + left + right)
        spans = zip(sizes, self.values.shape[1:3], self.strides, strict=True)
        return (
            *((size - kernel) // stride + 1 for size, kernel, stride in spans),
            len(self.values),
        )
