"""What a federation leaves in a run folder, for ``sdq evaluate`` and ``sdq quantize --from``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl.method import Method, pools_images
from fl.phase_settings import PhaseSettings
from fl.run import Federated
from fl.setting import Setting, centred
from sdq.data import Splits
from sdq.run_folder import RunFolder, fingerprint

LOGGED = {"float": "federate", "search": "search rounds", "tune": "tune rounds"}
"""What the log calls a phase; ``search`` there is the course of the bits."""


@dataclass(frozen=True)
class Description:
    """What ``run.json`` says of a network and the data it is for.

    Args:
        setting: of the federation; where bits are learned, of all phases.
        model: a name of ``sdq list models``.
        class_names: in the order of the labels.
        reference: where the images are, as ``--data`` has it; None: this side has none.
        splits: the images of that reference.
    """

    setting: Setting | PhaseSettings
    model: str
    class_names: Sequence[str]
    reference: str | None = None
    splits: Splits | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        setting, splits = self.setting, self.splits
        pixels = setting.normalization or centred(setting.image_shape[0])
        parts = {} if splits is None else {n: getattr(splits, n) for n in ("train", "val", "test")}
        return {
            "request": {
                "verb": "federate",
                "model": self.model,
                "data": {
                    "reference": self.reference, "root": None, "image_size": None, "mean": None,
                    "std": None, "split": "0.7,0.1,0.2", "seed": setting.config.seed,
                    "division_seed": None, "batch_size": setting.config.batch_size,
                },
                "federation": setting.config.model_dump(mode="json"),
                "methods": {setting.method.name: setting.method.config.model_dump(mode="json")},
            },
            "data": {
                "reference": self.reference,
                "fingerprint": None if splits is None else fingerprint(splits),
                "class_names": list(self.class_names),
                "image_shape": list(setting.image_shape),
                "num_examples": {n: len(p) for n, p in parts.items() if p is not None},
                "mean": list(pixels.mean),
                "std": list(pixels.std),
            },
            "model": {"reference": self.model, "sha256": None},
            "seed": setting.config.seed,
            "methods": [setting.method.name],
        }  # fmt: skip


def open_run(path: Path, description: Description) -> RunFolder:
    """Return the server's run folder: a new one, or that of the same federation to go on with.

    Raises:
        RequestError: another federation, or something else, is in the folder; or a process that
            still runs holds it.
    """
    fields, setting = description.to_json(), description.setting
    request = fields.pop("request")
    if isinstance(setting, PhaseSettings):
        request |= {"rounds": setting.rounds, **setting.identity()}
    resume = (path / "run.json").is_file()
    run = RunFolder.create(path, request, resume=resume)
    run.update(**fields, status="running", **of_method(setting.method))
    return run


def of_method(method: Method) -> dict[str, Any]:
    """Return what ``run.json`` says of a method, for who reads the run."""
    return {"server_model": method.has_server_model, "pools_images": pools_images(method)}


def log_round(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write a round's summary, or what went wrong before and after them, to ``log.jsonl``.

    Where bits are learned it has a ``phase``.
    """
    summary = dict(summary)
    phase = LOGGED[summary.pop("phase", "float")]
    if "round" in summary:
        record = short(summary)
        now = round(time.time(), 3)
        run.log({"phase": phase, "epoch": record["round"], "time": now, **record})
        return
    for what in ("counts", "own"):
        if what in summary:
            run.log({"phase": what, "epoch": 0, "failures": summary[what]})


def short(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's summary without the figures of every view, its round counted from 1."""
    found = {**summary, "round": summary["round"] + 1}
    for name in ("generalization", "specialization"):
        if name in found:
            found[name] = {
                part: {k: v for k, v in figures.items() if k != "views"}
                for part, figures in found[name].items()
            }
    return found


def close_run(run: RunFolder, done: Federated, names: Sequence[str]) -> None:
    """Write the result to the server's run folder."""
    run.write_tensors("model.safetensors", done.state)
    run.write_json("metrics.json", metrics(done, names))
    run.update(status="done")


def metrics(done: Federated, names: Sequence[str]) -> dict[str, Any]:
    """Return what ``metrics.json`` says of a federation whose clients have these names."""
    special = done.specialization
    return {
        "generalization": done.generalization,
        "specialization": special,
        "worst_client": names[special["worst_client"]] if special else None,
        "rounds": len(done.history),
        "selected_round": done.round,
        "selected_by": done.selected_by,
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
        **({} if done.privacy is None else {"privacy": done.privacy}),
        "failures": done.failures,
    }
