"""A dataflow accelerator on an FPGA, as FINN builds it: a pipeline with a unit for every layer.

All layers are on the chip at once and samples stream through them. Each unit is folded as FINN's
``SetFolding`` does: the least parallelism that keeps it within the interval between two samples
(:mod:`hw.dataflow_units`). Then what a layer takes follows from its own bits and shapes, and a
network's LUTs, memory blocks and multipliers are sums of tables.

Two times are stated, as FINN states them. The *interval* is the time between two samples: the
cycles of the slowest unit. The *latency* is the sum over all units, as if each waited for the one
before to finish a whole sample: an upper bound, for they overlap.

A layer is charged for what leads to it: the thresholds that make its input's codes out of the sums
of the layer before, pooling, additions and forks since then, padding, the window generator, and the
multiplications.

Source: Blott et al., "FINN-R", TRETS 2018, https://arxiv.org/abs/1809.04570; FINN+ 1.6.1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log, prod

from hw import dataflow_units as units
from hw.dataflow_units import Unit, Window
from hw.datasheet import check_counts, check_mapping, check_name, check_positive, check_widths
from hw.target import Choices, Demand, LayerUse, TargetCost, choices_of
from sdq.errors import RequestError
from sdq.layers import Between, LayerSpec
from sdq.policy import BitwidthPolicy

USABLE = {"lut": 0.7, "bram_18k": 0.8, "uram": 0.8, "dsp": 0.8}
"""Share of a resource above which a design hardly meets its timing, after AMD's UltraFast design
methodology (UG949); FINN has the same."""

COUNTED = ("lut", "bram_18k", "dsp")
"""What a capacity has to say, if only 0: every accelerator takes of these, or might."""

STEP = 1.1
"""Between the intervals that are tried where no rate is asked."""

FOLDED = 2**62
"""An interval that any unit keeps."""

DSP_SLICES = ("DSP48E1", "DSP48E2", "DSP58")


@dataclass(frozen=True)
class Setting:
    """How FINN is asked to build.

    Args:
        dsp_slice: for units that multiply in them, from 4 bits on; None: every multiplication is in
            LUTs.
        standalone_thresholds: thresholds are units of their own; else they are part of the unit
            that multiplies, which then is the HLS one.
        input_bits: of what enters the accelerator, before the first layer's thresholds.
        uram: whether the chip has UltraRAM.
        interval: cycles between two samples.
    """

    dsp_slice: str | None
    standalone_thresholds: bool
    input_bits: int
    uram: bool
    interval: int = FOLDED


@dataclass(frozen=True)
class DataflowFpga:
    """An FPGA with a FINN accelerator.

    Args:
        capacity: what the chip has: ``lut``, ``bram_18k`` and ``dsp``, and ``uram`` if it has any.
            With ``dsp`` 0 every multiplication is in LUTs.
        clock_hz: clock frequency of the accelerator.
        dsp_slice: one of DSP_SLICES: of the 7 series, of UltraScale+, of Versal.
        narrow_weights: whether no weight has its lowest code, without which FINN multiplies in no
            DSP48E1; the quantizers here use it.
        standalone_thresholds: see :class:`Setting`.
        input_bits: likewise.
        interval: likewise; set by :meth:`under`.
        network: the layers it is laid out for.
        demanded: limits beside the chip's own.

    Raises:
        RequestError: a number cannot be a chip's.
    """

    capacity: Mapping[str, int]
    clock_hz: float
    dsp_slice: str
    narrow_weights: bool = False
    standalone_thresholds: bool = True
    input_bits: int = 8
    interval: int = FOLDED
    network: tuple[LayerSpec, ...] = ()
    demanded: Mapping[str, float] = field(default_factory=dict)
    _places: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        device = type(self).__name__
        check_mapping(device, "capacity", self.capacity)
        for name, count in self.capacity.items():
            check_name(device, "a resource of capacity", name, tuple(USABLE))
            check_counts(device, 0, **{f"capacity of {name}": count})
        if left := [name for name in COUNTED if name not in self.capacity]:
            raise RequestError(
                f"{device}: capacity must have {', '.join(COUNTED)}, got no {left[0]}; "
                "say 0 if the chip has none"
            )
        check_positive(device, clock_hz=self.clock_hz)
        check_name(device, "dsp_slice", self.dsp_slice, DSP_SLICES)
        check_widths(device, input_bits=(self.input_bits,))
        places = {spec.name: i for i, spec in enumerate(self.network)}
        object.__setattr__(self, "_places", places)

    weight_bits = tuple(range(1, 9))
    act_bits = tuple(range(2, 9))

    @property
    def costs(self) -> tuple[str, ...]:
        """Resources of the chip, and the latency."""
        return (*self._resources, "latency_s")

    @property
    def _resources(self) -> tuple[str, ...]:
        """What units take of: slices and UltraRAM only where there are any."""
        spared = ("dsp", "uram")
        return tuple(name for name, n in self.capacity.items() if n or name not in spared)

    @property
    def limits(self) -> Mapping[str, float]:
        """The usable share of each resource, and what was demanded."""
        chip = {name: USABLE[name] * self.capacity[name] for name in self._resources}
        return {**chip, **self.demanded}

    @property
    def setting(self) -> Setting:
        """How FINN builds for it."""
        in_dsp = self.narrow_weights or self.dsp_slice != "DSP48E1"
        in_dsp = in_dsp and self.capacity["dsp"] > 0
        return Setting(
            self.dsp_slice if in_dsp else None, self.standalone_thresholds,
            self.input_bits, bool(self.capacity.get("uram")), self.interval,
        )  # fmt: skip

    def legal_weight_bits(self, spec: LayerSpec) -> tuple[int, ...]:
        """Return 1 to 8: all of them, in every layer."""
        return self.weight_bits

    def under(
        self, layers: Sequence[LayerSpec], demand: Demand, choices: Choices
    ) -> "DataflowFpga":
        """Return the target folded for a demand; see :meth:`hw.target.Target.under`.

        With nothing asked, a policy (one candidate a layer) is folded for the highest rate that
        fits the chip, in steps of 10 %; if none fits, for the lowest.
        """
        plain = replace(self, network=tuple(layers), interval=FOLDED, demanded={})
        plain._check(choices)
        if demand.fps is None and demand.latency_s is None:
            return plain._fastest_that_fits(choices)
        found, demanded = plain, {}
        if demand.fps is not None:
            found = replace(plain, interval=int(self.clock_hz / demand.fps))
            found._check_rate(choices, demand.fps)
        if demand.latency_s is not None:
            demanded = {"latency_s": demand.latency_s}
            found = found._within(demand.latency_s, choices)
        return replace(found, demanded=demanded)

    def _check(self, choices: Choices) -> None:
        for spec, (weights, acts) in zip(self.network, choices, strict=True):
            wide = max(max(weights), max(acts)) > 8 or spec.kind == "float"
            if wide or groups_of(spec) not in (1, *spec.in_shape[:1]):
                raise RequestError(
                    f"layer {spec.name}: must be dense or depthwise, with weights and activations "
                    f"of at most 8 bits, for a dataflow accelerator, got {spec.kind} of "
                    f"{groups_of(spec)} groups, {max(weights)}-bit weights and {max(acts)}-bit "
                    "activations; quantize it (without --skip, --first-last-bits at most 8), or "
                    "choose another target"
                )
            if spec.macs > _macs_of_a_call(spec):
                raise RequestError(
                    f"layer {spec.name}: must be called once, for a dataflow accelerator, got "
                    f"{spec.macs} multiply-accumulates, where one call has "
                    f"{_macs_of_a_call(spec)}; make a layer for each call, or choose another "
                    "target"
                )

    def _slowest(self, choices: Choices, worst: Callable[..., int]) -> dict[str, int]:
        """Return the cycles of each layer's slowest unit, the worst or best of its candidates."""
        return {
            spec.name: worst(
                max(unit.cycles for unit in self.units(spec, w, a))
                for w in weights for a in acts
            )
            for spec, (weights, acts) in zip(self.network, choices, strict=True)
        }  # fmt: skip

    def _check_rate(self, choices: Choices, fps: float) -> None:
        for name, cycles in self._slowest(choices, max).items():
            if cycles > self.interval:
                fastest = max(replace(self, interval=1)._slowest(choices, max).values())
                raise RequestError(
                    f"demand: {fps:.6g} fps must be within reach of every candidate, but {name} "
                    f"takes {cycles} cycles and may take {self.interval}; with these bits at most "
                    f"{self.clock_hz / fastest:.6g} fps can be reached: ask for less, or offer "
                    "fewer bits"
                )

    def _latency(self, choices: Choices) -> float:
        """Return the latency of the slowest candidates, in seconds."""
        return sum(
            max(self.latency_s(spec, w, a) for w in weights for a in acts)
            for spec, (weights, acts) in zip(self.network, choices, strict=True)
        )

    def _within(self, latency_s: float, choices: Choices) -> "DataflowFpga":
        """Return the target folded as far as the latency allows.

        The layers together have to meet it: each may take longer than the interval, where it has
        no more parallelism.
        """
        shortest = replace(self, interval=1)._latency(choices)
        if shortest > latency_s:
            raise RequestError(
                f"demand: {latency_s:.6g} s must be within reach of every candidate, but with "
                f"these bits no less than {shortest:.6g} s can be reached: ask for more time, or "
                "offer fewer bits"
            )
        least, most = 1, min(self.interval, max(self._slowest(choices, max).values()))
        if replace(self, interval=most)._latency(choices) <= latency_s:
            return replace(self, interval=most)
        while least < most:
            middle = (least + most + 1) // 2
            if replace(self, interval=middle)._latency(choices) <= latency_s:
                least = middle
            else:
                most = middle - 1
        return replace(self, interval=least)

    def _fastest_that_fits(self, choices: Choices) -> "DataflowFpga":
        if any(len(weights) * len(acts) > 1 for weights, acts in choices):
            raise RequestError(
                "demand: must be given, for a dataflow accelerator is built for a rate; pass "
                "--fps F or --latency-ms L"
            )

        least = max(replace(self, interval=1)._slowest(choices, max).values(), default=1)
        most = max(self._slowest(choices, max).values(), default=1)
        # whether it fits does not fall steadily with the interval: parallelism goes in divisors
        steps = int(log(most / least, STEP)) + 1
        for interval in (int(least * STEP**i) for i in range(steps)):
            found = replace(self, interval=interval)
            if found._total(choices).fits:
                return found
        return replace(self, interval=most)

    def _total(self, choices: Choices) -> TargetCost:
        bits = [(weights[0], acts[0]) for weights, acts in choices]
        return self._summed(
            [self.use(spec, w, a) for spec, (w, a) in zip(self.network, bits, strict=True)]
        )

    def units(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> tuple[Unit, ...]:
        """Return the units that a layer is charged for, in the stream's order."""
        at = self._places.get(spec.name, 0)
        before = self.network[at - 1] if at > 0 else None
        last = at == len(self.network) - 1
        return _units(self.setting, spec, before, last, weight_bits, act_bits)

    def use(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> LayerUse:
        """Return what one layer takes."""
        found = self.units(spec, weight_bits, act_bits)
        totals = {name: sum(getattr(unit, name) for unit in found) for name in self._resources}
        slowest = max(unit.cycles for unit in found)
        together = sum(unit.cycles for unit in found)
        main = found[-1]
        return LayerUse(
            spec.name,
            {"cycles": slowest, **totals, "latency_s": together / self.clock_hz},
            slowest / self.clock_hz,
            {"unit": f"{main.kind} {main.style}", "pe": main.pe, "simd": main.simd},
        )

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time a sample spends in a layer's units, one after another."""
        cycles = sum(unit.cycles for unit in self.units(spec, weight_bits, act_bits))
        return cycles / self.clock_hz

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network takes, folded as :meth:`under` said."""
        placed = replace(self, network=tuple(layers))
        placed._check(choices_of(policy))
        return placed._total(choices_of(policy))

    def _summed(self, layers: list[LayerUse]) -> TargetCost:
        totals = {name: sum(layer.costs[name] for layer in layers) for name in self.costs}
        interval = max((layer.costs["cycles"] for layer in layers), default=0)
        totals |= {"interval_cycles": interval}
        totals |= {"fps": self.clock_hz / interval} if interval else {}
        held = {name: n for name, n in self.capacity.items() if n}
        return TargetCost(tuple(layers), totals, held, self.limits)


def groups_of(spec: LayerSpec) -> int:
    """Return the groups of a convolution; 1 for other layers."""
    if not spec.kind.startswith("conv"):
        return 1
    return max(spec.in_shape[0] // spec.weight_shape[1], 1)


def _macs_of_a_call(spec: LayerSpec) -> int:
    """Return the multiply-accumulates of a layer that is called once."""
    if spec.kind.startswith("conv_transpose"):
        rows = spec.weight_shape[0] // groups_of(spec)
        return prod(spec.in_shape) * rows * prod(spec.weight_shape[2:])
    return prod(spec.out_shape) * prod(spec.weight_shape[1:])


@lru_cache(maxsize=200_000)
def _units(
    setting: Setting, spec: LayerSpec, before: LayerSpec | None, last: bool, weight_bits: int,
    act_bits: int,
) -> tuple[Unit, ...]:  # fmt: skip
    """Return the units of a layer, see :meth:`DataflowFpga.units`."""
    interval = setting.interval
    found = list(_input_codes(setting, spec, before, act_bits))
    for operation in spec.before:
        found += _between(operation, act_bits, interval)
        if operation.kind in _JOINED_BITS:
            width = _JOINED_BITS[operation.kind](act_bits, operation)
            channels, places = _map(operation.out_shape)
            found.append(units.thresholds(channels, places, width, act_bits, interval,
                                          uram=setting.uram))  # fmt: skip
    slices = setting.dsp_slice if min(weight_bits, act_bits) >= 4 else None
    if not (setting.standalone_thresholds or last):
        slices = None
    vectors = spec.macs // spec.num_weights
    if not spec.kind.startswith("conv"):
        rows, columns = spec.weight_shape
        matrix = units.matrix(
            rows, columns, vectors, weight_bits, act_bits, interval, dsp_slice=slices
        )
        return (*found, matrix)
    view, padded = _view(spec)
    if padded:
        found.append(units.streaming("padding", view.channels, prod(view.side), interval))
    if groups_of(spec) > 1:
        return (*found, *units.depthwise(view, weight_bits, act_bits, interval))
    if view.kernel != (1, 1) or view.stride != (1, 1):
        found.append(units.window(view, act_bits, interval))
    matrix = units.matrix(
        spec.weight_shape[0],
        _products(spec),
        prod(view.out),
        weight_bits,
        act_bits,
        interval,
        dsp_slice=slices,
    )
    return (*found, matrix)


_JOINED_BITS: dict[str, Callable[[int, Between], int]] = {
    "add": lambda bits, _: bits + 1,
    "multiply": lambda bits, _: 2 * bits,
    "global_pool": lambda bits, _: 32,  # FINN divides in float before it quantizes anew
    "avg_pool": lambda bits, pool: bits + (prod(pool.kernel) - 1).bit_length(),
}
"""Widths of what comes out of operations after which codes have to be made anew."""


def _input_codes(
    setting: Setting, spec: LayerSpec, before: LayerSpec | None, act_bits: int
) -> Iterator[Unit]:
    """Yield the thresholds that make a layer's codes out of the sums of the layer before."""
    if before is None:  # a flattened image has thresholds for its channels, not for its pixels
        channels, places = _map(spec.before[0].in_shape if spec.before else spec.in_shape)
        yield units.thresholds(
            channels, places, setting.input_bits + 1, act_bits, setting.interval, uram=setting.uram
        )
        return
    channels, places = _map(before.out_shape)
    products = _products(before)
    # the weights of that layer are another layer's choice: taken as of 4 bits
    width = units.border_bits(products, 4, act_bits)
    if setting.standalone_thresholds:
        yield units.thresholds(
            channels, places, width, act_bits, setting.interval, uram=setting.uram
        )
    elif groups_of(before) > 1:  # FINN counts them there, and not in matrix-vector units
        pe = units.least(
            units.divisors(channels),
            lambda pe: channels * products // pe * places,
            setting.interval,
        )
        lut = units.unit_thresholds(width, pe, channels, act_bits)
        yield Unit("thresholds", 0, lut, pe=pe)


def _map(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the channels and places of ``(C, H, W)``, ``(C, L)``, ``(C,)``."""
    return shape[0], prod(shape[1:])


def _products(spec: LayerSpec) -> int:
    """Return the products that one output is the sum of."""
    if not spec.kind.startswith("conv"):
        return spec.weight_shape[1]
    return spec.weight_shape[1] * prod(_view(spec)[0].kernel)


def _two(values: tuple[int, ...], missing: int) -> tuple[int, int]:
    return (values[0], values[1]) if len(values) == 2 else (values[0], missing)


def _view(spec: LayerSpec) -> tuple[Window, bool]:
    """Return what slides over a convolution's input, and whether it is padded."""
    kernel = spec.weight_shape[2:]
    ones = (1,) * len(kernel)
    stride, dilation = spec.stride or ones, spec.dilation or ones
    sides, outs = spec.in_shape[1:], spec.out_shape[1:]
    if spec.kind.startswith("conv_transpose"):  # a convolution over the input with zeros between
        stride = ones
        padded = tuple(o + d * (k - 1) for o, k, d in zip(outs, kernel, dilation, strict=True))
    else:
        padding = spec.padding or (0,) * len(kernel)
        padded = tuple(side + pad for side, pad in zip(sides, padding, strict=True))
        # of a map's only row or column, the other taps meet nothing but padding: they are left out
        lone = tuple(side == out == 1 for side, out in zip(sides, outs, strict=True))
        kernel, stride, dilation, padded = (
            tuple(1 if only else x for only, x in zip(lone, values, strict=True))
            for values in (kernel, stride, dilation, padded)
        )
    view = Window(
        _two(padded, 1), _two(outs, 1), _two(kernel, 1), _two(stride, 1), _two(dilation, 1),
        spec.in_shape[0],
    )  # fmt: skip
    return view, padded != sides


def _between(operation: Between, act_bits: int, interval: int) -> list[Unit]:
    """Return the units of an operation without weights."""
    channels, places = _map(operation.in_shape)
    kind = operation.kind
    if kind == "flatten":  # a stream has no shape
        return []
    if kind == "global_pool":
        return [units.streaming("global pool", channels, places, interval, passes=1)]
    if kind.endswith("pool"):
        sides = tuple(
            side + pad for side, pad in zip(operation.in_shape[1:], operation.padding, strict=True)
        )
        view = Window(
            _two(sides, 1), _two(operation.out_shape[1:], 1), _two(operation.kernel, 1),
            _two(operation.stride, 1), (1, 1), channels,
        )  # fmt: skip
        padding = []
        if sides != operation.in_shape[1:]:
            padding = [units.streaming("padding", channels, prod(sides), interval)]
        return [*padding, *units.pool(view, act_bits, interval)]
    total, places = _map(operation.out_shape)
    if kind == "concat":
        parts = (channels, total - channels) if total > channels else (channels,)
        return [units.concat(parts, places, interval)]
    if kind == "upsample":  # FINN does not fold it
        return [Unit("upsample", total * places)]
    return [units.streaming(kind, total, places, interval)]
