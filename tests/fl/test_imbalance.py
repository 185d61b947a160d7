"""Methods against class imbalance: their losses, draws and server steps by number."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fl
from fl.method import Method
from fl.methods.balancefl import inheritance
from fl.methods.climb import CLIMB
from fl.methods.creff import CReFFConfig, head_gradients, matched, retrained
from fl.methods.fedlc import calibrated
from sdq.batches import balanced_indices

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)


def run(net: nn.Module, clients: list[fl.ClientData], method: str | Method, **more: Any) -> Any:
    config = QUICK.replaced(**more)
    return fl.run(net, method=method, clients=clients, num_classes=3, config=config)


@pytest.mark.parametrize(("label", "expected"), [(0, 0.126928), (1, 2.126928)])
def test_fedlc_by_hand(label: int, expected: float) -> None:
    """16 and 1 images: margins 1/2 and 1, logits 1.5 and -.5; the absent class takes nothing."""
    z, counts = torch.tensor([[2.0, 0.5, 9.0]]), torch.tensor([16.0, 1.0, 0.0])
    found = calibrated(z, torch.tensor([label]), counts, 1.0)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_fedlc_keeps_the_label_in_the_denominator() -> None:
    """It is bounded below; without the label's own term it would fall without end."""
    z, counts = torch.tensor([[50.0, -50.0]]), torch.tensor([16.0, 1.0])
    assert float(calibrated(z, torch.tensor([0]), counts, 1.0)) >= 0


def test_fedlc_is_a_loss(refuses: Any, tiny: Make, hospitals: Clients) -> None:
    with refuses("fedlc: it is a loss of its own, got 'focal'"):
        run(tiny(), hospitals(), "fedlc", loss=fl.LossConfig(name="focal"))


def test_balanced_draws() -> None:
    labels = torch.tensor([0] * 90 + [2] * 9 + [3])
    found = labels[balanced_indices(labels, 30000, torch.Generator().manual_seed(0))]
    share = found.bincount(minlength=4) / 30000
    # the standard deviation of a share is .0027
    torch.testing.assert_close(share, torch.tensor([1, 0, 1, 1]) / 3, atol=0.01, rtol=0)


def test_any_method_with_balanced_draws(tiny: Make, hospitals: Clients) -> None:
    """With every class at every client BalanceFL inherits nothing: it is FedAvg drawing so."""
    clients = hospitals((12, 5, 4), (3, 10, 6))
    found = run(tiny(), clients, "fedavg", sampling="balanced")
    balanced, plain = (run(tiny(), clients, name) for name in ("balancefl", "fedavg"))
    assert all(torch.equal(t, balanced.state[n]) for n, t in found.state.items())
    assert not all(torch.equal(t, plain.state[n]) for n, t in found.state.items())


def test_inheritance_by_hand() -> None:
    """The received model gives the absent class 1/2, the student 1/3: .5 log(1.5) + .5 log(.75)."""
    student = torch.zeros(1, 3, requires_grad=True)
    received, absent = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([True, False, False])
    found = inheritance(student, received, absent, 1.0)
    assert float(found.detach()) == pytest.approx(0.5 * math.log(1.125))
    found.backward()
    assert student.grad is not None
    assert float(student.grad[0, 0]) == pytest.approx(1 / 3 - 1 / 2)
    # the present classes keep their ratio
    assert float(student.grad[0, 1] - student.grad[0, 2]) == pytest.approx(0, abs=1e-7)
    assert float(inheritance(received, received, absent, 2.0)) == pytest.approx(0, abs=1e-7)


def test_balancefl_keeps_what_is_said_of_absent_classes(tiny: Make, hospitals: Clients) -> None:
    """After long training on two classes, the third is still predicted of its images."""
    start = tiny()
    state = run(start, hospitals((20, 20, 20)), "fedavg", rounds=12).state
    start.load_state_dict(state)
    recall = {}
    for weight in (0.0, 20.0):
        method = fl.method("balancefl", weight=weight)
        found = run(start, hospitals((20, 20, 0)), method, rounds=3, local_epochs=5)
        recall[weight] = found.generalization["per_class_recall"][2]
    plain = run(start, hospitals((20, 20, 0)), "fedavg", rounds=3, local_epochs=5)
    assert recall[20.0] > plain.generalization["per_class_recall"][2]


def test_climb_weighs_by_excess() -> None:
    """Multipliers .32 and 0 weigh 1.16 and .84; none is negative when others are large."""

    class Known:
        class memory:
            tensors = {"climb": {"multipliers": torch.tensor([0.32, 0.0, 9.0, 0.0, 0.0])}}  # noqa: RUF012

    class Said:
        def __init__(self, client: int) -> None:
            self.client = client

    two = CLIMB().weights(Known, [Said(0), Said(1)])  # type: ignore[arg-type, list-item]
    assert two == pytest.approx([1.16, 0.84])
    four = CLIMB().weights(Known, [Said(k) for k in (1, 2, 3, 4)])  # type: ignore[arg-type, misc]
    assert four == pytest.approx([0, 7.75, 0, 0])


@pytest.mark.parametrize(
    ("weighting", "expected"), [("examples", [11.6, 25.2]), ("uniform", [1.16, 0.84])]
)
def test_climb_weighs_images_unless_told_otherwise(weighting: str, expected: list[float]) -> None:
    known = {"climb": {"multipliers": torch.tensor([0.32, 0.0])}}
    server = SimpleNamespace(memory=SimpleNamespace(tensors=known))
    said = [SimpleNamespace(client=k, num_examples=n) for k, n in ((0, 10), (1, 30))]
    method = fl.method("climb", weighting=weighting)
    assert method.weights(server, said) == pytest.approx(expected)


def blobs() -> tuple[Tensor, Tensor, Tensor]:
    """Return features ``(3, 40, 8)`` of three classes, and a head that favours the first."""
    rng = torch.Generator().manual_seed(0)
    features = 0.3 * torch.randn(3, 40, 8, generator=rng) + 2 * torch.eye(3, 8)[:, None]
    return features, 0.1 * torch.randn(3, 8, generator=rng), torch.tensor([2.0, 0.0, 0.0])


def test_creff_gradients_are_autograds() -> None:
    features, weight, bias = blobs()
    w, b = weight.requires_grad_(), bias.requires_grad_()
    found = head_gradients(features, weight, bias)
    for c in range(3):
        loss = F.cross_entropy(features[c] @ w.T + b, torch.full((40,), c))
        gw, gb = torch.autograd.grad(loss, [w, b])
        torch.testing.assert_close(found[c], torch.cat([gw, gb[:, None]], dim=1))


def test_creff_features_find_the_gradients_and_mend_the_head() -> None:
    features, weight, bias = blobs()
    rng = torch.Generator().manual_seed(1)
    config = CReFFConfig()
    present = torch.tensor([True] * 3)
    gradients = head_gradients(features, weight, bias)
    drawn = torch.randn(3, 20, 8, generator=rng)

    def away(of: Tensor) -> float:
        alike = F.cosine_similarity(head_gradients(of, weight, bias), gradients, dim=2)
        return float((1 - alike).sum())

    moved = matched(drawn, gradients, present, weight, bias, config)
    assert away(moved) < 0.1 * away(drawn)
    w, b = retrained(moved, present, weight, bias, config)
    labels = torch.arange(3)[:, None].expand(3, 40)

    def right(w: Tensor, b: Tensor) -> float:
        return float(((features @ w.T + b).argmax(2) == labels).float().mean())

    assert right(weight, bias) < 0.7
    assert right(w, b) > 0.95


def test_creff_leaves_absent_classes() -> None:
    features, weight, bias = blobs()
    present = torch.tensor([True, False, True])
    moved = matched(
        features, torch.zeros(3, 3, 9), present, weight, bias, CReFFConfig(match_steps=3)
    )
    assert torch.equal(moved[1], features[1])


def test_creffs_network_is_fedavgs(tiny: Make, hospitals: Clients) -> None:
    found = run(tiny(), hospitals(), "creff")
    plain = run(tiny(), hospitals(), "fedavg")
    assert all(torch.equal(t, plain.state[n]) for n, t in found.state.items())
    assert list(found.generalization["views"]) == ["retrained", "model"]
    assert found.generalization["views"]["model"] == plain.generalization["views"]["model"]
