"""Checkpoints: module, optimizer and progress in one safetensors file, written atomically."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sdq.errors import RequestError


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash or a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say where, and ours is the name known
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, atomically; shared storage is copied."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes_atomically(path, save(plain, metadata=dict(metadata or {})))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        RequestError: no such file, or not a whole safetensors file.
    """
    if not path.is_file():
        raise RequestError(f"weights: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(
            f"{path}: must be a whole safetensors file, but: {error!s:.200}; copy or write it anew"
        ) from None


class Stateful(Protocol):
    """What a training remembers besides module and optimizer, as tensors by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors."""
        ...

    def load_state_dict(self, tensors: dict[str, Any]) -> object:
        """Take up such tensors; RuntimeError if they do not fit."""
        ...


class Checkpoint:
    """The state of one phase of training, in one file.

    Args:
        path: of the file; it need not exist yet.
        identity: what must be equal for a resume to make sense (configuration, data, seed).
    """

    def __init__(self, path: Path, identity: Mapping[str, object] | None = None) -> None:
        self.path = path
        self.identity = json.dumps(identity or {}, sort_keys=True, default=str)

    def save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        rest: Stateful | None = None,
    ) -> None:
        """Save the state after this many epochs."""
        tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
        if rest is not None:
            tensors |= {f"rest.{k}": v for k, v in rest.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
        save_tensors(self.path, tensors, {"epochs": str(epochs), "identity": self.identity})

    def load_(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, rest: Stateful | None = None
    ) -> int:
        """Restore the saved state, if there is one, and return the number of epochs it has.

        Raises:
            RequestError: the file is damaged, or belongs to another run.
        """
        if not self.path.exists():
            return 0
        tensors, metadata = load_tensors(self.path)
        if metadata.get("identity") != self.identity:
            raise RequestError(
                f"{self.path}: must be of this run, but data or configuration differ; "
                "resume with the same arguments, or start in a new folder"
            )
        own, more, state = _groups(tensors)
        try:
            module.load_state_dict(own)
            if rest is not None:
                rest.load_state_dict(more)
            _check_optimizer(optimizer, state)
            epochs = int(metadata["epochs"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise RequestError(
                f"{self.path}: must be of this network, but its tensors are of another; "
                "start in a new folder"
            ) from error
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return epochs


def _groups(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Return the tensors of the module, of the rest, and of the optimizer by parameter."""
    own: dict[str, Tensor] = {}
    more: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, path = name.partition(".")
        if kind == "module":
            own[path] = tensor
        elif kind == "rest":
            more[path] = tensor
        else:
            index, _, key = path.partition(".")
            state.setdefault(int(index) if index.isdecimal() else -1, {})[key] = tensor
    return own, more, state


def _check_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Raise ValueError unless the state is of these parameters; torch would find out in a step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, found in state.items():
        if not 0 <= index < len(parameters) or set(found) != set(next(iter(state.values()))):
            raise ValueError(f"optimizer: no parameter {index} with {sorted(found)}")
        for key, tensor in found.items():
            if tensor.shape not in (parameters[index].shape, torch.Size()):
                raise ValueError(f"optimizer: {key} of parameter {index} has another shape")
            if key == "step" and not 0 <= float(tensor) < 2**53:
                raise ValueError(f"optimizer: step must count steps, got {float(tensor)}")
