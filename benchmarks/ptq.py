"""Quantization after training: mixed and uniform bits, nearest and learned rounding, by seed.

    python benchmarks/ptq.py --data cifar10 --data-root DIR --model resnet20 --weights W \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --out runs/ptq.jsonl
    python benchmarks/ptq.py --data dermamnist --data-root DIR --from runs/float-S \
        --out runs/ptq.jsonl --table benchmarks/results/ptq.md

``S`` in ``--from`` becomes the seed. A seed chooses the calibration images and what the rounding
draws. What is in ``--out`` already is not done again, so several calls gather in one table.
"""

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import _reports
import torch
from torch import Tensor

import sdq
from sdq.cli import inputs as inp
from sdq.cli.option_groups import SourceOptions
from sdq.cli.ptq import calibration_images
from sdq.cli.quantize import Source, open_source
from sdq.metrics import agreement, classification_metrics, predict
from sdq.ptq import search_config, soft_labelled


def open_seed(options: argparse.Namespace, seed: int) -> Source:
    root = str(options.data_root) if options.data_root else None
    request = inp.DataRequest(options.data, root, mean=options.mean, std=options.std, seed=seed)
    folder = Path(options.from_.replace("-S", f"-{seed}")) if options.from_ else None
    return open_source(SourceOptions(options.model, options.weights, folder), request)


def run_seed(options: argparse.Namespace, seed: int, done: list[dict[str, Any]]) -> None:
    """Measure what is not in ``done`` yet, and append it to the file."""
    source = open_seed(options, seed)
    network = source.network.eval()
    config = sdq.PtqConfig(images=options.images, steps=options.steps, seed=seed)
    images = calibration_images(source.inputs, config.images)
    data = soft_labelled(network, images)
    held_out = list(source.inputs.held_out())
    wanted, labels = predict(network, held_out)
    of = {
        "data": options.data, "model": source.described["reference"], "seed": seed,
        "source": Path(options.from_ or options.weights or "first weights").name,
        "network": fingerprint(network), "images": options.images,
    }  # fmt: skip
    have = {key(row) for row in done}

    def note(**row: Any) -> None:
        row = {**of, "act_bits": options.act_bits, **row}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def measured(qmodel: torch.nn.Module | None) -> dict[str, float]:
        logits: Tensor = wanted if qmodel is None else predict(qmodel, held_out)[0]
        metrics = classification_metrics(logits, labels)
        return {"accuracy": metrics["accuracy"], "agreement": agreement(logits, wanted)}

    unquantized = {"act_bits": 0, "bits": 32.0, "method": "float", "steps": 0}
    if key({**of, **unquantized}) not in have:
        note(**measured(None), **unquantized, search_s=0.0, rounding_s=0.0)
    for bits in map(float, options.bits.split(",")):
        for method in options.methods.split(","):
            asked = {**of, "act_bits": options.act_bits, "bits": bits, "method": method}
            every = dict.fromkeys((0, options.steps))
            todo = [n for n in every if key({**asked, "steps": n}) not in have]
            if not todo:
                continue
            quant = sdq.QuantConfig(act_bits=options.act_bits)
            qmodel = sdq.quantize(network, quant, sample=source.inputs.sample)
            sdq.calibrate_(qmodel, data)
            searching = search_config(sdq.SearchConfig(seed=seed))
            start = clock()
            policy = sdq.search(
                qmodel, data, budget=sdq.Budget(avg_weight_bits=bits), teacher=network,
                config=searching, method=method,
            )  # fmt: skip
            search_s = clock() - start
            sdq.apply_policy_(qmodel, policy)
            for steps in todo:  # nearest leaves the network as it is, and comes first
                start = clock()
                if steps:
                    sdq.ptq_(qmodel, images, config)
                rounding_s = clock() - start
                note(
                    bits=bits, method=method, steps=steps, **measured(qmodel), search_s=search_s,
                    rounding_s=rounding_s,
                    policy=[b.weight_bits for b in policy if b.searched],
                    average=policy.avg_weight_bits,
                )  # fmt: skip


def clock() -> float:
    """Return CPU seconds of this process, which other processes do not lengthen."""
    return time.process_time()


def fingerprint(network: torch.nn.Module) -> str:
    """Return a name for a network's weights."""
    found = hashlib.sha256()
    for tensor in network.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:12]


OF = ("data", "model", "network", "images", "seed")
"""What a float network's rows are of."""


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in (*OF, "act_bits", "bits", "method", "steps"))


def write_table(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write means over the seeds as Markdown."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        of = (row["data"], f"{row['model']}, {row['source']}", row["images"])
        groups.setdefault((*of, *key(row)[len(OF) :]), []).append(row)
    base = {key(r)[: len(OF)]: r["accuracy"] for r in rows if r["method"] == "float"}
    lines = [
        "# Quantization after training, without labels",
        "",
        "`images` of the training split are seen, the test split measured; a seed chooses these "
        "images and what the rounding draws. Accuracy is mean ± standard deviation over seeds, "
        "`loss` the mean of what is lost to the same seed's float network, in points; `agreement` "
        "is the share of images on which the quantized network decides as the float one. Bits are "
        "the mean over the searched layers; first and last layer and the input are at 8. CPU "
        "seconds, one thread.",
        "",
        "```",
        *options.commands,
        "```",
        "",
        "| data | network | bits | rounding | method | seeds | accuracy | loss | images "
        "| agreement | search s | rounding s |",
        "|---" * 12 + "|",
    ]
    for group, found in groups.items():
        data, model, images, act, bits, method, steps = group
        values = [r["accuracy"] for r in found]
        lost = statistics.mean(100 * (base[key(r)[: len(OF)]] - r["accuracy"]) for r in found)
        means = [
            statistics.mean(r[k] for r in found) for k in ("agreement", "search_s", "rounding_s")
        ]
        if method == "float":
            cells = [data, model, "float", "-", "-"]
        else:
            rounding = f"learned, {steps} steps" if steps else "nearest"
            cells = [data, model, f"W{bits:g}A{act}", rounding, method]
        seeds = ",".join(str(r["seed"]) for r in found)
        cells += [seeds, _reports.spread(values), f"{lost:.2f}"]
        cells += [str(images), f"{means[0]:.4f}", f"{means[1]:.0f}", f"{means[2]:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    _reports.write(options.table, lines)


def main() -> None:
    """Measure, and write the table if one is asked for."""
    parser = _reports.data_parser(__doc__, model=None)
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--from", dest="from_")
    parser.add_argument("--mean")
    parser.add_argument("--std")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--methods", default="uniform,sensitivity")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=sdq.PtqConfig().steps)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commands", nargs="*", help="Shown in the table; default: this one.")
    options = parser.parse_args()
    options.commands = options.commands or [_reports.command()]
    torch.set_num_threads(1)

    def rows() -> list[dict[str, Any]]:
        lines = options.out.read_text().splitlines() if options.out.exists() else []
        return list({key(row): row for row in map(json.loads, lines)}.values())

    for seed in map(int, filter(None, options.seeds.split(","))):
        run_seed(options, seed, rows())
    if options.table:
        write_table(options, rows())


if __name__ == "__main__":
    main()
