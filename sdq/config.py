"""Configurations: frozen, checked when made, and JSON both ways."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sdq.errors import RequestError


class Config(BaseModel):
    """A frozen set of checked fields. A wrong value raises RequestError naming the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RequestError(_sentence(type(self).__name__, error)) from None

    def replaced(self, **fields: Any) -> Self:
        """Return a copy with these fields changed, checked again."""
        return type(self)(**{**self.model_dump(), **fields})


def _sentence(where: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    rule = first["msg"].removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:]
    return f"{where}.{field}: {rule}, got {first['input']!r:.100}"


Bits = Annotated[int, Field(ge=1, le=8)]


class QuantConfig(Config):
    """How a network is quantized.

    Args:
        bit_choices: candidate weight bitwidths of the searched layers, ascending, from 1..8.
        act_bits: bits of the activations that enter the searched layers: 2 to 8, or 32 for none.
        input_bits: bits of the network's input, likewise; 32 leaves the input in float.
        first_last_bits: bits of the weights of the first and the last layer, and of the last
            one's input: 1 to 8 (activations at least 2), or 32 for float. These layers are not
            searched then; None searches them like the others.
        weight_scale: one scale a tensor, or one an output channel.
        restrict_scale: ``float``, or ``power_of_two`` for hardware that shifts.
    """

    bit_choices: tuple[Bits, ...] = (1, 2, 3, 4, 6, 8)
    act_bits: Annotated[int, Field(ge=2, le=32)] = 4
    input_bits: Annotated[int, Field(ge=2, le=32)] = 8
    first_last_bits: Annotated[int, Field(ge=1, le=32)] | None = 8
    weight_scale: Literal["per_tensor", "per_channel"] = "per_channel"
    restrict_scale: Literal["float", "power_of_two"] = "float"

    @field_validator("bit_choices")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError("must be ascending bitwidths, each once, like 1,2,3,4,6,8")
        return value

    @field_validator("act_bits", "input_bits", "first_last_bits")
    @classmethod
    def _eight_or_float(cls, value: int | None) -> int | None:
        if value is not None and 8 < value < 32:
            raise ValueError("must be at most 8, or 32 for float")
        return value


Schedule = Literal["cosine", "linear", "step", "constant"]
Selection = Literal["last", "loss", "accuracy", "balanced_accuracy", "auc"]


class TrainConfig(Config):
    """How weights are trained; for float training and for fine-tuning (phase 2).

    Args:
        epochs: passes over the training set.
        lr: peak learning rate, reached after ``warmup`` of the steps.
        schedule: how the learning rate goes on: to zero along a ``cosine`` or ``linear``, divided
            by ten at half and three quarters (``step``), or ``constant``.
        weight_decay: decoupled; not applied to scales, biases and normalisation.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum 0.9.
        warmup: share of all steps in which the learning rate rises from zero.
        bin_weight: lambda_E, the weight of entropy-aware bin regularization (fine-tuning only).
            Source: SDQ (Huang et al., ICML 2022), Table 4: 0.1 is best.
        bin_warmup: share of the epochs before bin regularization acts, so that bins settle.
        bin_reduction: over a layer's bins: ``mean`` over those that hold a weight (ours), or
            ``sum`` as in the paper, which gives a layer of 8 bits 64 times the say of one of 2.
        distill: use the teacher's soft labels (fine-tuning only); else the hard labels.
        ema_decay: the result is the exponential moving average of weights, scales and statistics
            over the steps, with this decay; in early steps less, ``(1 + n) / (10 + n)`` after
            ``n`` steps, or the first weights would count too much. 0: the last weights.
        bn_batches: after training, batch normalisation's statistics are estimated anew from so
            many batches of the training set (without augmentation, where the loader can be
            asked for that). 0: the running statistics of the training.
        select: which epoch's network is kept: of least ``loss`` (cross-entropy with the hard
            labels) or greatest ``accuracy``, ``balanced_accuracy`` or ``auc`` on the validation
            data, the later one of equals; ``last`` without any, or if that is asked for.
        seed: of batch order, augmentation and dropout.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Schedule = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bin_weight: Annotated[float, Field(ge=0)] = 0.1
    bin_warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    bin_reduction: Literal["mean", "sum"] = "mean"
    distill: bool = True
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bn_batches: Annotated[int, Field(ge=0)] = 0
    select: Selection = "auc"
    seed: int = 0


class SearchConfig(Config):
    """Phase 1: how the bitwidths are learned.

    The paper's values of most of these are not known (it published no code); each is our choice
    unless a source is named.

    Args:
        epochs: passes over the training set.
        lr: learning rate of the weights, falling along a cosine.
        bitwidth_lr: learning rate of the bitwidth parameters theta, beta = sigmoid(theta). None:
            such that a pair can be decided in a twelfth of the steps.
        temperature: of the Gumbel-softmax.
        start: where layers begin: at the ``highest`` candidate, as the paper has it, or next to
            the ``budget``, which leaves more steps for telling layers apart.
        entry_beta: probability, when a pair becomes active, of the bitwidth the layer comes from.
        decay_threshold: the higher bitwidth is dropped when beta falls below it.
        rise_threshold: the next higher bitwidth is tried when beta rises above it; None, as in
            the paper, never.
        distill: use the teacher's soft labels, where a teacher is given; the paper has the task's
            own loss.
        settle: share of the steps at the end in which the price of bits only holds the budget.
        seed: of batch order, augmentation, dropout and the Gumbel draws.
    """

    epochs: Annotated[int, Field(ge=1)] = 4
    lr: Annotated[float, Field(gt=0)] = 1e-3
    bitwidth_lr: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    start: Literal["highest", "budget"] = "budget"
    entry_beta: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    decay_threshold: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    rise_threshold: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.97
    distill: bool = True
    settle: Annotated[float, Field(ge=0, lt=0.9)] = 0.5
    seed: int = 0
