"""A superlink and two supernodes on loopback: the deployed federation gives the same model."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fl
from fl.method import ClientData
from sdq.data import DataOptions, open_data

pytest.importorskip("flwr")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
BIN = Path(sys.executable).parent
CONFIG = {
    "method": "fedper", "model": "mlp", "classes": 3, "image-shape": "1,8,8", "clients": 2,
    "rounds": 2, "batch-size": 8, "round-seconds": 120, "hyper": "{}", "local-epochs": 1,
    "lr": 0.001, "participation": 1.0, "seed": 0,
}  # fmt: skip
PATIENCE = 240  # seconds for a run of 2 rounds: a process of its own for each message


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def write_hospital(path: Path, seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", 24), ("test", 12)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        images[labels == 0, :4] += 100
        images[labels == 1, 4:] += 100
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez(path, class_names=np.array(list("abc")), **arrays)


class Deployed:
    """Processes of one federation; all of them end with it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self.env = {**os.environ, **quiet, "FLWR_HOME": str(home / "flwr"), "OMP_NUM_THREADS": "1"}
        # subprocesses of Flower must find its commands, and this source tree
        self.env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.env["PYTHONPATH"] = str(Path(fl.__file__).parents[1])
        self.processes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def start(self, *command: object) -> None:
        log = (self.home / f"log{len(self.processes)}").open("wb")
        words = [str(word) for word in command]
        self.processes.append(
            subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                env=self.env,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
            )
        )
        log.close()

    def end(self) -> None:
        for process in reversed(self.processes):
            # the group: Flower starts a process for each app
            os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(20)

    def logs(self) -> str:
        return "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}"
            for p in sorted(self.home.glob("log*"))
        )


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployed]:
    if shutil.which("flower-superlink", path=str(BIN)) is None:
        pytest.skip("Flower's commands are not installed")
    found = Deployed(tmp_path)
    try:
        yield found
    finally:
        found.end()


def in_process(home: Path) -> fl.Federated:
    """Return the result of the same federation here."""
    spec = importlib.util.spec_from_file_location("hospitals", EXAMPLE / "hospitals.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    setting = example.open_setting(CONFIG)
    clients = []
    for k in range(2):
        splits = open_data(str(home / f"{k}.npz"), DataOptions(), every_class=False)
        clients.append(ClientData(f"hospital {k}", splits.train, splits.val, splits.test))
    model = {n.removeprefix("model."): t for n, t in setting.initial.items()}
    setting.network.model.load_state_dict(model)
    return fl.run(
        setting.network.model, method=setting.method, clients=clients, num_classes=3,
        config=setting.config,
    )  # fmt: skip


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
def test_flowers_simulation_gives_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for k in range(2):
        write_hospital(tmp_path / f"{k}.npz", k, 3 - k)
    script = tmp_path / "simulated.py"
    script.write_text(SIMULATED)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    quiet |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    places = [str(EXAMPLE), str(Path(fl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    config = json.dumps({**CONFIG, "out": str(tmp_path / "out")})
    done = subprocess.run(
        [sys.executable, str(script), config, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(places)}, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = in_process(tmp_path)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.state.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_a_superlink_with_two_supernodes_gives_the_same_model(deployed: Deployed) -> None:
    home = deployed.home
    for k in range(2):
        write_hospital(home / f"{k}.npz", k, 3 - k)  # the second has no third class
    shutil.copytree(EXAMPLE, home / "app")
    link, *nodes = free_ports(3)
    (home / "flwr").mkdir()
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\n'
        f'address = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    deployed.start(
        "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link,
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    for k, port in enumerate(nodes):
        deployed.start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
            "--host", "127.0.0.1", "--port", port,
            "--node-config", f'partition-id={k} data="{home}/{k}.npz" folder="{home}/kept"',
        )  # fmt: skip
    words = {**CONFIG, "out": str(home / "out")}
    run_config = " ".join(f"{k}={json.dumps(v)}" for k, v in words.items())
    deadline = time.monotonic() + PATIENCE
    while True:  # until the superlink listens
        asked = subprocess.run(
            [str(BIN / "flwr"), "run", str(home / "app"), "here", "--run-config", run_config],
            env=deployed.env, capture_output=True, text=True, timeout=PATIENCE, cwd=home,
            check=False,
        )  # fmt: skip
        if asked.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert asked.returncode == 0, asked.stdout + asked.stderr + deployed.logs()
    while not (home / "out" / "metrics.json").exists():
        assert time.monotonic() < deadline, deployed.logs()
        time.sleep(1)
    expected = in_process(home)
    found = load_file(home / "out" / "model.safetensors")
    for name, tensor in expected.state.items():
        # every process computes with one thread; between machines sums may be reordered
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7), name
    metrics = json.loads((home / "out" / "metrics.json").read_text())
    assert metrics["history"][0]["replied"] == [0, 1]
    assert metrics["specialization"]["balanced_accuracy"] == pytest.approx(
        expected.specialization["balanced_accuracy"]
    )
