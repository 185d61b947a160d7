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
from export.float32 import Tally, decisions, first_flip_distance, near_tie
from export.format import ToolMissing, Trace, load_format
from export.reference import Reference
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
    with pytest.raises(RequestError, match="inputs must fit the network, got shape"):
        export.verify(qmodel, tmp_path, format="onnx", inputs=torch.zeros(2, 3, 9, 9))


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


def test_first_flip_distance_by_hand():
    bits = {"a": 4, "b": 8}
    same = {"a": torch.tensor([[1, 2]]), "b": torch.tensor([[3, 4]])}
    before = {
        "a": torch.tensor([[1.2, 2.2]], dtype=torch.float64),
        "b": torch.tensor([[3.4999, 4.1]], dtype=torch.float64),
    }
    assert first_flip_distance(bits, same, same, before) is None
    # 3 became 4, and 3.4999 is 0.0001 from the boundary 3.5
    tie = {"a": same["a"], "b": torch.tensor([[4, 4]])}
    assert first_flip_distance(bits, same, tie, before) == pytest.approx(1e-4, rel=1e-3)
    # 2 became 3 although 2.2 is 0.3 from 2.5: not a tie; what follows in b does not matter
    wrong = {"a": torch.tensor([[1, 3]]), "b": torch.tensor([[4, 4]])}
    assert first_flip_distance(bits, same, wrong, before) == pytest.approx(0.3)
    # a code that moved by two crossed two boundaries, one of them far
    far = {"a": same["a"], "b": torch.tensor([[5, 4]])}
    assert first_flip_distance(bits, same, far, before) == pytest.approx(1.0001, rel=1e-3)
    # a code of 16 bits is a 256th of one of 8
    assert first_flip_distance({**bits, "b": 16}, same, far, before) == pytest.approx(
        1.0001 / 256, rel=1e-3
    )


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
    assert near_tie(maps, where)
    where[3] = True
    assert not near_tie(maps, where)
    classes = torch.tensor([[1.0, 1.000001, -5.0]])
    assert near_tie(classes, torch.tensor([True]))
    assert not near_tie(torch.tensor([[1.0, 1.1, -5.0]]), torch.tensor([True]))


def nudged(ours, name, index, step):
    """Return a runtime's trace: a code off by ``step``, and another decision for the image."""
    codes = {key: value.clone() for key, value in ours.codes.items()}
    if name is not None:
        codes[name][index] += step
    output = ours.output.clone()
    output[index[0], (output[index[0]].argmax() + 1) % output.shape[1]] += 10
    return Trace(output, codes)


def test_an_exception_is_explained_by_a_tie_only(network, images):
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    _, before = reference.replay(images, ours.codes)
    fraction = (before["8_input"] - ours.codes["8_input"]).abs()
    inside = (ours.codes["8_input"] > 0) & (ours.codes["8_input"] < 15)
    far = tuple((inside & (fraction < 0.2)).nonzero()[0].tolist())

    tally = Tally(reference)
    theirs = nudged(ours, "8_input", far, 1)
    tally.add(images, ours, theirs.output, theirs)
    stage = tally.stage("somewhere")
    assert (stage.exceptions, stage.explained) == (1, 0)
    assert stage.tie_distance > 0.3
    assert stage.flipped == 1 / len(images)
    assert (stage.different, stage.first_difference, stage.ties) == (1, "8_input", 0)
    assert stage.codes == sum(codes.numel() for codes in ours.codes.values())
    assert stage.agreement == 1 - 1 / len(images)

    # no code differs, and the output is far from a tie: unexplained
    tally = Tally(reference)
    theirs = nudged(ours, None, far, 0)
    tally.add(images, ours, theirs.output, theirs)
    assert (tally.exceptions, tally.explained, tally.tie_distance) == (1, 0, None)


def test_a_flip_that_changes_no_decision_is_counted_and_explained(network, images):
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    codes = {name: value.clone() for name, value in ours.codes.items()}
    codes["8_input"][3, 0, 0, 0] += 2  # across two boundaries: no tie
    del codes["0_input"]  # a runtime without this quantizer
    tally = Tally(reference)
    tally.add(images, ours, ours.output, Trace(ours.output, codes))
    stage = tally.stage("elsewhere")
    assert (stage.different, stage.first_difference, stage.ties) == (1, "8_input", 0)
    assert stage.codes == sum(x.numel() for x in codes.values())
    assert (stage.exceptions, stage.agreement, stage.flipped) == (0, 1, 1 / len(images))
    assert "1 of" in stage.line
    assert "first at 8_input" in stage.line


def test_an_exception_that_begins_on_a_boundary_is_explained(network, images):
    """Of some thousand random codes, the nearest to a boundary is flipped."""
    reference = Reference(network("plain", bits=3))
    ours = reference.float32(images)
    value = reference.replay(images, ours.codes)[1]["0_input"]
    inside = ours.codes["0_input"].abs() < 127
    distance = torch.where(inside, (value - value.floor() - 0.5).abs(), 1.0)
    index = tuple((distance == distance.min()).nonzero()[0].tolist())
    step = 1 if value[index] > ours.codes["0_input"][index] else -1

    tally = Tally(reference)
    theirs = nudged(ours, "0_input", index, step)
    tally.add(images, ours, theirs.output, theirs)
    assert (tally.exceptions, tally.explained) == (1, 1)
    assert tally.tie_distance == pytest.approx(float(distance.min()), abs=1e-12)
    stage = tally.stage("somewhere")
    assert stage.ties == 1
    gap = (ours.output - theirs.output).abs().max() / ours.output.abs().max()
    assert stage.relative_difference == pytest.approx(float(gap))
    assert tally.tie_distance < 1e-3


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
