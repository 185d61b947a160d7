r"""Federated methods in a published setting, beside the figures published for it.

PFLlib's: twenty clients, classes divided by Dirichlet(0.1), all clients in every round, one local
epoch of plain SGD with batches of 10, and the first paper's network. Published accuracies on
CIFAR-10 are after 2,000 rounds on 45,000 images, which no CPU does in an hour; so what is compared
is behaviour: which methods are alike, and how far the others are above them.

G is the server's model on all test images, S the mean over clients of their own models, after
local training, on test images with their own mix of classes. FedAvg and FedProx are published
twice: as the server's model, which is G, and (``-C``) trained on by each client, which is S.

    python benchmarks/published_federations.py --data cifar10 --data-root DIR \
        --train-images 5000 --rounds 80 --lr 0.02 --out runs/published \
        --table benchmarks/results/published_federations.md

Each finished run is kept in ``--out``; interrupted, the command goes on where it stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import _reports
import torch
from federated_methods import Bench, federation_parser, value

from sdq.data import DataOptions, open_data

PUBLISHED: dict[str, tuple[float | None, float | None]] = {
    "fedavg": (59.16, 90.34),
    "fedprox;mu=0.001": (59.21, 90.33),
    "fedper": (None, None),
    "fedrep": (None, 90.40),
    "ditto": (None, 90.59),
    "local": (None, None),
}
"""G and S on CIFAR-10 in %. Source: Zhang et al., "FedALA: Adaptive Local Aggregation for
Personalized Federated Learning", AAAI 2023, table 2, https://arxiv.org/abs/2212.01197; its code
became PFLlib. It has no figures of FedPer and of clients alone."""


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    splits = open_data(options.data, DataOptions(root=options.data_root))
    _reports.keep_rows(options.out, options, "partition", "variants")
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        bench = Bench(options, splits, options.partition, seed)
        for variant in options.variants.split(","):
            rows.append(bench.figures(variant))
            print(line(variant, rows), flush=True)
            _reports.write(options.table, lines_of(options, rows))


def arguments() -> argparse.Namespace:
    network = _reports.data_parser(__doc__, "benchmarks/networks/fedavg_cnn.py")
    parser = federation_parser(network)
    parser.add_argument("--partition", default="dirichlet:0.1")
    parser.add_argument("--variants", default=",".join(PUBLISHED))
    parser.set_defaults(
        clients=20, rounds=100, batch_size=10, optimizer="sgd", lr=0.005, seeds="0"
    )  # fmt: skip
    return parser.parse_args()


def lines_of(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[str]:
    """Return the table as Markdown."""
    images = f"{options.train_images:,} training images" if options.train_images else "all images"
    return [
        f"# Federated methods in a published setting: {Path(options.data).stem}",
        "",
        f"Seeds {options.seeds}; {options.clients} clients, {options.partition}, {images}, "
        f"{options.rounds} rounds of {options.local_epochs} local epoch, "
        f"{options.optimizer} without momentum, learning rate {options.lr:g}, "
        f"batches of {options.batch_size}. Published: 45,000 "
        "training images, 2,000 rounds, learning rate 0.005. Accuracy in %; G: the server's model "
        "on all test images; S: each client's own, mean over clients. torch "
        f"{torch.__version__}.",
        "",
        f"`{_reports.command()}`",
        "",
        "| method | G | S | G, published | S, published | s |",
        "|---|---|---|---|---|---|",
        *(line(variant, rows) for variant in dict.fromkeys(row["variant"] for row in rows)),
    ]


def line(variant: str, rows: list[dict[str, Any]]) -> str:
    """Return a method's line: means over the seeds."""
    some = [row for row in rows if row["variant"] == variant]
    ours = [mean([value(row, kind, "plain", "accuracy") for row in some])
            for kind in ("generalization", "specialization")]  # fmt: skip
    theirs = ["" if x is None else f"{x:.2f}" for x in PUBLISHED.get(variant, (None, None))]
    seconds = sum(row["seconds"] for row in some) / len(some)
    return f"| {variant} | {ours[0]} | {ours[1]} | {theirs[0]} | {theirs[1]} | {seconds:.0f} |"


def mean(values: list[float | None]) -> str:
    """Return the mean in %, or nothing where nothing is known."""
    known = [100 * v for v in values if v is not None]
    return f"{sum(known) / len(known):.2f}" if known else ""


if __name__ == "__main__":
    main()
