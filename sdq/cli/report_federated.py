"""The page of a run of ``sdq federate``."""

from sdq.cli.run_networks import method_folders
from sdq.report import federated as fed
from sdq.report import story
from sdq.report.page import Page
from sdq.report.verdict import federated_verdict
from sdq.run_folder import RunFolder


def federated_page(run: RunFolder) -> Page:
    """Return the page of a federation, its methods beside each other."""
    folders = method_folders(run)
    methods = [_read(name, folder) for name, folder in folders.items()]
    document = next(iter(folders.values())).read_json("run.json")
    names = [str(name) for name in document["data"]["class_names"]]
    failures = fed.failure_table(methods)
    details = [
        *([failures] if failures is not None else []),
        fed.client_table(methods[0], names),
        *(fed.round_table(method) for method in methods),
    ]
    return Page(
        f"federate: {run.path.resolve().name}",
        story.federated(document, list(folders), len(methods[0].clients)),
        federated_verdict({m.method: m.metrics for m in methods}),
        [fed.method_table(methods)],
        fed.curves(methods),
        details=details,
    )


def _read(name: str, folder: RunFolder) -> fed.Federation:
    records = [r for r in folder.read_log() if r.get("phase") == "federate"]
    return fed.Federation(
        name,
        folder.read_json("metrics.json"),
        sorted(records, key=lambda r: r["round"]),
        folder.read_json("run.json")["clients"],
    )
