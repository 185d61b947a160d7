"""A systolic array whose units fuse for wider operands, after Bit Fusion.

Each unit multiplies 8 by 8 bits in one cycle, or splits into up to 16 multipliers of 2 by 2 bits.
Operands are widened to a power of two of at least 2 bits, so 3 bits cost as much as 4, and 1 as
much as 2; wider than 8 bits takes several passes.

Energy is that of the products at their fused widths, and of fetching the weights once from DRAM
(:mod:`hw.energy`); buffers are not counted.

Source: Sharma et al., "Bit Fusion", ISCA 2018, https://arxiv.org/abs/1712.01507: the cycle count
of their published simulator, compute only, without the memory system.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from hw.datasheet import check_counts, check_positive, check_widths
from hw.energy import mac_joules, weight_fetch_joules
from hw.sequential import Sequential, summed
from hw.target import LayerUse, TargetCost
from sdq.layers import LayerSpec
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits


@dataclass(frozen=True)
class FusibleArray(Sequential):
    """A systolic array.

    Args:
        rows: units along the input channels (N).
        columns: units along the output channels (M).
        clock_hz: clock frequency.
        weight_bits: bitwidths of weights that it takes; others are computed as the next wider.
        act_bits: likewise of activations.

    Raises:
        RequestError: a number cannot be an array's.
    """

    rows: int
    columns: int
    clock_hz: float
    weight_bits: tuple[int, ...] = tuple(range(1, 9))
    act_bits: tuple[int, ...] = (*range(2, 9), 16)

    costs = ("cycles", "latency_s", "energy_j")

    def __post_init__(self) -> None:
        device = type(self).__name__
        check_counts(device, rows=self.rows, columns=self.columns)
        check_positive(device, clock_hz=self.clock_hz)
        check_widths(device, weight_bits=self.weight_bits, act_bits=self.act_bits)

    def legal_weight_bits(self, spec: LayerSpec) -> tuple[int, ...]:
        """Return all that it takes; every layer is computed alike."""
        return self.weight_bits

    def cycles(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
        """Return the cycles of one layer for one sample.

        ``ceil(K / M) * OH * OW * k^2 * ceil(C / (N * factor))`` for each group of channels, with
        ``factor = 8 / bits(w) * 8 / bits(a)``.
        """
        return self._cycles(spec, (weight_bits,) * spec.weight_shape[0], act_bits)

    def _cycles(self, spec: LayerSpec, channel_bits: Sequence[int], act_bits: int) -> int:
        """Return the cycles of one layer whose output channels have these weight bits.

        The array is set to one width at a time, so the channels of each fused width are passes of
        their own, with a ceiling of their own. Few channels of a width take as long as a full set
        of columns: a layer's time is no sum over its channels. Of what is kept whole in float only
        the number of products is known: they fill the array.
        """
        if spec.kind == "float":
            passes_each = (_fused(FLOAT_BITS) // 8) ** 2
            return ceil(spec.macs * passes_each / (self.rows * self.columns))
        out_channels, in_channels = spec.weight_shape[:2]
        window = prod(spec.weight_shape[2:])
        # MACs = K * C/g * k^2 * positions * calls, so this counts every call of a shared layer
        positions = spec.macs // (out_channels * in_channels * window)
        groups = max(spec.in_shape[0] // in_channels, 1) if spec.kind != "linear" else 1
        share, passes = out_channels // groups, 0
        for first in range(0, share * groups, share):
            for width, count in Counter(map(_fused, channel_bits[first : first + share])).items():
                factor = (8 / width) * (8 / _fused(act_bits))
                passes += ceil(count / self.columns) * ceil(in_channels / (self.rows * factor))
        return passes * positions * window

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time one layer takes for one sample."""
        return self.cycles(spec, weight_bits, act_bits) / self.clock_hz

    def use(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> LayerUse:
        """Return what one layer takes."""
        bits = LayerBits(spec.name, weight_bits, act_bits, False, spec.num_weights)
        return self._use(spec, bits)

    def _use(self, spec: LayerSpec, bits: LayerBits) -> LayerUse:
        if bits.channel_bits is None:
            cycles = self.cycles(spec, bits.weight_bits, bits.act_bits)
        else:
            cycles = self._cycles(spec, bits.channel_bits, bits.act_bits)
        channels = bits.channel_bits or (bits.weight_bits,)
        products = sum(mac_joules(_fused(w), _fused(bits.act_bits)) for w in channels)
        energy = spec.macs * products / len(channels)
        energy += weight_fetch_joules(bits.total_weight_bits)
        seconds = cycles / self.clock_hz
        costs = {"cycles": cycles, "latency_s": seconds, "energy_j": energy}
        return LayerUse(spec.name, costs, seconds, {})

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return the cycles and energy of every layer and the latency of one sample."""
        uses = [self._use(spec, bits) for spec, bits in zip(layers, policy, strict=True)]
        total = summed(uses, self.costs, limits=self.limits)
        # one rounding, of whole cycles
        seconds = total.totals["cycles"] / self.clock_hz
        return replace(total, totals={**total.totals, "latency_s": seconds})


def _fused(bits: int) -> int:
    return max(2, 2 ** (bits - 1).bit_length())
