"""Requests that are wrong: exit code 2, one sentence, nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq.run_folder import RunFolder

TRAIN = "train --model mlp --data {f}/ok.npz --epochs 1"
QUANTIZE = "quantize --from {f}/float --data {f}/ok.npz --search-epochs 1 --epochs 1"
POST = "quantize --from {f}/float --data {f}/ok.npz --ptq"
SEARCH = "search --from {f}/float --data {f}/ok.npz --search-epochs 1"


def _both(options: str, expected: str) -> list[tuple[str, str]]:
    return [(f"{verb} {options}", expected) for verb in (QUANTIZE, SEARCH)]


NAMES = [
    ("trian", "unknown verb 'trian'; did you mean 'train'?"),
    (
        "xyz",
        "Known: compare, cost, demo, evaluate, export, federate, list, quantize, report, search, ",
    ),
    ("--jsno", "No such option '--jsno'"),
    ("list model", "did you mean 'models'? Known: datasets, formats, methods, models"),
    ("list", "Missing argument 'KIND'"),
    ("train --model mpl --data synthetic_derm", "did you mean 'mlp'? Known: densenet121, "),
    ("train --model mlp --data synthetic_drm", "did you mean 'synthetic_derm'?"),
    ("train --model models.py --data {f}/ok.npz", "give models.py:function"),
    ("quantize --model mpl --weights w --data synthetic_derm --bits 2", "did you mean 'mlp'?"),
    ("evaluate --model mpl --weights w --data {f}/ok.npz", "did you mean 'mlp'?"),
    (f"{TRAIN} --epoch 2", "Did you mean one of: '--epochs', '--report'?"),
    (f"{QUANTIZE} --bit 2", "Did you mean one of: '--bits'"),
    ("export {f}/quantized --format onxn", "did you mean 'onnx'? Known: "),
    ("cost {f}/quantized --target bitfusion", "did you mean 'bit_fusion'?"),
    (
        f"{SEARCH} --bits 2 --search-method sqd",
        "search_method: unknown name 'sqd'; did you mean 'sdq'?",
    ),
    (f"{SEARCH} --bits 2 --weight-quantizer lqs", "not one of 'lsq', 'dorefa', 'entropy'"),
    (f"{TRAIN} --optimizer adam", "not one of 'adamw', 'sgd'"),
    (f"{TRAIN} --device tpu", "--device: must be auto, cpu or cuda, got 'tpu'"),
    ("train --model mlp --data nowhere.npz", "nowhere.npz: no such file"),
    ("train --model mlp --data dermamnist --data-root nowhere", "no file 'nowhere/dermamnist.npz'"),
]

NUMBERS = [
    (f"{TRAIN} --epochs 0", "0 is not in the range x>=1"),
    (f"{TRAIN} --epochs two", "'two' is not a valid integer"),
    (f"{TRAIN} --lr -1", "lr: input should be greater than 0, got -1.0"),
    (f"{TRAIN} --lr inf", "--lr: must be a finite number, got inf"),
    (f"{TRAIN} --weight-decay nan", "--weight-decay: must be a finite number, got nan"),
    (f"{TRAIN} --batch-size 0", "--batch-size"),
    (f"{TRAIN} --seed -1", "--seed"),
    (f"{TRAIN} --image-size 3", "--image-size"),
    (f"{QUANTIZE} --bits 2 --bin-weight=-inf", "--bin-weight: must be a finite number, got -inf"),
    (f"{QUANTIZE} --bits 2 --lr nan", "--lr: must be a finite number, got nan"),
    (f"{QUANTIZE} --bits 2 --epochs -1", "-1 is not in the range x>=0"),
    (f"{TRAIN} --mean 0.5", "--mean, --std: must be given together"),
    (f"{TRAIN} --std 0.5", "--mean, --std: must be given together"),
    (f"{TRAIN} --mean 0.5,0.5 --std 0.2", "one value or one a channel (3), got 2"),
    (f"{TRAIN} --mean a --std b", "--mean: must be numbers separated by commas, got 'a'"),
    (f"{TRAIN} --mean nan --std 0.2", "--mean: must be finite numbers, got 'nan'"),
    (f"{TRAIN} --mean 0.5 --std inf", "--std: must be finite numbers, got 'inf'"),
    (f"{TRAIN} --mean 0.5 --std 0", "std be positive, got"),
    (f"{TRAIN} --split a", "--split: must be numbers separated by commas, got 'a'"),
    (f"{TRAIN} --split 0.5,0.5", "--split: must be three shares of train, val, test"),
    (f"{TRAIN} --split 0,0.5,0.5", "--split: must be three shares"),
    (f"{TRAIN} --split inf,1,1", "--split: must be finite numbers, got 'inf,1,1'"),
    *_both("", "budget: must be given; pass --bits 2.0, --weight-kb, --bops-g, or --target"),
    *_both("--bits 0", "must be a positive number, got 0.0"),
    *_both("--bits -1", "must be a positive number, got -1.0"),
    *_both("--bits nan", "must be a positive number, got nan"),
    *_both("--bits inf", "must be a positive number, got inf"),
    *_both("--bits 0.5", "(reachable 1 to 8), got 0.5; raise the budget"),
    *_both("--weight-kb 1", "weight bytes must be at least 303040"),
    *_both("--weight-kb nan", "must be a positive number, got nan"),
    *_both("--bops-g 1e-9", "bit operations must be at least"),
    *_both("--bits 2 --weight-kb 1", "weight bytes must be at least 303040"),
    *_both("--bits 2 --choices a", "--choices: must be integers separated by commas, got 'a'"),
    *_both("--bits 2 --choices 3,2", "must be ascending bitwidths"),
    *_both("--bits 2 --choices 2,2", "must be ascending bitwidths"),
    *_both("--bits 2 --choices 0,2", "greater than or equal to 1, got 0"),
    *_both("--bits 2 --choices 2,9", "less than or equal to 8, got 9"),
    *_both("--bits 2 --choices 3,4", "(reachable 3 to 4), got 2"),
    *_both("--bits 2 --act-bits 1", "greater than or equal to 2, got 1"),
    *_both("--bits 2 --act-bits 9", "must be at most 8, 16, or 32 for float, got 9"),
    *_both("--bits 2 --act-bits 12", "must be at most 8, 16, or 32 for float, got 12"),
    *_both("--bits 2 --pin layers.1", "--pin: must be 'PATTERN=VALUE', got 'layers.1'"),
    *_both("--bits 2 --pin layers.1=2,4", "--pin: must be 'PATTERN=BITS', got layers.1=2,4"),
    *_both("--bits 2 --pin layers.1=9", "must be 1 to 8 bits, or 32 for float, for 'layers.1'"),
    *_both("--bits 2 --pin nothing=4", "pattern 'nothing' must match a layer, but matches none"),
    *_both("--bits 2 --layer-choices layers.1=a", "--layer-choices: must be integers separated"),
    *_both("--bits 2 --layer-choices layers.*=4,2", "must be ascending bitwidths"),
    *_both("--bits 2 --config nowhere.json", "--config: nowhere.json must be a JSON file"),
    *_both("--bits 2 --config {f}/cut.json", "cut.json must be a JSON file"),
    *_both(
        "--bits 2 --config {f}/part.json", "part.json must here have no parts but quant, search"
    ),
    (
        f"{SEARCH} --bits 2 --config {{f}}/training.json",
        "no parts but quant, search, got ['train']",
    ),
    (f"{POST} --bits 2 --config {{f}}/training.json", "no parts but quant, search, ptq, got"),
    *_both("--bits 2 --config {f}/field.json", "field.json: search: SearchConfig.warmth: must"),
    *_both("--bits 2 --config {f}/value.json", "SearchConfig.temperature: input should be greater"),
    *_both("--bits 2 --config {f}/twice.json --act-bits 4", "quant.act_bits must be given once"),
    *_both("--latency-ms 1", "--latency-ms: must stand with --target"),
    *_both("--latency-ms 1e-9 --target bit_fusion", "latency_s must be at least"),
    *_both("--latency-ms 1 --target bitfusion", "did you mean 'bit_fusion'?"),
    *_both("--bits 2 --learn-act-bits --act-choices 4,9", "bitwidths from 2 to 8, or 16"),
    *_both(
        "--bits 2 --granularity channel --weight-scale per_tensor",
        "search: granularity channel must",
    ),
    *_both("--bits 2 --granularity row", "'row' is not one of 'network', 'block'"),
    *_both("--bits 2 --learn-act-bits --search-method greedy", "chooses weight bitwidths only"),
    *_both("--bits 2 --first-last-bits 9", "must be at most 8, or 32 for float, got 9"),
]

DATA = [
    ("outside.npz", "train labels must be in 0..6, got -1..-1"),
    ("three_names.npz", "class_names must be 7 or more texts"),
    ("no_class_3.npz", "every class must have a training image, got none of 3"),
    ("objects.npz", "must be an array of numbers or text"),
    ("cut.npz", "must be a complete .npz (zip) archive"),
    ("text.npz", "must be a complete .npz (zip) archive"),
    ("float", "no train/CLASS folders and no CSV"),
    ("models.py:number", "must return sdq.data.Splits, got int"),
    ("models.py:nothing", "no function 'nothing'"),
    ("syntax.py:f", "cannot be executed, SyntaxError"),
]

WEIGHTS = [
    ("nowhere.safetensors", "no file"),
    ("float", "no file"),
    ("cut.safetensors", "must be a whole safetensors file"),
    ("text.safetensors", "must be a whole safetensors file"),
    ("pickle.safetensors", "must be a whole safetensors file"),
    ("torch.pth", "must be a whole safetensors file"),
    ("empty.safetensors", "has no 'layers.1.weight' (17 missing, 0 unknown)"),
    ("nan.safetensors", "'layers.1.weight' must be finite, got NaN or infinity"),
]

MODELS = [
    ("nothing", "no function 'nothing'"),
    (
        "needs",
        "parameters must be among num_classes, in_channels, image_size or have defaults, got width",
    ),
    ("number", "must return a torch.nn.Module, got int"),
    ("raises", "must build a network, but: KeyError: 'boom'; mend the function"),
    ("asserts", "must accept images of shape (3, 28, 28) (C, H, W), but: AssertionError"),
    ("tupled", "must return one logit for each of 7 classes, got tuple"),
]

POLICIES = [
    ("newer", "schema must be 'sdq.policy/1', got 'sdq.policy/2'"),
    ("three_layers", "must name the network's 4 layers in order, got 3"),
    ("renamed", "got 4 with 'other'"),
    ("five_bits", "weight_bits must be one of (1, 2, 3, 4, 6, 8), got 5"),
    ("nine_bits", "weight_bits must be 1 to 8, or 32 for float, got 9"),
    ("nan_bits", "weight_bits must be int, got nan"),
    ("pinned", "is pinned at 8 bits, got 4"),
    (
        "other_act",
        "act_bits must be 4, got 8; quantize with the configuration",
    ),
    ("extra", "must have the fields name, weight_bits, act_bits, searched, num_weights"),
    ("cut", "must be JSON"),
    ("binary", "must be JSON in UTF-8"),
    ("deep", "deep nesting"),
    ("nowhere", "no file"),
]

OTHER_DATA = [
    (
        "size20.npz",
        "must be (3, 28, 28) (C, H, W) as in the run, got (3, 20, 20); pass --image-size 28",
    ),
    ("grey.npz", "got (1, 28, 28); give other data"),
    ("five.npz", "must have the run's 7 classes, got 5"),
    ("cut.npz", "must be a complete .npz (zip) archive"),
]

RUNS = [
    ("evaluate", "must have a run folder, or --model, --weights and --data"),
    ("evaluate {f}", "must be a run folder, but has no run.json"),
    ("evaluate {f}/nowhere", "must be a run folder, but has no run.json"),
    ("evaluate {f}/float --model mlp", "a run folder or a --model, got both"),
    ("evaluate {f}/float --image-size 14", "--std, --split, --seed: must go with --data"),
    ("evaluate {f}/searched", "got one of `sdq search`; run `sdq quantize --policy"),
    ("export {f}/nowhere", "must be a run folder"),
    ("export {f}/float", "got one of `sdq train`; run `sdq quantize --from"),
    ("export {f}/searched", "got one of `sdq search`; run `sdq quantize --policy"),
    ("cost {f}/float", "must be a run with a policy.json, got none"),
    ("cost {f}/nowhere", "no file"),
    ("cost {f}/policy_pinned.json", "must have a layers.json of the same layers beside it"),
    ("cost {f}/quantized/run.json", 'must be an object with "schema" and a list "layers"'),
    ("quantize --data {f}/ok.npz --bits 2", "got neither"),
    (f"{QUANTIZE} --model mlp --bits 2", "got both"),
    (f"{QUANTIZE} --weights w --bits 2", "--weights: must go with --model, got --from as well"),
    ("quantize --model mlp --data {f}/ok.npz --bits 2", "--weights: must name the float weights"),
    ("quantize --from {f} --data {f}/ok.npz --bits 2", "must be a run folder"),
    (f"{QUANTIZE} --policy p.json --bits 2", "must stand without a budget, got both"),
    (f"{QUANTIZE} --policy p.json --keep-weights", "--keep-weights: must stand without --policy"),
    (f"{POST} --bits 2 --keep-weights", "--keep-weights: must stand without --ptq"),
]


def refused(sdq, out, command: str, expected: str) -> None:
    """Run a wrong request: code 2, one sentence with the expected words, no folder."""
    makes_folder = command.split()[0] in ("train", "quantize", "search", "export")
    done = sdq(command, *(("--out", out) if makes_folder else ()))
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert not out.exists()


@pytest.mark.parametrize(("command", "expected"), [*NAMES, *NUMBERS, *RUNS])
def test_a_wrong_option_is_refused(sdq, files, tmp_path, monkeypatch, command, expected):
    monkeypatch.delenv("SDQ_DATA", raising=False)
    refused(sdq, tmp_path / "out", command.format(f=files), expected)


@pytest.mark.parametrize(("data", "expected"), DATA)
def test_bad_data_are_refused(sdq, files, tmp_path, data, expected):
    refused(sdq, tmp_path / "out", f"train --model mlp --data {files / data}", expected)


@pytest.mark.parametrize(("weights", "expected"), WEIGHTS)
@pytest.mark.parametrize("verb", ["train", "evaluate", "quantize --bits 2", "search --bits 2"])
def test_bad_weights_are_refused(sdq, files, tmp_path, verb, weights, expected):
    command = f"{verb} --model mlp --weights {files / weights} --data {files / 'ok.npz'}"
    refused(sdq, tmp_path / "out", command, expected)


def test_weights_of_another_architecture_are_refused(sdq, files, tmp_path):
    command = f"--model resnet20 --data {files / 'ok.npz'} --weights"
    weights = files / "float" / "model.safetensors"
    for verb in ("train", "quantize --bits 2", "evaluate"):
        expected = "must hold the weights of this architecture, but has no 'bn1.bias' (97 missing"
        refused(sdq, tmp_path / "out", f"{verb} {command} {weights}", expected)


def test_weights_of_another_number_of_classes_are_refused(sdq, files, tmp_path):
    weights = files / "float" / "model.safetensors"
    command = f"evaluate --model mlp --weights {weights} --data {files / 'five.npz'}"
    refused(sdq, tmp_path / "out", command, "'layers.10.bias' must have shape (5,), got (7,)")


@pytest.mark.parametrize("verb", ["train", "evaluate", "quantize --bits 2"])
def test_a_head_of_a_thousand_classes_is_told_what_to_do(sdq, files, tmp_path, verb):
    weights = load_file(files / "float" / "model.safetensors")
    head = {"layers.10.weight": torch.zeros(1000, 64), "layers.10.bias": torch.zeros(1000)}
    save_file(weights | head, tmp_path / "thousand.safetensors")
    command = f"{verb} --model mlp --weights {tmp_path / 'thousand.safetensors'} --data"
    expected = (
        "thousand.safetensors: 'layers.10.bias' must have shape (7,), got (1000,); the data have "
        "7 classes and these weights 1000: give data of 1000 classes, or first train a head of 7 "
        "with `sdq train --model FILE.py:FUNCTION`, whose function loads all but 'layers.10.bias', "
        "'layers.10.weight'"
    )
    refused(sdq, tmp_path / "out", f"{command} {files / 'ok.npz'}", expected)


def test_weights_for_other_channels_get_no_advice_on_classes(sdq, files, tmp_path):
    weights = files / "float" / "model.safetensors"
    command = f"evaluate --model mlp --weights {weights} --data {files / 'grey.npz'}"
    expected = "'layers.1.weight' must have shape (128, 784), got (128, 2352); check the number of"
    refused(sdq, tmp_path / "out", command, expected)


@pytest.mark.parametrize(("function", "expected"), MODELS)
@pytest.mark.parametrize("verb", ["train", "quantize --bits 2 --weights w"])
def test_a_users_model_that_does_not_work_is_refused(
    sdq, files, tmp_path, verb, function, expected
):
    weights = files / "float" / "model.safetensors"
    if verb != "train" and function in ("asserts", "tupled"):
        pytest.skip("the weights would have to fit")
    verb = verb.replace("--weights w", f"--weights {weights}")
    command = f"{verb} --model {files / 'models.py'}:{function} --data {files / 'ok.npz'}"
    refused(sdq, tmp_path / "out", command, expected)


def test_a_users_file_that_does_not_compile_is_refused(sdq, files, tmp_path):
    command = f"train --model {files / 'syntax.py'}:f --data {files / 'ok.npz'}"
    refused(sdq, tmp_path / "out", command, "cannot be executed, SyntaxError")


@pytest.mark.parametrize(
    ("data", "got"), [("size20.npz", "(3, 20, 20)"), ("grey.npz", "(1, 28, 28)")]
)
def test_a_model_of_fixed_size_refuses_other_images(sdq, files, tmp_path, data, got):
    command = f"train --model {files / 'models.py'}:fixed --data {files / data}"
    refused(sdq, tmp_path / "out", command, f"must accept images of shape {got} (C, H, W)")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("on_data", "a decision must not depend on the values of a tensor"),
        ("no_layer", "must have a convolution or linear layer to quantize"),
    ],
)
def test_a_model_that_cannot_be_quantized_can_be_trained(sdq, files, tmp_path, function, expected):
    data, run = files / "ok.npz", tmp_path / "float"
    model = f"{files / 'models.py'}:{function}"
    assert sdq(f"train --model {model} --data {data} --epochs 1 --quiet --out", run).code == 0
    assert sdq(f"evaluate {run} --quiet").code == 0
    for verb in ("quantize", "search"):
        refused(sdq, tmp_path / "out", f"{verb} --from {run} --data {data} --bits 2", expected)


def test_a_users_model_that_changed_is_refused(sdq, files, tmp_path):
    model = shutil.copy(files / "models.py", tmp_path)
    data, run = files / "ok.npz", tmp_path / "float"
    assert sdq(f"train --model {model}:fixed --data {data} --epochs 1 --quiet --out", run).code == 0
    with open(model, "a") as file:
        file.write("# changed\n")
    refused(sdq, tmp_path / "out", f"evaluate {run}", "must be the file the run was made with")


@pytest.mark.parametrize(("policy", "expected"), POLICIES)
def test_a_policy_that_does_not_fit_is_refused(sdq, files, tmp_path, policy, expected):
    command = f"{QUANTIZE.format(f=files)} --policy {files / f'policy_{policy}.json'}"
    refused(sdq, tmp_path / "out", command, expected)


@pytest.mark.parametrize("policy", ["newer", "nine_bits", "extra", "cut", "binary", "deep"])
def test_cost_refuses_a_damaged_policy(sdq, files, tmp_path, policy):
    expected = dict(POLICIES)[policy]
    refused(sdq, tmp_path / "out", f"cost {files / f'policy_{policy}.json'}", expected)


@pytest.mark.parametrize(("data", "expected"), OTHER_DATA)
@pytest.mark.parametrize("verb", ["evaluate {f}/quantized", "quantize --from {f}/float --bits 2"])
def test_other_data_must_fit_the_run(sdq, files, tmp_path, verb, data, expected):
    command = f"{verb.format(f=files)} --data {files / data}"
    refused(sdq, tmp_path / "out", command, expected)


def test_data_that_changed_since_the_run_are_refused(sdq, files, tmp_path):
    data = shutil.copy(files / "ok.npz", tmp_path / "data.npz")
    run = tmp_path / "float"
    assert sdq(f"train --model mlp --data {data} --epochs 1 --quiet --out", run).code == 0
    shutil.copy(files / "other.npz", data)
    refused(sdq, tmp_path / "out", f"evaluate {run}", "must be the data the run was made with")


@pytest.mark.parametrize("verb", [TRAIN, f"{QUANTIZE} --bits 2", f"{SEARCH} --bits 2"])
def test_the_folder_must_be_new(sdq, files, tmp_path, verb):
    verb = verb.format(f=files)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "keep.txt").write_text("mine")
    file.write_text("mine")
    for out, option, expected in [
        (full, "", "--out: folder must be new or empty"),
        (file, "", "--out: folder must be new or empty"),
        (file / "sub", "", "Not a directory"),
        (tmp_path / ("x" * 300), "", "File name too long"),
        (tmp_path / "new", "--resume", "--resume: no run to continue"),
        (full, "--resume", "--resume: no run to continue"),
    ]:
        done = sdq(f"{verb} {option} --out", out)
        assert (done.code, done.out) == (2, "")
        assert expected in done.err
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["file", "full"]
    assert [p.name for p in full.iterdir()] == ["keep.txt"]
    assert file.read_text() == (full / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--bits 3", "budget.avg_weight_bits must be as in the interrupted run, 2.0, got 3.0"),
        ("--weight-kb 310", "budget.avg_weight_bits must be"),
        ("--bits 2 --epochs 2", "train.epochs must be as in the interrupted run, 1, got 2"),
        ("--bits 2 --seed 3", "data.seed must be as in the interrupted run, 0, got 3"),
        ("--bits 2 --choices 1,2", "quant.bit_choices must be"),
        ("--bits 2 --search-method uniform", "search_method must be"),
        (
            "--bits 2 --batch-size 7",
            "data.batch_size must be as in the interrupted run, 128, got 7",
        ),
    ],
)
def test_a_resumed_run_must_be_asked_the_same(sdq, files, options, expected):
    run = files / "quantized"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = sdq(f"{QUANTIZE.format(f=files)} {options} --resume --out", run)
    assert done.code == 2
    assert f"--resume: {expected}" in done.err
    assert "repeat the same command" in done.err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_another_verb_cannot_resume(sdq, files):
    done = sdq(f"{SEARCH.format(f=files)} --bits 2 --resume --out", files / "quantized")
    assert done.code == 2
    assert "--resume: verb must be as in the interrupted run, 'quantize', got 'search'" in done.err


def test_an_interrupted_run_is_of_no_use_to_other_verbs(sdq, files, tmp_path):
    for name in ("float", "quantized"):
        run = tmp_path / name
        shutil.copytree(files / name, run)
        document = json.loads((run / "run.json").read_text()) | {"status": "running"}
        (run / "run.json").write_text(json.dumps(document))
        for verb in (f"evaluate {run}", f"export {run}", f"export {run} --verify",
                     f"quantize --from {run} --data {files / 'ok.npz'} --bits 2"):  # fmt: skip
            refused(sdq, tmp_path / "out", verb, "the run must have ended, but was interrupted")


def test_a_run_that_has_only_begun_is_called_interrupted(sdq, tmp_path):
    with RunFolder.create(tmp_path / "run", {"verb": "train"}, resume=False):
        pass
    for verb in ("evaluate", "export"):
        refused(sdq, tmp_path / "out", f"{verb} {tmp_path / 'run'}", "was interrupted")


def test_one_process_at_a_time(sdq, files, tmp_path):
    run = tmp_path / "run"
    command = f"{TRAIN.format(f=files)} --quiet --out {run}"
    assert sdq(command).code == 0
    request = RunFolder.open(run).read_json("run.json")["request"]
    with RunFolder.create(run, request, resume=True):
        done = sdq(f"{command} --resume")
    assert done.code == 2
    assert "another sdq process is working in this folder" in done.err
    assert sdq(f"{command} --resume").code == 0


def test_a_run_of_a_newer_version_is_refused(sdq, files, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"schema": "sdq.run/2"}))
    for verb in ("evaluate", "export", f"quantize --data {files / 'ok.npz'} --bits 2 --from"):
        expected = "schema must be 'sdq.run/1', got 'sdq.run/2'"
        refused(sdq, tmp_path / "out", f"{verb} {tmp_path}", expected)


def test_a_number_that_is_not_finite_is_a_failed_run(sdq, files, tmp_path):
    """The learning rate is absurd, but not wrong in itself."""
    run = tmp_path / "run"
    done = sdq(
        f"train --model mlp --data {files / 'ok.npz'} --lr 1e30 --epochs 3 --quiet --out", run
    )
    assert done.code == 1
    expected = "train: outputs must be finite, got NaN or infinity on the validation data after "
    assert expected + "epoch 1; lower the learning rate" in done.err
    assert json.loads((run / "run.json").read_text())["status"] == "running"
