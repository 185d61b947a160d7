r"""Differentiable bitwidth parameters: stochastic quantization between adjacent bitwidths.

A layer that is at candidate :math:`b_i` draws, in every training step, for its whole weight

.. math:: w^q = Q_{b_i}(w) \;\text{with probability}\; \beta_i,
          \quad Q_{b_{i-1}}(w) \;\text{with}\; 1 - \beta_i,

and learns :math:`\beta_i = \sigma(\theta_i)` through the straight-through Gumbel-softmax. When
:math:`\beta_i` falls below a threshold, :math:`b_i` is dropped for good and the next pair becomes
active.

Source: Huang et al., "SDQ: Stochastic Differentiable Quantization with Mixed Precision", ICML
2022, equations 3 to 5 and Figure 1, https://arxiv.org/abs/2206.04459. The sigmoid
parametrisation, the threshold's value and the scale of each candidate are our choice: the paper
does not give them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdq.learned_scale import Quantized, WeightQuantizer


class _HardSample(torch.autograd.Function):
    """Forward: 1 if the relaxed sample is above one half, else 0. Backward: of the relaxed one."""

    @staticmethod
    def forward(ctx, relaxed: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return (relaxed > 0.5).to(relaxed.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


def gumbel_bernoulli(log_odds: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw 0 or 1 with straight-through Gumbel-softmax gradient.

    The difference of two Gumbel variables is logistic, so the two-class form reduces to one
    sigmoid; the draw is 1 with probability sigmoid(log_odds) at every temperature.

    Args:
        log_odds: theta.
        temperature: tau > 0 of the relaxation in the backward pass.
        uniform: uniform draws in (0, 1), of ``log_odds``'s shape.

    Source: Jang et al., ICLR 2017, https://arxiv.org/abs/1611.01144; Maddison et al., ICLR 2017,
    appendix B (the binary concrete distribution).
    """
    logistic = torch.log(uniform) - torch.log1p(-uniform)
    result: Tensor = _HardSample.apply(torch.sigmoid((log_odds + logistic) / temperature))
    return result


LARGEST_LOG_ODDS = 4.0
"""Of the active pair: beta stays within 2 and 98 %, where its gradient is still felt."""


def logit(probability: float) -> float:
    """Return the log-odds of a probability."""
    return math.log(probability / (1 - probability))


class StochasticWeightQuantizer(nn.Module):
    """Quantizes a layer's weight at one of two adjacent candidate bitwidths, drawn each step.

    In evaluation mode nothing is drawn: the more probable of the two is used.

    Args:
        candidates: a quantizer for each candidate bitwidth, ascending; each has its own scale.
        start: index of the higher bitwidth of the first active pair.
        entry_beta: probability, when a pair becomes active, of the bitwidth the layer comes from:
            the higher one after a decay, the lower one after a rise.
        temperature: of the relaxation.

    Attributes:
        theta: ``(n - 1,)`` log-odds; entry ``i - 1`` belongs to the pair of candidates
            ``i`` and ``i - 1``.
        level: index of the active pair's higher candidate; 0 if there is only one candidate.
        generator: of the draws; set it to make them repeatable.
    """

    level: Tensor

    def __init__(
        self,
        candidates: Sequence[WeightQuantizer],
        *,
        start: int | None = None,
        entry_beta: float = 0.8,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        top = len(candidates) - 1
        start = top if start is None else max(min(start, top), min(top, 1))
        self.choices = tuple(candidate.bits for candidate in candidates)
        self.entry = logit(entry_beta)
        self.temperature = temperature
        self.generator: torch.Generator | None = None
        self.candidates = nn.ModuleList(candidates)
        like = candidates[0].base
        # until tried, steps up to the start are taken to be worth it and steps beyond it not, the
        # more so the further away: every bit more removes a quarter of the error the last one did
        theta = [self.entry * (start - step - (step >= start)) for step in range(top)]
        self.theta = nn.Parameter(like.new_tensor(theta))
        self.register_buffer("level", torch.tensor(start, device=like.device))
        self.residual = like.new_zeros(())
        """Mean squared rounding residual of the higher bitwidth, in steps, last forward."""

    def beta(self) -> Tensor:
        """Return the active pair's probability of the higher bitwidth."""
        level = int(self.level)
        return torch.sigmoid(self.theta[level - 1]) if level else torch.ones_like(self.residual)

    def expected_bits(self) -> float:
        """Return the mean bitwidth of a draw."""
        level, beta = int(self.level), float(self.beta().detach())
        return beta * self.choices[level] + (1 - beta) * self.choices[max(level - 1, 0)]

    def log_odds(self) -> list[float]:
        """Return theta as a list, one entry for each pair of adjacent candidates."""
        return [float(t) for t in self.theta.detach()]

    def move_(self, decay_below: float, rise_above: float | None) -> None:
        """Leave a pair that is decided: downwards (the paper's decay) or upwards (ours).

        Args:
            decay_below: the higher bitwidth is dropped when beta falls below this.
            rise_above: the next higher bitwidth is tried when beta rises above this; None never.
        """
        level = int(self.level)
        if level == 0:
            return
        # a pair must be able to turn back in good time
        self.theta.data[level - 1].clamp_(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        beta = float(self.beta().detach())
        if beta < decay_below and level > 1:
            self.level -= 1
            self.theta.data[level - 2] = self.entry
        elif rise_above is not None and beta > rise_above and level < len(self.choices) - 1:
            self.level += 1
            self.theta.data[level] = -self.entry

    def forward(self, weight: Tensor) -> Quantized:
        """Quantize ``weight`` ``(K, ...)`` at a drawn bitwidth."""
        level = int(self.level)
        candidate = self.candidates[level]
        assert isinstance(candidate, WeightQuantizer)
        upper: Quantized = candidate(weight)
        high, high_scale = upper[:2]
        self.residual = candidate.residual(weight, high, high_scale).square().mean()
        if level == 0:
            return upper
        lower: Quantized = self.candidates[level - 1](weight)
        if self.training:
            uniform = torch.rand((), generator=self.generator).clamp_(1e-6, 1 - 1e-6)
            draw = gumbel_bernoulli(
                self.theta[level - 1], self.temperature, uniform.to(weight.device)
            )
        else:
            draw = (self.theta[level - 1] >= 0).to(weight.dtype)
        chosen = draw * high + (1 - draw) * lower[0]
        return chosen, *(upper if draw > 0.5 else lower)[1:]


def quantization_error_regularizer(
    layers: "list[StochasticWeightQuantizer]", shares: list[float]
) -> Tensor:
    r"""Return the regularizer that makes bits decay unless the task resists.

    .. math:: L_{QER} = \sum_l c_l\, \beta_l\, 12\, \overline{r_l^2},
              \qquad r_l = (Q_b(w_l) - w_l) / s_{l,b}

    This reads the paper's :math:`\sum_l \lambda_b \beta_l \|Q_b(w) - w\|^2` with
    :math:`\lambda_b \propto (2^b - 1)^2`, and the error measured against the layer's range
    (:math:`s (2^b - 1)`), because a weight's absolute size means nothing under batch
    normalisation. Summed over a layer's weights this grows with their number; so
    :math:`c_l` is the layer's share of what is budgeted: of the weights for a budget on average
    bits, of the MACs for one on BitOPs. Rounding noise has :math:`\overline{r^2} = 1/12`, hence
    the 12: the sum is near 1 when every beta is 1.

    Args:
        layers: the stochastic quantizers, after a forward pass.
        shares: ``c_l``, summing to 1.

    Source: the exact formula is not in any source we could read; see docs/method.md.
    """
    total = layers[0].residual * 0
    for layer, share in zip(layers, shares, strict=True):
        if int(layer.level):
            total = total + share * layer.beta() * 12 * layer.residual
    return total
