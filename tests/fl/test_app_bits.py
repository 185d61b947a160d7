"""Bits learned over a grid: what comes of it is what comes of it in one process."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.bits import ClientBudget, FederatedBits, PhasesConfig
from fl.phase_settings import PhaseSettings
from fl.results import Description, open_run
from sdq.config import QuantConfig
from sdq.cost import Budget
from sdq.run_folder import RunFolder

pytest.importorskip("flwr")

from flwr.app import Message

from fl import apps
from fl.grid import InProcessGrid, run_apps

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]

QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)
QUANT = QuantConfig(bit_choices=(1, 2, 4, 8), first_last_bits=None)
PHASES = PhasesConfig(search_rounds=2, tune_rounds=2)
PERSONAL = {1: ClientBudget(Budget(avg_weight_bits=1.7))}


def settings(net: nn.Module, method: str = "fedavg", **over: Any) -> PhaseSettings:
    given = {"quant": QUANT, "budget": Budget(avg_weight_bits=3.0), "config": QUICK,
             "phases": PHASES} | over  # fmt: skip
    return PhaseSettings(
        model=net, method=fl.method(method), num_classes=3, image_shape=(1, 6, 6), **given
    )


class Case:
    """One federation that learns bits as apps on a grid of this process."""

    def __init__(
        self, server: PhaseSettings, data: Sequence[fl.ClientData], *,
        folder: Path | None = None, kept: Path | None = None, out: Path | None = None,
        personal: dict[int, ClientBudget] | None = None, dead: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.done: FederatedBits | None = None
        self.data = list(data)
        self.of_client = dict.fromkeys(range(len(data)), server)

        def open_federation(config: apps.Values) -> apps.Federation:
            test, val = ([getattr(c, part) for c in self.data] for part in ("test", "val"))
            run = None if out is None else open_run(out, Description(server, "mlp", list("abc")))
            return apps.Federation(
                server, len(data), tuple(test), tuple(val), folder, 5, run, personal or {}
            )

        def open_hospital(client: int, run: apps.Values, node: apps.Values) -> apps.Hospital:
            own = self.of_client[client]
            described = Description(own, "mlp", list("abc"), f"{client}.npz").to_json()
            return apps.Hospital(own, self.data[client], kept, described)

        def finish(done: fl.Federated, config: apps.Values) -> None:
            assert isinstance(done, FederatedBits)
            self.done = done

        self.server = apps.server_app(open_federation, finish)
        self.grid = InProcessGrid(apps.client_app(open_hospital), len(data), dead=dead)

    def run(self) -> FederatedBits:
        run_apps(self.server, self.grid, {})
        assert self.done is not None
        return self.done


def here(shared: PhaseSettings, data: list[fl.ClientData], **more: Any) -> FederatedBits:
    """Return the result of the same federation in one process."""
    found = fl.run(
        shared.model, quant=shared.quant, budget=shared.budget, method=shared.method.name,
        clients=data, num_classes=3, config=shared.config, rounds=shared.rounds,
        phases=shared.phases, policy=shared.policy, **more,
    )  # fmt: skip
    assert isinstance(found, FederatedBits)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def check_same(found: FederatedBits, expected: FederatedBits) -> None:
    assert found.policy == expected.policy
    assert found.course == expected.course
    assert same(found.state, expected.state)
    assert same(found.float_state, expected.float_state)
    assert found.history == expected.history
    assert found.generalization == expected.generalization
    assert found.specialization == expected.specialization


@pytest.mark.parametrize("method", ["fedavg", "fedper", "prr"])
def test_apps_compute_what_one_process_does(method: str, tiny: Make, hospitals: Clients) -> None:
    """FedPer keeps a head, PRR a whole model: they start each phase from the float phase's."""
    shared = settings(tiny(), method, config=QUICK.replaced(participation=0.6))
    found = Case(shared, hospitals()).run()
    expected = here(shared, hospitals())
    check_same(found, expected)
    assert [*found.phases] == ["float", "search", "tune"]
    assert (found.bytes_up, found.bytes_down) == (expected.bytes_up, expected.bytes_down)
