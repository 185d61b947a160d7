"""``sdq federate --what-leaves``: what the chosen methods would send, as tables or JSON."""

from collections.abc import Mapping

from fl.leaves import Leaves, Way, what_leaves
from fl.setting import Setting
from sdq.cli.progress import show_json, show_table


def show_leaves(settings: Mapping[str, Setting], *, quiet: bool, json: bool) -> None:
    """Show what leaves a client, of each setting by its name."""
    found = {name: what_leaves(setting) for name, setting in settings.items()}
    for name, leaves in found.items():
        if leaves.images:
            row: dict[str, object] = {"what": "every image, to one place"}
            show_table(f"{name}: what leaves a client", [row], quiet=quiet)
            continue
        show_table(f"{name}: tensors", _tensors(leaves), quiet=quiet)
        show_table(f"{name}: values", _values(leaves), quiet=quiet)
    if json:
        show_json({"leaves": {name: leaves.to_json() for name, leaves in found.items()}})


def _tensors(leaves: Leaves) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {
            "way": t.way, "group": t.group, "name": t.name, "shape": _shape(t.shape),
            "dtype": t.dtype, "bytes": t.bytes, "when": t.when,
        }
        for t in leaves.tensors
    ]  # fmt: skip
    ways: tuple[Way, Way] = ("up", "down")
    for way in ways:
        rows.append(
            {
                "way": way, "group": "", "name": "all of a round", "shape": "", "dtype": "",
                "bytes": leaves.bytes_per_round(way), "when": "",
            }
        )  # fmt: skip
    return rows


def _values(leaves: Leaves) -> list[dict[str, object]]:
    return [
        {
            "way": v.way, "name": v.name, "what": v.meaning, "numbers": v.numbers,
            "of": ", ".join(v.names), "when": v.when,
        }
        for v in leaves.values
    ]  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
