"""``sdq compare``: runs beside each other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdq.checkpoint import write_bytes_atomically
from sdq.cli import options
from sdq.cli.cost import time_unit
from sdq.cli.device import DeviceRequest
from sdq.cli.progress import show_json, show_table
from sdq.cli.run_networks import (
    ACTS,
    OWN,
    SEARCHED,
    as_written,
    is_federation,
    method_folders,
    networks_of,
)
from sdq.errors import RequestError
from sdq.report.classes import paired
from sdq.report.intervals import Interval
from sdq.report.networks import Network, network_charts, network_table
from sdq.report.page import Page, encoded, render
from sdq.report.predictions import Predictions
from sdq.report.tables import metric_names, signed
from sdq.report.verdict import Verdict
from sdq.run_folder import RunFolder


@dataclass(frozen=True)
class Compared:
    """A run, or a method of a federated one.

    Args:
        network: the run's result.
        data: fingerprint of its images.
        predictions: on the test images, if the run kept them.
        of_clients: the figures are the mean of each client's own network on its own images, and
            not of one network on all.
    """

    network: Network
    data: str
    predictions: Predictions | None
    of_clients: bool = False

    def like(self, first: "Compared") -> bool:
        """Return whether figures can be held against those of another run on the same images."""
        return self.of_clients == first.of_clients

    def against(self, first: "Compared") -> Interval | None:
        """Return the 95 % interval of the difference in accuracy; None where it is not known."""
        ours, theirs = self.predictions, first.predictions
        if ours is None or theirs is None or not torch.equal(ours.labels, theirs.labels):
            return None
        loss = paired(_right(theirs), _right(ours)).interval()
        return Interval(-loss.high, -loss.low)


def _right(predictions: Predictions) -> torch.Tensor:
    logits = predictions.before if predictions.after is None else predictions.after
    return logits.argmax(1) == predictions.labels


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first is the reference.")],
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as a page.")] = None,
    different_data: Annotated[
        bool,
        typer.Option(
            "--different-data", help="Show runs on different images all the same, no differences."
        ),
    ] = False,
    target: options.ShownTarget = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show runs beside each other: bits, bytes, bit operations, metrics, and what differs.

    Runs on other images than the first are refused. Where the runs kept their predictions the
    difference in accuracy comes with its 95 % interval: if that holds 0, it may be chance.

    Example: `sdq compare uniform q --html compared.html`
    """  # fmt: skip
    if len(runs) < 2:
        raise RequestError(f"sdq compare: must have two runs or more, got {len(runs)}; name them")
    device = DeviceRequest.of(target, latency_ms, fps)
    found = [each for path in runs for each in open_run(path, device if target else None)]
    same = len({each.data for each in found}) == 1
    if not same:
        _other_data(found, allowed=different_data)
    rows = [_row(each, found[0], same=same) for each in found]
    show_table(f"compared with {found[0].network.name}", rows, quiet=quiet)
    if html is not None:
        write_bytes_atomically(html, encoded(render(_page(found, same))))
    if json_:
        show_json({"same_data": same, "runs": [_document(e, found[0], same=same) for e in found]})


def open_run(path: Path, device: DeviceRequest | None = None) -> list[Compared]:
    """Return the results of a run: one, or of a federation one for each method.

    Raises:
        RequestError: no run folder, or a run that has not ended.
    """
    run = RunFolder.open(path)
    if not run.done:
        raise RequestError(
            f"{path}: the run must have ended, but was interrupted; continue it with --resume"
        )
    if not is_federation(run):
        return [_compared(run, str(path), device)]
    return [_compared(each, str(each.path), device) for each in method_folders(run).values()]


def _compared(run: RunFolder, name: str, device: DeviceRequest | None) -> Compared:
    document = run.read_json("run.json")
    with as_written(run):
        facts = {
            "verb": str(document["request"]["verb"]),
            "model": str(document["model"]["reference"]).rpartition("/")[2],
            "data": document["data"]["reference"],
        }
        fingerprint = str(document["data"]["fingerprint"])
        network = networks_of(run, device)[-1]
    own = network.name == OWN
    named = replace(
        network, name=f"{name} ({OWN})" if own else name, facts=facts | dict(network.facts)
    )
    return Compared(named, fingerprint, Predictions.load(run.path), own)


def _other_data(found: Sequence[Compared], *, allowed: bool) -> None:
    first = found[0]
    others = [e.network.name for e in found if e.data != first.data]
    what = f"{', '.join(others)} and {first.network.name} were measured on different images"
    if not allowed:
        raise RequestError(
            f"sdq compare: runs must be on the same data, but {what}, so that no figure of one can "
            "be held against one of the other; use the same --data, --seed and --split, or pass "
            "--different-data to see them without differences"
        )
    print(f"warning: {what}: their figures cannot be compared", file=sys.stderr)


def _row(each: Compared, first: Compared, *, same: bool) -> dict[str, object]:
    """Return a row of the printed table."""
    network = each.network
    bytes_, bops = (network.costs.get(name) for name in ("weight_bytes", "bops"))
    facts = network.facts
    row: dict[str, object] = {
        "run": network.name,
        "model": facts["model"],
        "data": facts["data"],
        "bits": facts.get(SEARCHED),
        "of all": network.bits,
        "acts": facts.get(ACTS),
        "kB": None if bytes_ is None else bytes_ / 1e3,
        "BitOPs (M)": None if bops is None else bops / 1e6,
    }
    if "latency_s" in first.network.costs or "latency_s" in network.costs:
        latency = network.costs.get("latency_s")
        unit, factor = time_unit(first.network.costs.get("latency_s", latency or 0.0))
        row[unit] = None if latency is None else latency * factor
    for name in ("accuracy", "balanced_accuracy", "auc", "dice", "dice_nonempty", "iou", "hd95"):
        if name in first.network.metrics or name in network.metrics:
            row[name.replace("_", " ")] = network.metrics.get(name)
    if same:
        main = "dice" if "dice" in first.network.metrics else "accuracy"
        row[f"{main} - first"] = _told(each, first, main)
    return row


def _told(each: Compared, first: Compared, main: str) -> str:
    ours, theirs = (e.network.metrics.get(main) for e in (each, first))
    if each is first or not each.like(first) or ours is None or theirs is None:
        return "-"
    told = f"{signed(100 * (ours - theirs))} points"
    interval = each.against(first)
    if interval is None:
        return told
    return f"{told} ({signed(100 * interval.low)} to {signed(100 * interval.high)})"


def _document(each: Compared, first: Compared, *, same: bool) -> dict[str, Any]:
    """Return what the JSON line says of a run."""
    network = each.network
    document: dict[str, Any] = {
        "run": network.name,
        **network.facts,
        "bits": network.bits,
        **network.costs,
        "metrics": dict(network.metrics),
    }
    if same and each is not first and each.like(first):
        names = metric_names([network.metrics, first.network.metrics])
        ours, theirs = network.metrics, first.network.metrics
        both = [n for n in names if ours.get(n) is not None and theirs.get(n) is not None]
        document["difference"] = {n: ours[n] - theirs[n] for n in both}
        if (interval := each.against(first)) is not None:
            document["accuracy_interval"] = [interval.low, interval.high]
    return document


def _page(found: Sequence[Compared], same: bool) -> Page:
    networks = [each.network for each in found]
    alike = same and all(each.like(found[0]) for each in found)
    text = f"{len(networks)} runs beside each other."
    if not same:
        text += " They were measured on different images: their figures cannot be compared."
    elif not alike:
        text += (
            " Figures of clients' own networks are of their own images, those of the others of all "
            "images: they cannot be compared."
        )
    verdict = Verdict(text, "plain" if alike else "bad")
    table = network_table(networks, "Runs beside each other", differences=alike)
    charts = network_charts(networks) if alike else []
    return Page("Runs compared", [], verdict, [table], charts, command=options.command_line())
