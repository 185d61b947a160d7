"""Damaged files: every reader answers with success or one sentence, and writes nothing."""

import importlib
import random
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdq.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # typer imports such

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = {"policy": 60, "npz": 25, "csv": 25, "images": 25, "split": 60, "config": 60,
         "weights": 60, "checkpoint": 25, "slices": 60, "federation": 3, "boxes": 60,
         "meta image": 25, "mask folder": 10, "node": 10}  # fmt: skip
SLOW_CASES = 10_000
"""Over all readers."""


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        return importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def corpus(fuzz: ModuleType) -> ModuleType:
    return sys.modules["_corpus"]


@pytest.fixture(scope="module")
def watch(fuzz: ModuleType) -> Any:
    return fuzz.Watch()


def run(
    fuzz: ModuleType, corpus: ModuleType, watch: Any, sound: Path, name: str, count: int
) -> None:
    reader = corpus.READERS[name]
    corpus.write(sound, {reader.folder})
    assert fuzz.check_sound(reader, sound, watch) is None
    assert fuzz.run_cases(name, sound, range(count), 7, watch) == []


@pytest.mark.parametrize("name", QUICK)
def test_damage_is_refused_in_a_sentence(
    fuzz: ModuleType, corpus: ModuleType, watch: Any, tmp_path: Path, name: str
) -> None:
    run(fuzz, corpus, watch, tmp_path, name, QUICK[name])


@pytest.mark.parametrize(("name", "data"), [("npz", "set.npz"), ("csv", ".")])
def test_the_command_line_ends_with_a_code(
    fuzz: ModuleType, corpus: ModuleType, tmp_path: Path, name: str, data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    corpus.write(tmp_path, {name})
    codes = set()
    for seed in range(8):
        case = tmp_path / f"case {seed}"
        shutil.copytree(tmp_path / name, case)
        fuzz.damage_(case, corpus.READERS[name].files[:1], random.Random(seed))
        arguments = ["train", "--model", "mlp", "--data", str(case / data), "--epochs", "1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as sdq.cli.main.run does
            code = corpus.runs.command_line(
                [*arguments, "--quiet", "--out", str(tmp_path / f"r{seed}")]
            )
        said = capsys.readouterr().err
        assert code in (0, 2), said
        assert said.startswith("error: ") == (code == 2)
        assert (tmp_path / f"r{seed}").exists() == (code == 0)
        codes.add(code)
    assert 2 in codes


@pytest.mark.slow
def test_ten_thousand_damaged_files(
    fuzz: ModuleType, corpus: ModuleType, watch: Any, tmp_path: Path
) -> None:
    names = corpus.available()
    for name in names:
        (tmp_path / name).mkdir()
        run(fuzz, corpus, watch, tmp_path / name, name, -(-SLOW_CASES // len(names)))


# ------------------------------------------------------------------- the driver sees what is wrong


def reading(corpus: ModuleType, read: Any) -> Any:
    return corpus.images.Reader(read, "x", ("file",))


@pytest.mark.parametrize(
    ("what", "expected"),
    [("raise KeyError('x')", "KeyError"), ("open(folder / 'new', 'w').close()", "to write"),
     ("(folder / 'file').unlink()", "os.remove"), ("bytearray(2 ** 36)", "MemoryError"),
     ("__import__('time').sleep(30)", "took more than"), ("while True: pass", "took more than"),
     ("raise __import__('sdq').RequestError('a' * 3000)", "a message of 3000 characters")],
)  # fmt: skip
def test_the_driver_sees_a_defect(
    fuzz: ModuleType, corpus: ModuleType, watch: Any, tmp_path: Path, what: str, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "WAIT", 1 if "sleep" in what else 30)
    (tmp_path / "file").write_text("x")

    def read(folder: Path) -> None:
        exec(what, {"folder": folder})

    assert re.search(expected, fuzz.judge(reading(corpus, read), tmp_path, watch))


def test_the_driver_is_content_with_a_refusal(
    fuzz: ModuleType, corpus: ModuleType, watch: Any, tmp_path: Path
) -> None:
    def refuse(folder: Path) -> None:
        raise RequestError("file: must be sound, got damage; copy it again")

    assert fuzz.judge(reading(corpus, refuse), tmp_path, watch) is None
    assert fuzz.judge(reading(corpus, lambda folder: None), tmp_path, watch) is None


@pytest.mark.parametrize("kind", [".json", ".csv", ".npz", ".npy", ".safetensors", ".png"])
def test_mutations_change_files(
    fuzz: ModuleType, corpus: ModuleType, tmp_path: Path, kind: str
) -> None:
    corpus.write(tmp_path, {"policy", "csv", "npz", "slices", "weights"})
    path = next(p for p in sorted(tmp_path.rglob("*")) if p.suffix == kind)
    data = path.read_bytes()
    mutations = fuzz.KINDS[kind]
    changed = sum(m(random.Random(seed), data) != data for seed in range(20) for m in mutations)
    assert changed >= 18 * len(mutations)
