"""Figures of a run's bits: the course of the search, and the bits of each layer.

Only :mod:`sdq.plots` imports this file, when something is to be drawn: matplotlib takes a second.
Figures are made without pyplot, which would choose a window system and keep every figure.
Colours are Okabe and Ito's, or cividis: told apart by the colour-blind, and in grey.
"""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits
from sdq.trajectory import Line, Trajectory, mean_weight_bits

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#BBBBBB", "#222222"
Colour = tuple[float, float, float, float]
STYLES = ("-", "--", ":", "-.")
LABEL_INCHES = 0.15
"""Height of a line of text of 8 points, and a gap."""

MOST_NUMBERS = 65
"""Layers up to which the bars are wide enough for a number each."""


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ascending heights at least ``gap`` apart, as near to the wanted ones as can be.

    Args:
        wanted: heights, ascending.
        gap: between neighbours.
        low: least height.
        high: greatest height; exceeded if there is no room.

    >>> spread([1.0, 1.0, 1.0, 3.0], 0.5, 0.0, 4.0)
    [0.5, 1.0, 1.5, 3.0]
    """
    # least squares under order: neighbours out of order share their mean
    blocks: list[tuple[float, int]] = []
    for i, height in enumerate(wanted):
        mean, size = height - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (other * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    top = max(high - (len(flat) - 1) * gap, low)
    return [min(max(mean, low), top) + i * gap for i, mean in enumerate(flat)]


def trajectory_figure(course: Trajectory, depth: int) -> Figure:
    """Draw the expected bits of each unit over the search, budget use and price below.

    Args:
        course: of the search.
        depth: number of layers of the network.
    """
    kinds = [[x for x in course.lines if x.is_act is act] for act in (False, True)]
    groups = [lines for lines in kinds if lines]
    heights = [max(3.2, LABEL_INCHES * (len(lines) + 4)) for lines in groups] + [1.3, 1.3]
    figure = Figure(figsize=(10, sum(heights) + 1.4), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    # the lightest part of the colours could not be seen on white
    colours = [colormaps["cividis"](0.85 * i / max(depth - 1, 1)) for i in range(depth)]
    progress = [100 * p for p in course.progress]
    for axes, lines, height in zip(panels, groups, heights, strict=False):
        _draw_lines(axes, progress, lines, height, colours)
    panels[0].set_title(
        "How the search chose the bits\n"
        "lines: expected bits · dots: bits in the policy · dark: first layers, light: last layers",
        loc="left",
    )
    steered = [100 * p for p in course.price_progress]
    use, price = panels[-2:]
    for i, (name, series) in enumerate(course.budget_use.items()):
        for axes, values in ((use, [100 * x for x in series]), (price, course.lambda_q[name])):
            axes.plot(
                steered, values, color=(BLUE, ORANGE)[i % 2], ls=STYLES[i % len(STYLES)],
                marker=".", ms=4, clip_on=False, label=name,
            )  # fmt: skip
    use.axhline(100, color=BLACK, lw=0.8)
    use.set_ylabel("expected cost\n(% of budget)")
    use.legend(loc="best", ncols=len(course.budget_use))
    price.set_yscale("log")
    price.set_ylabel("price of bits\n$\\lambda_Q$")
    price.set_xlabel("optimizer steps of the search done (%)")
    price.set_xlim(0, 100)
    return figure


def _draw_lines(
    axes: Axes, x: list[float], lines: Sequence[Line], height: float, colours: Sequence[Colour]
) -> None:
    """Draw units, and name each at the right, at its bits in the policy."""
    lines = sorted(lines, key=lambda line: (line.final, -line.depth))
    every = [b for line in lines for b in (*line.bits, line.final)]
    low, high = min(every) - 0.3, max(every) + 0.3
    gap = LABEL_INCHES * (high - low) / height
    places = spread([line.final for line in lines], gap, low, high)
    for line, place in zip(lines, places, strict=True):
        colour = colours[line.depth]
        axes.plot(x, line.bits, color=colour, lw=1.2)
        # beyond the right edge: from the last expectation to the bits chosen, and to the name
        way = ([x[-1], 103, 107], [line.bits[-1], line.final, place])
        axes.plot(*way, color=colour, lw=0.6, clip_on=False)
        axes.plot([103], [line.final], "o", color=colour, ms=4, clip_on=False)
        axes.annotate(
            f"{line.name}  {line.final:.3g}", (107, place), xytext=(3, 0),
            textcoords="offset points", va="center", color=colour, annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GREY, lw=0.4)
    axes.set_ylabel(f"expected bits of {'activations' if lines[0].is_act else 'weights'}")


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
