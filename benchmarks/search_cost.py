"""What a search costs: seconds and peak memory of every method beside one float training.

Each is a process of its own with the same network, images and budget; the clock is the process's
CPU time, memory the highest resident set less that just before it runs.

    python benchmarks/search_cost.py --data dermamnist --data-root DIR \
        --table benchmarks/results/search_cost.md
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _reports
import torch
from torch import nn

import sdq
from sdq.batches import Augmentation, Batches, Normalization
from sdq.data import DataOptions, open_data

METHODS = ("sdq", "interpolate", "hessian", "sensitivity", "greedy", "random", "uniform")
FLOAT = "float training"


def main() -> None:
    """Measure each in a process of its own, and write the table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measured(options)))
        return
    rows = {}
    for name in (FLOAT, *METHODS):
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--search-epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", choices=(FLOAT, *METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Return seconds and bytes of one method in this process."""
    splits = open_data(options.data, DataOptions(root=options.data_root))
    normalization = Normalization.of(splits.train)
    flips = Augmentation(splits.horizontal_flip, splits.vertical_flip)
    loader = Batches(splits.train, normalization, shuffle=True, augment=flips)
    images, labels = next(iter(loader))
    # what the first step imports and allocates for good is not the method's
    sdq.train_(network(options, splits), [(images[:8], labels[:8])], sdq.TrainConfig(epochs=1))
    qmodel = sdq.quantize(network(options, splits), sample=images[:1])
    float_network = network(options, splits)
    run: Callable[[], Any]
    if options.only == FLOAT:
        config = sdq.TrainConfig(epochs=1)

        def run() -> None:
            sdq.train_(float_network, loader, config)
    else:
        sdq.calibrate_(qmodel, loader)

        def run() -> None:
            sdq.search(
                qmodel, loader, budget=sdq.Budget(avg_weight_bits=options.bits),
                teacher=float_network, config=sdq.SearchConfig(epochs=options.search_epochs),
                method=options.only,
            )  # fmt: skip

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = _reports.resident("VmRSS"), time.process_time()
    run()
    seconds = time.process_time() - start
    epochs = options.float_epochs if options.only == FLOAT else 1  # every epoch costs the same
    return {"seconds": seconds * epochs, "bytes": max(_reports.resident("VmHWM") - before, 0)}


def network(options: argparse.Namespace, splits: Any) -> nn.Module:
    return _reports.untrained(options.model, splits, seed=0)


def write(options: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    """Write the table as Markdown."""
    base = rows[FLOAT]
    lines = [
        f"# What a search costs: {options.model} on {Path(options.data).stem}",
        "",
        f"`{_reports.command()}`",
        "",
        f"Budget {options.bits:g} bits; {options.search_epochs} epochs of search where a method "
        f"trains; the float training has {options.float_epochs} epochs, of which one was measured. "
        f"CPU seconds on {options.threads} thread(s), each in a process of its own; torch "
        f"{torch.__version__}.",
        "",
        "| | seconds | x float training | peak MiB | x float training |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['seconds'] / base['seconds']:.3f} | "
            f"{row['bytes'] / 2**20:.0f} | {row['bytes'] / base['bytes']:.2f} |"
        )
    _reports.write(options.table, lines)


if __name__ == "__main__":
    main()
