r"""Rounding weights up or down as a layer's output wants it, instead of to the nearest level.

A weight's code is its floor plus a learned share of one step, the rectified sigmoid

.. math:: h(V) = \mathrm{clip}(\sigma(V)(\zeta - \gamma) + \gamma, 0, 1),
          \qquad \zeta = 1.1,\ \gamma = -0.1

which a regularizer pushes to 0 or 1:

.. math:: f_{reg} = \sum_i 1 - |2 h(V_i) - 1|^\beta

with beta large at first, so that most are free to move, and then annealed.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound),
ICML 2020, equations 21 to 25, https://arxiv.org/abs/2004.10568.
"""

import math

import torch
from torch import Tensor, nn

from sdq.channel_bits import SettledQuantizer
from sdq.learned_scale import Quantized
from sdq.quantizers import code_range

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched to this range and cut to [0, 1], so that both ends can be reached."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return ``h(V)`` in [0, 1], of ``v``'s shape.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """Return the ``V`` with ``h(V) = h``; of 0 and 1, the one next to the cut, which can move."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def rounding_regularizer(h: Tensor, beta: float) -> Tensor:
    """Return the sum of ``1 - |2 h - 1|^beta``: 0 where every ``h`` is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(progress: float, start: float, end: float) -> float:
    """Return beta at a share of the annealing in [0, 1]: from start to end along a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class SoftRounding(nn.Module):
    """Stands in for a weight quantizer while its rounding is learned.

    The scale stays as it is. One bit has the levels -1 and +1 alone, and "down" and "up" are these
    two: what is learned is the sign. Codes are clipped as the quantizer clips them, so a weight
    beyond the range keeps the outermost code.

    Args:
        weight: ``(K, ...)``, in float.
        quantizer: of that weight.
    """

    bit_width: Tensor
    down: Tensor
    scale: Tensor
    step: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, quantizer: SettledQuantizer) -> None:
        super().__init__()
        weight = weight.detach()
        bits = torch.as_tensor(getattr(quantizer, "channel_bits", (quantizer.bits,)))
        ends = torch.tensor([code_range(int(b), True) for b in bits]).to(weight)
        shape = (-1,) + (1,) * (weight.dim() - 1)
        one_bit = (bits == 1).to(weight.device).view(shape)
        buffers = {
            "scale": quantizer.scale.detach(),
            "bit_width": quantizer.bit_width,
            "step": torch.where(one_bit, 2.0, 1.0).to(weight.dtype),
            "low": ends[:, 0].view(shape),
            "high": ends[:, 1].view(shape),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        position = weight / self.scale
        down = torch.where(one_bit, -torch.ones_like(position), position.floor())
        self.register_buffer("down", down, persistent=False)
        share = ((position - down) / self.step).clamp(0, 1)
        self.v = nn.Parameter(inverse_rectified_sigmoid(share))

    def up(self) -> Tensor:
        """Return ``h(V)``, the share of a step that each weight is rounded up."""
        return rectified_sigmoid(self.v)

    def _codes(self, up: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(self.down + self.step * up, self.low), self.high)

    def forward(self, weight: Tensor) -> Quantized:
        """Return the weight at its soft codes; ``weight`` itself is not looked at again."""
        values = self._codes(self.up()) * self.scale
        return values, self.scale, self.scale.new_zeros(()), self.bit_width

    @torch.no_grad()
    def settled(self) -> Tensor:
        """Return the weight at the codes that were learned: codes times scale.

        The ordinary quantizer gives exactly this back: a code times the scale over the scale is
        within one part in 2^23 of the code, and rounds to it.
        """
        return self._codes((self.up() >= 0.5).to(self.v.dtype)) * self.scale
