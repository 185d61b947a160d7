"""The list of verbs: one file each."""

import importlib
import importlib.metadata
from typing import Annotated

import typer

from sdq.cli.command import Verb

VERBS = {
    "list": "list_plugins",
    "train": "train",
    "quantize": "quantize",
    "search": "search",
    "federate": "federate",
    "evaluate": "evaluate",
    "export": "export_run",
    "cost": "cost",
    "report": "report",
    "compare": "compare",
    "demo": "demo",
}
"""Verb -> the file in this folder, and the function in it."""

RESUMABLE = ("train", "quantize", "search", "federate")


def register(app: typer.Typer, arguments: list[str]) -> None:
    """Add the verb that is asked for; all of them if none is, so that help can list them.

    A verb imports torch, onnx and the like; ``sdq list`` must not wait for what it does not use.
    """
    asked = arguments[0] if arguments else ""
    for verb, file in VERBS.items():
        if verb == asked or asked not in VERBS:
            module = importlib.import_module(f"sdq.cli.{file}")
            app.command(verb, cls=Verb)(getattr(module, file))
    # with a single command typer would drop the verb from the usage line
    app.callback()(_common)


def _show_version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("sdq"))
        raise typer.Exit


def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
