"""What a training step costs: float, plain Brevitas, and both of our phases; time and memory.

ResNet-20 at W2A4 (first and last layer and the input at 8 bits). A step is forward, loss, backward
and optimizer (AdamW), and in our phases everything that the training loop does besides.

    python benchmarks/step_time.py --table benchmarks/results/step_time.md

The variants take turns, one step each a round, so that whatever else the machine does hits all
alike; a ratio is the median over the rounds of the two steps' ratio. On a CPU with one thread the
clock is the process's CPU time, else wall time. Peak memory is that of a process of its own: on a
CPU the highest resident set during the steps less the resident set before the network is built, on
CUDA torch.cuda.max_memory_allocated.
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import _reports
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdq
from sdq.finetune import FineTuning
from sdq.gradient_search import BitwidthSearch
from sdq.models import resnet20
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import brevitas
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
    from brevitas.quant import Uint8ActPerTensorFloat as Act
    from lightning_fabric import Fabric

WEIGHT_BITS, ACT_BITS, EDGE_BITS = 2, 4, 8
BATCH, CLASSES = 128, 10
STEPS = 10_000  # of the whole run, for what depends on progress: nothing ends while we measure
WARMUP = 3

Step = Callable[[], None]


# ------------------------------------------------------------------------- Brevitas, without ours


class BrevitasBlock(nn.Module):
    """A residual block as :class:`sdq.models.resnet20.Block`, of Brevitas's layers."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, collect: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, stride, WEIGHT_BITS)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = relu(collect)
        self.conv2 = conv(out_channels, out_channels, 1, WEIGHT_BITS)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = relu(collect)
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            half = self.extra // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half)
            )
        return self.relu2(out + x)


def conv(in_channels: int, out_channels: int, stride: int, bits: int) -> nn.Module:
    return qnn.QuantConv2d(
        in_channels, out_channels, 3, stride, padding=1, bias=False,
        weight_quant=Int8WeightPerTensorFloat, weight_bit_width=bits,
    )  # fmt: skip


def relu(collect: int) -> nn.Module:
    return qnn.QuantReLU(act_quant=Act, bit_width=ACT_BITS, collect_stats_steps=collect)


def brevitas_resnet20(collect: int) -> nn.Module:
    """Return ResNet-20 of Brevitas's layers; scales are of statistics for ``collect`` steps."""
    shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)]
    shapes += [(64, 64, 1)] * 2
    return nn.Sequential(
        qnn.QuantIdentity(
            act_quant=Int8ActPerTensorFloat, bit_width=EDGE_BITS, collect_stats_steps=collect
        ),
        conv(3, 16, 1, EDGE_BITS), nn.BatchNorm2d(16), relu(collect),
        *(BrevitasBlock(*shape, collect) for shape in shapes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        qnn.QuantIdentity(act_quant=Act, bit_width=EDGE_BITS, collect_stats_steps=collect),
        qnn.QuantLinear(
            64, CLASSES, bias=True, weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=EDGE_BITS,
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ the variants


def plain(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Return a step of a network with cross-entropy and AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    network.train()

    def step() -> None:
        loss = F.cross_entropy(network(images), labels)
        float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def with_objective(
    objective: BitwidthSearch | FineTuning, images: Tensor, labels: Tensor, epoch: int
) -> Step:
    """Return a step as :func:`sdq.train.fit` makes it."""
    fabric = Fabric(accelerator=images.device.type, devices=1)
    objective.module.to(memory_format=torch.channels_last)
    groups = [group for group in objective.parameter_groups() if group["params"]]
    forward, optimizer = fabric.setup(objective.module, torch.optim.AdamW(groups, lr=1e-3))
    objective.start_epoch(epoch, 10)
    objective.module.train()
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        loss = objective.loss(forward, images, labels)
        float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        objective.after_step(done / STEPS)

    return step


def quantized(network: nn.Module, images: Tensor, labels: Tensor) -> sdq.QuantModel:
    qmodel = sdq.quantize(network.cpu(), sdq.QuantConfig(), sample=images[:1].cpu())
    qmodel = qmodel.to(images.device)
    sdq.calibrate_(qmodel, [(images, labels)])
    return qmodel


def phase1(network: nn.Module, images: Tensor, labels: Tensor, teacher: bool) -> Step:
    qmodel = quantized(network, images, labels)
    budget = sdq.Budget(avg_weight_bits=WEIGHT_BITS)
    space = SearchSpace.of(qmodel)
    problem = SearchProblem(
        qmodel, [(images, labels)], space, budget.constraints(space), sdq.SearchConfig(),
        channels_last(network, images) if teacher else None,
    )  # fmt: skip
    objective = BitwidthSearch(problem, "draw", STEPS)
    return with_objective(objective, images, labels, 0)


def phase2(
    network: nn.Module, images: Tensor, labels: Tensor, teacher: bool, bins: bool = True
) -> Step:
    qmodel = quantized(network, images, labels)
    budget = sdq.Budget(avg_weight_bits=WEIGHT_BITS)
    sdq.apply_policy_(qmodel, sdq.uniform_policy(qmodel, budget))
    config = sdq.TrainConfig() if bins else sdq.TrainConfig(bin_weight=0)
    objective = FineTuning(qmodel, config, channels_last(network, images) if teacher else None)
    return with_objective(objective, images, labels, 9)  # late: bin regularization is on


def channels_last(network: nn.Module, images: Tensor) -> nn.Module:
    return network.to(images.device).to(memory_format=torch.channels_last)


BASE = "Brevitas"
VARIANTS: dict[str, Callable[[Tensor, Tensor], Step]] = {
    "float": lambda x, y: plain(channels_last(resnet20.build(CLASSES), x), x, y),
    BASE: lambda x, y: plain(channels_last(brevitas_resnet20(1), x), x, y),
    "Brevitas, NCHW memory": lambda x, y: plain(
        brevitas_resnet20(1).to(x.device), x.contiguous(), y
    ),
    "Brevitas, collecting statistics": lambda x, y: plain(
        channels_last(brevitas_resnet20(STEPS), x), x, y
    ),
    "phase 1": lambda x, y: phase1(resnet20.build(CLASSES), x, y, False),
    "phase 1, teacher": lambda x, y: phase1(resnet20.build(CLASSES), x, y, True),
    "phase 2, no bin regularization": lambda x, y: phase2(
        resnet20.build(CLASSES), x, y, False, False
    ),
    "phase 2": lambda x, y: phase2(resnet20.build(CLASSES), x, y, False),
    "phase 2, teacher": lambda x, y: phase2(resnet20.build(CLASSES), x, y, True),
}
"""All but one in channels-last order, which is the faster one and the one that ours trains in."""


def batch(side: int, device: str) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, side, side, generator=draws)
    labels = torch.randint(CLASSES, (BATCH,), generator=draws)
    return images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)


# ---------------------------------------------------------------------------------------- measuring


def times(side: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds a step of each variant, one a round."""
    images, labels = batch(side, options.device)
    cpu_time = options.device == "cpu" and options.threads == 1
    clock = time.process_time if cpu_time else time.perf_counter
    steps = {name: make(images, labels) for name, make in VARIANTS.items()}
    for step in steps.values():
        for _ in range(WARMUP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(options.repeats):
        for name in order.sample(list(steps), len(steps)):
            synchronize(options.device)
            start = clock()
            steps[name]()
            synchronize(options.device)
            seconds[name].append(clock() - start)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(name: str, side: int, options: argparse.Namespace) -> int:
    """Return a variant's peak memory, measured in a process of its own."""
    command = [
        sys.executable, __file__, "--device", options.device, "--threads", str(options.threads),
        "--memory-of", name, "--sides", str(side),
    ]  # fmt: skip
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak(name: str, side: int, device: str) -> int:
    """Return the bytes that this process takes for a variant."""
    images, labels = batch(side, device)
    # what the first network and the first optimizer import and allocate for good is not ours
    plain(channels_last(resnet20.build(CLASSES), images[:1]), images[:1], labels[:1])()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is of imports: forget it
        before = _reports.resident("VmRSS")
    step = VARIANTS[name](images, labels)
    if device == "cpu":  # calibration, once a run, is not the step
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(WARMUP):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return _reports.resident("VmHWM") - before


# ---------------------------------------------------------------------------------------- reporting


def ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def table(side: int, options: argparse.Namespace) -> list[str]:
    seconds = times(side, options)
    memory = {name: peak_bytes(name, side, options) for name in VARIANTS}
    lines = [
        f"## {side}x{side}",
        "",
        "| step | ms | x float | x Brevitas | quartiles | peak MiB | x Brevitas |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in seconds.items():
        shares = [a / b for a, b in zip(found, seconds[BASE], strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        lines.append(
            f"| {name} | {statistics.median(found) * 1e3:.1f} | "
            f"{ratio(found, seconds['float']):.2f} | {ratio(found, seconds[BASE]):.2f} | "
            f"{low:.2f} to {high:.2f} | {memory[name] / 2**20:.0f} | "
            f"{memory[name] / memory[BASE]:.2f} |"
        )
    targets = [
        ("phase 1, time", ratio(seconds["phase 1"], seconds[BASE]), 1.0, BASE),
        ("phase 1, memory", memory["phase 1"] / memory[BASE], 1.2, BASE),
        ("phase 2, time", ratio(seconds["phase 2"], seconds[BASE]), 0.8, BASE),
        ("phase 2, time", ratio(seconds["phase 2"], seconds["float"]), 2.0, "float"),
    ]
    lines += ["", "| target | at most | found | |", "|---|---|---|---|"]
    for what, value, most, of in targets:
        verdict = "met" if value <= most else "**missed**"
        lines.append(f"| {what} | {most:.1f} x {of} | {value:.2f} | {verdict} |")
    return [*lines, ""]


def main() -> None:
    """Measure every variant and write the table."""
    parser = _reports.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--sides", default="28,32", help="of the images, in pixels")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats: must be at least 2, quartiles need them")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sides = [int(side) for side in options.sides.split(",")]
    if options.memory_of:
        print(own_peak(options.memory_of, sides[0], options.device))
        return
    on = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    lines = [
        f"# Step time and memory: ResNet-20, batch {BATCH}, W{WEIGHT_BITS}A{ACT_BITS}",
        "",
        f"`{_reports.command()}`",
        "",
        f"{on}, {os.cpu_count()} cores, {options.threads} thread(s), torch {torch.__version__}, "
        f"Brevitas {brevitas.__version__}, Python {platform.python_version()}. A step is forward,"
        " loss, backward and AdamW; phase 1 with draw, regularizer and steering of the price, "
        "phase 2 with bin regularization. Medians over rounds in which the variants take turns; "
        "quartiles of the ratio to Brevitas. Brevitas is `Int8WeightPerTensorFloat` and "
        "`Uint8ActPerTensorFloat` at the same bitwidths, its scales learned after the statistics "
        "are collected. How memory is measured stands at the head of the script.",
        "",
    ]
    for side in sides:
        lines += table(side, options)
    print("\n".join(lines))
    if options.table:
        options.table.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
