"""How a network must be quantized for what is to run it: ``sdq quantize --for NAME``.

A preparation is a row of the table: for each field of :class:`~sdq.config.QuantConfig` that matters
to the target, the value it gets, and the values it may have where the caller chooses.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from export.findings import refuse
from export.format import check
from sdq.config import Granularity, QuantConfig
from sdq.errors import RequestError, nearest
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel


@dataclass(frozen=True)
class Preparation:
    """What a target asks of a quantized network.

    Args:
        format: the plugin of ``export.formats`` that leads there.
        fields: the values of fields that nobody chose.
        legal: of fields that matter, the values they may have; those of ``fields`` are among them.
        weight_bits: of any layer that is quantized.
        act_bits: of any activation.
        floats: whether layers may stay in float.
        granularities: what may have a bitwidth of its own.
    """

    format: str
    fields: Mapping[str, Any]
    legal: Mapping[str, tuple[Any, ...]]
    weight_bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    act_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    floats: bool = False
    granularities: tuple[Granularity, ...] = ("network", "block", "layer")


PREPARATIONS: dict[str, Preparation] = {
    # integers between all layers; scales and batch normalisation become thresholds, exactly
    "finn": Preparation(
        "finn",
        fields={"integer_datapath": True, "batch_norm": "train", "weight_quantizer": "lsq"},
        legal={
            "integer_datapath": (True,),
            "batch_norm": ("train", "freeze"),
            "weight_quantizer": ("lsq",),
        },
    ),
    # fixed-point numbers: with these scales and biases no factor is left between layers; any other
    # choice is as exact, and costs a multiplication for each value
    "hls4ml": Preparation(
        "hls4ml",
        fields={
            "integer_datapath": True, "integer_bias": True, "batch_norm": "fold",
            "weight_scale": "per_tensor", "restrict_scale": "power_of_two",
        },
        legal={"integer_datapath": (True,)},
        granularities=("network", "block", "layer", "channel"),
    ),
    # integer kernels of 8 bits, without normalisation between them; fewer bits save bytes alone
    "onnxruntime": Preparation(
        "onnx",
        fields={
            "integer_datapath": True, "integer_bias": True, "batch_norm": "fold", "act_bits": 8,
        },
        legal={
            "integer_datapath": (True,), "integer_bias": (True,), "batch_norm": ("fold",),
        },
        floats=True,
        granularities=("network", "block", "layer", "channel"),
    ),
}  # fmt: skip
"""By the name that ``--for`` takes."""


def load_preparation(name: str) -> Preparation:
    """Return a row of the table.

    Raises:
        RequestError: there is none of this name; the message offers the nearest.
    """
    if name not in PREPARATIONS:
        raise RequestError(f"--for: unknown name {name!r}; {nearest(name, PREPARATIONS)}")
    return PREPARATIONS[name]


def prepare(
    name: str,
    config: QuantConfig | None = None,
    *,
    chosen: Collection[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> QuantConfig:
    """Return a configuration that a target accepts.

    Fields that the caller did not choose get the target's values. Candidate bitwidths are
    restricted to those it has.

    Args:
        name: ``finn``, ``hls4ml`` or ``onnxruntime``.
        config: how the network is to be quantized otherwise.
        chosen: the fields that the caller chose; by default those ``config`` was made with.
        options: what messages call a field, instead of ``QuantConfig.FIELD``.

    Raises:
        RequestError: an unknown name, or a field that was chosen and contradicts it.

    >>> config = prepare("finn", QuantConfig(act_bits=3))
    >>> config.act_bits, config.integer_datapath, config.batch_norm
    (3, True, 'train')
    """
    wanted = load_preparation(name)
    config = config or QuantConfig()
    chosen = config.model_fields_set if chosen is None else chosen
    target = _Target(name, wanted, options or {})
    for field, legal in wanted.legal.items():
        if field in chosen:
            target.check(field, getattr(config, field), legal)
    left = {field: value for field, value in wanted.fields.items() if field not in chosen}
    return target.restricted(config.replaced(**left))


def check_granularity(name: str, granularity: Granularity) -> None:
    """Raise RequestError if a target cannot take bitwidths that are so fine."""
    legal = load_preparation(name).granularities
    if granularity not in legal:
        raise RequestError(
            f"--granularity: must be one of {', '.join(legal)} to prepare for {name} "
            f"(--for {name}), got {granularity!r}; drop one of the two"
        )


def check_prepared(name: str, qmodel: QuantModel, sample: Tensor) -> None:
    """Raise RequestError with all that the target cannot take in a network.

    Args:
        name: as for :func:`prepare`.
        qmodel: need not be calibrated.
        sample: ``(N, C, H, W)``, for shapes only.
    """
    wanted = load_preparation(name).format
    refuse(wanted, check(qmodel, format=wanted, sample=sample))


@dataclass(frozen=True)
class _Target:
    name: str
    wanted: Preparation
    options: Mapping[str, str]

    def _refusal(self, field: str, rule: str, value: object) -> RequestError:
        where = self.options.get(field, f"QuantConfig.{field}")
        return RequestError(
            f"{where}: must be {rule} to prepare for {self.name} (--for {self.name}), "
            f"got {value!r}; drop one of the two"
        )

    def check(self, field: str, value: object, legal: tuple[Any, ...]) -> None:
        if value not in legal:
            listed = ", ".join(map(repr, legal))
            raise self._refusal(field, listed if len(legal) == 1 else f"one of {listed}", value)

    def restricted(self, config: QuantConfig) -> QuantConfig:
        """Return the configuration with legal bitwidths only."""
        wanted = self.wanted
        floats = (FLOAT_BITS,) if wanted.floats else ()
        for field in ("act_bits", "input_bits"):
            self.check(field, getattr(config, field), (*wanted.act_bits, *floats))
        if config.first_last_bits is not None:
            self.check("first_last_bits", config.first_last_bits, (*wanted.weight_bits, *floats))
        for _, bits in config.pins:
            self.check("pins", bits, (*wanted.weight_bits, *floats))
        acts = config.act_choices
        return config.replaced(
            bit_choices=self._some("bit_choices", config.bit_choices, wanted.weight_bits),
            act_choices=acts and self._some("act_choices", acts, wanted.act_bits),
            layer_choices=tuple(
                (pattern, self._some("layer_choices", choices, wanted.weight_bits))
                for pattern, choices in config.layer_choices
            ),
        )

    def _some(
        self, field: str, choices: tuple[int, ...], legal: tuple[int, ...]
    ) -> tuple[int, ...]:
        found = tuple(bits for bits in choices if bits in legal)
        if not found:
            raise self._refusal(field, f"among {', '.join(map(str, legal))}", choices)
        return found
