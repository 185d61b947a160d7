r"""Differentiable bitwidth parameters: stochastic quantization between adjacent bitwidths.

A unit (a layer, say) that is at candidate :math:`b_i` draws, in every training step, for its whole
weight

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
from typing import Literal

import torch
from torch import Tensor, nn

from sdq.learned_scale import ActQuantizer, Quantized, WeightQuantizer


class _HardSample(torch.autograd.Function):
    """Forward: 1 if the relaxed sample is above one half, else 0. Backward: of the relaxed one."""

    @staticmethod
    def forward(ctx, relaxed: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return (relaxed > 0.5).to(relaxed.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


Mixing = Literal["draw", "interpolate"]
"""How the two bitwidths of a pair meet in a forward pass: one is drawn (SDQ), or they are mixed in
the proportion of their probabilities (FracBits and others, what SDQ argues against)."""


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
"""Of the active pair: beta stays within 2 and 98 %, where its gradient is still felt, or goes just
beyond the thresholds at which pairs are left, where these are further out."""

BEYOND = 0.1
"""How far beyond them, in log-odds."""


def logit(probability: float) -> float:
    """Return the log-odds of a probability."""
    return math.log(probability / (1 - probability))


class BitwidthParameters(nn.Module):
    """The differentiable bitwidth parameters of all units of a network.

    Args:
        choices: candidate bitwidths of each unit, ascending.
        start: index of the bitwidth that each unit begins at, the higher one of its first active
            pair, or of the lowest pair the lower one (0); None for the highest.
        entry_beta: probability, when a pair becomes active, of the bitwidth the unit comes from:
            the higher one after a decay, the lower one after a rise.
        mixing: draw one bitwidth, or interpolate between the two.

    Attributes:
        theta: ``(U, n - 1)`` log-odds; entry ``i - 1`` of a row belongs to the pair of candidates
            ``i`` and ``i - 1``.
        level: ``(U,)`` index of the active pair's higher candidate; 0 where there is only one.
        temperature: of the relaxation.
        generator: of the draws; set it to make them repeatable.
    """

    level: Tensor
    bits: Tensor
    top: Tensor

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        *,
        start: Sequence[int] | None = None,
        entry_beta: float = 0.8,
        mixing: Mixing = "draw",
    ) -> None:
        super().__init__()
        self.choices = tuple(tuple(row) for row in choices)
        self.entry, self.mixing = logit(entry_beta), mixing
        self.temperature = 1.0
        self.generator: torch.Generator | None = None
        width = max((len(row) for row in choices), default=1)
        padded = [[*row, *[row[-1]] * (width - len(row))] for row in choices]
        top = torch.tensor([len(row) - 1 for row in choices], dtype=torch.long)
        begin = top if start is None else torch.tensor(start, dtype=torch.long)
        begin = torch.minimum(begin, top)
        # until tried, steps up to the start are taken to be worth it and steps beyond it not, the
        # more so the further away: every bit more removes a quarter of the error the last one did
        step = torch.arange(width - 1)
        away = begin[:, None] - step - (step >= begin[:, None]).long()
        self.theta = nn.Parameter(self.entry * away.float())
        self.register_buffer("level", torch.minimum(begin.clamp_min(1), top))
        # both follow from the choices and are not part of the state
        bits = torch.tensor(padded, dtype=torch.float32)
        self.register_buffer("bits", bits.reshape(len(choices), -1), persistent=False)
        self.register_buffer("top", top, persistent=False)
        self._share: Tensor | None = None
        self.levels: list[int] = self.level.tolist()
        """``level`` as numbers, as of the last draw: no wait for the device."""

    def __len__(self) -> int:
        return len(self.choices)

    def _active(self) -> Tensor:
        """Return the log-odds of the active pairs, ``(U,)``."""
        if self.theta.shape[1] == 0:
            return self.theta.sum(1)
        return self.theta.gather(1, (self.level - 1).clamp_min(0)[:, None])[:, 0]

    def beta(self) -> Tensor:
        """Return each active pair's probability of the higher bitwidth, ``(U,)``."""
        beta = torch.sigmoid(self._active())
        return torch.where(self.level > 0, beta, torch.ones_like(beta))

    def probabilities(self) -> Tensor:
        """Return each candidate's probability in a draw, ``(U, n)``."""
        beta = self.beta()
        lower = (self.level - 1).clamp_min(0)[:, None]
        found = torch.zeros_like(self.bits).scatter_add(1, self.level[:, None], beta[:, None])
        return found.scatter_add(1, lower, 1 - beta[:, None])

    def expected_bits(self) -> Tensor:
        """Return the mean bitwidth of each unit's draw, ``(U,)``."""
        return (self.probabilities() * self.bits).sum(1)

    def utilities(self) -> list[list[float]]:
        """Return the log-odds of each unit's candidates against its lowest one.

        A candidate is reached through the steps below it, so its log-odds are their sum. Steps
        above the active pair were dropped, with beta at the threshold or under it, or were never
        tried and are worth what they were taken for at the start.
        """
        sums = torch.cat([self.theta.new_zeros(len(self), 1), self.theta.cumsum(1)], dim=1)
        rows = sums.detach().tolist()
        return [row[: len(c)] for row, c in zip(rows, self.choices, strict=True)]

    def draw_(self) -> None:
        """Draw for the next forward passes; in evaluation mode, take the more probable bitwidth."""
        self.levels = self.level.tolist()
        if not self.training:
            self._share = (self.beta() >= 0.5).to(self.theta.dtype).detach()
        elif self.mixing == "interpolate":
            self._share = self.beta()
        else:
            # drawn on the CPU, so that a seed means the same on every device
            uniform = torch.rand(len(self), generator=self.generator).clamp_(1e-6, 1 - 1e-6)
            draw = gumbel_bernoulli(self._active(), self.temperature, uniform.to(self.theta.device))
            self._share = torch.where(self.level > 0, draw, torch.ones_like(draw))

    def share(self) -> Tensor:
        """Return the share of the higher bitwidth in this forward pass, ``(U,)``."""
        if self._share is None:
            self.draw_()
        assert self._share is not None
        return self._share

    @torch.no_grad()
    def move_(self, decay_below: float, rise_above: float | None) -> None:
        """Leave pairs that are decided: downwards (the paper's decay) or upwards (ours).

        Args:
            decay_below: the higher bitwidth is dropped when beta falls below this.
            rise_above: the next higher bitwidth is tried when beta rises above this; None never.
        """
        if self.theta.shape[1] == 0:
            return
        # a pair must be able to turn back in good time
        lowest = min(-LARGEST_LOG_ODDS, logit(decay_below) - BEYOND)
        highest = max(LARGEST_LOG_ODDS, logit(rise_above) + BEYOND if rise_above else 0.0)
        active = self._active().clamp(lowest, highest)
        self._set_active_(active)
        beta = torch.sigmoid(active)
        down = (beta < decay_below) & (self.level > 1)
        up = torch.zeros_like(down)
        if rise_above is not None:  # a unit of one candidate is at its top
            up = (beta > rise_above) & (self.level < self.top) & ~down
        self.level += up.long() - down.long()
        self._share = None
        entry = torch.where(up, -self.entry, self.entry)
        self._set_active_(torch.where(up | down, entry, self._active()))

    def _set_active_(self, log_odds: Tensor) -> None:
        self.theta.scatter_(1, (self.level - 1).clamp_min(0)[:, None], log_odds[:, None])


class StochasticWeightQuantizer(nn.Module):
    """Quantizes a layer's weight at one of two adjacent candidate bitwidths, drawn each step.

    Args:
        candidates: a quantizer for each candidate bitwidth, ascending; each has its own scale.
        parameters: of the whole network.
        units: this layer's rows in them: one, or one for each output channel.
    """

    def __init__(
        self,
        candidates: Sequence[WeightQuantizer],
        parameters: BitwidthParameters,
        units: Sequence[int],
    ) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        # in a list: the parameters are the network's, and stand once in its state
        self._shared = [parameters]
        self.units = list(units)
        self._weight = torch.empty(0)
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._levels: list[int] = []

    @property
    def weights_per_unit(self) -> int:
        """Number of weights that one unit decides here."""
        return self._weight.numel() // len(self.units)

    def forward(self, weight: Tensor) -> Quantized:
        """Quantize ``weight`` ``(K, ...)`` at the bitwidths drawn."""
        parameters = self._shared[0]
        share = parameters.share()[self.units]  # first: it may draw, from pairs that have moved
        self._levels = [parameters.levels[u] for u in self.units]
        wanted = sorted({*self._levels, *(max(level - 1, 0) for level in self._levels)})
        outputs: dict[int, Quantized] = {k: self.candidates[k](weight) for k in wanted}
        self._weight = weight.detach()
        self._outputs = {k: (q[0].detach(), q[1].detach()) for k, q in outputs.items()}
        values = {k: q[0] for k, q in outputs.items()}
        upper = outputs[max(self._levels)]
        high, low = self._select(values, 0), self._select(values, 1)
        scales = {k: q[1] for k, q in outputs.items()}
        scale = upper[1] if len(self.units) == 1 else self._select(scales, 0)
        share = share.reshape((-1,) + (1,) * (weight.dim() - 1))
        return share * high + (1 - share) * low, scale, *upper[2:]

    def residual(self) -> Tensor:
        """Return the mean squared rounding residual of the higher bitwidth in the last forward.

        Returns:
            ``(units,)``, in steps: rounding noise has 1/12.
        """
        return self._mean_square(self._select(self._steps(), 0))

    def relative_error(self) -> Tensor:
        """Return the squared error of the higher bitwidth over that of the lower, ``(units,)``."""
        errors = {k: steps * self._outputs[k][1] for k, steps in self._steps().items()}
        low = self._mean_square(self._select(errors, 1)).clamp_min(1e-12)
        return self._mean_square(self._select(errors, 0)) / low

    def _steps(self) -> dict[int, Tensor]:
        """Return each weight's rounding residual in steps, by candidate."""
        found = {}
        for level, (values, scale) in self._outputs.items():
            candidate = self.candidates[level]
            assert isinstance(candidate, WeightQuantizer)
            found[level] = candidate.residual(self._weight, values, scale)
        return found

    def _select(self, tensors: dict[int, Tensor], below: int) -> Tensor:
        """Put together, from each unit's candidate ``below`` its level, its part of a tensor."""
        levels = [max(level - below, 0) for level in self._levels]
        if len(levels) == 1:
            return tensors[levels[0]]
        return torch.stack([tensors[level][k] for k, level in enumerate(levels)])

    def _mean_square(self, error: Tensor) -> Tensor:
        return error.square().reshape(len(self.units), -1).mean(1)


class StochasticActQuantizer(nn.Module):
    """Quantizes an activation at one of two adjacent candidate bitwidths, drawn each step.

    The paper fixes activation bitwidths; learning them as it learns the weights' is ours.

    Args:
        candidates: a quantizer for each candidate bitwidth, ascending, calibrated.
        parameters: of the whole network.
        unit: this activation's row in them.
    """

    def __init__(
        self, candidates: Sequence[ActQuantizer], parameters: BitwidthParameters, unit: int
    ) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self._shared = [parameters]
        self.unit = unit

    def forward(self, x: Tensor) -> Quantized:
        """Quantize ``x`` of any shape at the bitwidth drawn."""
        parameters = self._shared[0]
        share = parameters.share()[self.unit]  # first: it may draw, from pairs that have moved
        level = parameters.levels[self.unit]
        upper: Quantized = self.candidates[level](x)
        if not level:
            return upper
        lower: Quantized = self.candidates[level - 1](x)
        return share * upper[0] + (1 - share) * lower[0], *upper[1:]
