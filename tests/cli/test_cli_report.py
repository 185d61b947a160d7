"""``sdq report``: what a page says, compared with the run's files; and what it must never hold."""

import json
import shutil

import pytest
import torch
from html_tree import Tree, parsed, rows
from safetensors.torch import load_file, save_file

from sdq.report.page import Page, encoded, render
from sdq.report.tables import Cell, Table
from sdq.report.verdict import Verdict

NBSP = "\N{NO-BREAK SPACE}"


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def quantized(pages):
    return parsed(pages["quantized"])


@pytest.fixture(scope="module")
def metrics(derm):
    return read(derm / "quantized" / "metrics.json")


def test_the_figures_are_those_of_the_metrics(quantized, metrics):
    table = quantized.one("section", id="worth").all("table")[0]
    found = {row[0][0]: [numbers for _, numbers in row[1:]] for row in rows(table)}
    for name, label in (
        ("accuracy", "accuracy"),
        ("balanced_accuracy", "balanced accuracy"),
        ("auc", "AUC"),
        ("ece", "calibration error (ECE)"),
    ):
        assert found[label] == [[metrics["float"][name]], [metrics["quantized"][name]]]
    assert found["bytes of weights"][1] == [metrics["weight_bytes"]]
    assert found["bit operations (BitOPs) of one image"][1] == [metrics["bops"]]
    assert found["bits a weight, all layers"] == [[32.0], [metrics["avg_weight_bits_all"]]]


def test_the_classes_are_those_of_the_metrics_the_rare_first(quantized, metrics, derm):
    data = read(derm / "quantized" / "run.json")["data"]
    counts = dict(zip(data["class_names"], data["class_counts"], strict=True))
    table = quantized.one("table", id="class-table")
    names = [row[0][0].split()[0] for row in rows(table)]
    assert sorted(names) == sorted(counts)
    assert [counts[n] for n in names] == sorted(counts.values())
    for row in rows(table):
        place = data["class_names"].index(row[0][0].split()[0])
        before, after = row[1][1]
        assert before == pytest.approx(metrics["float"]["per_class_recall"][place])
        assert after == pytest.approx(metrics["quantized"]["per_class_recall"][place])
        bars = [s.attributes["aria-label"] for s in table.all("svg")]
        assert all("95 % interval" in label for label in bars)


def test_the_confusions_are_whole(quantized, metrics):
    matrices = quantized.all("table", **{"class": "matrix"})
    assert len(matrices) == 2
    for matrix, which in zip(matrices, ("float", "quantized"), strict=True):
        counts = [[int(text) for text, _ in row[1:]] for row in rows(matrix)]
        total = sum(map(sum, counts))
        assert total == metrics[which]["num_examples"]
        right = sum(counts[i][i] for i in range(len(counts)))
        assert right / total == pytest.approx(metrics[which]["accuracy"])


def test_the_layers_are_those_of_the_policy(quantized, derm):
    policy = read(derm / "quantized" / "policy.json")["layers"]
    found = rows(quantized.one("table", id="layer-table"))
    assert [row[0][0] for row in found] == [layer["name"] for layer in policy]
    assert [row[2][1] for row in found] == [[layer["weight_bits"]] for layer in policy]


def test_changed_answers(quantized, metrics):
    section = quantized.one("section", id="changed")
    count = round((1 - metrics["agreement"]) * metrics["float"]["num_examples"])
    assert section.one("p").text.startswith(f"{count:,} test images get another answer")
    pictures = section.all("img")
    assert len(pictures) == min(count, 24)
    assert all(p.attributes["src"].startswith("data:image/png;base64,") for p in pictures)
    assert all(p.attributes["alt"] for p in pictures)
    assert "mind who may see them" in section.text


def test_the_command_repeats_the_run(quantized, derm):
    command = quantized.one("code", id="command").text
    assert command.startswith(f"sdq quantize --from {derm / 'float'} --data synthetic_derm")
    assert command.endswith(f"--out {derm / 'quantized'}")


@pytest.mark.parametrize("page", ["quantized", "federated"])
def test_a_page_stands_alone_and_is_accessible(pages, page):
    root = parsed(pages[page])
    for node in [n for tag in ("img", "a", "link", "script", "iframe", "use", "image", "object")
                 for n in root.all(tag)]:  # fmt: skip
        assert node.tag in ("img", "a"), node
        for name in ("src", "href"):
            assert node.attributes.get(name, "#").startswith(("#", "data:image/png"))
    text = pages[page].read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert root.one("html").attributes["lang"] == "en"
    targets = {n.attributes["href"][1:] for n in root.all("a")}
    assert targets <= {n.attributes["id"] for n in root.all("section")}
    assert len(root.all("h1")) == 1
    assert all(n.attributes.get("aria-label") for n in root.all("svg", role="img"))
    assert all(t.all("thead") and t.all("th", scope="row") for t in root.all("table"))


@pytest.fixture
def copied(derm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(derm / "quantized", run)
    return run


def test_hostile_names_are_text(sdq, copied):
    hostile = "<script>alert(1)</script>\"'><img src=http://x onerror=y>"
    document = read(copied / "run.json")
    document["data"]["class_names"][0] = hostile
    document["data"]["reference"] = hostile
    document["model"]["reference"] = hostile
    document["command"] = f"sdq quantize --data '{hostile}'"
    (copied / "run.json").write_text(json.dumps(document))
    assert sdq(f"report {copied} --no-images --quiet").code == 0
    root = parsed(copied / "report.html")
    assert not root.all("script")
    assert not root.all("img")
    assert hostile in root.one("code", id="command").text
    assert any(hostile in row[0][0] for row in rows(root.one("table", id="class-table")))


def test_hostile_cells_and_warnings_are_text():
    bad = "<script>1</script>"
    cell = Cell(bad, 1.0, bad)
    text = render(
        Page(bad, [bad], Verdict(bad, "plain", [bad], [bad]), [Table(bad, [bad], [[cell, cell]])],
             command=bad, missing=[bad])
    )  # fmt: skip
    assert "<script" not in text
    assert Tree(text).root.one("h1").text == bad


def test_a_class_that_lost_is_warned_of(sdq, copied):
    """The quantized network forgets a class: its answers there all become another."""
    tensors = load_file(copied / "predictions.safetensors")
    labels, names = tensors["labels"], read(copied / "run.json")["data"]["class_names"]
    mel, nv = names.index("mel"), names.index("nv")
    perfect = torch.nn.functional.one_hot(labels, 7).float() * 5
    lost = perfect.clone()
    lost[labels == mel] = torch.nn.functional.one_hot(torch.tensor(nv), 7).float() * 5
    save_file({"labels": labels, "float": perfect, "quantized": lost},
              copied / "predictions.safetensors")  # fmt: skip
    done = sdq(f"report {copied} --json")
    assert done.code == 0
    (warning,) = done.json["warnings"]
    count = int((labels == mel).sum())
    assert warning.startswith(f"mel: {count} of {count} right before, 0 after: 100.0 points lost")
    root = parsed(copied / "report.html")
    assert root.one("div", id="verdict").attributes["class"] == "verdict bad"
    assert warning in root.one("ul", id="warnings").text
    assert warning in done.out


def test_data_that_are_gone(sdq, files, tmp_path):
    """With predictions all but the pictures is there; without, the page says what is missing."""
    run, data = tmp_path / "run", tmp_path / "own.npz"
    shutil.copy(files / "ok.npz", data)
    command = f"quantize --from {files / 'float'} --data {data} --bits 2 --epochs 1"
    assert sdq(f"{command} --search-method uniform --quiet --out {run}").code == 0
    data.unlink()
    done = sdq(f"report {run} --json --quiet")
    assert done.code == 0
    missing = " ".join(done.json["missing"])
    assert f"its data, {data}, must be where they were, but are not; name them" in missing
    assert "Pictures of test images" in missing
    root = parsed(run / "report.html")
    assert root.all("table", id="class-table")
    assert not root.all("img")
    (run / "predictions.safetensors").unlink()
    missing = " ".join(sdq(f"report {run} --json --quiet").json["missing"])
    assert "Classes, confusions, confidence and changed answers" in missing
    root = parsed(run / "report.html")
    assert not root.all("table", id="class-table")
    assert "went from" in root.one("div", id="verdict").text


def test_predictions_are_computed_where_they_were_not_kept(sdq, derm, copied):
    before = rows(parsed(derm / "quantized" / "report.html").one("table", id="class-table"))
    (copied / "predictions.safetensors").unlink()
    document = read(copied / "run.json")
    del document["data"]["class_counts"], document["command"]
    (copied / "run.json").write_text(json.dumps(document))
    assert sdq(f"report {copied} --quiet").code == 0
    root = parsed(copied / "report.html")
    assert rows(root.one("table", id="class-table")) == before
    assert not root.all("code", id="command")


def test_a_uniform_run_and_a_device_beside_it(sdq, derm, copied):
    beside = copied.with_name("<i>uniform")
    shutil.copytree(copied, beside)
    done = sdq("report", copied, "--beside", beside, "--target", "bit_fusion", "--quiet")
    assert done.code == 0, done.err
    table = parsed(copied / "report.html").one("section", id="worth").all("table")[0]
    assert [h.text for h in table.one("thead").all("th")] == [
        "",
        "float",
        "quantized",
        "<i>uniform",
    ]
    found = {row[0][0]: [n for _, n in row[1:]] for row in rows(table)}
    cost = sdq(f"cost {copied} --target bit_fusion --json --quiet").json["total"]
    assert found["seconds for one image"][1:] == [[cost["latency_s"]], [cost["latency_s"]]]


def test_runs_of_other_verbs(sdq, files, tmp_path):
    for name in ("float", "searched"):
        out = tmp_path / f"{name}.html"
        assert sdq(f"report {files / name} --out {out} --quiet").code == 0
        root = parsed(out)
        assert root.one("h1").text.endswith(name)
    assert len(parsed(tmp_path / "float.html").all("table", **{"class": "matrix"})) == 1
    assert "nothing is measured yet" in root.one("div", id="verdict").text
    assert root.all("table", id="layer-table")


def test_verification_is_told(sdq, copied):
    pytest.importorskip("onnx")
    assert sdq(f"export {copied} --format qonnx --verify --samples 20 --quiet").code == 0
    record = read(copied / "export" / "qonnx" / "verification.json")["qonnx"]
    sdq(f"report {copied} --quiet")
    (row,) = rows(parsed(copied / "report.html").one("section", id="exports").one("table"))
    assert row[2][0] == "verified"
    assert row[3] == (f"0 of {record['exact']['codes']:,}", [0.0])
    assert row[5][1] == [20.0]
    again = "--format qonnx --overwrite --with-preprocessing --quiet"
    assert sdq(f"export {copied} {again}").code == 0
    sdq(f"report {copied} --quiet")
    (row,) = rows(parsed(copied / "report.html").one("section", id="exports").one("table"))
    assert row[2][0] == "changed since it was compared; export again"


def test_metrics_of_segmentation_are_shown(sdq, copied):
    """Whatever the metrics are: of one answer a pixel there are no classes of images."""
    found = read(copied / "metrics.json")
    for name, dice in (("float", 0.91), ("quantized", 0.89)):
        found[name] = {"dice": dice, "iou": dice - 0.1, "num_examples": 30, "boundary": 2.5}
    (copied / "metrics.json").write_text(json.dumps(found))
    (copied / "predictions.safetensors").unlink()
    assert sdq(f"report {copied} --quiet").code == 0
    root = parsed(copied / "report.html")
    table = root.one("section", id="worth").all("table")[0]
    told = {row[0][0]: [numbers for _, numbers in row[1:]] for row in rows(table)}
    assert told["Dice"] == [[0.91], [0.89]]
    assert told["boundary"] == [[2.5], [2.5]]
    assert "Dice went from 91.0 % to 89.0 %" in root.one("div", id="verdict").text
    # the network classifies all the same: it has no outlines
    assert "must give maps (N, C, H, W)" in (copied / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "metrics.json").unlink(), "has no metrics.json"),
        (lambda run: (run / "metrics.json").write_text("{}"), "its files must be as"),
        (lambda run: (run / "policy.json").write_text("[]"), "must be an object"),
        (lambda run: (run / "log.jsonl").write_text("{\n"), None),
        (lambda run: (run / "log.jsonl").write_text("3\n"), None),
        (lambda run: (run / "predictions.safetensors").write_bytes(b"x"), "whole safetensors"),
        (lambda run: (run / "run.json").write_text('{"schema": "sdq.run/1"}'), "field required"),
        (
            lambda run: (run / "run.json").write_text(
                '{"schema": "sdq.run/1", "status": "done", "request": {"verb": "evaluate"}}'
            ),
            "must be a run of train, search, quantize, federate, got one of 'evaluate'",
        ),
    ],
)
def test_damaged_runs(sdq, copied, change, message):
    change(copied)
    done = sdq(f"report {copied} --no-images --json --quiet")
    if message is None:  # a part is missing, and the page says so
        assert done.code == 0
        assert "log.jsonl: must have" in " ".join(done.json["missing"])
    else:
        assert done.code == 2
        assert message in done.err


def test_requests_that_cannot_be_met(sdq, copied, files, tmp_path):
    for command, message in (
        (f"report {tmp_path}", "must be a run folder"),
        (f"report {copied} --fps 3", "must stand with --target"),
        (f"report {copied} --beside {files / 'float'}", "on the same images"),
        (f"report {copied} --target nowhere", "unknown name"),
    ):
        done = sdq(command)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    document = read(copied / "run.json")
    (copied / "run.json").write_text(json.dumps(document | {"status": "running"}))
    assert "continue it with --resume" in sdq(f"report {copied}").err


def test_no_report(sdq, files, tmp_path):
    run = tmp_path / "run"
    command = f"search --from {files / 'float'} --data {files / 'ok.npz'} --bits 2"
    sdq(f"{command} --search-method uniform --quiet --no-plots --no-report --out {run}", plots=True)
    assert not (run / "report.html").exists()


def test_a_run_that_cannot_be_reported_is_done(sdq, files, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdq.cli.report.write_bytes_atomically", fail)
    run = tmp_path / "run"
    command = f"search --from {files / 'float'} --data {files / 'ok.npz'} --bits 2 --no-plots"
    done = sdq(f"{command} --search-method uniform --quiet --out {run}", plots=True)
    assert done.code == 0
    assert "the run is done, but without report" in done.err


def test_a_name_that_the_locale_cannot_decode_keeps_its_bytes():
    in_ascii = "q é".encode().decode("ascii", "surrogateescape")  # as LC_ALL=C has a path
    assert encoded(f"<p>{in_ascii} µ</p>") == "<p>q é µ</p>".encode()


def test_half_a_character_of_a_damaged_file_does_not_stop_the_page():
    assert encoded("<p>\ud800 µ \udfff</p>") == "<p>? µ ?</p>".encode()
