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
from fl.compression import CompressionConfig
from fl.evaluation import primary
from fl.opening import Opening
from fl.phase_settings import PhaseSettings
from fl.results import Description, open_run
from fl.setting import Setting
from sdq.config import QuantConfig
from sdq.cost import Budget
from sdq.errors import RunError
from sdq.policy import BitwidthPolicy
from sdq.quant_model import quantize
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
ONE: dict[str, Any] = {
    "config": QUICK.replaced(rounds=1), "phases": PHASES.replaced(search_rounds=1, tune_rounds=1)
}  # fmt: skip
SLOW = pytest.mark.slow
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


@pytest.mark.parametrize(
    "method", ["fedavg", pytest.param("fedper", marks=SLOW), pytest.param("prr", marks=SLOW)]
)
def test_apps_compute_what_one_process_does(method: str, tiny: Make, hospitals: Clients) -> None:
    """FedPer keeps a head, PRR a whole model: they start each phase from the float phase's."""
    shared = settings(tiny(), method, config=QUICK.replaced(participation=0.6))
    found = Case(shared, hospitals()).run()
    expected = here(shared, hospitals())
    check_same(found, expected)
    assert [*found.phases] == ["float", "search", "tune"]
    assert (found.bytes_up, found.bytes_down) == (expected.bytes_up, expected.bytes_down)


def test_apps_tune_from_the_search_as_one_process_does(tiny: Make, hospitals: Clients) -> None:
    """The heads that FedPer's clients keep, too."""
    shared = settings(tiny(), "fedper", phases=PHASES.replaced(tune_from="search"))
    found = Case(shared, hospitals()).run()
    expected = here(shared, hospitals())
    check_same(found, expected)
    assert (found.bytes_up, found.bytes_down) == (expected.bytes_up, expected.bytes_down)
    assert not same(found.state, here(settings(tiny(), "fedper"), hospitals()).state)


def test_clients_with_bits_of_their_own_keep_their_models(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """With changes of few bits, in a client's own ones; and the policy of what it last sent."""
    compress = CompressionConfig(up=4, down=4, policy_bits=True)
    shared = settings(
        tiny(), "fedper", config=QUICK.replaced(rounds=1, keep_clients=True, compress=compress),
        phases=PHASES.replaced(search_rounds=1, personal_bits="own"),
    )  # fmt: skip
    out = tmp_path / "out"
    found = Case(shared, hospitals(), kept=tmp_path / "kept", out=out, personal=PERSONAL).run()
    expected = here(shared, hospitals(), personal=PERSONAL)
    check_same(found, expected)
    assert (found.bytes_up, found.bytes_down) == (expected.bytes_up, expected.bytes_down)
    assert sorted(found.personal) == [0, 1, 2]
    assert found.personal[1].policy.avg_weight_bits <= 1.7 < found.policy.avg_weight_bits
    server = RunFolder.open(out)
    assert server.read_policy() == found.policy
    assert same(server.read_tensors("model.safetensors"), expected.state)
    assert same(server.read_tensors("float.safetensors"), expected.float_state)
    metrics = server.read_json("metrics.json")
    assert metrics["generalization"] == json.loads(json.dumps(found.generalization))
    for number, model in expected.personal.items():
        assert found.personal[number].state == {}
        assert found.personal[number].evaluation == json.loads(json.dumps(model.evaluation))
        (place,) = (tmp_path / "kept").glob(f"*/{number}/model")
        own = RunFolder.open(place)
        assert own.done
        assert own.read_policy() == model.policy
        assert same(own.read_tensors("model.safetensors"), model.state)
        tested = primary(model.evaluation["test"])
        assert own.read_json("metrics.json")["quantized"] == tested
        assert metrics["clients"][f"client {number}"]["quantized"] == tested
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    phases = ["federate", "search rounds", "tune rounds", "tune rounds", "search"]
    assert [record["phase"] for record in log] == phases


class Stopped(Exception):
    """The server is gone."""


def stop(case: Case, after: int) -> None:
    """End the server after this many trainings."""
    send, trained = case.grid.send_and_receive, [0]

    def stopping(messages: Any, *, timeout: float | None = None) -> Any:
        for message in messages:
            trained[0] += message.metadata.message_type == "train"
            yield from send([message])
            if trained[0] == after:
                raise Stopped

    case.grid.send_and_receive = stopping  # type: ignore[method-assign]


WHOLE: list[FederatedBits] = []
"""The undisturbed run, once made."""


@pytest.mark.parametrize("after", [3, 9, *(pytest.param(n, marks=SLOW) for n in (1, 5, 7))])
def test_a_server_killed_in_any_phase_goes_on(
    after: int, tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """One round in float and two in the others, two clients a round: in mid-round each time."""
    config = QUICK.replaced(rounds=1, participation=0.6)
    shared = settings(tiny(), "fedper", config=config)
    if not WHOLE:
        WHOLE.append(here(shared, hospitals(), personal=PERSONAL))
    places: dict[str, Any] = {
        "folder": tmp_path / "a", "kept": tmp_path / "b", "personal": PERSONAL
    }  # fmt: skip
    case = Case(shared, hospitals(), **places)
    stop(case, after)
    with pytest.raises(Stopped):
        case.run()
    phases = {path.name for path in (tmp_path / "a").iterdir()} if after > 1 else set()
    written = {1: set(), 3: {"float"}, 5: {"float", "search"}, 7: {"float", "search"}}
    assert phases == written.get(after, {"float", "search", "tune"})
    other = Case(shared, hospitals(), **places)
    other.grid.set_run(dataclasses.replace(other.grid.run, run_id=2))
    again = other.run()
    check_same(again, WHOLE[0])
    # nodes are found by the first run's name, and were sent the float model once by both
    assert len(list((tmp_path / "b").iterdir())) == (2 if after == 1 else 1)
    assert again.bytes_down == WHOLE[0].bytes_down


def test_nodes_that_disagree_are_named(tiny: Make, hospitals: Clients) -> None:
    shared = settings(tiny(), **ONE)
    case = Case(shared, hospitals((4, 4, 4), (3, 3, 3), (3, 3, 3), (3, 3, 3)))
    changes = {
        1: ({"quant": QUANT.replaced(act_bits=8)}, "quant.act_bits must be the server's 4, got 8;"),
        2: ({"budget": Budget(avg_weight_bits=2.0)}, "budget.average weight bits must be the "
            "server's 3.0, got 2.0;"),
        3: ({"phases": shared.phases.replaced(distill=0.1)}, "phases.distill must be the server's "
            "0.5, got 0.1;"),
    }  # fmt: skip
    for client, (change, _) in changes.items():
        case.of_client[client] = settings(tiny(), **(ONE | change))
    done = case.run()
    for part in done.phases.values():
        assert [r["replied"] for r in part.history] == [[0]]
        reasons = {f["client"]: f["reason"] for f in part.history[0]["failures"]}
        assert reasons == {k: f"{why} give both the same" for k, (_, why) in changes.items()}
    # who is refused is not sent the float model either
    rounds = sum(part.bytes_down for part in done.phases.values())
    assert done.bytes_down == rounds + sum(t.nbytes for t in done.float_state.values())


def test_learners_and_others_do_not_mix(tiny: Make, hospitals: Clients) -> None:
    def plain() -> Setting:
        return Setting.of(
            tiny(), fl.method("fedavg"), ONE["config"], num_classes=3, image_shape=(1, 6, 6)
        )

    shared, data = settings(tiny(), **ONE), hospitals()
    for server, nodes, reason in (
        (shared, plain(), "quant must be the server's"),
        (plain(), shared, "bits must be learned by all or by none"),
    ):
        federation = apps.Federation(server, 3, round_seconds=5)
        app = apps.server_app(lambda config, f=federation: f, lambda done, config: None)
        client = apps.client_app(lambda k, run, node, n=nodes: apps.Hospital(n, data[k]))
        with pytest.raises(RunError, match=reason):
            run_apps(app, InProcessGrid(client, 3), {})


def test_scales_that_a_machine_sums_otherwise_are_no_disagreement(
    tiny: Make,
) -> None:
    """A least-squares scale may differ in its last bit; a weight that differs is refused."""
    shared = settings(tiny(), **ONE)
    setting = shared.setting(Opening("search"))
    told = setting.identity()["initial"]
    (name, *_) = [
        n for n in setting.initial if "weight_quant.tensor_quant" in n and n.endswith("base")
    ]
    setting.initial[name] = setting.initial[name] * (1 + 2e-7)
    assert setting.identity()["initial"] == told
    setting.initial["model.net.conv.weight"] = setting.initial["model.net.conv.weight"] * (1 + 2e-7)
    assert setting.identity()["initial"] != told


def test_a_node_that_forgot_the_phase_is_told_again(tiny: Make, hospitals: Clients) -> None:
    """It has no folder, ended, and is back under the same name before the server noticed."""
    shared = settings(tiny(), **(ONE | {"phases": ONE["phases"].replaced(search_rounds=2)}))
    case = Case(shared, hospitals())
    deliver, trained = case.grid._deliver, [0]

    def forgetting(message: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            trained[0] += 1
            if trained[0] == 2:  # in the first round of the search
                case.grid.contexts[1001].state.clear()
        return deliver(message)

    case.grid._deliver = forgetting  # type: ignore[method-assign]
    done = case.run()
    first, second = done.phases["search"].history
    assert first["replied"] == [0, 2]
    (failure,) = first["failures"]
    assert failure["reason"].startswith("the node does not remember how the phase search began")
    assert second["replied"] == [0, 1, 2]
    # the float model went to it twice
    rounds = sum(part.bytes_down for part in done.phases.values())
    assert done.bytes_down == rounds + 4 * sum(t.nbytes for t in done.float_state.values())


def test_a_trained_model_reaches_nodes_that_lack_it(tiny: Make, hospitals: Clients) -> None:
    """Without rounds in float: who has the same first weights is sent nothing."""
    given: dict[str, Any] = {**ONE, "rounds": 0, "budget": None, "policy": _policy(tiny())}
    shared = settings(tiny(), **given)
    case = Case(shared, hospitals())
    case.of_client[1] = settings(tiny(1), **given)
    done = case.run()
    check_same(done, here(shared, hospitals()))
    assert [*done.phases] == ["tune"]
    size = sum(t.nbytes for t in done.float_state.values())
    assert done.bytes_down == done.phases["tune"].bytes_down + size


def test_a_node_that_cannot_make_its_model_is_named(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    shared = settings(
        tiny(), rounds=0, budget=None, policy=_policy(tiny()),
        config=QUICK.replaced(keep_clients=True), phases=ONE["phases"],
    )  # fmt: skip
    case = Case(shared, hospitals(), out=tmp_path)
    deliver = case.grid._deliver

    def dying(message: Message) -> Message | None:
        if (message.metadata.message_type, message.metadata.dst_node_id) == ("train.own", 1002):
            case.grid.dead.add(2)
        return deliver(message)

    case.grid._deliver = dying  # type: ignore[method-assign]
    done = case.run()
    assert sorted(done.personal) == [0, 1]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (told,) = [record["failures"] for record in log if record["phase"] == "own"]
    assert told == [{"client": 2, "reason": "no reply within 5 s"}]


def test_a_client_without_masks_is_named(tiny_maps: Make, mixed_hospitals: Clients) -> None:
    shared = settings(tiny_maps(), **ONE)
    done = Case(shared, mixed_hospitals()).run()
    reasons = {f["client"]: f["reason"] for f in done.history[0]["failures"]}
    assert sorted(reasons) == [1, 2]
    assert "supervision must be pixel where bits are learned, got 'box'" in reasons[1]


def _policy(net: nn.Module) -> BitwidthPolicy:
    policy = quantize(net, QUANT, sample=torch.zeros(1, 1, 6, 6)).policy
    return policy.with_weight_bits({b.name: 4 for b in policy})
