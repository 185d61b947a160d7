"""``sdq search``: phase 1 only."""

from sdq.cli import options, processes
from sdq.cli.option_groups import (
    BudgetOptions,
    ImageOptions,
    PlaceOptions,
    QuantOptions,
    RunOptions,
    SourceOptions,
)
from sdq.cli.plan import ConfigFile, Limits, make_plan, make_quantization
from sdq.cli.plotting import draw_plots
from sdq.cli.progress import Watch, show_json, show_table
from sdq.cli.quantize import (
    asked_for,
    find_policy,
    open_source,
    prepare,
    start,
)
from sdq.cli.report import write_report
from sdq.config import SearchConfig
from sdq.run_folder import check_new


def search(
    data: options.Data,
    out: options.Out,
    source: SourceOptions = SourceOptions(),
    budget: BudgetOptions = BudgetOptions(),
    quantization: QuantOptions = QuantOptions(),
    batch_norm: options.BatchNorm = "train",
    search_method: options.SearchMethod = "sdq",
    search_epochs: options.SearchEpochs = 4,
    config: options.ConfigPath = None,
    images: ImageOptions = ImageOptions(),
    place: PlaceOptions = PlaceOptions(),
    plots: options.Plots = True,
    ending: RunOptions = RunOptions(),
) -> None:
    """Learn a bitwidth for each layer within a budget, and write policy.json.

    Example: `sdq search --from f --data dermamnist --data-root DIR --bits 2.0 --out s`
    """
    file = ConfigFile.read(config, "quant", "search")
    quant, limits = make_quantization(file, Limits.of(budget), quantization, batch_norm)
    searching = SearchConfig(
        granularity=quantization.granularity, epochs=search_epochs, seed=images.seed
    )
    searching = file.changed("search", searching)
    plan = make_plan(
        quant, limits, search_method=search_method, search=searching, train=None,
        prepared_for=quantization.for_,
    )  # fmt: skip
    fabric = place.fabric()
    request = images.request(data)
    check_new(out, resume=ending.resume)
    opened = open_source(source, request)
    qmodel = prepare(opened, plan)
    asked = asked_for("search", source, opened.inputs.request, plan) | place.asked()
    run = processes.begin(fabric, out, asked, resume=ending.resume)
    ending = ending.of_process(fabric)
    with run, Watch(run, quiet=ending.quiet) as watch:
        start(run, opened, plan, qmodel, images.seed)
        fabric.barrier()  # the others read what the first one wrote
        policy = find_policy(qmodel, opened, plan, run, fabric, watch)
        run.update(status="done")
        processes.end(fabric)
        draw_plots(run, wanted=plots and fabric.is_global_zero)
        write_report(run, opened.inputs, wanted=ending.report)
    rows = [
        {"layer": b.name, "weights": b.num_weights,
         "weight bits": round(b.total_weight_bits / b.num_weights, 4),
         "act bits": b.act_bits, "searched": "yes" if b.searched else "no"}
        for b in policy
    ]  # fmt: skip
    show_table(f"average weight bits {policy.avg_weight_bits:.4f}", rows, quiet=ending.quiet)
    if ending.json_:
        show_json(
            {
                "out": str(out),
                "avg_weight_bits": policy.avg_weight_bits,
                "avg_weight_bits_all": policy.avg_weight_bits_all,
                "weight_bits": {b.name: b.weight_bits for b in policy},
            }
        )
