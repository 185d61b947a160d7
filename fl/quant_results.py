"""What a federation that learns bits leaves in run folders; they are those of ``sdq quantize``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl.bits import FederatedBits
from fl.evaluation import primary
from fl.phase_settings import PhaseSettings
from fl.record import Tensors
from fl.results import metrics
from sdq.quant_model import QuantModel
from sdq.run_folder import SCHEMA, RunFolder, versions


def write_model(run: RunFolder, qmodel: QuantModel, network: Tensors) -> None:
    """Write a quantized model with its policy, and the float model's state."""
    run.update(quant=qmodel.config.model_dump())
    run.write_tensors("float.safetensors", network)
    run.write_tensors("model.safetensors", qmodel.state_dict())
    run.write_policy(qmodel.policy)
    run.write_layers(qmodel.layers)


def write_own(
    folder: Path, described: Mapping[str, Any], qmodel: QuantModel, network: Tensors,
    figures: Mapping[str, Any], tested: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Write a client's own model as a run folder; return its metrics.

    Args:
        folder: what is in it from an earlier time is replaced.
        described: what ``run.json`` says of data and network.
        qmodel: the model.
        network: the state of the float model that it was tuned from.
        figures: of its bits.
        tested: its metrics on the client's test images, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    begun = {"schema": SCHEMA, "status": "running", "versions": versions()}
    run.write_json("run.json", begun | dict(described))
    write_model(run, qmodel, network)
    found = {**figures, **({} if tested is None else {"quantized": dict(tested)})}
    run.write_json("metrics.json", found)
    run.update(status="done")
    return found


def write_course(run: RunFolder, done: FederatedBits) -> None:
    """Write the course of the bits to ``log.jsonl``."""
    for number, record in enumerate(done.course):
        run.log({"phase": "search", "epoch": number + 1, **record})


def of_phases(done: FederatedBits) -> dict[str, Any]:
    """Return what ``metrics.json`` says of each phase."""
    return {
        name: {
            "rounds": len(part.history), "bytes_up": part.bytes_up, "bytes_down": part.bytes_down,
            **({"generalization": part.generalization} if part.generalization else {}),
        }
        for name, part in done.phases.items()
    }  # fmt: skip


def close_bits(
    run: RunFolder, settings: PhaseSettings, done: FederatedBits, names: list[str]
) -> None:
    """Write the result to the run folder of a server whose clients are elsewhere.

    Args:
        run: the folder.
        settings: of the federation.
        done: its result.
        names: of the clients.
    """
    write_model(run, settings.tuned(done.float_state, done.policy, done.state), done.float_state)
    write_course(run, done)
    clients = {
        names[client]: {
            **model.policy.figures(),
            **({"quantized": primary(e)} if (e := model.evaluation.get("test")) else {}),
        }
        for client, model in done.personal.items()
    }
    found = {**done.policy.figures(), "phases": of_phases(done), "clients": clients}
    run.write_json("metrics.json", {**found, **metrics(done, names)})
    run.update(status="done")
