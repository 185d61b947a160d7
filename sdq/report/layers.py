"""The bits of each layer beside what they cost it: the error of rounding its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.report.charts import Chart, Series, chart
from sdq.trajectory import Trajectory, mean_weight_bits


@dataclass(frozen=True)
class LayerRow:
    """A layer.

    Args:
        name: of the layer.
        weights: how many it has.
        bits: of a weight, on average over its channels; None: it stays in float.
        act_bits: of what enters it; None: float.
        searched: whether the search chose the bits.
        error_before: of rounding the float weights, relative to their norm.
        error_after: of rounding the weights the run ended with.
    """

    name: str
    weights: int
    bits: float | None
    act_bits: int | None
    searched: bool
    error_before: float | None
    error_after: float | None


def layer_rows(
    policy: BitwidthPolicy, before: Mapping[str, float], after: Mapping[str, float]
) -> list[LayerRow]:
    """Return the layers, first to last.

    Args:
        policy: of the run.
        before: relative quantization errors of the float weights, by layer.
        after: of the fine-tuned weights; empty where there are none.
    """
    return [
        LayerRow(
            bits.name,
            bits.num_weights,
            None if bits.weight_bits == FLOAT_BITS else mean_weight_bits(bits),
            None if bits.act_bits == FLOAT_BITS else bits.act_bits,
            bits.searched,
            before.get(bits.name),
            after.get(bits.name),
        )
        for bits in policy
    ]


def trajectory_charts(course: Trajectory) -> list[Chart]:
    """Return the course of a search: expected bits of each unit, one chart for weights and acts."""
    found = []
    for is_act, what in ((False, "weights"), (True, "activations")):
        lines = [line for line in course.lines if line.is_act is is_act]
        # logs have some hundred points a unit: more than a chart on a page has pixels for
        every = max(1, len(course.progress) // 80)
        places = course.progress[::every]
        made = chart(
            f"How the search settled the bits of the {what}",
            [
                Series(line.name, list(zip(places, line.bits[::every], strict=True)))
                for line in lines
            ],
            x_label="steps of the search that are done",
            y_label=f"expected bits of the {what}",
            description="One line a unit: "
            + "; ".join(f"{line.name} ended at {line.final:.3g} bits" for line in lines)
            + ".",
            percent=False,
            percent_x=True,
        )
        found += [made] if made is not None else []
    return found
