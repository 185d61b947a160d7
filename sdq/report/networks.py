"""Networks beside each other: what they are worth, and what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdq.report.charts import Chart, Series, chart
from sdq.report.tables import (
    MEANINGS,
    NBSP,
    Cell,
    Table,
    headline,
    metric_cell,
    metric_label,
    metric_names,
    number,
    points,
    scaled,
    signed,
    text,
    transposed,
)

COSTS = {"weight_bytes": "B", "bops": "", "latency_s": "s"}
"""Costs that are drawn, and their units."""

LABELS = {
    "weight_bytes": "bytes of weights",
    "bops": "bit operations (BitOPs) of one image",
    "latency_s": "seconds for one image",
}


@dataclass(frozen=True)
class Network:
    """A network in a comparison.

    Args:
        name: what it is called.
        metrics: on the test images.
        bits: of the weights, on average; None where that is not known.
        costs: by name with unit: ``weight_bytes``, ``bops``, ``latency_s``; only known ones.
        facts: other words about it, by column.
    """

    name: str
    metrics: Mapping[str, Any]
    bits: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def network_table(networks: Sequence[Network], caption: str, *, differences: bool = False) -> Table:
    """Return a column for each network.

    Args:
        networks: the first is what the others are compared with.
        caption: of the table.
        differences: whether metrics also say how far they are from the first network's.
    """
    names = metric_names([n.metrics for n in networks])
    facts = list(dict.fromkeys(key for n in networks for key in n.facts))
    costs = [c for c in COSTS if any(c in n.costs for n in networks)]
    columns = ["network", *facts, "bits a weight, all layers", *(LABELS[c] for c in costs)]
    first = networks[0]
    rows = []
    for network in networks:
        row = [text(network.name), *(text(network.facts.get(key)) for key in facts)]
        row += [number(network.bits)]
        row += [_cost(c, network, first) for c in costs]
        for name in names:
            cell = metric_cell(name, network.metrics.get(name))
            compared = differences and network is not first
            row.append(_against(cell, name, first.metrics.get(name)) if compared else cell)
        rows.append(row)
    note = " ".join(MEANINGS[name] for name in names if name in MEANINGS)
    found = Table(caption, [*columns, *map(metric_label, names)], rows, note)
    return transposed(caption, "", found)


def _cost(name: str, network: Network, first: Network) -> Cell:
    value, unit = network.costs.get(name), COSTS[name]
    cell = scaled(value, unit)
    one = first.costs.get(name)
    if not value or not one or network is first:
        return cell
    ratio = one / value
    less = f"({ratio:.1f} times less)" if ratio > 1.05 else ""
    more = f"({1 / ratio:.1f} times more)" if ratio < 0.95 else ""
    aside = (less or more).replace(" ", NBSP)  # a line breaks before it, not in it
    return Cell(f"{cell.text} {aside}".rstrip(), value)


def _against(cell: Cell, name: str, first: float | None) -> Cell:
    if cell.value is None or first is None:
        return cell
    difference = cell.value - first
    shares = metric_cell(name, cell.value).text.endswith("%")
    shown = points(difference).text if shares else signed(difference, digits=3)
    return Cell(f"{cell.text} ({shown})", cell.value)


def network_charts(networks: Sequence[Network]) -> list[Chart]:
    """Return a chart for each cost that two networks or more have: worth against cost."""
    found = []
    for cost in COSTS:
        drawn = [n for n in networks if n.costs.get(cost)]
        name = headline([n.metrics for n in drawn])
        if len(drawn) < 2 or name is None:
            continue
        label = metric_label(name)
        each = "; ".join(
            f"{n.name}: {metric_cell(name, n.metrics[name]).text} at "
            f"{scaled(n.costs[cost], COSTS[cost]).text}"
            for n in drawn
        )
        made = chart(
            f"{label[0].upper()}{label[1:]} against {LABELS[cost]}",
            [Series(n.name, [(n.costs[cost], n.metrics[name])]) for n in drawn],
            x_label=f"{LABELS[cost]}, left is cheaper",
            x_unit=COSTS[cost],
            y_label=label,
            description=f"{each}.",
            log_x=True,
        )
        found += [made] if made is not None else []
    return found
