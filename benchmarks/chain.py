"""The chain of checks from PyTorch to simulated hardware, one line a stage.

Each network is trained for a little on real images, quantized with bitwidths at random, fine-tuned
for an epoch, and written in every format that takes it; every stage of every format is compared
with PyTorch on test images, and where these are too few, on others of the data set. A network that
cannot be trained on the data (one for segmentation on labelled images) keeps its first weights.

    python benchmarks/chain.py --data dermamnist --data-root DIR --out runs/chain \
        --table benchmarks/results/chain.md
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import _reports
import torch
from torch import Tensor

import export
import sdq
from sdq.batches import Augmentation, Batches, Normalization, generator
from sdq.data import DataOptions, Splits, open_data
from sdq.errors import RequestError

FORMATS = "onnx,onnx-packed,qonnx,finn,hls4ml"
CHOICES = (1, 2, 3, 4, 6, 8)


def main() -> None:
    """Measure what is not measured yet, and write the table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    _reports.keep_rows(options.out, options, "models", "formats")
    splits = open_data(options.data, DataOptions(root=options.data_root))
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        qmodel: sdq.QuantModel | None = None
        for format_ in options.formats.split(","):
            file = options.out / f"{name}-{format_}.json"
            if not file.exists():
                qmodel = qmodel or prepared(name, splits, options)
                images = test_images(splits, options.images)
                found = stages(qmodel, format_, images, options.out)
                known = {"model": name, "images": len(images), "shape": splits.image_shape}
                file.write_text(json.dumps([{**known, **row} for row in found]))
            rows += json.loads(file.read_text())
            print(file.read_text(), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__, model=None)
    parser.add_argument("--models", default="vgg_like,resnet20,resnet18,mobilenet_v2,unet")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--prepare-for", default="finn", help="see `sdq quantize --for`")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=64, help="channels of unet at full size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    return parser.parse_args()


def test_images(splits: Splits, count: int) -> Tensor:
    """Return normalised images, evenly spread over the test split, and if need be over others."""
    parts = []
    for split in (splits.test, splits.val, splits.train):
        wanted = min(count - sum(map(len, parts)), 0 if split is None else len(split))
        if split is not None and wanted:
            places = torch.linspace(0, len(split) - 1, wanted).long()
            parts.append(split.images.take(places))
    images: Tensor = Normalization.of(splits.train)(torch.cat(parts))
    return images


def prepared(name: str, splits: Splits, options: argparse.Namespace) -> sdq.QuantModel:
    """Return a quantized network with a random policy, trained where the data has its targets."""
    network = _reports.untrained(name, splits, options.seed, width=options.width)
    order = torch.randperm(len(splits.train), generator=generator(options.seed, "part"))
    part = splits.train.subset(order[: options.train_images].sort().values)
    train = Batches(
        part, Normalization.of(splits.train), shuffle=True, seed=options.seed,
        augment=Augmentation(splits.horizontal_flip, splits.vertical_flip),
    )  # fmt: skip
    sample = torch.zeros(1, *splits.image_shape)
    trainable = (network.eval()(sample).dim() == 2) == (splits.task == "classification")
    if trainable:
        sdq.train_(network, train, sdq.TrainConfig(epochs=2, seed=options.seed))
    config = export.prepare(options.prepare_for, sdq.QuantConfig(bit_choices=CHOICES))
    qmodel = sdq.quantize(network, config, sample=sample)
    sdq.calibrate_(qmodel, Batches(part, Normalization.of(splits.train), seed=options.seed))
    draws = torch.randint(
        len(CHOICES), (len(qmodel.policy),), generator=generator(options.seed, "bits")
    ).tolist()
    drawn = {
        layer.name: CHOICES[draw]
        for layer, draw in zip(qmodel.policy, draws, strict=True)
        if layer.searched
    }
    sdq.apply_policy_(qmodel, qmodel.policy.with_weight_bits(drawn))
    if trainable:
        sdq.finetune_(
            qmodel, train, teacher=network, config=sdq.TrainConfig(epochs=1, seed=options.seed)
        )
    return qmodel


def stages(qmodel: sdq.QuantModel, format_: str, images: Tensor, out: Path) -> list[dict[str, Any]]:
    """Write one format and return what each of its stages showed, or why there is none."""
    folder = out / format_
    start = time.perf_counter()
    try:
        export.write(qmodel, folder, format=format_, sample=images[:1], overwrite=True)
    except RequestError as error:
        _, first, *_ = [*str(error).splitlines(), ""]
        return [{"format": format_, "refused": first.strip() or str(error)}]
    report = export.verify(qmodel, folder, format=format_, inputs=images).to_json()
    common = {
        "format": format_, "verified": report["verified"], "reason": report["reason"],
        "warnings": report["warnings"], "seconds": time.perf_counter() - start,
    }  # fmt: skip
    rows = [{**common, "name": "the file, in float64", **report["exact"]}]
    return rows + [{**common, **stage} for stage in report["runtimes"]]


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    lines = [
        f"# From PyTorch to simulated hardware: {options.data}",
        "",
        f"`{_reports.command()}`",
        "",
        f"Test images; networks prepared for {options.prepare_for}, weights of "
        f"{', '.join(map(str, CHOICES))} bits at random, 4-bit activations, first and last layer 8 "
        "bits. Each stage is compared with PyTorch: in float64 where it says so, else with "
        "PyTorch's float32. `codes` are the integers of all activation quantizers (in float64 of "
        "weights too) for all images; `flipped`: images with a code that differs; `explained`: "
        "those of them in which, replayed in float64 with the stage's codes, every code follows "
        "from those before it but for ties (docs/verification.md), and how many "
        "codes were ties; `outputs`: largest difference from PyTorch's over the largest output; "
        "`tail`: the same from what float64 gives for the stage's own codes.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [
            "",
            f"## {model}: {own[0]['images']} images of {' x '.join(map(str, own[0]['shape']))}",
            "",
            "| format | stage | codes | differ | first | flipped | explained | decisions agree "
            "| outputs | tail |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [line(row) for row in own]
        lines += [
            f"\n{row['format']}: **not verified**: {row['reason']}"
            for row in own
            if row.get("verified") is False and row["name"].startswith("the file")
        ]
    _reports.write(options.table, lines)


def line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    if "refused" in row:
        return f"| {row['format']} | refused: {row['refused']} | | | | | | | | |"
    start = f"| {row['format']} | {row['name']} "
    if "output_difference" in row:
        return (
            f"{start}| {row['codes']:,} | {row['different']} | {row['first_difference'] or ''} | | "
            f"| | {row['output_difference']:.0e} | |"
        )
    agree, outputs = f"{row['agreement']:.2%}", f"{row['relative_difference']:.0e}"
    if row["flipped"] is None:
        return f"{start}| not readable | | | | | {agree} | {outputs} | |"
    flipped = round(row["flipped"] * row["images"])
    explained = f"{row['ties']} ({row['tie_codes']} ties)" if flipped else ""
    return (
        f"{start}| {row['codes']:,} | {row['different']:,} | {row['first_difference'] or ''} "
        f"| {flipped} | {explained} | {agree} | {outputs} | {row['tail']:.0e} |"
    )


if __name__ == "__main__":
    main()
