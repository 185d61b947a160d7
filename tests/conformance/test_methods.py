"""What every federated method must do, because its file is there."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fl
from fl.client import answer
from fl.personal import Personal
from fl.record import Failure, Reply, Request
from fl.rounds import Rounds
from fl.run import Federated, InProcess
from fl.setting import Setting
from fl.store import Store
from sdq import plugins
from sdq.batches import Batches, Normalization
from sdq.task import evaluate

METHODS = plugins.names("fl.methods")
KINDS = ("classification", "segmentation", "mixed")
"""What clients have: a class an image; masks; the first masks, the others less."""


def kinds(name: str) -> list[str]:
    """Return the kinds of clients a method is tried with here: its first task's, and mixed ones.

    Classifiers that segment too have a test of their own.
    """
    method = fl.method(name)
    return [method.tasks[0], *(["mixed"] if len(method.supervision) > 1 else [])]


CASES = [(name, kind) for name in METHODS for kind in kinds(name)]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)
Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]

pytestmark = pytest.mark.parametrize(("name", "kind"), CASES)


@pytest.fixture
def tiny(kind: str, tiny: Make, tiny_maps: Make) -> Make:
    return tiny if kind == "classification" else tiny_maps


@pytest.fixture
def hospitals(
    kind: str, hospitals: Clients, hospitals_with_masks: Clients, mixed_hospitals: Clients
) -> Clients:
    return dict(zip(KINDS, (hospitals, hospitals_with_masks, mixed_hospitals), strict=True))[kind]


class Killed(Exception):
    pass


def go(
    name: str, net: nn.Module, clients: list[fl.ClientData],
    config: fl.FederationConfig = QUICK, **more: Any,
) -> Federated:  # fmt: skip
    return fl.run(net, method=name, clients=clients, num_classes=3, config=config, **more)


def same(one: Federated, other: Federated) -> bool:
    """Tell whether two runs ended alike, in every tensor and every figure."""
    return (
        one.state.keys() == other.state.keys()
        and all(torch.equal(t, other.state[n]) for n, t in one.state.items())
        and one.specialization == other.specialization
        and one.generalization == other.generalization
        and one.history == other.history
    )


def test_hyper_parameters_survive_json(name: str, kind: str) -> None:
    config = fl.method(name).config
    text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert type(config)(**json.loads(text)) == config
    assert fl.method(name, **json.loads(text)).config == config
    assert fl.method(name).name == name


def test_it_learns_and_keeps_names_and_dtypes(
    name: str, kind: str, tiny: Make, hospitals: Clients
) -> None:
    net = tiny()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = go(name, net, hospitals(), QUICK.replaced(rounds=4, local_epochs=2))
    losses = [r["train_loss"] for r in found.history]
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    described = {n: (t.dtype, t.shape) for n, t in found.state.items()}
    assert described == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all(t.isfinite().all() for t in found.state.values())
    assert found.specialization is not None
    main = "balanced_accuracy" if kind == "classification" else "dice"
    assert math.isfinite(found.specialization[main])
    tiny().load_state_dict(found.state)


class Shuffled(InProcess):
    """Replies come in an order of their own, as over a network."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        answers = list(super().ask(requests))
        random.Random(3).shuffle(answers)
        return iter(answers)


def test_order_of_replies(name: str, tiny: Make, hospitals: Clients) -> None:
    models, asked = [], hospitals()
    for transport in (InProcess, Shuffled):
        setting = Setting.of(
            tiny(), fl.method(name), QUICK, num_classes=3, image_shape=(1, 6, 6)
        )  # fmt: skip
        rounds = Rounds(setting, transport(setting, asked, Store()), len(asked))
        rounds.begin()
        for _ in range(2):
            rounds.round(evaluate=False)
        rounds.load_model_()
        models.append({n: t.clone() for n, t in setting.network.state_dict().items()})
    assert all(torch.equal(t, models[1][n]) for n, t in models[0].items())


def test_killed_after_a_round(name: str, tiny: Make, hospitals: Clients, tmp_path: Path) -> None:
    config = QUICK.replaced(
        rounds=3, participation=0.6, keep_optimizer=True, evaluate_every=2, select="specialization"
    )

    def kill(summary: dict[str, Any]) -> None:
        if summary["round"] == 1:
            raise Killed

    whole = go(name, tiny(), hospitals(), config)
    with pytest.raises(Killed):
        go(name, tiny(), hospitals(), config, folder=tmp_path, watch=kill)
    assert same(go(name, tiny(), hospitals(), config, folder=tmp_path), whole)
    # finished: nothing is left to do, and the answer is the same
    assert same(go(name, tiny(), hospitals(), config, folder=tmp_path), whole)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(((9, 0, 0), (0, 9, 0), (0, 0, 9)), id="one class each"),
        pytest.param(((9, 9, 0), (4, 5, 0)), id="a class that nobody has"),
        pytest.param(((1, 0, 0), (5, 9, 9)), id="one image"),
        pytest.param(((6, 5, 4),), id="one client"),
        pytest.param(((6, 5, 4), (0, 0, 0)), id="an empty client"),
    ],
)
def test_awkward_clients(
    name: str, counts: tuple[tuple[int, int, int], ...], tiny: Make, hospitals: Clients
) -> None:
    found = go(name, tiny(), hospitals(*counts))
    assert all(t.isfinite().all() for t in found.state.values())
    assert found.specialization is not None
    for summary in found.history:
        failed = [f["client"] for f in summary["failures"]]
        # training without borders has one client, which holds whatever the others do
        expected = [k for k, c in enumerate(counts) if sum(c) == 0]
        assert failed == (expected if len(summary["asked"]) > 1 else [])


class Copies(InProcess):
    """Every client sends what client 0 would."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            found, _ = answer(self.setting, self.clients[0], replace(request, client=0), None)
            yield replace(found, client=request.client)


def test_equal_clients_get_equal_states(name: str, tiny: Make, hospitals: Clients) -> None:
    setting = Setting.of(tiny(), fl.method(name), QUICK, num_classes=3, image_shape=(1, 6, 6))
    rounds = Rounds(setting, Copies(setting, hospitals((6, 5, 4)), Store()), 3)
    rounds.begin()
    rounds.round(evaluate=False)
    first, *others = [setting.method.state_for(rounds.server, k) for k in range(3)]
    for other in others:
        assert other.keys() == first.keys()
        for tensor_name, tensor in other.items():
            assert torch.equal(tensor, first[tensor_name]), tensor_name


def test_a_client_that_is_away(name: str, tiny: Make, hospitals: Clients) -> None:
    """It keeps what it has, and comes back to a model of the right names and shapes."""
    config = QUICK.replaced(rounds=4, participation=0.34)
    found = go(name, tiny(), hospitals(), config)
    asked = [tuple(r["asked"]) for r in found.history]
    assert len(set(asked)) > 1 or len(hospitals()) == 1 or name == "centralized"
    assert all(not r["failures"] for r in found.history)


def test_a_clients_own_model_predicts_as_the_view_that_counts(name: str, tiny: Make) -> None:
    method = fl.method(name)
    setting = Setting.of(tiny(), method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that the model, copies and heads all differ
        for parameter in setting.network.parameters():
            parameter += 0.3 * torch.rand(parameter.shape, generator=rng)
    view = next(iter(method.views("client").values()))
    images = torch.randn(5, 1, 6, 6, generator=rng)
    own = tiny(1).eval()
    own.load_state_dict(method.personal(setting.network))
    with torch.no_grad():
        expected = view(setting.network.eval(), images)
        # two heads in one are added in another order
        assert torch.allclose(own(images), expected, rtol=1e-5, atol=1e-6)


def test_clients_keep_their_own_models(
    name: str, kind: str, tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """Also those that the last round did not ask, and they change nothing else."""
    config = QUICK.replaced(participation=0.5, keep_clients=True)
    kept: dict[int, Personal] = {}
    done = go(name, tiny(), hospitals(), config, folder=tmp_path, keep=kept.__setitem__)
    plain = go(name, tiny(), hospitals(), QUICK.replaced(participation=0.5))
    assert same(done, plain)
    arranged = fl.method(name).arrange(hospitals())
    assert sorted(kept) == list(range(len(arranged)))
    assert done.specialization is not None
    for number, client in enumerate(arranged):
        assert kept[number].round == 2
        if client.pooled or str(number) not in done.specialization["clients"]:
            continue  # with mixed labels not every client can be measured
        assert client.test is not None
        own = tiny(1)
        own.load_state_dict(kept[number].state)
        found = evaluate(own, Batches(client.test, Normalization((0.5,), (0.5,)), batch_size=64))
        measured = kept[number].evaluation["test"]
        reported = done.specialization["clients"][str(number)]
        if kind == "classification":
            reported = {"balanced_accuracy": reported}
        for metric in (*reported, *{"macro_f1", "auc", "ece", "dice"} & set(found)):
            # not the last bit: memory formats and sums of heads differ
            assert found[metric] == pytest.approx(measured[metric], abs=1e-6)
            assert found[metric] == pytest.approx(reported.get(metric, found[metric]))
