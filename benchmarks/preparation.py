"""What it costs to prepare a large network: seconds to quantize and to calibrate, and peak memory.

Each row is a process of its own, which does what the rows above it do and then its own step. The
network has random weights and the images are random, for neither changes what is computed.

    python benchmarks/preparation.py --table benchmarks/results/preparation.md

Seconds are those of the last step alone, wall and CPU; memory is the highest resident set of the
whole process, imports included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _reports
import torch

import sdq
from sdq.plugins import load

CLASSES = 1000
STEPS = ("build", "quantize", "calibrate")
Row = dict[str, float]


def main() -> None:
    """Measure each step in processes of its own, and write the table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measured(options)))
        return
    rows = {}
    for step in STEPS:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only", step]
        rows[step] = median([process(command) for _ in range(options.repeats)])
        print(step, rows[step], flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = _reports.parser(__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=32, help="to calibrate on, in one batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def process(command: list[str]) -> Row:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def median(rows: list[Row]) -> Row:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measured(options: argparse.Namespace) -> Row:
    """Do the steps up to the one asked for, and return its seconds and this process's peak."""
    torch.manual_seed(0)
    images = torch.randn(options.images, 3, options.side, options.side)
    labels = torch.zeros(len(images), dtype=torch.int64)
    seconds, network = timed(lambda: load("sdq.models", options.model).build(CLASSES))
    if options.only != "build":
        seconds, qmodel = timed(lambda: sdq.quantize(network, sample=images[:1]))
    if options.only == "calibrate":
        seconds, _ = timed(lambda: sdq.calibrate_(qmodel, [(images, labels)]))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds[0], "cpu_seconds": seconds[1], "bytes": kib * 1024}


def timed(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Return wall and CPU seconds, and what was made."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def write(options: argparse.Namespace, rows: dict[str, Row]) -> None:
    """Write the table as Markdown."""
    side = options.side
    names = {
        "build": "build the network",
        "quantize": "quantize",
        "calibrate": f"calibrate on {options.images} images",
    }
    lines = [
        f"# What preparing a network costs: {options.model} at {side} x {side}",
        "",
        f"`{_reports.command()}`",
        "",
        f"{options.threads} thread(s), torch {torch.__version__}, median of {options.repeats}. "
        "Each row is a process of its own that does the rows above it first: seconds are of its "
        "last step, memory is the highest of the whole process, with what it imports.",
        "",
        "| step | seconds | CPU seconds | peak MiB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {names[step]} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
        f"{row['bytes'] / 2**20:,.0f} |"
        for step, row in rows.items()
    ]
    _reports.write(options.table, lines)


if __name__ == "__main__":
    main()
