"""The command line called in-process, tiny data sets, and runs made once."""

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # typer uses names that click deprecates
    from sdq.cli.main import main
from sdq import checkpoint, run_folder

USER_MODELS = """
import torch
from torch import nn

class Fixed(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4 * 26 * 26, classes)
    def forward(self, x):
        return self.last(torch.relu(self.first(x)).flatten(1))

class OnData(Fixed):
    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 0 else x)

class Asserts(Fixed):
    def forward(self, x):
        assert x.shape[2] == 30
        return super().forward(x)

class Tupled(Fixed):
    def forward(self, x):
        return (super().forward(x),)

class NoLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(7))
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] + self.bias

def fixed(num_classes=7): return Fixed(num_classes)
def on_data(): return OnData()
def asserts(): return Asserts()
def tupled(): return Tupled()
def no_layer(): return NoLayer()
def needs(width): return Fixed()
def number(): return 3
def raises(): raise KeyError("boom")
"""


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


def call(command: str, *more: object, plots: bool = False) -> Done:
    """Run ``sdq`` in this process; ``command`` is split at spaces, ``more`` is not.

    Plots and reports take time, and few tests are about them: the others run with ``--no-plots``
    and ``--no-report``.
    """
    arguments = [*command.split(), *map(str, more)]
    if not plots and arguments[:1] in (["quantize"], ["search"]):
        arguments.append("--no-plots")
    if not plots and arguments[:1] in (["train"], ["quantize"], ["search"], ["federate"]):
        arguments.append("--no-report")
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # as sdq.cli.main.run does
        code = main(arguments)
    return Done(code, out.getvalue(), err.getvalue())


def must(command: str, *more: object, plots: bool = False) -> Done:
    done = call(command, *more, plots=plots)
    assert done.code == 0, done.err
    return done


def write_npz(
    path: Path, classes: int = 7, side: int = 28, grey: bool = False, **over: Any
) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 70), ("val", 14), ("test", 35)):
        shape = (count, side, side) if grey else (count, side, side, 3)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    np.savez(path, **(arrays | over))


@pytest.fixture(scope="session")
def sdq() -> Callable[..., Done]:
    return call


class Killed(BaseException):
    """The process is gone."""


class Writes:
    """The files that runs write, of which one can be the last thing that a process does."""

    def __init__(self) -> None:
        self.count = 0
        self._last: int | None = None
        self._write = checkpoint.write_bytes_atomically

    def __call__(self, path: Path, content: bytes) -> None:
        self.count += 1
        if self.count == self._last:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.999.part").write_bytes(content[: len(content) // 2])
            raise Killed
        self._write(path, content)

    @contextlib.contextmanager
    def killed_in(self, number: int) -> Iterator[None]:
        """Expect the process to be killed in its write of this number, from 1.

        Half of the file is on the disk then, under another name.
        """
        self.count, self._last = 0, number
        with pytest.raises(Killed):
            yield
        self._last = None


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Return what stands between runs and the disk."""
    found = Writes()
    monkeypatch.setattr(checkpoint, "write_bytes_atomically", found)
    monkeypatch.setattr(run_folder, "write_bytes_atomically", found)
    return found


CONFIGS = {
    "cut": '{"search": {',
    "part": '{"x": {}}',
    "field": '{"search": {"warmth": 1}}',
    "value": '{"search": {"temperature": -1}}',
    "twice": '{"quant": {"act_bits": 8}}',
    "acts": '{"quant": {"act_bits": 3, "act_choices": [2, 4, 8]}}',
    "training": '{"train": {"warmup": 0.2}}',
    "good": '{"quant": {"act_bits": 8, "input_bits": 6}, "train": {"warmup": 0.2},'
    ' "search": {"regularizer": "cost", "end_temperature": 0.5}}',
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good data set, a trained and a quantized run, and everything bad."""
    home = tmp_path_factory.mktemp("files")
    write_npz(home / "ok.npz")
    write_npz(home / "size20.npz", side=20)
    write_npz(home / "grey.npz", grey=True)
    write_npz(home / "five.npz", classes=5)
    write_npz(home / "other.npz", train_labels=np.arange(70)[::-1] % 7)
    write_npz(home / "outside.npz", train_labels=np.full(70, -1))
    write_npz(home / "three_names.npz", class_names=np.array(list("abc")))
    write_npz(
        home / "no_class_3.npz", train_labels=np.where(np.arange(70) % 7 == 3, 0, np.arange(70) % 7)
    )
    write_npz(home / "objects.npz", train_images=np.array([{}] * 70, dtype=object))
    whole = (home / "ok.npz").read_bytes()
    (home / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (home / "text.npz").write_text("hello")
    (home / "models.py").write_text(USER_MODELS)
    (home / "syntax.py").write_text("def f(:\n")
    for name, text in CONFIGS.items():
        (home / f"{name}.json").write_text(text)

    data = f"--data {home / 'ok.npz'} --quiet"
    must(f"train --model mlp {data} --epochs 2 --out", home / "float")
    q = f"quantize --from {home / 'float'} {data} --search-epochs 1 --epochs 1 --bits 2 --out"
    must(q, home / "quantized")
    must(
        f"search --from {home / 'float'} {data} --search-epochs 1 --bits 3 --out", home / "searched"
    )

    good = load_file(home / "float" / "model.safetensors")
    save_file(
        good | {"layers.1.weight": good["layers.1.weight"] * torch.nan}, home / "nan.safetensors"
    )
    save_file({}, home / "empty.safetensors")
    whole = (home / "float" / "model.safetensors").read_bytes()
    (home / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (home / "text.safetensors").write_text("hello")
    torch.save(good, home / "torch.pth")
    (home / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    _write_policies(home)
    return home


def _write_policies(home: Path) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads((home / "searched" / "policy.json").read_text())
        change(document)
        (home / f"policy_{name}.json").write_text(json.dumps(document))

    changed("newer", lambda d: d.update(schema="sdq.policy/2"))
    changed("three_layers", lambda d: d["layers"].pop())
    changed("renamed", lambda d: d["layers"][1].update(name="other"))
    changed("five_bits", lambda d: d["layers"][1].update(weight_bits=5))
    changed("nine_bits", lambda d: d["layers"][1].update(weight_bits=9))
    changed("nan_bits", lambda d: d["layers"][1].update(weight_bits=float("nan")))
    changed("pinned", lambda d: d["layers"][0].update(weight_bits=4))
    changed("other_act", lambda d: d["layers"][1].update(act_bits=8))
    changed("extra", lambda d: d["layers"][0].update(extra=1))
    whole = (home / "searched" / "policy.json").read_bytes()
    (home / "policy_cut.json").write_bytes(whole[:100])
    (home / "policy_binary.json").write_bytes(b"\xff\xfe\x00")
    (home / "policy_deep.json").write_text("[" * 100_000)


@pytest.fixture(scope="session")
def derm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float and a quantized run on the built-in data."""
    home = tmp_path_factory.mktemp("derm")
    must("train --model mlp --data synthetic_derm --epochs 2 --quiet --out", home / "float")
    must(
        f"quantize --from {home / 'float'} --data synthetic_derm --search-epochs 1 --epochs 1 "
        "--bits 2 --quiet --out",
        home / "quantized",
        plots=True,
    )
    return home


@pytest.fixture(scope="session")
def pages(files: Path, derm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a quantized run, and of a federation of two methods."""
    run = tmp_path_factory.mktemp("federation") / "fed"
    must(
        f"federate --method fedavg,fca --model mlp --data {files / 'ok.npz'} --clients 3 "
        f"--rounds 2 --quiet --out {run}",
        plots=True,
    )
    return {"quantized": derm / "quantized" / "report.html", "federated": run / "report.html"}
