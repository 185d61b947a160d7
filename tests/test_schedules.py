"""The learning rate at moments worked out by hand, and against torch's schedulers."""

import math
from typing import get_args

import pytest
import torch

from sdq.config import Schedule
from sdq.schedules import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 0.2 of the steps rise; then 0, a quarter, a half, three quarters and all of the rest
        ("cosine", [1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("step", [1, 1, 0.1, 0.01, 0.01]),
        ("constant", [1, 1, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(schedule: Schedule, expected: list[float]) -> None:
    found = [learning_rate(schedule, done, 0.2) for done in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert found == pytest.approx(expected, abs=1e-12)  # float64


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_rise(schedule: Schedule) -> None:
    assert [learning_rate(schedule, done, 0.2) for done in (0.05, 0.1)] == [0.25, 0.5]
    # a first step at zero would be wasted
    assert learning_rate(schedule, 0.0, 0.2) == 1e-3
    assert learning_rate(schedule, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_schedules_equal_torch_s(schedule: Schedule) -> None:
    steps = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = torch.optim.lr_scheduler
    theirs = {
        "cosine": lambda: make.CosineAnnealingLR(optimizer, steps),
        "linear": lambda: make.LinearLR(optimizer, 1.0, 0.0, steps),
        "step": lambda: make.MultiStepLR(optimizer, [20, 30], 0.1),
        "constant": lambda: make.ConstantLR(optimizer, 1.0, steps),
    }[schedule]()
    for step in range(steps):
        # they multiply step by step
        found = learning_rate(schedule, step / steps, 0.0)
        assert found == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-9), step
        optimizer.step()
        theirs.step()
