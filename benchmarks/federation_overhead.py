"""What a federation costs beside its clients' training: time of a round, memory, many clients.

    python benchmarks/federation_overhead.py --table benchmarks/results/federation_overhead.md

*A round against its steps.* One in-process round (requests, local training, checks, aggregation,
the server's state; no evaluation) beside the same clients' training steps in a plain loop: the same
batches of the same images, forward, loss, backward, Adam, on one network that is loaded once a
client. The two take turns; a ratio is the median over the turns. The clock is the process's CPU
time, with one thread: others may use the machine.

*Many clients.* Each number of clients in a process of its own, 10 of them sampled a round, a small
CNN, 64 images a client, SCAFFOLD, which keeps a state for each client: in files, and again in
memory. And the most clients, of whom more and more are sampled, with states in files. Time is the
median over the rounds; memory is the highest resident set of the process, torch and all. All images
are in one array in memory, which grows with the clients and is told apart.
"""

import argparse
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _reports
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fl
from fl.client import client_generator
from fl.record import Record
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.batches import Batches
from sdq.data import ArrayImages, ImageSet
from sdq.models import resnet20

CLASSES, SHAPE = 7, (3, 28, 28)
SAMPLED, IMAGES, BATCH, METHOD = 10, 64, 32, "scaffold"
AIM_RATIO, AIM_MIB = 1.05, 2048


class SmallCNN(nn.Module):
    """Three convolutions: 60 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "small":
            return SmallCNN()
        return resnet20.build(num_classes=CLASSES, in_channels=3)


def hospitals(count: int, images: int) -> list[fl.ClientData]:
    """Return clients whose images are places in one array."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count * images, *SHAPE), dtype=torch.uint8, generator=rng)
    labels = torch.randint(CLASSES, (count * images,), generator=rng)
    whole = ImageSet(ArrayImages(pixels), labels)
    places = torch.arange(count * images).view(count, images)
    return [fl.ClientData(f"client {k}", whole.subset(p)) for k, p in enumerate(places)]


def federation(
    name: str, method: str, clients: list[fl.ClientData], config: fl.FederationConfig,
    folder: Path | None = None,
) -> Rounds:  # fmt: skip
    setting = Setting.of(
        network(name), fl.method(method), config, num_classes=CLASSES, image_shape=SHAPE
    )
    places = [None if folder is None else folder / part for part in ("clients", "own")]
    transport = InProcess(setting, clients, Store(places[0]))
    rounds = Rounds(setting, transport, len(clients), Store(places[1]))
    rounds.begin()
    return rounds


# ----------------------------------------------------------------- a round against its steps


def bare_round(rounds: Rounds, clients: list[fl.ClientData], number: int) -> None:
    """Take the clients' training steps in a plain loop."""
    setting = rounds.setting
    model, config = setting.network.model, setting.config
    start = {n.removeprefix("model."): t for n, t in rounds.server.model.items()}
    for client, data in enumerate(clients):
        model.load_state_dict(start)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        seed = client_generator(config.seed, client, "batches", number).initial_seed()
        batches = Batches(
            data.train, setting.normalization, batch_size=config.batch_size, shuffle=True,
            seed=seed,
        )  # fmt: skip
        for epoch in range(config.local_epochs):
            batches.set_epoch(epoch)
            for images, labels in batches:
                images = images.contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def seconds(work: object, *args: object, **options: object) -> float:
    begun = time.process_time()
    work(*args, **options)  # type: ignore[operator]
    return time.process_time() - begun


def ratios(name: str, method: str, images: int, turns: int) -> dict[str, float]:
    """Return what a round and its bare steps take."""
    config = fl.FederationConfig(rounds=1000, batch_size=BATCH)
    clients = hospitals(SAMPLED, images)
    whole, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        rounds = federation(name, method, clients, config, Path(folder))
        for turn in range(turns + 1):
            steps = seconds(bare_round, rounds, clients, turn)
            took = seconds(rounds.round, evaluate=False)
            if turn:  # the first warms up
                bare.append(steps)
                whole.append(took)
    quotients = sorted(w / b for w, b in zip(whole, bare, strict=True))
    quarters = statistics.quantiles(quotients, n=4)
    return {
        "round": statistics.median(whole), "bare": statistics.median(bare),
        "ratio": statistics.median(quotients), "low": quarters[0], "high": quarters[2],
    }  # fmt: skip


# ----------------------------------------------------------------- many clients


def many(count: int, sampled: int, method: str, on_disk: bool, rounds: int) -> dict[str, float]:
    """Return seconds a round and the process's highest memory in MiB."""
    config = fl.FederationConfig(
        rounds=1000, batch_size=BATCH, participation=sampled / count, evaluate_every=1000
    )
    clients = hospitals(count, IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if on_disk else None
        running = federation("small", method, clients, config, place)
        took = []
        for _ in range(rounds):
            begun = time.process_time()
            running.round(evaluate=False)
            if place is not None:
                running.save(place / "federation.safetensors", Record())
            took.append(time.process_time() - begun)
        kept = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
    return {
        "seconds": statistics.median(took[1:]),
        "mib": highest_mib(),
        "disk_mib": kept / 2**20,
        "images_mib": count * IMAGES * 3 * 28 * 28 / 2**20,
    }


def highest_mib() -> float:
    """Return this process's highest resident set; Linux's ru_maxrss begins with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def measured(count: int, sampled: int, method: str, on_disk: bool, rounds: int) -> dict[str, float]:
    """Measure in a process of its own."""
    words = ["--one", str(count), str(sampled), method, str(int(on_disk)), str(rounds)]
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def plot(
    path: Path,
    counts: list[int],
    found: dict[bool, list[dict[str, float]]],
    sampled: list[int],
    of_most: list[dict[str, float]],
) -> None:
    """Draw time and memory over the number of clients, and over that of the sampled ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, key, title in ((0, "seconds", "CPU seconds a round"), (1, "mib", "peak MiB")):
        left, right = panels[row]
        for on_disk, values in found.items():
            style = {"marker": "o", "linestyle": "-" if on_disk else ":"}
            label = f"states in {'files' if on_disk else 'memory'}"
            left.plot(counts, [v[key] for v in values], label=label, **style)
            if key == "mib":
                rest = [v["mib"] - v["images_mib"] for v in values]
                left.plot(counts, rest, label=f"{label}, without the images", **style)
        right.plot(sampled, [v[key] for v in of_most], marker="o")
        left.set(xscale="log", xlabel=f"clients ({SAMPLED} sampled)", title=title)
        right.set(xlabel=f"clients sampled (of {max(counts):,})", title=title)
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        left.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def cells(figures: dict[str, float]) -> str:
    """Return the figures of many clients as cells of a table."""
    return (
        f"{figures['seconds']:.3f} | {figures['mib']:.0f} | {figures['images_mib']:.0f} | "
        f"{figures['disk_mib']:.1f}"
    )


def main() -> None:
    parser = _reports.parser(__doc__)
    parser.add_argument("--turns", type=int, default=7, help="at least 2; 0 leaves the part out")
    parser.add_argument("--rounds", type=int, default=12, help="with many clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--sampled", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if min(asked.clients) < SAMPLED or max(asked.sampled) > max(asked.clients):
        parser.error(
            f"--clients: must be {SAMPLED} or more, and the most of them as many as any of "
            f"--sampled, got {asked.clients} and {asked.sampled}; ask for more clients"
        )
    if asked.rounds < 2:
        parser.error(
            f"--rounds: must be 2 or more, of which the first warms up, got {asked.rounds}"
        )
    torch.set_num_threads(1)
    if asked.one:
        count, sampled, method, on_disk, rounds = asked.one
        print(json.dumps(many(int(count), int(sampled), method, on_disk == "1", int(rounds))))
        return
    lines = [
        "# What a federation costs beside training", "", f"`{_reports.command()}`", "",
        f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, Python "
        f"{platform.python_version()}. CPU time of the process; how it is measured stands at the "
        "head of the script.", "",
    ]  # fmt: skip
    aims = []
    if asked.turns:
        found, aims = against_steps(asked.turns)
        lines += found
    found, aim = many_clients(asked)
    lines += [*found, "", "| aim | at most | found | |", "|---|---|---|---|", *aims, aim, ""]
    if asked.table:
        picture = asked.table.with_suffix(".svg").name
        lines += [f"![time and memory over clients, and over those sampled]({picture})", ""]
        asked.table.write_text("\n".join(lines))
    print("\n".join(lines))


def against_steps(turns: int) -> tuple[list[str], list[str]]:
    """Return the table of rounds against their steps, and its aims."""
    lines = [
        f"## A round of {SAMPLED} clients against their bare training steps", "",
        "| network | method | images a client | round s | steps s | ratio | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    aims = []
    for name, method, images in (
        ("small", "fedavg", 64), ("small", "fedavg", 256), ("resnet20", "fedavg", 64)
    ):  # fmt: skip
        f = ratios(name, method, images, turns)
        steps = -(-images // BATCH)
        aims.append(
            f"| a round, {name}, {steps} steps a client | {AIM_RATIO} | {f['ratio']:.3f} | "
            f"{'met' if f['ratio'] <= AIM_RATIO else 'missed'} |"
        )
        lines.append(
            f"| {name} | {method} | {images} | {f['round']:.3f} | {f['bare']:.3f} | "
            f"{f['ratio']:.3f} | {f['low']:.3f} to {f['high']:.3f} |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""], aims


def many_clients(asked: argparse.Namespace) -> tuple[list[str], str]:
    """Return the tables of many clients, and the aim; draw them."""
    most, states = max(asked.clients), {True: "files", False: "memory"}
    found: dict[bool, list[dict[str, float]]] = {}
    for on_disk in states:
        found[on_disk] = [
            measured(count, SAMPLED, METHOD, on_disk, asked.rounds) for count in asked.clients
        ]
        print(on_disk, found[on_disk], flush=True)
    of_most = [measured(most, sampled, METHOD, True, asked.rounds) for sampled in asked.sampled]
    if asked.table:
        plot(asked.table.with_suffix(".svg"), asked.clients, found, asked.sampled, of_most)
    figures = "CPU s a round | peak MiB | of these images | files MiB |"
    lines = [
        f"## {SAMPLED} clients sampled of many: {METHOD}, small CNN, {IMAGES} images each", "",
        f"| states in | clients | {figures}", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for on_disk, values in found.items():
        for count, v in zip(asked.clients, values, strict=True):
            lines.append(f"| {states[on_disk]} | {count} | {cells(v)} |")
    lines += [
        "", f"## More and more sampled of {most:,} clients, states in files", "",
        f"| sampled | s for one of them | {figures}", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for sampled, v in zip(asked.sampled, of_most, strict=True):
        lines.append(f"| {sampled} | {v['seconds'] / sampled:.3f} | {cells(v)} |")
    lines += [
        "",
        "All images are in one array in memory, as the column says; the rest stays as it is.",
    ]
    peak = max(v["mib"] for values in (*found.values(), of_most) for v in values)
    return lines, (
        f"| memory with {most} clients | {AIM_MIB} MiB | {peak:.0f} MiB | "
        f"{'met' if peak <= AIM_MIB else 'missed'} |"
    )


if __name__ == "__main__":
    main()
