"""What runs write and read: policies, weights, run folders, exports, federations."""

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from _corpus_images import SIDE, image_array, write_npz
from _reader import Reader
from torch import Tensor, nn

import export
import fl
import hw
import sdq
from fl.bits import PhasesConfig
from fl.client import try_answer
from fl.record import Record, Request
from fl.setting import Setting
from fl.store import ByRound
from sdq import plots
from sdq.checkpoint import Checkpoint, load_tensors, save_tensors
from sdq.cli import inputs as inp
from sdq.cli.cost import read_policy
from sdq.cli.evaluate import run_inputs
from sdq.cli.main import main as command_line
from sdq.cli.plan import ConfigFile
from sdq.cli.weights import load_weights_
from sdq.config import Config, PtqConfig, QuantConfig, SearchConfig, TrainConfig
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError, RunError
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.run_folder import RunFolder

FORMATS = ("onnx", "onnx-packed", "qonnx")
PHASES = PhasesConfig(search_rounds=1, tune_rounds=2)


# -------------------------------------------------------------------------------- what is written


def command(text: str, folder: Path) -> None:
    """Run a command of sdq with a folder in the place of each ``{}``; raise what it answers."""
    arguments = [word.replace("{}", str(folder)) for word in text.split()]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = command_line(arguments)
    if code:
        raise {1: RunError, 2: RequestError}[code](errors.getvalue())


def _write_policy(folder: Path) -> None:
    layers = (
        LayerBits("conv1", 8, 8, False, 432), LayerBits("conv2", 3, 4, True, 2304, (3, 1, 2, 3)),
        LayerBits("fc", 32, 32, False, 64),
    )  # fmt: skip
    (folder / "policy.json").write_text(BitwidthPolicy(layers).to_json())


def _write_config(folder: Path) -> None:
    sections = {
        "quant": {"input_bits": 6, "pins": [["layer1.*", 8]], "skip": ["stem"]},
        "search": {"temperature": 1.0, "regularizer": "cost"},
        "train": {"warmup": 0.2, "epochs": 3}, "ptq": {"images": 12, "lr": 0.01},
        "federation": {"rounds": 3, "max_update_ratio": 20.0},
        "loss": {"name": "focal", "gamma": 2.0}, "phases": {"merge": "max"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sections))


TARGET = '''"""A board."""

from hw.models.fpga_dataflow import DataflowFpga

TARGET = DataflowFpga(
    capacity={"lut": 53_200, "bram_18k": 280, "dsp": 220, "uram": 0},
    clock_hz=100e6,
    dsp_slice="DSP48E1",
)
'''


def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        ).eval()  # fmt: skip


def _small() -> nn.Module:
    """Return a network that is followed and trained in less time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3 * SIDE**2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(),
            nn.Linear(4, 3),
        ).eval()  # fmt: skip


def _inputs() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@lru_cache(maxsize=1)
def _quantized() -> sdq.QuantModel:
    qmodel = sdq.quantize(_network(), QuantConfig(), sample=_inputs()[:1])
    sdq.calibrate_(qmodel, [(_inputs(), torch.zeros(4))])
    bits = {layer.name: 3 for layer in qmodel.policy if layer.searched}
    sdq.apply_policy_(qmodel, qmodel.policy.with_weight_bits(bits))
    return qmodel


def _write_target(folder: Path) -> None:
    _quantized()  # torch makes a folder of its own at the first
    (folder / "board.py").write_text(TARGET)


def _write_own_policy(folder: Path) -> None:
    (folder / "policy.json").write_text(_quantized().policy.to_json())


def _write_export(folder: Path) -> None:
    for name in FORMATS:
        export.write(_quantized(), folder / name, format=name, sample=_inputs()[:1])


def _adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-3)


def _write_weights(folder: Path) -> None:
    network = _network()
    save_tensors(folder / "weights.safetensors", network.state_dict(), {"epochs": "3"})
    optimizer = _adam(network)
    network(_inputs()).sum().backward()
    optimizer.step()
    Checkpoint(folder / "state.safetensors", {"seed": 0}).save(network, optimizer, 2)


def _write_runs(folder: Path) -> None:
    write_npz(folder)
    data, short = "--data {}/set.npz --quiet", "--bits 3 --search-epochs 1 --epochs 1 --no-plots"
    command(f"train --model mlp {data} --epochs 1 --out {{}}/float", folder)
    command(f"quantize --from {{}}/float {data} {short} --out {{}}/run", folder)
    command("export {}/run --format onnx --verify --samples 4 --quiet", folder)
    asked = json.loads((folder / "run" / "run.json").read_text())["request"]
    (folder / "run" / "asked.json").write_text(json.dumps(asked))


def _write_federated_run(folder: Path) -> None:
    write_npz(folder)
    asked = "--method fedavg,ditto --model mlp --clients 2 --rounds 2 --batch-size 4 --quiet"
    command(f"federate {asked} --data {{}}/set.npz --out {{}}/run", folder)


class _Killed(Exception):
    """What ends a federation before its last round."""


def _clients() -> list[fl.ClientData]:
    pixels = torch.from_numpy(image_array(12)).permute(0, 3, 1, 2).contiguous()
    part = ImageSet(ArrayImages(pixels), torch.arange(12) % 3)
    return [fl.ClientData(name, part, part, part) for name in "ab"]


FEDERATION = fl.FederationConfig(rounds=2, batch_size=4, seed=0, keep_clients=True)


def _federate(folder: Path, watch: Callable[[dict[str, Any]], None] | None = None) -> object:
    """Run a federation of two rounds, or the one that is left of it."""
    return fl.run(
        _network(), method="ditto", clients=_clients(), num_classes=3, config=FEDERATION,
        folder=folder, watch=watch,
    )  # fmt: skip


def _learn_bits(folder: Path, watch: Callable[[dict[str, Any]], None] | None = None) -> object:
    """Run a federation that learns bits, or what is left of it."""
    return fl.run(
        _small(), method="scaffold", clients=_clients(), num_classes=3, config=FEDERATION,
        rounds=0, quant=QuantConfig(bit_choices=(2, 4)), budget=sdq.Budget(avg_weight_bits=3.0),
        phases=PHASES, folder=folder, watch=watch,
    )  # fmt: skip


@contextlib.contextmanager
def _killed() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give what ends a federation in the second round of its last phase, before it is kept."""

    def kill(summary: dict[str, Any]) -> None:
        if summary.get("phase", "tune") == "tune" and summary.get("round") == 1:
            raise _Killed

    with contextlib.suppress(_Killed):
        yield kill
        raise AssertionError("the federation was to be killed")


def _write_federation(folder: Path) -> None:
    with _killed() as kill:
        _federate(folder, kill)


def _write_federated_bits(folder: Path) -> None:
    with _killed() as kill:
        _learn_bits(folder, kill)


@lru_cache(maxsize=1)
def _setting() -> Setting:
    return Setting.of(
        _network(), fl.method("ditto"), FEDERATION, num_classes=3, image_shape=(3, SIDE, SIDE)
    )


def _asked(round: int) -> Request:
    setting = _setting()
    model = {name: setting.initial[name] for name in setting.names(down=True)}
    values = {"class_counts": [[4.0, 4.0, 4.0]] * 2, "evaluate": True}
    return Request("train", 0, round, Record({"model": model}, values))


def _write_node(folder: Path) -> None:
    _, keeps = try_answer(_setting(), _clients()[0], _asked(0), None)
    assert keeps is not None
    ByRound(folder).put(keeps, 0)


WRITERS: dict[str, Callable[[Path], object]] = {
    "policy": _write_policy, "own_policy": _write_own_policy, "config": _write_config,
    "export": _write_export, "target": _write_target,
    "weights": _write_weights, "runs": _write_runs, "federated_run": _write_federated_run,
    "federation": _write_federation, "federated_bits": _write_federated_bits, "node": _write_node,
}  # fmt: skip


# ----------------------------------------------------------------------------------- what is read


def _read_config(folder: Path) -> None:
    kinds: dict[str, Config] = {
        "quant": QuantConfig(), "search": SearchConfig(), "train": TrainConfig(),
        "ptq": PtqConfig(), "federation": fl.FederationConfig(), "loss": fl.LossConfig(),
        "phases": PhasesConfig(),
    }  # fmt: skip
    with click.Context(click.Command("quantize")):  # of which no option was given
        file = ConfigFile.read(folder / "config.json", *kinds)
    for part, before in kinds.items():
        file.changed(part, before)


def _read_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    load_weights_(_network(), load_tensors(path)[0], str(path), 3)


def _read_checkpoint(folder: Path) -> None:
    network = _network()
    optimizer = _adam(network)
    Checkpoint(folder / "state.safetensors", {"seed": 0}).load_(network, optimizer)
    network(_inputs()).sum().backward()
    optimizer.step()


def _read_run(folder: Path) -> None:
    run = RunFolder.open(folder)
    network = inp.load_quantized(run)
    inputs = run_inputs(run)
    network.eval()(inputs.sample)


def _read_float(folder: Path) -> None:
    run = RunFolder.open(folder)
    inp.load_float(run).eval()(run_inputs(run).sample)


def _apply_policy(folder: Path) -> None:
    qmodel = copy.deepcopy(_quantized())
    sdq.apply_policy_(qmodel, BitwidthPolicy.load(folder / "policy.json"))
    qmodel.eval()(_inputs())


def _read_cost(folder: Path) -> None:
    policy, layers = read_policy(folder)
    for target in ("pynq_z2", "a100"):
        hw.report(layers, policy, target)
    hw.layer_costs(layers, policy)


def _read_target(folder: Path) -> None:
    target = hw.target(str(folder / "board.py"))
    hw.report(_quantized().layers, _quantized().policy, target)


def _resume(folder: Path) -> None:
    request = json.loads((folder / "asked.json").read_text())
    with RunFolder.create(folder, request, resume=True) as run:
        run.log({"phase": "finetune", "epoch": 2})
        run.read_metrics()


def _draw(folder: Path) -> None:
    with mock.patch.object(plots, "DPI", 20):  # to paint pixels is no reading
        plots.draw(folder)


def _node(folder: Path) -> None:
    try_answer(_setting(), _clients()[0], _asked(1), ByRound(folder).before(1))


def _exported(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> Any:
        return export.verify(_quantized(), folder, format=name, inputs=_inputs())

    return read


RUN = ("run.json", "policy.json", "layers.json", "metrics.json", "predictions.safetensors")

READERS: dict[str, Reader] = {
    "policy": Reader(lambda f: BitwidthPolicy.load(f / "policy.json"), "policy", ("policy.json",)),
    "policy that is applied": Reader(_apply_policy, "own_policy", ("policy.json",)),
    "config": Reader(_read_config, "config", ("config.json",)),
    "target": Reader(_read_target, "target", ("board.py",)),
    "weights": Reader(_read_weights, "weights", ("weights.safetensors",)),
    "checkpoint": Reader(_read_checkpoint, "weights", ("state.safetensors",)),
    "run": Reader(
        _read_run, "runs/run",
        ("run.json", "policy.json", "model.safetensors", "float.safetensors"),
    ),
    "float run": Reader(_read_float, "runs/float", ("run.json", "model.safetensors")),
    "cost": Reader(_read_cost, "runs/run", ("policy.json", "layers.json")),
    "resume": Reader(
        _resume, "runs/run", ("run.json", "metrics.json", "log.jsonl"), writes=True
    ),
    "plots": Reader(
        _draw, "runs/run",
        ("log.jsonl", "policy.json", "layers.json", "run.json", "model.safetensors"), writes=True,
    ),
    "compare": Reader(partial(command, "compare {} {} --target pynq_z2 --json"), "runs/run", RUN),
    "report": Reader(
        partial(command, "report {} --quiet --out {}/page.html"), "runs/run",
        (*RUN, "log.jsonl", "export/onnx/export.json", "export/onnx/verification.json"),
        writes=True,
    ),
    "report of a federation": Reader(
        partial(command, "report {} --quiet --out {}/page.html"), "federated_run/run",
        ("run.json", "fedavg/metrics.json", "fedavg/log.jsonl", "ditto/run.json",
         "ditto/log.jsonl", "ditto/metrics.json"),
        writes=True,
    ),
    "federation": Reader(
        _federate, "federation", ("federation.safetensors", "clients/000000-000000.safetensors"),
        writes=True,
    ),
    "federated bits": Reader(
        _learn_bits, "federated_bits",
        ("search/federation.safetensors", "tune/federation.safetensors"), writes=True,
    ),
    "node": Reader(_node, "node", ("000000.safetensors",)),
} | {
    f"verify {name}": Reader(
        _exported(name), f"export/{name}", (file, file, file, "export.json"), needs="qonnx"
    )
    for name, file in (
        ("onnx", "model.onnx"), ("onnx-packed", "model_packed.onnx"), ("qonnx", "model_qonnx.onnx"),
    )
}  # fmt: skip
"""Readers of what sdq wrote, and of what is asked of it in files."""
