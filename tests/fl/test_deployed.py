"""Federations of several processes give the model that the same federation gives in this one."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fl
from fl.bits import ClientBudget, FederatedBits
from fl.record import Failure, Reply, Request
from fl.run import InProcess, run_over
from fl.store import Store
from sdq.cost import Budget
from sdq.run_folder import RunFolder

pytest.importorskip("flwr")

Deploy = Callable[..., Any]  # of conftest.Deployment
EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"


class Without(InProcess):
    """Clients in this process, of which some die in some rounds."""

    died: Mapping[int, int] = {}
    """Of a round, counted from 0: the client."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            if request.kind == "train" and self.died.get(request.round) == request.client:
                yield Failure(request.client, "died")
            else:
                yield from super().ask([request])


def in_process(deployment: Any, died: Mapping[int, int] | None = None) -> fl.Federated:
    """Return the result of the same federation here."""
    setting, clients = deployment.setting(), deployment.clients()
    transport = Without(setting, clients, Store())
    transport.died = died or {}
    return run_over(setting, transport, len(clients))


def check_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare two states; every process computes with one thread, machines may reorder sums."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7), name


def check_same(deployment: Any, expected: fl.Federated) -> None:
    """Compare the server's run folder, and the hospitals', with a result."""
    found = load_file(deployment.home / "out" / "model.safetensors")
    assert found.keys() == expected.state.keys()
    check_close(found, expected.state)
    metrics = json.loads((deployment.home / "out" / "metrics.json").read_text())
    assert expected.specialization is not None
    assert metrics["specialization"]["clients"] == expected.specialization["clients"]
    for number, balanced in expected.specialization["clients"].items():
        (own,) = deployment.home.glob(f"kept/*/{number}/model")
        assert RunFolder.open(own).done
        document = json.loads((own / "metrics.json").read_text())
        assert document["float"]["balanced_accuracy"] == balanced


def check_evaluates(deployment: Any) -> None:
    """Measure what is in the run folders with the command line."""
    (own,) = deployment.home.glob("kept/*/1/model")
    measured = json.loads((own / "metrics.json").read_text())["float"]
    sdq = [sys.executable, "-m", "sdq.cli.main", "evaluate"]
    at_hospital = deployment.call(*sdq, str(own), "--quiet", "--json")
    assert json.loads(at_hospital)["float"] == measured
    images = str(deployment.home / "1.npz")
    server = deployment.call(*sdq, "out", "--data", images, "--quiet", "--json")
    assert json.loads(server)["float"]["num_examples"] == 12


@pytest.mark.slow
def test_with_tls_and_known_nodes_it_is_the_same_model(deploy: Deploy) -> None:
    """Two strangers in a hospital's place are refused, and the run goes on without them."""
    deployed = deploy(hospitals=3)
    deployed.start_all()
    deployed.certify("node", "stranger", "--folder", "stranger")
    deployed.start_node(1, "stranger")  # its key was never registered
    deployed.certify("server", "127.0.0.1", "--folder", "other")
    deployed.register("mistaken")
    deployed.start_node(1, "mistaken", ca="other/ca.pem")  # it trusts another authority
    deployed.run()
    deployed.wait("end", deployed.done)
    assert "Failed to activate SuperNode" in deployed.log("stranger")
    assert "certificate verify failed" in deployed.log("mistaken")
    for name in ("stranger", "mistaken"):
        assert deployed.processes[name].poll() not in (None, 0), name
    metrics = json.loads((deployed.home / "out" / "metrics.json").read_text())
    assert metrics["failures"] == []
    check_same(deployed, in_process(deployed))
    check_evaluates(deployed)


@pytest.mark.slow
def test_a_node_killed_in_mid_round_is_left_out_and_comes_back(deploy: Deploy) -> None:
    deployed = deploy(hospitals=3, rounds=5)  # enough for it to start again before the last
    deployed.start_all()
    deployed.run()
    trains = "Receiving: train message"
    deployed.wait("second round", lambda: deployed.log("hospital-1").count(trains) == 2)
    deployed.kill("hospital-1")
    deployed.wait("end of the second round", lambda: deployed.rounds() == 2)
    # flower refuses a node until it has missed the old one's heartbeats
    deployed.start_node(1, keep_up=True)
    deployed.wait("end", deployed.done)
    log = [json.loads(x) for x in (deployed.home / "out" / "log.jsonl").read_text().splitlines()]
    assert log[1]["replied"] == [0, 2]
    assert [f["client"] for f in log[1]["failures"]] == [1]
    assert log[-1]["replied"] == [0, 1, 2]
    died = {r["round"] - 1: 1 for r in log if 1 not in r["replied"]}
    check_same(deployed, in_process(deployed, died))


@pytest.mark.slow
def test_a_superlink_killed_and_started_again_ends_with_the_same_model(deploy: Deploy) -> None:
    """Nodes come back by themselves; the run does not, and is taken up by asking for it again."""
    deployed = deploy(hospitals=2, rounds=3)
    deployed.start_all(keep_up=True)
    deployed.run()
    trains = "Receiving: train message"
    deployed.wait("second round", lambda: deployed.log("hospital-0").count(trains) == 2)
    deployed.kill("link")
    assert deployed.rounds() == 1
    deployed.start_link()
    assert not deployed.done()
    deployed.run()
    deployed.wait("end", deployed.done)
    log = [json.loads(x) for x in (deployed.home / "out" / "log.jsonl").read_text().splitlines()]
    assert [r["replied"] for r in log] == [[0, 1]] * 3
    check_same(deployed, in_process(deployed))


@pytest.mark.slow
def test_without_tls_it_runs_on_one_machine(deploy: Deploy) -> None:
    """As the example is tried; FedPer's heads are collected from the nodes for evaluation."""
    deployed = deploy(secure=False, hospitals=2, rounds=1, method="fedper")
    deployed.start_all()
    deployed.run()
    deployed.wait("end", deployed.done)
    check_same(deployed, in_process(deployed))


def learned_in_process(
    deployed: Any, personal: dict[int, ClientBudget] | None = None
) -> FederatedBits:
    """Return the same federation with bits, without Flower."""
    shared = deployed.setting()
    found = fl.run(
        shared.model, quant=shared.quant, budget=shared.budget, method=shared.method,
        clients=deployed.clients(), num_classes=3, config=shared.config, phases=shared.phases,
        personal=personal, test=[], val=[],
    )  # fmt: skip
    assert isinstance(found, FederatedBits)
    return found


@pytest.mark.slow
def test_bits_are_learned_between_nodes(deploy: Deploy) -> None:
    """The superlink is killed in the search; what came of it leaves as a file that runs."""
    deployed = deploy(
        hospitals=2, method="fedper", rounds=1, bits=3.0,
        **{"search-rounds": 2, "client-bits": "1:2.0"},
    )  # fmt: skip
    deployed.deadline += 900  # three phases have many messages
    deployed.start_all(keep_up=True)
    deployed.run()
    deployed.wait("search", lambda: deployed.rounds() == 2)
    deployed.kill("link")
    deployed.start_link()
    deployed.run()
    deployed.wait("end", deployed.done)
    expected = learned_in_process(deployed, {1: ClientBudget(Budget(avg_weight_bits=2.0))})
    server = RunFolder.open(deployed.home / "out")
    assert server.read_policy() == expected.policy
    check_close(server.read_tensors("model.safetensors"), expected.state)
    for number in (0, 1):
        (own,) = deployed.home.glob(f"kept/*/{number}/model")
        assert RunFolder.open(own).read_policy() == expected.personal[number].policy
        check_close(load_file(own / "model.safetensors"), expected.personal[number].state)
    assert server.read_json("metrics.json")["clients"]["client 1"]["avg_weight_bits"] <= 2.0
    sdq = [sys.executable, "-m", "sdq.cli.main"]
    for folder in (server.path, own):
        images = str(deployed.home / "1.npz")
        words = ["evaluate", str(folder), "--data", images, "--quiet", "--json"]
        told = json.loads(deployed.call(*sdq, *words))
        assert told["quantized"]["num_examples"] == 12


SIMULATED = """
import json, sys
import hospitals
from fl.apps import client_app, server_app
from flwr.simulation import run_simulation

CONFIG, HOME = json.loads(sys.argv[1]), sys.argv[2]

def hospital(number, run, node):
    return hospitals.open_hospital(number, CONFIG, {"data": f"{HOME}/{number}.npz"})

def server(run):
    return hospitals.open_federation(CONFIG)

def finish(done, run):
    hospitals.finish(done, CONFIG)

run_simulation(
    server_app(server, finish),
    client_app(hospital),
    num_supernodes=2,
    backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}},
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 3.0])
def test_flowers_simulation_gives_the_same_model(bits: float | None, deploy: Deploy) -> None:
    pytest.importorskip("ray")
    learns = {} if bits is None else {"bits": bits, "rounds": 1, "search-rounds": 2}
    deployed = deploy(
        secure=False, hospitals=2, **{"method": "fedper", "keep-clients": False, **learns}
    )
    script = deployed.home / "simulated.py"
    script.write_text(SIMULATED)
    places = [str(EXAMPLE), deployed.env["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]
    deployed.env |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(places)}
    config = json.dumps({**deployed.config, "out": str(deployed.home / "out")})
    deployed.call(sys.executable, str(script), config, str(deployed.home))
    expected = learned_in_process(deployed) if learns else in_process(deployed)
    check_close(load_file(deployed.home / "out" / "model.safetensors"), expected.state)
