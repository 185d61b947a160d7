"""Differential privacy: the accountant, clipping, noise, and what no longer leaves a client."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fl
from fl.compression import CompressionConfig
from fl.privacy import PrivacyConfig, epsilon, privatised
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.errors import RequestError

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]


def config(**over: Any) -> fl.FederationConfig:
    fields = {
        "noise_from": "client",
        "clip": 0.5,
        "noise_multiplier": 1.0,
        **over.pop("privacy", {}),
    }
    return fl.FederationConfig(
        **{
            "rounds": 2, "lr": 5e-3, "batch_size": 8, "batch_norm": "local_stats",
            "count_epsilon": 1.0, "evaluate_every": 9, "privacy": PrivacyConfig(**fields), **over,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds", "delta", "expected"),
    [(1.0, 1, 1e-5, 4.377178), (2.0, 10, 1e-5, 7.511276), (5.0, 30, 1e-6, 5.422511),
     (0.5, 1, 1e-3, 7.581280)],
)  # fmt: skip
def test_the_accountant(
    noise_multiplier: float, rounds: int, delta: float, expected: float
) -> None:
    """The numbers of dp-accounting 0.6, privacy loss distributions, for sensitivity C.

    Any two data sets of one client are 2C apart: that is half the noise multiplier.
    """
    assert epsilon(rounds**0.5 / noise_multiplier, delta) == pytest.approx(expected, abs=1e-5)
    spent = PrivacyConfig(noise_multiplier=2 * noise_multiplier, delta=delta).spent(rounds)
    assert spent["epsilon"] == pytest.approx(expected, abs=1e-5)


def test_no_noise_no_privacy_and_much_noise_much() -> None:
    assert epsilon(0.0, 1e-5) == 0.0
    assert epsilon(1e-6, 1e-5) == 0.0
    assert epsilon(50.0, 1e-5) > 1000


def test_clipping_and_noise() -> None:
    before = {"a": torch.ones(3, 4), "b": torch.zeros(2)}
    after = {"a": torch.ones(3, 4) + 3.0, "b": torch.tensor([0.0, 6.0])}  # 12 * 9 + 36 = 144
    found = privatised(after, before, 1.0, 0.0, None)
    torch.testing.assert_close(found["a"], torch.full((3, 4), 1 + 3 / 12))
    torch.testing.assert_close(found["b"], torch.tensor([0.0, 0.5]))
    same = privatised(after, before, 20.0, 0.0, None)
    assert all(torch.equal(same[n], t) for n, t in after.items())
    big = {"w": torch.zeros(100_000)}
    noised = privatised(big, big, 1.0, 0.3, torch.Generator().manual_seed(0))["w"]
    assert float(noised.std()) == pytest.approx(0.3, rel=0.01)


def trained(net: nn.Module, data: Any, settings: fl.FederationConfig) -> tuple[Rounds, Any]:
    setting = Setting.of(net, fl.method("fedavg"), settings, num_classes=3, image_shape=(1, 6, 6))
    replies: list[Any] = []
    rounds = Rounds(
        setting, InProcess(setting, data, Store()), 3,
        hear=lambda kind, answer: replies.append(answer) if kind == "train" else None,
    )  # fmt: skip
    rounds.begin()
    rounds.round(evaluate=True)
    return rounds, replies


@pytest.mark.parametrize("noise_from", ["client", "server"])
def test_the_noise_is_as_large_as_said(noise_from: str, tiny: Make, hospitals: Clients) -> None:
    settings = config(privacy={"noise_from": noise_from, "noise_multiplier": 40.0})
    rounds, replies = trained(tiny(), hospitals(), settings)
    change = torch.cat(
        [(t - rounds.setting.initial[n]).flatten() for n, t in rounds.server.model.items()]
    )
    # z C / sqrt K of three clients' noise, or z C / K of the server's; the change itself is small
    expected = 40 * 0.5 / (3**0.5 if noise_from == "client" else 3)
    assert float(change.std()) == pytest.approx(expected, rel=0.15)
    own = replies[0].model["model.hidden.weight"] - rounds.setting.initial["model.hidden.weight"]
    if noise_from == "client":
        assert float(own.std()) == pytest.approx(20, rel=0.2)
    else:  # its own has none, and the server clipped it
        assert float(own.std()) < 0.1


def test_nothing_else_leaves(tiny: Make, hospitals: Clients) -> None:
    _, replies = trained(tiny(), hospitals(), config())
    assert [r.record.values for r in replies] == [{"num_examples": 1}] * 3
    assert [set(r.record.tensors) for r in replies] == [{"model"}] * 3
    names = {f"model.{n}" for n, _ in tiny().named_parameters()}
    assert set(replies[0].model) == names


def test_a_small_change_is_averaged_evenly(tiny: Make, hospitals: Clients) -> None:
    """Without weights by images: who has many would count for more than its clipped part."""
    settings = config(privacy={"noise_from": "server", "noise_multiplier": 1e-9, "clip": 1e3})
    rounds, replies = trained(tiny(), hospitals(), settings)
    for name, tensor in rounds.server.model.items():
        mean = torch.stack([r.model[name] for r in replies]).mean(0)
        torch.testing.assert_close(tensor, mean)


def test_the_guarantee_is_reported(tiny: Make, hospitals: Clients) -> None:
    def go(**over: Any) -> fl.Federated:
        return fl.run(tiny(), clients=hospitals(), num_classes=3, config=config(**over))

    found = go(rounds=4, participation=0.3)
    most = max(sum(k in r["asked"] for r in found.history) for k in range(3))
    assert found.privacy is not None
    assert found.privacy["rounds"] == most
    assert found.privacy["epsilon"] == pytest.approx(epsilon(2 * most**0.5, 1e-5))
    assert found.specialization is None
    assert found.generalization is None  # statistics stay with the clients and are not collected
    assert go(privacy={"noise": "secret"}).state["head.weight"].isfinite().all()


def test_noise_follows_from_the_seed_or_is_secret(tiny: Make, hospitals: Clients) -> None:
    def weight(noise: str, **over: Any) -> torch.Tensor:
        settings = config(privacy={"noise": noise}, **over)
        return trained(tiny(), hospitals(), settings)[0].server.model["model.head.weight"]

    assert torch.equal(weight("seeded"), weight("seeded"))
    assert not torch.equal(weight("secret"), weight("secret"))
    small = CompressionConfig(up=4, down=4)
    assert torch.equal(weight("seeded", compress=small), weight("seeded", compress=small))


@pytest.mark.parametrize(
    ("over", "rule"),
    [
        ({"batch_norm": "share_all"}, "got 'model.bn.running_mean'; keep statistics with"),
        ({"count_epsilon": None}, "count_epsilon: must be given with privacy, got none"),
        ({"select": "specialization"}, "select: must be last or generalization with privacy"),
        ({"privacy": {"noise_from": "server"}, "aggregation": "median"},
         "aggregation: must be mean with noise from the server, got 'median'"),
        ({"geometric": ("model.head.*",)}, "got 'model.head.weight'"),
    ],
)  # fmt: skip
def test_what_would_break_the_guarantee(
    over: dict[str, Any], rule: str, tiny: Make, refuses: Callable[..., Any]
) -> None:
    with refuses(rule):
        Setting.of(
            tiny(), fl.method("fedavg"), config(**over), num_classes=3, image_shape=(1, 6, 6)
        )


def test_nodes_need_secret_noise(tiny: Make) -> None:
    pytest.importorskip("flwr")
    from fl import apps

    setting = Setting.of(
        tiny(), fl.method("fedavg"), config(), num_classes=3, image_shape=(1, 6, 6)
    )
    with pytest.raises(RequestError, match=r"privacy.noise: must be 'secret' between nodes"):
        apps._check_apart(setting)
    counts_alone = Setting.of(
        tiny(), fl.method("fedavg"), config().replaced(privacy=None), num_classes=3,
        image_shape=(1, 6, 6),
    )  # fmt: skip
    with pytest.raises(
        RequestError, match=r"count_epsilon: must stand with privacy.noise 'secret'"
    ):
        apps._check_apart(counts_alone)


def test_a_round_that_is_repeated_counts_twice(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """The server has seen two answers, each with noise of its own."""

    class Stopped(Exception):
        pass

    def stop(kind: str, answer: object) -> None:
        if kind == "train":
            raise Stopped

    def go(noise: str, **more: Any) -> fl.Federated:
        return fl.run(
            tiny(), clients=hospitals(), num_classes=3, folder=tmp_path / noise,
            config=config(privacy={"noise": noise}), **more,
        )  # fmt: skip

    for noise, times in (("secret", 5), ("seeded", 2)):  # seeded noise is the same each time
        for _ in range(3):
            with pytest.raises(Stopped):
                go(noise, hear=stop)
        found = go(noise)
        assert found.privacy is not None
        assert found.privacy["rounds"] == times
        assert found.privacy["epsilon"] == pytest.approx(epsilon(2 * times**0.5, 1e-5))


def test_counts_with_secret_noise_are_told_once(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """Told again with other noise they would cost the epsilon of the counts twice."""

    class Stopped(Exception):
        pass

    told: list[str] = []

    def stop(kind: str, answer: object) -> None:
        told.append(kind)
        if kind == "train":
            raise Stopped

    for _ in range(2):  # in the first round, before any is saved
        with pytest.raises(Stopped):
            fl.run(
                tiny(), clients=hospitals(), num_classes=3, folder=tmp_path, hear=stop,
                config=config(privacy={"noise": "secret"}),
            )  # fmt: skip
    assert told.count("counts") == len(hospitals())
    assert told.count("train") == 2
