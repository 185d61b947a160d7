"""What a policy costs: closed forms, and cost models of devices."""

from hw.bops import LayerCost, layer_costs, total_bops
from hw.ebops import layer_ebops
from hw.target import (
    Choices,
    Demand,
    LayerUse,
    Target,
    TargetCost,
    choices_of,
    cost_fn,
    report,
    target,
)

__all__ = [
    "Choices", "Demand", "LayerCost", "LayerUse", "Target", "TargetCost", "choices_of", "cost_fn",
    "layer_costs", "layer_ebops", "report", "target", "total_bops",
]  # fmt: skip
