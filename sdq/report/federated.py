"""A federation on a page: curves of clients and rounds, bytes, who failed, who has what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdq.report.charts import Chart, Series, chart
from sdq.report.tables import (
    HEADLINES,
    MEANINGS,
    Cell,
    Table,
    headline,
    metric_cell,
    metric_label,
    number,
    scaled,
    share,
    text,
    transposed,
)

PARTS = ("test", "val")
"""Images that figures are of; the first that there are."""


@dataclass(frozen=True)
class Federation:
    """What one method's run folder holds.

    Args:
        method: its name.
        metrics: of its ``metrics.json``.
        rounds: its log's records, one a round, in order.
        clients: name, images and class counts of each, as ``run.json`` has them.
    """

    method: str
    metrics: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    clients: Sequence[Mapping[str, Any]]

    @property
    def count(self) -> int:
        """How many clients there are, as far as is known."""
        asked = {client for record in self.rounds for client in record["asked"]}
        return len(self.clients) or len(asked)

    @property
    def segmenting(self) -> bool:
        """Whether its networks give maps."""
        kinds = ("generalization", "specialization")
        return any("dice" in (self.metrics.get(kind) or {}) for kind in kinds)

    def client(self, number: int) -> str:
        """Return a client's name."""
        known = 0 <= number < len(self.clients)
        return str(self.clients[number]["name"]) if known else f"client {number}"


def method_table(methods: Sequence[Federation]) -> Table:
    """Return what each method is worth, generalization and specialization, and what it sent."""
    found = [m.metrics.get(k) or {} for m in methods for k in ("generalization", "specialization")]
    names = [n for n in ("balanced_accuracy", "macro_f1", "auc", "accuracy", "dice", "iou")
             if any(f.get(n) is not None for f in found)]  # fmt: skip
    kinds = (("generalization", "G"), ("specialization", "S"))
    columns = ["method", *(f"{letter}: {metric_label(n)}" for _, letter in kinds for n in names)]
    columns += ["worst client (S)", "sent to the server", "sent to clients", "selected round"]
    rows = [
        [
            text(m.method),
            *(
                metric_cell(n, (m.metrics.get(kind) or {}).get(n))
                for kind, _ in kinds
                for n in names
            ),
            _worst(m),
            scaled(m.metrics.get("bytes_up"), "B"),
            scaled(m.metrics.get("bytes_down"), "B"),
            number(m.metrics.get("selected_round")),
        ]
        for m in methods
    ]
    note = (
        "G, generalization: the server's network on the test images of all clients together. "
        "S, specialization: each client's own network on its own test images, mean over clients. "
        + " ".join(MEANINGS[n] for n in names if n in MEANINGS)
    )
    whole = Table("", columns, rows, note)
    return transposed("Methods beside each other", "", whole)


def _worst(method: Federation) -> Cell:
    special = method.metrics.get("specialization") or {}
    worst = next((special[f"worst_{n}"] for n in HEADLINES if f"worst_{n}" in special), None)
    if worst is None:
        return text(None)
    value = float(worst)
    return Cell(f"{share(value).text} ({method.client(special['worst_client'])})", value)


def curves(methods: Sequence[Federation]) -> list[Chart]:
    """Return G and S over the rounds, of each method; then S of each client, method by method."""
    found = [
        _curve(methods, "generalization", "G: the server's network on all clients' test images"),
        _curve(methods, "specialization", "S: clients' own networks on their own test images"),
        *(_client_curve(m) for m in methods),
        _sent(methods),
    ]
    return [c for c in found if c is not None]


def _series(method: Federation, kind: str) -> tuple[str | None, list[tuple[float, float]]]:
    """Return the metric that is drawn, and its value after each round that was evaluated."""
    known = [(r["round"], figures) for r in method.rounds if (figures := _figures(r, kind))]
    name = headline([figures for _, figures in known]) if known else None
    return name, [(n, figures[name]) for n, figures in known] if name else []


def _figures(record: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    parts = record.get(kind) or {}
    return next((parts[p] for p in PARTS if parts.get(p)), None)


def _curve(methods: Sequence[Federation], kind: str, title: str) -> Chart | None:
    drawn = [(m, *_series(m, kind)) for m in methods]
    names = [name for _, name, _ in drawn if name]
    return chart(
        title,
        [Series(m.method, points, colour=i) for i, (m, _, points) in enumerate(drawn)],
        x_label="round",
        y_label=metric_label(names[0]) if names else "",
        description=_ends([(m.method, points) for m, _, points in drawn]),
    )


def _client_curve(method: Federation) -> Chart | None:
    lines: dict[int, list[tuple[float, float]]] = {}
    name = HEADLINES[0]
    for record in method.rounds:
        clients = (_figures(record, "specialization") or {}).get("clients") or {}
        for client, value in clients.items():
            if isinstance(value, Mapping):  # of maps every metric is told, of classes one
                name = headline([value]) or name
                value = value[name]
            lines.setdefault(int(client), []).append((record["round"], value))
    named = [(method.client(c), lines[c]) for c in sorted(lines)]
    return chart(
        f"{method.method}: each client's own network on its own test images",
        [Series(name, points) for name, points in named],
        x_label="round",
        y_label=metric_label(name),
        description=_ends(named),
    )


def _sent(methods: Sequence[Federation]) -> Chart | None:
    drawn = []
    for i, method in enumerate(methods):
        sent, points = 0.0, []
        for record in method.rounds:
            sent += (record["bytes_up"] + record["bytes_down"]) / 1e6
            points.append((float(record["round"]), sent))
        drawn.append(Series(method.method, points, colour=i))
    ends = (f"{s.name}: {s.points[-1][1]:,.1f} MB" for s in drawn if s.points)
    return chart(
        "Sent so far, both ways, all clients",
        drawn,
        x_label="round",
        y_label="megabytes (1,000,000 bytes)",
        description="; ".join(ends),
        percent=False,
    )


def _ends(named: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    return "; ".join(
        f"{name}: {100 * points[0][1]:.1f} % after round {points[0][0]}, "
        f"{100 * points[-1][1]:.1f} % after round {points[-1][0]}"
        for name, points in named
        if points
    )


def round_table(method: Federation) -> Table:
    """Return what was sent in each round, and what was measured after it."""
    rows = []
    for record in method.rounds:
        figures = [_figures(record, kind) or {} for kind in ("generalization", "specialization")]
        values = [
            metric_cell(name, f[name]) if (name := headline([f])) else text(None) for f in figures
        ]
        rows.append([
            number(record["round"]), text(record.get("phase")),
            number(len(record["asked"])), number(len(record["replied"])),
            scaled(record["bytes_up"], "B"), scaled(record["bytes_down"], "B"),
            number(record.get("train_loss"), 4), *values,
        ])  # fmt: skip
    columns = [
        "round",
        "part",
        "clients asked",
        "replied",
        "to the server",
        "to clients",
        "loss",
        "G",
        "S",
    ]
    return Table(f"{method.method}: round by round", columns, rows)


def failure_table(methods: Sequence[Federation]) -> Table | None:
    """Return who was left out of which round, and why; None if nobody was."""
    rows = [
        [text(m.method), number(f.get("round")), text(m.client(f["client"])), text(f["reason"])]
        for m in methods
        for f in m.metrics.get("failures", ())
    ]
    if not rows:
        return None
    return Table("Clients left out", ["method", "round", "client", "why"], rows)


def client_table(method: Federation, names: Sequence[str]) -> Table:
    """Return the training images of each class that each client has, the rarest class first."""
    counts = [list(c.get("class_counts") or ()) for c in method.clients]
    whole = [c for c in counts if len(c) == len(names)]
    order = sorted(range(len(names)), key=lambda k: sum(c[k] for c in whole)) if whole else []
    rows = [
        [
            text(client["name"]),
            *(number(client["num_examples"].get(part, 0)) for part in ("train", "val", "test")),
            *(_count(c[k]) if len(c) == len(names) else text(None) for k in order),
        ]
        for client, c in zip(method.clients, counts, strict=True)
    ]
    columns = ["client", "training", "validation", "test images", *(names[k] for k in order)]
    note = "Of each class the training images, the rarest class first."
    return Table("Who has which images", columns, rows, note)


def _count(count: int) -> Cell:
    return Cell("none" if not count else f"{count:,}", count, "unsure" if not count else "")
