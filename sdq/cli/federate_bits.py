"""``sdq federate --bits``: what is asked of the bits, and what the run then writes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import hw
from export.preparation import check_prepared
from fl.bits import MIXING, ClientBudget, FederatedBits, PhasesConfig
from fl.evaluation import primary
from fl.method import ClientData
from fl.phase_settings import PhaseSettings
from fl.phases import Learning, learning
from fl.quant_results import of_phases, write_course, write_model, write_own
from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.device import DeviceRequest, layers_on_target
from sdq.cli.plan import Limits, Plan
from sdq.cli.quantize import Source, measure, sizes
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.quant_model import quantize
from sdq.run_folder import RunFolder
from sdq.search_space import SearchSpace, Unit

BUDGETS = ("bits", "weight_kb", "bops_g")


@dataclass(frozen=True)
class BitsRequest:
    """What was asked of the bits of a federation.

    Args:
        plan: of the quantization and the budget.
        phases: of the rounds.
        targets: ``--client-target``, as it was given.
        plots: draw some.
    """

    plan: Plan
    phases: PhasesConfig
    targets: tuple[str, ...]
    plots: bool

    @property
    def learns(self) -> bool:
        """Whether there are rounds in which bits are learned."""
        return self.plan.given_policy is None and self.phases.search_method in MIXING

    def to_json(self) -> dict[str, Any]:
        """Return it as ``run.json`` keeps it."""
        plan = {**self.plan.to_json(), "search": None, "search_method": None}
        phases = self.phases.model_dump(mode="json")
        return {**plan, "phases": phases, "client_target": list(self.targets)}


def client_limits(texts: tuple[str, ...], clients: list[ClientData]) -> dict[int, Limits]:
    """Read ``NAME=TARGET:latency_ms=5`` and ``NAME=bits:2.0``.

    Args:
        texts: of ``--client-target``; a client is named, or numbered from 0.
        clients: of the federation.

    Raises:
        RequestError: a text of another form, or a client that there is not, or is named twice.
    """
    found: dict[int, Limits] = {}
    names = [client.name for client in clients]
    for text in texts:
        name, equals, rest = text.partition("=")
        kind, colon, value = rest.partition(":")
        if not (name and equals and kind and colon and value):
            raise RequestError(
                "--client-target: must be 'NAME=bits:2.0', weight_kb or bops_g, or "
                f"'NAME=TARGET:latency_ms=5', got {text!r}"
            )
        number = names.index(name) if name in names else -1
        if number < 0 and name.isascii() and name.isdecimal() and int(name) < len(names):
            number = int(name)
        if number < 0:
            raise RequestError(
                f"--client-target: must name a client, {', '.join(names[:8])}, or its number from "
                f"0 to {len(names) - 1}, got {name!r}"
            )
        if number in found:
            raise RequestError(f"--client-target: must name each client once, got {name!r} again")
        found[number] = _limits(kind, value)
        found[number].check()
    return found


def _limits(kind: str, value: str) -> Limits:
    if kind in BUDGETS:
        asked = dict.fromkeys(BUDGETS) | {kind: options.numbers(value, "--client-target")[0]}
        return Limits(asked["bits"], asked["weight_kb"], asked["bops_g"])
    demands = dict(options.rules(value.split(","), "--client-target"))
    latency, fps = (demands.pop(name, None) for name in ("latency_ms", "fps"))
    speed = [
        None if text is None else options.numbers(text, "--client-target")[0]
        for text in (latency, fps)
    ]
    resources = [f"{name}={limit}" for name, limit in demands.items()]
    return Limits(device=DeviceRequest.of(kind, speed[0], speed[1], resources))


def client_budget(limits: Limits) -> ClientBudget:
    """Return what one client's network may cost, and which bits its device computes with."""
    target = limits.device.target
    return ClientBudget(
        _limit(limits, target), None if target is None else _legal(hw.target(target))
    )


def _limit(limits: Limits, target: str | None) -> Callable[[SearchSpace], Budget]:
    def budget(space: SearchSpace) -> Budget:
        if target is not None:
            _check_fixed(space, target)
        return limits.budget(space)

    return budget


def _legal(device: hw.Target) -> Callable[[SearchSpace, Unit], tuple[int, ...]]:
    def legal(space: SearchSpace, unit: Unit) -> tuple[int, ...]:
        known = [
            device.act_bits if unit.is_act else device.legal_weight_bits(space.layers[i])
            for i in unit.layers
        ]
        return tuple(b for b in unit.choices if all(b in bits for bits in known))

    return legal


def _check_fixed(space: SearchSpace, target: str) -> None:
    """Raise RequestError if a client's device has not the bits that no search decides."""
    device = hw.target(target)
    decided = {i for unit in space.act_units for i in unit.layers}
    for i, (spec, bits) in enumerate(zip(space.layers, space.policy, strict=True)):
        weights, acts = device.legal_weight_bits(spec), device.act_bits
        for what, have, legal in (
            ("weights", None if bits.searched else bits.weight_bits, weights),
            ("input", None if i in decided else bits.act_bits, acts),
        ):
            if have is not None and have not in (*legal, FLOAT_BITS):
                raise RequestError(
                    f"--client-target: {target} must compute with the {what} of layer {spec.name}, "
                    f"{have} bits, but has {', '.join(map(str, legal))}; change --act-bits, "
                    "--first-last-bits or --pin"
                )


def prepare(network: nn.Module, inputs: inp.Inputs, request: BitsRequest) -> BitsRequest:
    """Return the request with candidates that the target has; RequestError if it has none."""
    plan = request.plan
    device = next(network.parameters()).device
    qmodel = quantize(network, plan.quant, sample=inputs.sample.to(device))
    if plan.target is not None:
        plan = replace(plan, quant=layers_on_target(qmodel, plan.target))
        qmodel = quantize(network, plan.quant, sample=inputs.sample.to(device))
    if plan.prepared_for is not None:
        check_prepared(plan.prepared_for, qmodel, inputs.sample.to(device))
    return replace(request, plan=plan)


def learning_of_request(
    network: nn.Module, clients: list[ClientData], request: BitsRequest, **common: Any
) -> Learning:
    """Return the federation that learns bits.

    Args:
        network: what it starts from.
        clients: their images.
        request: what was asked of the bits.
        common: of every federation, as :func:`fl.phases.learning` names it.
    """
    plan = request.plan
    policy = BitwidthPolicy.load(Path(plan.given_policy)) if plan.given_policy else None
    personal = client_limits(request.targets, clients)
    return learning(
        network, quant=plan.quant, clients=clients, phases=request.phases, policy=policy,
        budget=plan.limits.budget if plan.limits is not None else None,
        personal={k: client_budget(limits) for k, limits in personal.items()}, **common,
    )  # fmt: skip


def write(
    run: RunFolder, settings: PhaseSettings, inputs: inp.Inputs, done: FederatedBits,
    names: list[str], of_client: Callable[[int], tuple[Path, dict[str, Any]]],
) -> dict[str, Any]:  # fmt: skip
    """Write what came of the bits, for all and for clients of their own; return the metrics.

    Args:
        run: of the method.
        settings: of the federation.
        inputs: with the images that the server's model is measured on.
        done: the result.
        names: of the clients.
        of_client: the folder of a client's own model, and what its ``run.json`` says.
    """
    qmodel = settings.tuned(done.float_state, done.policy, done.state)
    write_model(run, qmodel, done.float_state)
    write_course(run, done)
    source = Source(settings.network(done.float_state).cpu(), {}, inputs)
    measured = (inputs.splits.test or inputs.splits.val) is not None
    metrics = measure(qmodel, source, run) if measured else sizes(qmodel)
    metrics["phases"] = of_phases(done)
    metrics["clients"] = {}
    for client, model in done.personal.items():
        folder, described = of_client(client)
        qmodel = settings.tuned(done.float_state, model.policy, model.state)
        tested = model.evaluation.get("test")
        found = write_own(
            folder, described, qmodel, done.float_state, sizes(qmodel),
            None if tested is None else primary(tested),
        )  # fmt: skip
        metrics["clients"][names[client]] = {"folder": f"clients/{folder.name}", **found}
    return metrics
