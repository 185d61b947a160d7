r"""The equations of the uniform quantizers, as pure functions.

A tensor ``x`` becomes integer codes times a scale ``s``:

.. math:: Q_b(x) = s\,\mathrm{clip}(\mathrm{round}(x / s), q_{min}, q_{max})

with round-half-to-even, as ONNX ``QuantizeLinear`` and QONNX ``Quant`` have it, and division by
``s`` rather than multiplication by ``1 / s``, so that the same bits come out. One bit is
``s sign(x)`` with codes -1 and +1.

Weights may instead be given the mid-rise levels of DoReFa and N2UQ, ``2^b`` of them and none of
them zero: the odd codes from ``-(2^b - 1)`` to ``2^b - 1``, two code units apart. A weight is
first brought to code units by a transform of its own (:func:`dorefa`, :func:`entropy`) and then
takes the nearest odd code; ``2k - (2^b - 1)`` is the code of the papers' level ``k``.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 5,
https://arxiv.org/abs/1902.08153; one bit: Rastegari et al., "XNOR-Net", ECCV 2016, section 3.1.
"""

import math

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8
"""Below it a channel counts as dead; where zero has a code, any positive scale then gives it."""


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
        of zeros gets 1, with which every code is zero; or, with one bit, whose codes never are,
        the smallest scale.
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
    dead = SMALLEST_SCALE if bits == 1 and signed else 1.0
    best = torch.where(best > SMALLEST_SCALE, best, torch.full_like(best, dead))
    return best.reshape((-1,) + (1,) * (x.dim() - 1)) if per_channel else best.reshape(())


HISTOGRAM_BINS = 2048
"""Eight of them or more to each step of 8 bits: which grid point is best does not change. For 16
bits any bins will do: what is clipped costs far more than what is rounded, and the ends are exact.
"""


def histogram_mse_scale(x: Tensor, bits: int, signed: bool, steps: int = 100) -> Tensor:
    """Return the scale of :func:`mse_scale` for a large sample, found on its histogram.

    The cost is one pass over the values instead of one for each grid point. A sample that is not
    large, or has no histogram (constant, not finite), goes to :func:`mse_scale` as it is.

    Args:
        x: activations, of any shape.
        bits: 2 to 8, or 16: the least error is then at the full range, which is exact here.
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


def highest_odd_code(bits: int) -> int:
    """Return the highest of the ``2^bits`` odd codes; the lowest is its negative.

    >>> highest_odd_code(1), highest_odd_code(2), highest_odd_code(8)
    (1, 3, 255)
    """
    return 2**bits - 1


def odd_codes(u: Tensor, bits: int) -> Tensor:
    """Return the nearest odd code of each value in code units, in ``u``'s dtype.

    A value midway between two codes, an even number, takes the higher one, so that zero has the
    code +1 at every bitwidth.
    """
    high = highest_odd_code(bits)
    return (u / 2).floor_().mul_(2).add_(1).clamp_(-high, high)


class _QuantizeOdd(torch.autograd.Function):
    """Forward: odd codes times scale. Backward: straight-through for u, the codes for s."""

    @staticmethod
    def forward(ctx, u: Tensor, scale: Tensor, bits: int, gain: float) -> Tensor:  # type: ignore[no-untyped-def]
        y = odd_codes(u, bits).mul_(scale)
        ctx.save_for_backward(y, scale)
        ctx.gain = gain
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[no-untyped-def]
        y, scale = ctx.saved_tensors
        grad_u = grad * scale if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * y).sum_to_size(scale.shape) / scale * ctx.gain
        return grad_u, grad_scale, None, None


def quantize_odd(u: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize to odd codes and dequantize, differentiable in ``u`` and ``scale``.

    Args:
        u: weights in code units, of any shape: from :func:`dorefa` or :func:`entropy`.
        scale: positive, broadcastable to ``u``; of one code unit, half a step between levels.
        bits: 1 to 8.

    Returns:
        Codes times scale, in ``u``'s shape. The gradient to ``u`` is straight through the rounding
        and the clipping; the gradient to ``scale`` is the sum of the codes times the gradient, and
        has LSQ's factor 1 / sqrt(count * highest code).
    """
    count = max(u.numel() // max(scale.numel(), 1), 1)
    gain = 1.0 / math.sqrt(count * highest_odd_code(bits))
    result: Tensor = _QuantizeOdd.apply(u, scale, bits, gain)
    return result


def weights_of_one_scale(w: Tensor, per_channel: bool) -> tuple[int, ...]:
    """Return the dimensions of a weight ``(K, ...)`` over which one scale holds."""
    return tuple(range(1 if per_channel else 0, w.dim()))


def dorefa(w: Tensor, bits: int, per_channel: bool) -> Tensor:
    r"""Return weights in code units by DoReFa's transform, differentiable.

    .. math:: u = (2^b - 1) \frac{\tanh w}{\max |\tanh w|}

    so that the nearest odd code is ``2k - (2^b - 1)`` with the paper's
    ``k = round((2^b - 1) (u / (2^b - 1) + 1) / 2)``. Nothing is detached: a weight that is the
    largest moves the levels of all others, and its gradient says so.

    Args:
        w: ``(K, ...)``. Dead weights, all zero, give zeros.
        bits: 1 to 8.
        per_channel: the maximum of each output channel, or (the paper's) of the whole tensor.

    Source: Zhou et al., "DoReFa-Net", 2016, equation 9, https://arxiv.org/abs/1606.06160.
    """
    squashed = torch.tanh(w)
    dims = weights_of_one_scale(w, per_channel)
    peak = squashed.abs().amax(dims, keepdim=per_channel).clamp_min(SMALLEST_SCALE)
    return squashed / peak * highest_odd_code(bits)


def entropy(w: Tensor, bits: int, per_channel: bool) -> Tensor:
    r"""Return weights in code units by the entropy-preserving normalisation, differentiable.

    .. math:: u = (2^b - 1) \frac{w}{\gamma \overline{|w|}}, \quad \gamma = \frac{2^b - 1}{2^{b-1}}

    which fills the bins of bell-shaped weights about equally. Values beyond ``2^b - 1`` are those
    the paper clips; they are left to the rounding, which clips too. The mean is detached, as in
    the authors' code: it is there to follow the weights, and no weight should grow or shrink only
    to move the borders of the others' bins.

    Args:
        w: ``(K, ...)``. Dead weights, all zero, give zeros.
        bits: 1 to 8.
        per_channel: the mean over each output channel (the paper's), or over the whole tensor.

    Source: Liu et al., "Nonuniform-to-Uniform Quantization" (N2UQ), CVPR 2022, the
    entropy-preserving weight regularization, https://arxiv.org/abs/2111.14826.
    """
    return w / entropy_scale(w, bits, per_channel).clamp_min(SMALLEST_SCALE)


def entropy_scale(w: Tensor, bits: int, per_channel: bool) -> Tensor:
    """Return what is one code unit to :func:`entropy`: the mean of ``|w|`` over ``2^(b-1)``.

    It is also the scale of N2UQ's levels, whose largest is ``gamma`` times the mean. No gradient.
    """
    dims = weights_of_one_scale(w, per_channel)
    return w.detach().abs().mean(dims, keepdim=per_channel) / 2 ** (bits - 1)


def least_squares_scale(w: Tensor, codes: Tensor, per_channel: bool) -> Tensor:
    """Return the scale ``s`` of least squared error ``||s codes - w||`` for given codes.

    Args:
        w: ``(K, ...)``.
        codes: of ``w``'s shape, none of them zero everywhere.
        per_channel: one scale for each index of the first dimension.

    Returns:
        ``(K, 1, ...)`` if per channel, else a scalar; never below the smallest scale, which dead
        weights get: without a level at zero they must be given one next to it.
    """
    w, dims = w.detach(), weights_of_one_scale(w, per_channel)
    scale = (codes * w).sum(dims, keepdim=per_channel) / codes.square().sum(
        dims, keepdim=per_channel
    )
    return scale.clamp_min(SMALLEST_SCALE)
