"""Two processes end where one does: float training, search, fine-tuning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdq.checkpoint import load_tensors
from sdq.errors import RequestError
from sdq.parallel import open_fabric, own_share


class Rank:
    """One of several processes, as far as the division of a batch asks."""

    def __init__(self, rank: int, world: int) -> None:
        self.global_rank, self.world_size = rank, world


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 16])
def test_the_weighted_means_of_the_shares_average_to_the_batch_s_mean(
    world: int, count: int
) -> None:
    images, labels = torch.arange(count).double(), torch.arange(count)
    shares = [own_share(Rank(r, world), images, labels) for r in range(world)]  # type: ignore[arg-type]
    mean = sum(w * float(x.mean()) for x, _, w in shares) / world
    assert mean == pytest.approx(float(images.mean()), rel=1e-12)
    assert all(torch.equal(x.long(), y) for x, y, _ in shares)
    assert all(len(y) >= min(count, 2) for _, y, _ in shares)  # batch norm needs two
    if count >= 2 * world:  # each image once
        assert torch.equal(torch.cat([y for _, y, _ in shares]), labels)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(RequestError, match="--device: must be auto, cpu or cuda, got 'tpu'"):
        open_fabric("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="--device: cuda must be available"):
            open_fabric("cuda", 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        script = Path(__file__).with_name("two_processes.py")
        command = [sys.executable, "-P", str(script), str(processes), str(out)]
        # what one process prints is of no interest unless it fails
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return out


def tensors(results: Path, process: str, name: str) -> dict[str, Tensor]:
    return load_tensors(results / process / f"{name}.safetensors")[0]


def document(results: Path, process: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / process / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", ["float", "shuffled", "quantized"])
@pytest.mark.slow
def test_two_processes_end_where_one_does(results: Path, name: str) -> None:
    one, two = tensors(results, "1-0", name), tensors(results, "2-0", name)
    assert one.keys() == two.keys()
    for key in one:
        # the mean of two halves rounds otherwise than that of the whole, in every step
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_the_losses_are_the_whole_batch_s(results: Path) -> None:
    one, two = document(results, "1-0")["losses"], document(results, "2-0")["losses"]
    assert {k: len(v) for k, v in one.items()} == {"train": 15, "search": 15, "finetune": 15}
    for phase, losses in one.items():
        assert two[phase] == pytest.approx(losses, rel=2e-3), phase


@pytest.mark.slow
def test_bits_and_best_epoch_are_the_same(results: Path) -> None:
    found = [document(results, process) for process in ("1-0", "2-0", "2-1")]
    assert found[0]["bits"] == found[1]["bits"] == found[2]["bits"]
    for phase in ("train", "finetune"):
        best = [one["best"][phase] for one in found]
        assert best[1] == best[2]
        assert best[0]["best_epoch"] == best[1]["best_epoch"]


@pytest.mark.parametrize("name", ["float", "shuffled", "bn", "averaged", "quantized"])
@pytest.mark.slow
def test_both_processes_hold_the_same_to_the_bit(results: Path, name: str) -> None:
    first, second = tensors(results, "2-0", name), tensors(results, "2-1", name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_the_first_process_alone_writes_and_speaks(results: Path) -> None:
    for phase in ("train", "search", "finetune"):
        assert (results / "2-0" / f"checkpoint-{phase}.safetensors").exists()
        assert not (results / "2-1" / f"checkpoint-{phase}.safetensors").exists()
    assert document(results, "2-1")["losses"] == {}
