"""Scales of activations from data, and the network as it computes without quantization."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sdq.batches import length, pairs
from sdq.config import QuantConfig
from sdq.learned_scale import ActQuantizer, Quantized
from sdq.modes import evaluating
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel


def like(quantizer: ActQuantizer, bits: int, config: QuantConfig) -> ActQuantizer:
    """Return an uncalibrated quantizer of other bits for the same tensor."""
    found = ActQuantizer(bits, quantizer.signed, config.restrict_scale)
    return found.to(quantizer.base.device)


class _PassThrough(nn.Module):
    """Stands in for a quantizer and changes nothing."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones((), device=like.device), persistent=False)

    def forward(self, x: Tensor) -> Quantized:
        one = self.one
        assert isinstance(one, Tensor)
        return x, one, one * 0, one * FLOAT_BITS


@contextlib.contextmanager
def in_float(qmodel: QuantModel) -> Iterator[None]:
    """Let the network compute with its float weights and activations for a while."""
    acts = qmodel.act_quantizers()
    for path, act in acts.items():
        qmodel.set_act_quantizer_(path, _PassThrough(act.base))
    try:
        with _weights_in_float(qmodel):
            yield
    finally:
        for path, act in acts.items():
            qmodel.set_act_quantizer_(path, act)


@contextlib.contextmanager
def _weights_in_float(qmodel: QuantModel) -> Iterator[None]:
    layers = [bits.name for bits in qmodel.policy if bits.weight_bits != FLOAT_BITS]
    weights = {name: qmodel.weight_quantizer(name) for name in layers}
    for name in weights:
        qmodel.set_weight_quantizer_(name, _PassThrough(qmodel.weight(name)))
    try:
        yield
    finally:
        for name, quantizer in weights.items():
            qmodel.set_weight_quantizer_(name, quantizer)


def calibrate_acts(
    qmodel: QuantModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    choices: Mapping[str, tuple[int, ...]],
) -> dict[str, list[ActQuantizer]]:
    """Return a calibrated quantizer for each candidate bitwidth of some activations.

    Args:
        qmodel: left as it is.
        batches: as of :func:`calibrate_`.
        choices: candidate bitwidths by the quantizer's path.
    """
    originals = qmodel.act_quantizers()
    found = {
        path: [like(originals[path], bits, qmodel.config) for bits in widths]
        for path, widths in choices.items()
    }
    try:
        for k in range(max(map(len, choices.values()))):
            for path, candidates in found.items():
                qmodel.set_act_quantizer_(path, candidates[min(k, len(candidates) - 1)])
            calibrate_(qmodel, batches)
    finally:
        for path, quantizer in originals.items():
            qmodel.set_act_quantizer_(path, quantizer)
    return found


CALIBRATION_IMAGES = 256
"""Their millions of activations fix a scale as well as those of a thousand images do."""


@torch.no_grad()
def calibrate_(
    qmodel: QuantModel, batches: Iterable[tuple[Tensor, Tensor]], steps: int = 8
) -> None:
    """Set every activation scale from a few batches passed through the network in float.

    Args:
        qmodel: changed in place; its training mode is kept.
        batches: of ``(images, labels)``, shuffled; the labels are not used.
        steps: number of batches to look at. Of large ones only the first images are used, 256 in
            all.
    """
    known = length(batches)
    count = steps if known is None else min(steps, known)
    share = math.ceil(CALIBRATION_IMAGES / max(count, 1))
    quantizers = qmodel.act_quantizers().values()
    device = next(qmodel.parameters()).device
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        with evaluating(qmodel), _weights_in_float(qmodel):
            for step, (images, _) in enumerate(pairs(batches)):
                if step == steps:
                    break
                qmodel(images[:share].to(device))
    finally:
        for quantizer in quantizers:
            quantizer.settle_()
