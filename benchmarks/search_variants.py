"""What the choices in the search are worth: ours, the paper's one-way decay, and uniform bits.

Built-in data, the demo's network and budget; every layer is searched.

    python benchmarks/search_variants.py --table benchmarks/results/synthetic_derm_search.md
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import sdq
from sdq.batches import Augmentation, Batches, Normalization, generator
from sdq.data import DataOptions
from sdq.datasets import synthetic_derm
from sdq.models import vgg_like

HARD = {"distill": False}
VARIANTS = {
    "SDQ (default)": {},
    "hard labels": HARD,
    "hard labels, no rise": {**HARD, "rise_threshold": None},
    "hard labels, no rise, start at the highest (paper)": {
        **HARD,
        "rise_threshold": None,
        "start": "highest",
    },
    "uniform": None,
}
FIGURES = ("accuracy", "balanced_accuracy", "auc")


def main() -> None:
    """Run every variant on every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--table", type=Path, required=True)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, object]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for name, row in one_seed(seed, options.bits):
            rows.setdefault(name, []).append(row)
            print(seed, name, row, flush=True)
    lines = [
        f"# Search variants: vgg_like on synthetic_derm, {options.bits:g} average bits, all layers",
        "",
        f"Seeds {options.seeds}; test split; mean ± standard deviation. 10 epochs of float "
        "training, 3 of search, 3 of fine-tuning. `bits` is the policy's mean; `before projection` "
        "is the expected cost over the budget at the end of the search.",
        "",
        f"`python benchmarks/search_variants.py --table {options.table}`",
        "",
        f"| variant | {' | '.join(FIGURES)} | bits | before projection | search seconds |",
        "|---|" + "---|" * (len(FIGURES) + 3),
    ]
    for name, found in rows.items():
        cells = [spread([float(r[f]) for r in found]) for f in FIGURES]  # type: ignore[arg-type]
        bits = max(float(r["bits"]) for r in found)  # type: ignore[arg-type]
        use = ", ".join(str(r["use"]) for r in found)
        seconds = statistics.mean(float(r["seconds"]) for r in found)  # type: ignore[arg-type]
        lines.append(f"| {name} | {' | '.join(cells)} | {bits:.3f} | {use} | {seconds:.0f} |")
    lines += ["", "Policies (bits of each layer, in order):", ""]
    for name, found in rows.items():
        lines += [f"- {name}: " + "; ".join(str(r["policy"]) for r in found)]
    options.table.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def one_seed(seed: int, bits: float) -> list[tuple[str, dict[str, object]]]:
    """Return a row for the float network and for every variant."""
    splits = synthetic_derm.load(DataOptions(seed=seed))
    assert splits.test is not None
    normalization = Normalization.of(splits.train)
    loader = Batches(
        splits.train, normalization, shuffle=True, seed=seed,
        augment=Augmentation(splits.horizontal_flip, splits.vertical_flip),
    )  # fmt: skip
    test = Batches(splits.test, normalization, batch_size=500)
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "weights").initial_seed())
        network = vgg_like.build(len(splits.class_names))
    sdq.train_(network, loader, sdq.TrainConfig(epochs=10, lr=2e-3, weight_decay=1e-2, seed=seed))
    figures = sdq.evaluate(network, test)
    rows: list[tuple[str, dict[str, object]]] = [
        ("float", {**{f: figures[f] for f in FIGURES}, "bits": 32, "use": "-", "seconds": 0,
                   "policy": "-"})
    ]  # fmt: skip
    sample = torch.zeros(1, *splits.image_shape)
    budget = sdq.Budget(avg_weight_bits=bits)
    for name, settings in VARIANTS.items():
        qmodel = sdq.quantize(network, sdq.QuantConfig(first_last_bits=None), sample=sample)
        sdq.calibrate_(qmodel, loader)
        use: list[float] = []
        start = time.perf_counter()
        if settings is None:
            policy = sdq.uniform_policy(qmodel, budget)
        else:
            policy = sdq.search(
                qmodel, loader, budget=budget, teacher=network,
                config=sdq.SearchConfig(epochs=3, seed=seed, **settings),
                watch=lambda r, use=use: use.extend(
                    (r.end_of_epoch or {}).get("budget_use", {}).values()
                ),
            )  # fmt: skip
        seconds = time.perf_counter() - start
        sdq.apply_policy_(qmodel, policy)
        sdq.finetune_(qmodel, loader, teacher=network, config=sdq.TrainConfig(epochs=3, seed=seed))
        figures = sdq.evaluate(qmodel, test)
        rows.append(
            (name, {**{f: figures[f] for f in FIGURES}, "bits": policy.avg_weight_bits,
                    "use": f"{use[-1]:.2f}" if use else "-", "seconds": seconds,
                    "policy": [layer.weight_bits for layer in policy]})
        )  # fmt: skip
    return rows


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
