"""``sdq quantize --ptq``: a few hundred images, no labels, no training."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.progress import Watch
from sdq.config import PtqConfig, SearchConfig
from sdq.errors import RequestError
from sdq.ptq import ptq_, search_config, search_method, soft_labelled
from sdq.quant_model import QuantModel

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OF_TRAINING = (
    "epochs", "lr", "weight_decay", "optimizer", "schedule", "bin_weight", "bin_reduction",
    "teacher", "teacher_model", "teacher_weights", "distill", "ema_decay", "bn_batches", "select",
    "devices", "precision", "keep_weights",
)  # fmt: skip
"""Parameters of ``sdq quantize`` that mean nothing where nothing is trained."""


def make_ptq(ptq: bool, images: int, steps: int, seed: int) -> PtqConfig | None:
    """Return what ``--ptq`` asks for, or None without it.

    Raises:
        RequestError: an option of training stands beside it, or its own stands without it.
    """
    if not ptq:
        for name in ("ptq_images", "ptq_steps"):
            if options.given(name):
                option = f"--{name.replace('_', '-')}"
                raise RequestError(f"{option}: must stand with --ptq; add it, or drop this")
        return None
    for name in OF_TRAINING:
        if options.given(name):
            option = "--no-distill" if name == "distill" else f"--{name.replace('_', '-')}"
            raise RequestError(
                f"{option}: must stand without --ptq, which trains nothing and runs in one "
                "process; drop one of the two"
            )
    return PtqConfig(images=images, steps=steps, seed=seed)


def search_of(search: SearchConfig) -> SearchConfig:
    """Return a search as ``--ptq`` has it where the command line leaves it open."""
    own = search_config(search)
    return own.replaced(epochs=search.epochs) if options.given("search_epochs") else own


def method_of(search: SearchConfig, method: str, *, learn_act_bits: bool) -> str:
    """Return the search method of ``--ptq``: what was asked for, or what can choose such bits."""
    if options.given("search_method"):
        return method
    return search_method(search.granularity, learn_act_bits=learn_act_bits)


def calibration_images(inputs: inp.Inputs, count: int) -> Tensor:
    """Return training images ``(N, C, H, W)``, not augmented; their labels go no further."""
    found: list[Tensor] = []
    for images, _ in inputs.calibration():
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def unlabelled(
    network: nn.Module, inputs: inp.Inputs, ptq: PtqConfig
) -> list[tuple[Tensor, Tensor]]:
    """Return the calibration images as batches with the float network's soft labels."""
    return soft_labelled(network, calibration_images(inputs, ptq.images))


def round_(
    qmodel: QuantModel, inputs: inp.Inputs, ptq: PtqConfig, fabric: "Fabric", watch: Watch
) -> dict[str, Any]:
    """Quantize in place, and return what ``metrics.json`` says of the blocks."""
    qmodel.to(fabric.device)
    reports = ptq_(qmodel, calibration_images(inputs, ptq.images), ptq, watch=watch)
    return {"blocks": [asdict(report) for report in reports]}
