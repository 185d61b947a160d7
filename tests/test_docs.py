"""What the documentation shows is what happens.

Pages under ``docs/tutorials`` and ``docs/how-to`` are run as printed, block after block, in a
folder of their own: ``bash`` and ``python`` blocks must succeed, a block with ``file=NAME`` is that
file, and ``text`` is output. Commands on every other page must at least be known to ``sdq``.
"""

import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer's import of click
    import typer

    from sdq.cli import verbs

ROOT = Path(__file__).parents[1]
RUN = sorted((ROOT / "docs" / "tutorials").glob("*.md")) + sorted(
    (ROOT / "docs" / "how-to").glob("*.md")
)
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)[ ]*(?:file=(\S+))?[ ]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAND_INS = {"D": "synthetic_derm", "DATA": ".", "T": "pynq_z2", "B": "2", "X": "fedavg"}


@dataclass(frozen=True)
class Block:
    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=named)
def test_a_page_works_as_printed(page: Path, tmp_path: Path) -> None:
    if "finn" in page.read_text(encoding="utf-8"):
        pytest.importorskip("finn")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(tmp_path)))
    for block in blocks(page):
        assert block.language in ("bash", "python", "text"), "a block must say what it is"
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.language != "text":
            shell = ["bash", "-euo", "pipefail", "-c", block.text]
            script = [sys.executable, "-c", block.text]
            done = subprocess.run(
                shell if block.language == "bash" else script,
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def commands(page: Path) -> list[list[str]]:
    """Return the lines of a page's blocks that call ``sdq``, without what a shell makes of them."""
    found = []
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("sdq ") else []
            # a usage line, with choices or with something left out, is no command
            if words and not any("|" in w or "[" in w or w == "..." for w in words):
                found.append(words[1:])
    return found


@cache
def command_of(verb: str) -> click.Command:
    app = typer.Typer()
    verbs.register(app, [verb])
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group.commands[verb]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=named)
def test_commands_on_a_page_are_commands(page: Path) -> None:
    for words in commands(page):
        verb = words[0]
        assert verb in verbs.VERBS, f"{named(page)}: sdq has no verb {verb!r}"
        command = command_of(verb)
        arguments = [STAND_INS.get(word, word) for word in words[1:]]
        try:
            with command.make_context(verb, arguments):
                pass
        except click.UsageError as error:
            pytest.fail(f"{named(page)}: sdq {' '.join(words)}: {error.format_message()}")


def tree() -> dict[str, str]:
    """Return what docs/architecture.md lists of each package."""
    listed = blocks(ROOT / "docs" / "architecture.md")[0].text
    parts = re.split(r"^(\w+)/ ", listed, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("package", ["sdq", "fl", "export", "hw"])
def test_the_architecture_names_every_module(package: str) -> None:
    """By itself, or by its folder; the modules of ``sdq/cli`` by themselves."""
    listed = tree()[package]
    for path in (ROOT / package).rglob("*.py"):
        *folders, name = path.relative_to(ROOT / package).with_suffix("").parts
        if name != "__init__":
            wanted = rf"{name}\b" if folders in ([], ["cli"]) else f"{folders[0]}/"
            assert re.search(rf"\b{wanted}", listed), path


@pytest.mark.parametrize("package", ["sdq", "fl"])
def test_what_the_architecture_names_is_there(package: str) -> None:
    folder = ROOT / package
    for line in tree()[package].splitlines()[1:]:
        found = re.match(r"( {2}| {4})(\w\S*(?: \S+)*?)(?: {2,}|$)", line)
        if found is not None:  # else a line goes on with what was said of the names above
            where = folder / "cli" if len(found[1]) == 4 else folder
            for name in found[2].split():
                assert (where / name).is_dir() or (where / f"{name}.py").is_file(), name
