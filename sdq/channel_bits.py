"""A weight whose output channels have bitwidths of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sdq.learned_scale import Quantized, WeightQuantizer


class ChannelWeightQuantizer(nn.Module):
    """Quantizes each output channel at its own bitwidth: one quantizer for the channels of a kind.

    Args:
        weight: ``(K, ...)``; gives the first scales.
        channel_bits: of each channel.
        new: makes the quantizer of some channels ``(k, ...)`` at one bitwidth, with a scale for
            each.
    """

    bit_width: Tensor

    def __init__(
        self,
        weight: Tensor,
        channel_bits: Sequence[int],
        new: Callable[[Tensor, int], WeightQuantizer],
    ) -> None:
        super().__init__()
        self.channel_bits = tuple(channel_bits)
        self.bits = max(channel_bits)
        bits = torch.tensor(self.channel_bits, device=weight.device)
        widths = sorted(set(self.channel_bits))
        self.by_bits = nn.ModuleDict({str(b): new(weight[bits == b], b) for b in widths})
        self.channels = {b: (bits == b).nonzero()[:, 0] for b in widths}
        self.register_buffer("bit_width", weight.new_tensor(float(self.bits)), persistent=False)

    def _together(self, pieces: dict[int, Tensor], like: Tensor) -> Tensor:
        """Put the channels of all kinds back in order."""
        order = torch.cat([self.channels[b] for b in pieces]).to(like.device)
        return torch.cat(list(pieces.values()))[order.argsort()]

    def part(self, bits: int) -> WeightQuantizer:
        """Return the quantizer of the channels of a bitwidth."""
        part = self.by_bits[str(bits)]
        assert isinstance(part, WeightQuantizer)
        return part

    def parts(self, weight: Tensor) -> list[tuple[WeightQuantizer, Tensor]]:
        """Return the weights of each bitwidth with their quantizer."""
        return [(self.part(b), weight[c.to(weight.device)]) for b, c in self.channels.items()]

    @property
    def scale(self) -> Tensor:
        """The positive scales in use, ``(K, 1, ...)``."""
        pieces = {b: self.part(b).scale for b in self.channels}
        return self._together(pieces, self.bit_width)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of ``weight``, without gradient."""
        pieces = {q.bits: q.codes(part) for q, part in self.parts(weight)}
        return self._together(pieces, weight)

    def forward(self, weight: Tensor) -> Quantized:
        """Quantize ``weight`` ``(K, ...)``."""
        pieces: dict[int, Quantized] = {q.bits: q(part) for q, part in self.parts(weight)}
        values = self._together({b: q[0] for b, q in pieces.items()}, weight)
        scale = self._together({b: q[1] for b, q in pieces.items()}, weight)
        return values, scale, scale.new_zeros(()), self.bit_width

    def freeze_(self) -> None:
        """From now on take weights that are codes times scale, and give them these codes."""
        for bits in self.channels:
            self.part(bits).freeze_()


SettledQuantizer = WeightQuantizer | ChannelWeightQuantizer
"""What quantizes a weight once its bits are settled: it has ``codes``, ``scale``, ``parts`` and
``freeze_``, and its values are ``codes(weight) * scale``."""
