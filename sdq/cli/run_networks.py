"""The networks of a run folder, with what they are worth and cost: for reports and comparisons."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hw
from sdq.cli.cost import read_policy
from sdq.cli.device import DeviceRequest
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits
from sdq.report.networks import Network
from sdq.run_folder import RunFolder

OWN = "clients' own"
"""The name of what there is of a method that keeps clients' networks apart."""

SEARCHED, ACTS = "bits a searched weight", "bits an activation"
"""Facts about a policy, by column."""


def device_of(request: dict[str, Any]) -> DeviceRequest:
    """Return the device that a run's budget named, with what was asked of its speed.

    Args:
        request: of ``run.json``.
    """
    costs = (request.get("budget") or {}).get("costs") or {}
    asked = {tuple(name.split(":", 1)): limit for name, limit in costs.items()}
    targets = {name[0] for name in asked}
    if len(targets) != 1:
        return DeviceRequest()
    (target,) = targets
    latency = asked.get((target, "latency_s"))
    return DeviceRequest.of(
        target, None if latency is None else 1e3 * latency, asked.get((target, "fps"))
    )


def networks_of(run: RunFolder, device: DeviceRequest | None = None) -> list[Network]:
    """Return the float network of a run and, where there is one, the quantized or searched one.

    Args:
        run: of any verb; of a federation with several methods, of one of them.
        device: whose latency is told as well; None: the one that the run's budget named.
    """
    document = run.read_json("run.json")
    metrics = run.read_metrics() if (run.path / "metrics.json").is_file() else {}
    # of a method that keeps clients' networks apart there is only what these are worth
    worth = metrics.get("float") or metrics.get("generalization") or {}
    special = metrics.get("specialization")
    bits_chosen = "quantized" in metrics or document["request"]["verb"] == "search"
    if not bits_chosen and not (run.path / "policy.json").is_file():
        name = "float" if worth or not special else OWN
        return [Network(name, worth or special or {}, float(FLOAT_BITS))]
    policy, layers = read_policy(run.path)
    asked = device if device is not None else device_of(document["request"])
    floats = BitwidthPolicy(tuple(_in_float(bits) for bits in policy))
    after = metrics.get("quantized") or {}
    return [
        Network("float", worth, float(FLOAT_BITS), costs(floats, layers, asked), _facts(floats)),
        Network(
            "quantized", after, policy.avg_weight_bits_all, costs(policy, layers, asked),
            _facts(policy),
        ),
    ]  # fmt: skip


def _in_float(bits: LayerBits) -> LayerBits:
    return LayerBits(bits.name, FLOAT_BITS, FLOAT_BITS, bits.searched, bits.num_weights)


def costs(
    policy: BitwidthPolicy, layers: tuple[LayerSpec, ...], device: DeviceRequest
) -> dict[str, float]:
    """Return what a policy costs; the latency where a device is named that can compute it."""
    found: dict[str, float] = {
        "weight_bytes": policy.weight_bytes,
        "bops": float(hw.total_bops(layers, policy)),
    }
    if device.target is not None:
        target = device.device
        try:
            laid_out = hw.report(layers, policy, target, device.demand)
        except RequestError:  # a device of few bits cannot compute the float network
            return found
        found["latency_s"] = laid_out.latency_s
    return found


def _facts(policy: BitwidthPolicy) -> dict[str, str]:
    bits = sorted({layer.act_bits for layer in policy})
    ends = [str(bits[0]), str(bits[-1])] if bits else ["–"]
    found = {ACTS: " to ".join(dict.fromkeys(ends))}
    if any(layer.searched for layer in policy):
        found[SEARCHED] = f"{policy.avg_weight_bits:.3g}"
    return found


@contextlib.contextmanager
def as_written(run: RunFolder) -> Iterator[None]:
    """Turn what a run's changed files lead to into a RequestError that says so."""
    try:
        yield
    except RequestError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RequestError(
            f"{run.path}: its files must be as sdq wrote them, but: {type(error).__name__}: "
            f"{error}; restore them, or run again"
        ) from error


def is_federation(run: RunFolder) -> bool:
    """Tell whether a run is one of ``sdq federate``."""
    return bool(run.read_json("run.json").get("request", {}).get("verb") == "federate")


def method_folders(run: RunFolder) -> dict[str, RunFolder]:
    """Return the folder of each method of a federated run.

    Raises:
        RequestError: a method's folder is not there, or it has not ended.
    """
    methods = run.read_json("run.json").get("methods", [])
    if not methods:
        raise RequestError(f"{run.path / 'run.json'}: must name a method, got none; restore it")
    if len(methods) == 1:
        return {methods[0]: run}
    found = {}
    for name in methods:
        if Path(name).name != name:
            raise RequestError(
                f"{run.path / 'run.json'}: a method must be a plain name, got {name!r}; the file "
                "was changed: restore it"
            )
        found[name] = RunFolder.open(run.path / name)
    return found
