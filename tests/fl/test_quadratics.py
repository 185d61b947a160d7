"""Two clients with one number to learn: every step worked by hand.

Client A minimises ``w^2 / 2``, client B ``3 (w - 4)^2 / 2``; their sum is least at 3. Two steps of
0.1 a round, from w = 1.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.method import Client, Method
from fl.methods.fedavg import FedAvg
from fl.methods.fedprox import FedProx, FedProxClient, FedProxConfig
from fl.methods.scaffold import Scaffold, ScaffoldClient, ScaffoldConfig
from fl.network import Outputs
from sdq.data import ArrayImages, ImageSet

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


class FedAvgOnNumbers(FedAvg):
    client_type = PlainQuadratic


class ScaffoldOnNumbers(Scaffold):
    client_type = ScaffoldQuadratic


class FedProxOnNumbers(FedProx):
    client_type = ProxQuadratic


@pytest.fixture
def after() -> Callable[[Method, int], float]:
    """Return a function that gives w after some rounds."""

    def go(method: Method, rounds: int) -> float:
        image = ImageSet(ArrayImages(torch.zeros(1, 1, 1, 2, dtype=torch.uint8)), torch.tensor([0]))
        config = fl.FederationConfig(
            rounds=rounds, local_epochs=2, optimizer="sgd", lr=0.1, evaluate_every=rounds
        )
        found = fl.run(
            Number(), method=method, num_classes=2, config=config,
            clients=[fl.ClientData(n, image) for n in "AB"],
        )  # fmt: skip
        return float(found.state["w"])

    return go


def test_fedavg(after: Callable[[Method, int], float]) -> None:
    assert after(FedAvgOnNumbers(), 1) == pytest.approx((0.81 + 2.53) / 2)
    # A: w -> .81 w; B: w -> .49 w + 2.04: their mean stays where it is at 2.04 / .7
    assert after(FedAvgOnNumbers(), 60) == pytest.approx(2.04 / 0.7, abs=1e-6)


def test_scaffold(after: Callable[[Method, int], float]) -> None:
    # round 1 is FedAvg's; then c_A = .95, c_B = -7.65, c = -3.35
    assert after(ScaffoldOnNumbers(), 1) == pytest.approx(1.67)
    assert after(ScaffoldOnNumbers(), 2) == pytest.approx((2.1697 + 2.1273) / 2)
    # round 3 from 2.1485 with c_A = 1.8015, c_B = -6.5865, c = -2.3925:
    # A: 2.1485 -> 2.35305 -> 2.537145; B: 2.1485 -> 2.28455 -> 2.379785 (corrections -+4.194)
    assert after(ScaffoldOnNumbers(), 3) == pytest.approx((2.537145 + 2.379785) / 2)
    assert after(ScaffoldOnNumbers(), 80) == pytest.approx(3.0, abs=1e-6)


def test_scaffold_with_the_gradient_as_control(after: Callable[[Method, int], float]) -> None:
    """c_A = 1, c_B = -9, c = -4 after round 1; then corrections of -5 and 5."""
    method = ScaffoldOnNumbers(ScaffoldConfig(control="gradient"))
    assert after(method, 1) == pytest.approx(1.67)
    # A: 1.67 -> 2.003 -> 2.3027; B: 1.67 -> 1.869 -> 2.0083
    assert after(method, 2) == pytest.approx((2.3027 + 2.0083) / 2)


def test_fedprox(after: Callable[[Method, int], float]) -> None:
    assert after(FedProxOnNumbers(FedProxConfig(mu=1.0)), 1) == pytest.approx((0.82 + 2.44) / 2)
    assert after(FedProxOnNumbers(FedProxConfig(mu=0.0)), 7) == after(FedAvgOnNumbers(), 7)
