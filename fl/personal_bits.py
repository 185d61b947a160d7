"""Bits of clients that have a budget of their own: everyone's search, projected to that budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fl.bits import ClientBudget, PhasesConfig, budget_of
from sdq.cost import Constraint
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.projection import check_reachable, project
from sdq.search_space import SearchSpace


def check_personal(
    personal: Mapping[int, ClientBudget],
    num_clients: int,
    policy: BitwidthPolicy | None,
    phases: PhasesConfig,
) -> None:
    """Raise RequestError if clients cannot have bits of their own in such a federation.

    Args:
        personal: their budgets, by number.
        num_clients: in the federation.
        policy: that is given instead of learned bits, or None.
        phases: how bits are learned.
    """
    for client in personal:
        if not 0 <= client < num_clients:
            raise RequestError(
                f"fl.run: personal budgets must be of clients 0 to {num_clients - 1}, "
                f"got {client}; name one of these"
            )
    if personal and policy is not None:
        raise RequestError(
            "fl.run: a client's own bits must follow from bits that are learned, got a policy; "
            "give a budget instead"
        )
    if personal and phases.search.granularity == "channel":
        raise RequestError(
            "fl.run: clients with bits of their own must have one bitwidth a layer, got "
            "granularity channel; use layer or block"
        )
    if personal and phases.search_method == "random":
        raise RequestError(
            "fl.run: a client's own bits must follow from bits that are learned, got random "
            "ones; use sdq, interpolate or uniform"
        )


@dataclass(frozen=True)
class PersonalProblem:
    """What is decided for one client.

    Args:
        space: of everyone's units, with the bitwidths that the client's device computes with.
        constraints: that the client's budget sets on it.
    """

    space: SearchSpace
    constraints: list[Constraint]

    @classmethod
    def of(cls, client: int, asked: ClientBudget, space: SearchSpace) -> "PersonalProblem":
        """Return a client's problem.

        Args:
            client: its number.
            asked: of it.
            space: everyone's.

        Raises:
            RequestError: the device computes with none of a unit's bitwidths.
        """
        units = []
        for unit in space.units:
            legal = unit.choices if asked.legal is None else asked.legal(space, unit)
            if not legal:
                raise RequestError(
                    f"client {client}: unit {unit.name} must have bits that its device computes "
                    f"with, got none of {unit.choices}; offer others"
                )
            units.append(replace(unit, choices=legal))
        own = replace(space, units=tuple(units))
        return cls(own, budget_of(asked.limit, own).constraints(own))

    def check(self) -> None:
        """Raise RequestError if no policy fits."""
        check_reachable(self.constraints)

    def policy_of(self, utilities: list[list[float]], space: SearchSpace) -> BitwidthPolicy:
        """Return the best policy that fits.

        Args:
            utilities: of each of everyone's candidates, a list a unit.
            space: everyone's.
        """
        rows = [
            [u for u, bits in zip(row, unit.choices, strict=True) if bits in own.choices]
            for row, unit, own in zip(utilities, space.units, self.space.units, strict=True)
        ]
        return self.space.policy_of(project(rows, self.constraints))
