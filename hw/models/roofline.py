"""A processor that computes with a few widths: a layer takes its products, or its bytes.

``time = max(MACs / peak, bytes / bandwidth)``, with the peak of the narrowest width that holds both
operands, and the bytes of weights, input and output as they are stored. Fewer bits than the width
gain nothing in the products; in the bytes only where weights are stored packed. Everything is
read from and written to main memory once; caches, launches and the layers between are not counted,
so that this is the least that a layer can take.

Source: Williams et al., "Roofline", CACM 2009, https://doi.org/10.1145/1498765.1498785.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from hw.datasheet import check_amount, check_mapping, check_positive, check_widths
from hw.sequential import Sequential, summed
from hw.target import LayerUse, TargetCost
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import FLOAT_BITS, BitwidthPolicy

HALF_BITS = 16


@dataclass(frozen=True)
class Roofline(Sequential):
    """A processor.

    Args:
        peaks: multiply-accumulates a second, by the width of the operands in bits.
        bandwidth: bytes a second of main memory (or of what holds the weights).
        memory: what the weights are stored in, with its bytes: ``flash_bytes`` or ``memory_bytes``.
        stored_bits: widths that weights and activations can be stored in.
        only_linear: of these, those that only weights of linear layers have; their products are
            computed with 16 bits.
        act_bits: bitwidths of activations that it computes with.

    Raises:
        RequestError: a number cannot be a processor's, or it has nothing for what stays in float.
    """

    peaks: Mapping[int, float]
    bandwidth: float
    memory: tuple[str, float]
    stored_bits: tuple[int, ...]
    only_linear: tuple[int, ...] = ()
    act_bits: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        device = type(self).__name__
        check_mapping(device, "peaks", self.peaks)
        check_widths(
            device, peaks=self.peaks, stored_bits=self.stored_bits, only_linear=self.only_linear,
            act_bits=self.act_bits,
        )  # fmt: skip
        peaks = {f"peak at {bits} bits": peak for bits, peak in self.peaks.items()}
        check_positive(device, bandwidth=self.bandwidth, **peaks)
        check_amount(device, "memory", self.memory)
        for name, widths in (("peaks", self.peaks), ("stored_bits", self.stored_bits)):
            if FLOAT_BITS not in widths or FLOAT_BITS in self.only_linear:
                raise RequestError(
                    f"{device}: {name} must have {FLOAT_BITS} bits, for what stays in float, got "
                    f"{', '.join(map(str, widths))}; add them"
                )

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Bitwidths of weights it has, up to 8."""
        return tuple(bits for bits in self.stored_bits if bits <= 8)

    @property
    def costs(self) -> tuple[str, ...]:
        """Time, and what the weights take of the memory."""
        return ("latency_s", self.memory[0])

    @property
    def limits(self) -> Mapping[str, float]:
        """The memory, and what was demanded."""
        return {self.memory[0]: self.memory[1], **super().limits}

    def legal_weight_bits(self, spec: LayerSpec) -> tuple[int, ...]:
        """Return the widths that this kind of layer has."""
        return tuple(bits for bits in self.weight_bits if self._has(spec, bits))

    def _has(self, spec: LayerSpec, bits: int) -> bool:
        return spec.kind == "linear" or bits not in self.only_linear

    def stored(self, spec: LayerSpec, weight_bits: int) -> int:
        """Return the bits that one weight is stored in: the next width there is."""
        return min(b for b in self.stored_bits if b >= weight_bits and self._has(spec, b))

    def computed(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
        """Return the width that a layer's products are computed with."""
        least = max(self.stored(spec, weight_bits), act_bits)
        if self.stored(spec, weight_bits) in self.only_linear:
            least = max(least, HALF_BITS)
        return min(width for width in self.peaks if width >= min(least, FLOAT_BITS))

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time one layer takes for one sample."""
        return max(self._times(spec, weight_bits, act_bits))

    def _times(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> tuple[float, float]:
        """Return the time of the products and that of the memory."""
        width = self.computed(spec, weight_bits, act_bits)
        elements = prod(spec.in_shape) + prod(spec.out_shape)
        moved = spec.num_weights * self.stored(spec, weight_bits) + elements * self._act(act_bits)
        return spec.macs / self.peaks[width], moved / 8 / self.bandwidth

    def _act(self, act_bits: int) -> int:
        """Return the bits that an activation is stored in."""
        widths = (bits for bits in self.stored_bits if bits not in self.only_linear)
        return min(width for width in widths if width >= act_bits)

    def use(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> LayerUse:
        """Return what one layer takes."""
        compute, memory = self._times(spec, weight_bits, act_bits)
        seconds = max(compute, memory)
        stored = self.stored(spec, weight_bits)
        width = self.computed(spec, weight_bits, act_bits)
        costs = {"latency_s": seconds, self.memory[0]: spec.num_weights * stored / 8}
        bound = "compute" if compute >= memory else "memory"
        layout: dict[str, int | str] = {"stored bits": stored, "width": width, "bound": bound}
        return LayerUse(spec.name, costs, seconds, layout)

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network costs; channels of fewer bits are stored as the widest."""
        uses = [
            self.use(spec, bits.weight_bits, bits.act_bits)
            for spec, bits in zip(layers, policy, strict=True)
        ]
        name, size = self.memory
        return summed(uses, self.costs, capacity={name: size}, limits=self.limits)
