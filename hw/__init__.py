"""What a policy costs: closed forms, and cost models of devices."""

from hw.bops import LayerCost, layer_costs, total_bops
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
    "layer_costs", "report", "target", "total_bops",
]  # fmt: skip
