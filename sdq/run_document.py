"""What ``run.json`` and ``metrics.json`` must say, so that who reads a run can rely on them.

A run folder is copied, synchronised and edited; a reader must not fall over what came of that.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from sdq.errors import RequestError
from sdq.layers import LayerSpec

LARGEST_IMAGE = 2**27
"""Values of the largest image that a run is believed to be about; an array of it has to be made."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


def held_out(document: Mapping[str, Any]) -> bool:
    """Tell whether it is known that a run's networks never learned from what they are measured on.

    Args:
        document: ``run.json``. Of weights from a file nobody knows what they were trained on.
    """
    request = document.get("request", {})
    own = request.get("verb") in ("train", "federate") and not request.get("weights")
    return bool(document.get("held_out", own))


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Data(_Part):
    reference: str | None  # the server of a deployed federation may have no images
    fingerprint: str | None
    class_names: Annotated[list[str], Field(min_length=1)]
    image_shape: Annotated[list[Size], Field(min_length=3, max_length=3)]
    mean: list[Finite]
    std: list[Positive]

    @field_validator("image_shape")
    @classmethod
    def _of_an_image(cls, value: list[int]) -> list[int]:
        if math.prod(value) > LARGEST_IMAGE:
            raise ValueError(f"must be of an image of at most {LARGEST_IMAGE} values")
        return value


class _Model(_Part):
    reference: str
    sha256: str | None = None


class _Request(_Part):
    verb: str = "?"
    data: dict[str, Any] | None = None


class _Document(_Part):
    status: str
    request: _Request
    data: _Data | None = None
    model: _Model | None = None
    quant: dict[str, Any] | None = None
    methods: list[str] = []
    server_model: bool | None = None


class _Figures(_Part):
    """Of one network on the test images."""

    accuracy: Finite | None = None
    balanced_accuracy: Finite | None = None
    macro_f1: Finite | None = None
    auc: Finite | None = None
    dice: Finite | None = None
    iou: Finite | None = None
    dice_nonempty: Finite | None = None
    hd95: Finite | None = None
    ece: Finite | None = None
    per_class_recall: list[Finite | None] | None = None


class _Metrics(_Part):
    float: _Figures | None = None
    quantized: _Figures | None = None
    generalization: _Figures | None = None
    specialization: _Figures | None = None


def check_document(path: Path, document: dict[str, Any]) -> None:
    """Raise RequestError unless ``run.json`` says what others read in it.

    Args:
        path: of the file, for the message.
        document: what it holds.
    """
    _check(_Document, path, document)


def check_metrics(path: Path, document: dict[str, Any]) -> None:
    """Raise RequestError unless what ``metrics.json`` says of networks are numbers.

    Args:
        path: of the file, for the message.
        document: what it holds.
    """
    _check(_Metrics, path, document)


def _check(model: type[_Part], path: Path, document: dict[str, Any]) -> None:
    try:
        model.model_validate(document)
    except ValidationError as error:
        raise RequestError(f"{path}: {first_of(error)}; copy the run anew") from None


def first_of(error: ValidationError) -> str:
    """Return what is wrong with a document as a sentence: place, rule, and what came instead."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the document"
    rule = first["msg"].removeprefix("Value error, ")
    return f"{place:.100}: {rule[0].lower()}{rule[1:]}, got {first['input']!r:.100}"


_LAYERS = TypeAdapter(tuple[LayerSpec, ...])


def checked_layers(text: str) -> tuple[LayerSpec, ...]:
    """Return the layer specifications of a JSON list.

    Raises:
        ValueError: a field is absent or of another type, or a size is none.
    """
    layers = _LAYERS.validate_json(text, strict=True)
    for layer in layers:
        for part in (layer, *layer.before):
            for name in ("weight_shape", "in_shape", "out_shape", "kernel", "stride", "dilation"):
                if any(size < 1 for size in getattr(part, name, ())):
                    raise ValueError(f"{name} of {layer.name} must be positive")
        shapes = (layer.in_shape, layer.out_shape, *(part.in_shape for part in layer.before))
        if layer.kind != "float" and not all(shapes):  # what stays in float may take no tensor
            raise ValueError(f"in_shape and out_shape of {layer.name} must have channels")
        if not layer.weight_shape or layer.macs < 0 or any(size < 0 for size in layer.padding):
            raise ValueError(f"sizes of {layer.name} must be of a layer")
    return layers
