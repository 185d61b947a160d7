"""The tables of ``peers.py``."""

import math
from typing import Any

import numpy as np


def lines_of(rows: list[dict[str, Any]], edge_bits: int, commands: list[str]) -> list[str]:
    """Return the tables as Markdown: one for each network, data set and task.

    Args:
        rows: as ``peers.py`` keeps them, with ``right``: which test images are.
        edge_bits: of the first and last layer.
        commands: that measured the rows.
    """
    lines = [
        "# SDQ beside other toolkits",
        "",
        "Float weights, images, their order and, in `qat`, loop, loss (the float network's soft "
        "labels) and learning rates are the same for all; SDQ's loss has its bin regularization "
        "beside, with mixed bits and with uniform ones. First and last layer have "
        f"{edge_bits} bits. `bytes` are bits times weights of all layers, over 8; scales, "
        "biases and normalisation are not counted. No toolkit's weights have more levels than its "
        "bits allow, unless a row says so. `less than SDQ` is in points, with the standard error "
        "of the difference on these test images. `agreement` is the share of images on which the "
        "network decides as the float one. `CPU s` is the time to quantize, with one thread, and "
        "`MiB` the highest resident set of the process that does it, torch included. `file` is its "
        "ONNX file in KiB, or why there is none; `same` the share of images on which onnxruntime "
        "decides by that file as the toolkit's own network does; `speed` the float file's time "
        "over this file's in onnxruntime, batches of 8, one thread.",
        "",
        "```",
        *commands,
        "```",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["data"], row["model"], row["bits"], row["act_bits"], row["seed"])
        groups.setdefault(key, []).append(row)
    for (task, data, model, bits, act, seed), found in sorted(groups.items()):
        first = found[0]
        ours = next((row["right"] for row in found if row["toolkit"] == "sdq"), None)
        images = (
            f"{first['calibration']} calibration images without labels"
            if task == "ptq"
            else f"{first['train_images']:,} training images, {first['epochs']} epochs"
        )
        lines += [
            "",
            f"## {task}, {model} on {data}, W{bits}A{act}, seed {seed}",
            "",
            f"{images}; {first['test_images']:,} test images; float accuracy {first['float']:.4f}.",
            "",
            "| toolkit | accuracy | less than SDQ | agreement | inner bits | bytes | CPU s | MiB "
            "| file | same | speed |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(line(row, ours) for row in sorted(found, key=lambda row: -row.get("accuracy", 0))),
        ]
    versions = {k: v for row in rows for k, v in row.get("versions", {}).items()}
    return [
        *lines,
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".",
    ]


def difference(right: np.ndarray, ours: np.ndarray | None) -> str:
    """Return by how much less is right than SDQ has, with the standard error, in points."""
    if ours is None or right is ours:
        return ""
    less = 100 * (ours - right)
    return f"{less.mean():+.2f} ± {less.std(ddof=1) / math.sqrt(len(less)):.2f}"


def line(row: dict[str, Any], ours: np.ndarray | None) -> str:
    """Return a toolkit's line of a table."""
    if "failed" in row:
        return f"| {row['toolkit']} | failed: {row['failed']} |" + " |" * 9
    notes = [row["note"]] if row["note"] else []
    notes += [f"too many levels in {name}" for name in row["too_many_levels"]]
    name = row["toolkit"] + (f" ({'; '.join(notes)})" if notes else "")
    written = "file_bytes" in row
    cells = [
        name, f"{row['accuracy']:.4f}", difference(row["right"], ours), f"{row['agreement']:.4f}",
        f"{row['inner_bits']:.3f}", f"{row['weight_bytes']:,.0f}", f"{row['cpu_seconds']:.0f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['file_bytes'] / 1024:.0f}" if written else row["file"],
        f"{row['file_agreement']:.4f}" if written else "",
        f"{row['file_speedup']:.2f}" if "file_speedup" in row else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
