"""The benchmark scripts fit the code that they measure."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[!_]*.py"))  # what they share has a name that begins with _


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # typer imports what click deprecates
@pytest.mark.skipif(importlib.util.find_spec("brevitas") is None, reason="brevitas is absent")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_what_it_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])  # as for a script that is run
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert "benchmarks/" in (module.__doc__ or "")  # the command that reproduces its results


def test_a_printed_command_names_no_folder_of_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    reports = importlib.import_module("_reports")
    given = ["/x/ptq.py", "--data-root", "/y", "--weights=/z/w", "--variants", "a;b=1", "--bits=2"]
    monkeypatch.setattr(sys, "argv", given)
    assert reports.command() == (
        "python benchmarks/ptq.py --data-root DIR --weights=FILE --variants 'a;b=1' --bits=2"
    )


def test_a_folder_of_rows_is_of_one_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    keep_rows = importlib.import_module("_reports").keep_rows
    asked = {"epochs": 3, "bits": "2", "seeds": "0", "out": tmp_path, "judge": "test"}
    keep_rows(tmp_path / "rows", Namespace(**asked), "bits")
    keep_rows(tmp_path / "rows", Namespace(**asked | {"bits": "3", "seeds": "1,2"}), "bits")
    with pytest.raises(SystemExit, match=r"--judge: must be test, as the rows in .* got v"):
        keep_rows(tmp_path / "rows", Namespace(**asked | {"judge": "validation"}), "bits")
    keep_rows(tmp_path / "others", Namespace(**asked | {"judge": "validation"}), "bits")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module("peers")


def test_levels_are_counted_in_the_channel_that_has_most(peers: ModuleType) -> None:
    codes = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    weight = codes * torch.tensor([[0.1], [0.7]])
    assert peers.levels(weight) == 4
    assert peers.levels(weight * (1 + 1e-7 * torch.randn(2, 5))) == 4  # a last digit is no level
    weight[0, 4] = 0.05
    assert peers.levels(weight) == 5
    eight = torch.arange(-128.0, 128.0) * 0.013
    assert peers.levels(eight[None]) == 256


def test_a_difference_counts_the_same_images(peers: ModuleType) -> None:
    ours, theirs = np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    # differences 0 1 0 0: mean 1/4, variance (1 - 1/4) / 3 = 1/4, over sqrt(4)
    difference = importlib.import_module("_peer_table").difference
    assert difference(theirs, ours) == "+25.00 ± 25.00"
    assert difference(ours, ours) == ""


def test_requirements_of_toolkits_are_read_without_importing_them(peers: ModuleType) -> None:
    toolkits = [path.stem for path in (FOLDER / "toolkits").glob("[!_]*.py")]
    assert set(peers.TOOLKITS.split(",")) <= set(toolkits)
    for name in toolkits:
        assert all("==" in requirement for requirement in peers.required(name)), name
    assert peers.required("torchao")[0].startswith("torchao==")
    assert peers.required("sdq") == ()


def measured_twice(command: Sequence[str | Path], folder: Path) -> str:
    """Run a script, and again on what it kept; return the table in the folder."""
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return (folder / "table.md").read_text()


@pytest.mark.slow
def test_toolkits_are_measured_and_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", FOLDER / "peers.py", "--data", "synthetic_derm",
        "--model", "vgg_like", "--float-epochs", "1", "--train-images", "128",
        "--test-images", "100", "--calibration", "32", "--task", "qat", "--bits", "2",
        "--epochs", "2", "--toolkits", "sdq,brevitas", "--out", tmp_path / "out",
        "--table", tmp_path / "table.md",
    ]  # fmt: skip
    table = measured_twice(command, tmp_path)
    assert "## qat, vgg_like on synthetic_derm, W2A8, seed 0" in table
    assert "| sdq | 0." in table
    assert "| brevitas | 0." in table
    assert "failed" not in table


@pytest.mark.slow
def test_a_search_method_is_measured_and_goes_on(tmp_path: Path) -> None:
    script = FOLDER / "search_methods.py"
    command = [
        sys.executable, "-W", "ignore", script, "--data", "synthetic_derm", "--model", "mlp",
        "--train-images", "200", "--float-epochs", "1", "--search-epochs", "1", "--epochs", "1",
        "--variants", "sdq,sdq;train.bin_weight=0,uniform", "--bits", "2,3", "--seeds", "0",
        "--device", "cpu", "--out", tmp_path / "out",
        "--table", tmp_path / "table.md",
    ]  # fmt: skip
    table = measured_twice(command, tmp_path)
    assert "| sdq | 2 |" in table
    assert "| sdq;train.bin_weight=0 | 3 |" in table
    assert "](table.svg)" in table
    assert (tmp_path / "table.svg").stat().st_size > 1000
    searches = {file.name for file in (tmp_path / "out").glob("search-*")}
    assert searches == {f"search-{m}-{b}-0.json" for m in ("sdq", "uniform") for b in (2, 3)}


@pytest.mark.slow
def test_bits_across_clients_are_measured_and_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", FOLDER / "federated_bits.py", "--data", "synthetic_derm",
        "--train-images", "150", "--rounds", "1", "--search-rounds", "1", "--tune-rounds", "1",
        "--clients", "2", "--widths", "4,8", "--seeds", "0", "--personal", "0:1.5",
        "--out", tmp_path / "out", "--table", tmp_path / "table.md",
    ]  # fmt: skip
    table = measured_twice(command, tmp_path)
    for row in ("uniform | 2.00", "few_bytes | 2.00", "float_more | +0.0", "0 | 1.5 | alone"):
        assert f"| {row} |" in table
    assert "few_bytes sends, up and down together, 1/" in table
    learned = [
        *command[: command.index("--personal")], "--act-choices", "2,3,4", "--avg-act-bits", "2.5",
        "--tune-from", "search", "--rows", "float,float_more,sdq,uniform,at_one_client,ptq_learned",
        "--out", tmp_path / "acts", "--table", tmp_path / "acts.md",
    ]  # fmt: skip
    subprocess.run(learned, check=True, capture_output=True)
    rows = {name: json.loads((tmp_path / f"acts/{name}-0.json").read_text())[0] for name in (
        "sdq", "uniform", "at_one_client", "ptq_learned",
    )}  # fmt: skip
    assert set(rows["uniform"]["acts"]) == {2}
    for name in ("sdq", "at_one_client", "ptq_learned"):
        assert set(rows[name]["acts"]) <= {2, 3, 4}
        assert rows[name]["bits"] <= 2


@pytest.mark.slow
def test_federated_methods_are_measured_and_go_on(tmp_path: Path) -> None:
    script = FOLDER / "federated_methods.py"
    variants = "fedavg;loss=balanced_softmax,fednpr;around=moon,fedbn,centralized"
    command = [
        sys.executable, "-W", "ignore", script, "--data", "synthetic_derm", "--train-images", "200",
        "--rounds", "1", "--seeds", "0,1", "--partitions", "dirichlet:1.0,counts:ich10",
        "--variants", variants, "--out", tmp_path / "out", "--table", tmp_path / "table.md",
    ]  # fmt: skip
    table = measured_twice(command, tmp_path)
    assert "## counts:ich10" in table
    assert "| fedbn | refused |" in table  # the network has none
    files = sorted(p.name for p in (tmp_path / "out").glob("*.json"))
    assert len(files) == 2 * 2 * 3
    measured = [v for v in variants.split(",") if v != "fedbn"]
    rows = [x.split(" | ") for x in table.splitlines() if x.startswith("| ")]
    assert all(0 < float(r[1].split()[0]) < 100 for r in rows if r[0][2:] in measured)
    assert [r[-3] for r in rows if r[0][2:] == variants.split(",")[0]] == ["0.0 ± 0.0"] * 2


@pytest.mark.slow
def test_a_published_federation_is_measured_and_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", FOLDER / "published_federations.py", "--data",
        "synthetic_derm", "--train-images", "200", "--rounds", "1", "--clients", "3", "--partition",
        "dirichlet:1.0", "--variants", "fedavg,ditto", "--out", tmp_path / "out",
        "--table", tmp_path / "table.md",
    ]  # fmt: skip
    table = measured_twice(command, tmp_path)
    rows = [x.strip("| ").split(" | ") for x in table.splitlines() if x.startswith("| ")]
    assert [(r[0], *r[3:5]) for r in rows[1:]] == [
        ("fedavg", "59.16", "90.34"), ("ditto", "", "90.59")
    ]  # fmt: skip
    assert all(0 < float(x) < 100 for row in rows[1:] for x in row[1:3])


@pytest.mark.slow
def test_bytes_of_a_federation_are_measured_and_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", FOLDER / "federated_bytes.py", "--data", "synthetic_derm",
        "--train-images", "200", "--rounds", "2", "--last", "1", "--variants", "float up=2,down=4",
        "--out", tmp_path / "out", "--table", tmp_path / "table.md",
    ]  # fmt: skip
    rows = [x for x in measured_twice(command, tmp_path).splitlines() if x.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| bits", "| float", "| up=2,down=4"]
    assert "| 1/1.0 |" in rows[1]
