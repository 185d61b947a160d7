"""Bitwidths searched for the LUTs of an FPGA, beside the same bits everywhere.

The accelerator is folded for ``--fps`` on ``--target``. Uniform policies say what 2, 3 and 4 bits
in every searched layer cost and are worth; then a search spends as many LUTs as uniform 4-bit
weights take, or a share of them. Everything starts from the same float network and is fine-tuned
alike. Each finished variant is kept in ``--out``; the command goes on where it stopped.

    python benchmarks/lut_search.py --data cifar10 --data-root DIR --model vgg_like --seeds 0,1,2 \
        --out runs/luts --table benchmarks/results/lut_search.md
"""

import argparse
import json
import statistics
from typing import Any

import _reports
import search_methods
import torch
from search_methods import FIGURES

import hw
import sdq
from hw.target import Demand, choices_of, cost_fn
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel

UNIFORM = (4, 3, 2)


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    rows: list[dict[str, Any]] = []
    for bench in search_methods.benches(Bench, options, "shares"):
        rows.append({"variant": "float", "seed": bench.seed, **bench.float_figures()})
        for bits in UNIFORM:
            rows.append(bench.row(f"uniform {bits}", bits=bits))
        for share in map(float, options.shares.split(",")):
            rows.append(bench.row(f"searched, {share:.0%} of uniform 4", share=share))
            print(json.dumps(rows[-1]), flush=True)
    write(options, rows)


def arguments() -> argparse.Namespace:
    parser = search_methods.search_parser(__doc__, model="vgg_like")
    parser.add_argument("--target", default="pynq_z2")
    parser.add_argument("--fps", type=float, default=1000.0)
    parser.add_argument("--shares", default="1,0.9,0.8", help="of uniform 4 bits' LUTs")
    parser.add_argument("--choices", default="1,2,3,4,6,8", help="all must reach --fps")
    return parser.parse_args()


class Bench(search_methods.Bench):
    """Everything of one seed: the float network, and what is made of it."""

    def row(
        self, variant: str, *, bits: int | None = None, share: float | None = None
    ) -> dict[str, Any]:
        """Return a variant's figures: the same bits everywhere, or searched for a share of LUTs."""
        file = self.options.out / f"{variant.replace(' ', '-')}-{self.seed}.json"
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text())
            return known
        qmodel = self.quantized()
        policy = uniform(qmodel, bits) if bits is not None else self.searched(qmodel, share or 1.0)
        sdq.apply_policy_(qmodel, policy)
        if not qmodel.calibrated:
            sdq.calibrate_(qmodel, self.plain)
        tuning = sdq.TrainConfig(epochs=self.options.epochs, seed=self.seed)
        sdq.finetune_(qmodel, self.loader, teacher=self.network, config=tuning, fabric=self.fabric)
        found, cost = sdq.evaluate(qmodel, self.test), self.report(qmodel, policy)
        row = {
            "variant": variant, "seed": self.seed, **{key: found[key] for key in FIGURES},
            **{key: cost.totals[key] for key in ("lut", "bram_18k", "dsp", "fps")},
            "bits": policy.avg_weight_bits, "policy": [b.weight_bits for b in policy],
        }  # fmt: skip
        file.write_text(json.dumps(row))
        return row

    @property
    def choices(self) -> tuple[int, ...]:
        return tuple(map(int, self.options.choices.split(",")))

    def quantized(self) -> QuantModel:
        config = sdq.QuantConfig(
            bit_choices=self.choices, act_bits=self.options.act_bits,
            first_last_bits=self.options.first_last_bits or None, integer_datapath=True,
        )  # fmt: skip
        qmodel = sdq.quantize(self.network, config, sample=self.sample.to(self.fabric.device))
        sdq.calibrate_(qmodel, self.plain)
        return qmodel

    def report(self, qmodel: QuantModel, policy: BitwidthPolicy) -> hw.TargetCost:
        demand = Demand(fps=self.options.fps)
        return hw.report(qmodel.layers, policy, self.options.target, demand)

    def searched(self, qmodel: QuantModel, share: float) -> BitwidthPolicy:
        """Return the policy found within a share of what uniform 4 bits take."""
        choices = [
            (self.choices if bits.searched else weights, acts)
            for bits, (weights, acts) in zip(qmodel.policy, choices_of(qmodel.policy), strict=True)
        ]
        device = hw.target(self.options.target)
        placed = device.under(qmodel.layers, Demand(fps=self.options.fps), choices)
        limit = share * self.report(qmodel, uniform(qmodel, 4)).totals["lut"]
        limits = {**placed.limits, "lut": limit}
        costs = tuple((cost_fn(placed, name), value) for name, value in limits.items())
        config = sdq.SearchConfig(epochs=self.options.search_epochs, seed=self.seed)
        return sdq.search(
            qmodel, self.loader, budget=sdq.Budget(costs=costs), teacher=self.network,
            config=config, fabric=self.fabric,
        )  # fmt: skip


def uniform(qmodel: QuantModel, bits: int) -> BitwidthPolicy:
    return qmodel.policy.with_weight_bits({b.name: bits for b in qmodel.policy if b.searched})


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table as Markdown."""
    part = f"{options.train_images:,} of its training images, " if options.train_images else ""
    start = "published float weights, then " if options.weights else ""
    lines = [
        f"# Bitwidths for the LUTs of {options.target}: {options.model} on {options.data}",
        "",
        f"Seeds {options.seeds}; {part}{options.judge} split; mean ± standard deviation over "
        f"seeds. {start}{options.float_epochs} epochs of float training, "
        f"{options.search_epochs} of search, "
        f"{options.epochs} of fine-tuning, {options.act_bits}-bit activations, folded for "
        f"{options.fps:g} samples a second. LUTs are the model's (docs/hardware.md), not "
        f"synthesised. torch {torch.__version__}.",
        "",
        f"`{_reports.command()}`",
        "",
        "| variant | " + " | ".join(FIGURES) + " | LUT | BRAM | DSP | bits |",
        "|---|" + "---|" * (len(FIGURES) + 4),
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    for variant, found in groups.items():
        cells = [_reports.spread([row[key] for row in found]) for key in FIGURES]
        if variant == "float":
            lines.append(f"| float | {' | '.join(cells)} | | | | 32 |")
            continue
        means = [
            f"{statistics.mean(row[key] for row in found):,.0f}"
            for key in ("lut", "bram_18k", "dsp")
        ]
        bits = statistics.mean(row["bits"] for row in found)
        lines.append(f"| {variant} | {' | '.join(cells)} | {' | '.join(means)} | {bits:.2f} |")
    lines += ["", "Policies (bits of each layer in order; one list a seed):", ""]
    for variant, found in groups.items():
        if variant != "float":
            lists = "; ".join("".join(map(str, row["policy"])) for row in found)
            lines.append(f"- {variant}: {lists}")
    _reports.write(options.table, lines)


if __name__ == "__main__":
    main()
