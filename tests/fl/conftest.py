"""Federations of several processes on loopback, as docs/how-to-deploy-a-federation.md has it."""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fl
from fl.phase_settings import PhaseSettings
from fl.setting import Setting
from sdq.data import DataOptions, open_data

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PATIENCE = 900
"""Seconds for a run of few rounds: a process of its own for each message, on a busy machine."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hospitals", EXAMPLE / "hospitals.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


class Deployment:
    """Processes of one federation, the hospitals' images, and the same federation in process."""

    def __init__(self, home: Path, secure: bool, hospitals: int, **config: Any) -> None:
        self.home, self.secure, self.hospitals = home, secure, hospitals
        self.config: dict[str, Any] = {
            "method": "ditto", "model": "mlp", "classes": 3, "class-names": "a,b,c",
            "image-shape": "1,8,8", "clients": hospitals, "rounds": 2, "batch-size": 8,
            "round-seconds": 300,
            "hyper": "{}", "local-epochs": 1, "lr": 0.001, "participation": 1.0, "seed": 0,
            "keep-clients": True, "bits": 0.0, "act-bits": 4, "search-rounds": 1, "tune-rounds": 1,
            "client-bits": "", **config,
        }  # fmt: skip
        self.env = {**os.environ, **QUIET, "FLWR_HOME": str(home / "flwr"), "OMP_NUM_THREADS": "1"}
        # subprocesses of Flower must find its commands, and this source tree
        self.env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.env["PYTHONPATH"] = str(Path(fl.__file__).parents[1])
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.deadline = time.monotonic() + PATIENCE
        self.port = free_port()
        shutil.copytree(EXAMPLE, home / "app", ignore=shutil.ignore_patterns("__pycache__"))
        for k in range(hospitals):
            self._write_hospital(k)
        if secure:
            self.certify("server", "127.0.0.1", "--folder", "server")
        (home / "flwr").mkdir()
        trust = f'root-certificates = "{home}/server/ca.pem"' if secure else "insecure = true"
        (home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust}\n'
        )

    def _write_hospital(self, number: int) -> None:
        """Write images of three classes; every second hospital has none of the third.

        And numbers the two that it has the other way round.
        """
        rng = np.random.default_rng(number)
        arrays = {}
        for part, count in (("train", 24), ("test", 12)):
            labels = np.arange(count) % (3 - number % 2)
            images = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
            images[labels == 0, :4] += 100
            images[labels == 1, 4:] += 100
            own = 1 - labels if number % 2 else labels
            arrays |= {f"{part}_images": images, f"{part}_labels": own}
        names = np.array(list("ba" if number % 2 else "abc"))
        np.savez(self.home / f"{number}.npz", class_names=names, **arrays)

    # --- processes

    def certify(self, *words: str) -> None:
        self.call(sys.executable, str(EXAMPLE / "certificates.py"), *words)

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def start(self, name: str, *command: object, keep_up: bool = False) -> None:
        """Start a command; ``keep_up`` starts it again when it ends, as systemd would."""
        words = [str(BIN / str(command[0])), *(str(word) for word in command[1:])]
        if keep_up:
            words = ["sh", "-c", f"while true; do {shlex.join(words)}; sleep 5; done"]
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words, env=self.env, stdout=log, stderr=log, cwd=self.home, start_new_session=True
            )

    def start_link(self) -> None:
        trust: list[object] = ["--insecure"]
        if self.secure:
            trust = [
                "--ssl-ca-certfile", "server/ca.pem", "--ssl-certfile", "server/server.pem",
                "--ssl-keyfile", "server/server.key", "--enable-supernode-auth",
            ]  # fmt: skip
        self.start(
            "link", "flower-superlink", *trust, "--host", "127.0.0.1", "--port", self.port,
            "--database", "state.db", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.wait("the superlink", self._listens)

    def _listens(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0

    def register(self, name: str) -> None:
        """Make a node's key and tell the superlink of it."""
        self.certify("node", name, "--folder", name)
        self.call("flwr", "supernode", "register", f"{name}/{name}.pub", "here")

    def start_node(
        self, number: int, name: str = "", ca: str = "server/ca.pem", keep_up: bool = False
    ) -> None:
        name = name or f"hospital-{number}"
        trust: list[object] = ["--insecure"]
        if self.secure:
            key = f"{name}/{name}"
            trust = ["--root-certificates", ca, "--auth-supernode-private-key", key]
        config = f'partition-id={number} data="{self.home}/{number}.npz" folder="{self.home}/kept"'
        self.start(
            name, "flower-supernode", *trust, "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_port(), "--node-config", config, keep_up=keep_up,
        )  # fmt: skip

    def start_all(self, keep_up: bool = False) -> None:
        self.start_link()
        for k in range(self.hospitals):
            if self.secure:
                self.register(f"hospital-{k}")
            self.start_node(k, keep_up=keep_up)

    def run(self) -> None:
        words = {**self.config, "out": str(self.home / "out")}
        run_config = " ".join(f"{k}={json.dumps(v)}" for k, v in words.items())
        self.call("flwr", "run", str(self.home / "app"), "here", "--run-config", run_config)

    def kill(self, name: str) -> None:
        """Kill a process and those of its group, without a chance to say so."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)

    def end(self) -> None:
        for process in reversed(self.processes.values()):
            # the group: Flower starts a process for each app
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)

    # --- what came of it

    def wait(self, what: str, until: Callable[[], object]) -> None:
        while not until():
            assert time.monotonic() < self.deadline, f"no {what}\n{self.logs()}"
            time.sleep(0.5)

    def log(self, name: str) -> str:
        path = self.home / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        found = sorted(self.home.glob("*.log"))
        return "\n".join(f"--- {p.name}\n{self.log(p.stem)[-3000:]}" for p in found)

    def rounds(self) -> int:
        """Return how many rounds the server has written."""
        path = self.home / "out" / "log.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def done(self) -> bool:
        path = self.home / "out" / "run.json"
        return path.exists() and json.loads(path.read_text())["status"] == "done"

    def setting(self) -> Setting | PhaseSettings:
        found: Setting | PhaseSettings = load_example().open_setting(self.config)
        return found

    def clients(self) -> list[fl.ClientData]:
        found = []
        for k in range(self.hospitals):
            splits = open_data(str(self.home / f"{k}.npz"), DataOptions(), every_class=False)
            splits = splits.numbered(("a", "b", "c"))
            found.append(fl.ClientData(f"hospital {k}", splits.train, splits.val, splits.test))
        return found


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    """Return a function that prepares a federation; its processes end with the test."""
    if shutil.which("flower-superlink", path=str(BIN)) is None:
        pytest.skip("Flower's commands are not installed")
    made: list[Deployment] = []

    def make(secure: bool = True, hospitals: int = 3, **config: Any) -> Deployment:
        made.append(Deployment(tmp_path, secure, hospitals, **config))
        return made[-1]

    yield make
    for each in made:
        each.end()
