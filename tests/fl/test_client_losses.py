"""What the clients of each method minimise, and measure, against numbers worked by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fl
from fl.client import answer
from fl.local_training import _optimizer
from fl.losses import LossConfig
from fl.methods import det
from fl.methods.balancefl import inheritance
from fl.methods.fednpr import FedNPRClient
from fl.methods.fedst import SelfTrainingClient
from fl.network import Outputs
from fl.record import Record, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store

Make = Callable[..., nn.Module]
Clients = Callable[..., list[fl.ClientData]]

P1, P2 = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
KL_P2_P1 = 0.092033  # .5 ln(5/7) + .3 ln(3/2) + .2 ln 2
KL_P1_P2 = 0.085123  # .7 ln(7/5) + .2 ln(2/3) + .1 ln(1/2)
FIRST = torch.tensor([0])
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)


def outputs(logits: Tensor | None, features: Tensor | None = None, **more: Any) -> Outputs:
    return Outputs(torch.zeros(1), logits, features, **more)


def client(method: str, network: Any, config: dict[str, Any] | None = None, **context: Any) -> Any:
    """Return a method's client that knows what is given, and has plain cross-entropy."""
    known = {"config": QUICK, "round": 0, "criterion": F.cross_entropy, "network": network}
    method_ = fl.method(method, **(config or {}))
    return method_.client(SimpleNamespace(**known | context))


def with_head(name: str, head: Callable[[Tensor], Tensor]) -> Any:
    return SimpleNamespace(extras={name: head})


def test_fca_weighs_the_personal_head_three_times_and_anchors_the_federated_one() -> None:
    """-ln .7 + 3 (-ln .5) + KL(p2 || p1), p1 the federated head's."""
    one = client("fca", with_head("personal_head", lambda features: features),
                 loss=LossConfig(name="ce"), all_counts=None)  # fmt: skip
    one.start()
    expected = -math.log(0.7) - 3 * math.log(0.5) + KL_P2_P1
    assert float(one.loss(outputs(P1.log(), P2.log()), FIRST)) == pytest.approx(expected, abs=1e-5)


def test_fedrod_adds_the_personal_head_to_the_generic_logits() -> None:
    """Generic logits 0, 2; a correction of 0, -2 makes both classes equal."""
    one = client("fedrod", with_head("personal_head", lambda features: features),
                 own_counts=torch.tensor([1.0, 1.0]))  # fmt: skip
    found = one.loss(outputs(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, -2.0]])), FIRST)
    assert float(found) == pytest.approx(math.log(1 + math.e**2) + math.log(2), abs=1e-5)


def test_moon_draws_features_to_the_received_models() -> None:
    """Cosines 1 to the received model and 0 to the last own: ln(1 + exp(-1 / .5))."""
    own, across = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    network = SimpleNamespace(outputs=lambda images, features: outputs(None, features))
    one = client("moon", network, criterion=lambda logits, labels: torch.zeros(()))
    one.received, one.last = own, across
    found = one.loss(outputs(None, own), FIRST)
    assert float(found) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_balancefl_inherits_absent_classes_and_lumps_present_ones() -> None:
    """At T = 2 the received model has 1/2, 1/4, 1/4, the client thirds; class 0 is absent.

    4 (1/2 ln(1/2 : 1/3) + 1/2 ln(1/2 : 2/3)) = 2 ln(9/8).
    """
    received, absent = torch.tensor([[2 * math.log(2), 0, 0]]), torch.tensor([True, False, False])
    found = inheritance(torch.zeros(1, 3), received, absent, temperature=2.0)
    assert float(found) == pytest.approx(2 * math.log(9 / 8), abs=1e-6)


def test_balancefl_compares_present_classes_alone() -> None:
    """The logit of 9 is of a class without images: ln(1 + exp(.5 - 2))."""
    network = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]))
    one = client("balancefl", network, {"weight": 0.0}, own_counts=torch.tensor([3.0, 2.0, 0.0]))
    one.start()
    found = one.loss(outputs(torch.tensor([[2.0, 0.5, 9.0]])), FIRST)
    assert float(found) == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-6)


class Features(nn.Module):
    """A network whose features are the images, with a head of zeros."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Linear(1, 2)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.extras = nn.ModuleDict({"retrained_head": head})

    def outputs(self, images: Tensor) -> Outputs:
        return outputs(None, images)


def test_creff_sends_the_mean_gradient_of_each_class() -> None:
    """Features 1 and 3 of class 0, both classes at 1/2: -1/2 (1 + 3) / 2 and -1/2 for the bias."""
    images = torch.tensor([[1.0], [3.0]])
    one = client(
        "creff", Features(), own_counts=torch.tensor([2.0, 0.0]),
        batches=lambda epoch, augmented: [(images, torch.zeros(2, dtype=torch.long))],
    )  # fmt: skip
    one.start()
    assert one.gradients.tolist() == [[[-1.0, -0.5], [1.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]


def test_det_trains_both_models_and_the_stage_says_who_teaches() -> None:
    """In the first stage the personal model (p1) teaches the deputy (p2)."""
    one = det.DETClient.__new__(det.DETClient)
    one.stage = det.RECOVER
    one.context = SimpleNamespace(criterion=F.cross_entropy)
    one.inner = SimpleNamespace(loss=lambda found, labels: F.cross_entropy(found.logits, labels))
    found = one.loss(outputs(P2.log(), own=outputs(P1.log())), FIRST)
    expected = -math.log(0.5) - math.log(0.7) + KL_P1_P2
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_det_measures_the_personal_model_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deputy with .2 where the personal model has .5 stays in the first stage."""
    network = SimpleNamespace(extras={det.PERSONAL: "personal"}, model="deputy")
    of = {"personal": 0.5, "deputy": 0.2}
    monkeypatch.setattr(
        det, "predict", lambda model, batches: (torch.full((1, 3), of[model]), None)
    )
    monkeypatch.setattr(
        det, "classification_metrics", lambda logits, labels: {"macro_f1": float(logits[0, 0])}
    )
    one = det.DETClient.__new__(det.DETClient)
    one.method, one.stage = fl.method("det"), 0
    one.context = SimpleNamespace(network=network, batches=lambda *a, **k: None)
    phases = [SimpleNamespace(epochs=3)]
    one.inner = SimpleNamespace(start_epoch=lambda epoch: None, phases=lambda: phases)
    found = []
    for epoch in range(3):
        one.start_epoch(epoch)
        found.append(one.stage)
    assert found == [det.RECOVER] * 3


def self_training(**known: Any) -> Any:
    one = SelfTrainingClient.__new__(SelfTrainingClient)
    one.labelled = False
    for name, value in known.items():
        setattr(one, name, value)
    return one


def test_fedst_learns_from_pixels_it_is_sure_of() -> None:
    """One believed pixel with a logit of 0 for a label of 1; the other one does not count."""
    one = self_training(
        label=torch.tensor([[[[1.0, 0.0]]]]), sure=torch.tensor([[[[True, False]]]])
    )
    found = one.loss(outputs(torch.tensor([[[[0.0, 5.0]]]])), FIRST)
    assert float(found) == pytest.approx(math.log(2), abs=1e-6)


def test_fedst_shows_images_with_another_gamma_between_0_and_2() -> None:
    """The middle of -1..1 goes to 2 (1/2)^gamma - 1; the ends stay."""
    seeing = SimpleNamespace(outputs=lambda images: Outputs(images, images, None))
    one = self_training(
        method=fl.method("fedst"), rng=torch.Generator().manual_seed(0),
        received=lambda images: images, context=SimpleNamespace(network=seeing),
    )  # fmt: skip
    gamma = 2 * float(torch.rand(1, generator=torch.Generator().manual_seed(0)))
    found = one.forward(torch.tensor([[[[-1.0, 0.0, 1.0]]]])).images.flatten().tolist()
    assert found == pytest.approx([-1.0, 2 * 0.5**gamma - 1, 1.0], abs=1e-6)


class Normed(nn.Module):
    """A network whose features are the images, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def outputs(self, images: Tensor) -> Outputs:
        return outputs(None, images)


def test_fednpr_averages_features_of_unit_length() -> None:
    """Of (10, 0) and (0, 1) the prototype is on the diagonal."""
    images = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    memory = Record()
    one = FedNPRClient.__new__(FedNPRClient)
    one.method, one.active = fl.method("fednpr", prototypes=1), True
    one.inner = SimpleNamespace(start=lambda: None)
    one.context = SimpleNamespace(
        network=Normed(), memory=memory, own_counts=torch.tensor([2.0]), config=QUICK, round=0,
        batches=lambda epoch, augmented: [(images, torch.zeros(2, dtype=torch.long))],
        generator=lambda purpose: torch.Generator().manual_seed(0),
    )  # fmt: skip
    one.start()
    found = memory.tensors["fednpr"]["prototypes"]
    torch.testing.assert_close(found, torch.full((1, 1, 2), 0.5**0.5))


def setting(net: nn.Module, method: str, config: fl.FederationConfig = QUICK) -> Setting:
    return Setting.of(net, fl.method(method), config, num_classes=3, image_shape=(1, 6, 6))


def test_fednpr_keeps_the_prototypes_of_absent_classes(tiny: Make, hospitals: Clients) -> None:
    of, store, found = setting(tiny(), "fednpr"), Store(), []
    clients = hospitals()
    absent = next(c for c in range(3) if not (clients[2].train.labels == c).any())
    rounds = Rounds(of, InProcess(of, clients, store), 3)
    rounds.begin()
    for _ in range(2):
        rounds.round(evaluate=False)
        found.append(store[2].tensors["fednpr"]["prototypes"])
    assert torch.equal(found[0][absent], found[1][absent])
    assert not torch.equal(found[0], found[1])


def test_fednpr_looks_at_features_without_counting_them(tiny: Make, hospitals: Clients) -> None:
    """One batch, one step: batch norm saw one batch, that of the step."""
    of = setting(tiny(), "fednpr", QUICK.replaced(batch_size=99))
    model = {name: of.initial[name] for name in of.names(down=True)}
    request = Request("train", 0, 0, Record({"model": model}, {"class_counts": [1.0, 1.0, 1.0]}))
    reply, _ = answer(of, hospitals()[0], request, None)
    assert int(reply.model["model.bn.num_batches_tracked"]) == 1


def test_a_client_that_was_away_gets_the_low_frequencies_of_now(tiny: Make) -> None:
    """With all frequencies low that is the server's model."""
    method = fl.method("pfa", mode="complex", first_share=1.0, last_share=1.0)
    of = Setting.of(tiny(), method, QUICK.replaced(rounds=5), num_classes=3, image_shape=(1, 6, 6))
    own = Store()
    server = Rounds(of, InProcess(of, [], Store()), 2, own=own).server
    server.round = 3
    moved = {n: t + 1 if t.is_floating_point() else t for n, t in server.model.items()}
    own.put(0, Record({"model": moved}), 0)
    for name, tensor in method.state_for(server, 0).items():
        torch.testing.assert_close(tensor, server.model[name], rtol=1e-5, atol=1e-5)


def test_weights_decay_and_biases_do_not() -> None:
    """A step of .1 with a decay of .5 and no gradient: 1 - .1 x .5."""
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    config = fl.FederationConfig(optimizer="sgd", lr=0.1, weight_decay=0.5)
    optimizer = _optimizer(dict(layer.named_parameters()), config, 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert layer.weight.unique().tolist() == pytest.approx([0.95])
    assert layer.bias.tolist() == [1.0, 1.0]
