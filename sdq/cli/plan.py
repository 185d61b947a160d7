"""From the options of ``sdq quantize`` and ``sdq search`` to what is to be done."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import export
from export.preparation import check_granularity
from sdq import config, plugins
from sdq.cli import options
from sdq.cli.device import DeviceRequest, on_target
from sdq.cli.option_groups import BudgetOptions, QuantOptions
from sdq.cli.teacher import TeacherRequest
from sdq.config import Config, PtqConfig, QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.search_space import SearchSpace

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Plan:
    """What a quantize or search run does, apart from data and network."""

    quant: QuantConfig
    limits: "Limits | None"
    """None with a given policy."""
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
        budget = self.limits.asked() if self.limits is not None else None
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
    device: DeviceRequest = field(default_factory=DeviceRequest)
    avg_act_bits: float | None = None

    @classmethod
    def of(cls, asked: BudgetOptions) -> "Limits":
        """Return what the options ask; RequestError if that is wrong."""
        return cls(asked.bits, asked.weight_kb, asked.bops_g, asked.device())

    @property
    def given(self) -> bool:
        """Whether there is a budget for the weights."""
        own = (self.bits, self.weight_kb, self.bops_g)
        return any(v is not None for v in own) or self.device.given

    def check(self) -> None:
        """Raise RequestError if there is no budget, or one that no network could have."""
        if not self.given:
            raise RequestError(
                "budget: must be given; pass --bits 2.0, --weight-kb, --bops-g, or --target with "
                "--latency-ms, --fps or --budget NAME=VALUE"
            )
        if any(v is not None for v in self._own().values()):
            Budget(**self._own())

    def _own(self) -> dict[str, Any]:
        return {
            "avg_weight_bits": self.bits,
            "weight_bytes": self.weight_kb * 1000 if self.weight_kb is not None else None,
            "bops": self.bops_g * 1e9 if self.bops_g is not None else None,
            "avg_act_bits": self.avg_act_bits,
        }

    def asked(self) -> dict[str, Any]:
        """Return the budget as ``run.json`` keeps it."""
        return {**self._own(), "costs": self.device.asked()}

    def budget(self, space: SearchSpace) -> Budget:
        """Return the limits as one budget for a network.

        Raises:
            RequestError: a demand that the device cannot meet.
        """
        return Budget(**self._own(), costs=self.device.costs(space))


def make_quantization(
    file: "ConfigFile", limits: Limits, asked: QuantOptions, batch_norm: config.BatchNorm
) -> tuple[QuantConfig, Limits]:
    """Return how the network is quantized, with what that adds to the limits.

    Raises:
        RequestError: a value out of range, bits that the target has not, or an option that
            contradicts what the network is prepared for.
    """
    pins = []
    for pattern, value in options.rules(asked.pin, "--pin"):
        bits = options.integers(value, "--pin")
        if len(bits) != 1:
            raise RequestError(f"--pin: must be 'PATTERN=BITS', got {pattern}={value}")
        pins.append((pattern, bits[0]))
    special = [
        (pattern, options.integers(value, "--layer-choices"))
        for pattern, value in options.rules(asked.layer_choices, "--layer-choices")
    ]
    if options.given("act_choices") and not asked.learn_act_bits:
        raise RequestError(
            "--act-choices: must go with --learn-act-bits, or activations have --act-bits "
            f"({asked.act_bits}) all; add it, or drop --act-choices"
        )
    acts = options.integers(asked.act_choices, "--act-choices")
    quant = QuantConfig(
        bit_choices=options.integers(asked.choices, "--choices"),
        act_bits=asked.act_bits,
        act_choices=acts if asked.learn_act_bits else None,
        first_last_bits=asked.first_last_bits or None,
        pins=tuple(pins),
        layer_choices=tuple(special),
        skip=tuple(asked.skip or ()),
        batch_norm=batch_norm,
        integer_datapath=asked.integer_datapath,
        integer_bias=asked.integer_bias,
        weight_scale=asked.weight_scale,
        restrict_scale=asked.scale,
        weight_quantizer=asked.weight_quantizer,
    )
    quant = file.changed("quant", quant)
    if asked.for_ is not None:
        quant = prepared(quant, asked.for_, file)
    if limits.device.target is not None:
        quant = on_target(quant, limits.device.target)
    if quant.act_choices is not None:  # where they are learned, --act-bits is what they may cost
        limits = replace(limits, avg_act_bits=float(quant.act_bits))
    return quant, limits


def prepared(quant: QuantConfig, name: str, file: "ConfigFile") -> QuantConfig:
    """Return the configuration as ``--for`` wants it, where nobody chose otherwise.

    Raises:
        RequestError: an unknown name, or an option or a field of the file that contradicts it.
    """
    in_file = file.sections.get("quant", {})
    known = set_by_options("quant")
    asked = {field: option for field, option in known.items() if options.given(option)}
    names = {field: f"--{option.replace('_', '-')}" for field, option in known.items()}
    names |= {field: f"--config: quant.{field}" for field in in_file}
    return export.prepare(name, quant, chosen={*asked, *in_file}, options=names)


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
    if limits.device.given and search.granularity == "channel":
        raise RequestError(
            "--granularity: must be layer, block or network with a device's limits (--latency-ms, "
            "--fps, --budget), got channel: a device takes channels of one bitwidth at a time, so "
            "a layer's cost is no sum over its channels; budget --bits, --weight-kb or --bops-g"
        )
    if policy is not None and limits.given:
        raise RequestError("--policy: must stand without a budget, got both; drop one")
    if policy is not None and search.keep_weights:
        raise RequestError(
            "--keep-weights: must stand without --policy, with which nothing is searched; drop one"
        )
    if policy is None:
        limits.check()
    given = str(policy) if policy is not None else None
    held = limits if policy is None else None
    target = limits.device.target
    return Plan(
        quant, held, search_method, search, train, given, target, teacher, ptq, prepared_for
    )


def set_by_options(part: str) -> dict[str, str]:
    """Return the fields of a part that the running verb's options set too, and these options."""
    # a federation's --batch-norm says what travels, not how it is quantized
    other = {"batch_norm"} if part == "quant" and options.verb() == "federate" else set()
    return {field: option for field, option in FIELDS[part].items() if field not in other}


FIELDS: dict[str, dict[str, str]] = {
    "quant": {
        "bit_choices": "choices", "act_bits": "act_bits", "act_choices": "act_choices",
        "first_last_bits": "first_last_bits", "pins": "pin", "layer_choices": "layer_choices",
        "skip": "skip", "batch_norm": "batch_norm", "integer_datapath": "integer_datapath",
        "integer_bias": "integer_bias",
        "weight_scale": "weight_scale", "restrict_scale": "scale",
        "weight_quantizer": "weight_quantizer",
    },
    "ptq": {"images": "ptq_images", "steps": "ptq_steps", "seed": "seed"},
    "search": {
        "granularity": "granularity", "epochs": "search_epochs", "seed": "seed",
        "keep_weights": "keep_weights",
    },
    "train": {
        name: name
        for name in (
            "epochs", "lr", "weight_decay", "optimizer", "schedule", "bin_weight", "bin_reduction",
            "distill", "ema_decay", "bn_batches", "select", "seed",
        )
    },
    "federation": {
        name: name
        for name in (
            "rounds", "local_epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
            "participation", "batch_norm", "loss", "evaluate_every", "adjust", "select", "seed",
            "sampling", "aggregation", "compress", "keep_clients",
        )
    },
    "phases": {
        name: name
        for name in (
            "search_method", "search_rounds", "tune_rounds", "distill", "bin_weight",
        )
    },
    "loss": {"name": "loss"},
    "methods": {},
}  # fmt: skip
"""Of the fields of a configuration file, those that options set as well."""


@dataclass(frozen=True)
class ConfigFile:
    """Fields of configurations, read from a file; they stand in the place of options' defaults."""

    sections: dict[str, dict[str, Any]]
    path: Path | None = None

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
                raise RequestError(
                    f"--config: {path}: {part} must be an object, got {fields!r:.100}"
                )
            for name in fields:
                option = set_by_options(part).get(name)
                if option is not None and options.given(option):
                    raise RequestError(
                        f"--config: {part}.{name} must be given once, but stands in {path} and "
                        f"as --{option.replace('_', '-')}; drop one"
                    )
        return cls(document, path)

    def changed(self, part: str, before: AnyConfig) -> AnyConfig:
        """Return a configuration with the file's fields in it; RequestError names a wrong one."""
        try:
            return before.replaced(**self.sections.get(part, {}))
        except RequestError as error:
            raise RequestError(f"--config: {self.path}: {part}: {error}") from None
