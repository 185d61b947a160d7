"""Our dataflow model beside FINN+'s own estimates, layer by layer.

Three networks with bitwidths drawn at random, and fresh weights: a VGG-like one, a residual one and
a depthwise-separable one. Each is exported (format ``finn``), converted, folded and estimated by
FINN+, which needs no vendor tools for that, and costed by ``hw/models/fpga_dataflow.py``. Units of
a kind are paired by their cycles. What FINN builds behind the last layer (scale and bias of the
logits) is listed as not modelled.

    python benchmarks/finn_estimates.py --table benchmarks/results/finn_estimates.md
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import _reports
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import export
import hw
import sdq
from hw.dataflow_units import Unit
from hw.models.fpga_dataflow import DataflowFpga
from hw.target import Demand, choices_of
from sdq.models import vgg_like
from sdq.quant_model import QuantModel

KINDS = {
    "MVAU": "matrix", "VVAU": "depthwise", "ConvolutionInputGenerator": "window",
    "FMPadding": "padding", "Thresholding": "thresholds", "Pool": "pool",
    "GlobalAccPool": "global pool", "DuplicateStreams": "fork", "ElementwiseAdd": "add",
    "StreamingConcat": "concat", "UpsampleNearestNeighbour": "upsample",
}  # fmt: skip
"""FINN's operators, and what we call their units."""

PARTS = {"pynq_z2": "xc7z020clg400-1", "ultra96": "xczu3eg-sbva484-1-e"}
SHAPE = (1, 3, 32, 32)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_conv(ins, outs, 3, stride))
        self.second = nn.Sequential(*_conv(outs, outs, 3, 1)[:2])
        shortcut = _conv(ins, outs, 1, stride)[:2] if stride > 1 else []
        self.shortcut = nn.Sequential(*shortcut)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


def residual(classes: int) -> nn.Module:
    """Return a small residual network."""
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    head = [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64 * 4, classes)]
    return nn.Sequential(*_conv(3, 16, 3, 1), *blocks, *head)


def separable(classes: int) -> nn.Module:
    """Return a small network of depthwise and pointwise convolutions."""
    layers: list[nn.Module] = [*_conv(3, 16, 3, 2)]
    channels = 16
    for out, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
        layers += _conv(channels, channels, 3, stride, channels) + _conv(channels, out, 1, 1)
        channels = out
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(channels, classes))


def _conv(ins: int, outs: int, side: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(ins, outs, side, stride, side // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs), nn.ReLU()]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg_like": lambda: vgg_like.build(10, 3, SHAPE[-1]),
    "residual": lambda: residual(10),
    "separable": lambda: separable(10),
}


@dataclass(frozen=True)
class Node:
    """One of FINN's units, with its estimates."""

    name: str
    kind: str
    cycles: int
    lut: float
    bram_18k: float
    dsp: float


@dataclass(frozen=True)
class Pair:
    """A unit of ours, the layer it is charged to, and FINN's."""

    layer: str
    unit: Unit
    node: Node


def quantized(network: nn.Module, seed: int, act_bits: int = 4) -> QuantModel:
    """Return a network with random bitwidths, calibrated on noise."""
    config = sdq.QuantConfig(act_bits=act_bits, integer_datapath=True, weight_scale="per_channel")
    qmodel = sdq.quantize(network, config, sample=torch.zeros(SHAPE))
    images = torch.randn(16, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))
    sdq.calibrate_(qmodel, [(images, torch.zeros(16))])
    draw = random.Random(seed)
    bits = {b.name: draw.choice((2, 3, 4, 6, 8)) for b in qmodel.policy if b.searched}
    sdq.apply_policy_(qmodel, qmodel.policy.with_weight_bits(bits))
    return qmodel


def finn_nodes(qmodel: QuantModel, part: str, fps: float, clock_hz: float) -> list[Node]:
    """Return what FINN+ estimates of an exported network, in the graph's order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        export.write(qmodel, path, format="finn", sample=torch.zeros(SHAPE))
        return list(_estimated(path / "model_finn.onnx", path, part, fps, clock_hz))


def _estimated(file: Path, folder: Path, part: str, fps: float, clock_hz: float) -> Iterator[Node]:
    from qonnx.core.modelwrapper import ModelWrapper

    from export.finn_flow import environment

    with environment.finn_environment(folder):
        from finn.builder import build_dataflow_steps as default
        from finn.builder.build_dataflow_config import DataflowBuildConfig, DataflowOutputType

        from export.finn_flow import steps

        config = DataflowBuildConfig(
            output_dir=str(folder), standalone_thresholds=True, target_fps=fps, fpga_part=part,
            synth_clk_period_ns=1e9 / clock_hz,
            generate_outputs=[DataflowOutputType.ESTIMATE_REPORTS],
        )  # fmt: skip
        model = ModelWrapper(str(file))
        for step in (
            steps.step_sdq_qonnx_to_finn, steps.step_sdq_streamline, steps.step_sdq_convert_to_hw,
            default.step_minimize_bit_width_initial, default.step_create_dataflow_partition,
        ):  # fmt: skip
            model = step(model, config)
        for step in (
            default.step_specialize_layers, default.step_target_fps_parallelization,
            default.step_apply_folding_config, default.step_minimize_bit_width,
            default.step_generate_estimate_reports,
        ):  # fmt: skip
            model = step(model, config)
        order = [node.name for node in model.graph.node]
    report = folder / "report"
    cycles = json.loads((report / "estimate_layer_cycles.json").read_text())
    taken = json.loads((report / "estimate_layer_resources.json").read_text())
    for name in order:
        if name in cycles and name in taken:
            kind = KINDS.get(name.split("_")[0], name.split("_")[0])
            found = taken[name]
            yield Node(name, kind, cycles[name], found["LUT"], found["BRAM_18K"], found["DSP"])


def our_units(qmodel: QuantModel, device: DataflowFpga, fps: float) -> list[tuple[str, Unit]]:
    """Return our units, with the layer each is charged to."""
    # the file takes floats: its first thresholds have 32 bits
    placed = replace(device, input_bits=31).under(
        qmodel.layers, Demand(fps=fps), choices_of(qmodel.policy)
    )
    return [
        (spec.name, unit)
        for spec, bits in zip(qmodel.layers, qmodel.policy, strict=True)
        for unit in placed.units(spec, bits.weight_bits, bits.act_bits)
    ]


def pairs(
    ours: list[tuple[str, Unit]], theirs: list[Node]
) -> tuple[list[Pair], list[tuple[str, Unit]], list[Node]]:
    """Pair units of a kind and of equal cycles, the nearest in resources; return what is left."""
    found: list[Pair] = []
    used: set[int] = set()
    for group in {(unit.kind, unit.cycles) for _, unit in ours}:
        mine = [i for i, (_, unit) in enumerate(ours) if (unit.kind, unit.cycles) == group]
        nodes = [node for node in theirs if (node.kind, node.cycles) == group]
        if not nodes:
            continue
        table = [[_distance(ours[i][1], node) for node in nodes] for i in mine]
        for row, column in zip(*linear_sum_assignment(table), strict=True):
            found.append(Pair(*ours[mine[row]], nodes[column]))
            used.add(mine[row])
    paired = {pair.node.name for pair in found}
    rest = [entry for i, entry in enumerate(ours) if i not in used]
    return found, rest, [node for node in theirs if node.name not in paired]


def _distance(unit: Unit, node: Node) -> float:
    memory, slices = abs(node.bram_18k - unit.bram_18k), abs(node.dsp - unit.dsp)
    return abs(node.lut - unit.lut) + 100 * (memory + slices)


def main() -> None:
    """Compare, print the table and write it."""
    options = arguments()
    lines = [
        "# FINN+'s estimates and ours",
        "",
        f"FINN+ 1.6.1, {options.fps:g} samples a second, fresh weights, bitwidths at random "
        f"(weights/activations), seed {options.seed}. Cycles are those of the slowest unit.",
        "",
        f"`{_reports.command()}`",
        "",
    ]
    for target in options.targets.split(","):
        device = hw.target(target)
        assert isinstance(device, DataflowFpga)
        for name in options.networks.split(","):
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)
                network = NETWORKS[name]()
            qmodel = quantized(network, options.seed, options.act_bits)
            theirs = finn_nodes(qmodel, PARTS[target], options.fps, device.clock_hz)
            lines += section(f"{name} on {target}", qmodel, our_units(qmodel, device, options.fps),
                             theirs)  # fmt: skip
    _reports.write(options.table, lines[:-1])


HEADER = (
    "| layer | bits | cycles | LUT, FINN+ | ours | BRAM | ours | DSP | ours |",
    "|---|---|---|---|---|---|---|---|---|",
)


def section(
    title: str, qmodel: QuantModel, ours: list[tuple[str, Unit]], theirs: list[Node]
) -> list[str]:
    """Return the part of the report on one network."""
    matched, rest, left = pairs(ours, theirs)
    lines, errors = [f"## {title}", "", *HEADER], Errors([], [])
    for bits in qmodel.policy:
        own = [pair for pair in matched if pair.layer == bits.name]
        lut = sum(p.node.lut for p in own), sum(p.unit.lut for p in own)
        memory = sum(p.node.bram_18k for p in own), sum(p.unit.bram_18k for p in own)
        slices = sum(p.node.dsp for p in own), sum(p.unit.dsp for p in own)
        errors.add(lut, memory)
        cells = " | ".join(f"{a:g} | {b:g}" for a, b in (lut, memory, slices))
        slowest = max((p.unit.cycles for p in own), default=0)
        widths = f"{bits.weight_bits}/{bits.act_bits}"
        lines.append(f"| {bits.name} | {widths} | {slowest:,} | {cells} |")
    totals = sum(node.lut for node in theirs), sum(unit.lut for _, unit in ours)
    lines += [
        "",
        f"Units with equal cycles: {len(matched)} of {len(ours)}. Median error by layer: LUT "
        f"{statistics.median(errors.lut):.1%}, BRAM {statistics.median(errors.bram):.1%}. All "
        f"LUTs: {totals[0]:g}, ours {totals[1]:g}.",
    ]
    named = [f"{unit.kind} of {layer} ({unit.cycles:,} cycles)" for layer, unit in rest]
    theirs_left = [f"{n.name} ({n.cycles:,} cycles, {n.lut:g} LUT)" for n in left]
    lines += ["", "Ours without a match: " + ", ".join(named)] if named else []
    lines += ["", "FINN+'s without a match: " + ", ".join(theirs_left)] if theirs_left else []
    return [*lines, ""]


@dataclass(frozen=True)
class Errors:
    """Relative errors by layer, where FINN+ counts any."""

    lut: list[float]
    bram: list[float]

    def add(self, lut: tuple[float, float], bram: tuple[float, float]) -> None:
        for found, (theirs, ours) in ((self.lut, lut), (self.bram, bram)):
            if theirs:
                found.append(abs(ours / theirs - 1))


def arguments() -> argparse.Namespace:
    parser = _reports.parser(__doc__)
    parser.add_argument("--targets", default="pynq_z2,ultra96")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--fps", type=float, default=1000.0)
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
