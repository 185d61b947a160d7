"""The figure of a policy, and what all figures share.

Only :mod:`sdq.plots` imports this file, when something is to be drawn: matplotlib takes a second.
Figures are made without pyplot, which would choose a window system and keep every figure.
Colours are Okabe and Ito's, or cividis: told apart by the colour-blind, and in grey.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits
from sdq.trajectory import mean_weight_bits

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#BBBBBB", "#222222"
MOST_NUMBERS = 65
"""Layers up to which the bars are wide enough for a number each."""


def bits_figure(policy: BitwidthPolicy) -> Figure:
    """Draw the bits of each layer, and its number of weights below."""
    layers = list(policy)
    figure, (top, below) = by_layer([b.name for b in layers], (3.2, 1.4))
    at = range(len(layers))
    quantized = [b for b in layers if b.weight_bits != FLOAT_BITS]
    highest = max((x for b in quantized for x in _widths(b)), default=1) + 1
    shown = [min(mean_weight_bits(b), highest) for b in layers]
    for searched, label in ((True, "weights, searched"), (False, "weights, pinned")):
        chosen = [i for i in at if layers[i].searched is searched]
        if chosen:
            top.bar(
                chosen, [shown[i] for i in chosen], label=label, edgecolor="white",
                color=BLUE if searched else GREY, hatch=None if searched else "///",
            )  # fmt: skip
    for i, layer in enumerate(layers):
        # at the foot of the bar, where no other mark comes
        text = "float" if layer.weight_bits == FLOAT_BITS else f"{shown[i]:.3g}"
        colour = "white" if layer.searched else BLACK
        box = {"pad": 0.6, "lw": 0, "fc": BLUE if layer.searched else GREY}
        if len(layers) <= MOST_NUMBERS:
            top.annotate(text, (i, 0), (0, 4), textcoords="offset points", ha="center",
                         color=colour, bbox=box)  # fmt: skip
        if layer.channel_bits is not None:
            least, most = min(layer.channel_bits), max(layer.channel_bits)
            top.vlines(i, least, most, color=BLACK, lw=1, label="channels, least to most")
    acts = [b.act_bits if b.act_bits != FLOAT_BITS else None for b in layers]
    if any(a not in (None, b.weight_bits) for a, b in zip(acts, layers, strict=True)):
        points = [(i, a) for i, a in enumerate(acts) if a is not None]
        top.plot(*zip(*points, strict=True), "D", color=ORANGE, mec=BLACK, mew=0.6, ms=5,
                 label="activations (input)")  # fmt: skip
    if any(b.searched for b in layers):
        mean = policy.avg_weight_bits
        top.axhline(mean, color=BLACK, ls="--", lw=1, label=f"mean of searched weights: {mean:.3f}")
    top.set_ylim(0, max([highest, *(a for a in acts if a is not None)]) + 0.6)
    top.set_ylabel("bits")
    top.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = top.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # the channels of many layers have one label
    top.legend(once.values(), once.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    figure.suptitle("Bits of each layer, first to last", x=0.01, ha="left")
    below.bar(at, [b.num_weights for b in layers], color=GREY, edgecolor="white")
    below.set_yscale("log")
    below.set_ylabel("number of weights")
    return figure


def _widths(layer: LayerBits) -> tuple[int, ...]:
    return layer.channel_bits or (layer.weight_bits,)


def by_layer(names: Sequence[str], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels above each other, with a place for each layer along x."""
    longest = max(len(name) for name in names)
    # of a very deep network every other name must do
    every = -(-len(names) // 120)
    width = min(max(0.34 * len(names) + 1.5, 7.0), 24.0)
    figure = Figure(figsize=(width, sum(heights) + 1.1 + 0.07 * longest), layout="constrained")
    panels = figure.subplots(
        len(heights), 1, sharex=True, height_ratios=list(heights), squeeze=False
    )
    last = panels[-1, 0]
    last.set_xticks(range(0, len(names), every), names[::every], rotation=90)
    last.set_xlim(-0.7, len(names) - 0.3)
    last.set_xlabel("layer")
    return figure, list(panels[:, 0])
