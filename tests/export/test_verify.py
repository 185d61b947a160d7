"""Verification must be able to fail: each kind of damage is found, and its place is named."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export
from export.float32 import Tally, caution, decisions, judge, near_tie
from export.format import ToolMissing, Trace, load_format
from export.reference import Reference
from export.ties import TIE, WIDEST_TIE, boundary_distance
from sdq.batches import Normalization
from sdq.errors import RequestError

FORMATS = ["onnx", "qonnx"]


def edit(path, name, change):
    """Change one initializer of a file, and the record with it, as if it had been written so."""
    model = onnx.load(path)
    for entry in model.graph.initializer:
        if entry.name == name:
            array = np.array(numpy_helper.to_array(entry))
            entry.CopyFrom(numpy_helper.from_array(change(array), name))
            break
    else:
        raise KeyError(f"{name} not in {[x.name for x in model.graph.initializer]}")
    onnx.save(model, path)
    (path.parent / "export.json").unlink()


def bumped(array):
    flat = array.reshape(-1)
    flat[3] += 1 if flat[3] <= 0 else -1
    return array


def flipped(array):
    array.reshape(-1)[3] *= -1
    return array


def scaled(array):
    return (array * np.float32(1.25)).astype(array.dtype)


DAMAGE = {
    # format, initializer, change, first difference, words of the reason
    "weight code": ("onnx", "4.weight", bumped, "4", "4: 1 weight codes differ"),
    "weight sign": ("qonnx", "4.weight", flipped, "4", "4: 1 weight codes differ"),
    "weight scale": ("onnx", "4.weight.scale", scaled, "4", "4: the scale"),
    "Quant scale": ("qonnx", "4.weight.quant.scale", scaled, "4", "4: "),
    "act scale": ("onnx", "8_input.scale", scaled, "8_input", "8_input: the scale"),
    "act Quant scale": ("qonnx", "8_input.quant.scale", scaled, "8_input", "8_input: the scale"),
    "wider Clip": ("onnx", "4.weight.clip.max", lambda a: a * 0 + 7, "4", "codes -4 to 7"),
    "bits": ("qonnx", "4.weight.quant.bits", lambda a: a + 1, "4", "the file has 4 bits"),
    "act bits": ("qonnx", "8_input.quant.bits", lambda a: a - 1, "8_input", "has 3 bits"),
    # not a quantizer: the codes after it show it
    "bias": ("onnx", "4.bias", lambda a: a + np.float32(0.3), "8_input", "first at 8_input"),
    "last bias": ("onnx", "12.bias", lambda a: a + np.float32(1e-6), None, "after the last quant"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(tmp_path, network, sample, images, kind):
    format, name, change, place, words = DAMAGE[kind]
    qmodel = network("plain", bits=3)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    assert export.verify(qmodel, tmp_path, format=format, inputs=images).verified
    edit(result.path, name, change)
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert not report.verified
    assert words in report.reason
    if report.exact is not None:
        assert report.exact.first_difference == place


def test_both_clip_bounds_changed_alike_are_another_bitwidth(tmp_path, network, sample, images):
    """Values stay the same; only what the file says of itself is wrong."""
    qmodel = network("plain", bits=3)
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    edit(result.path, "4.weight.clip.max", lambda a: a * 0 + 7)
    (tmp_path / "export.json").touch()
    edit(result.path, "4.weight.clip.min", lambda a: a * 0 - 8)
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    assert report.reason == "4: the file has 4 bits, the policy 3"
    assert report.exact.different == 0
    assert report.exact.first_difference == "4"


def test_codes_show_a_scale_also_without_reading_it(tmp_path, network, sample, images):
    """The dynamic comparison alone, without the one that reads scales from the file."""
    from export.format import load_format

    qmodel = network("plain", bits=3)
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    edit(result.path, "4_input.scale", scaled)
    theirs = load_format("onnx")[1].open_exact(result.path)(images)
    ours = Reference(qmodel).float64(images)
    assert torch.equal(ours.codes["0_input"], theirs.codes["0_input"])
    assert not torch.equal(ours.codes["4_input"], theirs.codes["4_input"])


def test_preprocessing_that_was_changed_is_found(tmp_path, network, sample):
    qmodel = network("plain")
    result = export.write(
        qmodel, tmp_path, format="onnx", sample=sample,
        preprocessing=Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    )  # fmt: skip
    edit(result.path, "sdq_preprocessing.mean", lambda a: a + np.float32(0.01))
    pixels = torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=pixels.byte())
    assert not report.verified
    assert report.exact.first_difference == "0_input"


def test_a_changed_file_is_reported_by_its_hash(tmp_path, network, sample, images):
    qmodel = network("plain")
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    model.doc_string = "changed"
    onnx.save(model, result.path)
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    assert not report.verified
    assert "SHA-256 is not that of export.json" in report.reason
    (tmp_path / "export.json").unlink()
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images.requires_grad_())
    assert report.verified, report.reason
    assert "export.json does not say which file was written" in report.warnings[0]


def test_inputs_that_are_no_numbers_are_refused(tmp_path, network, sample, images, refuses):
    qmodel = network("plain")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    with refuses("verify: inputs must be finite, got NaN or infinity"):
        export.verify(qmodel, tmp_path, format="onnx", inputs=images * torch.nan)


def test_another_network_is_not_verified(tmp_path, network, sample, images):
    export.write(network("plain"), tmp_path, format="onnx", sample=sample)
    report = export.verify(network("plain", seed=5), tmp_path, format="onnx", inputs=images)
    assert not report.verified
    assert report.exact.different > 0
    with pytest.raises(RequestError, match="verify with the network it was written from"):
        export.verify(network("residual"), tmp_path, format="onnx", inputs=images)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x08"])
def test_a_file_that_is_not_ours_is_refused(tmp_path, network, images, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(RequestError, match=r"must be an ONNX file of schema 'sdq\.export/1'"):
        export.verify(network("plain"), tmp_path, format="onnx", inputs=images)


def test_an_absent_file_is_refused(tmp_path, network, images):
    with pytest.raises(RequestError, match="write it first"):
        export.verify(network("plain"), tmp_path, format="onnx", inputs=images)


def test_inputs_must_fit_the_file(tmp_path, network, sample, images):
    qmodel = network("plain")
    export.write(qmodel, tmp_path / "a", format="onnx", sample=sample)
    with pytest.raises(RequestError, match=r"must be normalised float images, got torch\.uint8"):
        export.verify(qmodel, tmp_path / "a", format="onnx", inputs=images.byte())
    with pytest.raises(RequestError, match="N at least 1"):
        export.verify(qmodel, tmp_path / "a", format="onnx", inputs=images[:0])
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    export.write(qmodel, tmp_path / "b", format="onnx", sample=sample, preprocessing=half)
    with pytest.raises(RequestError, match=r"must be uint8 pixels, got torch\.float32"):
        export.verify(qmodel, tmp_path / "b", format="onnx", inputs=images)


def test_inputs_must_fit_the_network(tmp_path, network, sample):
    qmodel = network("perceptron")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    other = torch.zeros(2, 3, 9, 9)
    takes = r"images \(C, H, W\) of \[3, 8, 8\], which .* takes, got \[3, 9, 9\]"
    with pytest.raises(RequestError, match=takes):
        export.verify(qmodel, tmp_path, format="onnx", inputs=other)
    export.write(network("plain"), tmp_path / "b", format="onnx", sample=other[:1])
    with pytest.raises(RequestError, match="inputs must fit the network, got shape"):
        export.verify(qmodel, tmp_path / "b", format="onnx", inputs=other)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("4.weight", lambda a: a[:, :2], "node '4' cannot be computed"),
        ("12.bias", lambda a: np.zeros((7, 1, 5), np.float32), "output must have shape"),
    ],
)
def test_a_file_that_no_longer_fits_together_is_not_verified(
    tmp_path, network, sample, images, name, change, words
):
    qmodel = network("plain")
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    edit(result.path, name, change)
    report = export.verify(qmodel, tmp_path, format="qonnx", inputs=images)
    assert not report.verified
    assert words in report.reason


def test_a_file_without_a_scale_is_not_verified(tmp_path, network, sample, images):
    qmodel = network("plain")
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    kept = [x for x in model.graph.initializer if x.name != "8_input.scale"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, result.path)
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    assert not report.verified
    assert "'8_input.scale' of the file must be a constant" in report.reason


def test_whoever_watches_sees_every_image_compared(tmp_path, network, sample, images):
    qmodel, seen = network("plain", bits=3), []
    export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    export.verify(
        qmodel, tmp_path, format="qonnx", inputs=images[:7], batch_size=3,
        watch=lambda *what: seen.append(what),
    )  # fmt: skip
    assert seen == [(f"float{n}", done, 7) for n in (64, 32) for done in (3, 6, 7)]


def test_the_report_is_json_and_lines(tmp_path, network, sample, images):
    qmodel = network("plain")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    document = json.loads(json.dumps(report.to_json()))
    assert document["verified"] is True
    assert document["exact"]["different"] == 0
    assert document["runtimes"][0]["name"] == "onnxruntime, optimisations off"
    assert report.lines[0].startswith("model.onnx: verified")
    assert len(report.lines) == 2 + len(report.runtimes) + len(report.warnings)


def test_a_runtime_that_is_not_installed_is_named_and_the_others_run(
    tmp_path, network, sample, images
):
    plugin = load_format("onnx")[1]

    def open_runtime(path, runtime, *, taps):
        if runtime == "board":
            raise ToolMissing("the board's tools must be installed; pip install board")
        return plugin.open_runtime(path, runtime, taps=taps)

    changed = {"RUNTIMES": (*plugin.RUNTIMES, "board"), "open_runtime": open_runtime}
    with_board = SimpleNamespace(**{**vars(plugin), **changed})
    qmodel = network("plain")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    report = export.verify(qmodel, tmp_path, format=with_board, inputs=images)
    assert report.verified
    assert [stage.name for stage in report.runtimes] == list(plugin.RUNTIMES)
    assert report.warnings == (
        "board: not run: the board's tools must be installed; pip install board",
    )


def test_the_output_step_is_of_the_last_layer(network):
    qmodel = network("plain")
    step = float(qmodel.act_quantizers()["12_input"].scale.detach())
    step *= float(qmodel.weight_quantizer("12").scale.detach().min())
    assert Reference(qmodel).output_step() == pytest.approx(step)
    assert Reference(network("plain", first_last_bits=32)).output_step() is None


def test_float64_has_the_codes_of_float32_weights(network, images):
    """Also in a layer of 8 bits, where float32 and float64 would round some weights apart."""
    qmodel = network("residual", bits=8)
    reference = Reference(qmodel)
    for layer in qmodel.policy:
        codes, _ = reference.weight(layer.name)
        double = reference.double.weight_quantizer(layer.name)
        assert torch.equal(double.codes(reference.double.weight(layer.name)).short(), codes)


def test_boundary_distance_by_hand():
    def distance(value, one, other, width=4):
        exact = torch.tensor(value, dtype=torch.float64)
        return float(boundary_distance(exact, torch.tensor(one), torch.tensor(other), width))

    assert distance(2.2, 2, 2) == 0
    # 3 became 4, and 3.4999 is 0.0001 from the boundary 3.5
    assert distance(3.4999, 3, 4) == pytest.approx(1e-4, rel=1e-3)
    # 2 became 3 although 2.2 is 0.3 from 2.5
    assert distance(2.2, 3, 2) == pytest.approx(0.3)
    # a code that moved by two crossed two boundaries, one of them far
    assert distance(3.4999, 3, 5) == pytest.approx(1.0001, rel=1e-3)
    # on the boundary itself: no distance, but moved
    assert 0 < distance(2.5, 2, 3) < 1e-300
    # clipped far below the lowest code, and yet another code
    assert distance(-9.0, 0, 1) == pytest.approx(9.5)
    # a code of 16 bits is a 256th of one of 8
    assert distance(3.4999, 3, 5, 16) == pytest.approx(1.0001 / 256, rel=1e-3)


def test_decisions():
    assert decisions(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [1]
    assert decisions(torch.tensor([[-1.0], [2.0]])).tolist() == [[False], [True]]
    maps = torch.tensor([[[[1.0, -1.0]], [[3.0, 2.0]]]])  # a sigmoid each: both may be true
    assert decisions(maps).tolist() == [[[[True, False]], [[True, True]]]]


def test_a_tie_is_judged_where_decisions_differ():
    """Of thousands of pixels one always lies near zero: that excuses no other."""
    maps = torch.tensor([[[[1e-7, 2.0]], [[-3.0, 1.0]]]])
    where = torch.zeros(4, dtype=torch.bool)
    where[0] = True
    assert near_tie(maps, where, 3.0)
    where[3] = True
    assert not near_tie(maps, where, 3.0)
    classes = torch.tensor([[1.0, 1.000001, -5.0]])
    assert near_tie(classes, torch.tensor([True]), 5.0)
    assert not near_tie(torch.tensor([[1.0, 1.1, -5.0]]), torch.tensor([True]), 5.0)


def forced(reference, images, name, index, step, codes=None):
    """Return the trace of a runtime that is float64's but for one code, with all that follows."""
    codes = dict(codes or {})
    moved = reference.replay(images, codes).codes | codes
    moved[name] = moved[name].clone()
    moved[name][index] += step
    before = {}
    for key in reference.names:
        before[key] = moved[key]
        if key == name:
            break
    replay = reference.replay(images, before)
    return Trace(replay.output.float(), replay.codes | before)


def nearest_tie(reference, images, name):
    """Return where a code lies nearest to a boundary, how near, and the step across it."""
    replay = reference.replay(images, {})
    value, codes = replay.before[name], replay.codes[name]
    low, high = codes.min(), codes.max()
    distance = torch.where((codes > low) & (codes < high), (value - value.floor() - 0.5).abs(), 1.0)
    index = tuple((distance == distance.min()).nonzero()[0].tolist())
    return index, float(distance.min()), 1 if value[index] > codes[index] else -1


def far_code(reference, images, name, codes=None):
    """Return where a code lies in the middle between two boundaries, and others above it."""
    replay = reference.replay(images, codes or {})
    value, codes = replay.before[name], replay.codes[name]
    inside = (codes > codes.min()) & (codes < codes.max() - 2)
    return tuple((inside & ((value - codes).abs() < 0.2)).nonzero()[0].tolist())


def stage_of(reference, images, theirs):
    tally = Tally(reference)
    tally.add(images, reference.float32(images), theirs.output, theirs)
    return tally.stage("somewhere")


class Normalized(torch.nn.Module):
    """One normalisation of a whole map behind another, and a decision a pixel."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.GroupNorm(1, 4), torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(1, 4), torch.nn.ReLU(),
            torch.nn.Conv2d(4, 1, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def test_a_tie_in_front_of_group_norm_explains_whole_maps(network, images):
    reference = Reference(network(Normalized(), act_bits=8))
    index, distance, step = nearest_tie(reference, images, "layers.0_input")
    assert distance < TIE
    theirs = forced(reference, images, "layers.0_input", index, step)
    stage = stage_of(reference, images, theirs)
    assert stage.different > 3  # one code, and what follows from it all over the map
    assert (stage.ties, stage.tie_codes, stage.unexplained_at) == (1, 1, None)
    assert stage.tie_distance == pytest.approx(distance, abs=1e-12)
    assert stage.tail < 1e-6
    assert judge(stage) == []
    assert "1 of them explained by replay (1 ties)" in stage.line


def code_at(reference, images, name, distance):
    """Return where a code lies nearest to this far from a boundary, how far, and the step."""
    replay = reference.replay(images, {})
    value, codes = replay.before[name], replay.codes[name]
    inside = (codes > codes.min()) & (codes < codes.max())
    far = torch.where(inside, (value - value.floor() - 0.5).abs(), 9.0)
    index = tuple(((far - distance).abs() == (far - distance).abs().min()).nonzero()[0].tolist())
    return index, float(far[index]), 1 if value[index] > codes[index] else -1


def shifted(network, bias):
    """Return a network that normalises sums of mean ``bias``, and what float32 then errs by."""
    net = Normalized()
    torch.nn.init.constant_(net.layers[3].bias, bias)
    reference = Reference(network(net, act_bits=8))
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    codes = reference.float32(images).codes
    single = reference.replay(images, codes, single=True).before["layers.6_input"]
    return reference, (single - reference.replay(images, codes).before["layers.6_input"]).abs()


def test_a_tie_is_as_wide_as_float32_errs(network, images):
    """A mean of many times the spread costs bits of float32's 24."""
    name = "layers.6_input"
    reference, error = shifted(network, 100.0)
    most = float(error.max())  # which processor it is has a say in it
    for wanted, explained in ((max(0.25 * most, 1.5 * TIE), True), (20 * most, False)):
        index, distance, step = code_at(reference, images, name, wanted)
        assert TIE < distance < 0.4
        assert (distance < 2 * float(error[index[0]].max())) is explained
        stage = stage_of(reference, images, forced(reference, images, name, index, step))
        assert (stage.ties == stage.flipped * 24) is explained
        assert (judge(stage) == []) is explained

    # without that mean, the same distance is none
    reference, error = shifted(network, 0.0)
    assert error.max() < TIE / 10
    index, distance, step = code_at(reference, images, name, 1.5 * TIE)
    stage = stage_of(reference, images, forced(reference, images, name, index, step))
    assert stage.unexplained_at == name


def test_no_error_of_float32_makes_a_tie_of_everything(network, images):
    reference, error = shifted(network, 1e5)
    assert error.max() > 5 * WIDEST_TIE
    index, _, step = code_at(reference, images, "layers.6_input", 2 * WIDEST_TIE)
    theirs = forced(reference, images, "layers.6_input", index, step)
    assert stage_of(reference, images, theirs).unexplained_at == "layers.6_input"


def test_decisions_that_follow_from_ties_are_a_warning(network, images):
    """The replayed network decides otherwise at many pixels: right, and worth knowing."""
    reference = Reference(network(Normalized(), act_bits=8))
    index, _, step = nearest_tie(reference, images, "layers.0_input")
    theirs = forced(reference, images, "layers.0_input", index, step)
    ours = reference.float32(images)
    stage = stage_of(reference, images, theirs)
    assert caution(stage) == []
    tally = Tally(reference)
    far = Trace(-ours.output, ours.codes)  # as if PyTorch had decided otherwise everywhere
    tally.add(images, far, theirs.output, theirs)
    (sentence,) = caution(tally.stage("somewhere"))
    assert "0.00% of the decisions agree" in sentence


def test_a_wrong_code_is_no_tie_whatever_follows_from_it(network, images):
    """Everything behind it is as it must be: it is the code itself that nothing explains."""
    reference = Reference(network(Normalized(), act_bits=8))
    index = far_code(reference, images, "layers.3_input")
    stage = stage_of(reference, images, forced(reference, images, "layers.3_input", index, 1))
    assert (stage.ties, stage.unexplained_at) == (0, "layers.3_input")
    assert stage.tie_distance > 0.3
    (reason,) = judge(stage)
    assert "1 of 24 images have codes that do not follow from ties, first at layers.3_in" in reason


def test_a_tie_does_not_excuse_a_wrong_code_behind_it(network, images):
    """The whole map has other codes, and one of them is wrong by one."""
    reference = Reference(network(Normalized(), act_bits=8))
    index, _, step = nearest_tie(reference, images, "layers.0_input")
    tie = forced(reference, images, "layers.0_input", index, step)
    image = slice(index[0], index[0] + 1)
    first = {name: tie.codes[name] for name in ("layers.0_input", "layers.3_input")}
    mine = {name: codes[image] for name, codes in first.items()}
    where = far_code(reference, images[image], "layers.6_input", mine)
    both = forced(reference, images, "layers.6_input", (index[0], *where[1:]), 1, first)
    stage = stage_of(reference, images, both)
    assert stage.first_difference == "layers.0_input"
    assert (stage.flipped, stage.ties) == (1 / 24, 0)
    assert stage.unexplained_at == "layers.6_input"
    assert len(judge(stage)) == 1


def test_an_exception_is_explained_by_a_tie_only(network, images):
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    index = far_code(reference, images, "8_input")
    codes = {key: value.clone() for key, value in ours.codes.items()}
    codes["8_input"][index] += 1
    output = ours.output.clone()
    output[index[0], (output[index[0]].argmax() + 1) % output.shape[1]] += 10
    stage = stage_of(reference, images, Trace(output, codes))
    assert (stage.exceptions, stage.explained) == (1, 0)
    assert stage.tie_distance > 0.3
    assert stage.flipped == 1 / len(images)
    assert (stage.different, stage.first_difference, stage.ties) == (1, "8_input", 0)
    assert stage.codes == sum(codes.numel() for codes in ours.codes.values())
    assert stage.agreement == 1 - 1 / len(images)
    gap = (ours.output - output).abs().max() / ours.output.abs().max()
    assert stage.relative_difference == pytest.approx(float(gap))

    # no code differs, and the output is far from a tie: unexplained
    stage = stage_of(reference, images, Trace(output, ours.codes))
    assert (stage.exceptions, stage.explained, stage.tie_distance) == (1, 0, None)
    assert "outputs must be within 1e-05" in judge(stage)[0]


def test_a_flip_that_changes_no_decision_is_judged(network, images):
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    codes = {name: value.clone() for name, value in ours.codes.items()}
    codes["8_input"][3, 0, 0, 0] += 2  # across two boundaries: no tie
    del codes["0_input"]  # a runtime without this quantizer
    stage = stage_of(reference, images, Trace(ours.output, codes))
    assert (stage.different, stage.first_difference, stage.ties) == (1, "8_input", 0)
    assert stage.codes == sum(x.numel() for x in codes.values())
    assert (stage.exceptions, stage.agreement, stage.flipped) == (0, 1, 1 / len(images))
    assert "1 of" in stage.line
    assert "first at 8_input" in stage.line
    assert "unexplained from 8_input on" in stage.line
    assert judge(stage)


def test_outputs_must_follow_from_the_codes(network, images):
    """All codes and decisions are right; what comes behind the last quantizer is not."""
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    stage = stage_of(reference, images, Trace(1.0001 * ours.output, ours.codes))
    assert (stage.different, stage.exceptions) == (0, 0)
    (reason,) = judge(stage)
    assert "outputs must be within 1e-05" in reason
    assert judge(stage_of(reference, images, Trace(1.000001 * ours.output, ours.codes))) == []


def test_a_runtime_with_another_rule_of_rounding_has_too_many_ties(network):
    """Halves up instead of to even: each code is a tie, all of them together are not chance."""
    qmodel = network("plain", bits=3, restrict_scale="power_of_two")
    reference = Reference(qmodel)
    scale = qmodel.act_quantizers()["0_input"].scale.detach()
    halves = torch.randint(-20, 20, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (halves + 0.5) * scale
    replay = reference.replay(images, {"0_input": halves + 1})
    theirs = Trace(replay.output.float(), replay.codes | {"0_input": (halves + 1).int()})
    stage = stage_of(reference, images, theirs)
    assert (stage.flipped, stage.ties, stage.unexplained_at) == (1, 24, None)
    (reason,) = judge(stage)
    assert "the runtime rounds by another rule" in reason


def damaged(wrong, runtimes, advice=None):
    """Return the onnx format with runtimes of which some have a bit of a code flipped.

    Args:
        wrong: the bit, by runtime.
    """
    plugin = load_format("onnx")[1]

    def open_runtime(path, runtime, *, taps):
        run = plugin.open_runtime(path, plugin.AS_WRITTEN, taps=taps)

        def flipped(feed):
            trace = run(feed)
            if "8_input" in trace.codes:
                trace.codes["8_input"][0, 0, 0, 0] ^= wrong.get(runtime, 0)
            return trace

        return flipped

    changed = {"open_runtime": open_runtime, "ADVICE": advice or {}, "RUNTIMES": runtimes}
    return SimpleNamespace(**{**vars(plugin), **changed})


TIES = "and what differs in float32 follows from ties of rounding"


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_wrong_code_of_a_runtime(tmp_path, network, sample, images, rewrites):
    """It is named by its layer, and decides unless the runtime may round in other places."""
    plugin = load_format("onnx")[1]
    runtime = plugin.OPTIMISED if rewrites else plugin.AS_WRITTEN
    qmodel = network("plain")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    format = damaged({runtime: 2}, (runtime,))
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert report.verified is rewrites
    sentence = "1 of 24 images have codes that do not follow from ties, first at 8_input"
    assert sentence in (report.warnings[0] if rewrites else report.reason)
    assert len(report.warnings) == rewrites
    assert "ties of rounding" not in report.reason.replace("more than ties", "")
    format = damaged({}, (runtime,))
    assert TIES in export.verify(qmodel, tmp_path, format=format, inputs=images).reason


@pytest.mark.parametrize(("wrong", "integer"), [(8, False), (2, True)])
def test_only_rounded_biases_excuse_a_runtime(tmp_path, network, sample, images, wrong, integer):
    """Not codes that are further off than that, and nothing where there is no float bias."""
    plugin = load_format("onnx")[1]
    qmodel = network("plain", integer_bias=integer, integer_datapath=integer, batch_norm="fold")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    format = damaged({plugin.OPTIMISED: wrong}, (plugin.OPTIMISED,))
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert not report.verified
    assert "first at 8_input" in report.reason
    assert not report.warnings


@pytest.mark.parametrize("alike", [False, True])
def test_a_fault_of_one_runtime_is_no_other_runtimes(tmp_path, network, sample, images, alike):
    """What both have is not the fault that the advice is about."""
    plugin = load_format("onnx")[1]
    one, other = plugin.OPTIMISED, plugin.DEFAULTS
    qmodel = network("plain")
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    format = damaged({one: 8 * alike, other: 8}, (one, other), {other: "set an option"})
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert report.verified is not alike
    assert [text.endswith("; set an option") for text in report.warnings] == [True] * (not alike)
    assert all(name in report.reason for name in (one, other)) is alike


def test_codes_of_a_runtime_that_computes_otherwise_when_read_are_not_used(network, images):
    reference = Reference(network("plain"))
    ours = reference.float32(images)
    tally = Tally(reference)
    tally.add(images, ours, ours.output + 1e-6, ours)
    assert tally.stage("fusing").flipped is None


def test_images_of_many_codes_are_compared_a_few_at_a_time(
    tmp_path, network, sample, images, monkeypatch
):
    qmodel = network("plain", bits=3)
    export.write(qmodel, tmp_path, format="onnx", sample=sample)
    whole = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    sizes = []
    module = sys.modules["export.verify"]  # export.verify is the function
    monkeypatch.setattr(module, "CODES_AT_A_TIME", 1)
    original = Tally.add
    monkeypatch.setattr(Tally, "add", lambda *a: (sizes.append(len(a[1])), original(*a))[1])
    one = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    assert set(sizes) == {1}
    assert one.exact == whole.exact
    assert one.verified
