"""What an import loads, and what is said where a package of an extra is missing."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import sdq
from sdq import plugins
from sdq.errors import RequestError
from sdq.extras import missing_extra

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # typer uses names that click deprecates
    from sdq.cli import verbs

ROOT = Path(__file__).parents[1]
OPTIONAL = {"flwr", "onnx", "onnxruntime", "qonnx", "hls4ml", "pydicom", "nibabel", "finn"}
HEAVY = OPTIONAL | {"brevitas", "matplotlib", "scipy", "torchmetrics", "lightning_fabric"}


def python(code: str, **environment: str) -> str:
    """Return what a new Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    """Return the packages that are loaded once this code has run."""
    modules = python(f"import sys\n{code}\nprint(*sys.modules)")
    return {name.partition(".")[0] for name in modules.split()}


def test_the_package_loads_nothing_before_it_is_used() -> None:
    assert not loaded("import sdq") & (HEAVY | {"torch", "numpy", "pydantic"})


def test_the_engine_loads_neither_flower_nor_onnx_nor_brevitas() -> None:
    everything = "import sdq\nfor name in sdq.__all__: getattr(sdq, name)"
    found = loaded(everything)
    assert "torch" in found
    assert not found & HEAVY


def test_the_other_packages_load_no_optional_ones() -> None:
    assert not loaded("import export, fl, hw") & (HEAVY - {"scipy"})  # fl.privacy computes with it


def test_help_loads_no_torch() -> None:
    code = """
import io, contextlib
from sdq.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["--help"]) == 0
"""
    assert not loaded(code) & (HEAVY | {"torch", "numpy"})


def test_every_public_name_is_there() -> None:
    for name in sdq.__all__:
        assert getattr(sdq, name).__name__ == name
    assert set(sdq.__all__) <= set(dir(sdq))
    with pytest.raises(AttributeError, match="module 'sdq' has no attribute 'nothing'"):
        _ = sdq.nothing


def test_search_is_the_function_whatever_was_imported_before() -> None:
    code = "import sdq.search, sdq.ptq, sdq; print(type(sdq.search).__name__)"
    assert python(code) == "function\n"


# -------------------------------------------------------------------------------- missing extras


def missing(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("onnx", "export"), ("onnx.helper", "export"), ("qonnx", "export"), ("flwr.app", "fl"),
        ("hls4ml", "hls4ml"), ("pydicom", "dicom"), ("nibabel", "nifti"),
        ("cffi", "finn"),
    ],
)  # fmt: skip
def test_the_extra_of_a_missing_package_is_named(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as a build writes them; what is installed in place may be older
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].items()
    written = [
        *project["dependencies"],
        *(f"{x}; extra == '{e}'" for e, xs in optional for x in xs),
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: written)
    error = missing_extra(missing(module))
    assert isinstance(error, RequestError)
    package = module.partition(".")[0]
    assert str(error) == (
        f"{package}: must be installed for this, but is not; pip install 'sdq[{extra}]'"
    )


@pytest.mark.parametrize("module", ["torch", "sdq.nothing", "somebody_elses"])
def test_what_is_of_no_extra_is_not_explained_away(module: str) -> None:
    assert missing_extra(missing(module)) is None


@pytest.mark.parametrize("name", ["onnx", "onnx_packed", "qonnx", "finn", "hls4ml"])
def test_a_format_without_its_extra_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith(("export.", "onnx"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RequestError, match=r"onnx: must be .*; pip install 'sdq\[export\]'"):
        plugins.load("export.formats", name)


@pytest.mark.parametrize("package", ["export.formats", "fl.methods", "sdq.models", "hw.targets"])
def test_a_plugin_is_described_without_importing_it(package: str) -> None:
    for name in plugins.names(package):
        assert len(plugins.summary(package, name)) > 10, name
    assert (
        plugins.summary("sdq.models", "mlp")
        == plugins.load("sdq.models", "mlp").__doc__.split("\n")[0]
    )


def test_the_list_of_verbs_says_what_their_functions_say() -> None:
    for file in verbs.VERBS.values():
        assert len(verbs._named(file).__doc__ or "") > 10, file


def test_a_shell_completes_the_options_of_a_verb() -> None:
    typed = {"_SDQ_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    words = {"COMP_WORDS": "sdq quantize --lay"}
    code = "import sys; sys.argv = ['sdq']; from sdq.cli.main import run; run()"
    assert python(code, **typed, **words).split() == ["--layer-choices"]
    assert python(code, **(typed | {"COMP_CWORD": "1", "COMP_WORDS": "sdq qu"})).split() == [
        "quantize"
    ]
