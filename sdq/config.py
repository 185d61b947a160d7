"""Configurations: frozen, checked when made, and JSON both ways."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sdq.errors import RequestError, nearest

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of a run: what more bits it had would not be looked at."""


class Config(BaseModel):
    """A frozen set of checked fields. A wrong value raises RequestError naming the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RequestError(_sentence(type(self), error)) from None

    def replaced(self, **fields: Any) -> Self:
        """Return a copy with these fields changed, checked again."""
        # what nobody set stays so: export.prepare asks which fields somebody chose
        return type(self)(**{**self.model_dump(exclude_unset=True), **fields})


def _sentence(kind: type[Config], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    rule, repair = first["msg"].removeprefix("Value error, "), ""
    if field not in kind.model_fields and first["type"] == "extra_forbidden":
        rule, repair = "must be a field", f"; {nearest(field, kind.model_fields)}"
    rule = rule[0].lower() + rule[1:]
    return f"{kind.__name__}.{field}: {rule}, got {first['input']!r:.100}{repair}"


Bits = Annotated[int, Field(ge=1, le=8)]
ActBits = Annotated[int, Field(ge=2, le=16)]


ScaleGranularity = Literal["per_tensor", "per_channel"]
ScaleKind = Literal["float", "power_of_two"]
WeightQuantizerKind = Literal["lsq", "dorefa", "entropy"]
OptimizerKind = Literal["adamw", "sgd"]
Granularity = Literal["network", "block", "layer", "channel"]
BinReduction = Literal["mean", "sum"]
BatchNorm = Literal["train", "freeze", "fold"]


class QuantConfig(Config):
    """How a network is quantized.

    Args:
        bit_choices: candidate weight bitwidths of the searched layers, ascending, from 1..8.
        act_bits: bits of the activations that enter the searched layers: 2 to 8, 16, or 32 for
            none.
        act_choices: candidate bitwidths of those activations, if they are to be learned too (the
            paper fixes them); None fixes them at ``act_bits``.
        input_bits: bits of the network's input, likewise; 32 leaves the input in float.
        first_last_bits: bits of the weights of the first and the last layer, and of the last
            one's input: 1 to 8 (activations at least 2), or 32 for float. These layers are not
            searched then; None searches them like the others.
        pins: ``(pattern, bits)``: layers whose path matches the pattern (as in a shell, ``*`` and
            ``?``) keep these weight bits, 32 for float, and are not searched.
        layer_choices: ``(pattern, bit choices)``: candidates of the layers that match, instead of
            ``bit_choices``. The last pattern that matches a layer counts, here and in ``pins``.
        skip: patterns of modules (and all that is in them) that stay in float and are taken as
            they are, whatever they compute.
        batch_norm: statistics and factors of batch normalisation go on being learned (``train``),
            stay as they are (``freeze``), or are folded into the weights of the layer before, where
            there is one, and frozen elsewhere (``fold``).
        integer_datapath: quantize also what integer hardware holds between layers: the operands of
            an addition or a concatenation, with one scale for all of them, those of a product, and
            what averaging and interpolating upsampling take and give. What a maximum pooling or a
            flattening reads is quantized before it. Else only what enters a layer is quantized.
        integer_bias: round biases to whole multiples of the input's scale times the weight's, as
            integer kernels hold them.
        weight_scale: one scale a tensor, or one an output channel.
        restrict_scale: ``float``, or ``power_of_two`` for hardware that shifts.
        weight_quantizer: of the searched layers: ``lsq`` (learned step), ``dorefa`` (tanh over its
            maximum) or ``entropy`` (N2UQ's normalisation, bins about equally filled). The latter
            two have 2^b symmetric levels, none at zero. Pinned layers keep ``lsq``.
        weight_magnitude: of ``dorefa`` and ``entropy``: the size of the levels is ``learned``,
            from least squares on, or the ``paper``'s (1, and gamma times the mean of ``|w|``).
    """

    bit_choices: tuple[Bits, ...] = (1, 2, 3, 4, 6, 8)
    act_bits: Annotated[int, Field(ge=2, le=32)] = 4
    act_choices: tuple[ActBits, ...] | None = None
    input_bits: Annotated[int, Field(ge=2, le=32)] = 8
    first_last_bits: Annotated[int, Field(ge=1, le=32)] | None = 8
    pins: tuple[tuple[str, Annotated[int, Field(ge=1, le=32)]], ...] = ()
    layer_choices: tuple[tuple[str, tuple[Bits, ...]], ...] = ()
    skip: tuple[str, ...] = ()
    batch_norm: BatchNorm = "train"
    integer_datapath: bool = False
    integer_bias: bool = False
    weight_scale: ScaleGranularity = "per_channel"
    restrict_scale: ScaleKind = "float"
    weight_quantizer: WeightQuantizerKind = "lsq"
    weight_magnitude: Literal["learned", "paper"] = "learned"

    @field_validator("bit_choices", "act_choices")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value))):
            raise ValueError("must be ascending bitwidths, each once, like 1,2,3,4,6,8")
        return value

    @field_validator("act_choices")
    @classmethod
    def _known_widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        for bits in value or ():
            if 8 < bits < 16:
                raise ValueError("must be bitwidths from 2 to 8, or 16")
        return value

    @field_validator("layer_choices")
    @classmethod
    def _each_ascending(
        cls, value: tuple[tuple[str, tuple[int, ...]], ...]
    ) -> tuple[tuple[str, tuple[int, ...]], ...]:
        for _, choices in value:
            cls._ascending(choices)
        return value

    @field_validator("pins")
    @classmethod
    def _pins_in_range(cls, value: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        for pattern, bits in value:
            if 8 < bits < 32:
                raise ValueError(f"must be 1 to 8 bits, or 32 for float, for {pattern!r}")
        return value

    @field_validator("act_bits", "input_bits", "first_last_bits")
    @classmethod
    def _eight_or_float(cls, value: int | None, info: ValidationInfo) -> int | None:
        weights = info.field_name == "first_last_bits"
        if value is not None and 8 < value < 32 and (weights or value != 16):
            raise ValueError(f"must be at most 8,{'' if weights else ' 16,'} or 32 for float")
        return value

    @field_validator("weight_magnitude")
    @classmethod
    def _not_of_lsq(cls, value: str, others: ValidationInfo) -> str:
        if value == "paper" and others.data.get("weight_quantizer") == "lsq":
            raise ValueError("must be learned where weight_quantizer is lsq")
        return value


Schedule = Literal["cosine", "linear", "step", "constant"]
Selection = Literal["last", "loss", "accuracy", "balanced_accuracy", "auc", "dice", "iou"]


class TrainConfig(Config):
    """How weights are trained; for float training and for fine-tuning (phase 2).

    Args:
        epochs: passes over the training set.
        lr: peak learning rate, reached after ``warmup`` of the steps.
        schedule: how the learning rate goes on: to zero along a ``cosine`` or ``linear``, divided
            by ten at half and three quarters (``step``), or ``constant``.
        weight_decay: decoupled; not applied to scales, biases and normalisation.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum 0.9, under which learned scales
            hardly move: they are learned relative to their first values, and a step is smaller by
            the scale's square (LSQ's own steps did worse in a trial, ResNet-20 at 2 bits).
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
        select: which epoch's network is kept: of least ``loss`` (the task's, with the hard labels)
            or greatest ``accuracy``, ``balanced_accuracy`` or ``auc`` (of maps ``dice`` or ``iou``)
            on the validation data, the later one of equals; ``last`` without any, or if that is
            asked for. None: ``auc``, of maps ``dice``.
        seed: of batch order, augmentation and dropout.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Schedule = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    optimizer: OptimizerKind = "adamw"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bin_weight: Annotated[float, Field(ge=0)] = 0.1
    bin_warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    bin_reduction: BinReduction = "mean"
    distill: bool = True
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bn_batches: Annotated[int, Field(ge=0)] = 0
    select: Selection | None = None
    seed: Seed = 0


class SearchConfig(Config):
    """Phase 1: how the bitwidths are learned.

    The paper's values of most of these are not known (it published no code); each is our choice
    unless a source is named. Methods other than ``sdq`` and ``interpolate`` use the seed alone.

    Args:
        granularity: what gets a bitwidth of its own: the ``network``, a ``block``, a ``layer``
            (as in the paper's results), or an output ``channel`` (its kernel-wise variant, which
            it found unstable and hardware cannot use).
        epochs: passes over the training set.
        lr: learning rate of the weights, falling along a cosine.
        train_weights: learn the weights along with the bitwidths, as the paper does; else they
            stay as they are, as after-training quantization needs.
        keep_weights: the model that bits are learned for gets the weights of the search, from
            which fine-tuning then goes on; else it stays as it is. Methods that train no weights
            have none to give.
        bitwidth_lr: learning rate of the bitwidth parameters theta, beta = sigmoid(theta). None:
            such that a pair can be decided in a twelfth of the steps.
        temperature: of the Gumbel-softmax at the start.
        end_temperature: at the end, reached along an exponential; None stays at ``temperature``.
        start: where layers begin: at the ``highest`` candidate, as the paper has it, or next to
            the ``budget``, which leaves more steps for telling layers apart, or at the bits that
            the search method ``hessian`` would end at.
        entry_beta: probability, when a pair becomes active, of the bitwidth the layer comes from.
        decay_threshold: the higher bitwidth is dropped when beta falls below it.
        rise_threshold: the next higher bitwidth is tried when beta rises above it; None, as in
            the paper, never.
        regularizer: what pushes bits down: the quantization ``error`` in steps of the quantizer,
            as we read the paper, or the expected ``cost`` itself.
        lambda_q: weight of the regularizer; None lets the search steer it towards the budget.
        error_weight: lambda_e, what each layer's error counts beside the expected cost
            (``regularizer="cost"`` only).
        distill: use the teacher's soft labels, where a teacher is given; the paper has the task's
            own loss.
        settle: share of the steps at the end in which the price of bits only holds the budget.
        seed: of batch order, augmentation, dropout and the Gumbel draws.
    """

    granularity: Granularity = "layer"
    epochs: Annotated[int, Field(ge=1)] = 4
    lr: Annotated[float, Field(gt=0)] = 1e-3
    train_weights: bool = True
    keep_weights: bool = False
    bitwidth_lr: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    end_temperature: Annotated[float, Field(gt=0)] | None = None
    start: Literal["highest", "budget", "hessian"] = "budget"
    entry_beta: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    decay_threshold: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    rise_threshold: Annotated[
        Annotated[float, Field(gt=0.5, lt=1)] | None, Field(validate_default=True)
    ] = 0.97
    regularizer: Literal["error", "cost"] = "error"
    lambda_q: Annotated[float, Field(ge=0)] | None = None
    error_weight: Annotated[float, Field(ge=0)] = 1e-3
    distill: bool = True
    settle: Annotated[float, Field(ge=0, lt=0.9)] = 0.5
    seed: Seed = 0

    @field_validator("rise_threshold")
    @classmethod
    def _leaves_room(cls, value: float | None, others: ValidationInfo) -> float | None:
        """Refuse thresholds at which a pair is left as soon as it is entered."""
        entry, decay = others.data.get("entry_beta"), others.data.get("decay_threshold")
        if value is None or entry is None or decay is None:  # those are refused themselves
            return value
        if not entry < value:
            raise ValueError(f"must be above entry_beta ({entry:g}), at which a pair is entered")
        if not decay < 1 - entry:
            raise ValueError(
                f"must be none where decay_threshold ({decay:g}) is not below 1 - entry_beta "
                f"({1 - entry:g}), at which a pair is entered from below"
            )
        return value


class PtqConfig(Config):
    """Quantization after training, from a few hundred images without labels.

    Args:
        images: at most so many are used.
        rounding: ``learned``, or to the ``nearest`` level.
        steps: optimizer steps a block; 0 is ``nearest``.
        batch_size: images a step.
        lr: of the rounding variables (Adam).
        act_lr: of the activation scales, relative to their first values; 0: as calibrated.
        round_weight: lambda, what the regularizer counts beside the error. Source: AdaRound's
            released code, 0.01, with an error summed over channels as here.
        warmup: share of the steps before the regularizer acts.
        beta_start: exponent of the regularizer when it begins to act.
        beta_end: at the end, reached along a cosine.
        batch_norm: estimate each block's normalisation statistics anew after its rounding.
        seed: of the images of each step.
    """

    images: Annotated[int, Field(ge=1)] = 512
    rounding: Literal["learned", "nearest"] = "learned"
    steps: Annotated[int, Field(ge=0)] = 200
    batch_size: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0)] = 5e-2
    act_lr: Annotated[float, Field(ge=0)] = 0.0
    round_weight: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    beta_start: Annotated[float, Field(ge=1)] = 20.0
    beta_end: Annotated[float, Field(ge=1)] = 2.0
    batch_norm: bool = False
    seed: Seed = 0
