"""Medians and trimmed means, and updates that are refused: too large, misshapen, not finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import fl
from fl.record import Failure, Record, Reply, Request
from fl.robust import Aggregation, robust_mean, too_large
from fl.rounds import RoundReport, Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.errors import RequestError

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
CONFIG = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8)
MEDIAN, TRIMMED = Aggregation("median"), Aggregation("trimmed_mean", 0.2)


def some(count: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(count)
    return [{"w": torch.randn(3, 4, generator=rng)} for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 11])
def test_against_numpy_and_scipy(count: int) -> None:
    states = some(count)
    values = np.stack([s["w"].numpy() for s in states]).astype(np.float64)
    median = robust_mean(states, MEDIAN)["w"]
    np.testing.assert_allclose(median, np.median(values, 0), rtol=1e-6)
    trimmed = robust_mean(states, TRIMMED)["w"]
    if count in (3, 4):  # at least one at either end is cut off
        np.testing.assert_allclose(trimmed, np.sort(values, 0)[1:-1].mean(0), rtol=1e-6)
        return
    np.testing.assert_allclose(trimmed, scipy.stats.trim_mean(values, 0.2, 0), rtol=1e-6)


def test_logarithms_integers_and_dtypes() -> None:
    states = [
        {"s": torch.tensor(s), "n": torch.tensor(n), "h": torch.tensor(s).bfloat16()}
        for s, n in ((1.0, 7), (4.0, 3), (16.0, 900), (64.0, 5))
    ]
    found = robust_mean(states, MEDIAN, ("s",))
    assert float(found["s"]) == pytest.approx(8.0)  # the root of 4 * 16
    assert int(found["n"]) == 5
    assert (found["n"].dtype, found["h"].dtype) == (torch.int64, torch.bfloat16)


@pytest.mark.parametrize("wrong", ["mode", "median:1", "trimmed_mean", "trimmed_mean:0.5", "mean:"])
def test_the_option(wrong: str) -> None:
    with pytest.raises(RequestError, match=r"aggregation: must be mean, median or trimmed_mean:SH"):
        fl.FederationConfig(aggregation=wrong)


class Spoiling(InProcess):
    """Client 1's replies are changed on their way: of training, or of before the first round."""

    spoil: Callable[[Record], Any]
    trained = True

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for answer in super().ask(requests):
            if (
                isinstance(answer, Reply)
                and answer.client == 1
                and bool(answer.model) == self.trained
            ):
                record = answer.record.copy()
                self.spoil(record)
                answer = replace(answer, record=record)
            yield answer


def one_round(
    net: nn.Module,
    data: list[fl.ClientData],
    spoil: Callable[[Record], Any],
    method: str,
    **over: Any,
) -> tuple[RoundReport, dict[str, Tensor]]:
    config = CONFIG.replaced(**over)
    setting = Setting.of(net, fl.method(method), config, num_classes=3, image_shape=(1, 6, 6))
    transport = Spoiling(setting, data, Store())
    transport.spoil = spoil
    rounds = Rounds(setting, transport, len(data))
    rounds.begin()
    return rounds.round(evaluate=False), rounds.server.model


def scaled(start: nn.Module, factor: float) -> Callable[[Record], None]:
    """Return what multiplies the change of a model."""
    before = {f"model.{n}": p.detach() for n, p in start.named_parameters()}

    def spoil(record: Record) -> None:
        for name in before.keys() & record.model.keys():
            old = before[name]
            record.model[name] = old + factor * (record.model[name] - old)

    return spoil


def nothing(record: Record) -> None:
    pass


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedadam", "fca", "pfa"])
@pytest.mark.parametrize("factor", [1000.0, -1000.0])
def test_a_scaled_update_is_named(
    method: str, factor: float, tiny: Make, hospitals: Clients
) -> None:
    report, model = one_round(tiny(), hospitals(), scaled(tiny(), factor), method)
    assert report.replied == [0, 2]
    assert [f.client for f in report.failures] == [1]
    reason = report.failures[0].reason
    assert "its change of the model has a norm of" in reason
    assert "is accepted (max_update_ratio 20)" in reason
    assert all(t.abs().max() < 10 for n, t in model.items() if "num_batches" not in n)


@pytest.mark.parametrize(("share", "count", "cut"), [(0.29, 100, 29), (0.2, 4, 1), (0.49, 5, 2)])
def test_how_many_are_cut_off(share: float, count: int, cut: int) -> None:
    states = [{"w": torch.tensor([0.0])}] * (count - cut) + [{"w": torch.tensor([1e6])}] * cut
    assert float(robust_mean(states, Aggregation("trimmed_mean", share))["w"]) == 0
    one_more = [*states[1:], {"w": torch.tensor([1e6])}]
    assert float(robust_mean(one_more, Aggregation("trimmed_mean", share))["w"]) > 0


@pytest.mark.parametrize("images", [{}, {0: 0.0, 1: 0.0, 2: 0.0}, {0: 0.0, 1: 0.0, 2: 5.0}])
def test_counts_of_zero_switch_nothing_off(images: dict[int, float]) -> None:
    """Counts that are told with noise may all be 0."""
    sent = {k: {"w": torch.ones(3)} for k in range(3)}
    moved = {0: 1.1, 1: 101.0, 2: 1.1}
    replies = [Reply(k, Record({"model": {"w": torch.full((3,), v)}})) for k, v in moved.items()]
    assert [f.client for f in too_large(replies, sent, images, ["w"], 20.0)] == [1]


@pytest.mark.parametrize("count", [2, 3])
def test_of_two_clients_either_may_be_refused(count: int, tiny: Make, hospitals: Clients) -> None:
    data = hospitals()[:count]
    report, _ = one_round(tiny(), data, scaled(tiny(), 1000.0), "fedavg")
    assert [f.client for f in report.failures] == [1]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    "counts",
    [((1, 0, 0), (0, 1, 0), (90, 80, 70)), ((1, 0, 0), (90, 80, 70), (60, 90, 80)),
     ((240, 0, 0), (0, 3, 0), (0, 0, 2), (1, 1, 1))],
)  # fmt: skip
def test_honest_clients_of_other_sizes_are_not(
    optimizer: str, counts: Any, tiny: Make, hospitals: Clients
) -> None:
    """One takes 30 steps where others take one, with another class."""
    for over in ({}, {"local_epochs": 3}):
        report, _ = one_round(
            tiny(), hospitals(*counts), nothing, "fedavg", optimizer=optimizer, lr=0.02, **over
        )
        assert not report.failures


def test_who_alone_still_learns_is_not_refused(tiny: Make, hospitals: Clients) -> None:
    """Two of three have a step of almost nothing, and the third one of a hundredth of the model."""

    def hardly(record: Record) -> None:
        scaled(tiny(), 300.0)(record)

    report, _ = one_round(tiny(), hospitals(), hardly, "fedavg", lr=1e-7)
    assert not report.failures
    report, _ = one_round(tiny(), hospitals(), hardly, "fedavg", lr=1e-5)
    assert [f.client for f in report.failures] == [1]


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean:0.34"])
@pytest.mark.parametrize("method", ["fedavg", "fedavgm", "scaffold", "fedper"])
def test_one_of_three_cannot_move_far(
    aggregation: str, method: str, tiny: Make, hospitals: Clients
) -> None:
    def go(spoil: Callable[[Record], Any], rule: str) -> dict[str, Tensor]:
        return one_round(
            tiny(), hospitals(), spoil, method, aggregation=rule, max_update_ratio=None
        )[1]

    honest = go(nothing, "mean")
    wrong = scaled(tiny(), 1000.0)
    assert max(float((go(wrong, "mean")[n] - t).abs().max()) for n, t in honest.items()) > 1
    names = [n for n, _ in tiny().named_parameters()]
    found = go(wrong, aggregation)
    for name in names:
        if (full := f"model.{name}") in found:
            assert float((found[full] - honest[full]).abs().max()) < 0.05


def shorter(record: Record) -> None:
    record.model["model.head.weight"] = record.model["model.head.weight"][:-1]


def other_dtype(record: Record) -> None:
    record.model["model.head.weight"] = record.model["model.head.weight"].double()


def missing(record: Record) -> None:
    del record.model["model.head.weight"]


def another(record: Record) -> None:
    record.model["model.tail"] = torch.zeros(1)


def not_a_number(record: Record) -> None:
    record.model["model.head.weight"][0] = torch.nan


def infinite_loss(record: Record) -> None:
    record.values["train_loss"] = float("inf")


def no_images(record: Record) -> None:
    record.values["num_examples"] = 0


def no_loss(record: Record) -> None:
    record.values["train_loss"] = "low"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shorter, "'model.head.weight' is torch.float32"),
        (other_dtype, "'model.head.weight' is torch.float64"),
        (missing, "'model.head.weight' is missing"),
        (another, "'model.tail' is unknown"),
        (not_a_number, "NaN or infinite in 'model/model.head.weight'"),
        (infinite_loss, "NaN or infinite in 'values'"),
        (no_images, "its 'num_examples' is 0 instead of a number from 1 to 1e+09"),
        (no_loss, "its 'train_loss' is 'low' instead of a number"),
        (lambda r: r.values.update(num_examples=2.5), "its num_examples is no whole number"),
        (lambda r: r.values.update(num_examples=10**400), "its 'num_examples' is 1000000"),
        (lambda r: r.values.update(train_loss=10**400), "its 'train_loss' is 1000000"),
        (lambda r: r.values.update(train_loss=10**5000), "NaN or infinite in 'values'"),
        (lambda r: r.values.update(evaluations=5), "its evaluations cannot be read: Attr"),
        (lambda r: r.values.update(evaluations={"1": {"test": {}}}), "evaluations cannot be read"),
        (lambda r: r.values.update(evaluations={"x": {}}), "its evaluations cannot be read: Value"),
        (lambda r: r.values.update(evaluations={"0": {}}), "its evaluations are of client 0"),
        (lambda r: r.values.update(evaluations={"77": {}}), "its evaluations are of client 77"),
    ],
)
def test_unusable_updates_are_named(
    spoil: Callable[[Record], Any], reason: str, tiny: Make, hospitals: Clients
) -> None:
    report, _ = one_round(tiny(), hospitals(), spoil, "fedavg")
    assert report.replied == [0, 2]
    assert reason in report.failures[0].reason


def without(group: str) -> Callable[[Record], None]:
    def spoil(record: Record) -> None:
        record.tensors.pop(group, None)
        record.values.pop(group, None)

    return spoil


def cut(group: str, name: str) -> Callable[[Record], None]:
    def spoil(record: Record) -> None:
        record.tensors[group][name] = record.tensors[group][name][:-1]

    return spoil


def told(name: str, value: Any) -> Callable[[Record], None]:
    def spoil(record: Record) -> None:
        record.values[name] = value

    return spoil


@pytest.mark.parametrize(
    ("method", "spoil", "reason"),
    [
        ("scaffold", without("scaffold"), "'model.bn.bias' is missing"),
        ("scaffold", cut("scaffold", "model.head.weight"), "'model.head.weight' is torch.float32"),
        ("creff", without("creff"), "'gradients' is missing"),
        ("creff", cut("creff", "present"), "'present' is torch.float32 (2,) instead of"),
        ("cpa", cut("cpa", "prototypes"), "'prototypes' is torch.float32"),
        ("climb", without("climb"), "'climb' is None instead of a number from -1e+09 to 1e+09"),
        ("climb", told("climb", True), "'climb' is True instead of a number from -1e+09 to 1e+09"),
        (
            "fednova",
            told("fednova", 0),
            "'fednova' is 0 instead of a number from 0.99 to 1e+09",
        ),
    ],
)
def test_what_a_method_adds_is_looked_at(
    method: str, spoil: Callable[[Record], Any], reason: str, tiny: Make, hospitals: Clients
) -> None:
    report, _ = one_round(tiny(), hospitals(), nothing, method)
    assert report.replied == [0, 1, 2]
    report, _ = one_round(tiny(), hospitals(), spoil, method)
    assert report.replied == [0, 2]
    assert report.failures[0].reason.startswith("its reply is not the method's: ")
    assert reason in report.failures[0].reason


def test_a_name_that_the_server_does_not_know_does_no_harm(tiny: Make, hospitals: Clients) -> None:
    def spoil(record: Record) -> None:
        record.tensors["scaffold"]["model.tail"] = torch.zeros(3)

    honest = one_round(tiny(), hospitals(), nothing, "scaffold")[1]
    report, found = one_round(tiny(), hospitals(), spoil, "scaffold")
    assert report.replied == [0, 1, 2]
    assert all(torch.equal(found[name], tensor) for name, tensor in honest.items())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (told("class_counts", []), "its class counts are [] instead of 1 numbers from 0 to 1e+09"),
        (told("class_counts", [1e39]), "its class counts are [1e+39] instead of"),
        (told("class_counts", [10**400]), "its class counts are [1000000"),
        (told("class_counts", [1.0, 2.0]), "its class counts are [1.0, 2.0] instead of"),
        (told("class_counts", [-1.0]), "its class counts are [-1.0] instead of"),
        (told("class_counts", [math.inf]), "its class counts are [inf] instead of"),
        (told("class_counts", ["2"]), "its class counts are ['2'] instead of"),
        (told("class_counts", "many"), "its class counts are 'many' instead of"),
        (told("more", math.nan), "is NaN or infinite in 'values'"),
        (cut("cpa", "pixels"), "'pixels' is torch.float64 (2, 2) instead of torch.float64 (3, 2)"),
        (lambda r: r.tensors["cpa"]["pixels"].fill_(math.nan), "NaN or infinite in 'cpa/pixels'"),
        (lambda r: r.tensors["cpa"]["pixels"].neg_(), "'pixels' has numbers below 0"),
    ],
)
def test_what_is_told_before_the_first_round_is_looked_at(
    spoil: Callable[[Record], Any], reason: str, tiny_maps: Make, hospitals_with_masks: Clients
) -> None:
    setting = Setting.of(
        tiny_maps(), fl.method("cpa"), CONFIG, num_classes=3, image_shape=(1, 6, 6)
    )
    data = hospitals_with_masks()
    transport = Spoiling(setting, data, Store())
    transport.spoil, transport.trained = spoil, False
    rounds = Rounds(setting, transport, len(data))
    (failure,) = rounds.begin()
    assert failure.client == 1
    assert reason in failure.reason
    assert sorted(rounds.server.counts) == [0, 2]
    pixels = [
        answer.record.tensors["cpa"]["pixels"]
        for answer in InProcess(setting, data, Store()).ask(
            Request("counts", k, 0, Record()) for k in (0, 2)
        )
        if isinstance(answer, Reply)
    ]
    assert torch.equal(rounds.server.memory.tensors["cpa"]["pixels"], sum(pixels))
