"""The course of a search by gradient, as series to plot, read from the records of a run's log."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdq.errors import RunError
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.search_space import block_of

_CHANNEL = re.compile(r"(.+)\[\d+\]")
_ACT = re.compile(r"(.+)_input(?:_again)*")


@dataclass(frozen=True)
class Line:
    """The expected bits of one unit; of a layer whose channels are units, their mean.

    Args:
        name: of the layer, the block or the activation.
        bits: expected at each point of the trajectory.
        final: bits in the policy.
        depth: index of the first layer that the unit belongs to, in execution order.
        is_act: whether these are bits of activations.
    """

    name: str
    bits: tuple[float, ...]
    final: float
    depth: int
    is_act: bool


@dataclass(frozen=True)
class Trajectory:
    """What the records of a search hold.

    Args:
        progress: share of the steps done, in (0, 1], at each point.
        lines: one a unit, weights first.
        price_progress: as ``progress``, at the points of the two series below.
        budget_use: of each budget: expected cost over limit.
        lambda_q: of each budget: the price.
    """

    progress: tuple[float, ...]
    lines: tuple[Line, ...]
    price_progress: tuple[float, ...]
    budget_use: dict[str, tuple[float, ...]]
    lambda_q: dict[str, tuple[float, ...]]


def trajectory(records: Sequence[Mapping[str, Any]], policy: BitwidthPolicy) -> Trajectory | None:
    """Return the course of the search that these log records tell of.

    Args:
        records: of a run's log, in order; those of other phases are passed over.
        policy: that came of the search.

    Returns:
        None if no search by gradient is in the log.

    Raises:
        RunError: the records name fewer units than they have bits for, or are not of a search.
    """
    try:
        return _course(records, policy)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"log: records of the search must be as they were written, but: "
            f"{type(error).__name__}: {error!s:.200}; remove log.jsonl to do without them"
        ) from error


def _course(records: Sequence[Mapping[str, Any]], policy: BitwidthPolicy) -> Trajectory | None:
    records = [r for r in records if r.get("phase") == "search" and r.get("trajectory")]
    if not records:
        return None
    names = list(records[0]["bits_and_beta"])
    points = [_numbers(point) for record in records for point in record["trajectory"]]
    if any(len(point) != len(names) + 1 for point in points):
        raise RunError(
            f"log: names of units must differ, got {len(names)} for {len(points[0]) - 1} units"
        )
    columns = dict(zip(names, zip(*(point[1:] for point in points), strict=True), strict=True))
    budgets, prices = list(records[0]["budget_use"]), [p for r in records for p in _prices(r)]
    series = list(zip(*prices, strict=True))
    return Trajectory(
        tuple(point[0] for point in points),
        tuple(_line(name, series, policy) for name, series in _by_layer(columns).items()),
        series[0],
        dict(zip(budgets, series[1 : 1 + len(budgets)], strict=True)),
        dict(zip(budgets, series[1 + len(budgets) :], strict=True)),
    )


def _prices(record: Mapping[str, Any]) -> list[list[float]]:
    """Return ``[progress, use of each budget, lambda_Q of each]`` at some points of an epoch."""
    if record.get("price_trajectory"):
        return [_numbers(point) for point in record["price_trajectory"]]
    # logs of runs made before there was one: what the epoch ended with
    end = record["trajectory"][-1][0]
    return [_numbers([end, *record["budget_use"].values(), *record["lambda_q"].values()])]


def _numbers(point: Sequence[Any]) -> list[float]:
    """Return a point of a series; TypeError or ValueError if it is none."""
    found = [float(value) for value in point]
    if not all(map(math.isfinite, found)):
        raise ValueError("a value is not finite")
    return found


def _by_layer(columns: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Return the series of every layer: the mean of its channels, where these are the units."""
    members: dict[str, list[tuple[float, ...]]] = {}
    for name, series in columns.items():
        channel = _CHANNEL.fullmatch(name)
        members.setdefault(channel[1] if channel else name, []).append(series)
    return {
        name: tuple(sum(point) / len(point) for point in zip(*series, strict=True))
        for name, series in members.items()
    }


def _line(name: str, bits: tuple[float, ...], policy: BitwidthPolicy) -> Line:
    layers = list(policy)
    index = {layer.name: i for i, layer in enumerate(layers)}
    act = _ACT.fullmatch(name)
    if name not in index and act and act[1] in index:
        depth = index[act[1]]
        return Line(name, bits, layers[depth].act_bits, depth, is_act=True)
    if name in index:
        depth = index[name]
    else:
        group, _, choices = name.removesuffix(")").partition(" (")
        allowed = {int(b) for b in choices.split(",")} if choices else None
        found = [
            i
            for i, layer in enumerate(layers)
            if layer.searched
            and group in ("network", block_of(layer.name))
            and (allowed is None or layer.weight_bits in allowed)
        ]
        if not found:
            raise RunError(
                f"log: unit {name!r} must be of the policy's network; keep them together"
            )
        depth = found[0]
    return Line(name, bits, mean_weight_bits(layers[depth]), depth, is_act=False)


def mean_weight_bits(layer: LayerBits) -> float:
    """Return the bits of a layer's weights, on average over its channels."""
    return layer.total_weight_bits / layer.num_weights
