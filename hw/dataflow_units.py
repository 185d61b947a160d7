"""The units of a FINN dataflow accelerator: how each is folded, its cycles and its resources.

A unit takes ``simd`` values of a sample's stream at a time and computes ``pe`` results in parallel.
Each is folded by itself: the least parallelism, among the divisors of its channels, that needs no
more than ``interval`` cycles a sample. Numbers are FINN's own estimates; where a FINN estimate
is 0 (adders, forks, pooling, padding), so is ours.

Source: Blott et al., "FINN-R", TRETS 2018, https://arxiv.org/abs/1809.04570, sections 4 and 5;
FINN+ 1.6.1, ``finn/custom_op/fpgadataflow`` and ``transformation/fpgadataflow/set_folding.py``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil, gcd, log2, prod

from hw.memories import bram_18k, least_waste

WEIGHT_WIDTH = 36
"""Bits of weights a processing element may read each cycle (FINN's ``mvau_wwidth_max``)."""
STREAM_WIDTH = 8191
"""Widest word of HLS."""
ACC_SLACK = 2
"""Bits by which accumulators are narrower than the bound from types alone: real weights are mostly
small. FINN computes the width from the weights' values, which are not known here."""


@dataclass(frozen=True)
class Window:
    """A window sliding over a map of ``channels``.

    Args:
        side: rows and columns of the map, padding included.
        out: rows and columns of what it gives.
        kernel: of the window.
        stride: of the window.
        dilation: of the window.
        channels: of the map.
    """

    side: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    channels: int


@dataclass(frozen=True)
class Unit:
    """One unit of the pipeline and what it takes.

    Args:
        kind: ``matrix``, ``depthwise``, ``window``, ``padding``, ``thresholds``, ``pool``, ...
        cycles: between two samples.
        lut: look-up tables.
        bram_18k: memory blocks of 18 kilobits.
        dsp: multiplier slices.
        uram: memory blocks of 288 kilobits.
        pe: results in parallel.
        simd: inputs in parallel.
        style: ``hls`` or ``rtl``.
    """

    kind: str
    cycles: int
    lut: int = 0
    bram_18k: int = 0
    dsp: int = 0
    uram: int = 0
    pe: int = 1
    simd: int = 1
    style: str = "hls"


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number, ascending."""
    return tuple(i for i in range(1, number + 1) if number % i == 0)


def least(candidates: Iterable[int], cycles: Callable[[int], int], interval: int) -> int:
    """Return the first candidate that is fast enough, the last if none is."""
    found = 1
    for found in candidates:
        if cycles(found) <= interval:
            break
    return found


def accumulator_bits(products: int, weight_bits: int, act_bits: int) -> int:
    """Return the width of a sum of ``products`` unsigned activations times signed weights.

    Source: Colbert et al., "A2Q", ICCV 2023, https://arxiv.org/abs/2301.13376, equation 5, less
    :data:`ACC_SLACK`.
    """
    alpha = log2(products) + weight_bits + act_bits - 1
    return max(ceil(alpha + log2(1 + 2**-alpha) + 1) - ACC_SLACK, 2)


def border_bits(products: int, weight_bits: int, act_bits: int) -> int:
    """Return the width of the borders between codes of such sums.

    FINN keeps the bits that the largest border needs. Sums of many products rarely come near what
    they could be: they grow with the square root of their number.
    """
    return max(accumulator_bits(products, weight_bits, act_bits) - int(log2(products) / 2), 2)


def _multiply_luts(simd: int, products_bits: int, acc_bits: int) -> int:
    """Return the LUTs of a processing element: multipliers, adder tree and accumulator."""
    multipliers = simd * (2 * ceil(products_bits / 6) - 1) * products_bits
    return multipliers + products_bits * (2 * simd - 1) + acc_bits


def matrix(
    rows: int, columns: int, vectors: int, weight_bits: int, act_bits: int, interval: int,
    *, dsp_slice: str | None,
) -> Unit:  # fmt: skip
    """Return a matrix-vector unit: ``rows x columns`` weights, for each of ``vectors``.

    First ``simd`` grows, while the weights of one processing element stay within
    :data:`WEIGHT_WIDTH`, then ``pe``.

    Args:
        rows: output channels.
        columns: products of one output.
        vectors: positions of a sample.
        weight_bits: of the weights.
        act_bits: of the input.
        interval: cycles it may take.
        dsp_slice: multiplies in slices of this kind (the RTL unit); None: in LUTs (the HLS unit).
    """

    def cycles(pe: int, simd: int) -> int:
        return rows // pe * (columns // simd) * vectors

    simd = 1
    for wider in divisors(columns):
        if cycles(1, wider) > interval and weight_bits * wider > WEIGHT_WIDTH:
            break
        simd = wider
        if cycles(1, simd) <= interval:
            break
    widths = divisors(rows)
    if dsp_slice is None:
        widths = tuple(pe for pe in widths if pe == 1 or pe * simd * weight_bits <= STREAM_WIDTH)
    pe = least(widths, lambda pe: cycles(pe, simd), interval)
    memory = bram_18k(pe * simd * weight_bits, rows * columns // (pe * simd))
    if dsp_slice is not None:
        dsp = pe * ceil(simd / 3) if dsp_slice == "DSP58" else ceil(pe / 4) * simd
        return Unit("matrix", cycles(pe, simd), 0, memory, dsp, 0, pe, simd, "rtl")
    acc = accumulator_bits(columns, weight_bits, act_bits)
    lut = int(300 + 1.1 * pe * _multiply_luts(simd, weight_bits + act_bits, acc))
    return Unit("matrix", cycles(pe, simd), lut, memory, 0, 0, pe, simd, "hls")


def depthwise(view: Window, weight_bits: int, act_bits: int, interval: int) -> list[Unit]:
    """Return a vector-vector unit, which multiplies each channel by its own window, and its window.

    ``pe`` grows first, then ``simd`` within the window. Single pixels need no window.

    Args:
        view: of the convolution.
        weight_bits: of the weights.
        act_bits: of the input.
        interval: cycles it may take.
    """
    channels, taps, places = view.channels, prod(view.kernel), prod(view.out)

    def cycles(pe: int, simd: int) -> int:
        return channels * taps // (pe * simd) * places

    pe = least(divisors(channels), lambda pe: cycles(pe, 1), interval)
    simd = 1
    if cycles(pe, 1) > interval:
        simd = least(divisors(taps), lambda simd: cycles(pe, simd), interval)
    sliding = []
    if (view.kernel, view.stride) != ((1, 1), (1, 1)):
        parallel = simd > 1
        sliding = [window(view, act_bits, interval, at_least=pe, each_channel=True,
                          parallel=parallel)]  # fmt: skip
        pe = max(pe, sliding[0].simd)
    words = channels * taps // (pe * simd)
    memory = 0 if words <= 128 else bram_18k(pe * simd * weight_bits, words, streamed=False)
    acc = accumulator_bits(taps, weight_bits, act_bits)
    inner = _multiply_luts(simd, weight_bits + act_bits, acc)
    lut = int(300 + 1.1 * pe * inner)
    unit = Unit("depthwise", cycles(pe, simd), lut, memory, 0, 0, pe, simd, "hls")
    return [*sliding, unit]


def unit_thresholds(acc_bits: int, pe: int, channels: int, out_bits: int) -> int:
    """Return the LUTs of thresholds within a vector-vector unit: their memory and comparators."""
    return int(1.1 * pe * (2**out_bits - 1) * acc_bits * (1 + channels / pe / 64))


def window(
    view: Window, act_bits: int, interval: int, *, at_least: int = 1, each_channel: bool = False,
    parallel: bool = False,
) -> Unit:  # fmt: skip
    """Return a sliding window generator: a buffer of some rows, read window by window.

    Args:
        view: what slides.
        act_bits: of the map.
        interval: cycles it may take.
        at_least: its ``simd``: that of the unit it feeds, if that goes channel by channel.
        each_channel: whether a window is given for each channel by itself.
        parallel: whether all of a window is given at once.
    """
    widths = [simd for simd in divisors(view.channels) if simd >= at_least]
    parallel = parallel or view.kernel == (1, 1)
    simd = least(widths, lambda s: _window_cycles(view, s, each_channel, parallel), interval)
    cycles = _window_cycles(view, simd, each_channel, parallel)
    if cycles > interval and not each_channel:
        parallel, cycles = True, _window_cycles(view, simd, each_channel, True)
    lut = 300 + simd * act_bits * ceil(_buffer_depth(view, simd, parallel) / 38)
    return Unit("window", cycles, lut, simd=simd, style="rtl")


def _window_cycles(view: Window, simd: int, each_channel: bool, parallel: bool) -> int:
    (height, width), (rows, columns), folds = view.side, view.out, view.channels // simd
    (down, across), (step_down, step) = view.kernel, view.stride
    if parallel:
        return height * width * folds + 2
    write = columns * down * across * folds
    if height == 1 or width == 1:
        return _line_cycles(view, folds, each_channel)
    most = max(write, step * width * folds)
    if each_channel:
        most += columns * (step - 1) * (folds - 1)
    cycles = _first_window(view) * folds + rows * most
    return cycles + ((step_down - 1) * width * folds if each_channel else 0)


def _line_cycles(view: Window, folds: int, each_channel: bool) -> int:
    """Return the cycles over a map of one row or column."""
    length, places, taps, step = (prod(x) for x in (view.side, view.out, view.kernel, view.stride))
    if not each_channel:
        return places * taps * folds + 2
    written = places * taps * folds + (folds - 1) * taps
    read = length * folds + folds * (taps - 1) * (step - 1)
    return max(written, read) + 2


def _first_window(view: Window) -> int:
    """Return how many pixels come in before the first window is complete."""
    (down, across), (apart_down, apart) = view.kernel, view.dilation
    return (down - 1) * apart_down * view.side[1] + (across - 1) * apart + 1


def _buffer_depth(view: Window, simd: int, parallel: bool) -> int:
    folds = view.channels // simd
    if parallel:
        return (_first_window(view) - 1) * folds + 2
    taps = prod(view.kernel)
    ahead = max(0, view.stride[1] - 1 - taps)
    ahead += max(0, (view.stride[0] - 1) * view.side[1] - taps)
    return (_first_window(view) + ahead) * folds


def thresholds(
    channels: int, places: int, in_bits: int, out_bits: int, interval: int, *, uram: bool = True
) -> Unit:
    """Return a threshold unit: ``2^out_bits - 1`` borders for each channel, searched in a tree.

    Args:
        channels: with borders of their own.
        places: of a sample.
        in_bits: width of a border.
        out_bits: of the code it gives.
        interval: cycles it may take.
        uram: whether the chip has UltraRAM.
    """
    pe = least(divisors(channels), lambda pe: channels // pe * places, interval)
    taken = {"lut": 0, "bram_18k": 0, "uram": 0}
    for level in range(out_bits):
        kind, pieces = least_waste(in_bits, channels // pe * 2**level, uram=uram)
        taken[kind] += pe * pieces
    return Unit("thresholds", channels // pe * places, **taken, pe=pe, style="rtl")


def pool(view: Window, act_bits: int, interval: int) -> list[Unit]:
    """Return a pooling over windows: the window generator and the unit that reduces."""
    taps, places = prod(view.kernel), prod(view.out)

    def cycles(pe: int) -> int:
        return view.channels * taps // pe * places

    pe = least(divisors(view.channels), cycles, interval)
    sliding = window(view, act_bits, interval, at_least=pe, each_channel=True)
    pe = max(pe, sliding.simd)
    return [sliding, Unit("pool", cycles(pe), pe=pe)]


def streaming(kind: str, channels: int, places: int, interval: int, passes: int = 0) -> Unit:
    """Return a unit that passes a map through channel by channel: an adder, a fork, padding.

    Args:
        kind: what it is called.
        channels: of the map.
        places: it passes.
        interval: cycles it may take.
        passes: further passes over the channels.
    """
    pe = least(divisors(channels), lambda pe: channels // pe * (places + passes), interval)
    return Unit(kind, channels // pe * (places + passes), pe=pe)


def concat(parts: tuple[int, ...], places: int, interval: int) -> Unit:
    """Return a unit that joins maps of these channels, folded by a divisor they all have."""
    total = sum(parts)
    pe = least(divisors(gcd(*parts)), lambda pe: total // pe * places + 1, interval)
    return Unit("concat", total // pe * places, pe=pe)
