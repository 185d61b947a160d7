"""``sdq cost``: what a policy costs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import hw
from sdq.cli import options
from sdq.cli.device import DeviceRequest
from sdq.cli.progress import show_json, show_table
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy
from sdq.run_folder import read_layers


def cost(
    what: Annotated[Path, typer.Argument(help="A run folder, or the policy.json in one.")],
    target: options.ShownTarget = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print MACs, parameters, weight bytes and bit operations, per layer and in total.

    Bit operations are MACs x weight bits x activation bits. With --target also what each layer
    takes of the device, and whether the network fits it. An FPGA is laid out for --fps or
    --latency-ms, or for the highest rate that fits.

    Example: `sdq cost q --target pynq_z2 --fps 1000`
    """
    request = DeviceRequest.of(target, latency_ms, fps)
    policy, layers = read_policy(what)
    found = None
    if target is not None:
        found = hw.report(layers, policy, target, request.demand)
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
    last = {key: total.get(key) for key in rows[0]} | {"name": "total"}
    show_table(str(what), [*rows, last], quiet=quiet)
    if target is not None and found is not None:
        if not quiet:
            show_device(target, found, policy)
        uses = zip(rows, found.layers, strict=True)
        rows = [{**row, **use.costs, **use.layout} for row, use in uses]
        total |= {"target": target, **found.totals, "bottleneck": rows[found.bottleneck]["name"]}
        total |= {"fits": found.fits, "shares": found.shares, "limits": dict(found.limits)}
    if json_:
        show_json({"layers": rows, "total": total})


SHOWN: dict[str, tuple[str, float]] = {
    "energy_j": ("energy (uJ)", 1e6), "flash_bytes": ("flash (kB)", 1e-3),
}  # fmt: skip
"""How a table shows costs whose own unit is too small or too large: name, and what to multiply."""


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time has three digits among four decimals, and its number.

    >>> time_unit(2e-4), time_unit(3e-7)
    (('ms', 1000.0), ('us', 1000000.0))
    """
    if seconds >= 1e-5:
        return "ms", 1e3
    return ("us", 1e6) if seconds >= 1e-8 else ("ns", 1e9)


def show_device(target: str, found: hw.TargetCost, policy: BitwidthPolicy) -> None:
    """Print what each layer takes of a device, and what all take together."""
    rows: list[dict[str, Any]] = []
    unit, factor = time_unit(found.latency_s)
    names = SHOWN | {"latency_s": (unit, factor)}
    for i, (use, bits) in enumerate(zip(found.layers, policy, strict=True)):
        mark = "<- bottleneck" if i == found.bottleneck else ""
        shown = {"layer": use.name, "weight bits": bits.weight_bits, "act bits": bits.act_bits}
        rows.append({**shown, **_shown(use.costs, names), **use.layout, "": mark})
    last = dict.fromkeys(rows[0]) | {"layer": "total", "": ""}
    totals = {key: value for key, value in _shown(found.totals, names).items() if key in last}
    show_table(target, [*rows, {**last, **totals}])
    for name, share in found.shares.items():
        limit = found.limits.get(name, found.capacity[name])
        over = "" if found.totals[name] <= limit else f": more than {limit:,.0f}"
        print(
            f"{name}: {found.totals[name]:,.0f} of {found.capacity[name]:,.0f} ({share:.1%}){over}"
        )
    rate = f", {found.totals['fps']:,.1f} samples a second" if "fps" in found.totals else ""
    slowest = found.layers[found.bottleneck].name
    print(f"{target}: {found.latency_s * factor:.4f} {unit}{rate}, bottleneck {slowest}")
    if found.limits:
        print("fits" if found.fits else f"does not fit: {', '.join(found.over)}")


def _shown(costs: Mapping[str, float], names: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    known = {name: names.get(name, (name, 1)) for name in costs}
    return {shown: costs[name] * factor for name, (shown, factor) in known.items()}


def read_policy(what: Path) -> tuple[BitwidthPolicy, tuple[LayerSpec, ...]]:
    """Return the policy of a run folder or file, and the layers it is for.

    Raises:
        RequestError: there is none, or not the layers that it is for beside it.
    """
    path = what / "policy.json" if what.is_dir() else what
    if what.is_dir() and not path.is_file():
        raise RequestError(
            f"{what}: must be a run with a policy.json, got none; give one of `sdq quantize` or "
            "`sdq search`"
        )
    policy = BitwidthPolicy.load(path)
    beside = path.parent / "layers.json"
    layers = read_layers(beside) if beside.is_file() else ()
    if [(x.name, x.num_weights) for x in layers] != [(x.name, x.num_weights) for x in policy]:
        raise RequestError(
            f"{path}: must have a layers.json of the same layers beside it; "
            "keep a policy with its run"
        )
    return policy, layers
