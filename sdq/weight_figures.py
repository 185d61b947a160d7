"""Figures of a run's weights: quantization errors, and weights among the levels."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdq.figures import BLACK, BLUE, GREY, ORANGE, by_layer
from sdq.weight_levels import Histogram


def error_figure(before: Mapping[str, float], after: Mapping[str, float]) -> Figure:
    """Draw the relative quantization error of each layer.

    Args:
        before: fine-tuning, by layer.
        after: fine-tuning, by layer; empty if there was none.
    """
    figure, (axes,) = by_layer(list(before), (3.2,))
    both = {"float weights, before fine-tuning": before, "after fine-tuning": after}
    drawn = {label: errors for label, errors in both.items() if errors}
    width = 0.8 / len(drawn)
    for i, (label, errors) in enumerate(drawn.items()):
        at = [x + (i - (len(drawn) - 1) / 2) * width for x in range(len(errors))]
        heights = [100 * e for e in errors.values()]
        axes.bar(at, heights, width, color=(ORANGE, BLUE)[i], edgecolor="white", label=label)
    axes.set_ylabel("$\\|Q(w) - w\\|\\ /\\ \\|w\\|$  (%)")
    axes.grid(axis="y", color=GREY, lw=0.4)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.suptitle("Relative quantization error of each layer's weights", x=0.01, ha="left")
    return figure


def histogram_figure(histograms: Sequence[Histogram]) -> Figure:
    """Draw where the weights of some layers lie among the levels, a panel each."""
    columns = min(3, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.1 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, found in zip(panels, histograms, strict=False):
        _draw_histogram(axes, found)
    for axes in panels[len(histograms) :]:
        axes.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle("Weights among the levels they are rounded to", x=0.01, ha="left")
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    figure.supxlabel("weight in steps of its quantizer, $w / s$")
    figure.supylabel("share of the weights (% per step)")
    return figure


def _draw_histogram(axes: Axes, found: Histogram) -> None:
    layer = found.layer
    axes.vlines(
        found.levels, 0, 1, transform=axes.get_xaxis_transform(), color=BLACK, lw=0.7, ls=":",
        label="levels",
    )  # fmt: skip
    axes.stairs(found.before, found.edges, fill=True, color=ORANGE, alpha=0.75,
                label="float weights, before")  # fmt: skip
    if found.after is not None:
        axes.stairs(found.after, found.edges, color=BLUE, lw=1.2, label="after fine-tuning")
    widths = sorted(set(layer.channel_bits or (layer.weight_bits,)))
    bits = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
    plural = "s" if widths[-1] > 1 else ""
    axes.set_title(f"{layer.name}: {bits} bit{plural}, {layer.num_weights:,} weights")
    seen = [i for i, x in enumerate(map(max, zip(found.before, found.after or found.before,
                                                 strict=True))) if x > 0.25]  # fmt: skip
    inside = [*(found.edges[i] for i in seen), *(x for x in found.levels)]
    axes.set_xlim(min(inside) - 0.3, max(inside) + 0.3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
