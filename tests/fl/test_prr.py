"""DET's stages, CPA's prototypes, and PRR, which is both around PFA."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.client import answer
from fl.losses import LossConfig
from fl.method import Method
from fl.methods import cpa, det, fca, fednpr, prr
from fl.methods.cpa import common_prototypes
from fl.methods.det import DET, DETClient, both_losses, next_stage
from fl.record import Record, Reply, Request
from fl.setting import Setting
from fl.state import Route

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=3, lr=5e-3, batch_size=8, evaluate_every=100)
P, D = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
# KL(D || P) is the specification's; KL(P || D) = .7 log 1.4 + .2 log (2/3) + .1 log .5
D_TO_P, P_TO_D = 0.0920, 0.0851


def run(net: nn.Module, clients: list[fl.ClientData], method: str | Method, **more: Any) -> Any:
    config = QUICK.replaced(**more)
    return fl.run(net, method=method, clients=clients, num_classes=3, config=config)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize(
    ("stage", "deputy", "expected"),
    [
        (0, 0.10, 1), (0, 0.90, 1),
        (1, 0.34, 1), (1, 0.35, 2), (1, 0.90, 2),
        (2, 0.34, 1), (2, 0.40, 2), (2, 0.45, 3),
        (3, 0.34, 1), (3, 0.44, 2), (3, 0.45, 3),
    ],
)  # fmt: skip
def test_stages(stage: int, deputy: float, expected: int) -> None:
    """The truth table; the personal model has 0.5, so that 0.35 and 0.45 are the thresholds."""
    assert next_stage(stage, 0.5, deputy, 0.7, 0.9) == expected


@pytest.mark.parametrize(
    ("stage", "total", "personal_learns", "deputy_learns"),
    [(1, P_TO_D, False, True), (2, P_TO_D + D_TO_P, True, True), (3, D_TO_P, True, False)],
)
def test_who_teaches(stage: int, total: float, personal_learns: bool, deputy_learns: bool) -> None:
    personal, deputy = P.clone().requires_grad_(), D.clone().requires_grad_()
    found = both_losses(stage, personal, deputy)
    assert float(found.detach()) == pytest.approx(total, abs=1e-4)
    found.backward()
    assert (personal.grad is not None) is personal_learns
    assert (deputy.grad is not None) is deputy_learns


class Recorded(DET):
    stages: list[list[int]]

    class Recording(DETClient):
        def start(self) -> None:
            super().start()
            self.method.stages.append([])  # type: ignore[attr-defined]

        def end_epoch(self, epoch: int) -> None:
            super().end_epoch(epoch)
            self.method.stages[-1].append(self.stage)  # type: ignore[attr-defined]

    client_type = Recording


@pytest.mark.parametrize(("epochs", "expected"), [(1, [2]), (2, [1, 2]), (4, [1, 2, 3, 3])])
def test_each_round_begins_anew(
    epochs: int, expected: list[int], tiny: Make, hospitals: Clients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(det, "classification_metrics", lambda *_: {"macro_f1": 0.5})
    method = Recorded()
    method.stages = []
    run(tiny(), hospitals((6, 5, 4)), method, local_epochs=epochs, rounds=2)
    assert method.stages == [expected] * 2


@pytest.mark.parametrize("around", ["fedavg", "fca", "creff"])
def test_the_personal_model_stays(around: str, tiny: Make) -> None:
    setting = Setting.of(
        tiny(), fl.method("det", around=around), QUICK, num_classes=3, image_shape=(1, 6, 6)
    )
    personal = {r for n, r in setting.routes.items() if n.startswith("extras.det.")}
    assert personal == {Route.LOCAL}
    assert next(iter(setting.method.views("client"))) == "personal"
    assert "personal" not in setting.method.views("server") or around == "fca"


def sent(*clients: tuple[list[list[float]], list[float]]) -> list[dict[str, Tensor]]:
    return [{"prototypes": torch.tensor(p), "present": torch.tensor(h)} for p, h in clients]


def test_common_prototypes_are_the_means_of_those_who_have_the_class() -> None:
    each = sent(
        ([[1.0, 2.0], [4.0, 4.0], [0.0, 0.0]], [1.0, 1.0, 0.0]),
        ([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], [1.0, 0.0, 0.0]),
    )
    before = sent(([[9.0, 9.0], [9.0, 9.0], [7.0, 7.0]], [1.0, 1.0, 1.0]))[0]
    rng = torch.Generator().manual_seed(0)
    found = common_prototypes(each, {}, None, rng)
    torch.testing.assert_close(found["prototypes"], torch.tensor([[2.0, 3], [4, 4], [0, 0]]))
    assert found["present"].tolist() == [1, 1, 0]
    kept = common_prototypes(each, before, None, rng)
    assert kept["prototypes"][2].tolist() == [7, 7]
    assert kept["present"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("min_std", "expected"), [(0.0, 0.2), (1.0, 1.0)])
def test_the_gaussian_has_the_clients_deviation(min_std: float, expected: float) -> None:
    """Five clients at 3 + 0.2 N(0, 1), in many dimensions; the released code draws with 1."""
    rng = torch.Generator().manual_seed(0)
    each = [
        {"prototypes": 3 + 0.2 * torch.randn(1, 20000, generator=rng), "present": torch.ones(1)}
        for _ in range(5)
    ]
    mean = common_prototypes(each, {}, None, rng)["prototypes"]
    drawn = common_prototypes(each, {}, min_std, rng)["prototypes"]
    assert float((drawn - mean).std()) == pytest.approx(expected, rel=0.05)


def test_without_prototypes_cpa_is_fedavg_with_its_loss(tiny: Make, hospitals: Clients) -> None:
    clients, loss = hospitals(), fl.LossConfig(name="cpa")
    plain = run(tiny(), clients, "fedavg", loss=loss).state
    assert same(run(tiny(), clients, fl.method("cpa", warmup=1.0)).state, plain)
    # a round without prototypes, then two with
    assert same(
        run(tiny(), clients, fl.method("cpa", warmup=0.0), rounds=1).state,
        run(tiny(), clients, "fedavg", loss=loss, rounds=1).state,
    )
    assert not same(run(tiny(), clients, fl.method("cpa", warmup=0.0)).state, plain)


def test_prototypes_travel(tiny: Make, hospitals: Clients) -> None:
    """Each client sends 3 x 8 features and 3 flags beside what FedAvg sends."""
    plain = run(tiny(), hospitals(), "fedavg", rounds=1)
    with_them = run(tiny(), hospitals(), "cpa", rounds=1)
    assert with_them.bytes_up - plain.bytes_up == 3 * 27 * 4
    assert with_them.bytes_down == plain.bytes_down


def masks_and_answer(
    data: fl.ClientData, setting: Setting, kind: Any, record: Record
) -> tuple[Tensor, Reply]:
    """Return whether each pixel is inside of each class ``(N, L, H, W)``, and a client's reply."""
    assert data.train.masks is not None
    values = data.train.masks.take(torch.arange(len(data.train)))
    inside = values == torch.arange(1, setting.num_classes + 1).view(1, -1, 1, 1)
    return inside, answer(setting, data, Request(kind, 0, 0, record), None)[0]


def test_pixels_and_their_prototypes(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    """A client tells its pixels outside and inside, and their mean features, taken one by one."""
    method, data = fl.method("cpa"), hospitals_with_masks()[0]
    # one image is left over: it is counted too
    config = QUICK.replaced(batch_size=len(data.train) - 1)
    setting = Setting.of(tiny_maps(), method, config, num_classes=3, image_shape=(1, 6, 6))
    inside, reply = masks_and_answer(data, setting, "counts", Record())
    config = QUICK.replaced(lr=1e-12, batch_size=99)  # all at once: one batch normalisation
    setting = Setting.of(tiny_maps(), method, config, num_classes=3, image_shape=(1, 6, 6))
    pixels = torch.stack([(~inside).sum((0, 2, 3)), inside.sum((0, 2, 3))], dim=1)
    assert torch.equal(reply.record.tensors["cpa"]["pixels"], pixels.double())
    received = Record(
        {"model": setting.initial, "cpa": {"pixels": pixels.double()}}, {"class_counts": [1.0]}
    )
    _, reply = masks_and_answer(data, setting, "train", received)
    found = reply.record.tensors["cpa"]
    images = data.train.images.take(torch.arange(len(data.train)))
    outputs = setting.network.train().outputs(setting.normalization(images))
    features = outputs.known_features.detach().movedim(1, -1)
    for number in range(3):
        for side, chosen in enumerate((~inside[:, number], inside[:, number])):
            mean = features[chosen].mean(0)
            torch.testing.assert_close(found["prototypes"][2 * number + side], mean)
    assert found["present"].tolist() == [1.0] * 6


def test_masks_smaller_features_take_the_nearest() -> None:
    """Of 4 x 4 pixels the nearest for 2 x 2 features are those of even rows and columns."""
    targets = torch.zeros(1, 4, 4, dtype=torch.int64)
    targets[0, 0, 2], targets[0, 1, 1] = 1, 1
    share, features = cpa._of_pixels(targets, torch.arange(8.0).view(1, 2, 2, 2), 1)
    assert share.tolist() == [[1, 0], [0, 1], [1, 0], [1, 0]]
    assert features.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_prototypes_weigh_pixels(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    """From the second of twenty rounds on; without them it is another federation."""
    plain, with_them = (
        run(tiny_maps(), hospitals_with_masks(), fl.method("cpa", **hyper), rounds=20)
        for hyper in ({"warmup": 1.0}, {})
    )
    losses = [[r["train_loss"] for r in found.history] for found in (plain, with_them)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] < losses[1][1]  # a weight is 1 or more


def test_cpa_has_a_loss_of_its_own(refuses: Any, tiny: Make, hospitals: Clients) -> None:
    with refuses("cpa: the federation's loss must be cpa, got 'focal'"):
        run(tiny(), hospitals(), "cpa", loss=fl.LossConfig(name="focal"))


def test_prr_is_the_three_together(tiny: Make, hospitals: Clients) -> None:
    inside = {"around": "det", "inner": {"around": "pfa", "inner": {"mode": "complex"}}}
    by_hand = run(tiny(), hospitals(), fl.method("cpa", **inside, tau=2.0), local_epochs=2)
    method = fl.method("prr", pfa={"mode": "complex"}, cpa={"tau": 2.0})
    assert method.batch_norm == "local_all"
    found = run(tiny(), hospitals(), method, local_epochs=2)
    assert same(found.state, by_hand.state)
    assert found.specialization == by_hand.specialization


def test_prr_without_its_parts_is_pfa(tiny: Make, hospitals: Clients) -> None:
    plain = run(tiny(), hospitals(), "pfa")
    found = run(tiny(), hospitals(), fl.method("prr", det=None, cpa=None))
    assert same(found.state, plain.state)
    assert found.specialization == plain.specialization


def test_the_released_ways_run(tiny: Make, hospitals: Clients) -> None:
    code = {"exchange": "epoch", "reset": True, "min_std": 1.0, "warmup": 0.0}
    method = fl.method("prr", cpa=code, det={"augmented": True})
    found = run(tiny(), hospitals(), method, local_epochs=3)
    assert found.history[-1]["train_loss"] < found.history[0]["train_loss"]
    once = run(tiny(), hospitals(), fl.method("prr", cpa={"warmup": 0.0}), local_epochs=3)
    assert not same(found.state, once.state)


def test_the_papers_federations() -> None:
    rates = [prr.PAPER.lr_in(t) for t in (0, 4, 5, 49)]
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3, 1e-2 / 2**9])
    assert prr.PAPER_MASKS.lr_in(5) == pytest.approx(5e-4)
    for module in (fca, fednpr):
        rates = [module.PAPER.lr_in(t) for t in (59, 60, 70, 79)]
        assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    ("outer", "around", "inner"),
    [
        ("cpa", "cpa", {}),
        ("fednpr", "fednpr_per", {}),
        ("fednpr_per", "fednpr", {}),
        ("det", "cpa", {"around": "det"}),
        ("det", "prr", {}),
    ],
)
def test_nothing_is_wrapped_in_itself(
    outer: str, around: str, inner: dict[str, Any], refuses: Any
) -> None:
    with refuses(f"{outer}.around: must not have"):
        fl.method(outer, around=around, inner=inner)


def test_cpa_is_the_loss_wherever_it_is_around(refuses: Any) -> None:
    """Of FCA's two heads too, whose prior is everyone's in any case."""
    cpa = fl.method("cpa", around="fca", inner={"federated_prior": "global"})
    inner = cpa.inner.client(
        SimpleNamespace(loss=cpa.loss, criterion="cpa's", config=None, round=0, all_counts=None)
    )
    inner.start()
    assert inner.federated == "cpa's"
    inner.context.criterion = "cpa's, of another epoch"
    assert inner.federated == "cpa's, of another epoch"
    for own in ("fedlc", "fedrod"):
        with refuses("must be a method whose shared network has no loss of its own", f"got {own}"):
            fl.method("cpa", around=own)
        with refuses("must be a method whose shared network has no loss of its own", f"got {own}"):
            fl.method("cpa", around="det", inner={"around": own})
    federation = fl.FederationConfig(loss=LossConfig(name="cpa", beta=0))
    with refuses("cpa: loss.beta must be the method's, 0.8, got 0"):
        fl.method("cpa").check(federation)
    fl.method("cpa", beta=0).check(federation)
    fl.method("cpa", beta=0).check(fl.FederationConfig(loss=LossConfig(name="cpa")))
