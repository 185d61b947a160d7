"""Arrays that take an operand bit by bit: time in proportion to its bitwidth, whatever it is.

A tile takes ``lanes`` input channels of ``windows`` positions, for ``filters`` output channels at a
time. The activations come in serially, so a step takes as many cycles as they have bits; if the
weights do too, it takes the product of both.

A layer without positions (a linear one) leaves all but one of the windows idle where only
activations are serial. Where both are, the windows take different outputs, and a step takes the
weights' bits times the 16 cycles in which the array takes in a set of activations: there only the
weights' bits count, as Loom's authors state.

Source: Judd et al., "Stripes", MICRO 2016; Sharify et al., "Loom", DAC 2018,
https://arxiv.org/abs/1706.07853. Compute only, without the memory system.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from hw.datasheet import check_counts, check_positive
from hw.sequential import Sequential, summed
from hw.target import LayerUse, TargetCost
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy

FULL_BITS = 16
"""Of the operands that are not serial."""


@dataclass(frozen=True)
class BitSerialArray(Sequential):
    """A bit-serial array.

    Args:
        filters: output channels at a time.
        windows: positions at a time.
        lanes: input channels at a time.
        clock_hz: clock frequency.
        serial_weights: whether weights are serial as well as activations.

    Raises:
        RequestError: a number cannot be an array's.
    """

    filters: int
    windows: int
    lanes: int
    clock_hz: float
    serial_weights: bool

    weight_bits = tuple(range(1, 9))
    act_bits = (*range(2, 9), 16)
    costs = ("cycles", "latency_s")

    def __post_init__(self) -> None:
        device = type(self).__name__
        check_counts(device, filters=self.filters, windows=self.windows, lanes=self.lanes)
        check_positive(device, clock_hz=self.clock_hz)

    def legal_weight_bits(self, spec: LayerSpec) -> tuple[int, ...]:
        """Return 1 to 8: all of them, in every layer."""
        return self.weight_bits

    def cycles(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
        """Return the cycles of one layer for one sample.

        ``ceil(K / filters) * ceil(P / windows) * k^2 * ceil(C / lanes)`` steps for ``P`` positions.
        """
        step = act_bits * (weight_bits if self.serial_weights else 1)
        if spec.kind == "float":  # only the number of its products is known
            return ceil(spec.macs / (self.filters * self.windows * self.lanes)) * step
        outs, ins = spec.weight_shape[:2]
        taps = prod(spec.weight_shape[2:])
        positions = spec.macs // spec.num_weights
        if spec.kind == "linear" and positions == 1 and self.serial_weights:
            sets = ceil(outs / (self.filters * self.windows)) * ceil(ins / self.lanes)
            return sets * weight_bits * FULL_BITS
        groups = max(spec.in_shape[0] // ins, 1) if spec.kind != "linear" else 1
        sets = ceil(outs // groups / self.filters) * ceil(ins / self.lanes) * groups
        return sets * taps * ceil(positions / self.windows) * step

    def use(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> LayerUse:
        """Return what one layer takes."""
        cycles = self.cycles(spec, weight_bits, act_bits)
        seconds = cycles / self.clock_hz
        return LayerUse(spec.name, {"cycles": cycles, "latency_s": seconds}, seconds, {})

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time one layer takes for one sample."""
        return self.cycles(spec, weight_bits, act_bits) / self.clock_hz

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network costs; channels of fewer bits wait for the widest."""
        uses = [
            self.use(spec, bits.weight_bits, bits.act_bits)
            for spec, bits in zip(layers, policy, strict=True)
        ]
        return summed(uses, self.costs, limits=self.limits)
