"""What can be asked of a search on the command line, each through to policy.json."""

import json

import pytest

import hw
from sdq.policy import BitwidthPolicy
from sdq.run_folder import read_layers


def searched(sdq, files, out, options):
    done = sdq(
        f"search --from {files}/float --data {files}/ok.npz --quiet --json --search-epochs 1 "
        f"{options} --out",
        out,
    )
    assert (done.code, done.err) == (0, ""), done.err
    return BitwidthPolicy.load(out / "policy.json"), json.loads((out / "run.json").read_text())


@pytest.mark.parametrize(
    "method", ["sdq", "interpolate", "hessian", "sensitivity", "greedy", "random", "uniform"]
)
def test_every_method(sdq, files, tmp_path, method):
    policy, run = searched(sdq, files, tmp_path / "s", f"--bits 2.5 --search-method {method}")
    assert policy.avg_weight_bits <= 2.5
    assert run["request"]["search_method"] == method


@pytest.mark.parametrize("granularity", ["network", "block", "channel"])
def test_granularity(sdq, files, tmp_path, granularity):
    policy, run = searched(sdq, files, tmp_path / "s", f"--bits 2 --granularity {granularity}")
    assert policy.avg_weight_bits <= 2.0
    assert run["request"]["search"]["granularity"] == granularity
    assert any(b.channel_bits for b in policy) == (granularity == "channel")


def test_latency_on_a_target(sdq, files, tmp_path):
    whole, _ = searched(sdq, files, tmp_path / "whole", "--bits 8")
    layers = read_layers(tmp_path / "whole" / "layers.json")
    target = hw.target("bit_fusion")
    lowest = whole.with_weight_bits({b.name: 1 for b in whole if b.searched})
    # the first and last layer take most of this network's time
    ends = [target.cost(layers, policy).latency_s * 1e3 for policy in (lowest, whole)]
    limit = sum(ends) / 2
    policy, run = searched(
        sdq, files, tmp_path / "s", f"--target bit_fusion --latency-ms {limit!r}"
    )
    assert target.cost(layers, policy).latency_s * 1e3 <= limit
    assert run["request"]["budget"]["costs"] == {"bit_fusion:latency_s": limit / 1e3}
    done = sdq(f"cost {tmp_path}/s --target bit_fusion --json --quiet")
    assert done.json["total"]["latency_s"] * 1e3 <= limit


def test_learned_activations(sdq, files, tmp_path):
    policy, run = searched(
        sdq, files, tmp_path / "s", "--bits 3 --act-bits 4 --learn-act-bits --act-choices 2,4,8"
    )
    layers = read_layers(tmp_path / "s" / "layers.json")
    pairs = [(s, b) for s, b in zip(layers, policy, strict=True) if b.searched]
    elements = [s.in_shape[0] for s, _ in pairs]
    mean = sum(n * b.act_bits for n, (_, b) in zip(elements, pairs, strict=True)) / sum(elements)
    assert mean <= 4.0
    assert run["request"]["budget"]["avg_act_bits"] == 4.0


def test_learned_activations_of_a_configuration_file(sdq, files, tmp_path):
    options = f"--bits 3 --config {files}/acts.json"
    policy, run = searched(sdq, files, tmp_path / "s", options)
    assert run["request"]["budget"]["avg_act_bits"] == 3.0
    assert {b.act_bits for b in policy if b.searched} <= {2, 4, 8}


def test_pins_and_choices(sdq, files, tmp_path):
    policy, _ = searched(
        sdq, files, tmp_path / "s", "--bits 2 --pin layers.4=6 --layer-choices layers.7=1,2"
    )
    by_name = {b.name: b for b in policy}
    names = list(by_name)
    assert len(names) == 4, names
    middle = names[1:-1]
    assert (by_name[middle[0]].weight_bits, by_name[middle[0]].searched) == (6, False)
    assert by_name[middle[1]].weight_bits in (1, 2)


def test_a_configuration_file(sdq, files, tmp_path):
    out = tmp_path / "q"
    done = sdq(
        f"quantize --from {files}/float --data {files}/ok.npz --quiet --search-epochs 1 --epochs 1 "
        f"--bits 2 --config {files}/good.json --out",
        out,
    )
    assert (done.code, done.err) == (0, ""), done.err
    request = json.loads((out / "run.json").read_text())["request"]
    assert (request["quant"]["act_bits"], request["quant"]["input_bits"]) == (8, 6)
    assert (request["search"]["regularizer"], request["search"]["end_temperature"]) == ("cost", 0.5)
    assert (request["search"]["epochs"], request["train"]["warmup"]) == (1, 0.2)
    assert BitwidthPolicy.load(out / "policy.json").layers[0].act_bits == 6
