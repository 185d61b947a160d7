"""``sdq list``: what there is by name."""

from typing import Annotated

import typer

from sdq import plugins
from sdq.cli import completion, options
from sdq.cli.progress import show_json
from sdq.errors import RequestError, nearest

PACKAGES = {
    "models": "sdq.models",
    "datasets": "sdq.datasets",
    "methods": "fl.methods",
    "formats": "export.formats",
    "targets": "hw.targets",
    "search_methods": "sdq.search_methods",
}


def list_plugins(
    kind: Annotated[
        str,
        typer.Argument(help=f"{', '.join(PACKAGES)}.", autocompletion=completion.words(*PACKAGES)),
    ],
    json_: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Names alone.")] = False,
) -> None:
    """List models, datasets, methods, formats, targets or search methods.

    Examples: `sdq list models`, `sdq list targets`
    """
    if kind not in PACKAGES:
        raise RequestError(f"sdq list: unknown kind {kind!r}; {nearest(kind, PACKAGES)}")
    found = plugins.names(PACKAGES[kind])
    if kind == "formats":  # as --format has them
        found = [name.replace("_", "-") for name in found]
    if json_:
        show_json({kind: found})
        return
    for name in found:
        if quiet:
            print(name)
            continue
        print(f"{name:20} {plugins.summary(PACKAGES[kind], name.replace('-', '_'))}")
