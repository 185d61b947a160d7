"""``sdq federate``: what it writes, what it refuses, and that a killed run goes on."""

import csv
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fl.bits import PhasesConfig
from fl.config import FederationConfig
from sdq.cli.federate import federate
from sdq.cli.plan import FIELDS

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, side):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, classes)
    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(torch.relu(self.hidden(x)))

def build(num_classes, image_size): return Net(num_classes, image_size)
"""
COMMON = "federate --rounds 2 --batch-size 16 --quiet --json"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A network, and images of three classes that are bright in different places."""
    home = tmp_path_factory.mktemp("federate")
    (home / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 90), ("val", 30), ("test", 45)):
        labels = np.arange(count) % 3
        images = rng.normal(90, 30, (count, 8, 8, 3))
        images[labels == 0, :4] += 90
        images[labels == 1, 4:] += 90
        images[labels == 2, :, :4] += 90
        arrays[f"{part}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(home / "d.npz", **arrays)
    return home


@pytest.fixture
def command(home):
    return f"{COMMON} --model {home}/net.py:build --data {home}/d.npz"


@pytest.fixture(scope="module")
def federated(sdq, home):
    """A run of FedAvg, and one of two methods."""
    start = f"{COMMON} --model {home}/net.py:build --data {home}/d.npz --clients 3"
    done = {}
    for name, methods in (("one", "fedavg"), ("two", "fedavg,fedper")):
        done[name] = sdq(f"{start} --method {methods} --out {home}/{name}")
        assert done[name].code == 0, done[name].err
    return done


def test_a_run_folder_says_everything(home, federated):
    run = home / "one"
    metrics = json.loads((run / "metrics.json").read_text())
    assert federated["one"].json == {"out": str(run), "metrics": metrics}
    for kind in ("float", "generalization", "specialization"):
        figures = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "per_class_recall", "ece")
        assert set(figures) <= set(metrics[kind])
    assert metrics["rounds"] == 2
    assert metrics["worst_client"].startswith("client ")
    # each round 3 clients send and receive every tensor of the network once
    tensors = load_file(run / "model.safetensors")
    assert (
        metrics["bytes_up"] == metrics["bytes_down"] == 6 * sum(t.nbytes for t in tensors.values())
    )
    document = json.loads((run / "run.json").read_text())
    assert document["status"] == "done"
    assert document["methods"] == ["fedavg"]
    # one value a channel that says nothing of the images
    assert document["data"]["mean"] == [0.5, 0.5, 0.5]
    assert sum(c["num_examples"]["train"] for c in document["clients"]) == 90
    assert sum(c["num_examples"]["test"] for c in document["clients"]) == 45
    assert np.sum([c["class_counts"] for c in document["clients"]], 0).tolist() == [30, 30, 30]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["round"] for r in log] == [1, 2]
    assert all(r["bytes_up"] == metrics["bytes_up"] / 2 for r in log)
    assert all({"train_loss", "generalization", "specialization"} <= set(r) for r in log)


def test_the_servers_model_is_measured_on_the_sets_own_test_images(sdq, home, federated):
    done = sdq(f"evaluate {home}/one --quiet --json")
    assert done.code == 0, done.err
    found = federated["one"].json["metrics"]
    assert done.json["float"] == found["float"]
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "auc"):
        # the same images in another order
        assert found["generalization"][key] == pytest.approx(found["float"][key])


def test_a_federated_run_can_be_quantized(sdq, home, federated, tmp_path):
    done = sdq(
        f"quantize --from {home}/one --data {home}/d.npz --bits 4 --search-method uniform "
        f"--choices 2,4 --epochs 0 --quiet --json --out {tmp_path}/q"
    )
    assert done.code == 0, done.err
    assert done.json["metrics"]["float"] == federated["one"].json["metrics"]["float"]


def test_several_methods_have_a_folder_each_and_start_alike(sdq, home, federated):
    metrics = federated["two"].json["metrics"]["methods"]
    assert list(metrics) == ["fedavg", "fedper"]
    assert metrics["fedavg"] == federated["one"].json["metrics"]
    # FedPer keeps the head, 8 x 3 and 3 numbers, on 3 clients in 2 rounds; evaluation asks for it
    assert metrics["fedavg"]["bytes_down"] - metrics["fedper"]["bytes_down"] == 6 * 4 * 27
    lines = (home / "two" / "fedper" / "log.jsonl").read_text().splitlines()
    evaluated = sum("generalization" in json.loads(line) for line in lines)
    assert evaluated
    assert metrics["fedavg"]["bytes_up"] - metrics["fedper"]["bytes_up"] == (
        6 * 4 * 27 - evaluated * 3 * 4 * 27
    )
    for name in metrics:
        assert json.loads((home / "two" / name / "metrics.json").read_text()) == metrics[name]
    refused = sdq(f"evaluate {home}/two")
    assert refused.code == 2
    assert f"one model, got one for each of fedavg, fedper; give {home}/two/fedavg" in refused.err


def test_the_table_compares_the_methods(sdq, home, command, tmp_path):
    shown = command.replace("--quiet --json", "")
    done = sdq(f"{shown} --clients 2 --method fedavg,local --out {tmp_path}/r")
    assert done.code == 0, done.err
    rows = [line.split("│")[1].strip() for line in done.out.splitlines() if "│" in line]
    assert rows == ["fedavg", "local"]
    assert "rounds" in done.err  # the bars
    refused = sdq(
        f"quantize --from {tmp_path}/r/local --data {home}/d.npz --bits 2 --out {tmp_path}/q"
    )
    assert refused.code == 2
    assert "must have a server's model, but parts of every client's stay with it" in refused.err


def test_centralized_names_the_worst_of_those_it_pools(sdq, command, tmp_path):
    done = sdq(f"{command} --clients 3 --method centralized --out {tmp_path}/r")
    assert done.code == 0, done.err
    metrics = done.json["metrics"]
    worst = metrics["specialization"]["worst_client"]
    assert metrics["worst_client"] == f"client {worst}"
    assert len(metrics["specialization"]["clients"]) == 3


@pytest.mark.parametrize("methods", ["fedper", "fedavg,fedper"])
def test_killed_in_any_write_a_federation_goes_on(sdq, command, tmp_path, writes, methods):
    command = f"{command} --clients 3 --participation 0.5 --method {methods} --out"
    undisturbed = sdq(command, tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.err
    count = writes.count
    assert count > 10
    expected = undisturbed.json["metrics"]
    for number in range(2, count + 1, max(1, count // 5)):  # the first is run.json itself
        out = tmp_path / f"killed{number}"
        with writes.killed_in(number):
            sdq(command, out)
        again = sdq(f"{command} {out} --resume")
        assert again.code == 0, again.err
        assert again.json["metrics"] == expected
        for name in methods.split(","):
            part = Path() if methods == name else Path(name)
            file = part / "model.safetensors"
            a, b = load_file(out / file), load_file(tmp_path / "whole" / file)
            assert all(torch.equal(a[n], b[n]) for n in b)


def test_figures_of_one_network_and_of_clients_own_are_not_held_against_each_other(
    sdq, command, tmp_path
):
    run = tmp_path / "r"
    done = sdq(f"{command} --clients 3 --method centralized,local --keep-clients --out {run}")
    assert done.code == 0, done.err
    found = sdq(f"compare {run}/centralized {run}/local --json --html {tmp_path}/c.html")
    assert found.code == 0, found.err
    assert [r["run"] for r in found.json["runs"]] == [
        f"{run}/centralized", f"{run}/local (clients' own)"
    ]  # fmt: skip
    assert "difference" not in found.json["runs"][1]
    assert "they cannot be compared" in (tmp_path / "c.html").read_text()
    twice = sdq(f"compare {run}/local {run}/local --json")
    assert twice.json["runs"][1]["difference"]["accuracy"] == 0
    # the one that has all images has no figures of its own: they would be the first hospital's
    pooled = json.loads((run / "centralized" / "clients" / "all" / "metrics.json").read_text())
    assert "float" not in pooled
    refused = sdq(f"report {run}/local/clients/client_1")
    assert refused.code == 2
    assert "must be a whole run, got the network of client 'client 1'" in refused.err
    assert sdq(f"report {run} --quiet").code == 0
    told = (run / "report.html").read_text()
    assert "There are 3 clients" in told
    assert "With local each client ended with a network of its own" in told
    assert "With centralized the images of all were in one place" in told
    assert "without showing each other" not in told


def test_a_client_without_training_images_is_left_out_of_every_phase(sdq, command, home, tmp_path):
    rows = [(i, ("north", "south", "tests")[min(i // 60, 2)], "train" if i < 120 else "test")
            for i in range(165)]  # fmt: skip
    path = tmp_path / "split.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("index", "client", "split"), *rows])
    run = tmp_path / "r"
    done = sdq(
        f"{command} --clients {path} --bits 3 --choices 2,4 --search-rounds 1 --tune-rounds 1 "
        f"--keep-clients --out {run}"
    )
    assert done.code == 0, done.err
    failures = json.loads((run / "metrics.json").read_text())["failures"]
    assert [(f["phase"], f["round"], f["client"]) for f in failures] == [
        ("float", 1, 2), ("float", 2, 2), ("search", 3, 2), ("tune", 4, 2)
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "clients").iterdir()) == ["north", "south"]
    assert sdq(f"report {run} --quiet").code == 0
    assert "in each of 4 rounds" in (run / "report.html").read_text()


def test_a_split_file_says_whose_each_image_is(sdq, command, home, tmp_path):
    """Two hospitals; the second's last images are tested on, wherever the set had them."""
    rows = [(i, "north" if i % 2 else "south", "test" if i >= 60 else "train") for i in range(120)]
    path = tmp_path / "split.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("index", "client", "split"), *rows])
    done = sdq(f"{command} --clients {path} --out {tmp_path}/r")
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "r" / "run.json").read_text())
    assert [c["name"] for c in document["clients"]] == ["north", "south"]
    assert [c["num_examples"]["test"] for c in document["clients"]] == [30, 30]
    # the images that the set has for training but the file for testing are not trained on later
    again = sdq(
        f"quantize --from {tmp_path}/r --data {home}/d.npz --bits 4 --search-method uniform "
        f"--choices 2,4 --epochs 0 --quiet --json --out {tmp_path}/q"
    )
    assert again.code == 0, again.err
    quantized = json.loads((tmp_path / "q" / "run.json").read_text())
    assert quantized["data"]["fingerprint"] == document["data"]["fingerprint"]
    assert quantized["data"]["num_examples"] == {"train": 60, "test": 60}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--clients 3 --method fedavgg", "did you mean 'fedavg'?"),
        ("--clients 3 --method fedavg,fedavg", "every method must be named once"),
        ("--clients 3 --method fedprox --hyper nu=1", "nu: must be a field, got 1"),
        ("--clients 3 --method fedprox --hyper mu=-1", "mu: input should be greater than"),
        ("--clients 3 --method fedprox --hyper mu=.1 --hyper mu=.2", "fedprox.mu must be given"),
        ("--clients 3 --method fedavg,fedprox --hyper mu=.1", "METHOD.KEY=VALUE of fedavg, fed"),
        ("--clients 3 --partition dirichlet:none", "dirichlet:ALPHA or one of counts:ich10"),
        ("--clients 3 --partition dirichlet:-1", "alpha must be positive"),
        ("--clients 3 --partition counts:ich11", "dirichlet:ALPHA or one of counts:ich10"),
        ("--clients 3 --partition counts:ich10", "must be 10 for --partition counts:ich10, got 3"),
        ("--partition iid", "--clients: must say how many"),
        ("--partition iid:1,2,x", "must be natural, iid, iid:SHARE,SHARE,..., dirichlet:ALPHA"),
        ("--partition iid:1,2,0", "shares must be positive and finite, got [1.0, 2.0, 0.0]"),
        ("--clients 2 --partition iid:1,2,3", "must be 3 for --partition iid:SHARE,..., got 2"),
        ("--partition natural", "data must say which centre each image is from"),
        ("--clients 0", "--clients: must be at least 1"),
        ("--clients 91", "clients must be from 1 to the 90 examples"),
        ("--clients few.csv", "must be a number or a file SPLIT.csv, got 'few.csv'"),
        ("--clients 3 --participation 0", "participation: input should be greater than 0"),
        ("--clients 3 --lr nan", "--lr: must be a finite number"),
        ("--clients 3 --compress 9", "--compress: must be BITS, or up=BITS,down=BITS, from 1 to 8"),
        ("--clients 3 --compress 4,policy", "policy_bits: must be off where no bits are learned"),
        ("--clients 3 --aggregation mode", "aggregation: must be mean, median or trimmed_mean:SH"),
        ("--clients 3 --method climb --aggregation median", "climb: must go without robust aggreg"),
        ("--clients 3 --head nowhere", "no linear layer 'nowhere'"),
    ],
)
def test_a_wrong_request_leaves_nothing(sdq, command, tmp_path, more, message):
    done = sdq(f"{command} {more} --out {tmp_path}/r")
    assert done.code == 2, done.err
    assert message in done.err
    assert not (tmp_path / "r").exists()


def test_a_config_file_has_what_has_no_option(sdq, command, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps(
            {
                "federation": {"lr_decay_every": 1, "rounds": 3},
                "loss": {"name": "focal", "gamma": 1.0},
                "methods": {"fedprox": {"mu": 0.5}},
            }
        )
    )
    refused = sdq(f"{command} --clients 2 --method fedprox --config {config} --out {tmp_path}/r")
    assert refused.code == 2
    assert "federation.rounds must be given once" in refused.err
    config.write_text(config.read_text().replace(', "rounds": 3', ""))
    done = sdq(f"{command} --clients 2 --method fedprox --config {config} --out {tmp_path}/r")
    assert done.code == 0, done.err
    asked = json.loads((tmp_path / "r" / "run.json").read_text())["request"]
    assert asked["federation"]["loss"]["gamma"] == 1.0
    assert asked["federation"]["lr_decay_every"] == 1
    assert asked["methods"] == {"fedprox": {"mu": 0.5}}


def test_each_clients_own_model_is_a_run_on_its_own_images(sdq, command, home, tmp_path):
    run = tmp_path / "r"
    done = sdq(f"{command} --clients 3 --method ditto --keep-clients --out {run}")
    assert done.code == 0, done.err
    special = done.json["metrics"]["specialization"]
    clients = json.loads((run / "run.json").read_text())["clients"]
    assert sorted(p.name for p in (run / "clients").iterdir()) == [
        "client_0", "client_1", "client_2"
    ]  # fmt: skip
    for number, client in enumerate(clients):
        own = run / "clients" / f"client_{number}"
        document = json.loads((own / "run.json").read_text())
        assert document["client"] == client["name"]
        assert document["data"]["num_examples"] == client["num_examples"]
        found = sdq(f"evaluate {own} --quiet --json")
        assert found.code == 0, found.err
        measured = found.json["float"]
        assert measured["num_examples"] == client["num_examples"]["test"]
        assert measured["balanced_accuracy"] == special["clients"][str(number)]
        assert measured == json.loads((own / "metrics.json").read_text())["float"]
    models = [load_file(run / "clients" / f"client_{k}" / "model.safetensors") for k in range(3)]
    assert not any(torch.equal(models[0][n], models[1][n]) for n in models[0] if "weight" in n)
    quantized = sdq(
        f"quantize --from {run}/clients/client_1 --data {home}/d.npz --bits 4 --quiet "
        f"--search-method uniform --choices 2,4 --epochs 0 --json --out {tmp_path}/q"
    )
    assert quantized.code == 0, quantized.err
    used = json.loads((tmp_path / "q" / "run.json").read_text())["data"]["num_examples"]
    assert used == clients[1]["num_examples"]  # nobody else's images
    assert quantized.json["metrics"]["float"]["num_examples"] == used["test"]


def test_without_the_option_no_clients_model_is_written(home, federated):
    assert not (home / "one" / "clients").exists()


def test_local_alone_has_clients_models_and_no_servers(sdq, command, tmp_path):
    done = sdq(f"{command} --clients 2 --method local --keep-clients --out {tmp_path}/r")
    assert done.code == 0, done.err
    found = sdq(f"evaluate {tmp_path}/r/clients/client_1 --quiet --json")
    assert found.code == 0, found.err
    special = done.json["metrics"]["specialization"]["clients"]
    assert found.json["float"]["balanced_accuracy"] == special["1"]


def test_what_leaves_is_listed_and_nothing_is_trained(sdq, command, tmp_path):
    more = "--clients 3 --method fedper,centralized --compress 4 --participation 0.5"
    done = sdq(f"{command} {more} --what-leaves")
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])["leaves"]
    assert found["centralized"]["images"] is True
    leaves = found["fedper"]
    names = {(t["way"], t["group"], t["name"]) for t in leaves["tensors"]}
    assert ("up", "model.codes", "model.conv.weight") in names
    assert not any("head" in name and group != "model" for _, group, name in names)
    # the head does not travel for training, but is asked for to evaluate the server's model
    (head,) = (t for t in leaves["tensors"] if t["name"] == "model.head.weight")
    assert (head["way"], head["when"]) == ("up", "at each evaluation")
    assert leaves["bytes_up_per_round"] > 0
    assert {"num_examples", "evaluations"} <= {v["name"] for v in leaves["values"]}
    shown = sdq(f"{command} {more} --what-leaves".replace("--quiet ", ""))
    assert "model.conv.weight" in shown.out
    assert "every image, to one place" in shown.out
    missing = sdq(f"{command} --clients 3")
    assert missing.code == 2
    assert "--out: must be given, got none" in missing.err


def test_few_bytes_and_privacy_are_in_the_metrics(sdq, command, tmp_path):
    config = tmp_path / "c.json"
    private = {"noise_from": "client", "clip": 0.1, "noise_multiplier": 2.0}
    federation = {"privacy": private, "count_epsilon": 1.0}
    config.write_text(json.dumps({"federation": federation}))
    more = "--clients 3 --batch-norm local_stats --participation 1"
    found = {}
    for name, options in (
        ("float", ""), ("few", "--compress up=2,down=4 --aggregation median"),
        ("private", f"--config {config}"),
    ):  # fmt: skip
        done = sdq(f"{command} {more} {options} --out {tmp_path}/{name}")
        assert done.code == 0, done.err
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert found["few"]["bytes_up"] < 0.4 * found["float"]["bytes_up"]
    assert found["few"]["bytes_down"] < 0.4 * found["float"]["bytes_down"]
    assert "privacy" not in found["float"]
    assert found["private"]["privacy"]["rounds"] == 2
    assert found["private"]["privacy"]["epsilon"] == pytest.approx(6.57, abs=0.2)


def test_other_images_are_not_gone_on_with(sdq, command, home, tmp_path):
    """A run that was interrupted goes on with the images it began with, or not at all."""
    arrays = dict(np.load(home / "d.npz"))
    np.savez(tmp_path / "d.npz", **arrays)
    again = command.replace(f"{home}/d.npz", f"{tmp_path}/d.npz")
    run = tmp_path / "r"
    assert sdq(f"{again} --clients 2 --method fedavg,fedper --out {run}").code == 0
    document = json.loads((run / "fedper" / "run.json").read_text())
    for folder in (run, run / "fedper"):
        known = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**known, "status": "running"}))
    np.savez(tmp_path / "d.npz", **{**arrays, "train_images": 255 - arrays["train_images"]})
    refused = sdq(f"{again} --clients 2 --method fedavg,fedper --out {run} --resume")
    assert refused.code == 2
    assert "data must be as when the run began, but other images are there now" in refused.err
    kept = json.loads((run / "fedper" / "run.json").read_text())
    assert kept["data"]["fingerprint"] == document["data"]["fingerprint"]


def test_a_model_of_which_parts_stay_with_the_clients_has_no_figures(sdq, command, home, tmp_path):
    (tmp_path / "apart.json").write_text(json.dumps({"federation": {"assemble": False}}))
    run = tmp_path / "r"
    options = f"--clients 3 --method fedper --config {tmp_path}/apart.json"
    done = sdq(f"{command} {options} --keep-clients --out {run}")
    assert done.code == 0, done.err
    assert done.json["metrics"]["generalization"] is None
    assert "float" not in done.json["metrics"]
    refused = sdq(f"evaluate {run}")
    assert refused.code == 2
    assert "parts of every client's stay with it" in refused.err
    assert sdq(f"evaluate {run}/clients/client_1").code == 0
    assert sdq(f"report {run} --quiet").code == 0


def test_clients_keep_their_models_with_privacy(sdq, command, home, tmp_path):
    private = {"noise_from": "client", "clip": 1.0, "noise_multiplier": 0.1}
    federation = {"privacy": private, "count_epsilon": 1.0, "batch_norm": "local_all"}
    (tmp_path / "private.json").write_text(json.dumps({"federation": federation}))
    run = tmp_path / "r"
    done = sdq(f"{command} --clients 3 --config {tmp_path}/private.json --keep-clients --out {run}")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (run / "clients").iterdir()) == [f"client_{k}" for k in range(3)]
    own = json.loads((run / "clients" / "client_0" / "metrics.json").read_text())
    assert "float" not in own  # figures would say something of the images
    assert sdq(f"evaluate {run}/clients/client_0").code == 0


def test_no_option_is_overruled_by_the_file():
    """A field that an option sets too is given once: each such option is known as one."""
    parameters = inspect.signature(federate).parameters.values()
    groups = (p.default for p in parameters if dataclasses.is_dataclass(p.default))
    options = {p.name for p in parameters} | {
        field.name for group in groups for field in dataclasses.fields(group)
    }
    for part, config in (("federation", FederationConfig), ("phases", PhasesConfig)):
        assert options & set(config.model_fields) <= set(FIELDS[part])


def test_other_data_are_measured_by_the_names_of_their_classes(sdq, home, tmp_path):
    """Another hospital's folder numbers the classes that it has."""
    arrays = dict(np.load(home / "d.npz"))
    np.savez(tmp_path / "all.npz", class_names=np.array(list("abc")), **arrays)
    order = np.array([1, 2, 0])  # a is 1 there, b 2, c 0
    turned = {k: order[v] if k.endswith("labels") else v for k, v in arrays.items()}
    np.savez(tmp_path / "turned.npz", class_names=np.array(list("cab")), **turned)
    run = tmp_path / "r"
    train = f"train --model {home}/net.py:build --data {tmp_path}/all.npz --epochs 1 --out {run}"
    assert sdq(f"{train} --quiet").code == 0
    own, other = (
        sdq(f"evaluate {run} --data {tmp_path}/{name}.npz --quiet --json").json["float"]
        for name in ("all", "turned")
    )
    assert other == own
    np.savez(tmp_path / "strange.npz", class_names=np.array(list("abx")), **arrays)
    done = sdq(f"evaluate {run} --data {tmp_path}/strange.npz --quiet")
    assert done.code == 2
    assert "must have the run's classes, a, b, c, got a, b, x" in done.err
