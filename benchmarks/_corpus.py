"""Sound files of every kind that is read, and what reads each of them."""

import importlib.util
import io
import json
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import export
import fl
import hw
import sdq
from sdq import image_folder, npz_file, plots
from sdq.checkpoint import Checkpoint, load_tensors, save_tensors
from sdq.cli import inputs as inp
from sdq.cli.cost import read_policy
from sdq.cli.evaluate import run_inputs
from sdq.cli.main import main as command_line
from sdq.cli.plan import ConfigFile
from sdq.cli.weights import load_weights_
from sdq.config import Config, PtqConfig, QuantConfig, SearchConfig, TrainConfig
from sdq.ct_files import BRAIN, patient, read_slice
from sdq.data import ArrayImages, DataOptions, ImageSet, Splits
from sdq.datasets import cifar10, ct_ich, isic2019, rsna_ich
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.run_folder import RunFolder
from sdq.split_file import apply_split_file

FORMATS = ("onnx", "onnx-packed", "qonnx")
SIDE = 8


@dataclass(frozen=True)
class Reader:
    """What reads files, and which.

    Args:
        read: is given the folder; a RequestError or a RunError is a good answer to damage.
        folder: of the sound files, below the corpus.
        files: those that are damaged.
        needs: a package that may be absent.
        writes: whether the reader may write into its folder.
    """

    read: Callable[[Path], object]
    folder: str
    files: tuple[str, ...]
    needs: str = "torch"
    writes: bool = False


# -------------------------------------------------------------------------------- what is written


def _run(command: str, *more: object) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = command_line([*command.split(), *map(str, more)])
    if code:
        raise AssertionError(f"sdq {command}: {errors.getvalue()}")


def _images(count: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIDE, SIDE, channels), dtype=np.uint8)


def _write_npz(folder: Path) -> None:
    parts = {f"{p}_images": _images(12) for p in ("train", "val", "test")}
    labels = {f"{p}_labels": np.arange(12)[:, None] % 3 for p in ("train", "val", "test")}
    np.savez(folder / "set.npz", **parts, **labels, class_names=np.array(["a", "b", "c"]))
    np.savez(folder / "whole.npz", images=_images(20)[..., 0], labels=np.arange(20) % 2)


def _write_policy(folder: Path) -> None:
    layers = (
        LayerBits("conv1", 8, 8, False, 432), LayerBits("conv2", 3, 4, True, 2304, (3, 1, 2, 3)),
        LayerBits("fc", 32, 32, False, 64),
    )  # fmt: skip
    (folder / "policy.json").write_text(BitwidthPolicy(layers).to_json())


def _write_csv(folder: Path) -> None:
    rows = ["image,label,split,patient_id,centre"]
    for i, pixels in enumerate(_images(12)):
        name = f"im{i}" + (".png" if i % 2 else ".jpg")
        Image.fromarray(pixels).save(folder / name)
        part = ("train", "train", "val", "test")[i // 3]
        rows.append(f"{name},{'abc'[i % 3]},{part},p{i // 2},{'xy'[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def _write_class_folders(folder: Path) -> None:
    for part in ("train", "test"):
        for label in "ab":
            place = folder / part / label
            place.mkdir(parents=True)
            for i, pixels in enumerate(_images(3)):
                Image.fromarray(pixels).save(place / f"{i}.{('png', 'jpg', 'bmp')[i]}")


def _write_isic2019(folder: Path) -> None:
    home = folder / "isic2019"
    home.mkdir()
    names = [f"ISIC_{i:07d}" for i in range(16)]
    kinds = image_folder.ISIC_CLASSES[:2]
    for name, pixels in zip(names, _images(16), strict=True):
        Image.fromarray(pixels).save(home / f"{name}.png")
    hot = [f"{n},{1 - i % 2}.0,{i % 2}.0" for i, n in enumerate(names)]
    tables = {
        "ISIC_2019_Training_GroundTruth.csv": [f"image,{','.join(kinds)}", *hot],
        "ISIC_2019_Training_Metadata.csv": ["image,lesion_id", *(f"{n},BCN_{n}" for n in names)],
        "train_test_split": [
            "image,center,fold", *(f"{n},{i % 6},{'test' if i > 12 else 'train'}"
                                   for i, n in enumerate(names)),
        ],
    }  # fmt: skip
    for name, lines in tables.items():
        (home / name).write_text("\n".join(lines) + "\n")


def _write_ct_ich(folder: Path) -> None:
    home = folder / "ct_ich"
    rows = ["PatientNumber,SliceNumber," + ",".join(ct_ich.KINDS)]
    for i in range(18):
        place = home / "Patients_CT" / f"{i:03d}" / "brain"
        place.mkdir(parents=True)
        Image.fromarray(_images(1, i)[0, :, :, 0]).save(place / "1.jpg")
        rows.append(f"{i},1," + ",".join(str(int(i % 6 == c)) for c in range(5)))
    (home / "hemorrhage_diagnosis.csv").write_text("\n".join(rows) + "\n")


def _write_rsna(folder: Path) -> None:
    home = folder / "rsna_ich"
    home.mkdir()
    rows = ["ID,Label"]
    for i in range(15):
        np.save(home / f"ID_{i}.npy", _images(1, i)[0, :, :, 0].astype(np.int16))
        rows += [f"ID_{i}_{k},{int(i % 5 == c)}" for c, k in enumerate(rsna_ich.CLASS_NAMES)]
    (home / "stage_2_train.csv").write_text("\n".join(rows) + "\n")


def _write_slices(folder: Path) -> None:
    np.save(folder / "units.npy", np.full((SIDE, SIDE), 40, np.int16))
    Image.fromarray(_images(1)[0, :, :, 0]).save(folder / "slice.png")


def _write_dicom(folder: Path) -> None:
    import pydicom

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    path = folder / "slice.dcm"
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID, data.SOPClassUID = "p1", meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Rows = data.Columns = SIDE
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = "1", "-1000"
    data.PixelData = np.full((SIDE, SIDE), 1040, np.int16).tobytes()
    data.save_as(path)


def _write_cifar(folder: Path) -> None:
    import tarfile

    with tarfile.open(folder / "cifar10.tar.gz", "w:gz") as archive:
        for part in ("train", "test"):
            for label in ("airplane", "bird"):
                for i, pixels in enumerate(_images(10 if part == "train" else 2)):
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "JPEG")
                    member = tarfile.TarInfo(f"cifar10/{part}/{label}/{i}.jpg")
                    member.size = stream.tell()
                    stream.seek(0)
                    archive.addfile(member, stream)


def _write_split(folder: Path) -> None:
    rows = [f"{i},{'xyz'[i % 3]},{'train' if i < 20 else 'test'}" for i in range(24)]
    (folder / "SPLIT.csv").write_text("\n".join(["index,client,split", *rows]) + "\n")


def _write_config(folder: Path) -> None:
    sections = {
        "quant": {"input_bits": 6, "pins": [["layer1.*", 8]], "skip": ["stem"]},
        "search": {"temperature": 1.0, "regularizer": "cost"},
        "train": {"warmup": 0.2, "epochs": 3}, "ptq": {"images": 12, "lr": 0.01},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sections))


def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
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
    _write_npz(folder)
    data = f"--data {folder / 'set.npz'} --quiet"
    _run(f"train --model mlp {data} --epochs 1 --out", folder / "float")
    rest = "--bits 3 --search-epochs 1 --epochs 1 --no-plots --out"
    _run(f"quantize --from {folder / 'float'} {data} {rest}", folder / "run")
    asked = json.loads((folder / "run" / "run.json").read_text())["request"]
    (folder / "run" / "asked.json").write_text(json.dumps(asked))


def _federate(folder: Path, rounds: int = 1) -> object:
    images = ArrayImages(torch.from_numpy(_images(12)).permute(0, 3, 1, 2).contiguous())
    part = ImageSet(images, torch.arange(12) % 3)
    clients = [fl.ClientData(name, part, part, part) for name in "ab"]
    config = fl.FederationConfig(rounds=rounds, batch_size=4, seed=0)
    return fl.run(
        _network(), method="scaffold", clients=clients, num_classes=3, config=config, folder=folder
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "npz": _write_npz, "policy": _write_policy, "csv": _write_csv, "isic2019": _write_isic2019,
    "class_folders": _write_class_folders, "ct_ich": _write_ct_ich, "rsna": _write_rsna,
    "slices": _write_slices, "dicom": _write_dicom, "cifar10": _write_cifar,
    "split": _write_split, "config": _write_config, "export": _write_export,
    "weights": _write_weights, "runs": _write_runs, "federation": _federate,
}  # fmt: skip


def write(home: Path, folders: Collection[str]) -> None:
    """Write these folders of sound files."""
    for name in folders:
        top = name.partition("/")[0]
        (home / top).mkdir()
        WRITERS[top](home / top)


# ----------------------------------------------------------------------------------- what is read


def _read_whole(splits: Splits) -> None:
    """Read every image, as training does."""
    splits.checked("data")
    for part in (splits.train, splits.val, splits.test):
        if part is not None:
            part.images.take(torch.arange(len(part)))


def _read_npz(folder: Path) -> None:
    for name in ("set.npz", "whole.npz"):
        _read_whole(npz_file.read_npz(folder / name, DataOptions()))
        _read_whole(npz_file.read_npz(folder / name, DataOptions(image_size=6)))


def _read_folder(folder: Path) -> None:
    for size in (None, 6):
        _read_whole(image_folder.read_folder(folder, DataOptions(image_size=size)))


def _read_slices(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_slice(path, BRAIN)
        patient(path)


def _read_split(folder: Path) -> None:
    images = ArrayImages(torch.zeros(24, 1, 2, 2, dtype=torch.uint8))
    whole = ImageSet(images, torch.arange(24) % 2)
    _read_whole(apply_split_file(folder / "SPLIT.csv", Splits(whole, None, None, ("a", "b"))))


def _read_config(folder: Path) -> None:
    kinds: dict[str, Config] = {
        "quant": QuantConfig(), "search": SearchConfig(), "train": TrainConfig(), "ptq": PtqConfig()
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


def _read_cost(folder: Path) -> None:
    policy, layers = read_policy(folder)
    for target in ("pynq_z2", "a100"):
        hw.report(layers, policy, target)
    hw.layer_costs(layers, policy)


def _resume(folder: Path) -> None:
    request = json.loads((folder / "asked.json").read_text())
    with RunFolder.create(folder, request, resume=True) as run:
        run.log({"phase": "finetune", "epoch": 2})
        run.read_json("metrics.json")


def _exported(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> Any:
        return export.verify(_quantized(), folder, format=name, inputs=_inputs())

    return read


READERS: dict[str, Reader] = {
    "policy": Reader(lambda f: BitwidthPolicy.load(f / "policy.json"), "policy", ("policy.json",)),
    "npz": Reader(_read_npz, "npz", ("set.npz", "whole.npz")),
    "csv": Reader(_read_folder, "csv", ("labels.csv",)),
    "images": Reader(_read_folder, "csv", ("im0.jpg", "im1.png")),
    "class folders": Reader(
        _read_folder, "class_folders", ("train/a/0.png", "train/a/1.jpg", "train/b/2.bmp")
    ),
    "isic2019": Reader(
        lambda f: _read_whole(isic2019.load(DataOptions(f))), "isic2019",
        ("isic2019/ISIC_2019_Training_GroundTruth.csv",
         "isic2019/ISIC_2019_Training_Metadata.csv", "isic2019/train_test_split"),
    ),
    "ct_ich": Reader(
        lambda f: _read_whole(ct_ich.load(DataOptions(f))), "ct_ich",
        ("ct_ich/hemorrhage_diagnosis.csv", "ct_ich/Patients_CT/001/brain/1.jpg"),
    ),
    "rsna_ich": Reader(
        lambda f: _read_whole(rsna_ich.load(DataOptions(f))), "rsna",
        ("rsna_ich/stage_2_train.csv", "rsna_ich/ID_3.npy"),
    ),
    "cifar10": Reader(
        lambda f: _read_whole(cifar10.load(DataOptions(f))), "cifar10", ("cifar10.tar.gz",)
    ),
    "slices": Reader(_read_slices, "slices", ("units.npy", "slice.png")),
    "dicom": Reader(_read_slices, "dicom", ("slice.dcm",), needs="pydicom"),
    "split": Reader(_read_split, "split", ("SPLIT.csv",)),
    "config": Reader(_read_config, "config", ("config.json",)),
    "weights": Reader(_read_weights, "weights", ("weights.safetensors",)),
    "checkpoint": Reader(_read_checkpoint, "weights", ("state.safetensors",)),
    "run": Reader(
        _read_run, "runs/run",
        ("run.json", "policy.json", "model.safetensors", "float.safetensors"),
    ),
    "cost": Reader(_read_cost, "runs/run", ("policy.json", "layers.json")),
    "resume": Reader(
        _resume, "runs/run", ("run.json", "metrics.json", "log.jsonl"), writes=True
    ),
    "plots": Reader(
        plots.draw, "runs/run",
        ("log.jsonl", "policy.json", "layers.json", "run.json", "model.safetensors"), writes=True,
    ),
    "federation": Reader(
        lambda f: _federate(f, 1), "federation", ("federation.safetensors",), writes=True
    ),
} | {
    f"verify {name}": Reader(
        _exported(name), f"export/{name}", (file, file, file, "export.json"), needs="qonnx"
    )
    for name, file in (
        ("onnx", "model.onnx"), ("onnx-packed", "model_packed.onnx"), ("qonnx", "model_qonnx.onnx"),
    )
}  # fmt: skip


def available() -> list[str]:
    """Return the readers whose packages are installed."""
    return [name for name, x in READERS.items() if importlib.util.find_spec(x.needs) is not None]
