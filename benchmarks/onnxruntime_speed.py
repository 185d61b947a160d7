"""How fast and how large the `onnx` and `onnx-packed` files are, against the float network's file.

Every network is prepared as onnxruntime has integer kernels for it: normalisation folded, additions
quantized, integer biases, activations of 8 bits. The weights have 2 bits but in the first and last
layer. Speed does not depend on what the weights are: they are random. The files of one network take
turns, image by image, so that whatever else the machine does meets all of them alike.

    python benchmarks/onnxruntime_speed.py --table benchmarks/results/onnxruntime_speed.md
"""

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import _reports
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import export
import sdq
from sdq.plugins import call_with_known, load

NETWORKS = {"resnet20": (32, 10), "resnet18": (224, 1000)}
"""Side of the images and number of classes."""

FORMATS = ("onnx", "onnx-packed")
INTEGER_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8")
FAST, SMALL, SMALLEST = 2.5, 3.5, 12.0
"""The aims: throughput and size of `onnx`, size of `onnx-packed`, against float."""

UNSTEADY = 1.5
"""Of times whose quartiles are further apart no ratio is judged: something else was running."""

WITHOUT_VNNI = (
    "Without VNNI, AVX2 takes three instructions for 32 products of 8 bits, two of them "
    "multiplications, and a multiplication and addition in one for 8 products of floats. A core "
    "that starts two multiplications a cycle reaches twice float's rate, and the aim of speed is "
    "out of reach."
)


def main() -> None:
    """Write the files, time them, and print the table."""
    options = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = heading(options)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            lines += measure(name, Path(folder) / name, options)
    _reports.write(options.table, lines)


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = _reports.parser(__doc__)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row of the tables")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--first-last-bits", type=int, default=8)
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


def heading(options: argparse.Namespace) -> list[str]:
    """Return what stands above the tables."""
    flags = cpu_flags()
    vnni = any("vnni" in flag or flag == "amx_int8" for flag in flags)
    return [
        "# Files in onnxruntime: speed and size",
        "",
        f"`{_reports.command()}`",
        "",
        f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, integer instructions: "
        f"{', '.join(flags) or 'none'}; VNNI: **{'yes' if vnni else 'no'}**. Random weights of "
        f"{options.bits} bits, first and last layer {options.first_last_bits}; activations of 8 "
        "bits. Milliseconds a batch are medians with the quartiles; a ratio is the median of "
        "float's time over the file's, of runs next to each other; where quartiles lie more than a "
        f"factor of {UNSTEADY} apart it is called unsteady, and not judged. `precise` is the "
        "session option session.x64quantprecision, which keeps 8-bit weights exact without VNNI.",
        "",
        *([] if vnni else [WITHOUT_VNNI, ""]),
    ]


def cpu_flags() -> list[str]:
    """Return which of the instructions that matter here this processor has (Linux only)."""
    path = Path("/proc/cpuinfo")
    known = path.read_text(encoding="utf-8").split() if path.exists() else []
    return [flag for flag in INTEGER_FLAGS if flag in known]


def measure(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the tables of one network."""
    side, classes = NETWORKS[name]
    paths, verified = write_files(name, folder, side, classes, options)
    sizes = {kind: path.stat().st_size for kind, path in paths.items()}
    lines = [
        f"## {name}, {side} x {side}",
        "",
        "| file | bytes | float / file | verified | nodes |",
    ]
    lines.append("|---|---|---|---|---|")
    for kind, path in paths.items():
        ratio = sizes["float"] / sizes[kind]
        lines.append(
            f"| {kind} | {sizes[kind]:,} | {ratio:.2f} | {verified.get(kind, '')} | {nodes(path)} |"
        )
    lines += ["", "| threads | batch | file | ms | ratio | aim |", "|---|---|---|---|---|---|"]
    for threads in map(int, options.threads.split(",")):
        sessions = {kind: session(path, threads) for kind, path in paths.items()}
        # kernels that cannot overflow without VNNI
        sessions |= {
            f"{kind}, precise": session(paths[kind], threads, precise=True) for kind in FORMATS[:1]
        }
        for batch in map(int, options.batches.split(",")):
            images = np.random.default_rng(0).standard_normal((batch, 3, side, side), np.float32)
            times = take_turns(sessions, images, options.seconds)
            lines += [row(threads, batch, kind, times) for kind in sessions]
    return [*lines, "", f"Aims: {FAST} times float's throughput; `onnx` {SMALL} times smaller than "
            f"float, `onnx-packed` {SMALLEST:g} times (resnet18).", ""]  # fmt: skip


def row(threads: int, batch: int, kind: str, times: dict[str, list[float]]) -> str:
    """Return a line of the second table."""
    low, middle, high = (1e3 * t for t in statistics.quantiles(times[kind], n=4))
    if kind == "float":
        ratio = aim = ""
    else:
        pairs = zip(times["float"], times[kind], strict=True)
        value = statistics.median(ours / theirs for ours, theirs in pairs)
        ratio, aim = f"{value:.2f}", "met" if value >= FAST else "missed"
        if not (steady(times["float"]) and steady(times[kind])):
            aim = "unsteady"
    return (
        f"| {threads} | {batch} | {kind} | {middle:.2f} ({low:.2f}-{high:.2f}) | {ratio} | {aim} |"
    )


def steady(times: list[float]) -> bool:
    """Tell whether the quartiles lie close enough together for a ratio to mean something."""
    low, _, high = statistics.quantiles(times, n=4)
    return high <= UNSTEADY * low


def network(name: str, classes: int) -> nn.Module:
    """Return a network with random weights and statistics."""
    net: nn.Module = call_with_known(
        load("sdq.models", name).build, num_classes=classes, in_channels=3
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return net.eval()


def write_files(
    name: str, folder: Path, side: int, classes: int, options: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the float file and ours; return their paths, and whether ours are verified."""
    folder.mkdir()
    net, images = network(name, classes), torch.randn(4, 3, side, side)
    config = sdq.QuantConfig(
        bit_choices=(options.bits,), act_bits=8, first_last_bits=options.first_last_bits,
        batch_norm="fold", integer_datapath=True, integer_bias=True,
    )  # fmt: skip
    qmodel = sdq.quantize(net, config, sample=images[:1])
    sdq.calibrate_(qmodel, [(images, torch.zeros(len(images)))])
    paths, verified = {"float": folder / "float.onnx"}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (images[:1],), str(paths["float"]), dynamo=False, opset_version=17,
            input_names=["images"], output_names=["output"],
            dynamic_axes={"images": {0: "N"}, "output": {0: "N"}},
        )  # fmt: skip
        for kind in FORMATS:
            paths[kind] = export.write(qmodel, folder, format=kind, sample=images[:1]).path
            report = export.verify(qmodel, folder, format=kind, inputs=images)
            verified[kind] = "yes" if report.verified else report.reason
    return paths, verified


def session(path: Path, threads: int, precise: bool = False, saved: Path | None = None) -> Any:
    """Open a file in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(path: Path) -> str:
    """Return which layers onnxruntime computes in integers, and which not."""
    saved = path.with_suffix(".optimised")
    session(path, 1, saved=saved)
    count = Counter(node.op_type for node in onnx.load(saved).graph.node)
    wanted = ("Conv", "FusedConv", "Gemm", "Add", "QLinearConv", "QGemm", "QLinearAdd")
    return ", ".join(f"{count[kind]} {kind}" for kind in wanted if count[kind])


def take_turns(
    sessions: dict[str, Any], images: np.ndarray, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of every run; the sessions run one after the other, again and again."""
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for kind in sessions:  # the first runs allocate
        sessions[kind].run(None, {"images": images})
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 5:
        for kind, opened in sessions.items():
            start = time.perf_counter()
            opened.run(None, {"images": images})
            times[kind].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
