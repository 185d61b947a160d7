"""``sdq quantize``: learn the bitwidths, fine-tune, measure."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from torch import nn

import hw
from export.preparation import check_prepared
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.cli import inputs as inp
from sdq.cli import options, processes
from sdq.cli.device import layers_on_target
from sdq.cli.option_groups import (
    BudgetOptions,
    ImageOptions,
    PlaceOptions,
    QuantOptions,
    RunOptions,
    SourceOptions,
    TrainingOptions,
)
from sdq.cli.plan import ConfigFile, Limits, Plan, make_plan, make_quantization
from sdq.cli.plotting import draw_plots
from sdq.cli.progress import Watch, show_json, show_table
from sdq.cli.ptq import make_ptq, method_of, round_, search_of, unlabelled
from sdq.cli.report import write_report
from sdq.cli.teacher import TeacherRequest, open_teacher
from sdq.cli.train import summary
from sdq.config import PtqConfig, SearchConfig
from sdq.data import check_masks
from sdq.errors import RequestError
from sdq.finetune import finetune_
from sdq.metrics import predict
from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.ptq import check_ptq
from sdq.quant_model import QuantModel
from sdq.quant_model import quantize as quantize_model
from sdq.report.predictions import Predictions
from sdq.run_document import held_out
from sdq.run_folder import RunFolder, check_new
from sdq.search import check_search, search
from sdq.search_space import SearchSpace
from sdq.task import task_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from sdq.train import Loader


@dataclass(frozen=True)
class Source:
    """A float network and what is known of it."""

    network: nn.Module
    described: dict[str, Any]
    inputs: inp.Inputs
    held_out: bool = False
    """Whether it is known not to have been trained on the images that are measured on."""


def open_source(asked: SourceOptions, request: inp.DataRequest) -> Source:
    """Open the float network named by ``--from``, or by ``--model`` and ``--weights``.

    Raises:
        RequestError: it is named by neither or by both, or network, weights and data do not fit.
    """
    model, weights, from_ = asked.model, asked.weights, asked.from_
    if (from_ is None) == (model is None):
        got = "neither" if from_ is None else "both"
        raise RequestError(
            f"network: must be named by --from RUN or by --model M --weights F, got {got}"
        )
    if from_ is not None:
        if weights is not None:
            raise RequestError("--weights: must go with --model, got --from as well; drop one")
        return open_from(from_, request)
    assert model is not None
    if weights is None:
        raise RequestError(
            "--weights: must name the float weights of --model; train some with `sdq train`"
        )
    described = inp.describe_model(model)
    inputs = inp.open_inputs(request).for_model(model)
    return Source(inp.load_float_file(model, weights, inputs), described, inputs)


def open_from(run_folder: Path, request: inp.DataRequest) -> Source:
    """Open the float network of a run, and data divided as they were there."""
    run = RunFolder.open(run_folder)
    inp.check_ended(run)
    document = run.read_json("run.json")
    before = inp.DataRequest.recorded(run)
    own = inp.same_data(before.reference, request.reference)
    if options.given("split") and own and request.split != before.split:
        raise inp.other_division("--split", request.reference, run_folder)
    inputs = inp.open_inputs(request.like(before), document["data"])
    same = inputs.describe()["fingerprint"] == document["data"]["fingerprint"]
    return Source(inp.load_float(run), document["model"], inputs, same and held_out(document))


def training_data(source: Source, plan: Plan) -> "Loader":
    """Return what bits are learned from: the training set, or with ``--ptq`` images alone."""
    if plan.ptq is None:
        return source.inputs.train
    return unlabelled(source.network, source.inputs, plan.ptq)


def calibration_data(source: Source, plan: Plan) -> "Loader":
    """Return what the scales of activations are taken from."""
    return source.inputs.calibration() if plan.ptq is None else training_data(source, plan)


def find_policy(
    qmodel: QuantModel, source: Source, plan: Plan, run: RunFolder, fabric: "Fabric", watch: Watch
) -> BitwidthPolicy:
    """Return the policy: given, already found, or found now.

    With ``plan.search.keep_weights`` the model has the search's weights then.
    """
    # a search whose weights count is done again: from its checkpoint it is at its end at once
    if (run.path / "policy.json").exists() and not plan.search.keep_weights:
        return run.read_policy()
    if plan.given_policy is not None:
        policy = BitwidthPolicy.load(Path(plan.given_policy))
    else:
        assert plan.limits is not None
        budget = plan.limits.budget(SearchSpace.of(qmodel, plan.search.granularity))
        document = run.read_json("run.json")
        identity = {"request": document["request"], "data": document["data"]["fingerprint"]}
        policy = search(
            qmodel, training_data(source, plan), budget=budget, teacher=source.network,
            config=plan.search, method=plan.method, fabric=fabric, watch=watch,
            checkpoint=run.checkpoint("search", identity),
        )  # fmt: skip
    apply_policy_(copy.deepcopy(qmodel), policy)  # raises if it does not fit the network
    run.write_policy(policy)
    return policy


def prepare(source: Source, plan: Plan) -> QuantModel:
    """Quantize and calibrate the source's network, and check that the budget can be met.

    What it is prepared for must be able to take it.
    """
    network, inputs = source.network, source.inputs
    inputs.task.check_logits(network, inputs.sample, len(inputs.splits.class_names))
    if plan.ptq is None and inputs.splits.task == "segmentation":
        check_masks("data: train", inputs.splits.train, len(inputs.splits.class_names))
    qmodel = quantize_model(network, plan.quant, sample=inputs.sample)
    if plan.target is not None:
        legal = layers_on_target(qmodel, plan.target)
        if legal != plan.quant:
            qmodel = quantize_model(network, legal, sample=inputs.sample)
    if plan.prepared_for is not None:  # before hours of training, not after
        check_prepared(plan.prepared_for, qmodel, inputs.sample)
    if plan.limits is not None:
        space = SearchSpace.of(qmodel, plan.search.granularity)
        check_search(qmodel, plan.limits.budget(space), plan.search, plan.method)
    if plan.given_policy is not None:
        apply_policy_(copy.deepcopy(qmodel), BitwidthPolicy.load(Path(plan.given_policy)))
    if plan.ptq is not None:
        check_ptq(qmodel, plan.ptq)
    calibrate_(qmodel, calibration_data(source, plan))
    return qmodel


def start(run: RunFolder, source: Source, plan: Plan, qmodel: QuantModel, seed: int) -> None:
    """Write what a run knows at its start."""
    run.update(
        data=source.inputs.describe(), model=source.described, seed=seed, held_out=source.held_out,
        quant=qmodel.config.model_dump(), command=options.command_line(),
    )  # fmt: skip
    run.write_tensors("float.safetensors", source.network.state_dict())
    if plan.quant.batch_norm == "fold":  # what training starts from, which the plots compare with
        names = [b.name for b in qmodel.policy if b.weight_bits != FLOAT_BITS]
        run.write_tensors(
            "folded.safetensors", {f"{name}.weight": qmodel.weight(name) for name in names}
        )
    run.write_layers(qmodel.layers)


def run_quantize(
    run: RunFolder,
    source: Source,
    plan: Plan,
    qmodel: QuantModel,
    fabric: "Fabric",
    watch: Watch,
    seed: int,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Do all of ``sdq quantize`` in an open run folder and return the metrics.

    ``qmodel`` is what :func:`prepare` returned; it is changed. ``teacher`` is that of phase 2; None
    is the float network itself. In phase 1 it is always that: what a bit is worth shows where the
    labels ask for nothing that the float network does not already give.
    """
    start(run, source, plan, qmodel, seed)
    fabric.barrier()  # the other processes read what the first one wrote
    policy = find_policy(qmodel, source, plan, run, fabric, watch)
    apply_policy_(qmodel, policy)
    if not qmodel.calibrated:  # activations whose bits were learned have new quantizers
        calibrate_(qmodel, calibration_data(source, plan))
    if plan.ptq is not None:
        # not checkpointed: it takes minutes, and ends the same when it is done again
        found = round_(qmodel, source.inputs, plan.ptq, fabric, watch)
        return finish(run, source, qmodel, found)
    document = run.read_json("run.json")
    identity = {
        "request": document["request"],
        "data": document["data"]["fingerprint"],
        "policy": policy.to_json(),
    }
    trained = finetune_(
        qmodel, source.inputs.train, teacher=teacher or source.network, config=plan.train,
        validation=source.inputs.validation, fabric=fabric,
        checkpoint=run.checkpoint("finetune", identity), watch=watch,
    )  # fmt: skip
    return finish(run, source, qmodel, trained.to_json())


def finish(
    run: RunFolder, source: Source, qmodel: QuantModel, found: dict[str, Any]
) -> dict[str, Any]:
    """Write the network and what it is worth, and return the metrics."""
    qmodel.cpu()
    run.write_tensors("model.safetensors", qmodel.state_dict())
    metrics = {**measure(qmodel, source, run), **found}
    run.write_json("metrics.json", metrics)
    run.update(status="done")
    return metrics


def measure(qmodel: QuantModel, source: Source, run: RunFolder) -> dict[str, Any]:
    """Write the predictions, and return the contents of ``metrics.json``."""
    held_out = source.inputs.held_out()
    float_logits, labels = predict(source.network.cpu(), held_out)
    logits, _ = predict(qmodel, held_out)
    Predictions(labels, float_logits, logits).save(run)
    task = task_of(logits)
    return {
        "float": task.metrics(float_logits, labels),
        "quantized": task.metrics(logits, labels),
        "agreement": task.agreement(logits, float_logits),
        **sizes(qmodel),
    }


def sizes(qmodel: QuantModel) -> dict[str, Any]:
    """Return the figures of ``metrics.json`` that need no images."""
    policy = qmodel.policy
    return {**policy.figures(), "bops": hw.total_bops(qmodel.layers, policy)}


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
    source: SourceOptions = SourceOptions(),
    budget: BudgetOptions = BudgetOptions(),
    policy: Annotated[
        Path | None, typer.Option(help="A policy.json to use instead of a search.")
    ] = None,
    quantization: QuantOptions = QuantOptions(),
    batch_norm: options.BatchNorm = "train",
    search_method: options.SearchMethod = "sdq",
    search_epochs: options.SearchEpochs = 4,
    keep_weights: Annotated[
        bool, typer.Option(help="Fine-tune from the search's weights, or from the float ones.")
    ] = SearchConfig().keep_weights,
    config: options.ConfigPath = None,
    epochs: Annotated[int, typer.Option(min=0, help="Passes of fine-tuning (phase 2).")] = 12,
    lr: Annotated[
        float, typer.Option(callback=options.finite, help="Peak learning rate of fine-tuning.")
    ] = 1e-3,
    training: TrainingOptions = TrainingOptions(),
    bin_weight: Annotated[
        float, typer.Option(callback=options.finite, help="lambda_E of bin regularization.")
    ] = options.TRAINING.bin_weight,
    bin_reduction: Annotated[
        Literal["mean", "sum"], typer.Option(help="Over a layer's bins; the paper has the sum.")
    ] = "mean",
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of `sdq train` whose network teaches phase 2; "
            "default: the float network itself."
        ),
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="As --model, of a teacher without a run folder.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Of --teacher-model.")] = None,
    distill: Annotated[
        bool, typer.Option(help="Learn the teacher's soft labels in phase 2, or the data's own.")
    ] = True,
    ptq: options.Ptq = False,
    ptq_images: options.PtqImages = PtqConfig().images,
    ptq_steps: options.PtqSteps = PtqConfig().steps,
    images: ImageOptions = ImageOptions(),
    place: PlaceOptions = PlaceOptions(),
    plots: options.Plots = True,
    ending: RunOptions = RunOptions(),
) -> None:
    """Learn a bitwidth for each layer within a budget, fine-tune, and measure.

    Examples:
    - Two bits a weight:
      `sdq quantize --from f --data dermamnist --data-root DIR --bits 2.0 --out q`

    - As fast as a device has to be:
      `sdq quantize --from f --data own.npz --target bit_fusion --latency-ms 0.5 --out q`

    - No training, no labels:
      `sdq quantize --from f --data own.npz --bits 4 --act-bits 8 --ptq --out q`
    """
    file = ConfigFile.read(config, "quant", "search", "ptq" if ptq else "train")
    after_training = make_ptq(ptq, ptq_images, ptq_steps, images.seed)
    if after_training is not None:
        after_training = file.changed("ptq", after_training)
    tuning = training.config(
        epochs=epochs, lr=lr, bin_weight=bin_weight, bin_reduction=bin_reduction, distill=distill,
        seed=images.seed,
    )  # fmt: skip
    tuning = file.changed("train", tuning)
    asked_teacher = TeacherRequest.of(teacher, teacher_model, teacher_weights, distill=distill)
    quant, limits = make_quantization(file, Limits.of(budget), quantization, batch_norm)
    searching = SearchConfig(
        granularity=quantization.granularity, epochs=search_epochs, seed=images.seed,
        keep_weights=keep_weights,
    )  # fmt: skip
    if after_training is not None:
        searching = search_of(searching)
    searching = file.changed("search", searching)
    if after_training is not None:
        learned = quant.act_choices is not None
        search_method = method_of(searching, search_method, learn_act_bits=learned)
    plan = make_plan(
        quant,
        limits,
        search_method=search_method,
        search=searching,
        train=tuning if after_training is None else None,
        policy=policy,
        teacher=asked_teacher if after_training is None else None,
        ptq=after_training,
        prepared_for=quantization.for_,
    )
    fabric = place.fabric()
    request = images.request(data)
    check_new(out, resume=ending.resume)
    opened = open_source(source, request)
    asked = asked_for("quantize", source, opened.inputs.request, plan) | place.asked()
    # whatever is wrong with the request shows before a folder is made
    opened.inputs.held_out()
    if plan.train is not None:
        opened.inputs.task.selection(plan.train.select)
    network = open_teacher(plan.teacher, opened.inputs) if plan.teacher else None
    qmodel = prepare(opened, plan)
    run = processes.begin(fabric, out, asked, resume=ending.resume)
    ending = ending.of_process(fabric)
    with run, Watch(run, quiet=ending.quiet) as watch:
        metrics = run_quantize(run, opened, plan, qmodel, fabric, watch, images.seed, network)
        processes.end(fabric)
        draw_plots(run, wanted=plots and fabric.is_global_zero)
        write_report(run, opened.inputs, wanted=ending.report)
    weights_count = sum(b.num_weights for b in BitwidthPolicy.load(out / "policy.json"))
    show_table(f"{data}: {out}", rows(metrics, 4.0 * weights_count), quiet=ending.quiet)
    if metrics["float_layers"] and not ending.quiet:
        print(f"left in float: {', '.join(metrics['float_layers'])}")
    if ending.json_:
        show_json({"out": str(out), "metrics": metrics})


def asked_for(
    verb: str, source: SourceOptions, request: inp.DataRequest, plan: Plan
) -> dict[str, Any]:
    """Return the request as ``run.json`` keeps it."""
    return {"verb": verb, **source.asked(), "data": vars(request), **plan.to_json()}
