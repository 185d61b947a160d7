"""What is asked of a federation that learns bits, and what it gives; :mod:`fl.phases` runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fl.quant_rounds import Merge
from fl.record import Tensors
from fl.run import Federated, left_out
from sdq.config import BinReduction, Config, QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.search_space import SearchSpace, Unit
from sdq.stochastic import Mixing

Limit = Budget | Callable[[SearchSpace], Budget]
"""A budget, or what makes it for a network, such as a device that is laid out for it."""

SearchMethod = Literal["sdq", "interpolate", "uniform", "random"]
MIXING: dict[str, Mixing] = {"sdq": "draw", "interpolate": "interpolate"}
"""The search methods that learn, and how they mix."""


class PhasesConfig(Config):
    """How a federation learns bits; what its rounds are otherwise is ``FederationConfig``'s.

    Args:
        search_method: ``sdq`` or ``interpolate``, which learn; ``uniform`` or ``random``, which
            need no data and no rounds. Other methods of ``sdq quantize`` need all images at once.
        search_rounds: in which bits are learned.
        tune_rounds: under the policy.
        search: of phase 1; its ``epochs``, ``distill`` and ``keep_weights`` do not count here.
        distill: share of the float model's soft labels in the loss, beside the method's own.
        merge: of the clients' activation scales.
        bin_weight: lambda_E of bin regularization.
        bin_warmup: share of the tuning rounds before it acts.
        bin_reduction: over a layer's bins.
        tune_lr_decay: what the learning rate is multiplied with at half and at three quarters of
            the tuning rounds; a decay of the federation's configuration is that of the float phase.
        tune_from: whose weights tuning starts from: the ``float`` model's, so that of the search
            the policy alone is kept; or those that the ``search`` trained along with the bits.
        personal_bits: what the policy of a client with its own budget follows: everyone's bitwidth
            parameters (``global``), or its ``own``, as it last sent them.
    """

    search_method: SearchMethod = "sdq"
    search_rounds: Annotated[int, Field(ge=1)] = 6
    tune_rounds: Annotated[int, Field(ge=1)] = 8
    search: SearchConfig = SearchConfig()
    distill: Annotated[float, Field(ge=0, le=1)] = 0.5
    merge: Merge = "geometric"
    bin_weight: Annotated[float, Field(ge=0)] = 0.1
    bin_warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    bin_reduction: BinReduction = "mean"
    tune_lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.3
    tune_from: Literal["float", "search"] = "float"
    personal_bits: Literal["global", "own"] = "global"

    @field_validator("search")
    @classmethod
    def _without_all_images(cls, value: SearchConfig) -> SearchConfig:
        if value.start == "hessian":
            raise RequestError(
                "phases.search.start: must be budget or highest in a federation, got hessian, "
                "which needs all images in one place"
            )
        return value


@dataclass(frozen=True)
class ClientBudget:
    """What one client's network may cost.

    Args:
        limit: on it.
        legal: the weight and activation bitwidths that its device computes with for a unit; None:
            all of the search's.
    """

    limit: Limit
    legal: Callable[[SearchSpace, Unit], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class PersonalModel:
    """A client's own model, after one more round of training on its own images.

    Args:
        policy: its bits.
        state: what a :class:`~sdq.quant_model.QuantModel` under this policy loads; empty where it
            stays on the client's own node.
        evaluation: on the client's own images; see :func:`fl.evaluation.evaluate`.
    """

    policy: BitwidthPolicy
    state: Tensors
    evaluation: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FederatedBits(Federated):
    """What such a federation gives; ``state`` is the quantized server model's.

    Args:
        policy: the bits of the server's model.
        quant: the configuration it was quantized with.
        float_state: the float model that it was tuned from, and by.
        phases: the result of each, by name; ``float`` and ``search`` only where they were run.
        course: of the search, a record a round.
        personal: models of clients with a budget of their own, by number; of all clients if the
            federation's configuration says ``keep_clients``.
    """

    policy: BitwidthPolicy
    quant: QuantConfig
    float_state: Tensors
    phases: dict[str, Federated]
    course: list[dict[str, Any]]
    personal: dict[int, PersonalModel]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Of all phases, their rounds counted on from one to the next."""
        found, before = [], 0
        for phase, part in self.phases.items():
            of_phase = left_out(part.history, before)
            found += [{"phase": phase, **failure} for failure in of_phase]
            before += len(part.history)
        return found


def budget_of(limit: Limit, space: SearchSpace) -> Budget:
    """Return the budget that is meant for this network."""
    return limit if isinstance(limit, Budget) else limit(space)
