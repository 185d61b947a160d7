"""The series behind the plot of a search, from records written by hand."""

from typing import Any

import pytest

from sdq.errors import RunError
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.trajectory import Line, trajectory
from sdq.trajectory_figure import spread

POLICY = BitwidthPolicy(
    (
        LayerBits("stem", 8, 8, False, 10),
        LayerBits("body.0.conv1", 2, 4, True, 20),
        LayerBits("body.0.conv2", 3, 6, True, 20, channel_bits=(1, 3, 3, 1)),
        LayerBits("body.1.conv", 4, 4, True, 20),
        LayerBits("head", 8, 8, False, 10),
    )
)


def record(epoch: int, units: list[str], points: list[list[float]], **more: Any) -> dict[str, Any]:
    return {
        "phase": "search", "epoch": epoch, "bits_and_beta": {name: [2, 0.5] for name in units},
        "budget_use": {"bits": 1.5 - 0.25 * epoch}, "lambda_q": {"bits": 0.01 * epoch},
        "trajectory": points, **more,
    }  # fmt: skip


def test_epochs_are_joined_and_other_phases_passed_over() -> None:
    units = ["body.0.conv1", "body.1.conv", "body.1.conv_input"]
    found = trajectory(
        [
            record(1, units, [[0.25, 3.0, 4.0, 5.0], [0.5, 2.5, 4.0, 4.0]]),
            {"phase": "finetune", "epoch": 1, "bin_loss": 1.0},
            record(2, units, [[1.0, 2.0, 3.9, 3.5]]),
        ],
        POLICY,
    )
    assert found is not None
    assert found.progress == (0.25, 0.5, 1.0)
    assert found.lines == (
        Line("body.0.conv1", (3.0, 2.5, 2.0), 2.0, 1, False),
        Line("body.1.conv", (4.0, 4.0, 3.9), 4.0, 3, False),
        Line("body.1.conv_input", (5.0, 4.0, 3.5), 4, 3, True),
    )
    # a log without prices at each point has those at the ends of epochs
    assert found.price_progress == (0.5, 1.0)
    assert found.budget_use == {"bits": (1.25, 1.0)}
    assert found.lambda_q == {"bits": (0.01, 0.02)}


def test_prices_at_each_point_of_two_budgets() -> None:
    prices = [[0.5, 1.5, 1.2, 0.1, 0.2], [1.0, 1.0, 0.9, 0.3, 0.4]]
    both = {"budget_use": {"bits": 1.0, "bops": 0.9}, "lambda_q": {"bits": 0.3, "bops": 0.4}}
    found = trajectory(
        [record(1, ["body.1.conv"], [[1.0, 4.0]], price_trajectory=prices, **both)], POLICY
    )
    assert found is not None
    assert found.price_progress == (0.5, 1.0)
    assert found.budget_use == {"bits": (1.5, 1.0), "bops": (1.2, 0.9)}
    assert found.lambda_q == {"bits": (0.1, 0.3), "bops": (0.2, 0.4)}


def test_channels_become_the_mean_of_their_layer() -> None:
    units = [*(f"body.0.conv2[{k}]" for k in range(4)), "body.1.conv[0]"]
    found = trajectory([record(1, units, [[1.0, 1.0, 2.0, 3.0, 4.0, 8.0]])], POLICY)
    assert found is not None
    assert found.lines == (
        Line("body.0.conv2", (2.5,), 2.0, 2, False),  # (1 + 3 + 3 + 1) / 4 in the policy
        Line("body.1.conv", (8.0,), 4.0, 3, False),
    )


@pytest.mark.parametrize(
    ("unit", "final", "depth"),
    [
        ("network", 2, 1),
        ("body.0", 2, 1),
        ("body.1", 4, 3),
        ("network (4,8)", 4, 3),  # where candidates differ there are several units of a name
        ("body.0 (3,5)", 2, 2),
    ],
)
def test_a_block_stands_where_its_first_layer_does(unit: str, final: float, depth: int) -> None:
    found = trajectory([record(1, [unit], [[1.0, 2.5]])], POLICY)
    assert found is not None
    assert found.lines == (Line(unit, (2.5,), final, depth, False),)


@pytest.mark.parametrize("records", [[], [{"phase": "finetune", "epoch": 1}]])
def test_without_a_search_by_gradient_there_is_none(records: list[dict[str, Any]]) -> None:
    assert trajectory(records, POLICY) is None


@pytest.mark.parametrize(
    ("units", "points", "message"),
    [
        (["body.0"], [[1.0, 2.0, 3.0]], "names of units must differ, got 1 for 2 units"),
        (["elsewhere"], [[1.0, 2.0]], "unit 'elsewhere' must be of the policy's network"),
    ],
)
def test_a_log_of_another_network_is_noticed(
    units: list[str], points: list[list[float]], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        trajectory([record(1, units, points)], POLICY)


@pytest.mark.parametrize(
    ("wanted", "low", "high", "expected"),
    [
        ([1.0, 1.0, 1.0, 3.0], 0.0, 4.0, [0.5, 1.0, 1.5, 3.0]),
        ([0.0, 0.0, 4.0, 4.0], 0.0, 4.0, [0.0, 0.5, 3.5, 4.0]),
        ([2.0, 2.0, 2.0], 2.0, 2.0, [2.0, 2.5, 3.0]),  # no room: upwards
        ([], 0.0, 1.0, []),
    ],
)
def test_names_are_spread_around_their_lines(
    wanted: list[float], low: float, high: float, expected: list[float]
) -> None:
    assert spread(wanted, 0.5, low, high) == expected
