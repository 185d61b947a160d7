"""What phase 1 minimizes, from where, and how its prices and temperature move."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdq.calibration import calibrate_
from sdq.config import SearchConfig
from sdq.cost import Budget
from sdq.gradient_search import DAMPING, LOG_PRICE_RANGE, BitwidthSearch, Prices
from sdq.quant_model import QuantModel
from sdq.search import search
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace

Batch = tuple[Tensor, Tensor]
QUICK = SearchConfig(epochs=2, lr=3e-3)


def objective_of(
    qmodel: QuantModel, budget: Budget, config: SearchConfig, loader: Any = (), steps: int = 10
) -> BitwidthSearch:
    space = SearchSpace.of(qmodel, config.granularity)
    constraints = budget.constraints(space)
    return BitwidthSearch(SearchProblem(qmodel, loader, space, constraints, config), "draw", steps)


def test_the_loss_is_the_task_s_plus_the_regularizer_priced_by_share_of_the_budget(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy(bit_choices=(1, 2, 3, 4))
    images, labels = batches()[0]
    calibrate_(qmodel, batches())
    objective = objective_of(qmodel, Budget(avg_weight_bits=2.0), QUICK)
    objective.prices.log_price.fill_(math.log(0.5))
    objective.module.eval()
    objective.bits.draw_()
    task = float(nn.functional.cross_entropy(qmodel(images), labels).detach())
    counts = [b.num_weights for b in qmodel.policy if b.searched]
    regularizer = sum(
        count / (2.0 * sum(counts)) * float(beta) * 12 * float(x.residual())
        for count, beta, x in zip(
            counts, objective.bits.beta().detach(), objective.quantizers, strict=True
        )
    )
    loss = float(objective.loss(qmodel, images, labels).detach())
    assert loss == pytest.approx(task + 0.5 * regularizer, rel=1e-5)  # float32


@pytest.mark.parametrize("distill", [True, False])
def test_a_teacher_s_soft_labels_take_the_place_of_labels(
    distill: bool, qtoy: Callable[..., QuantModel], toy: Callable[..., nn.Module],
    batches: Callable[..., list[Batch]],
) -> None:  # fmt: skip
    qmodel, teacher = qtoy(), toy().eval()
    images, labels = batches()[0]
    calibrate_(qmodel, batches())
    config = QUICK.replaced(distill=distill)
    space = SearchSpace.of(qmodel, config.granularity)
    constraints = Budget(avg_weight_bits=2.0).constraints(space)
    problem = SearchProblem(qmodel, batches(), space, constraints, config, teacher)
    objective = BitwidthSearch(problem, "draw", steps=10)
    objective.module.eval()
    objective.loss(qmodel, images, labels)
    logits = qmodel(images)  # under the bits that were drawn
    soft = -(teacher(images).softmax(1) * logits.log_softmax(1)).sum(1).mean()
    hard = nn.functional.cross_entropy(logits, labels)
    expected = float((soft if distill else hard).detach())
    assert objective.task_losses == pytest.approx([expected], rel=1e-5)


def test_the_error_of_a_block_is_the_mean_over_its_weights(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    """All layers are one unit; its step costs one bit of the budget's two."""
    qmodel = qtoy(bit_choices=(2, 3))
    calibrate_(qmodel, batches())
    config = QUICK.replaced(granularity="network")
    objective = objective_of(qmodel, Budget(avg_weight_bits=2.0), config)
    objective.bits.draw_()
    qmodel(batches()[0][0])
    objective.prices.log_price.fill_(0.0)
    counts = [b.num_weights for b in qmodel.policy if b.searched]
    residuals = [float(q.residual()) for q in objective.quantizers]
    mean = sum(n * r for n, r in zip(counts, residuals, strict=True)) / sum(counts)
    assert len(set(counts)) > 1
    assert mean != pytest.approx(sum(residuals) / len(residuals), rel=1e-3)
    expected = 0.5 * float(objective.bits.beta().detach()) * 12 * mean
    assert float(objective.regularizer().detach()) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_regularizer_pushes_every_beta_down(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    for regularizer in ("error", "cost"):
        qmodel = qtoy()
        calibrate_(qmodel, batches())
        config = QUICK.replaced(regularizer=regularizer, error_weight=0.0)
        objective = objective_of(qmodel, Budget(avg_weight_bits=2.0, bops=1e7), config)
        objective.bits.draw_()
        qmodel(batches()[0][0])
        objective.regularizer().backward()
        active = objective.bits.theta.grad.gather(1, objective.bits.level[:, None] - 1)
        assert (active > 0).all()


def test_the_cost_regularizer_against_hand_numbers(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy(bit_choices=(2, 4))
    calibrate_(qmodel, batches())
    config = QUICK.replaced(regularizer="cost", error_weight=0.25)
    objective = objective_of(qmodel, Budget(avg_weight_bits=3.0), config)
    objective.bits.draw_()
    qmodel(batches()[0][0])
    objective.prices.log_price.fill_(math.log(0.5))
    expected = 0.5 * (0.8 * 4 + 0.2 * 2) / 3.0  # all betas are at entry
    errors = [float(q.relative_error()) for q in objective.quantizers]
    expected += 0.25 * sum(0.8 * e + 0.2 for e in errors)
    assert float(objective.regularizer().detach()) == pytest.approx(expected, rel=1e-5)


def test_start_next_to_the_budget(
    qtoy: Callable[..., QuantModel],
) -> None:
    for limit, bits in ((1.0, 2), (2.5, 3), (4.0, 6), (8.0, 8), (9.0, 8)):
        found = objective_of(qtoy(), Budget(avg_weight_bits=limit), SearchConfig()).bits
        assert [c[k] for c, k in zip(found.choices, found.levels, strict=True)] == [bits] * 4
    config = SearchConfig(start="highest")
    found = objective_of(qtoy(), Budget(avg_weight_bits=2.0), config).bits
    assert [c[k] for c, k in zip(found.choices, found.levels, strict=True)] == [8] * 4


def test_start_where_hessian_ends(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    """A unit at the lowest candidate begins in its only pair, with the odds turned."""
    qmodel, budget = qtoy(), Budget(avg_weight_bits=1.7)
    calibrate_(qmodel, batches())
    config = SearchConfig(start="hessian", entry_beta=0.8)
    policy = search(qmodel, batches(), budget=budget, method="hessian")
    bits = [b.weight_bits for b in policy if b.searched]
    space = SearchSpace.of(qmodel, config.granularity)
    problem = SearchProblem(qmodel, batches(), space, budget.constraints(space), config)
    found = BitwidthSearch(problem, "draw", steps=10).bits
    for row, level, beta, b in zip(
        found.choices, found.levels, found.beta().tolist(), bits, strict=True
    ):
        assert row[max(level - (beta < 0.5), 0)] == b
        assert beta == pytest.approx(0.2 if b == row[0] else 0.8)
    assert 1 in bits
    assert max(bits) > 1


def test_thetas_learn_at_their_own_constant_rate_without_decay(
    qtoy: Callable[..., QuantModel],
) -> None:
    config = SearchConfig(bitwidth_lr=0.07)
    objective = objective_of(qtoy(), Budget(avg_weight_bits=9.0), config)
    groups = objective.parameter_groups()
    assert [id(p) for p in groups[2]["params"]] == [id(objective.bits.theta)]
    assert (groups[2]["lr"], groups[2]["weight_decay"], groups[2]["constant"]) == (0.07, 0.0, True)
    every = [id(p) for g in groups for p in g["params"]]
    assert len(every) == len(set(every)) == len(list(objective.module.parameters()))


def test_the_temperature_falls_along_an_exponential(qtoy: Callable[..., QuantModel]) -> None:
    config = SearchConfig(temperature=2.0, end_temperature=0.5)
    objective = objective_of(qtoy(), Budget(avg_weight_bits=9.0), config)
    objective.usage = torch.ones(1)
    found = []
    for progress in (0.0, 0.5, 1.0):
        objective.after_step(progress)
        found.append(objective.bits.temperature)
    assert found == pytest.approx([2.0, 1.0, 0.5])


def test_the_price_rises_above_the_plan_and_falls_below_it() -> None:
    prices = Prices(1, settle=0.5, steps=100)
    assert float(prices()) == pytest.approx(1e-2, rel=1e-6)

    def steer(usage: float, progress: float) -> tuple[float, float]:
        prices.steer_(torch.tensor([usage]), progress)
        return float(prices.log_price), math.log(float(prices()))

    # the first usage defines the plan: 2 down to 1 over half the steps
    steer(2.0, 0.01)
    assert float(prices.first_usage) == 2.0
    start = float(prices.log_price)
    summed, acting = steer(1.5, 0.25)  # planned 1.5: on the plan
    assert [summed, acting] == pytest.approx([start, start], abs=1e-6)
    step = 1.5 * (LOG_PRICE_RANGE[1] - LOG_PRICE_RANGE[0]) / 100
    summed, acting = steer(1.9, 0.25)  # more than 10 % off
    assert summed == pytest.approx(start + step, rel=1e-5)
    assert acting == pytest.approx(summed + DAMPING, rel=1e-5)
    summed, acting = steer(0.95, 0.9)  # planned 1: 5 % below, half speed
    assert summed == pytest.approx(start + step / 2, rel=1e-4)
    assert acting == pytest.approx(summed - DAMPING / 2, rel=1e-4)
    for usage, end in ((9.0, 1), (0.1, 0)):
        for _ in range(200):
            summed, _ = steer(usage, 0.9)
        assert summed == pytest.approx(LOG_PRICE_RANGE[end], rel=1e-5)


def test_a_fixed_lambda_is_not_steered() -> None:
    prices = Prices(2, settle=0.5, steps=100, fixed=0.3)
    prices.steer_(torch.tensor([9.0, 0.1]), 0.9)
    assert prices().tolist() == pytest.approx([0.3, 0.3])
