"""Rounds: what goes wrong is named and left out; who is away; what is selected; wrappers."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl import personal
from fl.client import client_generator, noised
from fl.method import (
    Client,
    Method,
    Phase,
    Progress,
    Server,
)
from fl.methods.fedavg import FedAvg
from fl.network import Network, Outputs
from fl.record import Failure, Record, Reply, Request, misfit
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.state import Route
from fl.store import Store
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError, RunError

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)


def go(net: nn.Module, clients: Sequence[fl.ClientData], **more: Any) -> fl.Federated:
    return fl.run(net, clients=clients, num_classes=3, **{"config": QUICK, **more})


class Broken:
    """Images on a disk that fails when they are read."""

    shape = (4, 1, 6, 6)

    def take(self, indices: Tensor) -> Tensor:
        raise OSError("the disk is gone")


class Diverging(Client):
    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        factor = torch.nan if self.context.client == 1 else 1.0
        return super().loss(outputs, labels) * factor


class Lying(Client):
    def finish(self, progress: Progress) -> Record:
        wrong = torch.tensor([torch.inf if self.context.client == 1 else 0.0])
        return Record({"lying": {"x": wrong}})


class DivergingMethod(FedAvg):
    client_type = Diverging


class LyingMethod(FedAvg):
    client_type = Lying


@pytest.mark.parametrize(
    ("method", "reason"),
    [(DivergingMethod(), "loss must be finite, got nan"), (LyingMethod(), "'lying/x'")],
)
def test_a_client_that_is_not_finite(
    method: Method, reason: str, tiny: Make, hospitals: Clients
) -> None:
    clients = hospitals()
    found = go(tiny(), clients, method=method)
    for summary in found.history:
        assert summary["replied"] == [0, 2]
        assert [f["client"] for f in summary["failures"]] == [1]
        assert reason in summary["failures"][0]["reason"]
    assert all(t.isfinite().all() for t in found.state.values())


@pytest.mark.parametrize("kind", ["disk", "shape", "classes", "empty"])
def test_a_client_of_another_kind(kind: str, tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    good, labels = clients[1].train, torch.tensor([0, 1, 2, 0])
    small = ArrayImages(torch.zeros(4, 1, 5, 6, dtype=torch.uint8))
    train, reason = {
        "disk": (ImageSet(Broken(), labels), "OSError: the disk is gone"),
        "shape": (ImageSet(small, labels), r"(1, 5, 6)"),
        "classes": (ImageSet(good.images, good.labels + 1), "got 1 to 3"),
        "empty": (good.subset(torch.tensor([], dtype=torch.int64)), "got none"),
    }[kind]
    clients[1] = replace(clients[1], train=train)
    told: list[dict[str, Any]] = []
    found = go(tiny(), clients, watch=told.append)
    for summary in found.history:
        assert summary["replied"] == [0, 2]
        assert reason in summary["failures"][0]["reason"]
    if kind != "disk":  # the labels are in memory: it told its counts
        assert told[0]["counts"][0]["client"] == 1
    # nothing of it is in the result: the others alone train to the same model
    alone = go(tiny(), [clients[0], clients[0], clients[2]], method=OnlyEven())
    assert all(torch.equal(t, alone.state[n]) for n, t in found.state.items())


class Absent(Client):
    def start(self) -> None:
        if self.context.client % 2:
            raise RunError("it died")


class OnlyEven(FedAvg):
    client_type = Absent


def test_nobody_replies(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()[1:2]
    clients[0] = replace(clients[0], train=ImageSet(Broken(), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(RunError, match=r"round 1: at least 1 clients must reply, got 0 of 1: clie"):
        go(tiny(), clients)
    with pytest.raises(RunError, match="at least 3 clients must reply, got 2 of 3"):
        go(tiny(), hospitals(), method=OnlyEven(), config=QUICK.replaced(min_replies=3))
    with pytest.raises(RequestError, match="at least one"):
        go(tiny(), [])


def test_a_request_of_another_network(tiny: Make, hospitals: Clients) -> None:
    setting = Setting.of(tiny(), FedAvg(), QUICK, num_classes=3, image_shape=(1, 6, 6))
    transport = InProcess(setting, hospitals(), Store())
    state = {n: t for n, t in setting.initial.items() if "head" not in n}
    (found,) = transport.ask([Request("train", 0, 0, Record({"model": state}))])
    assert not isinstance(found, Reply)
    assert "same network and version" in found.reason


def test_the_model_must_have_the_classes(tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match="one logit for each of 4 classes"):
        fl.run(tiny(), clients=hospitals(), num_classes=4)


def test_participation(tiny: Make, hospitals: Clients) -> None:
    """A share of clients is drawn; local tensors of one that is away stay what they were."""
    config = QUICK.replaced(rounds=6, participation=0.3)
    found = go(tiny(), hospitals(), method="fedper", config=config)
    asked = [r["asked"] for r in found.history]
    assert all(len(a) == 1 for a in asked)
    assert len({a[0] for a in asked}) > 1
    assert found.specialization is not None
    assert set(found.specialization["clients"]) == {"0", "1", "2"}


def test_an_absent_client_keeps_its_state(tiny: Make, hospitals: Clients) -> None:
    config = QUICK.replaced(rounds=6, participation=0.3)
    setting = Setting.of(tiny(), fl.method("fedper"), config, num_classes=3, image_shape=(1, 6, 6))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, hospitals(), store), 3)
    rounds.begin()
    for _ in range(6):
        before = {k: store[k].model["model.head.weight"] for k in store.index}
        report = rounds.round(evaluate=False)
        for k, weight in before.items():
            same = torch.equal(store[k].model["model.head.weight"], weight)
            assert same is (k not in report.asked)


def test_selection_looks_at_validation_alone(tiny: Make, hospitals: Clients) -> None:
    config = QUICK.replaced(rounds=4, evaluate_every=1, select="generalization", lr=0.02)
    clients = hospitals()
    found = go(tiny(), clients, config=config)
    scores = [r["generalization"]["val"]["balanced_accuracy"] for r in found.history]
    best = max(range(4), key=lambda t: (scores[t], t))
    assert found.round == best + 1
    assert found.selected_by == "generalization"
    expected = found.history[best]["generalization"]["test"]
    assert found.generalization == expected
    blind = go(tiny(), [replace(c, val=None) for c in clients], config=config)
    assert (blind.round, blind.selected_by) == (4, "last")


@pytest.mark.parametrize("select", ["generalization", "specialization"])
def test_a_selected_round_is_judged_by_all_clients(
    select: str, tiny: Make, hospitals: Clients
) -> None:
    config = QUICK.replaced(
        rounds=4, evaluate_every=1, participation=0.3, select=select, lr=0.02
    )  # fmt: skip
    found = go(tiny(), hospitals(), config=config)
    assert {len(r["asked"]) for r in found.history} == {1}
    for record in found.history:
        assert set(record["specialization"]["test"]["clients"]) == {"0", "1", "2"}


def test_a_client_keeps_its_model_of_the_last_round_that_was_evaluated(
    tiny: Make, hospitals: Clients
) -> None:
    kept: dict[int, Any] = {}
    config = QUICK.replaced(rounds=3, evaluate_every=2, keep_clients=True, evaluate_absent=False)
    setting = Setting.of(tiny(), fl.method("ditto"), config, num_classes=3, image_shape=(1, 6, 6))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, hospitals(), store), 3)
    rounds.begin()
    for evaluate in (False, True, False):
        rounds.round(evaluate=evaluate)
        kept = {k: personal.Personal.taken(store[k].copy()) for k in store.index}
    assert [kept[k].round for k in range(3)] == [2, 2, 2]


def test_generalization_with_heads_that_stay(tiny: Make, hospitals: Clients) -> None:
    """The heads are collected and averaged for the evaluation, or there is none to report."""
    config = QUICK.replaced(rounds=1)
    clients = hospitals()
    found = go(tiny(), clients, method="fedper", config=config)
    setting = Setting.of(tiny(), fl.method("fedper"), config, num_classes=3, image_shape=(1, 6, 6))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, clients, store), 3)
    rounds.begin()
    rounds.round(evaluate=False)
    sizes = torch.tensor([float(len(c.train)) for c in clients])
    heads = torch.stack([store[k].model["model.head.weight"] for k in range(3)])
    expected = (heads * (sizes / sizes.sum())[:, None, None]).sum(0)
    torch.testing.assert_close(found.state["head.weight"], expected)
    assert found.generalization is not None
    alone = go(tiny(), clients, method="fedper", config=config.replaced(assemble=False))
    assert alone.generalization is None
    assert go(tiny(), clients, method="local", config=config).generalization is None


def test_counts_with_noise() -> None:
    """Laplace noise of scale 1 / epsilon has a mean absolute deviation of 1 / epsilon."""
    counts = torch.full((20000,), 1000.0)
    found = noised(counts, 0.1, client_generator(0, 0, "counts"))
    assert float((found - 1000).abs().mean()) == pytest.approx(10.0, rel=0.03)
    assert float((found - 1000).mean()) == pytest.approx(0.0, abs=0.4)
    assert float(noised(torch.zeros(100), 0.1, client_generator(0, 0, "counts")).min()) == 0.0


def test_who_resumes_must_ask_the_same(tiny: Make, hospitals: Clients, tmp_path: Path) -> None:
    go(tiny(), hospitals(), folder=tmp_path)
    with pytest.raises(RequestError, match="config must be as in the interrupted federation"):
        go(tiny(), hospitals(), folder=tmp_path, config=QUICK.replaced(lr=1e-3))
    with pytest.raises(RequestError, match="method must be"):
        go(tiny(), hospitals(), folder=tmp_path, method="fedprox")


def test_the_callers_generator_and_model_are_left_alone(tiny: Make, hospitals: Clients) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    go(tiny(), hospitals(), config=QUICK.replaced(rounds=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_learning_rate_falls_by_rounds() -> None:
    config = fl.FederationConfig(lr=1.0, lr_decay=0.5, lr_decay_every=5)
    assert [config.lr_in(t) for t in (0, 4, 5, 14)] == [1.0, 1.0, 0.5, 0.25]
    config = fl.FederationConfig(lr=1.0, lr_decay=0.1, lr_decay_rounds=(60, 70))
    assert [config.lr_in(t) for t in (59, 60, 70)] == pytest.approx([1.0, 0.1, 0.01])


# --- the hooks


class HeadThenBody(Client):
    """Two phases, as FedRep has them."""

    seen: list[tuple[str, list[str]]] = []  # noqa: RUF012 - what the test reads

    def phases(self) -> Sequence[Phase]:
        head = self.context.network.is_head
        return (Phase(2, head), Phase(1, lambda name: not head(name)))

    def start_epoch(self, epoch: int) -> None:
        self.before = {n: p.detach().clone() for n, p in self.context.network.named_parameters()}

    def end_epoch(self, epoch: int) -> None:
        now = dict(self.context.network.named_parameters())
        changed = [n for n, p in now.items() if not torch.equal(p, self.before[n])]
        self.seen.append((str(epoch), changed))


class PhasedMethod(FedAvg):
    client_type = HeadThenBody


def test_phases(tiny: Make, hospitals: Clients) -> None:
    HeadThenBody.seen.clear()
    go(tiny(), hospitals()[:1], method=PhasedMethod(), config=QUICK.replaced(rounds=1))
    epochs, changed = zip(*HeadThenBody.seen, strict=True)
    assert epochs == ("0", "1", "2")
    heads = ["model.head.weight", "model.head.bias"]
    assert changed[0] == changed[1] == heads
    assert "model.conv.weight" in changed[2]
    assert not set(heads) & set(changed[2])


class Shrinking(WrapperClient):
    """A term on the features beside the inner client's loss, and a message of its own."""

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        weight = float(self.context.received.values["weight"])
        return super().loss(outputs, labels) + weight * outputs.known_features.square().mean()

    def finish(self, progress: Progress) -> Record:
        inner = super().finish(progress)
        return Record(inner.tensors, {**inner.values, "shrinking": self.context.client})


class Shrink(Wrapper):
    config_type = WrapperConfig
    client_type = Shrinking
    needs_head = True
    told: list[int]

    def send(self, server: Server, client: int) -> Record:
        inner = self.inner.send(server, client)
        return Record(inner.tensors, {**inner.values, "weight": self.weight})

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Any:
        self.told = [r.record.values["shrinking"] for r in replies]
        return super().aggregate(server, replies)


@pytest.mark.parametrize("around", ["fedavg", "scaffold", "fca", "pfa", "fedper"])
def test_a_wrapper_goes_around_any_method(around: str, tiny: Make, hospitals: Clients) -> None:
    states = {}
    for weight in (0.0, 5.0):
        method = Shrink(WrapperConfig(around=around))
        method.weight = weight  # type: ignore[attr-defined]
        states[weight] = go(tiny(), hospitals(), method=method).state
        assert method.told == [0, 1, 2]
    plain = go(tiny(), hospitals(), method=around).state
    # a term of weight 0 adds nothing, to the last bit
    assert all(torch.equal(t, plain[n]) for n, t in states[0.0].items())
    assert not torch.equal(states[5.0]["hidden.weight"], plain["hidden.weight"])


class Personal(FedAvg):
    """A personal copy of the whole model beside the shared one, as Ditto and DET have it."""

    class Both(Client):
        def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
            network = self.context.network
            own = network.outputs(outputs.images, network.extras["personal"])
            return super().loss(outputs, labels) + self.context.criterion(own.logits, labels)

    client_type = Both

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        import copy

        network.extras["personal"] = copy.deepcopy(network.model)

    def views(self, side: str) -> Any:
        return {"personal": lambda network, x: network.extras["personal"](x)}


def test_a_personal_model_is_the_locally_trained_one(tiny: Make, hospitals: Clients) -> None:
    """Its gradient is its own: it ends where a client alone would, and nothing of it travels."""
    clients = hospitals()
    setting = Setting.of(tiny(), Personal(), QUICK, num_classes=3, image_shape=(1, 6, 6))
    assert {r for n, r in setting.routes.items() if n.startswith("extras.")} == {Route.LOCAL}
    kept = {}
    for method in (Personal(), fl.method("local")):
        setting = Setting.of(tiny(), method, QUICK, num_classes=3, image_shape=(1, 6, 6))
        kept[method.name] = store = Store()
        rounds = Rounds(setting, InProcess(setting, clients, store), 3)
        rounds.begin()
        for _ in range(2):
            rounds.round(evaluate=False)
    for k in range(3):
        personal, local = (list(store[k].model.items()) for store in kept.values())
        for (name, tensor), (other, expected) in zip(personal, local, strict=True):
            assert name.removeprefix("extras.personal.") == other.removeprefix("model.")
            assert torch.equal(tensor, expected)


def test_optimizer_state_that_goes_on(tiny: Make, hospitals: Clients) -> None:
    """Its steps are counted over the rounds; without it a client's second round is another."""
    clients = hospitals((8, 8, 8))
    kept = go(tiny(), clients, config=QUICK.replaced(keep_optimizer=True))
    fresh = go(tiny(), clients)
    assert not torch.equal(kept.state["conv.weight"], fresh.state["conv.weight"])
    setting = Setting.of(
        tiny(), FedAvg(), QUICK.replaced(keep_optimizer=True), num_classes=3, image_shape=(1, 6, 6)
    )
    store = Store()
    rounds = Rounds(setting, InProcess(setting, clients, store), 1)
    rounds.begin()
    for _ in range(2):
        rounds.round(evaluate=False)
    # three batches a round
    assert float(store[0].tensors["optimizer.0"]["step/model.conv.weight"]) == 6.0


def test_values_and_names_are_what_json_and_flower_can_hold(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    for name in ("fedavg", "scaffold", "fca"):
        setting = Setting.of(tiny(), fl.method(name), QUICK, num_classes=3, image_shape=(1, 6, 6))
        transport = InProcess(setting, clients, Store())
        rounds = Rounds(setting, transport, 3)
        rounds.begin()
        for request in rounds.requests("train", [0], None, evaluate=True):
            json.dumps(request.record.values, allow_nan=False)
            (reply,) = transport.ask([request])
            assert isinstance(reply, Reply)
            json.dumps(reply.record.values, allow_nan=False)
            assert misfit(reply.model, {n: setting.initial[n] for n in reply.model}) is None
            assert all("/" not in group for group in reply.record.tensors)


def test_a_client_that_fails_only_in_the_last_evaluation(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    clients[1] = replace(clients[1], train=ImageSet(Broken(), torch.tensor([0, 1, 2, 0])))
    config = QUICK.replaced(rounds=1, participation=0.3, seed=1)
    found = go(tiny(), clients, config=config)
    assert 1 not in found.history[0]["asked"]
    assert [f["client"] for f in found.history[0]["failures"]] == [1]
    assert found.specialization is not None
    assert set(found.specialization["clients"]) == {"0", "2"}


class Late(InProcess):
    """Client 2 is there from the second round on."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            if request.client == 2 and (request.kind == "counts" or not request.round):
                early = request.kind == "train" or not self.begun
                if early:
                    yield Failure(2, "not there yet")
                    continue
            yield from super().ask([request])

    begun = False


def test_who_comes_later_is_counted_from_then_on(tiny: Make, hospitals: Clients) -> None:
    """FedNPR-Per's head is the mean of those that stay with the clients, by their images."""
    method, clients = fl.method("fednpr_per"), hospitals()
    setting = Setting.of(tiny(), method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    transport = Late(setting, clients, Store())
    rounds = Rounds(setting, transport, 3)
    assert [f.client for f in rounds.begin()] == [2]
    report = rounds.round(evaluate=False)
    assert (report.replied, [f.client for f in report.failures]) == ([0, 1], [2])
    assert sorted(rounds.server.counts) == [0, 1]
    transport.begun = True
    assert rounds.round(evaluate=False).replied == [0, 1, 2]
    assert sorted(rounds.server.counts) == [0, 1, 2]
    assert (
        rounds.server.all_counts.tolist()
        == sum(torch.bincount(c.train.labels, minlength=3) for c in clients).tolist()
    )  # type: ignore[union-attr]
    assert rounds.load_model_()
    (head,) = (n for n in setting.names(up=False) if n.startswith("model.") and "weight" in n)
    sizes = torch.tensor([len(c.train) for c in clients]).double()
    kept = torch.stack([transport.store[k].model[head] for k in range(3)]).double()
    expected = (kept * (sizes / sizes.sum()).view(-1, 1, 1)).sum(0)
    found = setting.network.state_dict()[head]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_round_is_told_of_before_it_is_kept(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """Killed in between, it is told of again, and not for good of no round."""
    told: list[int] = []

    def watch(summary: dict[str, Any]) -> None:
        told.append(summary["round"])
        if told == [0, 1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tiny(), hospitals(), folder=tmp_path, watch=watch)
    go(tiny(), hospitals(), folder=tmp_path, watch=watch)
    assert told == [0, 1, 1]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"min_replies": 4}, "min_replies: must be at most 3"),
        ({"min_replies": 3, "participation": 0.5}, "must be at most 2, as many as a round asks"),
        ({"aggregation": "trimmed_mean:0.2", "participation": 0.5}, "3 clients or more in a round"),
    ],
)
def test_what_no_round_can_be_is_refused_at_once(
    tiny: Make, hospitals: Clients, over: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        go(tiny(), hospitals(), config=QUICK.replaced(**over))


def test_a_model_that_is_not_whole_says_so(tiny: Make, hospitals: Clients) -> None:
    assert go(tiny(), hospitals(), method="fedper").whole
    assert not go(tiny(), hospitals(), method="fedper", config=QUICK.replaced(assemble=False)).whole
