"""``sdq federate --bits``: a run that the other verbs take, for all and for single clients."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sdq.policy import BitwidthPolicy

COMMON = (
    "federate --batch-size 8 --clients 3 --choices 1,2,4,8 --search-rounds 1 --tune-rounds 1 "
    "--no-plots --quiet --json"
)


@pytest.fixture
def command(files):
    return f"{COMMON} --model mlp --data {files}/ok.npz"


@pytest.fixture(scope="module")
def learned(sdq, files, tmp_path_factory):
    """A run with two clients of three that have budgets of their own."""
    run = tmp_path_factory.mktemp("bits") / "r"
    command = (
        f"{COMMON} --model mlp --data {files}/ok.npz --rounds 1 --bits 3 --keep-clients --out {run}"
    )
    own = ("--client-target", "client 0=bits:1.5", "--client-target", "2=pynq_z2:fps=100")
    done = sdq(f"{command} --out {run}", *own)
    assert done.code == 0, done.err
    return run, done


def test_a_run_folder_is_that_of_a_quantized_run(sdq, learned):
    run, done = learned
    metrics = json.loads((run / "metrics.json").read_text())
    assert done.json == {"out": str(run), "metrics": metrics}
    assert metrics["avg_weight_bits"] <= 3
    for kind in ("float", "quantized", "generalization", "specialization"):
        assert 0 <= metrics[kind]["balanced_accuracy"] <= 1
    assert list(metrics["phases"]) == ["float", "search", "tune"]
    parts = metrics["phases"].values()
    assert metrics["bytes_up"] > sum(p["bytes_up"] for p in parts)  # and what was told before
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in log] == ["federate", "search rounds", "tune rounds", "search"]
    assert log[-1]["trajectory"][0][0] == 1.0
    measured = sdq(f"evaluate {run} --quiet --json")
    assert measured.code == 0, measured.err
    assert measured.json["quantized"] == metrics["quantized"]
    assert measured.json["float"] == metrics["float"]
    costs = sdq(f"cost {run} --quiet --json")
    assert costs.json["total"]["avg_weight_bits"] == metrics["avg_weight_bits"]


def test_it_leaves_verified(sdq, learned, tmp_path):
    run, _ = learned
    done = sdq(
        f"export {run} --format onnx --verify --samples 20 --quiet --json --out {tmp_path}/x"
    )
    assert done.code == 0, done.err
    assert done.json["verification"]["verified"] is True


def test_a_client_with_its_own_budget_has_a_folder_below_it(sdq, learned, tmp_path):
    run, done = learned
    clients = done.json["metrics"]["clients"]
    assert {name: c["folder"] for name, c in clients.items()} == {
        f"client {k}": f"clients/client_{k}" for k in range(3)
    }  # fmt: skip
    assert clients["client 0"]["avg_weight_bits"] <= 1.5
    own = run / "clients" / "client_0"
    assert BitwidthPolicy.load(own / "policy.json").avg_weight_bits <= 1.5
    # measured on the client's own images, there and here
    measured = sdq(f"evaluate {own} --quiet --json").json["quantized"]
    stored = json.loads((own / "metrics.json").read_text())["quantized"]
    assert measured == clients["client 0"]["quantized"] == stored
    assert 0 < measured["num_examples"] < 35
    # the client in between has everyone's bits
    between = BitwidthPolicy.load(run / "clients" / "client_1" / "policy.json")
    assert between == BitwidthPolicy.load(run / "policy.json")
    on_device = sdq(f"cost {run}/clients/client_2 --target pynq_z2 --fps 100 --quiet --json")
    assert on_device.json["total"]["fits"] is True
    done = sdq(
        f"export {own} --format onnx --verify --samples 20 --quiet --json --out {tmp_path}/x"
    )
    assert done.json["verification"]["verified"] is True


def test_from_a_trained_run_without_rounds_in_float(sdq, files, tmp_path):
    command = COMMON.replace("--search-rounds 1", "--search-method uniform")
    done = sdq(f"{command} --from {files}/float --data {files}/ok.npz --bits 2 --out {tmp_path}/r")
    assert done.code == 0, done.err
    assert list(done.json["metrics"]["phases"]) == ["tune"]
    float_file, first = (load_file(p) for p in (
        tmp_path / "r" / "float.safetensors", files / "float" / "model.safetensors"
    ))  # fmt: skip
    assert all(torch.equal(t, first[n]) for n, t in float_file.items())
    policy = BitwidthPolicy.load(tmp_path / "r" / "policy.json")
    assert {b.weight_bits for b in policy if b.searched} == {2}
    # the normalisation that the network was trained with, not the federation's own
    mean = [json.loads((p / "run.json").read_text())["data"]["mean"]
            for p in (tmp_path / "r", files / "float")]  # fmt: skip
    assert mean[0] == mean[1]


# in the search; among what is written of the result
@pytest.mark.parametrize("number", [12, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_in_any_write_it_goes_on(sdq, command, learned, tmp_path, writes, number):
    run, undisturbed = learned
    own = ("--client-target", "client 0=bits:1.5", "--client-target", "2=pynq_z2:fps=100")
    command = f"{command} --rounds 1 --bits 3 --keep-clients --out {tmp_path}/killed"
    with writes.killed_in(number):
        sdq(command, *own)
    again = sdq(f"{command} --resume", *own)
    assert again.code == 0, again.err
    assert again.json["metrics"] == undisturbed.json["metrics"]
    for file in ("model.safetensors", "clients/client_0/model.safetensors"):
        a, b = load_file(tmp_path / "killed" / file), load_file(run / file)
        assert all(torch.equal(a[n], b[n]) for n in b)


def test_what_leaves_is_told_of_every_phase(sdq, command):
    done = sdq(f"{command} --rounds 1 --bits 3 --what-leaves")
    assert done.code == 0, done.err
    leaves = done.json["leaves"]
    assert list(leaves) == ["fedavg, float", "fedavg, search", "fedavg, tune"]
    beside = {
        phase: {(t["way"], t["group"]) for t in found["tensors"] if t["group"] != "model"}
        for phase, found in leaves.items()
    }
    assert beside["fedavg, float"] == set()
    begins = ("down", "network")
    assert beside["fedavg, search"] == {
        begins, ("up", "act_scales"), ("up", "bits"), ("down", "bits")
    }  # fmt: skip
    assert beside["fedavg, tune"] == {begins, ("up", "act_scales")}
    network, told = (
        {t["name"] for t in found["tensors"] if (t["way"], t["group"]) == place}
        for found, place in (
            (leaves["fedavg, search"], begins), (leaves["fedavg, float"], ("down", "model"))
        )
    )  # fmt: skip
    assert {f"model.{name}" for name in network} == told
    assert "policy" in {v["name"] for v in leaves["fedavg, tune"]["values"]}
    scales = [t for t in leaves["fedavg, tune"]["tensors"] if t["group"] == "act_scales"]
    assert {t["bytes"] for t in scales} == {4}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--bits 3", "--rounds: must say how many rounds there are, got none"),
        ("--rounds 1", "--choices: must stand with a budget of bits"),
        ("--rounds 1 --bits 0.5", "average weight bits must be at least 1"),
        ("--rounds 1 --bits 2 --policy p.json", "--policy: must stand without a budget, got both"),
        ("--rounds 1 --bits 2 --search-method hessian", "'uniform'"),
        ("--rounds 1 --bits 2 --method local", "local: bits must be learned with a server's model"),
        ("--rounds 1 --bits 2 --client-target 1", "must be 'NAME=bits:2.0', weight_kb or bops_g"),
        ("--rounds 1 --bits 2 --client-target 7=bits:2", "or its number from 0 to 2, got '7'"),
        ("--rounds 1 --bits 2 --client-target 1=bits:x", "must be numbers separated by commas"),
        ("--rounds 1 --bits 2 --client-target 1=bits:2 --client-target 1=bits:3",
         "must name each client once, got '1' again"),
        ("--rounds 1 --bits 2 --client-target 1=bits:0.5", "must be at least 1"),
        ("--rounds 1 --bits 2 --client-target 1=nowhere:fps=1", "nowhere"),
    ],
)  # fmt: skip
def test_a_wrong_request_leaves_nothing(sdq, command, tmp_path, more, message):
    done = sdq(f"{command} {more} --out {tmp_path}/r")
    assert done.code == 2, done.err
    assert message in done.err
    assert not (tmp_path / "r").exists()
