"""``sdq report``: a run folder as one HTML page."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from export.format import VERIFICATION, read_record
from sdq.checkpoint import write_bytes_atomically
from sdq.cli import completion, options
from sdq.cli import inputs as inp
from sdq.cli.device import DeviceRequest
from sdq.cli.progress import show_json
from sdq.cli.report_federated import federated_page
from sdq.cli.report_quantized import Material, single_page
from sdq.cli.run_networks import as_written, is_federation, networks_of
from sdq.errors import RequestError, RunError
from sdq.report.exports import Exported, export_table
from sdq.report.networks import Network
from sdq.report.page import Page, encoded, render
from sdq.report.tables import Cell, Table, text
from sdq.run_folder import RunFolder

FILE = "report.html"
VERBS = ("train", "search", "quantize", "federate")


def report(
    run: Annotated[
        Path, typer.Argument(help="Run folder of `sdq train`, `search`, `quantize` or `federate`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, in place of an earlier one; default RUN/report.html."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another run on the same data, shown next to it (a uniform one, say). Repeatable."
        ),
    ] = None,
    images: Annotated[
        bool,
        typer.Option(
            help="Show some test images (whose answer changed, say): mind who sees the page."
        ),
    ] = True,
    target: Annotated[
        str | None,
        typer.Option(
            help="Device whose latency is shown (see `sdq list targets`); default: the one of the "
            "run's budget.",
            autocompletion=completion.of("hw.targets"),
        ),
    ] = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    data_root: options.DataRoot = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a page about a run that can be read by someone who knows nothing of it.

    One HTML file without scripts, which needs no network: what was done, what it is worth, class by
    class with the rare ones first, and the command that repeats it.

    Example: `sdq report q --beside uniform --target pynq_z2`
    """  # fmt: skip
    folder = RunFolder.open(run)
    device = DeviceRequest.of(target, latency_ms, fps) if target is not None else None
    if device is None and (latency_ms, fps) != (None, None):
        DeviceRequest.of(target, latency_ms, fps)  # says that they stand with --target
    others = [network_beside(folder, path, device) for path in beside or []]
    root = str(data_root) if data_root else None
    material = Material(folder, data_root=root, wants_images=images)
    page, text = make_page(material, device, others)
    place = out if out is not None else run / FILE
    write_bytes_atomically(place, encoded(text))
    if not quiet:
        print(place)
        for line in (page.verdict.text, *page.verdict.warnings, *page.missing):
            print(line)
    if json_:
        verdict = page.verdict
        show_json({
            "report": str(place), "verdict": verdict.text, "warnings": list(verdict.warnings),
            "notes": list(verdict.notes), "missing": list(page.missing),
        })  # fmt: skip


def network_beside(run: RunFolder, path: Path, device: DeviceRequest | None = None) -> Network:
    """Return the result of another run, named by its folder.

    Raises:
        RequestError: it is on other images.
    """
    other = RunFolder.open(path)
    data = [each.read_json("run.json").get("data", {}).get("fingerprint") for each in (run, other)]
    if data[0] != data[1] or data[0] is None:
        raise RequestError(
            f"--beside: {path} must be a run on the same images, got other data; figures on "
            "different images cannot be compared: leave it out"
        )
    return replace(networks_of(other, device)[-1], name=path.name)


def make_page(
    material: Material, device: DeviceRequest | None = None, beside: Sequence[Network] = ()
) -> tuple[Page, str]:
    """Return the page of a run that has ended, and its HTML.

    Raises:
        RequestError: a run that has not ended, that no report can be made of, or that is damaged.
    """
    run = material.run
    document = run.read_json("run.json")
    verb = document.get("request", {}).get("verb")
    if verb not in VERBS:
        raise RequestError(
            f"{run.path}: must be a run of {', '.join(VERBS)}, got one of {verb!r}; give another"
        )
    if "client" in document:
        raise RequestError(
            f"{run.path}: must be a whole run, got the network of client {document['client']!r}, "
            "whose figures are in metrics.json; `sdq evaluate` measures it, and the report of the "
            "federation tells of all clients"
        )
    if not run.done:
        raise RequestError(
            f"{run.path}: the run must have ended, but was interrupted; continue it with --resume"
        )
    with as_written(run):
        federated = is_federation(run)
        page = federated_page(material) if federated else single_page(material, device, beside)
        page = replace(
            page,
            exports=export_table(exports_of(run)),
            command=repeat(document),
            setting=_setting(document),
            missing=list(dict.fromkeys(material.missing)),
        )
        return page, render(page)


def write_report(
    run: RunFolder, inputs: inp.Inputs | None, *, wanted: bool, beside: Sequence[Network] = ()
) -> None:
    """Write a finished run's report; say on standard error if that is not possible.

    Args:
        run: that has written all it has to say.
        inputs: its data.
        wanted: whether to write at all; of several processes only the first one should.
        beside: networks that are shown next to the run's.
    """
    if not wanted:
        return
    try:
        _, text = make_page(Material(run, inputs=inputs), beside=beside)
        write_bytes_atomically(run.path / FILE, encoded(text))
    except (OSError, RequestError, RunError) as error:
        print(f"warning: {run.path}: the run is done, but without report: {error}", file=sys.stderr)


def exports_of(run: RunFolder) -> list[Exported]:
    """Return the files in a run's own export folders."""
    found = []
    for folder in sorted(path.parent for path in (run.path / "export").glob("*/export.json")):
        verified = Path(folder) / VERIFICATION
        checks = RunFolder(folder).read_json(VERIFICATION) if verified.is_file() else {}
        for name, record in read_record(folder).items():
            shown = f"export/{folder.name}"
            found.append(Exported(record, checks.get(name), shown))
    return found


def repeat(document: dict[str, Any]) -> str | None:
    """Return the command that makes the run again; None for a run that did not keep it."""
    command = document.get("command")
    root = (document.get("request", {}).get("data") or {}).get("root")
    if command and root and "--data-root" not in command:
        return f"SDQ_DATA={shlex.quote(root)} {command}"
    return str(command) if command else None


def _setting(document: dict[str, Any]) -> Table:
    """Return the request and the versions as rows."""
    rows: list[list[Cell]] = []

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        elif value not in (None, [], ""):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            if isinstance(value, str) and os.path.isabs(value):  # the page may be shown to others
                shown = os.path.basename(value)
            rows.append([text(prefix), text(shown)])

    data = document.get("data") or {}
    add("", document["request"])
    add("data", {key: data.get(key) for key in ("fingerprint", "num_examples")})
    add("version", document.get("versions", {}))
    return Table("What was asked, and with what it ran", ["setting", "value"], rows)
