"""Train, search and fine-tune in as many processes as asked, and write what each one ended with.

    python tests/two_processes.py PROCESSES FOLDER

A script of its own: Fabric starts its other processes by running the same script again.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sdq
from sdq.checkpoint import Checkpoint, save_tensors
from sdq.parallel import open_fabric
from sdq.train import StepReport

SIZES = (16, 16, 7, 3)
"""The last two cannot be halved; of the last one each half would be too small."""


def batches(batch_norm: bool = False) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1 + batch_norm)
    found = []
    for size in SIZES:
        labels = torch.randint(3, (size,), generator=rng)
        images = 0.5 * torch.randn(size, 1, 8, 8, generator=rng)
        images[labels == 0, :, 3] += 1.5
        images[labels == 1, :, :, 5] += 1.5
        found.append((images, labels))
    return found


def network(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if batch_norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(),
        nn.Linear(12, 3),
    )  # fmt: skip


def main() -> None:
    processes, out = int(sys.argv[1]), Path(sys.argv[2])
    fabric = open_fabric("cpu", processes)
    fabric.launch()
    own = out / f"{processes}-{fabric.global_rank}"
    reports: dict[str, list[float]] = {}

    def watch(report: StepReport) -> None:
        reports.setdefault(report.phase, []).append(report.loss)

    def checkpoint(phase: str) -> Checkpoint:  # only the first process must write
        return Checkpoint(own / f"checkpoint-{phase}.safetensors")

    loader = batches()
    sgd = sdq.TrainConfig(epochs=3, lr=0.05, optimizer="sgd", ema_decay=0.5)
    net = network()
    trained = sdq.train_(
        net, loader, sgd, validation=loader, fabric=fabric, watch=watch,
        checkpoint=checkpoint("train"),
    )  # fmt: skip
    # statistics are of slices here, so this one is compared between processes alone
    with_bn = network(batch_norm=True)
    sdq.train_(with_bn, loader, sgd.replaced(bn_batches=4), validation=loader, fabric=fabric)

    # the average's statistics are means over processes too
    averaged = network(batch_norm=True)
    sdq.train_(averaged, loader, sgd, validation=loader, fabric=fabric)

    # it shuffles with torch's global generator, and dropout draws from it too
    data = TensorDataset(*(torch.cat(part) for part in zip(*loader, strict=True)))
    shuffled = nn.Sequential(network(), nn.Dropout(0.0))
    sdq.train_(
        shuffled, DataLoader(data, 10, shuffle=True), sgd.replaced(ema_decay=0.0), fabric=fabric
    )

    # the others start from weights that no rounding has touched
    qmodel = sdq.quantize(network(), sdq.QuantConfig(act_bits=8), sample=torch.zeros(1, 1, 8, 8))
    sdq.calibrate_(qmodel, loader)
    policy = sdq.search(
        qmodel, loader, budget=sdq.Budget(avg_weight_bits=3.0), teacher=network(),
        config=sdq.SearchConfig(epochs=3), fabric=fabric, watch=watch,
        checkpoint=checkpoint("search"),
    )  # fmt: skip
    sdq.apply_policy_(qmodel, sdq.uniform_policy(qmodel, sdq.Budget(avg_weight_bits=4.0)))
    tuned = sdq.finetune_(
        qmodel, loader, teacher=network(), config=sgd.replaced(lr=0.01, bin_warmup=0.0),
        validation=loader, fabric=fabric, watch=watch, checkpoint=checkpoint("finetune"),
    )  # fmt: skip
    ends = {
        "float": net, "shuffled": shuffled, "bn": with_bn, "averaged": averaged,
        "quantized": qmodel,
    }  # fmt: skip
    for name, module in ends.items():
        save_tensors(own / f"{name}.safetensors", module.state_dict())
    bits = {b.name: b.weight_bits for b in policy}
    best = {"train": trained.to_json(), "finetune": tuned.to_json()}
    document = {"losses": reports, "bits": bits, "best": best}
    (own / "results.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
