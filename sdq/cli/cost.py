"""``sdq cost``: what a policy costs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import hw
from sdq.cli import options
from sdq.cli.progress import show_json, show_table
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy
from sdq.run_folder import read_layers


def cost(
    what: Annotated[Path, typer.Argument(help="A run folder, or the policy.json in one.")],
    target: Annotated[
        str | None, typer.Option(help="Also latency on a device (see `sdq list targets`).")
    ] = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print MACs, parameters, weight bytes and bit operations, per layer and in total.

    Bit operations are MACs x weight bits x activation bits.

    Example: `sdq cost q --target bit_fusion`
    """
    policy, layers = read_policy(what)
    costs = hw.layer_costs(layers, policy)
    rows: list[dict[str, Any]] = [asdict(c) for c in costs]
    total: dict[str, Any] = {
        "macs": sum(c.macs for c in costs),
        "params": sum(c.params for c in costs),
        "weight_bytes": sum(c.weight_bytes for c in costs),
        "bops": sum(c.bops for c in costs),
        "avg_weight_bits": policy.avg_weight_bits,
        "avg_weight_bits_all": policy.avg_weight_bits_all,
    }
    if target is not None:
        found = hw.target(target).cost(layers, policy)
        for row, cycles in zip(rows, found.layer_cycles, strict=True):
            row["cycles"] = cycles
        total |= {
            "target": target,
            "cycles": sum(found.layer_cycles),
            "latency_s": found.latency_s,
            "bottleneck": rows[found.bottleneck]["name"],
        }
    last = {key: total.get(key) for key in rows[0]} | {"name": "total"}
    show_table(str(what), [*rows, last], quiet=quiet)
    if target is not None and not quiet:
        print(f"{target}: {total['latency_s'] * 1e3:.4f} ms, bottleneck {total['bottleneck']}")
    if json_:
        show_json({"layers": rows, "total": total})


def read_policy(what: Path) -> tuple[BitwidthPolicy, tuple[LayerSpec, ...]]:
    """Return the policy of a run folder or file, and the layers it is for."""
    path = what / "policy.json" if what.is_dir() else what
    if what.is_dir() and not path.is_file():
        raise RequestError(
            f"{what}: must be a run with a policy.json, got none; give one of `sdq quantize` or "
            "`sdq search`"
        )
    policy = BitwidthPolicy.load(path)
    beside = path.parent / "layers.json"
    layers = read_layers(beside) if beside.is_file() else ()
    if [spec.name for spec in layers] != [bits.name for bits in policy]:
        raise RequestError(
            f"{path}: must have a layers.json of the same layers beside it; "
            "keep a policy with its run"
        )
    return policy, layers
