"""Classifier anchoring: its consistency term by number, its heads and what travels."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fl
from fl.losses import LossConfig
from fl.methods.fca import HEAD, consistency
from fl.setting import Setting
from fl.state import Route

P1, P2 = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()


def test_consistency() -> None:
    assert float(consistency(P1, P2, "kl")) == pytest.approx(0.0920, abs=5e-5)
    assert float(consistency(P1, P2, "code")) == pytest.approx(-0.4866, abs=5e-5)


def test_code_maximises_the_product() -> None:
    """The gradient with respect to p1 is -p2 / (N C), as that of -<p1, p2> / (N C)."""
    z = P1.repeat(2, 1).requires_grad_()
    anchor = P2.repeat(2, 1)
    (found,) = torch.autograd.grad(consistency(z, anchor, "code"), z)
    (expected,) = torch.autograd.grad(-(z.softmax(1) * anchor.softmax(1)).sum() / 6, z)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["kl", "code"])
def test_the_personal_head_anchors(kind: str) -> None:
    z, anchor = P1.clone().requires_grad_(), P2.clone().requires_grad_()
    consistency(z, anchor, kind).backward()  # type: ignore[arg-type]
    assert z.grad is not None
    assert anchor.grad is None


def test_heads(tiny: Callable[..., nn.Module]) -> None:
    config = fl.FederationConfig()
    setting = Setting.of(tiny(), fl.method("fca"), config, num_classes=3, image_shape=(1, 6, 6))
    assert setting.routes[f"extras.{HEAD}.weight"] is Route.UPLOAD
    assert setting.routes["model.head.weight"] is Route.SHARE
    head = setting.network.extras[HEAD]
    assert head.weight.shape == (3, 8)
    assert not torch.equal(head.weight, setting.network.head.weight)
    assert setting.loss.name == "balanced_softmax"


def test_personal_heads_differ_and_are_reported(
    tiny: Callable[..., nn.Module], hospitals: Callable[..., list[fl.ClientData]]
) -> None:
    config = fl.FederationConfig(rounds=1, batch_size=8)
    found = fl.run(tiny(), method="fca", clients=hospitals(), num_classes=3, config=config)
    assert found.generalization is not None
    assert found.specialization is not None
    assert list(found.generalization["views"]) == ["federated", "personal"]
    assert list(found.specialization["views"]) == ["personal", "federated"]
    # one head more goes up than comes down: 3 x 8 weights and 3 biases of 4 bytes, 3 clients
    assert found.bytes_up - found.bytes_down == 27 * 4 * 3


def test_the_federated_head_keeps_the_methods_loss_with_everyones_prior() -> None:
    """Balanced softmax: z + log n = (6.605, 2.803, -1), and 6.627 - 2.803 = 3.825."""
    context = SimpleNamespace(
        config=fl.FederationConfig(rounds=1), round=0, criterion=None,
        loss=LossConfig(name="balanced_softmax"), all_counts=torch.tensor([100.0, 10.0, 1.0]),
    )  # fmt: skip
    client = fl.method("fca", federated_prior="global").client(context)  # type: ignore[arg-type]
    client.start()
    z, label = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([1])
    assert float(client.federated(z, label)) == pytest.approx(3.8251, abs=5e-5)
