"""What does not depend on the method: rounds, local training, participation, evaluation."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fl.compression import CompressionConfig
from fl.losses import LossConfig
from fl.privacy import PrivacyConfig
from fl.robust import Aggregation
from fl.state import BatchNormPolicy
from sdq.config import Config, Seed
from sdq.errors import RequestError

Optimizer = Literal["sgd", "adam", "adamw"]
Sampling = Literal["all", "balanced"]
Select = Literal["last", "generalization", "specialization"]


class FederationConfig(Config):
    """A federation, whatever its method.

    Args:
        rounds: exchanges between server and clients.
        local_epochs: passes over a client's training set in a round.
        batch_size: images in a batch. A last batch of one is dropped, unless it is the only one;
            then batch normalisation uses its running statistics.
        sampling: an epoch has ``all`` of a client's images once; or, ``balanced``, as many images
            drawn with equal chances for the classes that the client has.
        optimizer: ``sgd``; ``adam``, with decay added to the gradient; ``adamw``.
        lr: learning rate of the clients.
        momentum: of ``sgd``.
        weight_decay: of every parameter but biases and normalisation.
        lr_decay: what the learning rate is multiplied with at each of ``lr_decay_rounds``.
        lr_decay_rounds: rounds, counted from 0.
        lr_decay_every: or every so many rounds.
        keep_optimizer: a client's optimizer goes on where it was; else it starts anew each round.
        participation: share of the clients that are asked in a round, drawn anew each time.
        min_replies: with fewer of them a round fails.
        batch_norm: policy, see :func:`fl.state.routes`; None: the method's.
        geometric: patterns of tensors whose logarithms are averaged, such as quantizers' scales.
        loss: what clients minimise; None: the method's.
        count_epsilon: class counts leave a client with Laplace noise of scale 1 / epsilon (one
            image more or less is then epsilon-differentially private); None: as they are.
        compress: bits of the changes that travel, see :mod:`fl.channel`; None: floating-point
            numbers.
        aggregation: of the clients' tensors: ``mean``, weighted as the method says; ``median``, or
            ``trimmed_mean:SHARE``, see :mod:`fl.robust`.
        max_update_ratio: how many times the median client's a client's change may be before it is
            left out, see :func:`fl.robust.too_large`; None: as large as it likes.
        privacy: clipping and noise, see :mod:`fl.privacy`; None: neither.
        evaluate_every: rounds between evaluations; the last round always is evaluated.
        evaluate_absent: at the end, clients that the last round did not ask train on the final
            model, are evaluated, and forget it; where a round is selected, in every round that is
            evaluated.
        assemble: for the evaluation of the server's model, tensors that stay with the clients are
            collected and averaged. False: where there are such tensors, there is no
            generalization to report.
        adjust: tau of test-time logit adjustment, ``z - tau log prior``; 0: none.
        select: which round's model is the result: the ``last``, or the one of greatest balanced
            accuracy on the validation sets.
        keep_clients: each client keeps its own model, as it was when it was last evaluated.
        seed: of everything random.
    """

    rounds: Annotated[int, Field(ge=1)] = 10
    local_epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    sampling: Sampling = "all"
    optimizer: Optimizer = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    lr_decay_rounds: tuple[int, ...] = ()
    lr_decay_every: Annotated[int, Field(ge=1)] | None = None
    keep_optimizer: bool = False
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_replies: Annotated[int, Field(ge=1)] = 1
    batch_norm: BatchNormPolicy | None = None
    geometric: tuple[str, ...] = ()
    loss: LossConfig | None = None
    count_epsilon: Annotated[float, Field(gt=0)] | None = None
    compress: CompressionConfig | None = None
    aggregation: str = "mean"
    max_update_ratio: Annotated[float, Field(gt=1)] | None = 20.0
    privacy: PrivacyConfig | None = None
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    evaluate_absent: bool = True
    assemble: bool = True
    adjust: Annotated[float, Field(ge=0)] = 0.0
    select: Select = "last"
    keep_clients: bool = False
    seed: Seed = 0

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        Aggregation.parsed(value)
        return value

    def lr_in(self, round: int) -> float:
        """Return the clients' learning rate in a round, counted from 0."""
        times = sum(round >= r for r in self.lr_decay_rounds)
        if self.lr_decay_every is not None:
            times += round // self.lr_decay_every
        return self.lr * self.lr_decay**times

    def check_number(self, num_clients: int) -> None:
        """Raise RequestError where a federation of so many clients can have no round."""
        asked = share_of_clients(num_clients, self.participation)
        if self.min_replies > asked:
            raise RequestError(
                f"min_replies: must be at most {asked}, as many as a round asks of {num_clients} "
                f"with participation {self.participation:g}, got {self.min_replies}; lower it, or "
                "ask more"
            )
        if self.aggregation.startswith("trimmed_mean") and asked < 3:
            raise RequestError(
                f"aggregation: trimmed_mean must have 3 clients or more in a round, got {asked}, "
                "and would cut off none; use median, or ask more"
            )


def share_of_clients(num_clients: int, participation: float) -> int:
    """Return how many clients a round asks: at least one, and no fewer than the share.

    >>> share_of_clients(10, 0.25)
    3
    """
    return max(1, min(num_clients, math.ceil(num_clients * participation - 1e-9)))
