"""Weight quantizers with symmetric levels and none at zero: DoReFa's and N2UQ's.

Both bring weights to code units by a transform and take the nearest odd code; they differ in the
transform. The size of the levels is a thing apart. The papers fix it, since a batch normalisation
follows every layer and takes any factor away; a pretrained network without one would be destroyed
by it. Here it is therefore learned, like the step of LSQ, and starts where the squared error to
the float weights is least; ``paper=True`` gives the papers' size.

Gradients are straight through the rounding (and, of N2UQ, the clipping: its borders leave out a
quarter of bell-shaped weights at 2 bits, which would never return) and those of the transform
besides; see :func:`sdq.quantizers.dorefa` and :func:`sdq.quantizers.entropy`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sdq import quantizers
from sdq.config import ScaleKind
from sdq.learned_scale import Quantized, WeightQuantizer


class MidRiseQuantizer(WeightQuantizer, ABC):
    """Weights at the odd codes ``-(2^b - 1)`` to ``2^b - 1`` times a scale.

    Args:
        weight: ``(K, ...)``; gives the first scale.
        bits: 1 to 8.
        per_channel: a scale, and a transform, for each of the K output channels.
        restrict: the scale to powers of two, or not.
        paper: take the size of the levels from the paper, and do not learn it.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        per_channel: bool,
        restrict: ScaleKind = "float",
        *,
        paper: bool = False,
    ) -> None:
        super().__init__(weight, bits, per_channel, restrict)
        self.paper, self.frozen = paper, False
        if paper:
            self.gain.requires_grad_(False)
            self.base = self._paper_scale(weight)

    def _first_scale(self, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        with torch.no_grad():
            codes = quantizers.odd_codes(self._transformed(weight, bits, per_channel), bits)
        return quantizers.least_squares_scale(weight, codes, per_channel)

    def fit_(self, weight: Tensor) -> None:
        """Take the scale for other weights of the same shape, in the way of this quantizer."""
        super().fit_(weight)
        if self.paper:
            self.base.copy_(self._paper_scale(weight.detach()))

    @abstractmethod
    def _transformed(self, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        """Return weights in code units, differentiable."""

    @abstractmethod
    def _paper_scale(self, weight: Tensor) -> Tensor:
        """Return the scale with which the levels have the paper's size."""

    @property
    def odd(self) -> bool:
        """True: all codes are odd."""
        return True

    def _in_code_units(self, weight: Tensor) -> Tensor:
        if self.frozen:
            return weight / self.scale.detach()
        return self._transformed(weight, self.bits, self.per_channel)

    def codes(self, x: Tensor) -> Tensor:
        """Return the odd codes of ``x``, without gradient."""
        with torch.no_grad():
            return quantizers.odd_codes(self._in_code_units(x), self.bits)

    def forward(self, weight: Tensor) -> Quantized:
        """Quantize ``weight`` ``(K, ...)``.

        The paper's size of the levels follows the weights in training; in evaluation it is what
        it last was, like the statistics of a batch normalisation.
        """
        if self.paper and self.training and not self.frozen:
            self.base = self._paper_scale(weight)
        scale = self.scale
        values = quantizers.quantize_odd(self._in_code_units(weight), scale, self.bits)
        return values, scale, self.zero_point, self.bit_width

    def in_steps(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return transformed weights, clipped, and their levels; the levels are one unit apart."""
        high = quantizers.highest_odd_code(self.bits)
        u = self._in_code_units(weight)
        return u.clamp(-high, high) / 2, quantizers.odd_codes(u.detach(), self.bits) / 2

    def residual(self, weight: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """Return the rounding error of each transformed weight in steps, without gradient.

        What the transform itself does to a weight is no error: no bitwidth would take it away.
        """
        with torch.no_grad():
            position, level = self.in_steps(weight)
            return level - position

    def freeze_(self) -> None:
        """From now on take weights that are codes times scale, and give them these codes."""
        self.frozen = True


class DorefaQuantizer(MidRiseQuantizer):
    """``tanh(w)`` over its largest magnitude; the paper's levels reach from -1 to 1.

    Source: Zhou et al., "DoReFa-Net", 2016, equation 9, https://arxiv.org/abs/1606.06160.
    """

    def _transformed(self, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        return quantizers.dorefa(weight, bits, per_channel)

    def _paper_scale(self, weight: Tensor) -> Tensor:
        return torch.full_like(self.base, 1 / quantizers.highest_odd_code(self.bits))


class EntropyQuantizer(MidRiseQuantizer):
    """``w`` over ``gamma`` times the mean of ``|w|``, which is also the paper's largest level.

    Source: Liu et al., "Nonuniform-to-Uniform Quantization" (N2UQ), CVPR 2022, the
    entropy-preserving weight regularization, https://arxiv.org/abs/2111.14826.
    """

    def _transformed(self, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        return quantizers.entropy(weight, bits, per_channel)

    def _paper_scale(self, weight: Tensor) -> Tensor:
        scale = quantizers.entropy_scale(weight, self.bits, self.per_channel)
        return scale.clamp_min(quantizers.SMALLEST_SCALE)
