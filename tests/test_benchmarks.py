"""The benchmark scripts fit the code that they measure."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # typer imports what click deprecates
@pytest.mark.skipif(importlib.util.find_spec("brevitas") is None, reason="brevitas is absent")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_what_it_imports(script: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert "benchmarks/" in (module.__doc__ or "")  # the command that reproduces its results


@pytest.mark.slow
def test_a_search_method_is_measured_and_goes_on(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "search_methods.py"
    command = [
        sys.executable, "-W", "ignore", script, "--data", "synthetic_derm", "--model", "mlp",
        "--train-images", "200", "--float-epochs", "1", "--search-epochs", "1", "--epochs", "1",
        "--variants", "sdq,uniform;train.bin_weight=0", "--seeds", "0", "--device", "cpu",
        "--out", tmp_path / "out", "--table", tmp_path / "table.md",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| sdq | 2 |" in table
    assert "| uniform;train.bin_weight=0 | 2 |" in table
