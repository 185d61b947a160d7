"""A disk that is full or read-only: a clear message, nothing half-written, nothing lost."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open


class Disk:
    """A file system in memory of a given size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: str) -> None:
        self._mount(f"remount,size={size}")

    def mount(self, options: str) -> None:
        try:
            self._mount(options)
        except (subprocess.CalledProcessError, FileNotFoundError):
            pytest.skip("mounting needs root")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        subprocess.run(command, check=True, capture_output=True)

    def whole(self) -> None:
        """Check that every file can be read, and none is left of an unfinished write."""
        for path in self.path.rglob("*"):
            assert path.suffix != ".part"
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                assert path.read_text().endswith("\n")
                assert all(json.loads(line) for line in path.read_text().splitlines())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    assert all(file.get_tensor(key).shape is not None for key in file.keys())  # noqa: SIM118


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    yield Disk(path)
    if path.is_mount():
        subprocess.run(["umount", str(path)], check=True)


TRAIN = "train --model mlp --data {f}/ok.npz --epochs 2 --quiet"
QUANTIZE = (
    "quantize --from {f}/float --data {f}/ok.npz --bits 2 --search-epochs 1 --epochs 2 --quiet"
)


@pytest.mark.parametrize("size", ["4k", "300k", "2m", "4500k", "6m"])
@pytest.mark.parametrize("verb", [TRAIN, QUANTIZE])
def test_a_run_on_a_full_disk_can_go_on(sdq, files, tmp_path, disk, verb, size):
    command = f"{verb.format(f=files)} --out"
    disk.mount(f"size={size}")
    run = disk.path / "run"
    done = sdq(command, run)
    assert (done.code, done.out) == (1, "")
    assert "disk is full; free some space and repeat the command with --resume" in done.err
    assert str(run) in done.err
    assert done.err.count("\n") == 1
    disk.whole()
    disk.resize("60m")
    assert sdq(f"{command} {run} --resume").code == 0
    disk.whole()
    assert sdq(command, tmp_path / "undisturbed").code == 0
    for name in ("model.safetensors", "metrics.json"):
        assert (run / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_run_that_could_write_nothing_starts_anew(sdq, files, disk):
    command = f"{TRAIN.format(f=files)} --out {disk.path / 'run'}"
    disk.mount("size=8k")
    (disk.path / "filler").write_bytes(bytes(8192))
    assert sdq(command).code == 1
    disk.whole()
    disk.resize("60m")
    assert sdq(command).code == 0


@pytest.mark.parametrize("format", ["onnx", "qonnx"])
@pytest.mark.parametrize("size", ["4k", "300k"])
def test_an_export_on_a_full_disk_leaves_nothing(sdq, files, disk, format, size):
    pytest.importorskip("onnx")
    disk.mount(f"size={size}")
    command = f"export {files / 'quantized'} --format {format} --out {disk.path / 'out'}"
    done = sdq(command)
    assert done.code == 1
    assert "disk is full; free some space and repeat the command\n" in done.err
    assert not any(disk.path.iterdir())
    disk.resize("60m")
    assert sdq(f"{command} --verify --samples 10").code == 0


def test_an_earlier_export_survives_a_full_disk(sdq, files, disk):
    pytest.importorskip("onnx")
    disk.mount("size=60m")
    out = disk.path / "out"
    command = f"export {files / 'quantized'} --overwrite --out {out}"
    assert sdq(command).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    disk.resize("500k")  # the file has 320 KB
    assert sdq(command).code == 1
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_read_only_disk_is_a_wrong_request(sdq, files, disk):
    disk.mount("ro")
    for command in (TRAIN, QUANTIZE, "export {f}/quantized"):
        done = sdq(f"{command.format(f=files)} --out", disk.path / "out")
        assert (done.code, done.out) == (2, "")
        assert "Read-only file system; choose a path you can read and write" in done.err


def test_a_run_on_a_read_only_disk_can_be_read(sdq, files, disk):
    disk.mount("size=60m")
    shutil.copytree(files / "quantized", disk.path / "run")
    disk.resize("60m,ro")
    assert sdq(f"evaluate {disk.path / 'run'} --quiet").code == 0
    assert sdq(f"cost {disk.path / 'run'} --quiet").code == 0
    done = sdq(f"export {disk.path / 'run'}")
    assert done.code == 2
    assert "Read-only file system" in done.err
