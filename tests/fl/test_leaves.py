"""What is said to leave a client is what a real federation's messages have in them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from torch import nn

import fl
from fl.compression import CompressionConfig
from fl.leaves import LATER, UNKNOWN, WHEN, Leaves, what_leaves
from fl.privacy import PrivacyConfig
from fl.record import Failure, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess, run_over
from fl.setting import Setting
from fl.store import Store

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
CONFIG = fl.FederationConfig(rounds=6, batch_size=8, evaluate_every=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "bits": ("fedavg", {"compress": CompressionConfig(up=2, down=3, tensor_bits={"*": 4})}),
    "away": ("fedper", {"participation": 0.5, "compress": CompressionConfig()}),
    "scaffold": ("scaffold", {}),
    "fca": ("fca", {"compress": CompressionConfig()}),
    "creff": ("creff", {}),
    "prr": ("prr", {"compress": CompressionConfig(up=4, down=None)}),
    "climb": ("climb", {}),
    "local": ("local", {}),
    "private": (
        "fedavg",
        {"privacy": PrivacyConfig(), "batch_norm": "local_all", "count_epsilon": 1.0},
    ),
    "statistics": ("fedavg", {"batch_norm": "share_affine", "participation": 0.5}),
}


class Listening(InProcess):
    passed: set[tuple[Any, ...]]

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            for answer in super().ask([request]):
                assert isinstance(answer, Reply), answer
                for way, record in (("down", request.record), ("up", answer.record)):
                    for group, tensors in record.tensors.items():
                        for name, t in tensors.items():
                            dtype = str(t.dtype).removeprefix("torch.")
                            self.passed.add((way, group, name, tuple(t.shape), dtype, t.nbytes))
                    self.passed |= {(way, name) for name in record.values}
                yield answer


def setting(net: nn.Module, case: str, **more: Any) -> Setting:
    method, over = CASES[case]
    return Setting.of(
        net, fl.method(method), CONFIG.replaced(**over, **more), num_classes=3,
        image_shape=(1, 6, 6),
    )  # fmt: skip


def listed(leaves: Leaves) -> set[tuple[Any, ...]]:
    tensors = {
        (t.way, t.group, t.name, t.shape, t.dtype, t.bytes)
        for t in leaves.tensors
        if t.when != UNKNOWN
    }
    return tensors | {(v.way, v.name) for v in leaves.values}


@pytest.mark.parametrize("case", CASES)
def test_a_real_federation_sends_exactly_that(case: str, tiny: Make, hospitals: Clients) -> None:
    data = hospitals((12, 5, 4), (3, 10, 6), (8, 2, 9))
    of = setting(tiny(), case)
    transport = Listening(of, data, Store())
    transport.passed = set()
    run_over(of, transport, 3, test=[c.test for c in data])
    found = what_leaves(setting(tiny(), case))
    # a client that the second round asks first has no message of an earlier one
    ignored = {t for t in transport.passed if t[1] == "model.codes"} if case == "away" else set()
    assert transport.passed - ignored <= listed(found)
    assert listed(found) - ignored <= transport.passed | ignored


def test_local_sends_nothing_of_a_model(tiny: Make, hospitals: Clients) -> None:
    data = hospitals((12, 5, 4), (3, 10, 6), (8, 2, 9))
    of = setting(tiny(), "local")
    transport = Listening(of, data, Store())
    transport.passed = set()
    run_over(of, transport, 3, test=[c.test for c in data])
    assert {t[0] for t in transport.passed if len(t) > 2} == set()
    assert not what_leaves(setting(tiny(), "local")).tensors


def test_what_is_collected_counts(tiny: Make, hospitals: Clients) -> None:
    """FedPer's heads, of three clients, at every second of six rounds."""
    data = hospitals((12, 5, 4), (3, 10, 6), (8, 2, 9))
    found = []
    for assemble in (True, False):
        config = CONFIG.replaced(assemble=assemble)
        found.append(fl.run(tiny(), method="fedper", clients=data, num_classes=3, config=config))
    head = sum(t.nbytes for n, t in tiny().state_dict().items() if n.startswith("head."))
    assert found[0].bytes_up - found[1].bytes_up == 3 * 3 * head


def test_a_method_of_weak_clients_may_tell_why_it_sits_out(tiny_maps: Make) -> None:
    of = Setting.of(
        tiny_maps(), fl.method("fedst"), CONFIG, num_classes=3, image_shape=(1, 6, 6),
    )  # fmt: skip
    assert ("up", "sits_out") in {(v.way, v.name) for v in what_leaves(of).values}


def test_bytes_of_a_round(tiny: Make, hospitals: Clients) -> None:
    for case in ("fedavg", "bits", "scaffold"):
        of = setting(tiny(), case)
        rounds = Rounds(of, InProcess(of, hospitals(), Store()), 3)
        rounds.begin()
        rounds.round(evaluate=False)
        report = rounds.round(evaluate=False)
        leaves = what_leaves(setting(tiny(), case))
        assert report.bytes_up == 3 * leaves.bytes_per_round("up")
        assert report.bytes_down == 3 * leaves.bytes_per_round("down")


def test_when(tiny: Make) -> None:
    leaves = what_leaves(setting(tiny(), "bits"))
    codes = {t.when for t in leaves.tensors if t.group == "model.codes" and t.way == "down"}
    assert codes == {LATER, UNKNOWN}  # with 8 bits
    when = {v.name: v.when for v in leaves.values if v.way == "up"}
    assert when["evaluations"] == WHEN["collect"]
    assert when["num_examples"] == WHEN["train"]
    assert when["class_counts"] == WHEN["counts"]
    (evaluations,) = (v for v in leaves.values if v.name == "evaluations")
    assert {"accuracy", "auc", "per_class_recall"} <= set(evaluations.names)


def test_images_in_one_place(tiny: Make) -> None:
    of = Setting.of(tiny(), fl.method("centralized"), CONFIG, num_classes=3, image_shape=(1, 6, 6))
    assert what_leaves(of) == Leaves(images=True)


def test_noise_alone_is_looked_at(tiny: Make) -> None:
    """The list is the same whatever the weights are, and nothing of a client is needed for it."""
    one, other = (what_leaves(setting(tiny(seed), "fedavg")) for seed in (0, 1))
    assert one == other
