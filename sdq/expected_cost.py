"""The expected cost of a draw: differentiable in the probabilities of the bitwidths."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdq.cost import Constraint


class ExpectedCost(nn.Module):
    """What a network costs on average when each unit draws its bitwidth by itself.

    Exact, for a constraint is a sum of terms that depend on one unit, or on two which draw
    independently.

    Args:
        constraint: whose cost it is.
        width: candidates of the unit that has most.
    """

    single: Tensor
    tables: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, constraint: Constraint, width: int) -> None:
        super().__init__()
        # in units of the limit, so that the budget is 1
        whole = constraint.limit * constraint.divisor
        self.fixed = constraint.fixed / whole

        def padded(rows: Sequence[Sequence[float]], height: int) -> Tensor:
            found = torch.zeros(height, width)
            for i, row in enumerate(rows):
                found[i, : len(row)] = torch.tensor(row, dtype=torch.float64) / whole
            return found

        # all of it follows from the constraint and is not part of the state
        single = padded(constraint.single, len(constraint.single))
        tables = [padded(pair.table, width) for pair in constraint.pairs]
        self.register_buffer("single", single, persistent=False)
        self.register_buffer(
            "tables",
            torch.stack(tables) if tables else torch.zeros(0, width, width),
            persistent=False,
        )
        first = torch.tensor([p.first for p in constraint.pairs], dtype=torch.long)
        second = torch.tensor([p.second for p in constraint.pairs], dtype=torch.long)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return the expected cost over the limit, of ``(U, n)`` probabilities."""
        total = self.fixed + (probabilities * self.single).sum()
        if len(self.tables):
            a, b = probabilities[self.first], probabilities[self.second]
            total = total + torch.einsum("pi,pij,pj->", a, self.tables, b)
        return total
