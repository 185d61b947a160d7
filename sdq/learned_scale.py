"""Quantizers with a learned scale, as modules: one for weights, one for activations.

Each returns the four tensors Brevitas's layers expect of a quantizer: the quantized values, the
scale, the zero point (always 0) and the bitwidth. Brevitas itself is not needed here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sdq import quantizers
from sdq.config import ScaleKind
from sdq.errors import RunError

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values, scale, zero point, bitwidth."""

SMALLEST_GAIN = 1e-2
"""A learned scale may shrink to this share of its first value, not to zero or below."""


class _AtLeast(torch.autograd.Function):
    """Forward: clipped from below. Backward: whatever was clipped can grow, but not shrink."""

    @staticmethod
    def forward(ctx, x: Tensor, least: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.least = least
        return x.clamp_min(least)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad.where((x >= ctx.least) | (grad < 0), 0.0), None


class _Quantizer(nn.Module):
    """A scale that is learned relative to its first value: ``scale = base * gain``.

    A scale of 8 bits is a hundred times smaller than one of 2 bits, and Adam's steps have the
    same size for every parameter; the gain starts at 1 everywhere, so that a step is a step.
    """

    base: Tensor
    zero_point: Tensor
    bit_width: Tensor

    def __init__(self, bits: int, signed: bool, restrict: ScaleKind, scale: Tensor) -> None:
        super().__init__()
        self.bits, self.signed, self.restrict = bits, signed, restrict
        self.register_buffer("base", scale)
        self.gain = nn.Parameter(torch.ones_like(scale))
        # what exporters read; both follow from the code and are not part of the state
        zero, width = scale.new_zeros(()), scale.new_tensor(float(bits))
        self.register_buffer("zero_point", zero, persistent=False)
        self.register_buffer("bit_width", width, persistent=False)

    @property
    def scale(self) -> Tensor:
        """The positive scale in use, always the float32 value that a file would hold."""
        gain: Tensor = _AtLeast.apply(self.gain, SMALLEST_GAIN)
        scale = self.base.float() * gain.float()
        if self.restrict == "power_of_two":
            scale = quantizers.power_of_two(scale)
        return scale.to(self.base.dtype)

    def _quantized(self, x: Tensor) -> Quantized:
        scale = self.scale
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # under autocast: eight bits of precision cannot tell 256 codes apart
        values = quantizers.quantize(x, scale, self.bits, self.signed)
        return values, scale, self.zero_point, self.bit_width

    def set_bits_(self, bits: int) -> None:
        """Quantize at another bitwidth from now on, with the scale as it is."""
        self.bits = bits
        self.bit_width.fill_(float(bits))

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x``, without gradient."""
        with torch.no_grad():
            return quantizers.codes(x, self.scale, self.bits, self.signed)


def learned_gains(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the gains that are learned in a module, each with the scale it is relative to."""
    found = (part for part in module.modules() if isinstance(part, _Quantizer))
    return {part.gain: part.base for part in found if part.gain.requires_grad}


class WeightQuantizer(_Quantizer):
    """Weights at a fixed bitwidth, with a learned step; the base of the other kinds of weights.

    Whatever the kind, values are ``codes(weight) * scale``.

    Args:
        weight: ``(K, ...)``; gives the first scale, by least squared error.
        bits: 1 to 8.
        per_channel: one scale for each of the K output channels.
        restrict: to powers of two, or not.
    """

    def __init__(
        self, weight: Tensor, bits: int, per_channel: bool, restrict: ScaleKind = "float"
    ) -> None:
        scale = self._first_scale(weight, bits, per_channel)
        super().__init__(bits, True, restrict, scale)
        self.per_channel = per_channel

    def _first_scale(self, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        return quantizers.mse_scale(weight, bits, signed=True, per_channel=per_channel)

    def fit_(self, weight: Tensor) -> None:
        """Take the scale of least squared error for other weights of the same shape."""
        self.base.copy_(self._first_scale(weight.detach(), self.bits, self.per_channel))
        self.gain.data.fill_(1.0)

    @property
    def odd(self) -> bool:
        """Whether all codes are odd: from ``-(2^bits - 1)`` to ``2^bits - 1``, two apart."""
        return self.bits == 1

    def forward(self, weight: Tensor) -> Quantized:
        """Quantize ``weight`` ``(K, ...)``."""
        return self._quantized(weight)

    def in_steps(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return where weights lie among the levels, which are one unit apart.

        Returns:
            The position of each weight, differentiable in the weight alone, and (without gradient)
            the level it is rounded to. With the codes -1 and +1 of one bit the unit is the scale.
        """
        return weight / self.scale.detach(), self.codes(weight)

    def parts(self, weight: Tensor) -> "list[tuple[WeightQuantizer, Tensor]]":
        """Return the weights of each bitwidth with their quantizer: here all of them, with this."""
        return [(self, weight)]

    def residual(self, weight: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """Return the rounding error of each weight in units of the step, without gradient.

        Args:
            weight: what was quantized.
            values: what it became.
            scale: as returned with the values.
        """
        return ((values - weight) / scale).detach()

    def freeze_(self) -> None:
        """From now on take weights that are codes times scale, and give them these codes."""


class ActQuantizer(_Quantizer):
    """Activations at a fixed bitwidth, one scale a tensor.

    The scale comes from data: while ``observing``, values pass unchanged and a sample of them is
    kept; :meth:`settle_` then takes the scale of least squared error.

    Args:
        bits: 2 to 8, or 16.
        signed: whether the tensor can be negative.
        restrict: the scale to powers of two, or not.
    """

    calibrated: Tensor
    sample_size = 1 << 16
    """Values kept of a batch: enough for a scale to 2 % (5 % of 8 bits, whose ends are rare)."""

    def __init__(self, bits: int, signed: bool, restrict: ScaleKind = "float") -> None:
        super().__init__(bits, signed, restrict, torch.ones(()))
        self.register_buffer("calibrated", torch.tensor(False))
        self.observing = False
        self._seen: list[Tensor] = []
        # the buffer's value, once known to be true: on a GPU reading it waits for all that runs
        self._known_calibrated = False

    def forward(self, x: Tensor) -> Quantized:
        """Quantize ``x`` of any shape.

        Raises:
            RunError: no scale yet; run ``sdq.calibrate_`` first.
        """
        if self.observing:
            self._seen.append(self._sample(x.detach()))
            return x, self.scale, self.zero_point, self.bit_width
        if not self._known_calibrated:
            if not self.calibrated:
                raise RunError(
                    "activation quantizer: scale must be calibrated before use; "
                    "call sdq.calibrate_(qmodel, batches)"
                )
            self._known_calibrated = True
        return self._quantized(x)

    @property
    def settled(self) -> bool:
        """Whether it quantizes with a scale that is known."""
        return not self.observing and (self._known_calibrated or bool(self.calibrated))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._known_calibrated = False

    def _sample(self, x: Tensor) -> Tensor:
        """Return values of ``x``: all if they are few, else drawn, the same in every run."""
        if x.numel() <= self.sample_size:
            return x.reshape(-1).clone()
        # not every n-th: n may be a multiple of the image's width, and all values of one column
        draws = torch.Generator().manual_seed(len(self._seen))
        chosen = torch.randint(x.numel(), (self.sample_size,), generator=draws)
        return x.take(chosen.to(x.device))

    def settle_(self) -> None:
        """Take the scale of what was observed, and quantize from now on."""
        seen, self._seen, self.observing = self._seen, [], False
        if not seen:  # a layer that the forward pass never reached
            return
        scale = quantizers.histogram_mse_scale(torch.cat(seen), self.bits, self.signed)
        self.base.copy_(scale)
        self.gain.data.fill_(1.0)
        self.calibrated.fill_(True)
