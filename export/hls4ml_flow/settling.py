"""Factors and offsets brought into the new network: exactly, where a quantizer follows."""

import math
from dataclasses import replace

import numpy as np

from export.hls4ml_flow import fixed_point
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.fixed_point import Array, power_of_two
from export.hls4ml_flow.pending import Pending, Unsupported
from export.hls4ml_flow.tensors import Value

WIDE = 24
"""Bits of constants that no quantizer follows: those of a float32."""

WIDEST = 32
"""Bits of a tensor that no quantizer makes narrower."""


def before_quantizer(builder: Builder, name: str, x: Pending, borders: Array) -> Value:
    """Bring sums to a quantizer, with the shortest factor and offset it can have.

    Args:
        builder: of the new network.
        name: of the quantizer.
        x: what it reads, in its units; what comes after is left out.
        borders: where its codes change.
    """
    x = _absorbed(x)
    factor, offset = fixed_point.same_codes(x.factor, x.offset, x.sums(), borders)
    plain = bool((factor == 1).all())
    if x.weights is not None and plain:
        return builder.multiply(x.path, x.value, x.weights, offset, last=False)
    value = multiplied(builder, x).value
    if plain and not offset.any():
        return value
    return builder.affine(f"{x.path or name}_scale", value, factor, offset)


def multiplied(builder: Builder, x: Pending) -> Pending:
    """Multiply by the weights, if there are any; factor and offset stay pending."""
    if x.weights is None:
        return x
    value = builder.multiply(x.path, x.value, x.weights, None, last=True)
    return replace(x, value=value, weights=None)


def settled(builder: Builder, x: Pending, where: str, inexact: list[str]) -> Value:
    """Return a tensor that has all of a file's value, for readers other than a quantizer.

    Args:
        builder: of the new network.
        x: the file's tensor.
        where: who reads it.
        inexact: gets a sentence for each constant that is rounded.
    """
    if not x.value.tensor:
        raise Unsupported(where, "read quantized images", "float", "set input_bits to at most 8")
    value, unit = x.value, x.value.unit
    if not x.quantized:
        unit = _unit(x)
        value = _scaled(
            builder, replace(x, factor=x.factor / unit, offset=x.offset / unit), where, inexact
        )
    value = replace(value, unit=unit)
    for after in x.after:
        value = after.apply(builder, value)
    return value


def _scaled(builder: Builder, x: Pending, where: str, inexact: list[str]) -> Value:
    x = _absorbed(x)
    plain = bool((x.factor == 1).all())
    if x.weights is not None and plain:
        offset = _rounded(x.offset, x.sums().step, where, inexact)
        return builder.multiply(x.path, x.value, x.weights, offset, last=True)
    factor = x.factor if plain else _rounded(x.factor, 0.0, where, inexact)
    offset = _rounded(x.offset, 0.0, where, inexact)
    name = f"{x.path or where}_scale"
    value = builder.affine(name, multiplied(builder, x).value, factor, offset)
    kind = value.type.quantizer()
    if kind.width > WIDEST:
        _note(f"{where}: what it reads is rounded to {WIDEST} bits", inexact)
        kind = replace(kind, width=WIDEST)
    return builder.quantize(f"{name}_rounded", value, kind, value.unit)


def _absorbed(x: Pending) -> Pending:
    """Put a factor that is one power of two into the weights."""
    first = float(x.factor[0])
    if x.weights is None or not (power_of_two(first) and (x.factor == first).all()):
        return x
    return replace(x, weights=x.weights.scaled(first), factor=np.ones(len(x.factor)))


def _unit(x: Pending) -> float:
    """Return a unit in which as much of the factor is gone as can be."""
    first = float(x.factor[0])
    same = bool((x.factor == first).all()) and first > 0
    return first if same and not power_of_two(first) else 1.0


def _rounded(values: Array, step: float, where: str, inexact: list[str]) -> Array:
    """Return values as they are if hardware can hold them, else rounded to float32's precision.

    Args:
        values: constants.
        step: of what they are added to; nothing finer than its own 24 bits is needed.
        where: who reads the result.
        inexact: gets a sentence if they are rounded.
    """
    top = math.frexp(max(float(np.abs(values).max()), step, fixed_point.TINY))[1]
    if fixed_point.step_of(values) >= math.ldexp(1.0, top - fixed_point.MOST_BITS):
        return values
    unit = math.ldexp(1.0, top - WIDE)
    _note(f"{where}: constants that no quantizer follows are rounded to {WIDE} bits", inexact)
    return np.asarray(np.rint(values / unit) * unit)


def _note(sentence: str, inexact: list[str]) -> None:
    inexact += [] if sentence in inexact else [sentence]
