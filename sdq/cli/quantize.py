"""``sdq quantize``: learn the bitwidths, fine-tune, measure."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import nn

import hw
from sdq import plugins
from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.progress import Watch, show_json, show_table
from sdq.cli.train import summary
from sdq.config import QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget, CostFn
from sdq.errors import RequestError
from sdq.finetune import finetune_
from sdq.metrics import agreement, classification_metrics, predict
from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.projection import check_reachable
from sdq.quant_model import QuantModel, apply_policy_, calibrate_
from sdq.quant_model import quantize as quantize_model
from sdq.run_folder import RunFolder, check_new
from sdq.search import search
from sdq.search_space import SearchSpace

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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


def make_quant_config(
    *,
    choices: str,
    act_bits: int,
    act_choices: str,
    learn_act_bits: bool,
    first_last_bits: int,
    pin: list[str] | None,
    layer_choices: list[str] | None,
    weight_scale: options.ScaleGranularity,
    scale: options.ScaleKind,
    weight_quantizer: options.QuantizerKind,
    granularity: options.GranularityName,
    target: str | None,
) -> QuantConfig:
    """Check the options of quantization and gather them.

    Raises:
        RequestError: a value out of range, or bits that the target has not.
    """
    if granularity == "channel" and weight_scale != "per_channel":
        raise RequestError(
            "--granularity: channel must stand with --weight-scale per_channel: channels of "
            f"different bitwidths have scales of their own, got {weight_scale}"
        )
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
    widths = options.integers(choices, "--choices")
    acts = options.integers(act_choices, "--act-choices")
    if target is not None:
        device = hw.target(target)
        widths = legal(widths, device.weight_bits, "--choices", target)
        if learn_act_bits:
            acts = legal(acts, device.act_bits, "--act-choices", target)
        else:
            legal((act_bits,), (*device.act_bits, FLOAT_BITS), "--act-bits", target)
        special = [
            (name, legal(bits, device.weight_bits, "--layer-choices", target))
            for name, bits in special
        ]
    return QuantConfig(
        bit_choices=widths,
        act_bits=act_bits,
        act_choices=acts if learn_act_bits else None,
        first_last_bits=first_last_bits or None,
        pins=tuple(pins),
        layer_choices=tuple(special),
        weight_scale=weight_scale,
        restrict_scale=scale,
        weight_quantizer=weight_quantizer,
    )


def legal(
    asked: tuple[int, ...], known: tuple[int, ...], option: str, target: str
) -> tuple[int, ...]:
    """Return those bitwidths that a target computes with; RequestError if there is none."""
    found = tuple(bits for bits in asked if bits in known)
    if not found:
        raise RequestError(
            f"{option}: must have bits that {target} computes with ({', '.join(map(str, known))}), "
            f"got {', '.join(map(str, asked))}"
        )
    return found


def make_plan(
    quant: QuantConfig,
    limits: Limits,
    *,
    search_method: str,
    search: SearchConfig,
    train: TrainConfig | None,
    policy: Path | None = None,
) -> Plan:
    """Check the options of a run and gather them.

    Raises:
        RequestError: no budget (or a budget and a policy), or an unknown method.
    """
    plugins.load("sdq.search_methods", search_method)
    if policy is None:
        return Plan(quant, limits.budget(), search_method, search, train, None, limits.target)
    given = (limits.bits, limits.weight_kb, limits.bops_g, limits.latency_ms)
    if any(v is not None for v in given):
        raise RequestError("--policy: must stand without a budget, got both; drop one")
    return Plan(quant, None, search_method, search, train, str(policy), limits.target)


@dataclass(frozen=True)
class Source:
    """A float network and what is known of it."""

    network: nn.Module
    described: dict[str, Any]
    inputs: inp.Inputs


def open_source(
    model: str | None, weights: Path | None, from_: Path | None, request: inp.DataRequest
) -> Source:
    """Open the float network named by ``--from``, or by ``--model`` and ``--weights``."""
    if (from_ is None) == (model is None):
        got = "neither" if from_ is None else "both"
        raise RequestError(
            f"network: must be named by --from RUN or by --model M --weights F, got {got}"
        )
    if from_ is not None:
        if weights is not None:
            raise RequestError("--weights: must go with --model, got --from as well; drop one")
        run = RunFolder.open(from_)
        inp.check_ended(run)
        document = run.read_json("run.json")
        request = request.like(document["request"]["data"])
        inputs = inp.open_inputs(request, document["data"])
        return Source(inp.load_float(run), document["model"], inputs)
    assert model is not None
    if weights is None:
        raise RequestError(
            "--weights: must name the float weights of --model; train some with `sdq train`"
        )
    described = inp.describe_model(model)
    inputs = inp.open_inputs(request)
    return Source(inp.load_float_file(model, weights, inputs), described, inputs)


def find_policy(
    qmodel: QuantModel, source: Source, plan: Plan, run: RunFolder, fabric: "Fabric", watch: Watch
) -> BitwidthPolicy:
    """Return the policy: given, already found, or found now."""
    if (run.path / "policy.json").exists():
        return BitwidthPolicy.load(run.path / "policy.json")
    if plan.given_policy is not None:
        policy = BitwidthPolicy.load(Path(plan.given_policy))
    else:
        assert plan.budget is not None
        document = run.read_json("run.json")
        identity = {"request": document["request"], "data": document["data"]["fingerprint"]}
        policy = search(
            qmodel, source.inputs.train, budget=plan.budget, teacher=source.network,
            config=plan.search, method=plan.method, fabric=fabric, watch=watch,
            checkpoint=run.checkpoint("search", identity),
        )  # fmt: skip
    apply_policy_(copy.deepcopy(qmodel), policy)  # raises if it does not fit the network
    run.write_text("policy.json", policy.to_json())
    return policy


def prepare(source: Source, plan: Plan) -> QuantModel:
    """Quantize and calibrate the source's network, and check that the budget can be met."""
    network, inputs = source.network, source.inputs
    inp.check_logits(network, inputs.sample, len(inputs.splits.class_names))
    qmodel = quantize_model(network, plan.quant, sample=inputs.sample)
    if plan.budget is not None:
        space = SearchSpace.of(qmodel, plan.search.granularity)
        check_reachable(plan.budget.constraints(space))
    if plan.given_policy is not None:
        apply_policy_(copy.deepcopy(qmodel), BitwidthPolicy.load(Path(plan.given_policy)))
    calibrate_(qmodel, inputs.plain(inputs.splits.train))
    return qmodel


def start(run: RunFolder, source: Source, plan: Plan, qmodel: QuantModel, seed: int) -> None:
    """Write what a run knows at its start."""
    run.update(
        data=source.inputs.describe(), model=source.described, seed=seed,
        quant=plan.quant.model_dump(),
    )  # fmt: skip
    run.write_tensors("float.safetensors", source.network.state_dict())
    run.write_layers(qmodel.layers)


def run_quantize(
    run: RunFolder,
    source: Source,
    plan: Plan,
    qmodel: QuantModel,
    fabric: "Fabric",
    watch: Watch,
    seed: int,
) -> dict[str, Any]:
    """Do all of ``sdq quantize`` in an open run folder and return the metrics.

    ``qmodel`` is what :func:`prepare` returned; it is changed.
    """
    start(run, source, plan, qmodel, seed)
    policy = find_policy(qmodel, source, plan, run, fabric, watch)
    apply_policy_(qmodel, policy)
    if not qmodel.calibrated:  # activations whose bits were learned have new quantizers
        calibrate_(qmodel, source.inputs.plain(source.inputs.splits.train))
    document = run.read_json("run.json")
    identity = {
        "request": document["request"],
        "data": document["data"]["fingerprint"],
        "policy": policy.to_json(),
    }
    finetune_(
        qmodel, source.inputs.train, teacher=source.network, config=plan.train, fabric=fabric,
        checkpoint=run.checkpoint("finetune", identity), watch=watch,
    )  # fmt: skip
    qmodel.cpu()
    run.write_tensors("model.safetensors", qmodel.state_dict())
    metrics = measure(qmodel, source)
    run.write_json("metrics.json", metrics)
    run.update(status="done")
    return metrics


def measure(qmodel: QuantModel, source: Source) -> dict[str, Any]:
    """Return the contents of ``metrics.json``."""
    held_out = source.inputs.held_out()
    float_logits, labels = predict(source.network.cpu(), held_out)
    logits, _ = predict(qmodel, held_out)
    policy = qmodel.policy
    return {
        "float": classification_metrics(float_logits, labels),
        "quantized": classification_metrics(logits, labels),
        "agreement": agreement(logits, float_logits),
        "avg_weight_bits": policy.avg_weight_bits,
        "avg_weight_bits_all": policy.avg_weight_bits_all,
        "weight_bytes": policy.weight_bytes,
        "bops": hw.total_bops(qmodel.layers, policy),
    }


def rows(metrics: dict[str, Any], float_bytes: float) -> list[dict[str, object]]:
    """Return the table of a quantized run: float above, quantized below."""
    return [
        {**summary("float", metrics["float"]), "bits": 32.0, "weight bytes": float_bytes},
        {
            **summary("quantized", metrics["quantized"]),
            "bits": metrics["avg_weight_bits"],
            "weight bytes": metrics["weight_bytes"],
        },
    ]


def quantize(
    data: options.Data,
    out: options.Out,
    model: options.Model = None,
    weights: options.Weights = None,
    from_: options.From = None,
    bits: options.Bits = None,
    weight_kb: options.WeightKb = None,
    bops_g: options.BopsG = None,
    policy: Annotated[
        Path | None, typer.Option(help="A policy.json to use instead of a search.")
    ] = None,
    target: options.Target = None,
    latency_ms: options.LatencyMs = None,
    choices: options.Choices = "1,2,3,4,6,8",
    granularity: options.Granularity = "layer",
    act_bits: options.ActBits = 4,
    learn_act_bits: options.LearnActBits = False,
    act_choices: options.ActChoices = "2,3,4,6,8",
    first_last_bits: options.FirstLastBits = 8,
    pin: options.Pin = None,
    layer_choices: options.LayerChoices = None,
    weight_scale: options.WeightScale = "per_channel",
    scale: options.Scale = "float",
    weight_quantizer: options.WeightQuantizer = "lsq",
    search_method: options.SearchMethod = "sdq",
    search_epochs: options.SearchEpochs = 4,
    epochs: Annotated[int, typer.Option(min=0, help="Passes of fine-tuning (phase 2).")] = 12,
    lr: Annotated[
        float, typer.Option(callback=options.finite, help="Peak learning rate of fine-tuning.")
    ] = 1e-3,
    bin_weight: Annotated[
        float, typer.Option(callback=options.finite, help="lambda_E of bin regularization.")
    ] = 0.1,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    split: options.Split = "0.7,0.1,0.2",
    augment: options.Augment = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    resume: options.Resume = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Learn a bitwidth for each layer within a budget, fine-tune, and measure.

    Example: `sdq quantize --from f --data dermamnist --data-root DIR --bits 2.0 --out q`
    """
    tuning = TrainConfig(epochs=epochs, lr=lr, bin_weight=bin_weight, seed=seed)
    quant = make_quant_config(
        choices=choices, act_bits=act_bits, act_choices=act_choices,
        learn_act_bits=learn_act_bits, first_last_bits=first_last_bits, pin=pin,
        layer_choices=layer_choices, weight_scale=weight_scale, scale=scale,
        weight_quantizer=weight_quantizer,         granularity=granularity, target=target,
    )  # fmt: skip
    limits = Limits(
        bits, weight_kb, bops_g, latency_ms, target, float(act_bits) if learn_act_bits else None
    )
    searching = SearchConfig(granularity=granularity, epochs=search_epochs, seed=seed)
    plan = make_plan(
        quant, limits, search_method=search_method, search=searching, train=tuning, policy=policy
    )
    fabric = inp.open_device(device)
    request = inp.DataRequest(
        data, str(data_root) if data_root else None, image_size, mean, std, split, batch_size,
        seed, augment,
    )  # fmt: skip
    check_new(out, resume=resume)
    source = open_source(model, weights, from_, request)
    asked = asked_for("quantize", model, weights, from_, source.inputs.request, plan)
    qmodel = prepare(
        source, plan
    )  # whatever is wrong with the request shows before a folder is made
    with RunFolder.create(out, asked, resume=resume) as run, Watch(run, quiet=quiet) as watch:
        metrics = run_quantize(run, source, plan, qmodel, fabric, watch, seed)
    weights_count = sum(b.num_weights for b in BitwidthPolicy.load(out / "policy.json"))
    show_table(f"{data}: {out}", rows(metrics, 4.0 * weights_count), quiet=quiet)
    if json_:
        show_json({"out": str(out), "metrics": metrics})


def asked_for(
    verb: str,
    model: str | None,
    weights: Path | None,
    from_: Path | None,
    request: inp.DataRequest,
    plan: Plan,
) -> dict[str, Any]:
    """Return the request as ``run.json`` keeps it."""
    return {
        "verb": verb,
        "model": model,
        "weights": str(weights) if weights else None,
        "from": str(from_) if from_ else None,
        "data": vars(request),
        **plan.to_json(),
    }
