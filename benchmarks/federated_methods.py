r"""Federated methods beside each other: generalization and specialization, absent classes masked.

A variant is a method, with hyper-parameters, the loss or the federation changed if wished:

    fedavg    fedavg;loss=balanced_softmax    fednpr;around=moon    prr;config.local_epochs=5

Images are divided as ``sdq federate --partition`` divides them: ``dirichlet:ALPHA``, ``natural``,
or by a published federation's class counts (``counts:ich10`` leaves most clients without one or two
classes); a client's validation and test images have the mix of its training images. The table has
balanced accuracy and AUC of the server's model on all test images (G) and of the clients' models
on their own (S): with logits as they are; without the classes that were never trained on (masked);
and minus the logarithm of the prior, at test time (adjusted; for models trained with
cross-entropy). Each finished run is kept in ``--out``; interrupted, the command goes on where it
stopped.

    python benchmarks/federated_methods.py --data DIR/dermamnist.npz --rounds 24 --seeds 0,1,2 \
        --out runs/federated --table benchmarks/results/NAME.md
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _reports
import torch
from torch import nn

import fl
from fl.clients import Partition, clients_of
from sdq.batches import Augmentation, Normalization, first_weights
from sdq.data import DataOptions, Splits, open_data
from sdq.errors import RequestError
from sdq.plugins import names

BALANCED = "loss=balanced_softmax"
REFERENCE = f"fedavg;{BALANCED}"
# the losses first, then every method; a personalized method with the balanced loss too, since
# without it it is compared with methods that have it
BESIDE = (
    f"local;{BALANCED}", f"fedavg;{BALANCED}", f"centralized;{BALANCED}", "fedavg;loss=focal",
    "fedavg;loss=weighted", "fedavg;loss=ldam_drw", f"fedper;{BALANCED}", f"fedrep;{BALANCED}",
    f"ditto;{BALANCED}", f"apfl;{BALANCED}", f"pfa;{BALANCED}", "fednpr;weight=0",
    "fednpr_per;weight=0", "fednpr;around=moon", "fednpr;around=ditto",
)  # fmt: skip
PARTITIONS = "dirichlet:1.0,dirichlet:0.3,counts:ich10"
COLUMNS = (
    ("G", "generalization", "plain", "balanced_accuracy"),
    ("G adjusted", "generalization", "adjusted", "balanced_accuracy"),
    ("G AUC", "generalization", "plain", "auc"),
    ("S", "specialization", "plain", "balanced_accuracy"),
    ("S masked", "specialization", "masked", "balanced_accuracy"),
    ("S adjusted", "specialization", "adjusted", "balanced_accuracy"),
    ("S AUC", "specialization", "plain", "auc"),
)


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    splits = open_data(options.data, DataOptions(root=options.data_root))
    _reports.keep_rows(options.out, options, "partitions", "variants")
    rows = []
    for partition in options.partitions.split(","):
        for seed in map(int, options.seeds.split(",")):
            bench = Bench(options, splits, partition, seed)
            for variant in options.variants.split(","):
                rows.append(bench.figures(variant))
                print(line(rows[-1]), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = federation_parser(network_parser(__doc__))
    parser.add_argument("--partitions", default=PARTITIONS)
    parser.add_argument("--variants", default=",".join((*BESIDE, *names("fl.methods"))))
    return parser.parse_args()


def federation_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what :class:`Bench` makes a federation of."""
    parser.add_argument("--clients", type=int, default=6, help="of a Dirichlet partition")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--keep-optimizer", action="store_true")
    parser.add_argument("--augment", action="store_true", help="flips, where the data allow them")
    parser.add_argument("--train-images", type=int, default=0, help="a part of them; 0: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    return parser


def network_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what :class:`Bench` makes its network of."""
    parser = _reports.data_parser(description, "group_norm_cnn")
    parser.add_argument("--widths", default="32,64,128", help="channels of a small network")
    return parser


SMALL: dict[str, Callable[[int], nn.Module]] = {
    "group_norm_cnn": lambda size: nn.GroupNorm(8, size),
    "batch_norm_cnn": nn.BatchNorm2d,
}
"""Normalisation of networks that are no one's model: without statistics of batches, and with."""


def small_cnn(classes: int, channels: int, widths: list[int], model: str) -> nn.Module:
    """Return a network of as many layers as there are widths: 95,000 values at 32, 64, 128."""
    layers: list[nn.Module] = []
    for size in widths:
        layers += [
            nn.Conv2d(channels, size, 3, padding=1), SMALL[model](size), nn.ReLU(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
        channels = size
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class Bench:
    """Everything of one partition and seed."""

    def __init__(
        self, options: argparse.Namespace, splits: Splits, partition: str, seed: int
    ) -> None:
        self.options, self.partition, self.seed = options, partition, seed
        self.splits, train = splits, _reports.part(splits.train, options.train_images)
        made = Partition.parsed(partition)
        number = options.clients if made.kind in ("dirichlet", "iid") else None
        self.clients = clients_of(replace(splits, train=train), made, number, seed)
        self.test = splits.test
        self.classes = len(splits.class_names)
        self.channels = splits.image_shape[0]
        self.normalization = Normalization.of(train)
        self.augment = None
        if options.augment:
            self.augment = Augmentation(splits.horizontal_flip, splits.vertical_flip)

    def network(self) -> nn.Module:
        options = self.options
        if options.model not in SMALL:
            found = _reports.untrained(options.model, self.splits, self.seed)
            return found.to(options.device)
        with first_weights(self.seed):
            widths = [int(width) for width in options.widths.split(",")]
            found = small_cnn(self.classes, self.channels, widths, options.model)
        return found.to(options.device)

    def config(self, changes: dict[str, Any]) -> fl.FederationConfig:
        options = self.options
        given = {
            "rounds": options.rounds, "local_epochs": options.local_epochs, "lr": options.lr,
            "batch_size": options.batch_size, "keep_optimizer": options.keep_optimizer,
            "optimizer": options.optimizer,
            "evaluate_every": options.rounds, "adjust": 1.0, "seed": self.seed,
        }  # fmt: skip
        return fl.FederationConfig(**(given | changes))

    def figures(self, variant: str) -> dict[str, Any]:
        name = variant.replace(";", "+").replace(":", "")
        file = self.options.out / f"{self.partition.replace(':', '')}-{name}-{self.seed}.json"
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text())
            return known
        row: dict[str, Any] = {
            "partition": self.partition, "variant": variant, "seed": self.seed
        }  # fmt: skip
        start = time.perf_counter()
        method, hyper, changes = settings(variant)
        try:
            found = fl.run(
                self.network(), method=fl.method(method, **hyper), clients=self.clients,
                num_classes=self.classes, config=self.config(changes),
                test=None if self.test is None else [self.test],
                normalization=self.normalization, augment=self.augment,
            )  # fmt: skip
        except RequestError as error:
            return row | {"refused": str(error)}
        row |= {
            "generalization": found.generalization, "specialization": found.specialization,
            "train_loss": [r["train_loss"] for r in found.history],
            "failures": sum(len(r["failures"]) for r in found.history),
            "bytes_up": found.bytes_up, "seconds": time.perf_counter() - start,
        }  # fmt: skip
        file.write_text(json.dumps(row))
        return row


def settings(variant: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read ``method;key=value;loss=NAME;config.key=value``."""
    method, *changes = variant.split(";")
    hyper: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key == "loss":
            config["loss"] = fl.LossConfig(name=value)
        elif key.startswith("config."):
            config[key.removeprefix("config.")] = value
        else:
            hyper[key] = value
    return method, hyper, config


def value(row: dict[str, Any], kind: str, variant: str, metric: str) -> float | None:
    """Return a figure of the view that counts; where nothing is masked, the plain one."""
    if row.get(kind) is None:
        return None
    view = next(iter(row[kind]["views"].values()))
    found: float | None = view.get(variant, view["plain"])[metric]
    return found


def line(row: dict[str, Any]) -> str:
    """Return a run's progress line."""
    if "refused" in row:
        return f"{row['partition']} {row['variant']} {row['seed']}: refused: {row['refused']}"
    cells = [
        f"{name} {100 * found:.1f}"
        for name, *where in COLUMNS
        if (found := value(row, *where)) is not None
    ]
    losses = row["train_loss"]
    return (
        f"{row['partition']} {row['variant']} {row['seed']}: {', '.join(cells)}; loss "
        f"{losses[0]:.3f} to {losses[-1]:.3f}; {row['seconds']:.0f} s"
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the tables as Markdown, one a partition."""
    part = f"{options.train_images:,} of its training images, " if options.train_images else ""
    model = options.model
    if model in SMALL:
        model += f" (widths {options.widths.replace(',', ', ')})"
    lines = [
        f"# Federated methods: {model} on {Path(options.data).stem}",
        "",
        f"Seeds {options.seeds}; {part}{options.rounds} rounds of {options.local_epochs} epochs, "
        f"{options.optimizer} {options.lr:g}, "
        f"{'kept' if options.keep_optimizer else 'anew each round'}, batches "
        f"of {options.batch_size}; last round; mean ± standard deviation over seeds. "
        f"torch {torch.__version__}, device {options.device}.",
        "",
        f"`{_reports.command()}`",
        "",
        "G: the server's model on all test images. S: each client's model on its own, mean over "
        "clients. Balanced accuracy in % unless AUC is said. `masked`: without the classes that a "
        "client never trained on; `adjusted`: minus the logarithm of the prior, at test time; "
        f"`worst`: the client of lowest S; `+G`, `+S`: less those of `{REFERENCE}`, seed by seed.",
    ]
    for partition in options.partitions.split(","):
        title = " | ".join(name for name, *_ in COLUMNS)
        lines += [
            "", f"## {partition}", "", f"| variant | {title} | worst | +G | +S | MB up |",
            "|---|" + "---|" * (len(COLUMNS) + 4),
        ]  # fmt: skip
        for variant in options.variants.split(","):
            found, reference = (
                [r for r in rows if r["partition"] == partition and r["variant"] == name]
                for name in (variant, REFERENCE)
            )
            lines.append(f"| {variant} | {cells(found, reference)} |")
    _reports.write(options.table, lines)


def cells(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Return a variant's figures over the seeds; ``reference`` has the same seeds, or is empty."""
    if "refused" in rows[0]:
        return "refused" + " |" * (len(COLUMNS) + 3)
    found = [percent([value(r, *where) for r in rows]) for _, *where in COLUMNS]
    worst = [r["specialization"]["worst_balanced_accuracy"] for r in rows if r["specialization"]]
    found.append(percent(worst))
    for kind in ("generalization", "specialization"):
        both = zip(rows, reference, strict=False)
        pairs = [[value(r, kind, "plain", "balanced_accuracy") for r in pair] for pair in both]
        found.append(percent([a - b for a, b in pairs if a is not None and b is not None]))
    found.append(f"{max(r['bytes_up'] for r in rows) / 1e6:.0f}")
    return " | ".join(found)


def percent(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation in %, or nothing where nothing is known."""
    known = [100 * v for v in values if v is not None]
    return _reports.spread(known, digits=1) if known else ""


if __name__ == "__main__":
    main()
