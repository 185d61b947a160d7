"""A file of the user's that hides one of our packages is named, with the repair."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdq._guard import OURS, foreign_module


def test_nothing_is_hidden_here() -> None:
    assert set(OURS) == {"export", "fl", "hw"}
    assert foreign_module() is None


def test_a_foreign_file_is_named_with_the_repair(tmp_path: Path) -> None:
    file = tmp_path / "export.py"
    file.write_text("THEIRS = True\n")
    result = subprocess.run(
        [sys.executable, "-c", "import sdq; print(sdq.QuantConfig().act_bits)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4\n"  # the engine itself works
    assert "UserWarning: sdq: package 'export' must be" in result.stderr
    assert f"but {file.resolve()} hides it; rename that file, run from another" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that Python searches first, as it does the current one."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["{}.py", "{}/__init__.py"])
def test_a_file_or_package_is_named(first_on_the_path: Path, name: str, form: str) -> None:
    file = first_on_the_path / form.format(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    message = foreign_module()
    assert message is not None
    assert message.startswith(f"sdq: package {name!r} must be")
    assert f"but {file.resolve()} hides it; rename that file" in message


def test_a_plain_folder_is_named_where_it_hides_ours(first_on_the_path: Path) -> None:
    # it does if ours is installed in place, and does not if ours lies in site-packages
    folder = first_on_the_path / "hw"
    folder.mkdir()
    (first_on_the_path / "exports.py").write_text("")
    spec = importlib.util.find_spec("hw")
    assert spec is not None
    message = foreign_module()
    if spec.origin is None:
        assert message is not None
        assert f"but {folder.resolve()} hides it" in message
    else:
        assert message is None
