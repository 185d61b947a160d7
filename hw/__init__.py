"""What a policy costs: closed forms, and cost models of devices."""

from hw.bops import LayerCost, layer_costs, total_bops
from hw.target import Target, TargetCost, target

__all__ = ["LayerCost", "Target", "TargetCost", "layer_costs", "target", "total_bops"]
