"""``--teacher``: another network whose soft labels phase 2 learns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdq.batches import Normalization
from sdq.cli import inputs as inp
from sdq.errors import RequestError
from sdq.run_folder import RunFolder


@dataclass(frozen=True)
class TeacherRequest:
    """What was said about the teacher; nothing means the float network itself."""

    run: str | None = None
    model: str | None = None
    weights: str | None = None

    @classmethod
    def of(
        cls, run: Path | None, model: str | None, weights: Path | None, *, distill: bool
    ) -> "TeacherRequest | None":
        """Gather the options; RequestError if they contradict each other. None: no distillation."""
        if not distill:
            if (run, model, weights) != (None, None, None):
                raise RequestError("--no-distill: must stand without a teacher, got both; drop one")
            return None
        if run is not None and (model, weights) != (None, None):
            raise RequestError(
                "--teacher: must stand without --teacher-model and --teacher-weights, got both; "
                "drop one"
            )
        if (model is None) != (weights is None):
            raise RequestError(
                "--teacher-model, --teacher-weights: must be given together; or pass --teacher RUN"
            )
        texts = [str(path) if path is not None else None for path in (run, weights)]
        return cls(texts[0], model, texts[1])


class Renormalized(nn.Module):
    """A network that was trained with another normalisation than the batches it is given have."""

    scale: Tensor

    shift: Tensor

    def __init__(self, network: nn.Module, own: Normalization, given: Normalization) -> None:
        super().__init__()
        self.network = network
        of_own, of_given = ([torch.tensor(v) for v in (n.mean, n.std)] for n in (own, given))
        shape = (1, -1, 1, 1)
        # (pixel - mean) / std of the one, as a linear function of the other's
        self.register_buffer("scale", (of_given[1] / of_own[1]).view(shape))
        self.register_buffer("shift", ((of_given[0] - of_own[0]) / of_own[1]).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` as the batches have them to logits."""
        result: Tensor = self.network(x * self.scale + self.shift)
        return result


def open_teacher(request: TeacherRequest, inputs: inp.Inputs) -> nn.Module | None:
    """Return the teacher, or None where that is the float network itself.

    Raises:
        RequestError: it is of other classes or other images than the data; or it was trained on
            another division of the same data, and so on images this run is measured on.
    """
    if request.run is not None:
        run = RunFolder.open(Path(request.run))
        inp.check_ended(run)
        recorded = run.read_json("run.json")["data"]
        _check(request.run, recorded, inputs)
        reference = inp.DataRequest.recorded(run).reference
        same_data = inp.same_data(reference, inputs.request.reference)
        if same_data and recorded["fingerprint"] != inputs.describe()["fingerprint"]:
            raise RequestError(
                f"--teacher {request.run}: data must be divided as they are here, or it was "
                "trained on images that are measured on; train it with the same --seed and --split"
            )
        network = inp.load_float(run)
        own = Normalization(tuple(recorded["mean"]), tuple(recorded["std"]))
        if own != inputs.normalization:
            network = Renormalized(network, own, inputs.normalization)
    elif request.model is not None and request.weights is not None:
        network = inp.load_float_file(request.model, Path(request.weights), inputs)
    else:
        return None
    try:
        inputs.task.check_logits(network, inputs.sample, len(inputs.splits.class_names))
    except RequestError as error:
        raise RequestError(f"teacher {request.run or request.model}: {error}") from None
    return network


def _check(name: str, recorded: dict[str, Any], inputs: inp.Inputs) -> None:
    classes, own = list(recorded["class_names"]), list(inputs.splits.class_names)
    if len(classes) != len(own):
        raise RequestError(
            f"--teacher {name}: must have the data's {len(own)} classes, got {len(classes)}; "
            "give a network of the same classes"
        )
    if classes != own and sorted(classes) == sorted(own):
        raise RequestError(
            f"--teacher {name}: classes must be in the data's order, {own}, got {classes}; "
            "train it on data with the same order"
        )
    shape, own_shape = tuple(recorded["image_shape"]), inputs.splits.image_shape
    if shape != own_shape:
        raise RequestError(
            f"--teacher {name}: images must be the data's {own_shape} (C, H, W), got {shape}; "
            "train it on images of that size"
        )
