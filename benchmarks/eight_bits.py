"""What 8 bits everywhere cost without any training, for every family of networks.

Each network is trained in float, then quantized to 8-bit weights and activations with scales from
256 training images, three times: as by default; with batch normalisation folded; and with the
operands of additions, concatenations and products quantized too (folded as well).

    python benchmarks/eight_bits.py --data dermamnist --data-root DIR --out runs/eight_bits \
        --table benchmarks/results/eight_bits.md
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import _reports
import torch
from torch import nn

import sdq
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import load_tensors, save_tensors
from sdq.data import DataOptions, open_data
from sdq.metrics import agreement, classification_metrics, predict

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "folded": {"batch_norm": "fold"},
    "integer datapath": {"batch_norm": "fold", "integer_datapath": True},
}
LIMIT = 0.005


def main() -> None:
    """Train what is not trained yet, quantize, measure, and write the table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    _reports.keep_rows(options.out, options, "models")
    splits = open_data(options.data, DataOptions(root=options.data_root))
    assert splits.test is not None
    normalization = Normalization.of(splits.train)
    flips = Augmentation(splits.horizontal_flip, splits.vertical_flip)
    train = Batches(
        splits.train, normalization, shuffle=True, seed=options.seed, augment=flips, batch_size=64
    )
    plain = Batches(splits.train, normalization, shuffle=True, seed=options.seed)
    test = Batches(splits.test, normalization, batch_size=500)
    sample = torch.zeros(1, *splits.image_shape)
    rows = []
    for name in options.models.split(","):
        network = trained(name, splits, train, options).eval()
        logits, labels = predict(network, test)
        row: dict[str, Any] = {
            "model": name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "float": classification_metrics(logits, labels)["accuracy"],
        }
        for way, settings in WAYS.items():
            config = sdq.QuantConfig(bit_choices=(8,), act_bits=8, **settings)
            start = time.perf_counter()
            qmodel = sdq.quantize(network, config, sample=sample)
            sdq.calibrate_(qmodel, plain)
            row[f"{way}, seconds"] = time.perf_counter() - start
            quantized, _ = predict(qmodel, test)
            row[way] = classification_metrics(quantized, labels)["accuracy"]
            row[f"{way}, agreement"] = agreement(quantized, logits)
        rows.append(row)
        print(json.dumps(row), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__, model=None)
    parser.add_argument(
        "--models",
        default="vgg_like,vgg16_slim,resnet20,resnet18,resnet50,mobilenet_v1,mobilenet_v2,"
        "efficientnet_b0,densenet121",
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    return parser.parse_args()


def trained(name: str, splits: Any, train: Batches, options: argparse.Namespace) -> nn.Module:
    """Return a float network, trained now or in an earlier run of this command."""
    network = _reports.untrained(name, splits, options.seed)
    file = options.out / f"{name}.safetensors"
    if not file.exists():
        config = sdq.TrainConfig(epochs=options.epochs, lr=options.lr, seed=options.seed)
        sdq.train_(network, train, config)
        save_tensors(file, network.state_dict())
    network.load_state_dict(load_tensors(file)[0])
    return network


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    lines = [
        f"# 8 bits everywhere, without training: {options.data}",
        "",
        f"`{_reports.command()}`",
        "",
        f"Accuracy on the test split, seed {options.seed}, {options.epochs} epochs of float "
        "training. Below the accuracy, its difference from float in points, and the share of test "
        "images with float's decision. `seconds`: quantization and calibration by default, on "
        f"{options.threads} thread(s). torch {torch.__version__}. The aim: a difference under "
        f"{100 * LIMIT:g} points.",
        "",
        "| model | parameters | float | " + " | ".join(WAYS) + " | seconds | aim |",
        "|---|---|---|" + "---|" * (len(WAYS) + 2),
    ]
    for row in rows:
        cells = [
            f"{row[way]:.4f} ({100 * (row[way] - row['float']):+.2f}; "
            f"{100 * row[f'{way}, agreement']:.1f} %)"
            for way in WAYS
        ]
        met = all(abs(row[way] - row["float"]) < LIMIT for way in WAYS)
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['float']:.4f} | {' | '.join(cells)} "
            f"| {row['default, seconds']:.1f} | {'met' if met else '**missed**'} |"
        )
    _reports.write(options.table, lines)


if __name__ == "__main__":
    main()
