"""``sdq search``: phase 1 only."""

from sdq.cli import inputs as inp
from sdq.cli import options, processes
from sdq.cli.device import DeviceRequest
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
from sdq.parallel import open_fabric
from sdq.run_folder import check_new


def search(
    data: options.Data,
    out: options.Out,
    model: options.Model = None,
    weights: options.Weights = None,
    from_: options.From = None,
    bits: options.Bits = None,
    weight_kb: options.WeightKb = None,
    bops_g: options.BopsG = None,
    target: options.Target = None,
    latency_ms: options.LatencyMs = None,
    fps: options.Fps = None,
    budget: options.ResourceBudget = None,
    choices: options.Choices = "1,2,3,4,6,8",
    granularity: options.Granularity = "layer",
    act_bits: options.ActBits = 4,
    learn_act_bits: options.LearnActBits = False,
    act_choices: options.ActChoices = "2,3,4,6,8",
    first_last_bits: options.FirstLastBits = 8,
    pin: options.Pin = None,
    skip: options.Skip = None,
    layer_choices: options.LayerChoices = None,
    batch_norm: options.BatchNorm = "train",
    integer_datapath: options.IntegerDatapath = False,
    integer_bias: options.IntegerBias = False,
    weight_scale: options.WeightScale = "per_channel",
    scale: options.Scale = "float",
    weight_quantizer: options.WeightQuantizer = "lsq",
    search_method: options.SearchMethod = "sdq",
    search_epochs: options.SearchEpochs = 4,
    for_: options.For = None,
    config: options.ConfigPath = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    split: options.Split = "0.7,0.1,0.2",
    augment: options.Augment = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    devices: options.Devices = 1,
    precision: options.Precision = "32",
    plots: options.Plots = True,
    report: options.Report = True,
    resume: options.Resume = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Learn a bitwidth for each layer within a budget, and write policy.json.

    Example: `sdq search --from f --data dermamnist --data-root DIR --bits 2.0 --out s`
    """
    file = ConfigFile.read(config, "quant", "search")
    limits = Limits(bits, weight_kb, bops_g, DeviceRequest.of(target, latency_ms, fps, budget))
    quant, limits = make_quantization(
        file, limits, choices=choices, act_bits=act_bits, act_choices=act_choices,
        learn_act_bits=learn_act_bits, first_last_bits=first_last_bits, pin=pin,
        skip=skip, layer_choices=layer_choices, batch_norm=batch_norm,
        integer_datapath=integer_datapath, integer_bias=integer_bias, weight_scale=weight_scale,
        scale=scale, weight_quantizer=weight_quantizer, prepared_for=for_,
    )  # fmt: skip
    searching = SearchConfig(granularity=granularity, epochs=search_epochs, seed=seed)
    searching = file.changed("search", searching)
    plan = make_plan(
        quant, limits, search_method=search_method, search=searching, train=None, prepared_for=for_
    )
    fabric = open_fabric(device, devices, precision)
    request = inp.DataRequest(
        data, str(data_root) if data_root else None, image_size, mean, std, split, batch_size,
        seed, augment,
    )  # fmt: skip
    check_new(out, resume=resume)
    source = open_source(model, weights, from_, request)
    qmodel = prepare(source, plan)
    asked = asked_for("search", model, weights, from_, source.inputs.request, plan)
    asked |= {"devices": devices, "precision": precision}
    run = processes.begin(fabric, out, asked, resume=resume)
    quiet, json_ = quiet or not fabric.is_global_zero, json_ and fabric.is_global_zero
    with run, Watch(run, quiet=quiet) as watch:
        start(run, source, plan, qmodel, seed)
        fabric.barrier()  # the others read what the first one wrote
        policy = find_policy(qmodel, source, plan, run, fabric, watch)
        run.update(status="done")
        processes.end(fabric)
        draw_plots(run, wanted=plots and fabric.is_global_zero)
        write_report(run, source.inputs, wanted=report and fabric.is_global_zero)
    rows = [
        {"layer": b.name, "weights": b.num_weights,
         "weight bits": round(b.total_weight_bits / b.num_weights, 4),
         "act bits": b.act_bits, "searched": "yes" if b.searched else "no"}
        for b in policy
    ]  # fmt: skip
    show_table(f"average weight bits {policy.avg_weight_bits:.4f}", rows, quiet=quiet)
    if json_:
        show_json(
            {
                "out": str(out),
                "avg_weight_bits": policy.avg_weight_bits,
                "avg_weight_bits_all": policy.avg_weight_bits_all,
                "weight_bits": {b.name: b.weight_bits for b in policy},
            }
        )
