"""What a toolkit is given, and what it hands back: the same for all of them.

Nothing here needs more than torch, numpy, safetensors, pydantic and lightning-fabric, so that it
can be imported in every toolkit's own environment.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdq.batches import Augmentation, Batches, Normalization, generator
from sdq.config import TrainConfig
from sdq.data import ArrayImages, ImageSet
from sdq.plugins import call_with_known, load
from sdq.task import Teacher
from sdq.train import FloatTraining, Forward, fit

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Request:
    """What is asked of a toolkit.

    Args:
        model: name of the network.
        classes: it tells apart.
        task: ``ptq`` with the calibration images alone, or ``qat`` with the training images.
        bits: mean weight bits of the inner layers.
        edge_bits: of the first and the last layer.
        act_bits: of every layer's input.
        edges: names of the first and the last layer.
        calibration: number of images for ``ptq``.
        epochs: over the training images in ``qat``, searches included.
        search_epochs: as many of them may go into choosing bits.
        mean: of the normalisation, a value a channel.
        std: likewise.
        flips: whether images may be mirrored horizontally, and vertically.
        seed: of everything random.
    """

    model: str
    classes: int
    task: str
    bits: int
    edge_bits: int
    act_bits: int
    edges: tuple[str, str]
    calibration: int
    epochs: int
    search_epochs: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: tuple[bool, bool]
    seed: int

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> "Request":
        found = json.loads(file.read_text())
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


@dataclass(frozen=True)
class Answer:
    """What a toolkit made.

    Args:
        module: maps normalised images ``(N, C, H, W)`` to logits, in evaluation mode.
        bits: weight bits of every convolution and linear layer of the float network, by its name.
        weights: of these layers, on their levels, ``(K, ...)``.
        write: writes an ONNX file, if the toolkit can.
        note: what of the request could not be met.
    """

    module: Callable[[Tensor], Tensor]
    bits: Mapping[str, int]
    weights: Mapping[str, Tensor]
    write: Callable[[Path], None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Job:
    """A request with its network and images.

    Args:
        request: what is asked.
        folder: of ``float.safetensors`` and ``images.npz``.
    """

    request: Request
    folder: Path

    @cached_property
    def _images(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "images.npz", allow_pickle=False) as file:
            return dict(file)

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.request.mean, self.request.std)

    @property
    def example(self) -> Tensor:
        """Two images: a batch whose size an exporter does not take for a constant."""
        return self.calibration[:2].contiguous()

    def network(self) -> nn.Module:
        """Return the float network in evaluation mode, a new one each time."""
        return float_network(self.folder, self.request.model, self.request.classes)

    def bits_of(self, name: str) -> int:
        return self.request.edge_bits if name in self.request.edges else self.request.bits

    def uniform(self) -> dict[str, int]:
        """Return the bits of every layer where the inner ones have equal bits."""
        return {name: self.bits_of(name) for name in layers(self.network())}

    def training_images(self) -> Batches:
        """Return the training images, shuffled and augmented."""
        return Batches(
            self._train, self.normalization, shuffle=True, seed=self.request.seed,
            augment=Augmentation(*self.request.flips),
        )  # fmt: skip

    @property
    def _train(self) -> ImageSet:
        pixels = torch.from_numpy(self._images["train_images"])
        return ImageSet(ArrayImages(pixels), torch.from_numpy(self._images["train_labels"]))

    @cached_property
    def calibration(self) -> Tensor:
        """Training images for calibration, normalised ``(N, C, H, W)``; they have no labels."""
        order = torch.randperm(len(self._train), generator=generator(self.request.seed, "ptq"))
        pixels = self._train.images.take(order[: self.request.calibration])
        return self.normalization(pixels)

    def calibrate(self, module: Callable[[Tensor], Tensor]) -> None:
        """Let a module see the calibration images."""
        with torch.no_grad():
            for images in self.calibration.split(CALIBRATION_BATCH):
                module(images)

    def test_images(self) -> list[Tensor]:
        """Return the test images in batches; their labels stay with whoever judges."""
        pixels = torch.from_numpy(self._images["test_images"])
        return [self.normalization(part) for part in pixels.split(250)]

    def train_(self, module: nn.Module) -> None:
        """Train in place, as every toolkit's network is trained: the float one is the teacher."""
        config = TrainConfig(epochs=self.request.epochs, seed=self.request.seed)
        objective = Distillation(module, config, Teacher(self.network()))
        fit(objective, self.training_images(), config, phase="finetune")


@dataclass
class Distillation(FloatTraining):
    """Training with the soft labels of the float network, and with nothing else."""

    teacher: Teacher

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy to the float network's answers."""
        return self.teacher.loss(forward(images), images)


def float_network(folder: Path, model: str, classes: int) -> nn.Module:
    """Return the float network of a group's folder, for its images, in evaluation mode."""
    with np.load(folder / "images.npz", allow_pickle=False) as file:
        _, channels, _, side = file["test_images"].shape
    network: nn.Module = call_with_known(
        load("sdq.models", model).build, num_classes=classes, in_channels=channels, image_size=side
    )
    network.load_state_dict(load_file(folder / "float.safetensors"))
    return network.eval()


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a float network by name."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def write_onnx(network: nn.Module, example: Tensor, file: Path) -> None:
    """Write a network by torch's tracing exporter, for any number of images."""
    torch.onnx.export(
        network, (example,), str(file), dynamo=False, opset_version=17,
        input_names=["images"], dynamic_axes={"images": {0: "N"}},
    )  # fmt: skip
