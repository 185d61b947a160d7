"""One command in several processes: the first one speaks and writes, the others compute with it.

With ``--devices N`` Fabric starts the same command ``N - 1`` times more. Each process checks the
request by itself; they meet in :func:`begin`, where the first one makes the run folder and holds
its lock. The others have the folder to read, and what they write goes nowhere.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdq.errors import RequestError
from sdq.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class ReadOnlyRun(RunFolder):
    """The run folder as the other processes have it: nothing is written or locked."""

    def write_text(self, name: str, text: str) -> None:
        """Write nothing."""

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write nothing."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""


def begin(fabric: "Fabric", path: Path, request: Mapping[str, Any], *, resume: bool) -> RunFolder:
    """Start the other processes, and make or take up the run folder in the first one.

    Raises:
        RequestError: as :meth:`RunFolder.create`, in every process.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each process
    fabric.launch()
    if fabric.world_size == 1:
        return RunFolder.create(path, request, resume=resume)
    run, refusal = None, None
    if fabric.is_global_zero:
        try:
            run = RunFolder.create(path, request, resume=resume)
        except (RequestError, OSError) as error:
            refusal = error
    refusal = fabric.broadcast(refusal)
    if refusal is not None:
        raise refusal
    return run if run is not None else ReadOnlyRun(path)


def end(fabric: "Fabric") -> None:
    """Wait until every process is done."""
    fabric.barrier()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
