"""``sdq report`` of federations: what the page says of clients, rounds and learned bits."""

import json
import shutil

import pytest
from html_tree import parsed, rows


def read(path):
    return json.loads(path.read_text())


def test_a_federation(pages):
    root, run = parsed(pages["federated"]), pages["federated"].parent
    found = {m: read(run / m / "metrics.json") for m in ("fedavg", "fca")}
    table = root.one("section", id="worth").all("table")[0]
    by_name = {row[0][0]: [numbers for _, numbers in row[1:]] for row in rows(table)}
    for kind, letter in (("generalization", "G"), ("specialization", "S")):
        assert by_name[f"{letter}: balanced accuracy"] == [
            [found[m][kind]["balanced_accuracy"]] for m in found
        ]
    assert by_name["sent to the server"] == [[found[m]["bytes_up"]] for m in found]
    assert by_name["worst client (S)"] == [
        [found[m]["specialization"]["worst_balanced_accuracy"]] for m in found
    ]
    titles = [f.text for f in root.all("figcaption")]
    assert "fca: each client's own network on its own test images" in titles
    captions = {t.one("caption").text: t for t in root.all("table") if t.all("caption")}
    log = [json.loads(x) for x in (run / "fca" / "log.jsonl").read_text().splitlines()]
    rounds = rows(captions["fca: round by round"])
    assert [row[4][1] for row in rounds] == [[r["bytes_up"]] for r in log]
    clients = read(run / "fca" / "run.json")["clients"]
    counted = rows(captions["Who has which images"])
    assert [row[0][0] for row in counted] == [c["name"] for c in clients]
    assert [sum(n[0] for _, n in row[4:]) for row in counted] == [
        c["num_examples"]["train"] for c in clients
    ]


def test_who_failed_is_told(sdq, pages, tmp_path):
    run = tmp_path / "fed"
    shutil.copytree(pages["federated"].parent, run)
    found = read(run / "fca" / "metrics.json")
    found["failures"] = [{"round": 2, "client": 1, "reason": "<b>no answer</b>"}]
    (run / "fca" / "metrics.json").write_text(json.dumps(found))
    assert sdq(f"report {run} --quiet").code == 0
    captions = {t.one("caption").text: t for t in parsed(run / "report.html").all("table")
                if t.all("caption")}  # fmt: skip
    name = read(run / "fca" / "run.json")["clients"][1]["name"]
    assert [[text for text, _ in row] for row in rows(captions["Clients left out"])] == [
        ["fca", "2", name, "<b>no answer</b>"]
    ]


@pytest.fixture
def learned_together(files, pages, tmp_path):
    """A federation that learned bits: one's rounds, and the networks of another run."""
    run = tmp_path / "together"
    shutil.copytree(pages["federated"].parent / "fca", run)
    for name in ("policy.json", "layers.json", "float.safetensors", "model.safetensors",
                 "predictions.safetensors"):  # fmt: skip
        shutil.copy(files / "quantized" / name, run / name)
    found, own = (read(r / "metrics.json") for r in (files / "quantized", run))
    (run / "metrics.json").write_text(json.dumps({**own, **found}))
    document = read(run / "run.json") | {"quant": read(files / "quantized" / "run.json")["quant"]}
    (run / "run.json").write_text(json.dumps(document))
    records = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    records += [{**r, "phase": "tune rounds"} for r in records if r["phase"] == "federate"]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def test_bits_learned_together(sdq, learned_together):
    run = learned_together
    done = sdq(f"report {run} --no-images --json --quiet")
    assert done.code == 0, done.err
    root = parsed(run / "report.html")
    networks, methods = root.one("section", id="worth").all("table")
    metrics = read(run / "metrics.json")
    found = {row[0][0]: [numbers for _, numbers in row[1:]] for row in rows(networks)}
    assert found["bytes of weights"][1] == [metrics["weight_bytes"]]
    found = {row[0][0]: [numbers for _, numbers in row[1:]] for row in rows(methods)}
    assert found["sent to clients"] == [[metrics["bytes_down"]]]
    assert root.all("table", id="class-table")
    assert root.all("table", id="layer-table")
    captions = {t.one("caption").text: t for t in root.all("table") if t.all("caption")}
    rounds = rows(captions["fca: round by round"])
    assert [(row[0][0], row[1][0]) for row in rounds] == [
        ("1", "federate"), ("2", "federate"), ("3", "tune rounds"), ("4", "tune rounds")
    ]  # fmt: skip


def test_a_server_that_does_not_know_its_clients(sdq, pages, tmp_path):
    run = tmp_path / "served"
    shutil.copytree(pages["federated"].parent / "fca", run)
    document = read(run / "run.json")
    del document["clients"]
    document["data"] |= {"reference": None, "fingerprint": None}
    (run / "run.json").write_text(json.dumps(document))
    assert sdq(f"report {run} --quiet").code == 0
    root = parsed(run / "report.html")
    text = " ".join(p.text for p in root.one("header").all("p"))
    assert "Data: the clients keep them." in text
    assert "3 clients (such as hospitals) trained it together" in text
    assert "client 0" in root.one("section", id="worth").text
