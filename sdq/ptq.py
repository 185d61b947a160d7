"""Quantization after training: weights rounded so that each block gives what it gave in float.

Block by block, with the quantized network's own inputs, the squared difference from the float
block's output is minimised over the rounding of the block's weights (and the scales of its
activations). A few hundred images are enough, and no labels are needed.

Source: Nagel et al., AdaRound, ICML 2020, https://arxiv.org/abs/2004.10568 (rounding, and inputs
from the quantized network); Li et al., "BRECQ", ICLR 2021, https://arxiv.org/abs/2102.05426
(blocks in place of layers).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sdq.batches import generator, parts
from sdq.blocks import Block, split
from sdq.calibration import calibrate_, in_float
from sdq.config import Granularity, PtqConfig, SearchConfig
from sdq.errors import RequestError
from sdq.mid_rise import MidRiseQuantizer
from sdq.modes import evaluating
from sdq.outcome import reestimate_statistics_
from sdq.policy import FLOAT_BITS, LayerBits
from sdq.quant_model import QuantModel
from sdq.rounding import SoftRounding, annealed_beta, rounding_regularizer
from sdq.task import task_of
from sdq.train import StepReport, Watcher, channels_last

SEARCH_BATCH = 32
"""Images a step of a search: a few hundred images have few steps otherwise."""

SEARCH_EPOCHS = 12
"""Of a search by gradient: 200 steps with 512 images."""

CHUNK = 64
"""Images that pass through a block at a time where nothing is learned."""


@dataclass(frozen=True)
class BlockReport:
    """What the rounding of a block is worth.

    Args:
        layers: of the block.
        nearest_error: squared difference of the quantized from the float block's output, over the
            variance of the latter, before anything was learned.
        error: the same afterwards.
    """

    layers: tuple[str, ...]
    nearest_error: float
    error: float


def ptq_(
    qmodel: QuantModel,
    images: Tensor,
    config: PtqConfig | None = None,
    *,
    watch: Watcher | None = None,
) -> list[BlockReport]:
    """Quantize a trained network without training it, in place.

    Its weights are put on the levels of its policy: afterwards each is its code times its scale,
    which the network's quantizers give back bit for bit.

    Args:
        qmodel: with the policy applied. Activations that have no scale yet are calibrated.
        images: ``(N, C, H, W)``, normalised as the network expects, of all kinds that it will see.
        config: what is learned, and for how long.
        watch: called after every step.

    Returns:
        A report for each block.

    Raises:
        RequestError: no images, weights that have no levels to be put on, or a network of more than
            one input or output.
    """
    config = config or PtqConfig()
    images = images[: config.images]
    check_ptq(qmodel, config)
    if not len(images):
        raise RequestError("ptq: images must be at least 1, got 0; give a few hundred")
    device = next(qmodel.parameters()).device
    images = images.to(device)
    if not qmodel.calibrated:
        calibrate_(qmodel, [(part, part) for part in images.split(CHUNK)])
    training, wanted = qmodel.training, {p: p.requires_grad for p in qmodel.parameters()}
    qmodel.eval().requires_grad_(False)
    if images.dim() == 4:  # as in training: faster on a CPU
        images = images.contiguous(memory_format=torch.channels_last)
    with channels_last(qmodel):
        blocks = split(qmodel)
        as_float, as_quantized = images, images
        reports = []
        for index, block in enumerate(blocks):
            with in_float(qmodel):
                as_float = _through(block.module, as_float)
            report = _Reconstruction(qmodel, block, config, as_quantized, as_float).run_(
                index, len(blocks), watch
            )
            reports.append(report)
            as_quantized = _through(block.module, as_quantized)
    qmodel.train(training)
    for parameter in qmodel.parameters():
        parameter.requires_grad_(wanted.get(parameter, True))
    return reports


def check_ptq(qmodel: QuantModel, config: PtqConfig) -> None:
    """Raise RequestError if the network's weights cannot be put on their levels."""
    if config.rounding == "learned" and qmodel.config.weight_quantizer != "lsq":
        raise RequestError(
            "ptq: weight_quantizer must be 'lsq', whose levels reproduce themselves, got "
            f"{qmodel.config.weight_quantizer!r}; use lsq, or fine-tune"
        )
    sharing: dict[nn.Parameter, list[LayerBits]] = {}
    for bits in qmodel.policy:
        weight = getattr(qmodel.layer(bits.name), "weight", None)
        if isinstance(weight, nn.Parameter):  # a module in float may have something else there
            sharing.setdefault(weight, []).append(bits)
    for first, *others in sharing.values():
        if others and any(bits.weight_bits != FLOAT_BITS for bits in (first, *others)):
            raise RequestError(
                f"ptq: every layer must have a weight of its own, but {others[0].name} shares that "
                f"of {first.name}, which cannot stand on the levels of both; fine-tune instead"
            )


def search_method(granularity: Granularity = "layer", *, learn_act_bits: bool = False) -> str:
    """Return the search method whose bits are best after training.

    ``sensitivity`` comes nearer to the float network than ``hessian``, ``greedy`` and uniform bits
    (docs/method.md). It knows layers only: for single channels it is ``hessian``, for bits of
    activations ``sdq``.
    """
    if learn_act_bits:
        return "sdq"
    return "hessian" if granularity == "channel" else "sensitivity"


def search_config(config: SearchConfig | None = None) -> SearchConfig:
    """Return a search's configuration as it is after training: weights are left as they are."""
    return (config or SearchConfig()).replaced(train_weights=False, epochs=SEARCH_EPOCHS)


@torch.no_grad()
def soft_labelled(
    network: nn.Module, images: Tensor, batch_size: int = SEARCH_BATCH
) -> list[tuple[Tensor, Tensor]]:
    """Return images as batches with a float network's probabilities for labels.

    What a search, which takes ``(images, labels)``, is given where there are no labels: every
    method then measures against the float network.

    Args:
        network: maps ``(N, C, H, W)`` to logits, of classes or of pixels; its mode is kept.
        images: ``(N, C, H, W)``.
        batch_size: of the batches.
    """
    device = next(network.parameters()).device
    with evaluating(network):
        answers = [(x, network(x.to(device))) for x in parts(images, batch_size)]
    return [(x, task_of(logits).soft_labels(logits).cpu()) for x, logits in answers]


@torch.no_grad()
def _through(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return a block's output for all images."""
    return torch.cat([module(part) for part in images.split(CHUNK)])


class _Reconstruction:
    """The rounding of one block.

    Args:
        qmodel: the network the block is of.
        block: to be changed.
        config: of the rounding.
        inputs: the block's, from the quantized network.
        target: the float block's output.
    """

    def __init__(
        self, qmodel: QuantModel, block: Block, config: PtqConfig, inputs: Tensor, target: Tensor
    ) -> None:
        self.qmodel, self.block, self.config = qmodel, block, config
        self.inputs, self.target = inputs, target
        # in units of the output's own size the regularizer's weight means the same everywhere
        self.variance = max(float(target.var()), 1e-12)
        bits = {b.name: b.weight_bits for b in qmodel.policy}
        self.names = [n for n in block.layers if bits[n] != FLOAT_BITS]

    def run_(self, index: int, count: int, watch: Watcher | None) -> BlockReport:
        """Learn, and leave the weights on their levels."""
        config, before = self.config, self._error()
        steps = config.steps if config.rounding == "learned" and self.names else 0
        if steps:
            with self._soft() as soft:
                for step, loss in enumerate(self._learn(soft, steps, index)):
                    if watch and step + 1 < steps:
                        watch(StepReport("rounding", index, count, step + 1, steps, loss))
                weights = {name: part.settled() for name, part in soft.items()}
        else:
            weights = {n: self._nearest(n) for n in self.names}
        for name, weight in weights.items():
            self.qmodel.weight(name).data.copy_(weight)
        if config.batch_norm:
            inputs = [(part, part) for part in parts(self.inputs, CHUNK)]
            reestimate_statistics_(self.block.module, inputs, len(inputs))
        report = BlockReport(self.block.layers, before, self._error())
        if watch:
            watch(
                StepReport(
                    "rounding", index, count, max(steps, 1), max(steps, 1), report.error,
                    asdict(report),
                )
            )  # fmt: skip
        return report

    def _error(self) -> float:
        difference = _through(self.block.module, self.inputs) - self.target
        return float(difference.square().mean()) / self.variance

    @torch.no_grad()
    def _nearest(self, name: str) -> Tensor:
        weight = self.qmodel.weight(name)
        if isinstance(self.qmodel.settled_quantizer(name), MidRiseQuantizer):
            return weight  # its transform would move the levels
        values: Tensor = self.qmodel.settled_quantizer(name)(weight)[0]
        return values

    @contextmanager
    def _soft(self) -> Iterator[dict[str, SoftRounding]]:
        """Put soft rounding in the place of the block's weight quantizers for a while."""
        hard: dict[str, nn.Module] = {n: self.qmodel.settled_quantizer(n) for n in self.names}
        soft = {
            n: SoftRounding(self.qmodel.weight(n), self.qmodel.settled_quantizer(n))
            for n in self.names
        }
        for name, quantizer in soft.items():
            self.qmodel.set_weight_quantizer_(name, quantizer)
        try:
            yield soft
        finally:
            for name, original in hard.items():
                self.qmodel.set_weight_quantizer_(name, original)

    def _learn(self, soft: dict[str, SoftRounding], steps: int, index: int) -> Iterator[float]:
        """Do the steps and yield the error of each."""
        config = self.config
        groups = [{"params": [part.v for part in soft.values()], "lr": config.lr}]
        if config.act_lr:
            acts = self.qmodel.act_quantizers()
            # paths of one scale have one quantizer
            gains = dict.fromkeys(acts[path].gain.requires_grad_(True) for path in self.block.acts)
            groups.append({"params": list(gains), "lr": config.act_lr})
        optimizer = torch.optim.Adam([g for g in groups if g["params"]])
        rng = generator(config.seed, "rounding", index)
        channels = self.target.shape[1] if self.target.dim() > 1 else 1
        size = min(config.batch_size, len(self.inputs))
        for step in range(steps):
            chosen = torch.randint(len(self.inputs), (size,), generator=rng)
            chosen = chosen.to(self.inputs.device)
            difference = self.block.module(self.inputs[chosen]) - self.target[chosen]
            error = difference.square().mean() / self.variance
            loss = channels * error
            progress = (step / steps - config.warmup) / (1 - config.warmup)
            if progress >= 0:  # at first the error alone moves the weights
                beta = annealed_beta(progress, config.beta_start, config.beta_end)
                for part in soft.values():
                    loss = loss + config.round_weight * rounding_regularizer(part.up(), beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield float(error.detach())
        for path in self.block.acts if config.act_lr else ():
            self.qmodel.act_quantizers()[path].gain.requires_grad_(False)
