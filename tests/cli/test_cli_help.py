"""The help of every verb: examples that hold, arguments explained, the same options everywhere."""

import os
import re
import shlex
import subprocess
import sys

import click
import pytest
import typer

from sdq.cli import completion, verbs

VERBS = list(verbs.VERBS)


def command(verb):
    app = typer.Typer()
    verbs.register(app, [verb])
    group = typer.main.get_command(app)
    return group.commands[verb]


def examples(verb):
    text = " ".join(command(verb).help.split())
    return re.findall(r"`(sdq [^`]*)`", text.partition("Example")[2])


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_commands(verb):
    """Whatever an option is called or takes, the parser that runs the verb has read it."""
    found = examples(verb)
    assert found, f"sdq {verb} --help has no example"
    for example in found:
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("sdq", verb)
        context = command(verb).make_context(verb, arguments)  # raises click.UsageError
        assert any(value not in (None, False, ()) for value in context.params.values())


def test_a_wrong_example_would_be_found():
    for wrong in (["--bitts", "2"], ["--data", "d", "--out", "o", "--bits", "two"]):
        with pytest.raises(click.UsageError):
            command("quantize").make_context("quantize", wrong)


@pytest.mark.parametrize("verb", VERBS)
def test_everything_is_explained(sdq, verb):
    for parameter in command(verb).params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        plain = parameter.name in ("batch_size", "runs", "run")
        assert getattr(parameter, "help", None) or plain, f"{verb}: {parameter.name} has no help"


def test_arguments_are_explained_in_the_help_itself(sdq):
    text = " ".join(sdq("cost --help").out.split())
    assert "A run folder, or the policy.json in one." in text


@pytest.mark.parametrize("verb", VERBS)
def test_quiet_and_json_are_everywhere(verb):
    names = {option for p in command(verb).params for option in p.opts}
    assert {"--json", "--quiet"} <= names


def test_names_are_completed():
    models = completion.of("sdq.models")
    assert models("resnet2") == ["resnet20"]
    assert completion.several("fl.methods")("fedprox,fedpr") == []
    assert completion.several("fl.methods")("fedavg,fedavgm,fedpr") == ["fedavg,fedavgm,fedprox"]
    assert "onnx-packed" in completion.several("export.formats", dashes=True)("onnx")
    assert completion.words("finn", "hls4ml")("h") == ["hls4ml"]


def test_paths_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.npz").touch()
    offer = completion.of("sdq.datasets")
    assert offer("da") == ["data/"]
    assert offer("data/") == ["data/own.npz"]
    assert offer("data/o") == ["data/own.npz"]
    assert offer("nowhere/x") == []


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("sdq list me", 2, {"methods"}),
        pytest.param("sdq cost q --target pyn", 4, {"pynq_z2"}, marks=pytest.mark.slow),
        pytest.param("sdq rep", 1, {"report"}, marks=pytest.mark.slow),
    ],
)
def test_a_shell_is_told_what_may_follow(words, place, expected):
    program = "import sys; sys.argv = ['sdq']; from sdq.cli.main import run; run()"
    asked = {"_SDQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == expected


def test_the_list_quietly(sdq):
    names = sdq("list targets --json").json["targets"]
    assert sdq("list targets --quiet").out.split() == names
