"""From options to data, network and device: the same way in every verb."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import load_tensors
from sdq.cli.clients import of_client
from sdq.cli.options import numbers
from sdq.cli.weights import load_weights_
from sdq.config import QuantConfig
from sdq.data import DataOptions, ImageSet, Splits, open_data
from sdq.errors import RequestError
from sdq.quant_model import QuantModel, quantize
from sdq.run_document import first_of
from sdq.run_folder import RunFolder, fingerprint
from sdq.split_file import apply_split_file
from sdq.task import TASKS, Task, answer_to, gives_maps


@dataclass(frozen=True)
class DataRequest:
    """What was said about the data; stored in the run, so that other verbs find the same data."""

    reference: str
    root: str | None = None
    image_size: int | None = None
    mean: str | None = None
    std: str | None = None
    split: str = "0.7,0.1,0.2"
    batch_size: int = 128
    seed: int = 0
    augment: bool = True
    division_seed: int | None = None
    """Of the division of data without splits, where it is not ``seed``."""
    split_file: str | None = None
    """A ``SPLIT.csv`` whose parts stand in the place of the data's own."""
    client: dict[str, Any] | None = None
    """Whose images of them alone, as :func:`sdq.cli.clients.of_client` has it."""

    def __post_init__(self) -> None:
        """Let paths hold from any folder: a run is used from others than it was made in."""
        for name in ("reference", "root", "split_file"):
            object.__setattr__(self, name, _absolute(getattr(self, name)))

    @classmethod
    def recorded(cls, run: RunFolder) -> "DataRequest":
        """Return what was said about a run's data; RequestError if ``run.json`` does not say."""
        found = run.read_json("run.json").get("request", {}).get("data")
        if isinstance(found, dict) and found.get("reference", "") is None:
            found = {**found, "reference": ""}  # the server of a federation sees no images
        try:
            if set(found or {}) <= {field.name for field in fields(cls)}:
                return _REQUEST.validate_json(json.dumps(found), strict=True)
            reason = "unknown fields"
        except ValidationError as error:
            reason = first_of(error)
        raise RequestError(
            f"{run.path / 'run.json'}: request.data must be what was asked, got {reason}; "
            "copy the run anew"
        )

    def like(self, before: "DataRequest") -> "DataRequest":
        """Return a request for the data of an earlier run, divided as it was there.

        A network must not be measured on images that it was trained on because another seed
        divides them differently.
        """
        if not same_data(before.reference, self.reference):
            return self
        divided_by = before.division_seed
        return replace(
            self,
            split=before.split,
            image_size=self.image_size or before.image_size,
            split_file=before.split_file,
            client=before.client,
            division_seed=before.seed if divided_by is None else divided_by,
        )


def same_data(one: str, other: str) -> bool:
    """Return whether two references name the same data, though a path be spelled otherwise."""
    return one == other or _spelled(one, os.path.realpath) == _spelled(other, os.path.realpath)


def is_gone(reference: str) -> bool:
    """Tell whether a run's data were a file or folder that is not there any more."""
    there = os.path.exists(reference) or os.path.exists(reference.rpartition(":")[0])
    return os.path.isabs(reference) and not there


def other_division(option: str, reference: str, run: Path) -> RequestError:
    """Return the refusal of an option that would divide a run's own data otherwise."""
    return RequestError(
        f"{option}: {reference} must be divided as for {run}, or images that it was trained on "
        "are measured on; leave it out"
    )


def _absolute(reference: str | None) -> str | None:
    return None if reference is None else _spelled(reference, os.path.abspath)


def _spelled(reference: str, spell: Callable[[str], str]) -> str:
    """Return a reference with its path, if it is one that is there, spelled otherwise."""
    file, colon, function = reference.rpartition(":")
    if colon and os.path.exists(file):  # Path's raises for names that are too long
        return f"{spell(file)}:{function}"
    return spell(reference) if reference and os.path.exists(reference) else reference


_REQUEST = TypeAdapter(DataRequest)


@dataclass(frozen=True)
class Inputs:
    """Data as batches, and what describes them."""

    splits: Splits
    normalization: Normalization
    train: Batches
    request: DataRequest

    @property
    def sample(self) -> Tensor:
        """An input of the right shape, ``(1, C, H, W)``."""
        return torch.zeros(1, *self.splits.image_shape)

    @property
    def task(self) -> Task:
        """What a network of these data is for."""
        return TASKS[self.splits.task]

    def for_model(self, reference: str) -> "Inputs":
        """Return the inputs for what a ``--model`` answers, where images have masks and labels.

        A network that gives maps learns the masks, another one the labels.
        """
        if not self.splits.label_names:
            return self
        with torch.random.fork_rng():
            network = build_model(reference, self.splits.image_shape, len(self.splits.class_names))
        if gives_maps(answer_to(network, self.sample)):
            return self
        labelled = self.classifying()
        labelled.splits.checked(self.request.reference)
        return labelled

    def classifying(self) -> "Inputs":
        """Return the inputs for a network that tells the images' labels."""
        return open_batches(self.splits.classifying(), self.normalization, self.request)

    @property
    def validation(self) -> Batches | None:
        """The validation set, where there is one besides the test set.

        Where there is no test set, the validation set is what the result is measured on; to choose
        an epoch by it would flatter the result.
        """
        if self.splits.val is None or self.splits.test is None:
            return None
        return self.plain(self.splits.val)

    def held_out(self) -> Batches:
        """Return the test set; the validation set where there is no test set.

        Raises:
            RequestError: there is neither.
        """
        part = self.splits.test or self.splits.val
        if part is None:
            raise RequestError(
                f"{self.request.reference}: must have a test or val split to measure on; "
                "add one, or give images without splits and --split 0.7,0.1,0.2"
            )
        return self.plain(part)

    def calibration(self) -> Batches:
        """Return training images, not augmented, of all classes from the first batch on."""
        request = self.request
        return Batches(
            self.splits.train, self.normalization, batch_size=request.batch_size, shuffle=True,
            seed=request.seed,
        )  # fmt: skip

    def plain(self, part: ImageSet) -> Batches:
        """Return a part in order, not augmented."""
        return Batches(part, self.normalization, batch_size=self.request.batch_size)

    def describe(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the data."""
        splits = self.splits
        parts = {"train": splits.train, "val": splits.val, "test": splits.test}
        return {
            "reference": self.request.reference.rpartition("/")[2],
            "fingerprint": fingerprint(splits),
            "task": splits.task,
            "class_names": list(splits.class_names),
            "image_shape": list(splits.image_shape),
            "num_examples": {k: len(v) for k, v in parts.items() if v is not None},
            "class_counts": class_counts(splits),
            "mean": list(self.normalization.mean),
            "std": list(self.normalization.std),
        }


def class_counts(splits: Splits) -> list[int] | None:
    """Return the training images of each class; None where an image has not one class alone."""
    labels = splits.train.labels
    if labels.dim() != 1:
        return None
    return labels.bincount(minlength=len(splits.class_names)).tolist()


def open_inputs(
    request: DataRequest,
    recorded: dict[str, Any] | None = None,
    *,
    every_class: bool = True,
    whole: bool = False,
) -> Inputs:
    """Open data and prepare batches.

    Args:
        request: what was asked.
        recorded: ``run.json``'s ``data`` of the run the network comes from: its normalisation is
            used unless the request names one, and its classes and shape must fit.
        every_class: see :func:`sdq.data.open_data`.
        whole: nothing is to be learned: data without parts of their own are all held out.

    Raises:
        RequestError: no such data, or shares, normalisation or a division that do not fit them.
    """
    shares = numbers(request.split, "--split")
    if len(shares) != 3 or min(shares) < 0 or not shares[0] > 0:
        raise RequestError(
            f"--split: must be three shares of train, val, test, got {request.split!r}"
        )
    root = Path(request.root) if request.root else None
    division_seed = request.seed if request.division_seed is None else request.division_seed
    splits = open_data(
        request.reference,
        DataOptions(
            root, division_seed, request.image_size,
            (1.0, 0.0, 0.0) if whole else (shares[0], shares[1], shares[2]),
        ),
        every_class=every_class,
    )  # fmt: skip
    if whole and splits.test is splits.val is None:
        splits = replace(splits, test=splits.train)
    if splits.task == "classification" and every_class and len(splits.class_names) < 2:
        raise RequestError(
            f"{request.reference}: must have 2 classes or more to tell apart, got "
            f"{len(splits.class_names)}; add images of another class"
        )
    if request.split_file is not None:
        path = Path(request.split_file)
        splits = apply_split_file(path, splits).checked(str(path))
    if request.client is not None:
        splits = of_client(splits, **request.client)
    if recorded is not None:
        splits = _as_recorded(request.reference, splits, recorded)
    channels = splits.image_shape[0]
    if (request.mean is None) != (request.std is None):
        raise RequestError("--mean, --std: must be given together")
    if request.mean is not None and request.std is not None:
        normalization = Normalization.given(
            numbers(request.mean, "--mean"), numbers(request.std, "--std"), channels
        )
    elif recorded is not None:
        normalization = Normalization(tuple(recorded["mean"]), tuple(recorded["std"]))
    else:
        normalization = Normalization.of(splits.train)
    return open_batches(splits, normalization, request)


def open_batches(splits: Splits, normalization: Normalization, request: DataRequest) -> Inputs:
    """Prepare batches of data that are open."""
    augment = (
        Augmentation(splits.horizontal_flip, splits.vertical_flip) if request.augment else None
    )
    train = Batches(
        splits.train, normalization, batch_size=request.batch_size, shuffle=True,
        augment=augment, seed=request.seed,
    )  # fmt: skip
    return Inputs(splits, normalization, train, request)


def _as_recorded(reference: str, splits: Splits, recorded: dict[str, Any]) -> Splits:
    """Return data for the task of a run; RequestError if they do not fit its network."""
    task = recorded.get("task", "classification")
    if task == "classification" and splits.label_names:
        splits = splits.classifying()
    if splits.task != task:
        raise RequestError(
            f"{reference}: must be data for {task} as in the run, got {splits.task}; give data "
            f"with {'masks' if task == 'segmentation' else 'labels'}"
        )
    before = tuple(recorded["image_shape"])
    if splits.image_shape != before:
        same_channels = splits.image_shape[0] == before[0]
        repair = f"pass --image-size {before[1]}" if same_channels else "give other data"
        raise RequestError(
            f"{reference}: images must be {before} (C, H, W) as in the run, "
            f"got {splits.image_shape}; {repair}"
        )
    names = tuple(recorded["class_names"])
    named = not all(name.isdecimal() for name in splits.class_names)
    if task == "classification" and named and set(splits.class_names) <= set(names):
        splits = splits.numbered(names)  # it may have them in another order, or not all
    elif (
        named
        and len(names) > 1
        and not all(n.isdecimal() for n in names)
        and (
            splits.class_names != names  # a single foreground is what is marked, whatever its name
        )
    ):
        raise RequestError(
            f"{reference}: must have the run's classes, {', '.join(names):.200}, got "
            f"{', '.join(splits.class_names):.200}; give data of the same classes, named alike"
        )
    if len(splits.class_names) != len(names):
        raise RequestError(
            f"{reference}: must have the run's {len(names)} classes, "
            f"got {len(splits.class_names)}; give data with the same classes"
        )
    return splits


def _builder(reference: str) -> tuple[Callable[..., Any], str | None]:
    """Return the function that builds a network, and the hash of the file if it is a user's."""
    if plugins.is_file_reference(reference):
        return plugins.load_function(reference)
    if reference.endswith(".py"):
        raise RequestError(
            f"--model: must name a function of the file, got {reference!r}; "
            f"give {reference}:function"
        )
    return plugins.load("sdq.models", reference).build, None


def build_model(reference: str, splits_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a network from a plugin name or ``file.py:function``.

    Args:
        reference: ``--model``.
        splits_shape: ``(C, H, W)`` of the images.
        classes: number of classes.

    Raises:
        RequestError: no such function, it wants what nobody can give it, it fails, or it returns
            no network.
    """
    function, _ = _builder(reference)
    channels, height, _ = splits_shape
    offered = {"num_classes": classes, "in_channels": channels, "image_size": height}
    required = [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in offered
    ]
    if required:
        raise RequestError(
            f"{reference}: parameters must be among {', '.join(offered)} or have defaults, "
            f"got {', '.join(required)}"
        )
    try:
        model = plugins.call_with_known(function, **offered)
    except Exception as error:  # the user's code may raise anything
        raise RequestError(
            f"{reference}: must build a network, but: {type(error).__name__}: {error}; "
            "mend the function"
        ) from error
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"{reference}: must return a torch.nn.Module, got {type(model).__name__}; "
            "mend the function"
        )
    return model


def load_float_file(reference: str, weights: Path, inputs: Inputs) -> nn.Module:
    """Build ``--model`` for the data and load ``--weights`` into it."""
    classes = len(inputs.splits.class_names)
    network = build_model(reference, inputs.splits.image_shape, classes)
    load_weights_(network, load_tensors(weights)[0], str(weights), classes)
    return network


def check_ended(run: RunFolder) -> None:
    """Raise RequestError if the run was interrupted, or did not end with one model."""
    if not run.done:
        raise RequestError(
            f"{run.path}: the run must have ended, but was interrupted; continue it with --resume"
        )
    document = run.read_json("run.json")
    _check_one_model(run, document)
    if missing := [part for part in ("data", "model") if document.get(part) is None]:
        raise RequestError(
            f"{run.path / 'run.json'}: must name data and model of a run that has ended, got no "
            f"{missing[0]}; copy the run anew"
        )


def load_float(run: RunFolder) -> nn.Module:
    """Return the float network of a run: of ``sdq train``, or what a quantized run started from."""
    check_ended(run)
    document = run.read_json("run.json")
    model = _rebuild(document)
    name = "float.safetensors" if document.get("quant") else "model.safetensors"
    load_weights_(model, run.read_tensors(name), str(run.path / name))
    return model


def _check_one_model(run: RunFolder, document: dict[str, Any]) -> None:
    """Raise RequestError if a federated run has several models, or no server model."""
    if len(methods := document.get("methods", [])) > 1:
        raise RequestError(
            f"{run.path}: the run must have one model, got one for each of {', '.join(methods)}; "
            f"give {run.path / methods[0]}"
        )
    if document.get("server_model") is False:
        raise RequestError(
            f"{run.path}: the run must have a server's model, but parts of every client's stay "
            "with it; run another method, or give a client's (clients/NAME, with --keep-clients)"
        )


def load_quantized(run: RunFolder) -> QuantModel:
    """Return the quantized network of a run that ended well.

    Raises:
        RequestError: the run is not one of a quantized network, has not ended, or is damaged.
    """
    check_ended(run)
    document = run.read_json("run.json")
    if not document.get("quant") or _verb(document) == "search":
        found = run.path / "policy.json"
        option = f"--policy {found}" if found.exists() else f"--from {run.path}"
        raise RequestError(
            f"{run.path}: must be a quantized run, got one of `sdq {_verb(document)}`; "
            f"run `sdq quantize {option}` first"
        )
    qmodel = quantize(
        load_float(run),
        QuantConfig(**document["quant"]),
        sample=torch.zeros(1, *document["data"]["image_shape"]),
    )
    apply_policy_(qmodel, run.read_policy())
    load_weights_(qmodel, run.read_tensors("model.safetensors"), str(run.path))
    return qmodel


def _verb(document: dict[str, Any]) -> str:
    return str(document.get("request", {}).get("verb", "?"))


def _rebuild(document: dict[str, Any]) -> nn.Module:
    data, model = document["data"], document["model"]
    if model.get("sha256"):
        _, now = _builder(model["reference"])
        if now != model["sha256"]:
            raise RequestError(
                f"{model['reference']}: must be the file the run was made with, but it changed "
                "since; restore it or run again"
            )
    return build_model(model["reference"], tuple(data["image_shape"]), len(data["class_names"]))


def describe_model(reference: str) -> dict[str, Any]:
    """Return what ``run.json`` says of the model: its reference, and a user file's hash."""
    _, digest = _builder(reference)
    if digest is not None:
        path, _, function = reference.rpartition(":")
        reference = f"{Path(path).resolve()}:{function}"
    return {"reference": reference, "sha256": digest}
