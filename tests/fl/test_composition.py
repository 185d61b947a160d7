"""Which method goes with what: every cell of the table, by a round or by its refusal."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fl
from fl import composition
from fl.bits import PhasesConfig
from fl.compression import CompressionConfig
from fl.leaves import what_leaves
from fl.method import Client, Progress
from fl.methods.fedavg import FedAvg
from fl.privacy import PrivacyConfig
from fl.record import Record
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq import plugins
from sdq.config import QuantConfig
from sdq.cost import Budget
from sdq.errors import RequestError

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
PRIVATE = {"batch_norm": "local_all", "count_epsilon": 1.0}
OPTIONS: dict[composition.Feature, dict[str, Any]] = {
    "compression": {"compress": CompressionConfig()},
    "robust aggregation": {"aggregation": "median"},
    "client noise": {"privacy": PrivacyConfig(noise_from="client"), **PRIVATE},
    "server noise": {"privacy": PrivacyConfig(noise_from="server"), **PRIVATE},
}


def setting(net: nn.Module, method: Any, **over: Any) -> Setting:
    config = fl.FederationConfig(rounds=1, batch_size=8, **over)
    return Setting.of(net, method, config, num_classes=3, image_shape=(1, 6, 6))


def one_round(of: Setting, data: list[fl.ClientData]) -> Any:
    data = list(of.method.arrange(data))
    rounds = Rounds(of, InProcess(of, data, Store()), len(data))
    rounds.begin()
    return rounds.round(evaluate=False)


@pytest.mark.parametrize("name", plugins.names("fl.methods"))
def test_every_cell(
    name: str, tiny: Make, tiny_maps: Make, hospitals: Clients, mixed_hospitals: Clients,
    refuses: Any,
) -> None:  # fmt: skip
    if "classification" not in fl.method(name).tasks:
        tiny, hospitals = tiny_maps, mixed_hospitals
    row = composition.table()[name]
    assert list(row) == list(OPTIONS)
    for feature, reason in row.items():
        if reason:
            with refuses(f"{name}: must go without {feature}: {reason}"):
                setting(tiny(), fl.method(name), **OPTIONS[feature])
        else:
            report = one_round(setting(tiny(), fl.method(name), **OPTIONS[feature]), hospitals())
            assert report.replied
            assert not report.failures


def test_all_together(tiny: Make, hospitals: Clients) -> None:
    over = OPTIONS["compression"] | OPTIONS["robust aggregation"] | OPTIONS["client noise"]
    report = one_round(setting(tiny(), fl.method("fedprox"), **over), hospitals())
    assert report.replied == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "around"), [("fednpr", "scaffold"), ("det", "pfa"), ("fednpr", "creff")]
)
def test_a_wrapper_refuses_what_is_inside_it(method: str, around: str) -> None:
    found = fl.method(method, around=around).refuses
    assert set(found.items()) >= set(fl.method(around).refuses.items()) > set()


class Telling(Client):
    def finish(self, progress: Progress) -> Record:
        return Record({}, {"told": 1})


class TellingMethod(FedAvg):
    client_type = Telling


def test_a_method_that_says_more_than_it_declares(tiny: Make, hospitals: Clients) -> None:
    """A plugin of somebody's own, which the table does not know."""
    of = setting(tiny(), TellingMethod(), **OPTIONS["client noise"])
    with pytest.raises(Exception, match=r"must send nothing beside the model.*\['told'\]"):
        one_round(of, hospitals())


POLICIES = ("share_all", "share_affine", "local_stats", "local_all")
ROW = "| `{}` | {} |"


def row(name: str, tiny: Make) -> str:
    """Return a method's row in the documentation: what it declares, and what its code does."""
    known = composition.table()[name]
    cells = ["no" if known[feature] else "yes" for feature in composition.FEATURES]
    of = setting(tiny(), fl.method(name))
    allowed = []
    for policy in POLICIES:
        with contextlib.suppress(RequestError):
            allowed.append(setting(tiny(), fl.method(name), batch_norm=policy) and policy)
    cells.append(of.method.batch_norm + (", no other" if len(allowed) == 1 else ""))
    up = set(of.names(up=True))
    stays = sorted({kept(n) + (" (goes up)" if n in up else "") for n in of.names(down=False)})
    cells.append(", ".join(stays) if of.names(up=True) else "everything")
    leaves = what_leaves(of)
    beside = {t.group for t in leaves.tensors if t.group != "model"}
    beside |= {v.name for v in leaves.values if v.meaning == "of the method"}
    cells.append("the images" if leaves.images else ", ".join(sorted(beside)))
    return ROW.format(name, " | ".join(cells))


def kept(name: str) -> str:
    first, second, *_ = name.split(".")
    known = {"head": "head", "bn": "batch norm"}
    return f"`{second}`" if first == "extras" else known.get(second, "all the rest")


def test_the_documentation_has_the_table(tiny: Make, tiny_maps: Make) -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    lines = [
        row(name, tiny if "classification" in fl.method(name).tasks else tiny_maps)
        for name in plugins.names("fl.methods")
    ]
    title = [*composition.FEATURES, "batch norm", "is the client's own", "sends beside the model"]
    expected = [f"| method | {' | '.join(title)} |", "|---|" + "---|" * len(title), *lines]
    assert "\n".join(expected) in text, "\n".join(expected)
    # and why not, once for each reason
    for name, cells in composition.table().items():
        for reason in filter(None, cells.values()):
            assert reason in text, (name, reason)


@pytest.mark.parametrize("feature", list(OPTIONS))
def test_bits_are_learned_with_few_bytes_and_nothing_else(
    feature: composition.Feature, tiny: Make, hospitals: Clients, refuses: Any
) -> None:
    def go(**over: Any) -> fl.Federated:
        config = fl.FederationConfig(rounds=1, batch_size=8, evaluate_every=9, **over)
        return fl.run(
            tiny(), clients=hospitals(), num_classes=3, config=config,
            quant=QuantConfig(bit_choices=(1, 2, 4), first_last_bits=None),
            budget=Budget(avg_weight_bits=2.0),
            phases=PhasesConfig(search_rounds=1, tune_rounds=2),
        )  # fmt: skip

    if feature == "compression":
        few, plain = go(**OPTIONS[feature]), go()
        assert few.bytes_up < 0.75 * plain.bytes_up
        assert all(t.isfinite().all() for t in few.state.values())
    else:
        with refuses(f"fedavg: must go without {feature}: scales", "leave it out"):
            go(**OPTIONS[feature])
