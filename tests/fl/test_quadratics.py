"""Two clients with one number to learn: every step worked by hand.

What the network says of the one image is minus the number, so that a loss can be of logits.

Client A minimises ``w^2 / 2``, client B ``3 (w - 4)^2 / 2``; their sum is least at 3. Two steps of
0.1 a round, from w = 1.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.method import Client, ClientContext, Method
from fl.methods.apfl import APFL, APFLClient, APFLConfig
from fl.methods.climb import CLIMB, CLIMBClient
from fl.methods.ditto import Ditto, DittoClient, DittoConfig
from fl.methods.fedadam import FedAdam
from fl.methods.fedavg import FedAvg
from fl.methods.fedavgm import FedAvgM, FedAvgMConfig
from fl.methods.fednova import FedNova, FedNovaClient, accumulated
from fl.methods.fedprox import FedProx, FedProxClient, FedProxConfig
from fl.methods.scaffold import Scaffold, ScaffoldClient, ScaffoldConfig
from fl.network import Outputs
from fl.record import Failure, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError

A, B = (1.0, 3.0), (0.0, 4.0)


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * self.w


def quadratic(client: Client) -> Tensor:
    k, w = client.context.client, client.context.network.model.w
    return A[k] / 2 * (w - B[k]) ** 2


class PlainQuadratic(Client):
    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return quadratic(self)


class ScaffoldQuadratic(ScaffoldClient):
    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return quadratic(self)


class ProxQuadratic(FedProxClient):
    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        self.context.criterion = lambda z, y: quadratic(self)
        return super().loss(outputs, labels)


def of_logits(context: ClientContext) -> None:
    """Put the quadratic in the context as a loss of logits."""
    a, b = A[context.client], B[context.client]
    context.criterion = lambda z, y: a / 2 * (-z[0, 0] - b) ** 2


class NovaQuadratic(FedNovaClient):
    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        return quadratic(self)


class ClimbQuadratic(CLIMBClient):
    def start(self) -> None:
        of_logits(self.context)
        super().start()


class DittoQuadratic(DittoClient):
    def start(self) -> None:
        of_logits(self.context)
        super().start()


class APFLQuadratic(APFLClient):
    def start(self) -> None:
        of_logits(self.context)


class FedAvgMOnNumbers(FedAvgM):
    client_type = PlainQuadratic


class FedAdamOnNumbers(FedAdam):
    client_type = PlainQuadratic


class FedNovaOnNumbers(FedNova):
    client_type = NovaQuadratic


class CLIMBOnNumbers(CLIMB):
    client_type = ClimbQuadratic


class DittoOnNumbers(Ditto):
    client_type = DittoQuadratic


class APFLOnNumbers(APFL):
    client_type = APFLQuadratic


class FedAvgOnNumbers(FedAvg):
    client_type = PlainQuadratic


class ScaffoldOnNumbers(Scaffold):
    client_type = ScaffoldQuadratic


class FedProxOnNumbers(FedProx):
    client_type = ProxQuadratic


After = Callable[..., float]


def clients(*images: int) -> list[fl.ClientData]:
    """Return A and B with so many images each, of which one is a step."""
    found = []
    for name, count in zip("AB", images, strict=True):
        pixels = torch.zeros(count, 1, 1, 2, dtype=torch.uint8)
        labels = torch.zeros(count, dtype=torch.int64)
        found.append(fl.ClientData(name, ImageSet(ArrayImages(pixels), labels)))
    return found


CONFIG = fl.FederationConfig(local_epochs=2, optimizer="sgd", lr=0.1, batch_size=1)


@pytest.fixture
def after() -> After:
    """Return a function that gives w after some rounds."""

    def go(method: Method, rounds: int, images: tuple[int, int] = (1, 1)) -> float:
        config = CONFIG.replaced(rounds=rounds, evaluate_every=rounds)
        found = fl.run(
            Number(), method=method, num_classes=2, config=config, clients=clients(*images)
        )
        return float(found.state["w"])

    return go


def kept(method: Method) -> list[dict[str, Tensor]]:
    """Return what A and B keep of the network after one round."""
    setting = Setting.of(Number(), method, CONFIG, num_classes=2, image_shape=(1, 1, 2))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, clients(1, 1), store), 2)
    rounds.begin()
    rounds.round(evaluate=False)
    return [store[k].model for k in range(2)]


def test_fedavg(after: After) -> None:
    assert after(FedAvgOnNumbers(), 1) == pytest.approx((0.81 + 2.53) / 2)
    # A: w -> .81 w; B: w -> .49 w + 2.04: their mean stays where it is at 2.04 / .7
    assert after(FedAvgOnNumbers(), 60) == pytest.approx(2.04 / 0.7, abs=1e-6)


def test_scaffold(after: After) -> None:
    # round 1 is FedAvg's; then c_A = .95, c_B = -7.65, c = -3.35
    assert after(ScaffoldOnNumbers(), 1) == pytest.approx(1.67)
    assert after(ScaffoldOnNumbers(), 2) == pytest.approx((2.1697 + 2.1273) / 2)
    # round 3 from 2.1485 with c_A = 1.8015, c_B = -6.5865, c = -2.3925:
    # A: 2.1485 -> 2.35305 -> 2.537145; B: 2.1485 -> 2.28455 -> 2.379785 (corrections -+4.194)
    assert after(ScaffoldOnNumbers(), 3) == pytest.approx((2.537145 + 2.379785) / 2)
    assert after(ScaffoldOnNumbers(), 80) == pytest.approx(3.0, abs=1e-6)


def test_scaffold_with_the_gradient_as_control(after: After) -> None:
    """c_A = 1, c_B = -9, c = -4 after round 1; then corrections of -5 and 5."""
    method = ScaffoldOnNumbers(ScaffoldConfig(control="gradient"))
    assert after(method, 1) == pytest.approx(1.67)
    # A: 1.67 -> 2.003 -> 2.3027; B: 1.67 -> 1.869 -> 2.0083
    assert after(method, 2) == pytest.approx((2.3027 + 2.0083) / 2)


class Losing(InProcess):
    """The network between: B's third reply is lost after B has trained."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            for answer in super().ask([request]):
                lost = (request.kind, request.round, request.client) == ("train", 2, 1)
                yield Failure(request.client, "lost") if lost else answer


@pytest.mark.parametrize("control", ["steps", "gradient"])
def test_scaffold_after_a_lost_reply(control: Any) -> None:
    """Without knowing that it is lost, B would correct by what the server does not have: 3.31."""
    method = ScaffoldOnNumbers(ScaffoldConfig(control=control))
    setting = Setting.of(Number(), method, CONFIG, num_classes=2, image_shape=(1, 1, 2))
    store = Store()
    rounds = Rounds(setting, Losing(setting, clients(1, 1), store), 2)
    rounds.begin()
    for _ in range(120):
        rounds.round(evaluate=False)
    assert float(rounds.server.model["model.w"]) == pytest.approx(3.0, abs=1e-6)
    common = float(rounds.server.memory.tensors["scaffold"]["model.w"])
    own = [float(store[k].tensors["scaffold.pending"]["model.w"]) for k in range(2)]
    assert common == pytest.approx(sum(own) / 2, abs=1e-9)


def test_scaffold_goes_on_without_knowing_what_was_taken(after: After) -> None:
    """As a state of before has it: what clients kept then is what the server has."""
    method = ScaffoldOnNumbers()
    setting = Setting.of(Number(), method, CONFIG, num_classes=2, image_shape=(1, 1, 2))
    store = Store()
    rounds = Rounds(setting, InProcess(setting, clients(1, 1), store), 2)
    rounds.begin()
    rounds.round(evaluate=False)
    rounds.server.memory.values.clear()
    for client in range(2):
        kept = store[client].copy()
        kept.tensors["scaffold"] = kept.tensors.pop("scaffold.pending")
        kept.values.pop("scaffold_round")
        store.put(client, kept, 0)
    rounds.round(evaluate=False)
    rounds.round(evaluate=False)
    assert float(rounds.server.model["model.w"]) == pytest.approx(after(ScaffoldOnNumbers(), 3))


def test_scaffold_trains_what_is_not_frozen() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.Linear(3, 2))
    net[1].requires_grad_(False)
    config = CONFIG.replaced(rounds=2)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = fl.run(net, method=Scaffold(), num_classes=2, config=config, clients=clients(2, 2))
    assert not found.history[-1]["failures"]
    changed = {n for n, t in found.state.items() if not torch.equal(t, before[n])}
    assert changed == {"2.weight", "2.bias"}


def test_fednova_counts_from_the_start_of_a_round() -> None:
    config = CONFIG.replaced(momentum=0.9, keep_optimizer=True)
    with pytest.raises(RequestError, match="fednova: keep_optimizer must be off with momentum"):
        fl.run(Number(), method=FedNova(), num_classes=2, config=config, clients=clients(1, 1))


def test_fedprox(after: After) -> None:
    assert after(FedProxOnNumbers(FedProxConfig(mu=1.0)), 1) == pytest.approx((0.82 + 2.44) / 2)
    assert after(FedProxOnNumbers(FedProxConfig(mu=0.0)), 7) == after(FedAvgOnNumbers(), 7)


def test_fednova(after: After) -> None:
    """B has two images: four steps, 1 -> 1.9 -> 2.53 -> 2.971 -> 3.2797, and two thirds.

    The step is (2/3 + 8/3) ((1/3) (-.19 / 2) + (2/3) (2.2797 / 4)); FedAvg's would be
    (1/3) (-.19) + (2/3) 2.2797.
    """
    assert after(FedNovaOnNumbers(), 1, (1, 2)) == pytest.approx(1 + 10 / 3 * 0.34828333, abs=1e-7)
    assert after(FedAvgOnNumbers(), 1, (1, 2)) == pytest.approx(1 + (-0.19 + 2 * 2.2797) / 3)
    # with equal steps it is FedAvg
    assert after(FedNovaOnNumbers(), 5) == pytest.approx(after(FedAvgOnNumbers(), 5), abs=1e-12)


def test_what_momentum_accumulates() -> None:
    """The weights of gradients in the sum of all steps, by running it."""
    for steps in (1, 2, 7):
        velocity = [0.0] * steps
        total = [0.0] * steps
        for step in range(steps):
            velocity = [0.9 * v for v in velocity]
            velocity[step] += 1
            total = [t + v for t, v in zip(total, velocity, strict=True)]
        assert accumulated(steps, 0.9) == pytest.approx(sum(total))


def test_fedavgm(after: After) -> None:
    """Changes of .67, then, from 1.67, of .4355: velocities .67 and .9 x .67 + .4355."""
    assert after(FedAvgMOnNumbers(), 1) == pytest.approx(1.67)
    assert after(FedAvgMOnNumbers(), 2) == pytest.approx(1.67 + 1.0385)
    slow = FedAvgMOnNumbers(FedAvgMConfig(server_lr=0.5))
    assert after(slow, 1) == pytest.approx(1.335)
    none = FedAvgMOnNumbers(FedAvgMConfig(momentum=0.0))
    assert after(none, 7) == pytest.approx(after(FedAvgOnNumbers(), 7), abs=1e-12)


def test_fedadam(after: After) -> None:
    """m = .067; v = .99e-6 + .01 x .67^2 = .00448999."""
    expected = 1 + 0.01 * 0.067 / (0.00448999**0.5 + 0.001)
    assert after(FedAdamOnNumbers(), 1) == pytest.approx(expected, abs=1e-12)
    # FedAvg goes from w to .65 w + 1.02
    change = 1.02 - 0.35 * expected
    first, second = 0.9 * 0.067 + 0.1 * change, 0.99 * 0.00448999 + 0.01 * change**2
    expected += 0.01 * first / (second**0.5 + 0.001)
    assert after(FedAdamOnNumbers(), 2) == pytest.approx(expected, abs=1e-12)


def test_climb(after: After) -> None:
    """Losses of .5 and 13.5 at 1: multipliers 0 and .1 (6.5 - .1) / 2 = .32, weights .84, 1.16."""
    assert after(CLIMBOnNumbers(), 1) == pytest.approx(1.67)
    expected = (0.84 * 0.81 * 1.67 + 1.16 * (0.49 * 1.67 + 2.04)) / 2
    assert after(CLIMBOnNumbers(), 2) == pytest.approx(expected)


def test_ditto() -> None:
    """B, with lambda 1: 1 -> 1.9, and then .63 from the loss, -.09 from the term."""
    _, b = kept(DittoOnNumbers(DittoConfig(weight=1.0)))
    assert float(b["extras.personal.w"]) == pytest.approx(2.44)


def test_apfl() -> None:
    """B's two steps; v goes with half of the mixture's gradient.

    1: v = w = 1, gradient -9: alpha stays, v = 1.45, w = 1.9.
    2: mixture 1.675, gradient -6.975: alpha = .5 - .1 (1.45 - 1.9) (-6.975), v = 1.79875.
    """
    _, b = kept(APFLOnNumbers(APFLConfig(alpha=0.5)))
    assert float(b["extras.personal.alpha"]) == pytest.approx(0.186125)
    assert float(b["extras.personal.model.w"]) == pytest.approx(1.79875)


def test_apfl_keeps_alpha_between_0_and_1() -> None:
    a, b = kept(APFLOnNumbers(APFLConfig(alpha=0.5, alpha_lr=100.0)))
    assert {float(k["extras.personal.alpha"]) for k in (a, b)} == {0.0}
    a, b = kept(APFLOnNumbers(APFLConfig(alpha=0.3, alpha_lr=0.0)))
    assert float(b["extras.personal.alpha"]) == pytest.approx(0.3)
