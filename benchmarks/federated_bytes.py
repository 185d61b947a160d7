r"""Bytes on the wire against accuracy: the same federation in float and with compressed changes.

A variant is ``float``, ``BITS`` or ``up=BITS,down=BITS``, as ``sdq federate --compress`` takes it;
several are separated by spaces. Bytes are those of all tensors in the messages of all rounds. The
figures are those of the server's model on all test images: in the last round, and as the mean of
the last rounds, since one round's figure moves by a point or two from round to round whatever is
sent. Each finished run is kept in ``--out``; interrupted, the command goes on where it stopped.

    python benchmarks/federated_bytes.py --data DIR/dermamnist.npz --rounds 16 \
        --out runs/bytes --table benchmarks/results/federated_bytes.md
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import _reports
import federated_methods
import torch

import fl
from fl.compression import CompressionConfig
from sdq.data import DataOptions, open_data

VARIANTS = "float 8 4 up=3,down=4 3 2 1"
METRICS = ("accuracy", "balanced_accuracy", "auc")


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    splits = open_data(options.data, DataOptions(root=options.data_root))
    _reports.keep_rows(options.out, options, "method", "participation", "variants", "last")
    rows = []
    for seed in map(int, options.seeds.split(",")):
        bench = federated_methods.Bench(options, splits, options.partition, seed)
        for variant in options.variants.split():
            rows.append(figures(bench, variant))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "rounds"}), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    network = federated_methods.network_parser(__doc__)
    parser = federated_methods.federation_parser(network)
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--partition", default="dirichlet:1.0")
    parser.add_argument("--participation", type=float, default=1.0)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--last", type=int, default=5, help="rounds whose figures are averaged")
    parser.set_defaults(rounds=16, seeds="0")
    return parser.parse_args()


def figures(bench: federated_methods.Bench, variant: str) -> dict[str, Any]:
    """Return a run's figures, from its file if it is there."""
    options = bench.options
    name = variant.replace("=", "").replace(",", "-")
    file = options.out / f"{options.method}-{name}-{options.participation:g}-{bench.seed}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    start = time.perf_counter()
    compress = None if variant == "float" else CompressionConfig.parsed(variant)
    changes = {
        "compress": compress, "loss": fl.LossConfig(name="balanced_softmax"),
        "participation": options.participation, "evaluate_every": 1, "evaluate_absent": False,
    }  # fmt: skip
    clients = [fl.ClientData(c.name, c.train) for c in bench.clients]  # theirs are not measured
    done = fl.run(
        bench.network(), method=options.method, clients=clients, num_classes=bench.classes,
        config=bench.config(changes), test=[bench.test], normalization=bench.normalization,
    )  # fmt: skip
    measured = [r["generalization"]["test"] for r in done.history]
    row = {
        "variant": variant, "seed": bench.seed, "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down, "seconds": time.perf_counter() - start,
        "failures": sum(len(r["failures"]) for r in done.history),
        "rounds": [{m: figures[m] for m in METRICS} for figures in measured],
    }  # fmt: skip
    file.write_text(json.dumps(row))
    return row


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    part = f"{options.train_images:,} of its training images, " if options.train_images else ""
    title = " | ".join([*METRICS, *(f"{m}, last {options.last}" for m in METRICS)])
    lines = [
        f"# Bytes of a federation: {options.method}, {options.model} on {Path(options.data).stem}",
        "",
        f"{options.partition}, {options.clients} clients, participation {options.participation:g}, "
        f"{part}balanced softmax, {options.rounds} rounds of {options.local_epochs} epochs, Adam "
        f"{options.lr:g}, batches of {options.batch_size}; seeds {options.seeds}; mean ± standard "
        f"deviation over seeds. torch {torch.__version__}, device {options.device}.",
        "",
        f"`{_reports.command()}`",
        "",
        "MB: of all tensors in all rounds' messages, of all clients. `of float`: up and down "
        "together, as a part of what the run in float sends.",
        "",
        f"| bits | MB up | MB down | of float | {title} |",
        "|---|---|---|---|" + "---|" * (2 * len(METRICS)),
    ]
    float_bytes = of(rows, "float", lambda r: r["bytes_up"] + r["bytes_down"])
    for variant in options.variants.split():
        both = of(rows, variant, lambda r: r["bytes_up"] + r["bytes_down"])
        cells = [
            f"{statistics.mean(of(rows, variant, lambda r: r['bytes_up'])) / 1e6:.2f}",
            f"{statistics.mean(of(rows, variant, lambda r: r['bytes_down'])) / 1e6:.2f}",
            f"1/{statistics.mean(float_bytes) / statistics.mean(both):.1f}" if float_bytes else "",
        ]
        for count in (1, options.last):
            for metric in METRICS:
                values = of(rows, variant, lambda r, m=metric, c=count: last(r, m, c))
                cells.append(_reports.spread(values))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    _reports.write(options.table, lines)


def of(rows: list[dict[str, Any]], variant: str, figure: Any) -> list[float]:
    """Return a figure of a variant's runs."""
    return [figure(row) for row in rows if row["variant"] == variant]


def last(row: dict[str, Any], metric: str, count: int) -> float:
    """Return the mean of a metric over the last rounds."""
    return statistics.mean(r[metric] for r in row["rounds"][-count:])


if __name__ == "__main__":
    main()
