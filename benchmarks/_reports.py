"""What the benchmark scripts share: common options, the command a table prints, its figures."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdq.batches import first_weights, generator
from sdq.data import ImageSet, Splits
from sdq.plugins import call_with_known, load

OUTSIDE = {"--data-root": "DIR", "--weights": "FILE"}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def data_parser(description: str | None, model: str | None = "resnet20") -> argparse.ArgumentParser:
    """Return a parser of the data set and, with a default, of the model."""
    found = parser(description)
    found.add_argument("--data", required=True)
    found.add_argument("--data-root", type=Path)
    if model is not None:
        found.add_argument("--model", default=model)
    return found


def untrained(name: str, splits: Splits, seed: int, **sizes: Any) -> nn.Module:
    """Return a model by name for a data set, with first weights that follow from the seed.

    ``sizes`` are for models that take them.
    """
    with first_weights(seed):
        network: nn.Module = call_with_known(
            load("sdq.models", name).build, num_classes=len(splits.class_names),
            in_channels=splits.image_shape[0], image_size=splits.image_shape[-1], **sizes,
        )  # fmt: skip
    return network


def part(images: ImageSet, count: int, purpose: str = "part of the images") -> ImageSet:
    """Return so many images of a set, the same ones whatever the seed; 0: all."""
    if not count:
        return images
    order = torch.randperm(len(images), generator=generator(0, purpose))
    return images.subset(order[:count].sort().values)


def keep_rows(folder: Path, options: argparse.Namespace, *told: str) -> None:
    """Make the folder of finished rows, or refuse one whose rows are of other settings.

    Args:
        folder: of the rows.
        options: of this call.
        told: names of the options that rows, by their files' names or their own words, tell.

    Raises:
        SystemExit: another option is not what the folder's rows were measured with.
    """
    free = {"out", "table", "commands", "data_root", "seeds", *told}
    asked = {name: str(value) for name, value in vars(options).items() if name not in free}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(asked, indent=1))
    had = json.loads(file.read_text())
    for name in sorted(asked.keys() | had.keys()):
        if asked.get(name) != had.get(name):
            raise SystemExit(
                f"--{name.replace('_', '-')}: must be {had.get(name)}, as the rows in {folder} "
                f"have it, got {asked.get(name)}; give another --out"
            )


def command() -> str:
    """Return this run's command; what lies outside the project by a name that says what it is."""
    words = sys.argv[1:]
    if "--data" in words:
        at = words.index("--data") + 1
        words[at] = f"DIR/{Path(words[at]).name}" if "/" in words[at] else words[at]
    for option, name in OUTSIDE.items():
        if option in words:
            words[words.index(option) + 1] = name
        words = [f"{option}={name}" if w.startswith(f"{option}=") else w for w in words]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def resident(field: str) -> int:
    """Return the resident set (VmRSS) or its highest value (VmHWM) in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def write(table: Path | None, lines: list[str]) -> None:
    """Print a table's lines, and write them to its file if one is given."""
    print("\n".join(lines))
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join(lines) + "\n")
