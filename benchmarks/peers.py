"""SDQ beside other toolkits: accuracy at equal bytes, time, memory, file size, onnxruntime's speed.

Every toolkit is a file of ``benchmarks/toolkits``. It runs in an environment of its own (made with
pip in ``--envs`` when it is first needed), in a process of its own, on the same float weights, the
same images in the same order and, where it trains, with the same loop, loss and learning rates
(SDQ's loss has its bin regularization beside). It hands back logits, its bits and its weights;
accuracy and bytes are computed here, by one rule, and the weights must have no more levels than
their bits allow.

    python benchmarks/peers.py --data dermamnist --data-root DIR --float-epochs 6 --task ptq \
        --bits 4 --out runs/peers --table benchmarks/results/peers.md

What is in ``--out`` already is not done again, so several calls gather in one table.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import _reports
import numpy as np
import torch
from _peer_table import lines_of
from onnxruntime_speed import session, take_turns
from safetensors.torch import load_file

import sdq
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import save_tensors
from sdq.data import ArrayImages, DataOptions, ImageSet, open_data
from sdq.metrics import agreement, classification_metrics, predict

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for `benchmarks.toolkits`

from benchmarks.toolkits._job import Request, float_network, layers, write_onnx  # noqa: E402

TOOLKITS = "sdq,sdq_uniform,brevitas,modelopt,torchao,quark,nncf,inc"
NEEDED = ("safetensors", "pydantic", "lightning-fabric", "torchmetrics", "numpy")
"""What a job needs besides torch."""

MADE_OF = ("weights", "float_epochs", "train_images", "test_images", "mean", "std")
"""Options that float weights and images follow from."""

RIGHT = "right.npy"
"""Which test images a toolkit's network has right: for differences between two on the same ones."""


def main() -> None:
    """Run what is missing, and write the table if one is asked for."""
    options = arguments()
    for seed in map(int, filter(None, options.seeds.split(","))):
        group = Group(options, seed)
        for bits in map(int, options.bits.split(",")):
            for name in filter(None, options.toolkits.split(",")):
                print(json.dumps(group.row(name, bits)), flush=True)
            if options.speed_seconds:
                group.time_files(bits)
    if options.table:
        rows = [known(file) for file in sorted(options.out.glob("*/*/row.json"))]
        _reports.write(options.table, lines_of(rows, options.edge_bits, options.commands))


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__)
    parser.add_argument("--weights", type=Path, help="float weights to start from")
    parser.add_argument("--mean", help="with --weights: their normalisation")
    parser.add_argument("--std")
    parser.add_argument("--float-epochs", type=int, default=0, help="of training, or training on")
    parser.add_argument("--train-images", type=int, default=0, help="for the toolkits; 0: all")
    parser.add_argument("--test-images", type=int, default=0, help="the first of a draw; 0: all")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--task", choices=("ptq", "qat"), default="ptq")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--edge-bits", type=int, default=8, help="of the first and last layer")
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3, help="of qat, searches included")
    parser.add_argument("--search-epochs", type=int, default=1)
    parser.add_argument("--toolkits", default=TOOLKITS)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--speed-seconds", type=float, default=0, help="for each file")
    parser.add_argument("--envs", type=Path, default=Path("runs/peer-envs"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commands", nargs="*", help="shown in the table; default: this one")
    options = parser.parse_args()
    options.commands = options.commands or [_reports.command()]
    return options


class Group:
    """A float network and its images: what all toolkits of one seed are given."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        names = (Path(options.data).stem, Path(options.model).stem)  # which may be paths
        self.folder = options.out.resolve() / "-".join([*names, str(seed)])
        self.folder.mkdir(parents=True, exist_ok=True)
        made_of = {name: str(getattr(options, name)) for name in MADE_OF}
        file = self.folder / "group.json"
        if not file.exists():
            facts = self.prepare() | {"made_of": made_of}
            file.write_text(json.dumps(facts))
        self.facts = json.loads(file.read_text())
        if self.facts["made_of"] != made_of:
            raise SystemExit(f"{file}: must be made of {made_of}; remove the folder")
        self.normalization = Normalization(tuple(self.facts["mean"]), tuple(self.facts["std"]))
        self.network = float_network(self.folder, options.model, self.facts["classes"])
        self.labels = torch.from_numpy(np.load(self.folder / "test_labels.npy"))
        self.wanted, _ = predict(self.network, self.test_batches())

    def prepare(self) -> dict[str, Any]:
        """Write float weights and images, and return what else a job must know."""
        options = self.options
        splits = open_data(options.data, DataOptions(root=options.data_root))
        assert splits.test is not None
        train = _reports.part(splits.train, options.train_images, "train")
        test = _reports.part(splits.test, options.test_images, "test")
        np.savez(
            self.folder / "images.npz", train_images=pixels(train),
            train_labels=train.labels.numpy(), test_images=pixels(test),
        )  # fmt: skip
        np.save(self.folder / "test_labels.npy", test.labels.numpy())  # jobs do not read them
        given = options.mean is not None
        normalization = (
            Normalization(numbers(options.mean), numbers(options.std))
            if given
            else Normalization.of(splits.train)
        )
        flips = (splits.horizontal_flip, splits.vertical_flip)
        network = _reports.untrained(options.model, splits, self.seed)
        if options.weights:
            network.load_state_dict(load_file(options.weights))
        if options.float_epochs:
            loader = Batches(
                splits.train, normalization, shuffle=True, seed=self.seed,
                augment=Augmentation(*flips),
            )  # fmt: skip
            config = sdq.TrainConfig(epochs=options.float_epochs, seed=self.seed)
            sdq.train_(network, loader, config)
        save_tensors(self.folder / "float.safetensors", network.state_dict())
        return {
            "classes": len(splits.class_names), "flips": flips, "mean": normalization.mean,
            "std": normalization.std, "train_images": len(train), "test_images": len(test),
        }  # fmt: skip

    def test_batches(self, size: int = 250) -> Batches:
        with np.load(self.folder / "images.npz", allow_pickle=False) as file:
            images = ArrayImages(torch.from_numpy(file["test_images"]))
        return Batches(ImageSet(images, self.labels), self.normalization, batch_size=size)

    def request(self, bits: int) -> Request:
        options, names = self.options, list(layers(self.network))
        return Request(
            options.model, self.facts["classes"], options.task, bits, options.edge_bits,
            options.act_bits,
            (names[0], names[-1]), options.calibration, options.epochs, options.search_epochs,
            self.normalization.mean, self.normalization.std, tuple(self.facts["flips"]), self.seed,
        )  # fmt: skip

    def out(self, name: str, bits: int) -> Path:
        return self.folder / f"{self.options.task}-{bits}-{self.options.act_bits}-{name}"

    def row(self, name: str, bits: int) -> dict[str, Any]:
        """Return a toolkit's row, measured unless it is known."""
        out, options = self.out(name, bits), self.options
        file, asked = out / "row.json", out / "request.json"
        request = self.request(bits)
        found = json.loads(file.read_text()) if file.exists() else {"failed": "not run"}
        if "failed" not in found:
            if Request.load(asked) != request:
                raise SystemExit(
                    f"{asked}: must be what is asked now, {request}; give another --out, or remove "
                    "the folder"
                )
            return dict(found)
        out.mkdir(exist_ok=True)
        request.save(asked)
        row = {
            "data": Path(options.data).stem, "model": Path(options.model).stem,
            "task": options.task, "bits": bits,
            "act_bits": options.act_bits, "seed": self.seed, "toolkit": name,
            "float": classification_metrics(self.wanted, self.labels)["accuracy"],
            "train_images": self.facts["train_images"], "test_images": self.facts["test_images"],
            "calibration": options.calibration, "epochs": options.epochs,
        }  # fmt: skip
        error = run(name, interpreter(name, options.envs), self.folder, out)
        row |= {"failed": error} if error else self.judged(out)
        file.write_text(json.dumps(row))
        return row

    def judged(self, out: Path) -> dict[str, Any]:
        """Return what a toolkit's answer is worth."""
        answer = json.loads((out / "result.json").read_text())
        with np.load(out / "logits.npz", allow_pickle=False) as file:
            logits = torch.from_numpy(file["logits"])
        found = classification_metrics(logits, self.labels)
        np.save(out / RIGHT, (logits.argmax(1) == self.labels).numpy())
        bits, weights = answer["bits"], load_file(out / "weights.safetensors")
        sizes = {name: layer.weight.numel() for name, layer in layers(self.network).items()}
        assert bits.keys() == sizes.keys() == weights.keys(), out
        inner = [name for name in sizes if name not in self.request(0).edges]
        return {
            "accuracy": found["accuracy"],
            "balanced_accuracy": found["balanced_accuracy"],
            "agreement": agreement(logits, self.wanted),
            "weight_bytes": sum(sizes[n] * bits[n] for n in sizes) / 8,
            "inner_bits": sum(sizes[n] * bits[n] for n in inner) / sum(sizes[n] for n in inner),
            "too_many_levels": [n for n in sizes if levels(weights[n]) > 2 ** bits[n]],
            **{k: answer[k] for k in ("seconds", "cpu_seconds", "peak_bytes", "note", "versions")},
            **self.file_figures(out, answer["onnx"], logits),
        }

    def file_figures(self, out: Path, refused: str, logits: torch.Tensor) -> dict[str, Any]:
        """Return size and faithfulness of an ONNX file, or why there is none."""
        file = out / "model.onnx"
        if not file.exists():
            return {"file": refused or "no exporter"}
        try:
            opened = session(file, 1, precise=True)
            name = opened.get_inputs()[0].name
            answers = [opened.run(None, {name: x.numpy()})[0] for x, _ in self.test_batches()]
        except Exception as error:  # noqa: BLE001  # onnxruntime raises classes of its own
            reason = str(error).splitlines()[0].split("failed:")[-1]  # before it stands a path
            return {"file": f"onnxruntime: {reason}"}
        same = agreement(torch.from_numpy(np.concatenate(answers)), logits)
        return {"file": "", "file_bytes": file.stat().st_size, "file_agreement": same}

    def time_files(self, bits: int) -> None:
        """Let the files of one bitwidth take turns in onnxruntime, and note how long each takes."""
        images = next(iter(self.test_batches(8)))[0].numpy()
        paths = {"float": self.folder / "float.onnx"}
        if not paths["float"].exists():
            write_onnx(self.network, torch.from_numpy(images), paths["float"])
        for name in self.options.toolkits.split(","):
            row = json.loads((self.out(name, bits) / "row.json").read_text())
            if row.get("file") == "":
                paths[name] = self.out(name, bits) / "model.onnx"
        sessions = {name: Named(session(path, 1, precise=True)) for name, path in paths.items()}
        times = take_turns(sessions, images, self.options.speed_seconds * len(sessions))
        medians = {name: float(np.median(found)) for name, found in times.items()}
        for name, median in medians.items():
            if name == "float":
                continue
            file = self.out(name, bits) / "row.json"
            speed = {"file_seconds": median, "file_speedup": medians["float"] / median}
            file.write_text(json.dumps(json.loads(file.read_text()) | speed))


class Named:
    """A session whose input is called ``images``, whatever its file calls it."""

    def __init__(self, opened: Any) -> None:
        self.opened, self.name = opened, opened.get_inputs()[0].name

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> Any:
        return self.opened.run(outputs, {self.name: feed["images"]})


def known(file: Path) -> dict[str, Any]:
    """Return a row that was measured, with what its network has right."""
    row: dict[str, Any] = json.loads(file.read_text())
    right = file.with_name(RIGHT)
    return row | ({"right": np.load(right).astype(float)} if right.exists() else {})


def pixels(images: ImageSet) -> np.ndarray:
    return images.images.take(torch.arange(len(images))).numpy()


def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def levels(weight: torch.Tensor) -> int:
    """Return the most distinct values of an output channel, as far apart as rounding cannot be."""
    rows = weight.flatten(1)
    reach = rows.abs().amax(1, keepdim=True).clamp_min(1e-30)
    rounded = (rows / reach * 2**16).round()  # steps of 8 bits are 2^9 apart
    return max(len(row.unique()) for row in rounded)


def required(name: str) -> tuple[str, ...]:
    """Return a toolkit's requirements, without importing what they are."""
    tree = ast.parse((ROOT / "benchmarks" / "toolkits" / f"{name}.py").read_text())
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "REQUIRES":
            found: tuple[str, ...] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return found
    raise SystemExit(f"toolkit {name}: must have REQUIRES, got none; add it")


def interpreter(name: str, envs: Path) -> Path:
    """Return a toolkit's Python, its environment made if there is none yet."""
    requirements = required(name)
    if not requirements:
        return Path(sys.executable)
    folder = (envs / name).absolute()
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        wanted = [f"torch=={torch.__version__.split('+')[0]}", *NEEDED]
        if any(r.startswith("torch==") for r in requirements):
            wanted = list(NEEDED)
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted, *requirements]
        subprocess.run(command, check=True)
        done.touch()
    return python


def run(name: str, python: Path, folder: Path, out: Path) -> str:
    """Run a toolkit, and return why it failed."""
    command = [str(python), "-P", "-m", "benchmarks.toolkits._worker", name, str(folder), str(out)]
    place = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "log.txt").open("w") as log:
        code = subprocess.run(
            command, env={**os.environ, **place}, stdout=log, stderr=subprocess.STDOUT, cwd=out
        ).returncode
    return (out / "log.txt").read_text().strip().splitlines()[-1][:300] if code else ""


if __name__ == "__main__":
    main()
