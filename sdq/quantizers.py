r"""The equations of the uniform quantizers, as pure functions.

A tensor ``x`` becomes integer codes times a scale ``s``:

.. math:: Q_b(x) = s\,\mathrm{clip}(\mathrm{round}(x / s), q_{min}, q_{max})

with round-half-to-even, as ONNX ``QuantizeLinear`` and QONNX ``Quant`` have it, and division by
``s`` rather than multiplication by ``1 / s``, so that the same bits come out. One bit is
``s sign(x)`` with codes -1 and +1.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 5,
https://arxiv.org/abs/1902.08153; one bit: Rastegari et al., "XNOR-Net", ECCV 2016, section 3.1.
"""

import math

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8
"""Below it a channel counts as dead; any positive scale then gives the same (zero) codes."""


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the lowest and highest code of a bitwidth.

    >>> code_range(4, signed=True), code_range(4, signed=False), code_range(1, signed=True)
    ((-8, 7), (0, 15), (-1, 1))
    """
    if bits == 1 and signed:
        return -1, 1
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def codes(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the integer codes of ``x``, in ``x``'s dtype. ``scale`` broadcasts to ``x``."""
    if bits == 1 and signed:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    low, high = code_range(bits, signed)
    return (x / scale).round_().clamp_(low, high)


class _Quantize(torch.autograd.Function):
    """Forward: codes times scale. Backward: straight-through for x, LSQ's gradient for s.

    With ``y = s c`` the output, LSQ's ``ds = sum g (c - x / s)`` inside the range and ``sum g c``
    outside is ``(sum g y - sum dx x) / s``, where ``dx`` is the gradient to x: two dot products
    over tensors that the neighbouring layers keep for their own backward pass anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bits: int, signed: bool, gain: float) -> Tensor:  # type: ignore[no-untyped-def]
        y = codes(x, scale, bits, signed).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.bits, ctx.signed, ctx.gain = bits, signed, gain
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[no-untyped-def]
        x, y, scale = ctx.saved_tensors
        low, high = code_range(ctx.bits, ctx.signed)
        if ctx.bits == 1 and ctx.signed:
            # every weight keeps its gradient, or those beyond the scale would never return; and
            # ds = sum g sign(x), as the scale's own least squares has it
            grad_x, pull = grad, grad * y
        else:
            if scale.dim() == 0 and scale.is_cpu:
                step = float(scale)
                grad_x = torch.ops.aten.hardtanh_backward(grad, x, low * step, high * step)
            else:  # on a GPU a number would have to be waited for
                grad_x = grad * ((x > low * scale) & (x < high * scale))
            pull = _dot(grad, y) - _dot(grad_x, x) if scale.dim() == 0 else grad * y - grad_x * x
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = pull.sum_to_size(scale.shape) / scale * ctx.gain
        return grad_x, grad_scale, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum(a * b)``, without a temporary where both lie in memory in the same order."""
    for order in (torch.contiguous_format, torch.channels_last):
        if (order == torch.contiguous_format or a.dim() == 4) and (
            a.is_contiguous(memory_format=order) and b.is_contiguous(memory_format=order)
        ):
            return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


def quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Quantize and dequantize, differentiable in ``x`` and ``scale``.

    Args:
        x: any shape.
        scale: positive, broadcastable to ``x``: a scalar, or ``(K, 1, ...)`` for one a channel.
        bits: 1 to 8.
        signed: codes around zero, or from zero.

    Returns:
        Codes times scale, in ``x``'s shape. The gradient to ``x`` passes where the code is not
        clipped; the gradient to ``scale`` is LSQ's, times 1 / sqrt(count * q_max).

    Source: Esser et al., ICLR 2020, equations 2, 3 and section 2.2.
    """
    high = code_range(bits, signed)[1]
    gain = 1.0 / math.sqrt(max(x.numel() // max(scale.numel(), 1), 1) * high)
    result: Tensor = _Quantize.apply(x, scale, bits, signed, gain)
    return result


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        # exp2 is not exact on every platform; ldexp is
        return torch.ldexp(torch.ones_like(scale), torch.log2(scale).round().to(torch.int32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


def power_of_two(scale: Tensor) -> Tensor:
    """Return the nearest power of two (in the logarithm), straight-through in the gradient."""
    result: Tensor = _PowerOfTwo.apply(scale)
    return result


def mse_scale(x: Tensor, bits: int, signed: bool, per_channel: bool, steps: int = 40) -> Tensor:
    """Return the scale with the least squared error ``||Q_b(x) - x||``, found on a grid.

    Args:
        x: weights ``(K, ...)`` or activations.
        bits: 1 to 8. For one bit the minimum is known: the mean of ``|x|`` (XNOR-Net, eq. 6).
        signed: as in :func:`quantize`.
        per_channel: one scale for each index of the first dimension.
        steps: grid points between full range and 1/steps of it.

    Returns:
        ``(K, 1, ...)`` if per channel, else a scalar; never below the smallest scale. A tensor
        of zeros gets 1, with which every code is zero.
    """
    flat = x.detach().reshape(x.shape[0], -1) if per_channel else x.detach().reshape(1, -1)
    low, high = code_range(bits, signed)
    if bits == 1 and signed:
        best = flat.abs().mean(dim=1, keepdim=True)
    else:
        # the scale at which nothing is clipped
        bound = torch.maximum(
            flat.amax(1, keepdim=True) / high,
            flat.amin(1, keepdim=True) / low if low else flat.amax(1, keepdim=True) / high,
        )
        best, least = bound, torch.full_like(bound, math.inf)
        for step in range(1, steps + 1):
            scale = (bound * (step / steps)).clamp_min(SMALLEST_SCALE)
            off = codes(flat, scale, bits, signed).mul_(scale).sub_(flat)
            error = off.square_().mean(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    best = torch.where(best > SMALLEST_SCALE, best, torch.ones_like(best))
    return best.reshape((-1,) + (1,) * (x.dim() - 1)) if per_channel else best.reshape(())


HISTOGRAM_BINS = 2048
"""Eight of them or more to each step of 8 bits: which grid point is best does not change."""


def histogram_mse_scale(x: Tensor, bits: int, signed: bool, steps: int = 100) -> Tensor:
    """Return the scale of :func:`mse_scale` for a large sample, found on its histogram.

    The cost is one pass over the values instead of one for each grid point. A sample that is not
    large, or has no histogram (constant, not finite), goes to :func:`mse_scale` as it is.

    Args:
        x: activations, of any shape.
        bits: 2 to 8.
        signed: as in :func:`quantize`.
        steps: grid points between full range and 1/steps of it.

    Returns:
        A scalar.
    """
    low, high = code_range(bits, signed)
    flat = x.detach().reshape(1, -1).float()
    least, most = (float(end) for end in flat.aminmax())
    if flat.numel() <= 8 * HISTOGRAM_BINS or not 0 < most - least < math.inf:
        return mse_scale(flat, bits, signed, per_channel=False, steps=steps).to(x.dtype)
    counts = torch.histc(flat, HISTOGRAM_BINS, least, most)
    middles = torch.arange(HISTOGRAM_BINS, device=x.device) + 0.5
    middles = least + middles * ((most - least) / HISTOGRAM_BINS)
    bound = max(most / high, least / low if low else 0.0)
    grid = torch.arange(1, steps + 1, device=x.device)[:, None] * (bound / steps)
    grid = grid.clamp_min(SMALLEST_SCALE)
    off = codes(middles, grid, bits, signed).mul_(grid).sub_(middles)
    return grid[(off.square_() @ counts).argmin(), 0].to(x.dtype)
