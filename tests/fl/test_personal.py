"""Methods with something of a client's own: it is its own, and what is shared is FedAvg's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.method import Method
from fl.methods.fedrep import FedRep, FedRepClient, FedRepConfig
from fl.methods.moon import contrast
from fl.record import Tensors
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.data import ArrayImages, ImageSet

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)


def run(net: nn.Module, clients: list[fl.ClientData], method: str | Method, **more: Any) -> Any:
    config = QUICK.replaced(**more)
    return fl.run(net, method=method, clients=clients, num_classes=3, config=config)


def kept(net: nn.Module, clients: list[fl.ClientData], method: Method) -> list[Tensors]:
    """Return what each client keeps of the network after two rounds."""
    setting = Setting.of(net, method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, clients, store), len(clients))
    rounds.begin()
    for _ in range(2):
        rounds.round(evaluate=False)
    return [store[k].model for k in range(len(clients))]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize(
    ("method", "loss"),
    [("ditto", "ce"), ("apfl", "ce"), ("fedrod", "balanced_softmax")],
)
def test_the_shared_model_is_fedavgs(
    method: str, loss: Any, tiny: Make, hospitals: Clients
) -> None:
    """What is a client's own gives no gradient to what is shared."""
    found = run(tiny(), hospitals(), method)
    plain = run(tiny(), hospitals(), "fedavg", loss=fl.LossConfig(name=loss))
    assert same(found.state, plain.state)
    assert found.generalization == plain.generalization or method == "fedrod"
    assert next(iter(found.specialization["views"])) == "personal"


def test_ditto_without_its_term_is_local_training(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    alone = kept(tiny(), clients, fl.method("local"))
    own = kept(tiny(), clients, fl.method("ditto", weight=0.0))
    near = kept(tiny(), clients, fl.method("ditto", weight=10.0))
    for k in range(3):
        for name, tensor in alone[k].items():
            assert torch.equal(own[k][name.replace("model.", "extras.personal.", 1)], tensor)
    name = "hidden.weight"
    assert not torch.equal(near[0][f"extras.personal.{name}"], alone[0][f"model.{name}"])


def test_apfl_with_nothing_shared_is_local_training(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    alone = kept(tiny(), clients, fl.method("local"))
    own = kept(tiny(), clients, fl.method("apfl", alpha=1.0, alpha_lr=0.0))
    # not the convolution's bias: before a batch norm its gradient is rounding, which Adam enlarges
    for name in ("conv.weight", "bn.running_var", "hidden.weight", "head.bias"):
        found = own[0][f"extras.personal.model.{name}"]
        torch.testing.assert_close(found, alone[0][f"model.{name}"], rtol=1e-4, atol=1e-5)


class Watched(FedRep):
    """Notes which parts an epoch has moved."""

    moved: list[tuple[bool, bool]]

    class Watching(FedRepClient):
        def _now(self) -> tuple[Tensor, Tensor]:
            model = self.context.network.model
            return model.head.weight.detach().clone(), model.hidden.weight.detach().clone()

        def start_epoch(self, epoch: int) -> None:
            self.before = self._now()

        def end_epoch(self, epoch: int) -> None:
            head, body = (
                not torch.equal(a, b) for a, b in zip(self.before, self._now(), strict=True)
            )
            self.method.moved.append((head, body))  # type: ignore[attr-defined]

    client_type = Watching


def test_fedrep_trains_the_head_first(tiny: Make, hospitals: Clients) -> None:
    method = Watched(FedRepConfig(head_epochs=2))
    method.moved = []
    run(tiny(), hospitals((6, 5, 4)), method, rounds=1)
    assert method.moved == [(True, False), (True, False), (False, True)]


def test_fedbn_needs_batch_norm(refuses: Any, tiny: Make, hospitals: Clients) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(x.flatten(1))
            return found

    with refuses("fedbn: the network must have batch normalisation"):
        run(Plain(), hospitals(), "fedbn")
    with refuses("fedbn: batch_norm must be local_all, got 'share_all'"):
        run(tiny(), hospitals(), "fedbn", batch_norm="share_all")
    found = run(tiny(), hospitals(), "fedbn")
    assert same(found.state, run(tiny(), hospitals(), "fedavg", batch_norm="local_all").state)


def test_contrast_by_hand() -> None:
    """Cosines of 1 and 0 at temperature 1/2: log(1 + e^-2); of 0 and 1: log(1 + e^2)."""
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert float(contrast(x, x, y, 0.5)) == pytest.approx(0.126928, abs=1e-6)
    assert float(contrast(x, y, x, 0.5)) == pytest.approx(2.126928, abs=1e-6)


def test_moon_begins_as_fedavg(tiny: Make, hospitals: Clients) -> None:
    plain = run(tiny(), hospitals(), "fedavg").state
    assert same(run(tiny(), hospitals(), fl.method("moon", mu=0.0)).state, plain)
    assert not same(run(tiny(), hospitals(), "moon").state, plain)
    # no client has a model of its own before the second round
    first = run(tiny(), hospitals(), "moon", rounds=1)
    assert same(first.state, run(tiny(), hospitals(), "fedavg", rounds=1).state)


@pytest.mark.parametrize("method", ["fedavgm", "fedadam", "fednova"])
def test_statistics_are_the_clients_mean(method: str, tiny: Make, hospitals: Clients) -> None:
    """A server's step moves weights; a variance with momentum would become negative."""
    plain = run(tiny(), hospitals(), "fedavg", rounds=1).state
    found = run(tiny(), hospitals(), method, rounds=1).state
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(found[name], plain[name])
    many = run(tiny(), hospitals(), method, rounds=6).state
    assert float(many["bn.running_var"].min()) > 0


@pytest.mark.parametrize("method", ["fedavgm", "fedadam", "fednova"])
def test_what_is_averaged_in_logarithms_stays_positive(
    method: str, tiny: Make, hospitals: Clients
) -> None:
    pattern = ("model.bn.weight",)
    plain = run(tiny(), hospitals(), "fedavg", rounds=1, geometric=pattern).state
    found = run(tiny(), hospitals(), method, rounds=1, geometric=pattern).state
    assert torch.equal(found["bn.weight"], plain["bn.weight"])
    if method == "fedadam":
        assert not torch.equal(found["bn.bias"], plain["bn.bias"])


def test_centralized_is_one_client_with_everything(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    pixels = [c.train.images.take(torch.arange(len(c.train))) for c in clients]
    everything = ImageSet(
        ArrayImages(torch.cat(pixels)), torch.cat([c.train.labels for c in clients])
    )
    found = run(tiny(), clients, "centralized")
    one = fl.ClientData("all", everything, clients[0].val, clients[0].test)
    expected = run(tiny(), [one], "fedavg")
    assert same(found.state, expected.state)
    # each hospital's own test images; those of the first are all that the other run has
    assert list(found.specialization["clients"]) == ["0", "1", "2"]
    assert found.specialization["clients"]["0"] == expected.specialization["clients"]["0"]
    assert found.generalization["num_examples"] == 3 * 9
