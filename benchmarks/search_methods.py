"""SDQ beside other ways to choose bitwidths, and beside itself with parts taken away.

Every variant starts from the same float network, gets the same budget, the same images and the same
fine-tuning. A variant is a search method, with settings of phase 1 or 2 changed if wished:

    sdq    sdq;search.distill=false    sdq;train.bin_weight=0    hessian    uniform

The table has accuracy, what the policy costs, and the search's seconds; of several budgets there
is a plot beside it. Each finished variant is kept in ``--out``; interrupted, the command goes on
where it stopped. Variants that differ in phase 2 alone share one search.

    python benchmarks/search_methods.py --data cifar10 --data-root DIR --weights F.safetensors \
        --bits 1.5,2 --seeds 0,1,2 --out runs/methods --table benchmarks/results/NAME.md
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import _reports
import torch
from scipy.stats import spearmanr
from torch import nn

import sdq
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import load_tensors, save_tensors
from sdq.data import DataOptions, Splits, open_data
from sdq.parallel import open_fabric
from sdq.train import StepReport

FIGURES = ("accuracy", "balanced_accuracy", "auc")
METHODS = "sdq,interpolate,hessian,sensitivity,greedy,random,uniform"


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    rows: list[dict[str, Any]] = []
    for bench in benches(Bench, options, "bits", "variants"):
        rows.append({"variant": "float", "bits": 32.0, "seed": bench.seed, **bench.float_figures()})
        for bits in map(float, options.bits.split(",")):
            for variant in filter(None, options.variants.split(",")):
                row = bench.figures(variant, bits)
                rows.append(row | {"size_rank": bench.size_rank(row["policy"])})
                print(json.dumps(rows[-1]), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = search_parser(__doc__)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--variants", default=METHODS, help="empty: the float network alone")
    return parser.parse_args()


def search_parser(description: str | None, model: str = "resnet20") -> argparse.ArgumentParser:
    """Return a parser of what every benchmark that trains, searches and fine-tunes takes."""
    parser = _reports.data_parser(description, model)
    parser.add_argument("--weights", type=Path, help="float weights to start from")
    parser.add_argument("--mean", default=None, help="with --weights: their normalisation")
    parser.add_argument("--std", default=None)
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--float-lr", type=float, default=1e-3)
    parser.add_argument("--train-images", type=int, default=0, help="a part of them; 0: all")
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--first-last-bits", type=int, default=8, help="0: these are searched too")
    parser.add_argument("--search-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--judge", choices=("test", "validation"), default="test", help="images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    return parser


class Bench:
    """Everything of one seed."""

    def __init__(self, options: argparse.Namespace, splits: Splits, seed: int, fabric: Any) -> None:
        self.options, self.seed, self.fabric = options, seed, fabric
        train = _reports.part(splits.train, options.train_images)
        if options.mean:
            self.normalization = Normalization(numbers(options.mean), numbers(options.std))
        else:
            self.normalization = Normalization.of(splits.train)
        flips = Augmentation(splits.horizontal_flip, splits.vertical_flip)
        self.loader = Batches(train, self.normalization, shuffle=True, seed=seed, augment=flips)
        self.plain = Batches(train, self.normalization, shuffle=True, seed=seed)
        judged = {"test": splits.test, "validation": splits.val}[options.judge]
        assert judged is not None
        self.test = Batches(judged, self.normalization, batch_size=500)
        self.splits, self.sample = splits, torch.zeros(1, *splits.image_shape)
        self.network = self.float_network()

    def float_network(self) -> nn.Module:
        network = _reports.untrained(self.options.model, self.splits, self.seed)
        file = self.options.out / f"float-{self.seed}.safetensors"
        if not file.exists():
            if self.options.weights:
                network.load_state_dict(load_tensors(self.options.weights)[0])
            config = sdq.TrainConfig(
                epochs=self.options.float_epochs, lr=self.options.float_lr, seed=self.seed
            )
            sdq.train_(network, self.loader, config, fabric=self.fabric)
            save_tensors(file, network.state_dict())
        network.load_state_dict(load_tensors(file)[0])
        return network.to(self.fabric.device)

    def float_figures(self) -> dict[str, Any]:
        found = sdq.evaluate(self.network, self.test)
        return {key: found[key] for key in FIGURES}

    def figures(self, variant: str, bits: float) -> dict[str, Any]:
        file = self.options.out / f"{variant.replace(';', '+')}-{bits:g}-{self.seed}.json"
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text())
            return known
        method, search, train = settings(variant)
        qmodel = self.quantized()
        policy, told = self.search_once(qmodel, method, search, bits)
        sdq.apply_policy_(qmodel, policy)
        if not qmodel.calibrated:
            sdq.calibrate_(qmodel, self.plain)
        tuning = sdq.TrainConfig(**{"epochs": self.options.epochs, "seed": self.seed, **train})
        sdq.finetune_(qmodel, self.loader, teacher=self.network, config=tuning, fabric=self.fabric)
        found = sdq.evaluate(qmodel, self.test)
        row = {
            "variant": variant, "bits": bits, "seed": self.seed,
            **{key: found[key] for key in FIGURES},
            "average_bits": policy.avg_weight_bits, "weight_bytes": policy.weight_bytes,
            **told, "policy": [b.weight_bits for b in policy],
        }  # fmt: skip
        file.write_text(json.dumps(row))
        return row

    def quantized(self) -> sdq.QuantModel:
        config = sdq.QuantConfig(
            act_bits=self.options.act_bits, first_last_bits=self.options.first_last_bits or None
        )
        qmodel = sdq.quantize(self.network, config, sample=self.sample.to(self.fabric.device))
        sdq.calibrate_(qmodel, self.plain)
        return qmodel

    def search_once(
        self, qmodel: sdq.QuantModel, method: str, changes: dict[str, Any], bits: float
    ) -> tuple[sdq.BitwidthPolicy, dict[str, Any]]:
        """Return a search's policy and what a row says of the search; done once."""
        name = "+".join([method, *(f"{key}={value}" for key, value in changes.items())])
        file = self.options.out / f"search-{name}-{bits:g}-{self.seed}.json"
        if file.exists() and not changes.get("keep_weights"):  # weights are not in the file
            known = json.loads(file.read_text())
            return sdq.BitwidthPolicy.from_json(known["policy"]), known["told"]
        watched: list[StepReport] = []
        searching = {"epochs": self.options.search_epochs, "seed": self.seed, **changes}
        start = time.perf_counter()
        policy = sdq.search(
            qmodel, self.loader, budget=sdq.Budget(avg_weight_bits=bits), teacher=self.network,
            config=sdq.SearchConfig(**searching), method=method, fabric=self.fabric,
            watch=watched.append,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        # the second half: the first is still falling
        half = [report.loss for report in watched[len(watched) // 2 :]]
        uses = [r.end_of_epoch["budget_use"] for r in watched if r.end_of_epoch]
        told = {
            "search_seconds": seconds,
            "search_loss_deviation": statistics.pstdev(half) if half else None,
            "budget_use": max(uses[-1].values()) if uses else None,
        }
        file.write_text(json.dumps({"policy": policy.to_json(), "told": told}))
        return policy, told

    @cached_property
    def layers(self) -> tuple[sdq.LayerBits, ...]:
        return self.quantized().policy.layers

    def size_rank(self, bits: list[int]) -> float | None:
        """Return Spearman's correlation of a layer's bits with its weights; None for equal bits."""
        pairs = [
            (layer.num_weights, b)
            for layer, b in zip(self.layers, bits, strict=True)
            if layer.searched
        ]
        sizes, chosen = zip(*pairs, strict=True)
        return float(spearmanr(sizes, chosen).statistic) if len(set(chosen)) > 1 else None


AnyBench = TypeVar("AnyBench", bound=Bench)


def benches(kind: type[AnyBench], options: argparse.Namespace, *told: str) -> Iterator[AnyBench]:
    """Yield a bench for each seed, on one device and one set of images.

    ``told`` is as of :func:`_reports.keep_rows`.
    """
    fabric = open_fabric(options.device)
    splits = open_data(options.data, DataOptions(root=options.data_root))
    _reports.keep_rows(options.out, options, *told)
    for seed in map(int, options.seeds.split(",")):
        yield kind(options, splits, seed, fabric)


def settings(variant: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read ``method;search.key=value;train.key=value``."""
    method, *changes = variant.split(";")
    found: dict[str, dict[str, Any]] = {"search": {}, "train": {}}
    for change in changes:
        path, _, value = change.partition("=")
        phase, _, key = path.partition(".")
        found[phase][key] = value if value.isalpha() and value not in WORDS else json.loads(value)
    return method, found["search"], found["train"]


WORDS = ("true", "false", "null")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    part = f"{options.train_images:,} of its training images, " if options.train_images else ""
    start = "published float weights, then " if options.weights else ""
    bits = options.first_last_bits
    edges = f"first and last layer at {bits} bits" if bits else "every layer searched"
    lines = [
        f"# Ways to choose bitwidths: {options.model} on {Path(options.data).stem}",
        "",
        f"Seeds {options.seeds}; {part}{options.judge} split; "
        f"mean ± standard deviation over seeds. {start}"
        f"{options.float_epochs} epochs of float training, {options.search_epochs} of search "
        f"(where a method trains), {options.epochs} of fine-tuning, {options.act_bits}-bit "
        f"activations, {edges}. torch {torch.__version__}, device {options.device}.",
        "",
        f"`{_reports.command()}`",
        "",
        "`budget` is the mean of the searched layers' weight bits, `bits` what the policy has. "
        "`deviation` is that of the loss over the steps of the search's second half, `use` the "
        "expected cost over the budget at the search's end, before the projection, by seed; `rank` "
        "Spearman's correlation of a layer's bits with its number of weights.",
        "",
        "| variant | budget | "
        + " | ".join(FIGURES)
        + " | bits | bytes | seconds | deviation | use | rank |",
        "|---|---|" + "---|" * (len(FIGURES) + 6),
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["bits"]), []).append(row)
    for (variant, bits), found in groups.items():
        cells = [_reports.spread([row[key] for row in found]) for key in FIGURES]
        if variant == "float":
            lines.append(f"| float | 32 | {' | '.join(cells)} | 32 | | | | | |")
            continue
        seconds = statistics.mean(row["search_seconds"] for row in found)
        deviations = [row["search_loss_deviation"] for row in found]
        deviation = f"{statistics.mean(deviations):.3f}" if None not in deviations else ""
        uses = [row["budget_use"] for row in found]
        use = ", ".join(f"{use:.2f}" for use in uses) if None not in uses else ""
        lines.append(
            f"| {variant} | {bits:g} | {' | '.join(cells)} | "
            f"{max(row['average_bits'] for row in found):.3f} | "
            f"{max(row['weight_bytes'] for row in found):,.0f} | {seconds:.0f} | {deviation} | "
            f"{use} | {mean_rank(found)} |"
        )
    if options.table and len({bits for _, bits in groups}) > 2:  # the float network's is one
        picture = options.table.with_suffix(".svg")
        plot(picture, groups)
        lines += ["", f"![accuracy over the bytes of weights]({picture.name})"]
    lines += ["", "Policies (bits of each layer in order; one list a seed):", ""]
    for (variant, bits), found in groups.items():
        if variant != "float":
            lists = "; ".join("".join(map(str, row["policy"])) for row in found)
            lines.append(f"- {variant}, {bits:g}: {lists}")
    _reports.write(options.table, lines)


def mean_rank(rows: list[dict[str, Any]]) -> str:
    ranks = [row["size_rank"] for row in rows if row["size_rank"] is not None]
    return f"{statistics.mean(ranks):+.2f}" if ranks else ""


def plot(path: Path, groups: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Draw the accuracy of every variant over its bytes, with standard deviations over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (variant, _), rows in groups.items():
        accuracy = [100 * row["accuracy"] for row in rows]
        if variant == "float":
            axes.axhline(statistics.mean(accuracy), color="#222222", ls="--", lw=1, label="float")
            continue
        size = statistics.mean(row["weight_bytes"] for row in rows) / 1000
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        lines.setdefault(variant, []).append((size, statistics.mean(accuracy), spread))
    for variant, points in lines.items():
        sizes, means, spreads = zip(*sorted(points), strict=True)
        axes.errorbar(sizes, means, spreads, marker="o", ms=4, capsize=3, label=variant)
    axes.set(xlabel="kilobytes of weights", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
