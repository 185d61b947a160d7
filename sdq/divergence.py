"""How far the network of a policy is from the float network, measured."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sdq.apply_policy import apply_policy_
from sdq.calibration import in_float
from sdq.search_problem import SearchProblem
from sdq.task import task_of


class Divergence:
    """Mean KL divergence from the float network's outputs, by candidates.

    Args:
        problem: of the search; its model takes on the policies that are measured.
        batches: of images ``(N, C, H, W)``.
    """

    @torch.no_grad()
    def __init__(self, problem: SearchProblem, batches: Iterable[Tensor]) -> None:
        self.space, self.qmodel = problem.space, problem.qmodel.eval()
        device = next(self.qmodel.parameters()).device
        self.images = [images.to(device) for images in batches]
        with in_float(self.qmodel):
            self.targets = [self.qmodel(x) for x in self.images]
        self.known: dict[tuple[int, ...], float] = {}

    @torch.no_grad()
    def __call__(self, picks: list[int]) -> float:
        """Return the divergence with a candidate for each unit; measured once."""
        key = tuple(picks)
        if key not in self.known:
            apply_policy_(self.qmodel, self.space.policy_of(picks))
            pairs = zip(self.images, self.targets, strict=True)
            total = sum(len(x) * self.of(x, targets) for x, targets in pairs)
            self.known[key] = total / sum(map(len, self.images))
        return self.known[key]

    def of(self, images: Tensor, targets: Tensor) -> float:
        """Return that of a batch, as the model is now, from the float network's outputs."""
        return float(task_of(targets).divergence(self.qmodel(images), targets))
