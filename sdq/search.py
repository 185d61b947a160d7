"""Phase 1: learn a bitwidth for each layer under a budget."""

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.batches import generator
from sdq.checkpoint import Checkpoint
from sdq.config import SearchConfig, TrainConfig
from sdq.cost import Budget, LinearConstraint, check_reachable
from sdq.losses import Teacher
from sdq.policy import BitwidthPolicy
from sdq.projection import project
from sdq.quant_model import QuantModel, calibrate_, new_weight_quantizer
from sdq.stochastic import (
    StochasticWeightQuantizer,
    logit,
    quantization_error_regularizer,
)
from sdq.train import Forward, Loader, Watcher, fit, number_of_steps, weight_groups

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric

LOG_PRICE_RANGE = (math.log(1e-4), math.log(1e2))
"""Where the price may go. Beyond it the regularizer or the task has all the say anyway."""


class Price(nn.Module):
    """lambda_Q, steered so that the expected cost follows a straight line down to the budget.

    The paper fixes lambda_Q by hand and takes the size that comes out. A user has a size in mind;
    so the price rises while the policy is dearer than planned, and falls when it is cheaper.
    """

    log_price: Tensor

    first_usage: Tensor

    def __init__(self, settle: float, steps: int) -> None:
        super().__init__()
        self.settle = settle
        # the whole range can be crossed in a third of the steps
        self.step = 3 * (LOG_PRICE_RANGE[1] - LOG_PRICE_RANGE[0]) / steps
        self.register_buffer("log_price", torch.tensor(math.log(1e-2)))
        self.register_buffer("first_usage", torch.tensor(math.nan))

    def steer_(self, usage: float, progress: float) -> None:
        """Adjust the price; ``usage`` is expected cost over budget, ``progress`` in (0, 1]."""
        if torch.isnan(self.first_usage):
            self.first_usage.fill_(usage)
        first = float(self.first_usage)
        planned = first + (1.0 - first) * min(progress / (1 - self.settle), 1.0)
        # proportional near the plan, full speed when 10 % off
        off = 10 * (usage - planned) / planned
        self.log_price += self.step * max(-1.0, min(1.0, off))
        self.log_price.clamp_(*LOG_PRICE_RANGE)

    def forward(self) -> float:
        """Return lambda_Q."""
        return math.exp(float(self.log_price))


class BitwidthSearch:
    """The objective of phase 1: task loss plus priced quantization error.

    Args:
        qmodel: is changed: its searched layers draw their bitwidths from now on.
        constraints: of the budget.
        config: of the search.
        steps: optimizer steps of the whole search.
        teacher: a float network whose soft labels are learned; None learns the hard labels.
    """

    def __init__(
        self,
        qmodel: QuantModel,
        constraints: list[LinearConstraint],
        config: SearchConfig,
        steps: int,
        teacher: nn.Module | None = None,
    ) -> None:
        self.qmodel, self.constraints, self.config = qmodel, constraints, config
        self.names = [bits.name for bits in qmodel.policy if bits.searched]
        quant = qmodel.config
        self.layers = [
            StochasticWeightQuantizer(
                [new_weight_quantizer(qmodel.weight(name), b, quant) for b in quant.bit_choices],
                start=self._start(),
                entry_beta=config.entry_beta,
                temperature=config.temperature,
            )
            for name in self.names
        ]
        for name, layer in zip(self.names, self.layers, strict=True):
            qmodel.set_weight_quantizer_(name, layer)
        self.price = Price(config.settle, steps)
        self.task_losses: list[float] = []
        self.teacher = Teacher(teacher) if teacher is not None and config.distill else None
        self.module: nn.Module = _Searched(qmodel, self.price)
        self.weight_config = TrainConfig(lr=config.lr)
        one_pair = logit(config.entry_beta) - logit(config.decay_threshold)
        self.bitwidth_lr = config.bitwidth_lr or 12 * one_pair / steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights as in training, and theta at its own constant rate."""
        thetas = [layer.theta for layer in self.layers]
        ids = {id(theta) for theta in thetas}
        groups = weight_groups(self.module, self.weight_config)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        theta_group = {"params": thetas, "lr": self.bitwidth_lr, "weight_decay": 0.0}
        # a short memory of the gradient's size: it changes with the price by orders of magnitude
        return [*groups, {**theta_group, "constant": True, "betas": (0.9, 0.95)}]

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the task loss plus lambda_Q times the quantization-error regularizer."""
        logits = forward(images)
        if self.teacher is not None:
            task = self.teacher.loss(logits, images)
        else:
            task = F.cross_entropy(logits, labels)
        self.task_losses.append(float(task.detach()))
        if not self.layers:
            return task
        return task + self.price() * quantization_error_regularizer(self.layers, self._shares())

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Give the draws of this epoch their own generator."""
        draws = generator(self.config.seed, "gumbel", epoch)
        for layer in self.layers:
            layer.generator = draws
        self.task_losses.clear()

    def after_step(self, progress: float) -> None:
        """Leave decided pairs, and steer the price."""
        for layer in self.layers:
            layer.move_(self.config.decay_threshold, self.config.rise_threshold)
        if self.layers:
            self.price.steer_(self._tightest()[0], progress)

    def describe(self) -> dict[str, Any]:
        """Return task loss, price, budget use, and each layer's active bitwidth and beta."""
        usage = self._tightest()[0] if self.layers else 0.0
        layers = {
            name: [layer.choices[int(layer.level)], round(float(layer.beta().detach()), 4)]
            for name, layer in zip(self.names, self.layers, strict=True)
        }
        return {
            "task_loss": sum(self.task_losses) / max(len(self.task_losses), 1),
            "lambda_q": self.price(),
            "budget_use": usage,
            "bits_and_beta": layers,
        }

    def policy(self) -> BitwidthPolicy:
        """Return the most probable policy within the budget."""
        choices = self.qmodel.config.bit_choices
        chosen = project([utility(x) for x in self.layers], choices, self.constraints)
        return self.qmodel.policy.with_weight_bits(dict(zip(self.names, chosen, strict=True)))

    def _start(self) -> int | None:
        """Return the level at which every layer begins; None for the highest."""
        if self.config.start == "highest":
            return None
        choices, count = self.qmodel.config.bit_choices, len(self.names)
        above = (
            level
            for level, bits in enumerate(choices)
            if any(c.cost([bits] * count) > c.limit for c in self.constraints)
        )
        return next(above, None)

    def _tightest(self) -> tuple[float, LinearConstraint]:
        expected = [layer.expected_bits() for layer in self.layers]
        return max(
            ((c.cost(expected) / c.limit, c) for c in self.constraints), key=lambda pair: pair[0]
        )

    def _shares(self) -> list[float]:
        per_bit = self._tightest()[1].per_bit
        total = sum(per_bit)
        return [count / total for count in per_bit]


class _Searched(nn.Module):
    """The network and the price together: what a checkpoint of the search holds."""

    def __init__(self, qmodel: QuantModel, price: Price) -> None:
        super().__init__()
        self.qmodel, self.price = qmodel, price

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.qmodel(x)
        return result


def utility(layer: StochasticWeightQuantizer) -> list[float]:
    """Return the log-odds of each candidate against the lowest one.

    A candidate is reached through the steps below it, so its log-odds are their sum. Steps above
    the active pair were dropped, with beta at the threshold or under it.
    """
    total, sums = 0.0, [0.0]
    for theta in layer.log_odds():
        total += theta
        sums.append(total)
    return sums


def search(
    qmodel: QuantModel,
    loader: Loader,
    *,
    budget: Budget,
    teacher: nn.Module | None = None,
    config: SearchConfig | None = None,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> BitwidthPolicy:
    """Learn a policy within the budget; the model itself is left as it is.

    Args:
        qmodel: a quantized model; a copy of it is trained.
        loader: of ``(images, labels)``, with a length.
        budget: what the policy may cost; it is never exceeded.
        teacher: a float network whose soft labels are learned; None learns the hard labels, whose
            noise hides more of what a bit is worth.
        config: of the search.
        fabric: device and precision.
        checkpoint: where to save after each epoch, and to resume from.
        watch: called after every step.

    Raises:
        RequestError: no policy fits the budget; the message gives the reachable range.
        RunError: the loss became NaN or infinite.

    Source: Huang et al., SDQ, ICML 2022, section 3.2; steering and projection are ours.
    """
    config = config or SearchConfig()
    constraints = budget.constraints(qmodel.layers, qmodel.policy)
    check_reachable(constraints, qmodel.config.bit_choices)
    qmodel = copy.deepcopy(qmodel)
    if not qmodel.calibrated:
        calibrate_(qmodel, loader)
    objective = BitwidthSearch(
        qmodel, constraints, config, config.epochs * number_of_steps(loader), teacher
    )
    # a policy is what counts here: the weights are not kept
    off = {"select": "last", "bn_batches": 0}
    loop = objective.weight_config.replaced(epochs=config.epochs, seed=config.seed, **off)
    fit(objective, loader, loop, phase="search", fabric=fabric, checkpoint=checkpoint, watch=watch)
    return objective.policy()


def uniform_policy(qmodel: QuantModel, budget: Budget) -> BitwidthPolicy:
    """Return the policy with the same bits in every searched layer, the most the budget allows.

    Raises:
        RequestError: not even the lowest candidate fits.
    """
    constraints = budget.constraints(qmodel.layers, qmodel.policy)
    check_reachable(constraints, qmodel.config.bit_choices)
    names = [bits.name for bits in qmodel.policy if bits.searched]
    fitting = [
        bits
        for bits in qmodel.config.bit_choices
        if all(c.cost([bits] * len(names)) <= c.limit for c in constraints)
    ]
    return qmodel.policy.with_weight_bits(dict.fromkeys(names, max(fitting)))
