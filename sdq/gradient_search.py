"""Bitwidths learned by gradient: the objective of phase 1 and the prices of bits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdq.batches import generator
from sdq.calibration import calibrate_acts
from sdq.config import TrainConfig
from sdq.expected_cost import ExpectedCost
from sdq.learned_scale import learned_gains
from sdq.search_methods import hessian
from sdq.search_problem import SearchProblem
from sdq.stochastic import (
    BitwidthParameters,
    Mixing,
    StochasticActQuantizer,
    StochasticWeightQuantizer,
    logit,
)
from sdq.task import Teacher, task_of
from sdq.train import Forward, fit, number_of_steps, weight_groups

LOG_PRICE_RANGE = (math.log(1e-4), math.log(1e2))
"""Where the price may go. Beyond it the regularizer or the task has all the say anyway."""

DAMPING = 3.0
"""Of the log-price while the cost is off its plan by 10 % or more. The price's sum follows the cost
with delay, for theta is a sum itself: without a part that acts at once the cost swings about the
plan and ends up to 15 % beside it."""

SNAPSHOTS = 20
"""Points of an epoch at which the expected bits are noted for the run's plots."""


class Prices(nn.Module):
    """lambda_Q of each constraint, steered so that its expected cost falls on a line to the limit.

    The paper fixes lambda_Q by hand and takes the size that comes out. A user has a size in mind;
    so a price rises while the policy is dearer than planned, and falls when it is cheaper.

    Args:
        count: of constraints.
        settle: share of the steps at the end in which the plan is the limit itself.
        steps: of the whole search.
        fixed: the price of all, if they are not to be steered.
    """

    log_price: Tensor
    off: Tensor
    first_usage: Tensor

    def __init__(self, count: int, settle: float, steps: int, fixed: float | None = None) -> None:
        super().__init__()
        self.settle, self.fixed = settle, fixed
        self.pace_(steps)
        self.register_buffer("log_price", torch.full((count,), math.log(1e-2)))
        self.register_buffer("off", torch.zeros(count))
        self.register_buffer("first_usage", torch.full((count,), math.nan))

    def pace_(self, steps: int) -> None:
        """Set how far the log-price may go in a step, from the steps of the whole search."""
        # the whole range can be crossed in two thirds of the steps
        self.step = 1.5 * (LOG_PRICE_RANGE[1] - LOG_PRICE_RANGE[0]) / steps

    def steer_(self, usage: Tensor, progress: float) -> None:
        """Adjust the prices.

        Args:
            usage: expected cost over limit, one a constraint.
            progress: share of the steps done, in (0, 1].
        """
        self.first_usage.copy_(torch.where(self.first_usage.isnan(), usage, self.first_usage))
        first = self.first_usage
        planned = first + (1.0 - first) * min(progress / (1 - self.settle), 1.0)
        # proportional near the plan, full speed when 10 % off
        self.off.copy_((10 * (usage - planned) / planned).clamp(-1.0, 1.0))
        self.log_price += self.step * self.off
        self.log_price.clamp_(*LOG_PRICE_RANGE)

    def forward(self) -> Tensor:
        """Return lambda_Q of each constraint."""
        if self.fixed is not None:
            return torch.full_like(self.log_price, self.fixed)
        return (self.log_price + DAMPING * self.off).exp()


class BitwidthSearch:
    """The objective of phase 1: task loss plus priced quantization error or cost.

    Args:
        problem: its model is changed: searched layers draw their bitwidths from now on.
        mixing: draw one of the two bitwidths of a pair (SDQ), or interpolate.
        steps: optimizer steps of the whole search.
    """

    def __init__(self, problem: SearchProblem, mixing: Mixing, steps: int) -> None:
        self.problem, self.config, self.steps = problem, problem.config, steps
        self.space, config = problem.space, problem.config
        self.bits = BitwidthParameters(
            [unit.choices for unit in self.space.units],
            start=self._start(), entry_beta=config.entry_beta, mixing=mixing,
        )  # fmt: skip
        self.quantizers = self._insert_()
        width = self.bits.bits.shape[1]
        self.costs = nn.ModuleList(ExpectedCost(c, width) for c in problem.constraints)
        self.prices = Prices(len(self.costs), config.settle, steps, config.lambda_q)
        teacher = problem.teacher if config.distill else None
        self.teacher = Teacher(teacher) if teacher is not None else None
        self.module: nn.Module = _Searched(problem.qmodel, self.bits, self.prices)
        for part in (self.bits, self.costs, self.prices):
            part.to(next(problem.qmodel.parameters()).device)
        self.weight_config = TrainConfig(lr=config.lr)
        self.one_pair = logit(config.entry_beta) - logit(config.decay_threshold)
        """How far theta goes from where a pair is entered to where it is left."""
        self.bitwidth_lr = config.bitwidth_lr or 12 * self.one_pair / steps
        self.task_losses: list[float] = []
        self.trajectory: list[list[float]] = []
        self.price_trajectory: list[list[float]] = []
        self.usage = torch.full((len(self.costs),), math.nan)
        if not config.train_weights:
            scales = learned_gains(problem.qmodel)
            for parameter in problem.qmodel.parameters():
                parameter.requires_grad_(parameter in scales)

    def _start(self) -> list[int] | None:
        """Return the level at which every unit begins; None for the highest."""
        saved = self.problem.checkpoint
        resumed = saved is not None and saved.path.exists()  # and has levels of its own
        if self.config.start == "highest" or resumed:
            return None
        if self.config.start == "hessian":
            return hessian.choose(self.problem)
        units, constraints = self.space.units, self.problem.constraints
        for level in range(max((len(unit.choices) for unit in units), default=0)):
            picks = [min(level, len(unit.choices) - 1) for unit in units]
            if any(c.cost(picks) > c.limit for c in constraints):
                return picks
        return None

    def _insert_(self) -> list[StochasticWeightQuantizer]:
        """Put stochastic quantizers into the model; return those of weights."""
        qmodel = self.problem.qmodel
        acts = {unit.name: (u, unit.choices) for u, unit in enumerate(self.space.units)
                if unit.is_act}  # fmt: skip
        if acts:
            # before weights draw their bits: what activations are then would be chance
            loader = self.problem.loader
            candidates = calibrate_acts(qmodel, loader, {n: c for n, (_, c) in acts.items()})
            for name, (u, _) in acts.items():
                act = StochasticActQuantizer(candidates[name], self.bits, u)
                qmodel.set_act_quantizer_(name, act)
        found: list[StochasticWeightQuantizer] = []
        rows: dict[int, list[int]] = {}
        for u, unit in enumerate(self.space.units):
            if not unit.is_act:
                for i in unit.layers:
                    rows.setdefault(i, []).append(u)
        for i, units in rows.items():
            name = self.space.layers[i].name
            quantizer = StochasticWeightQuantizer(
                [qmodel.new_weight_quantizer(name, b) for b in self.space.units[units[0]].choices],
                self.bits,
                units,
            )
            qmodel.set_weight_quantizer_(name, quantizer)
            found.append(quantizer)
        return found

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights as in training, and theta at its own constant rate."""
        groups = weight_groups(self.module, self.weight_config)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not self.bits.theta]
        thetas = [self.bits.theta] if self.bits.theta.numel() else []
        theta_group = {"params": thetas, "lr": self.bitwidth_lr, "weight_decay": 0.0}
        # a short memory of the gradient's size: it changes with the price by orders of magnitude
        return [*groups, {**theta_group, "constant": True, "betas": (0.9, 0.95)}]

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the task loss plus lambda_Q times the regularizer."""
        self.bits.draw_()
        logits = forward(images)
        if self.teacher is not None:
            task = self.teacher.loss(logits, images)
        else:
            task = task_of(logits).loss(logits, labels)
        self.task_losses.append(float(task.detach()))
        return task + self.regularizer()

    def regularizer(self) -> Tensor:
        r"""Return the priced regularizer, which makes bits decay unless the task resists.

        ``error``, our reading of the paper's
        :math:`\sum_l \lambda_b \beta_l \|Q_b(w) - w\|^2` with
        :math:`\lambda_b \propto (2^b - 1)^2`:

        .. math:: \lambda_Q \sum_u c_u\, \beta_u\, 12\, \overline{r_u^2},
                  \qquad r = (Q_b(w) - w) / s_b

        The error counts in steps of the quantizer, because a weight's absolute size means nothing
        under batch normalisation; for weights normalised to [-1, 1] that is the paper's factor.
        Summed over a layer's weights it grows with their number; so :math:`c_u` is what the step
        from the lower to the higher bitwidth costs, as a share of the budget. Rounding noise has
        :math:`\overline{r^2} = 1/12`, hence the 12; activations count with exactly that.

        ``cost``: lambda_Q times the expected cost over the budget, plus lambda_e times the sum of
        each layer's expected weight error over that of its lower bitwidth.

        Several constraints have a price each, and their regularizers are added.

        Source: the paper's exact formula is not in any source we could read; docs/method.md.
        """
        probabilities = self.bits.probabilities()
        costs = torch.stack([cost(probabilities) for cost in self.costs])
        self.usage, prices = costs.detach(), self.prices().to(costs)
        priced, beta = (prices * costs).sum(), self.bits.beta()
        movable = (self.bits.level > 0).to(beta.dtype)
        if self.config.regularizer == "cost":
            # activations, whose tensors are not looked at, have an error of 1: no gradient
            errors = self._per_unit(StochasticWeightQuantizer.relative_error, of_acts=1.0)
            error = beta * errors + (1 - beta)
            return priced + self.config.error_weight * (movable * error).sum()
        (slope,) = torch.autograd.grad(priced, probabilities)
        higher = slope.gather(1, self.bits.level[:, None])[:, 0]
        lower = slope.gather(1, (self.bits.level - 1).clamp_min(0)[:, None])[:, 0]
        # activations count as rounding noise, without a look at the tensors
        residual = 12 * self._per_unit(StochasticWeightQuantizer.residual, of_acts=1 / 12)
        return (movable * (higher - lower) * beta * residual).sum()

    def _per_unit(
        self, figure: Callable[[StochasticWeightQuantizer], Tensor], of_acts: float
    ) -> Tensor:
        """Return a figure of the weight quantizers for every unit, weighted by weights."""
        theta = self.bits.theta
        total, count = theta.new_zeros(len(self.bits)), theta.new_zeros(len(self.bits))
        for quantizer in self.quantizers:
            value = figure(quantizer)
            size = float(quantizer.weights_per_unit)
            index = torch.tensor(quantizer.units, device=theta.device)
            total = total.index_add(0, index, value.to(theta.dtype) * size)
            count = count.index_add(0, index, torch.full_like(value, size).to(theta.dtype))
        return torch.where(count > 0, total / count.clamp_min(1), torch.full_like(total, of_acts))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Give the draws of this epoch their own generator."""
        self.bits.generator = generator(self.config.seed, "gumbel", epoch)
        self.cool_(epoch / epochs)  # a resumed search is not at the temperature it began with
        self.task_losses.clear()
        self.trajectory.clear()
        self.price_trajectory.clear()

    def after_step(self, progress: float) -> None:
        """Leave decided pairs, steer the price, cool down."""
        config = self.config
        self.bits.move_(config.decay_threshold, config.rise_threshold)
        self.prices.steer_(self.usage, progress)
        self.cool_(progress)
        if len(self.task_losses) % max(self.steps // config.epochs // SNAPSHOTS, 1) == 0:
            expected = self.bits.expected_bits().detach().tolist()
            self.trajectory.append([round(progress, 4), *(round(b, 3) for b in expected)])
            steered = [*self.usage.tolist(), *self.prices().tolist()]
            self.price_trajectory.append(
                [round(progress, 4), *(float(f"{x:.4g}") for x in steered)]
            )

    def cool_(self, progress: float) -> None:
        """Set the temperature of the draws after a share of the steps."""
        first, last = self.config.temperature, self.config.end_temperature
        self.bits.temperature = first * ((last or first) / first) ** progress

    def describe(self) -> dict[str, Any]:
        """Return task loss, price, budget use, and each unit's active bitwidth and beta."""
        betas, limits = self.bits.beta().detach().tolist(), self.problem.constraints
        units = {
            unit.name: [unit.choices[level], round(beta, 4)]
            for unit, level, beta in zip(
                self.space.units, self.bits.level.tolist(), betas, strict=True
            )
        }
        return {
            "task_loss": sum(self.task_losses) / max(len(self.task_losses), 1),
            "lambda_q": {c.name: float(p) for c, p in zip(limits, self.prices(), strict=True)},
            "budget_use": {c.name: float(u) for c, u in zip(limits, self.usage, strict=True)},
            "bits_and_beta": units,
            "trajectory": [list(point) for point in self.trajectory],
            "price_trajectory": [list(point) for point in self.price_trajectory],
        }


class _Searched(nn.Module):
    """The network, its bitwidth parameters and the prices: what a checkpoint of a search holds."""

    def __init__(self, qmodel: nn.Module, bits: BitwidthParameters, prices: Prices) -> None:
        super().__init__()
        self.qmodel, self.bits, self.prices = qmodel, bits, prices

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.qmodel(x)
        return result


def learn(problem: SearchProblem, mixing: Mixing) -> list[int]:
    """Do a search by gradient and return the most probable candidates within the budget."""
    config = problem.config
    steps = config.epochs * number_of_steps(problem.loader)
    objective = BitwidthSearch(problem, mixing, steps)
    # bits are what counts here: weights are at most what fine-tuning starts from
    off = {"select": "last", "bn_batches": 0}
    loop = objective.weight_config.replaced(epochs=config.epochs, seed=config.seed, **off)
    fit(
        objective, problem.loader, loop, phase="search", fabric=problem.fabric,
        checkpoint=problem.checkpoint, watch=problem.watch,
    )  # fmt: skip
    return problem.project(objective.bits.utilities())
