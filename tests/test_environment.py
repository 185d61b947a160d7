"""Where a run may find itself: odd paths, locales, masks, a folder that others use, many turns."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fl
import sdq
from fl import ClientData
from sdq.errors import RequestError
from sdq.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
ASKED = {"verb": "train"}


HOLD = """
import sys, time
from pathlib import Path
from sdq.run_folder import RunFolder
with RunFolder.create(Path(sys.argv[1]), {"verb": "train"}, resume=False):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return a process that holds the folder ``run``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_and_a_killed_process_leaves_it_free(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RequestError, match="another sdq process is working in this folder"):
        RunFolder.create(tmp_path / "run", ASKED, resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()  # stale, and no obstacle
    with RunFolder.create(tmp_path / "run", ASKED, resume=True) as run:
        run.update(status="done")
    assert RunFolder.open(tmp_path / "run").done


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "de_DE.UTF-8"])
def test_a_run_in_any_locale_with_odd_paths_and_a_tight_mask(tmp_path: Path, locale: str) -> None:
    home = tmp_path / "Ordner mit Leerzeichen é漢"
    home.mkdir()
    environment = {**os.environ, "LC_ALL": locale, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "sdq"]
    data = ["--data", "synthetic_ich", "--quiet"]
    for arguments in (
        ["train", "--model", "mlp", *data, "--epochs", "1", "--out", "f q"],
        ["quantize", "--from", "f q", *data, "--bits", "2", "--search-method", "uniform",
         "--epochs", "1", "--out", "q é"],
        ["evaluate", "q é", "--json"],
    ):  # fmt: skip
        done = subprocess.run(
            [*command, *arguments], cwd=home, env=environment, capture_output=True, umask=0o077,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
    files = [p for p in (home / "q é").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not any(p.stat().st_mode & 0o077 for p in files)
    assert "," not in (home / "q é" / "policy.json").read_text().split('"avg_weight_bits": ')[1][:3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="closed"):
        RunFolder.create(tmp_path / "closed" / "run", ASKED, resume=False)


def test_half_a_character_of_a_file_does_not_stop_what_is_printed() -> None:
    """JSON can have such, and no terminal has it."""
    code = "from sdq.cli import main as m; m.main = lambda _: print('a \\ud800 b'); m.run()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a \\ud800 b\n"


# ------------------------------------------------------------------------------------ many turns


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def grows(turn: Callable[[int], None], warm: int, turns: int) -> tuple[int, int]:
    """Return by how many bytes and open files a process grows over some turns after the first."""
    for i in range(warm):
        turn(i)
    memory, files = _resident(), _open_files()
    for i in range(turns):
        turn(warm + i)
    return _resident() - memory, _open_files() - files


@pytest.mark.slow
def test_many_quantizations_leave_nothing_behind(
    tmp_path: Path, toy: Callable[..., nn.Module], batches: Callable[..., Any],
    sample: torch.Tensor,
) -> None:  # fmt: skip
    pytest.importorskip("qonnx")
    import export

    def turn(i: int) -> None:
        loader = batches(2)
        qmodel = sdq.quantize(toy(), sdq.QuantConfig(), sample=sample)
        sdq.calibrate_(qmodel, loader)
        budget, config = sdq.Budget(avg_weight_bits=3.0), sdq.SearchConfig(epochs=1)
        policy = sdq.search(qmodel, loader, budget=budget, config=config)
        sdq.apply_policy_(qmodel, policy)
        sdq.calibrate_(qmodel, loader)
        sdq.finetune_(qmodel, loader, teacher=toy(), config=sdq.TrainConfig(epochs=1))
        sdq.evaluate(qmodel, loader)
        for name in ("onnx", "qonnx"):
            export.write(qmodel, tmp_path / name, format=name, sample=sample, overwrite=True)
            inputs = loader[0][0][:2]
            assert export.verify(qmodel, tmp_path / name, format=name, inputs=inputs).verified

    memory, files = grows(turn, 4, 12)
    # a network with its graph and sessions is some 2 MB: twelve that stay would be beyond this
    assert memory < 16 * 2**20
    assert files <= 0


@pytest.mark.slow
def test_many_federations_leave_nothing_behind(
    tmp_path: Path, tiny: Callable[..., nn.Module], hospitals: Callable[..., list[ClientData]]
) -> None:
    def turn(i: int) -> None:
        config = fl.FederationConfig(rounds=3, batch_size=4)
        fl.run(
            tiny(), method="scaffold", clients=hospitals(), num_classes=3, config=config,
            folder=tmp_path / str(i),
        )  # fmt: skip

    memory, files = grows(turn, 3, 10)
    assert memory < 16 * 2**20
    assert files <= 0
