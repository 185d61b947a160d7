"""The list of verbs: one file each."""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sdq.cli.command import Verb, flat
from sdq.plugins import docstring

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
    """Add the verb that is asked for; the names of all if none is, so that help can list them.

    A verb imports torch, onnx and the like; nobody must wait for what is not used.
    """
    asked = next(iter(arguments or _to_complete()), "")
    for verb, file in VERBS.items():
        if verb == asked:
            module = importlib.import_module(f"sdq.cli.{file}")
            app.command(verb, cls=Verb)(flat(getattr(module, file)))
        elif asked not in VERBS:
            app.command(verb, cls=Verb)(_named(file))
    # with a single command typer would drop the verb from the usage line
    app.callback()(_common)


def _to_complete() -> list[str]:
    """Return the words after ``sdq`` for which a shell asks what may follow, if one does."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return typed.split()[1:]


def _named(file: str) -> Callable[[], None]:
    """Return what stands for a verb in the list: nothing but its summary."""

    def verb() -> None:
        raise AssertionError("a verb that is asked for is imported")

    verb.__doc__ = docstring(Path(__file__).with_name(f"{file}.py"), file)
    return verb


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
