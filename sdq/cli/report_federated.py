"""The page of a run of ``sdq federate``."""

from dataclasses import replace
from typing import Any

from fl.results import LOGGED
from sdq.cli import inputs as inp
from sdq.cli.report_quantized import Material, single_page
from sdq.cli.run_networks import method_folders
from sdq.report import federated as fed
from sdq.report import story
from sdq.report.overlays import Overlays
from sdq.report.page import Page
from sdq.report.verdict import federated_verdict
from sdq.run_folder import RunFolder

MOST_OUTLINES = 3
"""Methods whose outlines are drawn on one picture: more could not be told apart."""


def federated_page(material: Material) -> Page:
    """Return the page of a federation, its methods beside each other.

    Of one method that learned bits it also has what the page of a quantized run has.
    """
    run = material.run
    folders = method_folders(run)
    methods = [_read(name, folder) for name, folder in folders.items()]
    documents = {name: folder.read_json("run.json") for name, folder in folders.items()}
    names = [str(name) for name in documents[methods[0].method]["data"]["class_names"]]
    failures = fed.failure_table(methods)
    page = Page(
        f"federate: {run.path.resolve().name}",
        story.federated(documents, len(methods[0].rounds), methods[0].count),
        federated_verdict({m.method: m.metrics for m in methods}),
        [fed.method_table(methods)],
        fed.curves(methods),
        details=[
            *([failures] if failures is not None else []),
            *([fed.client_table(methods[0], names)] if methods[0].clients else []),
            *(fed.round_table(method) for method in methods),
        ],
    )
    if len(methods) == 1 and "quantized" in methods[0].metrics:
        return _with_bits(page, material)
    if not any(method.segmenting for method in methods):
        return page
    return replace(page, overlays=_overlays(material, folders))


def _overlays(material: Material, folders: dict[str, RunFolder]) -> Overlays | None:
    """Return test images with outlines of what the methods' server models find."""
    drawn: dict[str, RunFolder] = {}
    for name, folder in folders.items():
        if folder.read_json("run.json").get("server_model") is False:
            material.missing.append(f"Outlines of {name}: it has no model of the server's.")
        elif len(drawn) == MOST_OUTLINES:
            material.missing.append(f"Outlines of {name}: those of {', '.join(drawn)} are shown.")
        else:
            drawn[name] = folder
    if not drawn:
        return None
    # of several methods each has the data in its own folder, and what is missing is one list
    own = replace(material, run=next(iter(drawn.values())))
    return own.overlays(lambda: {name: inp.load_float(folder) for name, folder in drawn.items()})


def _with_bits(page: Page, material: Material) -> Page:
    """Return the page with that of the quantized network before what is the federation's."""
    bits = single_page(material)
    return replace(
        bits,
        paragraphs=[*page.paragraphs, *bits.paragraphs],
        tables=[*bits.tables, *page.tables],
        charts=[*bits.charts, *page.charts],
        details=[*bits.details, *page.details],
        verdict=replace(bits.verdict, notes=[*bits.verdict.notes, *page.verdict.notes]),
    )


def _read(name: str, folder: RunFolder) -> fed.Federation:
    records = folder.read_log()
    rounds: list[dict[str, Any]] = []
    for phase in LOGGED.values():  # each phase counts its rounds from 1
        of_phase = sorted((r for r in records if r.get("phase") == phase), key=lambda r: r["round"])
        before = len(rounds)
        rounds += [{**r, "round": before + r["round"]} for r in of_phase]
    # the server of a deployed federation does not know what its clients are called
    clients = folder.read_json("run.json").get("clients", [])
    return fed.Federation(name, folder.read_metrics(), rounds, clients)
