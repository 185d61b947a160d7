"""From the options of ``sdq quantize`` and ``sdq search`` to what is to be done."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import export
import hw
from export.preparation import check_granularity
from sdq import config, plugins
from sdq.cli import options
from sdq.cli.teacher import TeacherRequest
from sdq.config import Config, PtqConfig, QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget, CostFn
from sdq.errors import RequestError
from sdq.policy import FLOAT_BITS

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Plan:
    """What a quantize or search run does, apart from data and network."""

    quant: QuantConfig
    budget: Budget | None
    method: str
    search: SearchConfig
    train: TrainConfig | None
    given_policy: str | None = None
    target: str | None = None
    teacher: TeacherRequest | None = None
    """Of phase 2, if it is not the float network."""
    ptq: PtqConfig | None = None
    """Quantization after training, in place of phase 2."""
    prepared_for: str | None = None
    """What is to run the network, if that was said."""

    def to_json(self) -> dict[str, Any]:
        """Return what is asked, for ``run.json``."""
        budget = None
        if self.budget is not None:
            costs = {f"{self.target}:{cost.__name__}": limit for cost, limit in self.budget.costs}
            budget = {**vars(self.budget), "costs": costs}
        return {
            "quant": self.quant.model_dump(),
            "budget": budget,
            "search_method": self.method,
            "search": self.search.model_dump(),
            "train": self.train.model_dump() if self.train else None,
            "policy": self.given_policy,
            "teacher": vars(self.teacher) if self.teacher else None,
            "ptq": self.ptq.model_dump() if self.ptq else None,
            "for": self.prepared_for,
        }


@dataclass(frozen=True)
class Limits:
    """The budgets that can be asked for on the command line."""

    bits: float | None = None
    weight_kb: float | None = None
    bops_g: float | None = None
    latency_ms: float | None = None
    target: str | None = None
    avg_act_bits: float | None = None

    def budget(self) -> Budget:
        """Return them as one budget.

        Raises:
            RequestError: there is none, or a latency without a device.
        """
        weights = (self.bits, self.weight_kb, self.bops_g, self.latency_ms)
        if all(v is None for v in weights):
            raise RequestError(
                "budget: must be given; pass --bits 2.0, --weight-kb, --bops-g, or --target with "
                "--latency-ms"
            )
        costs: tuple[tuple[CostFn, float], ...] = ()
        if self.latency_ms is not None:
            if self.target is None:
                raise RequestError("--latency-ms: must stand with --target; see `sdq list targets`")
            costs = ((hw.target(self.target).latency_s, self.latency_ms / 1e3),)
        return Budget(
            avg_weight_bits=self.bits,
            weight_bytes=self.weight_kb * 1000 if self.weight_kb is not None else None,
            bops=self.bops_g * 1e9 if self.bops_g is not None else None,
            avg_act_bits=self.avg_act_bits,
            costs=costs,
        )


def make_quantization(
    file: "ConfigFile",
    limits: Limits,
    *,
    choices: str,
    act_bits: int,
    act_choices: str,
    learn_act_bits: bool,
    first_last_bits: int,
    pin: list[str] | None,
    skip: list[str] | None,
    layer_choices: list[str] | None,
    batch_norm: config.BatchNorm,
    integer_datapath: bool,
    weight_scale: config.ScaleGranularity,
    scale: config.ScaleKind,
    weight_quantizer: config.WeightQuantizerKind,
    prepared_for: str | None,
) -> tuple[QuantConfig, Limits]:
    """Return how the network is quantized, with what that adds to the limits.

    Raises:
        RequestError: a value out of range, bits that the target has not, or an option that
            contradicts what the network is prepared for.
    """
    pins = []
    for pattern, value in options.rules(pin, "--pin"):
        bits = options.integers(value, "--pin")
        if len(bits) != 1:
            raise RequestError(f"--pin: must be 'PATTERN=BITS', got {pattern}={value}")
        pins.append((pattern, bits[0]))
    special = [
        (pattern, options.integers(value, "--layer-choices"))
        for pattern, value in options.rules(layer_choices, "--layer-choices")
    ]
    acts = options.integers(act_choices, "--act-choices")
    quant = QuantConfig(
        bit_choices=options.integers(choices, "--choices"),
        act_bits=act_bits,
        act_choices=acts if learn_act_bits else None,
        first_last_bits=first_last_bits or None,
        pins=tuple(pins),
        layer_choices=tuple(special),
        skip=tuple(skip or ()),
        batch_norm=batch_norm,
        integer_datapath=integer_datapath,
        weight_scale=weight_scale,
        restrict_scale=scale,
        weight_quantizer=weight_quantizer,
    )
    quant = file.changed("quant", quant)
    if prepared_for is not None:
        quant = prepared(quant, prepared_for, file)
    if limits.target is not None:
        quant = on_target(quant, limits.target)
    if quant.act_choices is not None:  # where they are learned, --act-bits is what they may cost
        limits = replace(limits, avg_act_bits=float(quant.act_bits))
    return quant, limits


def prepared(quant: QuantConfig, name: str, file: "ConfigFile") -> QuantConfig:
    """Return the configuration as ``--for`` wants it, where nobody chose otherwise.

    Raises:
        RequestError: an unknown name, or an option or a field of the file that contradicts it.
    """
    in_file = file.sections.get("quant", {})
    asked = {field: option for field, option in FIELDS["quant"].items() if options.given(option)}
    names = {field: f"--{option.replace('_', '-')}" for field, option in FIELDS["quant"].items()}
    names |= {field: f"--config: quant.{field}" for field in in_file}
    return export.prepare(name, quant, chosen={*asked, *in_file}, options=names)


def on_target(quant: QuantConfig, target: str) -> QuantConfig:
    """Return the configuration with the bitwidths that a target computes with.

    Raises:
        RequestError: of those asked for somewhere it has none.
    """
    device = hw.target(target)

    def legal(asked: tuple[int, ...], known: tuple[int, ...], option: str) -> tuple[int, ...]:
        found = tuple(bits for bits in asked if bits in known)
        if not found:
            raise RequestError(
                f"{option}: must have bits that {target} computes with "
                f"({', '.join(map(str, known))}), got {', '.join(map(str, asked))}"
            )
        return found

    acts = quant.act_choices
    if acts is None:
        legal((quant.act_bits,), (*device.act_bits, FLOAT_BITS), "--act-bits")
    else:
        acts = legal(acts, device.act_bits, "--act-choices")
    return quant.replaced(
        bit_choices=legal(quant.bit_choices, device.weight_bits, "--choices"),
        act_choices=acts,
        layer_choices=tuple(
            (pattern, legal(bits, device.weight_bits, "--layer-choices"))
            for pattern, bits in quant.layer_choices
        ),
    )


def make_plan(
    quant: QuantConfig,
    limits: Limits,
    *,
    search_method: str,
    search: SearchConfig,
    train: TrainConfig | None,
    policy: Path | None = None,
    teacher: TeacherRequest | None = None,
    ptq: PtqConfig | None = None,
    prepared_for: str | None = None,
) -> Plan:
    """Check the options of a run and gather them.

    Raises:
        RequestError: no budget (or a budget and a policy), a latency for single channels, bits of
            single channels for what cannot have them, or an unknown method.
    """
    plugins.load("sdq.search_methods", search_method)
    if prepared_for is not None:
        check_granularity(prepared_for, search.granularity)
    if limits.latency_ms is not None and search.granularity == "channel":
        raise RequestError(
            "--latency-ms: must stand with --granularity layer, block or network, got channel: a "
            "device takes channels of one bitwidth at a time, so a layer's time is no sum over its "
            "channels; budget --bits, --weight-kb or --bops-g instead"
        )
    if policy is None:
        return Plan(
            quant, limits.budget(), search_method, search, train, None, limits.target, teacher, ptq,
            prepared_for,
        )  # fmt: skip
    given = (limits.bits, limits.weight_kb, limits.bops_g, limits.latency_ms)
    if any(v is not None for v in given):
        raise RequestError("--policy: must stand without a budget, got both; drop one")
    return Plan(
        quant, None, search_method, search, train, str(policy), limits.target, teacher, ptq,
        prepared_for,
    )  # fmt: skip


FIELDS: dict[str, dict[str, str]] = {
    "quant": {
        "bit_choices": "choices", "act_bits": "act_bits", "act_choices": "act_choices",
        "first_last_bits": "first_last_bits", "pins": "pin", "layer_choices": "layer_choices",
        "skip": "skip", "batch_norm": "batch_norm", "integer_datapath": "integer_datapath",
        "weight_scale": "weight_scale", "restrict_scale": "scale",
        "weight_quantizer": "weight_quantizer",
    },
    "ptq": {"images": "ptq_images", "steps": "ptq_steps", "seed": "seed"},
    "search": {"granularity": "granularity", "epochs": "search_epochs", "seed": "seed"},
    "train": {
        name: name
        for name in (
            "epochs", "lr", "weight_decay", "optimizer", "schedule", "bin_weight", "bin_reduction",
            "distill", "ema_decay", "bn_batches", "select", "seed",
        )
    },
}  # fmt: skip
"""Of the fields of a configuration file, those that options set as well."""


@dataclass(frozen=True)
class ConfigFile:
    """Fields of configurations, read from a file; they stand in the place of options' defaults."""

    sections: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path | None, *known: str) -> "ConfigFile":
        """Read ``{"quant": {...}, "search": {...}, ...}``.

        Args:
            path: of the file; None is a file without fields.
            known: the parts that the request has a use for.

        Raises:
            RequestError: no such file, not such an object, a part that nothing would be done with,
                or a field that was also given as an option.
        """
        if path is None:
            return cls({})
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"--config: {path} must be a JSON file, but: {error}") from None
        if not isinstance(document, dict) or not set(document) <= set(known):
            got = sorted(document) if isinstance(document, dict) else type(document).__name__
            raise RequestError(
                f"--config: {path} must here have no parts but {', '.join(known)}, got {got}"
            )
        for part, fields in document.items():
            if not isinstance(fields, dict):
                raise RequestError(f"--config: {path}: {part} must be an object, got {fields!r}")
            for field in fields:
                option = FIELDS[part].get(field)
                if option is not None and options.given(option):
                    raise RequestError(
                        f"--config: {part}.{field} must be given once, but stands in {path} and "
                        f"as --{option.replace('_', '-')}; drop one"
                    )
        return cls(document)

    def changed(self, part: str, before: AnyConfig) -> AnyConfig:
        """Return a configuration with the file's fields in it; RequestError names a wrong one."""
        return before.replaced(**self.sections.get(part, {}))
