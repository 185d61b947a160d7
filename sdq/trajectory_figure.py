"""The figure of a search: expected bits of each unit, budget use and price.

As in :mod:`sdq.figures`, only :mod:`sdq.plots` imports this file.
"""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdq.figures import BLACK, BLUE, GREY, ORANGE
from sdq.trajectory import Line, Trajectory

Colour = tuple[float, float, float, float]
STYLES = ("-", "--", ":", "-.")

LABEL_INCHES = 0.15
"""Height of a line of text of 8 points, and a gap."""


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
