"""Plugins are found because they are there, and a wrong name is answered with the nearest."""

import hashlib
import re
from pathlib import Path

import pytest
from torch import nn

from sdq import plugins
from sdq.errors import RequestError, nearest

PACKAGES = ("sdq.models", "sdq.datasets", "export.formats", "hw.targets", "fl.methods")
ROOT = Path(__file__).parents[1]


def refuses(*fragments: str) -> "pytest.RaisesExc[RequestError]":
    return pytest.raises(RequestError, match="[\\s\\S]*".join(re.escape(f) for f in fragments))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_is_a_plugin(package: str) -> None:
    files = (ROOT / package.replace(".", "/")).glob("[!_]*.py")
    assert plugins.names(package) == sorted(f.stem for f in files)


def test_a_plugin_is_loaded_by_name_with_either_dash() -> None:
    module = plugins.load("sdq.models", "vgg_like")
    assert module.__name__ == "sdq.models.vgg_like"
    assert plugins.load("sdq.models", "vgg-like") is module


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with refuses("model: unknown name 'resnet2'; did you mean 'resnet20'? Known: densenet121, "):
        plugins.load("sdq.models", "resnet2")
    with refuses("dataset: unknown name 'qqqqqq'; Known: busi, cifar10"):
        plugins.load("sdq.datasets", "qqqqqq")
    for name in ("", "__init__", "../models/mlp", "os.path"):
        with refuses("model: unknown name"):
            plugins.load("sdq.models", name)


def test_nearest() -> None:
    assert (
        nearest("resnet02", ["mlp", "resnet20"]) == "did you mean 'resnet20'? Known: mlp, resnet20"
    )
    assert nearest("zzz", ["mlp", "resnet20"]) == "Known: mlp, resnet20"
    assert nearest("zzz", []) == "Known: none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net.py:build", True), ("a/b/net.py:build", True), ("/x/net.py:f", True),
        ("resnet20", False), ("net.py", False), ("data.npz", False), ("a:b", False),
    ],
)  # fmt: skip
def test_file_references(text: str, expected: bool) -> None:
    assert plugins.is_file_reference(text) == expected


def test_a_user_s_function_is_loaded_with_the_hash_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "my_net.py"
    text = "from torch import nn\ndef build(num_classes):\n    return nn.Linear(4, num_classes)\n"
    file.write_text(text)
    function, digest = plugins.load_function(f"{file}:build")
    assert isinstance(function(3), nn.Linear)
    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_a_user_s_file_may_use_what_looks_up_its_module(tmp_path: Path) -> None:
    file = tmp_path / "with_dataclass.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import pickle\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Options:\n    width: int = 3\n"
        "def build() -> int:\n    return pickle.loads(pickle.dumps(Options())).width\n"
    )
    function, _ = plugins.load_function(f"{file}:build")
    assert function() == 3


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "net.py"
        file.write_text(f"NAME = {folder!r}\ndef build():\n    return NAME\n")
        found.append(plugins.load_function(f"{file}:build")[0])
    assert [f() for f in found] == ["a", "b"]


def test_a_file_elsewhere_is_a_plugin_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "My-Own.py"
    file.write_text("VALUE = 7\n")
    module = plugins.load("hw.targets", str(file))
    assert module.VALUE == 7
    assert plugins.name_of(module.__name__) == "My-Own"
    with refuses("plugin: no file", "absent.py", "give the path of an existing .py file"):
        plugins.load("hw.targets", str(tmp_path / "absent.py"))


def test_what_is_wrong_with_a_user_s_file_is_named(tmp_path: Path) -> None:
    with refuses("no file", "give the path of an existing .py file"):
        plugins.load_function(f"{tmp_path / 'absent.py'}:build")
    broken = tmp_path / "broken.py"
    broken.write_text("def build(:\n")
    with refuses("broken.py: cannot be executed, SyntaxError"):
        plugins.load_function(f"{broken}:build")
    raising = tmp_path / "raising.py"
    raising.write_text("import no_such_module_anywhere\n")
    with refuses("raising.py: cannot be executed, ModuleNotFoundError", "mend the file"):
        plugins.load_function(f"{raising}:build")
    other = tmp_path / "other.py"
    other.write_text("def biuld(): ...\nCONSTANT = 3\n")
    with refuses("other.py: no function 'build'; did you mean 'biuld'? Known: biuld"):
        plugins.load_function(f"{other}:build")
    with refuses("other.py: no function 'CONSTANT'"):
        plugins.load_function(f"{other}:CONSTANT")


def test_arguments_are_offered_and_taken_as_known() -> None:
    def two(num_classes: int, in_channels: int = 1) -> tuple[int, int]:
        return num_classes, in_channels

    def everything(**known: int) -> dict[str, int]:
        return known

    offered = {"num_classes": 7, "in_channels": 3, "image_size": 28}
    assert plugins.call_with_known(two, **offered) == (7, 3)
    assert plugins.call_with_known(everything, **offered) == offered
    assert plugins.call_with_known(lambda: 5, **offered) == 5
