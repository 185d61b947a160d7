"""The Flower apps: what they compute is what the rounds compute, and what fails is named."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fl
from fl.compression import CompressionConfig
from fl.personal import Personal
from fl.record import Record
from fl.results import Description, open_run
from fl.setting import Setting
from fl.store import ByRound
from sdq import plugins
from sdq.errors import RequestError
from sdq.run_folder import RunFolder

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from fl import apps, node
from fl.grid import InProcessGrid, run_apps
from fl.grid_transport import FIRST_SECONDS, HELLO_SECONDS
from fl.messages import TYPES, packed, unpacked

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
MODEL = "model.safetensors"
CONFIG = fl.FederationConfig(rounds=3, lr=5e-3, batch_size=8, participation=0.7)


def setting(net: nn.Module, method: str, **over: Any) -> Setting:
    return Setting.of(
        net, fl.method(method), CONFIG.replaced(**over), num_classes=3, image_shape=(1, 6, 6)
    )


class Case:
    """One federation as apps on a grid of this process."""

    def __init__(
        self,
        make: Make,
        data: Sequence[fl.ClientData],
        method: str = "fedper",
        dead: Sequence[int] = (),
        folder: Path | None = None,
        kept: Path | None = None,
        **over: Any,
    ) -> None:
        self.done: fl.Federated | None = None
        self.data = list(data)
        self.of_client = {k: setting(make(), method, **over) for k in range(len(data))}
        self.history: list[dict[str, Any]] = []

        def open_federation(config: apps.Values) -> apps.Federation:
            test = tuple(c.test for c in self.data if c.test is not None)
            server = setting(make(), method, **over)
            return apps.Federation(server, len(data), test, folder=folder, round_seconds=5)

        def open_hospital(client: int, run: apps.Values, node: apps.Values) -> apps.Hospital:
            return apps.Hospital(self.of_client[client], self.data[client], kept)

        def finish(done: fl.Federated, config: apps.Values) -> None:
            self.done = done

        self.server = apps.server_app(open_federation, finish)
        self.grid = InProcessGrid(apps.client_app(open_hospital), len(data), dead=dead)

    def run(self) -> fl.Federated:
        run_apps(self.server, self.grid, {})
        assert self.done is not None
        return self.done


def failures(done: fl.Federated) -> list[tuple[int, str]]:
    return [(f["client"], f["reason"]) for r in done.history for f in r["failures"]]


METHODS = [name for name in plugins.names("fl.methods") if name != "centralized"]
CLASSIFIERS = [name for name in METHODS if "classification" in fl.method(name).tasks]
SEGMENTERS = [name for name in METHODS if name not in CLASSIFIERS]


@pytest.mark.parametrize("method", SEGMENTERS)
def test_apps_compute_what_the_rounds_do_with_mixed_labels(
    method: str, tiny_maps: Make, mixed_hospitals: Clients
) -> None:
    done = Case(tiny_maps, mixed_hospitals(), method).run()
    expected = fl.run(
        tiny_maps(), method=method, clients=mixed_hospitals(), num_classes=3, config=CONFIG
    )
    assert all(torch.equal(done.state[n], expected.state[n]) for n in expected.state)
    assert done.generalization == expected.generalization
    assert done.specialization == expected.specialization
    assert [r["sat_out"] for r in done.history] == [r["sat_out"] for r in expected.history]


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_apps_compute_what_the_rounds_do(method: str, tiny: Make, hospitals: Clients) -> None:
    done = Case(tiny, hospitals(), method).run()
    expected = fl.run(tiny(), method=method, clients=hospitals(), num_classes=3, config=CONFIG)
    assert all(torch.equal(done.state[n], expected.state[n]) for n in expected.state)
    assert done.generalization == expected.generalization
    assert done.specialization == expected.specialization
    assert (done.bytes_up, done.bytes_down) == (expected.bytes_up, expected.bytes_down)


def test_what_pools_images_cannot_be_deployed(tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match="centralized: must have every client's images"):
        Case(tiny, hospitals(), "centralized").run()


def test_a_record_survives_a_message() -> None:
    tensors = {
        "model": {"w": torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last)},
        "pfa.x": {"n": torch.tensor(7), "half": torch.ones(2).half(), "none": torch.zeros(0, 3)},
        "empty": {},
    }
    record = Record(tensors, {"a": [1, 0.1], "b": None, "c": {"d": "é"}})
    found = unpacked(packed(record))
    assert found.values == record.values
    assert list(found.tensors) == list(tensors)
    for group, expected in tensors.items():
        for name, tensor in expected.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)


def test_a_node_that_answers_nothing_is_left_out(tiny: Make, hospitals: Clients) -> None:
    done = Case(tiny, hospitals(), "fedavg", dead=[1], participation=1.0).run()
    assert done.history[0]["replied"] == [0, 2]
    reason = "no node says that it is this client; there are nodes of [0, 2]"
    assert failures(done) == [(1, reason)] * 3
    # what was sent to the two, and nothing to the third
    everyone = Case(tiny, hospitals(), "fedavg", participation=1.0).run()
    assert 3 * done.bytes_down == 2 * everyone.bytes_down


def test_a_node_that_dies_in_mid_round_is_named(tiny: Make, hospitals: Clients) -> None:
    case = Case(tiny, hospitals(), "fedavg", participation=1.0)
    deliver = case.grid._deliver

    def dying(message: Message) -> Message | None:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            case.grid.dead.add(1)
        return deliver(message)

    case.grid._deliver = dying  # type: ignore[method-assign]
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 2]] * 3
    assert failures(done)[0] == (1, "no reply within 5 s")
    assert failures(done)[1][1].startswith("no node says that it is this client")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr": 0.5}, "config.lr must be the server's 0.005, got 0.5; give both the same"),
        ({"net": 1}, "the first weights must be the server's; give both the same"),
        ({"method": "fedavg"}, "method must be the server's ['fedper'"),
    ],
)
def test_nodes_that_disagree_are_named(
    tiny: Make, hospitals: Clients, change: dict[str, Any], reason: str
) -> None:
    case = Case(tiny, hospitals(), participation=1.0)
    over = {k: v for k, v in change.items() if k == "lr"}
    case.of_client[2] = setting(
        tiny(change.get("net", 0)), change.get("method", "fedper"), participation=1.0, **over
    )
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 1]] * 3
    assert {k for k, _ in failures(done)} == {2}
    assert reason in failures(done)[0][1]


def test_another_version_is_named(
    tiny: Make, hospitals: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.identity

    def older(found: Setting) -> dict[str, Any]:
        return real(found) | ({"sdq": "0.0.1"} if found is case.of_client[0] else {})

    case = Case(tiny, hospitals(), participation=1.0)
    monkeypatch.setattr(node, "identity", older)
    found = failures(case.run())
    assert found[0][0] == 0
    assert "the version of sdq must be the server's '" in found[0][1]
    assert "got '0.0.1'" in found[0][1]


def test_two_nodes_cannot_be_one_client(tiny: Make, hospitals: Clients) -> None:
    case = Case(tiny, hospitals(), participation=1.0)
    case.grid.contexts[1002].node_config["partition-id"] = 1
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0]] * 3
    assert failures(done)[0] == (1, "two nodes say that they are this client")
    assert failures(done)[1][1].endswith("there are nodes of [0, 1]")


def test_a_node_that_comes_back_is_its_client_again(tiny: Make, hospitals: Clients) -> None:
    """The old node is still listed for a round, as Flower's is until its heartbeat is missed."""
    case = Case(tiny, hospitals(), "fedavg", participation=1.0)
    deliver, trained = case.grid._deliver, [0]

    def dying(message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            trained[0] += 1
            if trained[0] == 2:  # client 1 in round 1
                del case.grid.contexts[1001].node_config["partition-id"]
                case.grid.contexts[1001].node_config["partition-id"] = -1
                case.grid.dead.add(-1)
            if trained[0] == 3:  # and it comes back
                again = dataclasses.replace(case.grid.contexts[1000])
                again.node_id, again.node_config = 2001, {"partition-id": 1}
                case.grid.contexts[2001] = again
        return deliver(message)

    case.grid._deliver = dying  # type: ignore[method-assign]
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 2], [0, 1, 2], [0, 1, 2]]


def test_images_of_other_classes_are_named(
    tiny: Make, hospitals: Clients, hospital_images: Callable[..., Any]
) -> None:
    case = Case(tiny, hospitals(), participation=1.0)
    wrong = hospital_images([0, 1, 2, 2], 5)
    wrong.labels[3] = 7
    case.data[1] = fl.ClientData("other", wrong)
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 2]] * 3
    assert "train labels must be from 0 to 2, got 0 to 7" in failures(done)[0][1]


class Stopped(Exception):
    """The server is gone."""


def stop_in_round(case: Case, after: int) -> None:
    """Let the server die after so many rounds, when a client has trained in the next one."""
    send, trained = case.grid.send_and_receive, [0]

    def stopping(messages: Any, *, timeout: float | None = None) -> Any:
        for message in messages:
            trained[0] += message.metadata.message_type == "train"
            yield from send([message])
            if trained[0] > 3 * after:  # three of three clients a round: 0.7 of them, rounded up
                raise Stopped

    case.grid.send_and_receive = stopping  # type: ignore[method-assign]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("compress", [None, CompressionConfig(up=3, down=4)])
def test_a_federation_is_taken_up_in_another_run(
    tiny: Make, hospitals: Clients, tmp_path: Path, after: int, compress: Any
) -> None:
    """The server dies in the middle of a round, when some clients have trained already."""
    over = {"compress": compress}
    whole = Case(tiny, hospitals(), folder=tmp_path / "a", kept=tmp_path / "b", **over).run()
    places = {"folder": tmp_path / "server", "kept": tmp_path / "clients", **over}
    case = Case(tiny, hospitals(), **places)
    stop_in_round(case, after)
    with pytest.raises(Stopped):
        case.run()
    again = Case(tiny, hospitals(), **places).run()
    assert len(again.history) == 3
    assert all(torch.equal(again.state[n], whole.state[n]) for n in whole.state)
    assert json.dumps(again.specialization) == json.dumps(whole.specialization)


@pytest.mark.parametrize(("method", "anew"), [("fedper", [0, 1, 2]), ("fedavg", None)])
def test_who_lost_what_stays_with_it_is_named(
    method: str, anew: list[int] | None, tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    """Nodes without a folder remember nothing in the next run; of FedAvg they need not."""
    case = Case(tiny, hospitals(), method, folder=tmp_path / "server")
    stop_in_round(case, 2)
    with pytest.raises(Stopped):
        case.run()
    again = Case(tiny, hospitals(), method, folder=tmp_path / "server").run()
    assert [r.get("anew") for r in again.history] == [None, None, anew]


def test_a_client_forgets_a_round_that_is_asked_for_again(tmp_path: Path) -> None:
    kept = ByRound(tmp_path)
    assert kept.before(0) is None
    for round in (0, 2, 3):
        kept.put(Record({}, {"round": round}), round)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["000002", "000003"]
    # the server never heard of the round 3 that the client trained in
    assert kept.before(3).values == {"round": 2}
    kept.put(Record({}, {"round": "3 again"}), 3)
    assert kept.before(4).values == {"round": "3 again"}
    kept.put(Record({}, {"round": "2 again"}), 2)
    assert kept.before(9).values == {"round": "2 again"}


def test_a_hospital_whose_images_cannot_be_opened_is_named(tiny: Make, hospitals: Clients) -> None:
    case = Case(tiny, hospitals(), participation=1.0)
    del case.of_client[1]
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 2]] * 3
    assert failures(done)[0] == (1, "KeyError: 1")


def test_what_the_superlink_says_of_a_node_is_that_nodes_failure(
    tiny: Make, hospitals: Clients
) -> None:
    """It answers in its own name when a node has missed its heartbeats."""
    case = Case(tiny, hospitals(), "fedavg", participation=1.0)
    send = case.grid.send_and_receive

    def missing(messages: Any, *, timeout: float | None = None) -> Any:
        for message in messages:
            said = message.metadata
            if said.message_type == "train" and said.dst_node_id == 1001:
                said.__dict__["_message_id"] = "of client 1"
                yield create_message_error_unavailable_res_message(said, "node_unavail")
            else:
                yield from send([message])

    case.grid.send_and_receive = missing  # type: ignore[method-assign]
    done = case.run()
    assert [r["replied"] for r in done.history] == [[0, 2]] * 3
    assert failures(done)[0][0] == 1
    assert "failed to report a heartbeat" in failures(done)[0][1]


def test_a_message_is_not_worth_more_than_its_round(tiny: Make, hospitals: Clients) -> None:
    """A node that comes back must not train for a round that is over."""
    case = Case(tiny, hospitals(), "fedavg")
    send, lives = case.grid.send_and_receive, set()

    def watching(messages: Any, *, timeout: float | None = None) -> Any:
        for message in messages:
            if message.metadata.message_type == "train":
                lives.add(message.metadata.ttl)
            yield from send([message])

    case.grid.send_and_receive = watching  # type: ignore[method-assign]
    case.run()
    assert lives == {5}


def test_a_node_may_take_its_time_when_it_is_first_asked(tiny: Make, hospitals: Clients) -> None:
    """It has torch to import; one that does not answer then holds up later rounds for less."""
    case = Case(tiny, hospitals(), "fedavg", dead=[1], participation=1.0)
    send, waits = case.grid.send_and_receive, []

    def watching(messages: Any, *, timeout: float | None = None) -> Any:
        if messages and messages[0].metadata.message_type == TYPES["hello"]:
            waits.append((len(messages), timeout, messages[0].metadata.ttl))
        return send(messages)

    case.grid.send_and_receive = watching  # type: ignore[method-assign]
    case.run()
    assert waits[:2] == [(3, FIRST_SECONDS, FIRST_SECONDS), (1, HELLO_SECONDS, HELLO_SECONDS)]


def test_run_folders_of_the_server_and_of_each_hospital(
    tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    case = Case(tiny, hospitals(), "ditto", kept=tmp_path / "kept", keep_clients=True)
    server = setting(tiny(), "ditto", keep_clients=True)
    path = tmp_path / "out"
    names = ["a", "b", "c"]

    def open_federation(config: apps.Values) -> apps.Federation:
        run = open_run(path, Description(server, "mlp", names))
        return apps.Federation(server, 3, round_seconds=5, run=run)

    def open_hospital(client: int, run: apps.Values, node: apps.Values) -> apps.Hospital:
        described = Description(case.of_client[client], "mlp", names, f"{client}.npz")
        data = case.data[client]
        return apps.Hospital(case.of_client[client], data, tmp_path / "kept", described.to_json())

    finished: list[fl.Federated] = []
    app = apps.server_app(open_federation, lambda done, config: finished.append(done))
    grid = InProcessGrid(apps.client_app(open_hospital), 3)
    run_apps(app, grid, {})
    (done,) = finished
    run = RunFolder.open(path)
    assert run.done
    assert all(torch.equal(t, done.state[n]) for n, t in run.read_tensors(MODEL).items())
    metrics = run.read_json("metrics.json")
    assert metrics["rounds"] == 3
    assert metrics["specialization"] == done.specialization
    assert metrics["worst_client"] == f"client {done.specialization['worst_client']}"  # type: ignore[index]
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["replied"]) for r in log] == [
        (1, [0, 1, 2]),
        (2, [0, 1, 2]),
        (3, [0, 1, 2]),
    ]
    expected: dict[int, Personal] = {}
    fl.run(
        tiny(), method="ditto", clients=case.data, num_classes=3, config=server.config,
        keep=expected.__setitem__,
    )  # fmt: skip
    for number, personal in expected.items():
        (own,) = (tmp_path / "kept").glob(f"*/{number}/model")
        kept = RunFolder.open(own)
        assert kept.done
        assert kept.read_json("run.json")["request"]["data"]["reference"] == f"{number}.npz"
        assert kept.read_json("metrics.json")["float"] == personal.evaluation["test"]
        tensors = kept.read_tensors(MODEL)
        assert all(torch.equal(t, tensors[n]) for n, t in personal.state.items())


def test_another_federation_does_not_go_on_in_a_run_folder(tiny: Make, tmp_path: Path) -> None:
    with open_run(tmp_path, Description(setting(tiny(), "fedavg"), "mlp", ["a"])):
        pass
    with pytest.raises(RequestError, match="must be as in the interrupted run"):
        open_run(tmp_path, Description(setting(tiny(), "fedavg", lr=0.5), "mlp", ["a"]))
