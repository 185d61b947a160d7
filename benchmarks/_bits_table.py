"""The tables of ``federated_bits.py``."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import _reports


def lines_of(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return the tables as Markdown.

    Args:
        rows: as ``federated_bits.py`` keeps them.
        options: of its command line.
    """
    sizes = f" ({options.widths})" if options.widths else ""
    learned = f" (mean, of {options.act_choices})" if options.act_choices else ""
    part = f"{options.train_images:,} of its training images, " if options.train_images else ""
    lines = [
        f"# Bits learned across clients: {options.model}{sizes} on {Path(options.data).stem}",
        "",
        f"Seeds {options.seeds}; {part}{options.clients} clients ({options.partition}), "
        f"{options.method} with {options.loss}; {options.rounds} rounds in float, "
        f"{options.search_rounds} of search, {options.tune_rounds} of tuning from the "
        f"{options.tune_from}'s weights, 1 epoch each; W"
        f"{options.bits:g} (mean over the searched layers) A"
        f"{options.avg_act_bits or options.act_bits:g}{learned}, scales "
        f"{options.weight_scale}, {options.scale}, first and last "
        "layer at 8; mean ± standard deviation over seeds. CPU seconds, one thread.",
        "",
        f"`{_reports.command()}`",
        "",
        f"On all {'test' if options.on == 'test' else 'validation'} images:",
        "",
        "| row | bits | balanced accuracy | accuracy | AUC | agreement | S | MB up | MB down | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys(row["row"] for row in rows if "client" not in row)
    lines += [_line(name, [r for r in rows if r["row"] == name]) for name in names]
    lines += _differences(rows, list(names)) + _bytes(rows)
    own = [row for row in rows if "client" in row]
    if own:
        lines += [
            "", "Clients with a budget of their own, each on its own images:", "",
            "| client | budget | row | bits | balanced accuracy | accuracy | AUC |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        groups = dict.fromkeys((r["client"], r["budget"], r["row"]) for r in own)
        for client, budget, name in sorted(groups):
            some = [r for r in own if (r["client"], r["row"]) == (client, name)]
            lines.append(f"| {client} | {budget:g} | {name} | {_figures(some)} |")
    return lines


def _differences(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Return what each row has above the float federation of as many rounds, seed by seed."""
    if "float_more" not in names:
        return []
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        if "client" not in row:
            scores.setdefault(row["row"], {})[row["seed"]] = row["metrics"]["balanced_accuracy"]
    lines = [
        "", "Points of balanced accuracy above float_more, which has the same division, first "
        "weights and float phase:", "",
        "| row | by seed | mean ± standard error |", "|---|---|---|",
    ]  # fmt: skip
    for name in names:
        both = [s for s in scores[name] if s in scores["float_more"]]
        above = [100 * (scores[name][s] - scores["float_more"][s]) for s in both]
        error = statistics.stdev(above) / len(above) ** 0.5 if len(above) > 1 else 0.0
        each = ", ".join(f"{points:+.1f}" for points in above)
        lines.append(f"| {name} | {each} | {statistics.mean(above):+.1f} ± {error:.1f} |")
    return lines


def _bytes(rows: list[dict[str, Any]]) -> list[str]:
    """Return what few_bytes sends of what the float federation of as many rounds sends."""
    sent: dict[str, dict[int, int]] = {}
    for row in rows:
        if row["row"] in ("float", "float_more", "few_bytes"):
            sent.setdefault(row["row"], {})[row["seed"]] = row["bytes_up"] + row["bytes_down"]
    seeds = sent.get("few_bytes", {}).keys() & sent.get("float_more", {}).keys()
    if not seeds:
        return []
    few = sum(sent["few_bytes"][s] for s in seeds)
    whole = sum(sent["float"][s] + sent["float_more"][s] for s in seeds)
    return ["", f"few_bytes sends, up and down together, 1/{whole / few:.1f} of what the float "
            "federation of as many rounds sends (float and float_more)."]  # fmt: skip


def _figures(rows: list[dict[str, Any]]) -> str:
    metrics = ("balanced_accuracy", "accuracy", "auc")
    cells = [f"{max(r['bits'] for r in rows):.2f}"]
    for key in metrics:
        known = [r["metrics"][key] for r in rows if r["metrics"][key] is not None]
        cells.append(_reports.spread(known) if known else "-")
    return " | ".join(cells)


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    agreed = _reports.spread([r["agreement"] for r in rows])
    special = [r["specialization"] for r in rows if r.get("specialization") is not None]
    sizes = [f"{max(r[k] for r in rows) / 1e6:.1f}" for k in ("bytes_up", "bytes_down")]
    seconds = sum(r["seconds"] for r in rows) / len(rows)
    cells = [_reports.spread(special) if special else "-", *sizes, f"{seconds:.0f}"]
    return f"| {name} | {_figures(rows)} | {agreed} | {' | '.join(cells)} |"
