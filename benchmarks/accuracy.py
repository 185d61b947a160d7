"""Accuracy of SDQ beside the float and the uniform network of the same size, over several seeds.

Runs ``sdq train`` once a seed, and ``sdq quantize`` once a seed and method, then writes a table
with means and standard deviations. Interrupted, it goes on where it stopped.

    python benchmarks/accuracy.py --data dermamnist --data-root DIR --out runs/derm \
        --table benchmarks/results/dermamnist_resnet20_2bit.md
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import _reports

from sdq.cli.main import main as sdq

FIGURES = ("accuracy", "balanced_accuracy", "auc")


def run(arguments: list[str], out: Path) -> float:
    """Run a verb into ``out`` unless it is done; return its wall time in seconds."""
    status = out / "run.json"
    seconds = out / "seconds.json"
    if status.exists() and json.loads(status.read_text())["status"] == "done":
        return float(json.loads(seconds.read_text()))
    resume = ["--resume"] if status.exists() else []
    start = time.perf_counter()
    code = sdq([*arguments, "--out", str(out), "--quiet", *resume])
    if code:
        sys.exit(f"sdq {' '.join(arguments)} ended with {code}")
    elapsed = time.perf_counter() - start
    seconds.write_text(json.dumps(elapsed))
    return elapsed


def main() -> None:
    """Run everything and write the table."""
    parser = _reports.data_parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--float-epochs", default="20")
    parser.add_argument("--bits", default="2.0")
    parser.add_argument("--act-bits", default="4")
    parser.add_argument("--epochs", default="12")
    parser.add_argument("--methods", default="sdq,uniform")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    options = parser.parse_args()
    _reports.keep_rows(options.out, options, "bits", "methods")
    root = ["--data-root", str(options.data_root)] if options.data_root else []
    data = ["--data", options.data, *root]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds.split(","):
        base = options.out / f"float-{seed}"
        seeded = [*data, "--seed", seed]
        train = ["train", "--model", options.model, *seeded, "--epochs", options.float_epochs]
        seconds = run(train, base)
        metrics = json.loads((base / "metrics.json").read_text())["float"]
        results.setdefault("float", []).append({**metrics, "bits": 32.0, "seconds": seconds})
        for method in options.methods.split(","):
            out = options.out / f"{method}-{options.bits}-{seed}"
            quantize = [
                "quantize", "--from", str(base), *seeded, "--bits", options.bits,
                "--act-bits", options.act_bits, "--search-method", method,
                "--epochs", options.epochs,
            ]  # fmt: skip
            seconds = run(quantize, out)
            metrics = json.loads((out / "metrics.json").read_text())
            results.setdefault(method, []).append(
                {
                    **metrics["quantized"],
                    "bits": metrics["avg_weight_bits"],
                    "bytes": metrics["weight_bytes"],
                    "seconds": seconds,
                }
            )
    write_table(options, results)


def write_table(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the table as Markdown."""
    count = len(results["float"])
    lines = [
        f"# {options.model} on {Path(options.data).stem}, {options.bits} average weight bits, "
        f"{options.act_bits}-bit activations",
        "",
        f"{count} seeds ({options.seeds}), test split; mean ± standard deviation over seeds. "
        f"`bits` is the mean over the searched layers (first and last are at 8). "
        f"Python {platform.python_version()}, {platform.machine()} CPU.",
        "",
        "```",
        f"sdq train --model {options.model} --data {options.data} "
        f"--epochs {options.float_epochs} --seed S --out f",
        f"sdq quantize --from f --data {options.data} --bits {options.bits} "
        f"--act-bits {options.act_bits} --epochs {options.epochs} --seed S "
        "--search-method M --out q",
        "```",
        "",
        "| network | " + " | ".join(FIGURES) + " | bits | weight bytes | seconds |",
        "|---|" + "---|" * (len(FIGURES) + 3),
    ]
    for name, rows in results.items():
        cells = [_reports.spread([row[key] for row in rows]) for key in FIGURES]
        size = f"{max(r['bytes'] for r in rows):,.0f}" if "bytes" in rows[0] else "-"
        bits = max(row["bits"] for row in rows)
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} | {bits:.4f} | {size} | {seconds:.0f} |")
    lines += ["", "Each seed:", "", "| network | seed | " + " | ".join(FIGURES) + " | bits |"]
    lines.append("|---|---|" + "---|" * (len(FIGURES) + 1))
    for name, rows in results.items():
        for seed, row in zip(options.seeds.split(","), rows, strict=True):
            cells = [f"{row[key]:.4f}" for key in FIGURES]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} | {row['bits']:.4f} |")
    _reports.write(options.table, lines)


if __name__ == "__main__":
    main()
