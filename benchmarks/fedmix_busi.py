r"""Mixed labels on BUSI: FedMix against what needs more masks, or uses fewer labels.

The images with a lesion are divided at random among clients, of which each has what
``--supervision`` says: masks (pixel), boxes (box), the class alone (image) or nothing (none); boxes
are made from masks, and only from them. A client that has less than masks has no masks. A number
behind each level says in what proportions the clients have the training images
(``pixel12-box41-image47``); without it they have as many each. Test images are dealt out equally,
whatever the proportions: more of them measure the same thing better. Clients with nothing have the
training images without a lesion besides, as in the paper. Variants:

    full        FedAvg, every client with its masks: what the others lack
    local       every client alone, with its masks
    labelled    FedAvg of the clients that have masks; what the others know does not matter
    fedst, fedrgd, fedmix_seg    what else is there, used

``labelled``, ``fedst``, ``fedrgd`` and ``fedmix_seg`` take hyper-parameters as
``fedmix_seg;loss_power=3``; ``;config.rounds=200`` behind any variant is for that one. All have the
same images, clients, first weights and test set. A seed is another division into training and test
images, other clients and other first weights. Each finished run is kept in ``--out``; interrupted,
the command goes on after the last whole round.

    python benchmarks/fedmix_busi.py --data busi --data-root DIR --out runs/fedmix \
        --table benchmarks/results/fedmix_busi.md
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import _reports
import torch
from federated_methods import settings
from torch import nn

import fl
from fl.method import Supervision
from fl.partition import in_shares
from fl.supervision import parsed, weakened
from sdq.batches import Augmentation, first_weights
from sdq.data import DataOptions, ImageSet, open_data
from sdq.models.unet import UNet

VARIANTS = "full,local,labelled,fedst,fedrgd,fedmix_seg"
METHODS = {"full": "fedavg", "local": "local", "labelled": "fedavg_labelled"}
MIXES = "pixel12-box41-image47 pixel12-box41-none47"
WITH_ALL_MASKS = ("full", "local")
METRICS = ("dice", "iou", "hd95")


def main() -> None:
    """Run what is missing and write the table after every run."""
    options = arguments()
    _reports.keep_rows(options.out, options, "supervision", "variants")
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        bench = Bench(options, seed)
        for mix in options.supervision.split():
            for variant in options.variants.split(","):
                rows.append(bench.figures(mix, variant))
                print(line(rows[-1]), flush=True)
                write(options, rows)


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__, model=None)
    parser.add_argument("--supervision", default=MIXES, help="one or several, A-B-C D-E-F")
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=8, help="of the U-Net's first stage")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--loss", default="dice", help="of every variant")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


class Bench:
    """Everything of one seed."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        opened = DataOptions(options.data_root, seed, options.image_size, (0.8, 0.0, 0.2))
        splits = open_data(options.data, opened)
        assert splits.test is not None
        (self.train, self.normal), (self.test, _) = map(by_lesion, (splits.train, splits.test))
        self.augment = Augmentation(splits.horizontal_flip, splits.vertical_flip)
        self.channels = splits.image_shape[0]
        self.classes = len(splits.class_names)

    def clients(self, mix: str) -> list[fl.ClientData]:
        """Deal the images out at random; each client then forgets what it is not to know."""
        levels, shares = read(mix)
        equally = [fl.iid(p.labels, len(levels), self.seed) for p in (self.train, self.test)]
        own = in_shares(self.train.labels, shares, self.seed) if shares else equally[0]
        normal = iter(fl.iid(self.normal.labels, max(1, levels.count("none")), self.seed))
        clients = []
        for indices, held, level in zip(own, equally[1], levels, strict=True):
            train = self.train.subset(indices)
            if level == "none":
                train = ImageSet.joined([train, self.normal.subset(next(normal))])
            client = fl.ClientData(level, train, None, self.test.subset(held))
            clients.append(weakened(client, level, self.classes, self.seed))
        return clients

    def network(self) -> nn.Module:
        with first_weights(self.seed):
            found = UNet(self.classes, self.channels, self.options.width)
        return found.to(self.options.device)

    def config(self, **changes: Any) -> fl.FederationConfig:
        options = self.options
        found = fl.FederationConfig(
            rounds=options.rounds, local_epochs=options.local_epochs, lr=options.lr,
            batch_size=options.batch_size, weight_decay=1e-4, keep_optimizer=True,
            loss=fl.LossConfig(name=options.loss), seed=self.seed,
        ).replaced(**changes)  # fmt: skip
        return found.replaced(evaluate_every=found.rounds)

    def figures(self, mix: str, variant: str) -> dict[str, Any]:
        """Return a finished run's figures, or run it."""
        method, hyper, changes = settings(variant)
        if method in WITH_ALL_MASKS:  # whatever the mix: these runs serve every one
            mix = re.sub("[a-z]+", "pixel", mix)
        elif method == "labelled":
            mix = labelled_alone(mix)
        folder = self.options.out / f"{mix}-{variant.replace(';', '+')}-{self.seed}"
        file = folder / "figures.json"
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text())
            return known
        start = time.perf_counter()
        found = fl.run(
            self.network(), method=fl.method(METHODS.get(method, method), **hyper),
            clients=self.clients(mix), num_classes=self.classes, config=self.config(**changes),
            augment=self.augment, folder=folder,
        )  # fmt: skip
        row = {
            "mix": mix, "variant": variant, "seed": self.seed,
            "server": found.generalization, "own": found.specialization,
            "train_loss": [r["train_loss"] for r in found.history],
            "sat_out": [len(r["sat_out"]) for r in found.history],
            # of what is left since an interruption
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        file.write_text(json.dumps(row))
        return row


def read(mix: str) -> tuple[tuple[Supervision, ...], list[float]]:
    """Return levels and shares, the latter empty where none is said.

    >>> read("pixel1-none9")
    (('pixel', 'none'), [1.0, 9.0])
    """
    words = [re.fullmatch(r"([a-z]+)([\d.]*)", client) for client in mix.split("-")]
    assert all(words), f"--supervision: {mix} must be LEVEL[SHARE]-LEVEL[SHARE]-..."
    levels, shares = zip(*(word.groups() for word in words if word), strict=True)
    return parsed(",".join(levels), levels), [float(s) for s in shares if s]


def labelled_alone(mix: str) -> str:
    """Return a mix in which only clients with masks know anything.

    >>> labelled_alone("pixel1-box9")
    'pixel1-none9'
    """
    return re.sub("box|image", "none", mix)


def by_lesion(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images whose mask is not empty, and the others."""
    assert images.masks is not None
    there = images.masks.take(torch.arange(len(images))).flatten(1).any(1)
    return images.subset(there.nonzero()[:, 0]), images.subset((~there).nonzero()[:, 0])


def figure(row: dict[str, Any], metric: str) -> float:
    """Return the mean over clients: of the server's model, or of the clients' own without one."""
    found: float = (row["server"]["client_mean"] if row["server"] else row["own"])[metric]
    return found


def line(row: dict[str, Any]) -> str:
    """Return a run's progress line."""
    cells = ", ".join(f"{metric} {figure(row, metric):.4f}" for metric in METRICS)
    losses = row["train_loss"]
    return (
        f"{row['mix']} {row['variant']} {row['seed']}: {cells}; loss {losses[0]:.3f} to "
        f"{losses[-1]:.3f}; sat out {sum(row['sat_out'])}; {row['seconds']:.0f} s"
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# FedMix on BUSI",
        "",
        f"Lesion images at {options.image_size} x {options.image_size}, a fifth to test; U-Net of "
        f"width {options.width}; {options.rounds} rounds, local epochs {options.local_epochs}, "
        f"Adam {options.lr:g}, kept over rounds, weight decay 1e-4, "
        f"batches of {options.batch_size}, loss `{options.loss}`; last round; "
        f"seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds. "
        f"torch {torch.__version__}, device {options.device}.",
        "",
        f"`{_reports.command()}`",
        "",
        "Figures are means over the clients' test images, of the server's model; of `local`, of "
        "each client's own. Dice and IoU in percent, HD95 in pixels. `seed by seed`: Dice beyond "
        "that of `labelled`, in points. `sat out`: rounds in which a client found nothing to learn "
        "from, over all clients.",
        "",
        "| clients | variant | Dice | IoU | HD95 | seed by seed | Dice by client | sat out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:  # full and local come once for every mix
        group = groups.setdefault((row["mix"], row["variant"]), [])
        if all(row["seed"] != other["seed"] for other in group):
            group.append(row)
    labelled = {mix: group for (mix, variant), group in groups.items() if variant == "labelled"}
    for (mix, variant), group in groups.items():
        beside = labelled.get(labelled_alone(mix), [])
        if variant in WITH_ALL_MASKS and len(labelled) == 1:  # they serve every mix
            (beside,) = labelled.values()
        base = {row["seed"]: figure(row, "dice") for row in beside}
        lines.append(f"| {mix} | {variant} | {cells(group, base)} |")
    _reports.write(options.table, lines)


def cells(rows: list[dict[str, Any]], base: dict[int, float]) -> str:
    """Return a variant's figures over the seeds; ``base`` is Dice to compare with, by seed."""
    found = []
    for metric in METRICS:
        values = [figure(row, metric) * (1 if metric == "hd95" else 100) for row in rows]
        found.append(_reports.spread(values, digits=1))
    beyond = (100 * (figure(r, "dice") - base[r["seed"]]) for r in rows if r["seed"] in base)
    found.append(", ".join(f"{value:+.1f}" for value in beyond))
    parts = [(row["server"] or row["own"])["clients"] for row in rows]
    each = (statistics.mean(100 * part[k]["dice"] for part in parts) for k in parts[0])
    found.append(", ".join(f"{value:.1f}" for value in each))
    found.append(f"{statistics.mean(sum(row['sat_out']) for row in rows):.0f}")
    return " | ".join(found)


if __name__ == "__main__":
    main()
