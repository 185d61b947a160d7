r"""Bits learned across clients, beside what one could do instead.

    float          the federation in float, from which the other rows start
    float_more     as many rounds more as search and tuning have, at the tuning's learning rates
    sdq            bits and weights learned in rounds (``sdq federate --bits``)
    uniform        the same bits everywhere, tuned in the rounds of search and tuning
    uniform_above  the next uniform bits, which are above the budget; tuned as ``uniform``
    one_client     bits learned by the client with most images, in as many epochs as the search has
                   rounds; tuned as ``sdq``
    small_client   likewise, by the client with fewest images
    other_clients  likewise, by each of the others: client_2 has the second most
    at_one_client  all of search and tuning at that client, from the federation's float model
    hessian        bits by ``hessian`` from images and soft labels of that client; tuned as ``sdq``
    ptq            float_more quantized after training with such bits, on the same images
    ptq_learned    likewise, bits by a search without training (where activations' are learned)
    few_bytes      ``sdq``, but float phase and all with --compress
    personal       ``sdq``, with a budget of their own for the clients of --personal
    alone          each of those clients as a federation of one: all phases on its own images

With ``--act-choices`` the bits of activations are learned as well, within ``--avg-act-bits``;
``hessian`` chooses none, and has the most of that mean that all can have alike.

All but the last two are measured on the test images of all clients, those on the client's own;
with ``--on val`` on the validation images, to choose settings by. Each finished row is kept in
``--out``; interrupted, the command goes on where it stopped.

    python benchmarks/federated_bits.py --data DIR/dermamnist.npz --bits 2 --seeds 0,1,2 \
        --out runs/federated_bits --table benchmarks/results/federated_bits.md
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _reports
import torch
from _bits_table import lines_of
from torch import nn

import fl
import sdq
from fl.bits import ClientBudget, FederatedBits, PersonalModel, PhasesConfig
from fl.clients import Partition, clients_of
from fl.compression import CompressionConfig
from fl.evaluation import primary
from fl.method import ClientData
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import load_tensors, save_tensors
from sdq.data import DataOptions, ImageSet, Splits, open_data
from sdq.metrics import agreement, classification_metrics, predict
from sdq.ptq import search_config, search_method, soft_labelled

ROWS = (
    "float", "float_more", "sdq", "uniform", "uniform_above", "one_client", "small_client",
    "other_clients", "at_one_client", "hessian", "ptq", "ptq_learned", "few_bytes", "personal",
    "alone",
)  # fmt: skip
DECAY = PhasesConfig().tune_lr_decay
QUANT = sdq.QuantConfig()
SEARCH = sdq.SearchConfig()


def main() -> None:
    """Run what is missing and write the table."""
    options = arguments()
    torch.set_num_threads(1)
    splits = open_data(options.data, DataOptions(root=options.data_root))
    _reports.keep_rows(options.out, options, "rows")
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        bench = Bench(options, splits, seed)
        for name in options.rows.split(","):
            rows += bench.figures(name)
            _reports.write(options.table, lines_of(rows, options))


def arguments() -> argparse.Namespace:
    parser = _reports.data_parser(__doc__, "vgg_like")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--on", choices=("test", "val"), default="test", help="what is measured")
    parser.add_argument("--widths", help="of a model that takes them, such as 8,16,32")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--act-bits", type=int, default=4, help="where they are not learned")
    parser.add_argument("--act-choices", help="candidates of activations, such as 2,3,4,6")
    parser.add_argument("--weight-scale", default=QUANT.weight_scale)
    parser.add_argument("--scale", default=QUANT.restrict_scale, help="float or power_of_two")
    parser.add_argument("--avg-act-bits", type=float, help="with --act-choices")
    parser.add_argument("--personal", default="0:1.5,1:3", help="CLIENT:BITS, ...")
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--loss", default="balanced_softmax")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--partition", default="dirichlet:1.0")
    parser.add_argument("--rounds", type=int, default=16, help="in float")
    parser.add_argument("--search-rounds", type=int, default=6)
    parser.add_argument("--search-start", choices=("budget", "highest"), default=SEARCH.start)
    parser.add_argument("--tune-rounds", type=int, default=8)
    parser.add_argument("--tune-from", choices=("float", "search"), default="float")
    parser.add_argument("--distill", type=float, default=PhasesConfig().distill)
    parser.add_argument("--compress", default="2,policy", help="of few_bytes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-decay-rounds", default="", help=f"of float, times {DECAY} each")
    parser.add_argument("--tune-lr", type=float, help="of search and tuning; as --lr")
    parser.add_argument("--train-images", type=int, default=0, help="a part of them; 0: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    options = parser.parse_args()
    if bool(options.act_choices) != bool(options.avg_act_bits):
        parser.error("--act-choices and --avg-act-bits must stand together; add the other")
    return options


class Bench:
    """Everything of one seed."""

    def __init__(self, options: argparse.Namespace, splits: Splits, seed: int) -> None:
        self.options, self.seed, self.splits = options, seed, splits
        train = _reports.part(splits.train, options.train_images)
        self.clients = clients_of(
            replace(splits, train=train), Partition.parsed(options.partition), options.clients, seed
        )
        self.normalization = Normalization.of(train)
        self.augment = Augmentation(splits.horizontal_flip, splits.vertical_flip)
        self.sample = torch.zeros(1, *splits.image_shape)
        acts = _whole(options.act_choices) if options.act_choices else None
        scales = {"weight_scale": options.weight_scale, "restrict_scale": options.scale}
        self.quant = QUANT.replaced(act_bits=options.act_bits, act_choices=acts, **scales)
        common = max(b for b in acts if b <= options.avg_act_bits) if acts else options.act_bits
        self.fixed_acts = self.quant.replaced(act_bits=common, act_choices=None)
        self.own_bits = {
            int(k): float(b) for k, b in (p.split(":") for p in options.personal.split(","))
        }

    def figures(self, name: str) -> list[dict[str, Any]]:
        """Return a row's figures; of ``personal`` and ``alone`` one a client."""
        file = self.options.out / f"{name}-{self.seed}.json"
        if file.exists():
            known: list[dict[str, Any]] = json.loads(file.read_text())
            return known
        start = time.process_time()
        found = getattr(self, f"row_{name}")()
        seconds = (time.process_time() - start) / max(len(found), 1)
        rows = [{"row": name, "seed": self.seed, "seconds": seconds, **one} for one in found]
        file.write_text(json.dumps(rows))
        print(rows, flush=True)
        return rows

    # --- rows

    def row_float(self) -> list[dict[str, Any]]:
        done = self.in_float()
        save_tensors(self.file("float"), done.state)
        return [self.measured(self.network("float"), 32.0, done.bytes_up, done.bytes_down)]

    def row_float_more(self) -> list[dict[str, Any]]:
        rounds = self.options.search_rounds + self.options.tune_rounds
        at = (-(-rounds // 2), -(-3 * rounds // 4))  # as the tuning has it
        common = self.common(tuning=True, lr_decay=DECAY, lr_decay_rounds=at)
        done = fl.run(self.network("float"), rounds=rounds, **common)
        save_tensors(self.file("float_more"), done.state)
        network = self.network("float_more")
        return [self.measured(network, 32.0, done.bytes_up, done.bytes_down)]

    def row_sdq(self) -> list[dict[str, Any]]:
        return [self.learned(self.federated())]

    def row_uniform(self) -> list[dict[str, Any]]:
        rounds = self.options.search_rounds + self.options.tune_rounds
        return [self.learned(self.federated(search_method="uniform", tune_rounds=rounds))]

    def row_uniform_above(self) -> list[dict[str, Any]]:
        options, acts = self.options, self.quant.act_choices
        weights = min(b for b in self.quant.bit_choices if b > options.bits)
        common = min(b for b in acts if b > options.avg_act_bits) if acts else options.act_bits
        quant = self.fixed_acts.replaced(act_bits=common)
        policy = sdq.quantize(self.network("float"), quant, sample=self.sample).policy
        policy = policy.with_weight_bits({b.name: weights for b in policy if b.searched})
        rounds = options.search_rounds + options.tune_rounds
        return [self.learned(self.federated(policy=policy, quant=quant, tune_rounds=rounds))]

    def row_one_client(self) -> list[dict[str, Any]]:
        return [self.bits_of(self.by_images[0])]

    def row_small_client(self) -> list[dict[str, Any]]:
        return [self.bits_of(self.by_images[-1])]

    def row_other_clients(self) -> list[dict[str, Any]]:
        others = enumerate(self.by_images[1:-1], 2)
        return [{**self.bits_of(client), "row": f"client_{rank}"} for rank, client in others]

    def bits_of(self, client: ClientData) -> dict[str, Any]:
        """Let one client learn bits, and all tune."""
        network, loader = self.network("float"), self.batches(client.train)
        qmodel = sdq.quantize(network, self.quant, sample=self.sample)
        policy = sdq.search(
            qmodel, loader, budget=self.budget(self.options.bits), teacher=network,
            config=self.search_config.replaced(epochs=self.options.search_rounds),
        )  # fmt: skip
        return self.learned(self.federated(policy=policy))

    def row_at_one_client(self) -> list[dict[str, Any]]:
        found = self.learned(self.federated(clients=[self.by_images[0]]))
        return [{**found, "bytes_up": 0, "bytes_down": 0}]  # nothing is sent

    def row_hessian(self) -> list[dict[str, Any]]:
        policy = self.without_labels("float", self.fixed_acts, "hessian")[0].policy
        return [self.learned(self.federated(policy=policy, quant=self.fixed_acts))]

    def row_ptq(self) -> list[dict[str, Any]]:
        return self.after_training(self.fixed_acts, search_method())

    def row_ptq_learned(self) -> list[dict[str, Any]]:
        return self.after_training(self.quant, "sdq")

    def after_training(self, quant: sdq.QuantConfig, method: str) -> list[dict[str, Any]]:
        qmodel, images = self.without_labels("float_more", quant, method)
        sdq.ptq_(qmodel, images, sdq.PtqConfig(seed=self.seed))
        return [self.quantized(qmodel, 0, 0)]

    def without_labels(
        self, row: str, quant: sdq.QuantConfig, method: str
    ) -> tuple[sdq.QuantModel, torch.Tensor]:
        """Return a float row's network under bits from unlabelled images, and these images."""
        network = self.network(row)
        images = torch.cat([x for x, _ in self.batches(self.by_images[0].train, augmented=False)])
        images = images[: sdq.PtqConfig().images]
        data = soft_labelled(network, images)
        qmodel = sdq.quantize(network, quant, sample=self.sample)
        sdq.calibrate_(qmodel, data)
        policy = sdq.search(
            qmodel, data, budget=self.budget(self.options.bits), teacher=network, method=method,
            config=search_config(sdq.SearchConfig(seed=self.seed)),
        )  # fmt: skip
        sdq.apply_policy_(qmodel, policy)
        return qmodel, images

    def row_few_bytes(self) -> list[dict[str, Any]]:
        few = CompressionConfig.parsed(self.options.compress)
        before = self.in_float(compress=few.replaced(policy_bits=False))
        network = self.untrained()
        network.load_state_dict(before.state)
        found = self.learned(self.federated(network, compress=few))
        return [{**found, **{k: found[k] + getattr(before, k) for k in ("bytes_up", "bytes_down")}}]

    def row_personal(self) -> list[dict[str, Any]]:
        budgets = {k: ClientBudget(self.budget(b)) for k, b in self.own_bits.items()}
        done = self.federated(personal=budgets)
        return [self.own(done.personal[k], k) for k in self.own_bits]

    def row_alone(self) -> list[dict[str, Any]]:
        return [self.by_itself(client, bits) for client, bits in self.own_bits.items()]

    # --- parts

    @property
    def by_images(self) -> list[ClientData]:
        """The clients, from most images to fewest."""
        return sorted(self.clients, key=lambda client: -len(client.train))

    def untrained(self) -> nn.Module:
        widths = self.options.widths
        sizes = {"widths": _whole(widths)} if widths else {}
        return _reports.untrained(self.options.model, self.splits, self.seed, **sizes)

    def file(self, row: str) -> Path:
        return self.options.out / f"{row}-{self.seed}.safetensors"

    def network(self, row: str) -> nn.Module:
        network = self.untrained()
        network.load_state_dict(load_tensors(self.file(row))[0])
        return network

    def common(self, *, tuning: bool = False, **changes: Any) -> dict[str, Any]:
        options = self.options
        at = _whole(options.lr_decay_rounds)
        pace: dict[str, Any] = {"lr": options.lr, "lr_decay": DECAY, "lr_decay_rounds": at}
        if tuning:
            pace = {"lr": options.tune_lr or options.lr}
        config = fl.FederationConfig(**{
            "batch_size": options.batch_size, "seed": self.seed, "evaluate_every": 1000,
            "loss": fl.LossConfig(name=options.loss), **pace, **changes,
        })  # fmt: skip
        return {
            "method": options.method, "clients": self.clients, "config": config,
            "num_classes": len(self.splits.class_names), "normalization": self.normalization,
            "augment": self.augment,
        }  # fmt: skip

    def in_float(self, **changes: Any) -> fl.Federated:
        return fl.run(self.untrained(), rounds=self.options.rounds, **self.common(**changes))

    @property
    def search_config(self) -> sdq.SearchConfig:
        return SEARCH.replaced(seed=self.seed, start=self.options.search_start)

    def budget(self, bits: float) -> sdq.Budget:
        return sdq.Budget(avg_weight_bits=bits, avg_act_bits=self.options.avg_act_bits)

    def federated(
        self, network: nn.Module | None = None, *, policy: Any = None, search_method: str = "sdq",
        tune_rounds: int | None = None, compress: CompressionConfig | None = None,
        quant: sdq.QuantConfig | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """Learn bits and tune, from a float network; ``more`` takes the place of what is common."""
        options = self.options
        phases = PhasesConfig(
            search_method=search_method, search_rounds=options.search_rounds,
            tune_rounds=tune_rounds or options.tune_rounds, distill=options.distill,
            tune_from=options.tune_from, search=self.search_config,
        )  # fmt: skip
        given = {
            "budget": None if policy is not None else self.budget(options.bits),
            **self.common(tuning=True, compress=compress), **more,
        }  # fmt: skip
        network = network or self.network("float")
        quant = quant or self.quant
        return fl.run(network, rounds=0, quant=quant, phases=phases, policy=policy, **given)

    def batches(self, images: ImageSet, *, augmented: bool = True) -> Batches:
        return Batches(
            images, self.normalization, batch_size=self.options.batch_size, shuffle=True,
            augment=self.augment if augmented else None, seed=self.seed,
        )  # fmt: skip

    def learned(self, done: FederatedBits) -> dict[str, Any]:
        qmodel = sdq.quantize(self.network("float"), done.quant, sample=self.sample)
        sdq.apply_policy_(qmodel, done.policy)
        qmodel.load_state_dict(done.state)
        found = self.quantized(qmodel, done.bytes_up, done.bytes_down)
        special = done.specialization or {}
        return {**found, "specialization": special.get("balanced_accuracy")}

    def quantized(self, qmodel: sdq.QuantModel, up: int, down: int) -> dict[str, Any]:
        found = self.measured(qmodel, qmodel.policy.avg_weight_bits, up, down)
        return {**found, **_bits_of(qmodel.policy)}

    def measured(self, network: nn.Module, bits: float, up: int, down: int) -> dict[str, Any]:
        images = self.splits.test if self.options.on == "test" else self.splits.val
        assert images is not None
        batches = Batches(images, self.normalization, batch_size=256)
        logits, labels = predict(network, batches)
        reference, _ = predict(self.network("float"), batches)
        return {
            "metrics": classification_metrics(logits, labels),
            "agreement": agreement(logits, reference), "bits": bits, "bytes_up": up,
            "bytes_down": down,
        }  # fmt: skip

    def own(self, model: PersonalModel, client: int) -> dict[str, Any]:
        """Return the figures of a client's own model."""
        return {
            "client": client, "budget": self.own_bits[client],
            "bits": model.policy.avg_weight_bits,
            "metrics": primary(model.evaluation[self.options.on]),
            **_bits_of(model.policy),
        }  # fmt: skip

    def by_itself(self, client: int, bits: float) -> dict[str, Any]:
        """Return what a client reaches with its own images in as many rounds, all else as it is."""
        budget, alone = self.budget(bits), [self.clients[client]]
        before = fl.run(
            self.untrained(), rounds=self.options.rounds, **{**self.common(), "clients": alone}
        )
        network = self.untrained()
        network.load_state_dict(before.state)
        done = self.federated(
            network, clients=alone, budget=budget, personal={0: ClientBudget(budget)}
        )
        return self.own(done.personal[0], client)


def _bits_of(policy: sdq.BitwidthPolicy) -> dict[str, list[int]]:
    searched = [bits for bits in policy if bits.searched]
    return {"policy": [b.weight_bits for b in searched], "acts": [b.act_bits for b in searched]}


def _whole(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


if __name__ == "__main__":
    main()
