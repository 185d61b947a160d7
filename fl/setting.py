"""What server and clients of one federation have in common: network, method, configuration."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl import composition
from fl.config import FederationConfig
from fl.losses import LossConfig, loss_of
from fl.method import ClientData, Method, require_head
from fl.network import Network
from fl.record import Tensors, digest, picked
from fl.state import Route, routes
from fl.supervision import check_client
from sdq.batches import Augmentation, Batches, Normalization, generator
from sdq.data import ImageSet, check_masks
from sdq.errors import RequestError
from sdq.task import SEGMENTATION, Task, task_of
from sdq.train import channels_last_


@dataclass(frozen=True)
class Setting:
    """A federation's fixed part. One network is reused for every client of a process.

    Args:
        method: with its hyper-parameters.
        config: of the federation.
        network: with the method's extras.
        routes: of every tensor of its state.
        initial: its state before the first round, which every client starts from.
        task: what the network is for.
        loss: what clients minimise.
        num_classes: of the task.
        image_shape: ``(C, H, W)``.
        normalization: of every image.
        augment: of training images, or None.
    """

    method: Method
    config: FederationConfig
    network: Network
    routes: dict[str, Route]
    initial: Tensors
    task: Task
    loss: LossConfig
    num_classes: int
    image_shape: tuple[int, int, int]
    normalization: Normalization
    augment: Augmentation | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: Method,
        config: FederationConfig,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        normalization: Normalization | None = None,
        augment: Augmentation | None = None,
        head: str | None = None,
    ) -> "Setting":
        """Prepare a model for a method.

        Args:
            model: trained in place; on its device.
            method: the method.
            config: of the federation.
            num_classes: of the task; the model must have as many logits.
            image_shape: ``(C, H, W)``.
            normalization: None maps pixels to -1..1, which tells nobody anything of the images.
            augment: of training images, or None.
            head: path of the head in the model, or None to find it.

        Raises:
            RequestError: the method does not go with the configuration or the network.
        """
        device = next(model.parameters()).device
        sample = torch.zeros(1, *image_shape, device=device)
        network = Network(model, sample, head)
        task = task_of(network.eval()(sample))
        task.check_logits(network, sample, num_classes)
        if task.name not in method.tasks:
            raise RequestError(
                f"{method.name}: is for {' and '.join(method.tasks)}, got {task.name}; "
                "choose another method (see docs/federation.md)"
            )
        if task is SEGMENTATION and config.adjust > 0:
            raise RequestError(
                f"--adjust: must be 0 in segmentation, got {config.adjust}; masks have no prior of "
                "classes, leave it out"
            )
        if task is SEGMENTATION and config.sampling == "balanced":
            raise RequestError(
                "--sampling: must be all in segmentation, got 'balanced'; an image with masks has "
                "no class to be drawn by, leave it out"
            )
        require_head(method, network)
        method.check(config)
        method.extend_(network, generator(config.seed, "extras"))
        network.to(device)
        channels_last_(network)
        setting = cls(
            method=method,
            config=config,
            network=network,
            routes=routes(
                network,
                lambda name: method.route(name, network),
                config.batch_norm or method.batch_norm,
            ),
            initial=picked(network.state_dict(), network.state_dict()),
            task=task,
            loss=loss_of(task.name, config.loss, method.loss),
            num_classes=num_classes,
            image_shape=image_shape,
            normalization=normalization or centred(image_shape[0]),
            augment=augment,
        )
        composition.check(setting)
        return setting

    def identity(self) -> dict[str, Any]:
        """Return what server and clients must agree on, as JSON has it."""
        told = {n: t for n, t in self.initial.items() if not self.method.follows(n)}
        found = {
            "method": [self.method.name, self.method.config.model_dump(mode="json")],
            "config": self.config.model_dump(mode="json"),
            "tensors": {
                n: [*t.shape, str(t.dtype).removeprefix("torch.")] for n, t in self.initial.items()
            },
            "initial": digest(told),
            "task": self.task.name,
            "classes": self.num_classes,
            "pixels": [list(self.normalization.mean), list(self.normalization.std)],
        }
        agreed: dict[str, Any] = json.loads(json.dumps(found))  # lists for tuples
        return agreed

    def names(self, *, up: bool | None = None, down: bool | None = None) -> list[str]:
        """Return the tensors that do, or do not, go up or come down."""
        return [
            name
            for name, route in self.routes.items()
            if (up is None or route.goes_up is up) and (down is None or route.comes_down is down)
        ]

    def check(self, data: ClientData) -> None:
        """Raise RequestError where a client's images or labels are not of this federation."""
        check_client(self.method, data)
        for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
            if images is None or len(images) == 0:
                if part == "train":
                    raise RequestError(f"client {data.name!r}: train must have images, got none")
                continue
            if images.images.shape[1:] != self.image_shape:
                raise RequestError(
                    f"client {data.name!r}: {part} images must be {self.image_shape}, got "
                    f"{images.images.shape[1:]}; resize them"
                )
            if self.task is SEGMENTATION:
                if part != "train" or data.supervision == "pixel":
                    check_masks(f"client {data.name!r}: {part}", images, self.num_classes)
                continue
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= self.num_classes:
                raise RequestError(
                    f"client {data.name!r}: {part} labels must be from 0 to "
                    f"{self.num_classes - 1}, got {low} to {high}; use the federation's classes"
                )

    @property
    def num_counts(self) -> int:
        """Return how many numbers :meth:`counts` gives."""
        return 1 if self.task is SEGMENTATION else self.num_classes

    def counts(self, images: ImageSet) -> Tensor:
        """Return the images of each class, float32 ``(classes,)``; of segmentation all, ``(1,)``.

        An image with a mask is of no one class, and without masks a client could not tell.
        """
        if self.task is SEGMENTATION:
            return torch.tensor([float(len(images))])
        return torch.bincount(images.labels, minlength=self.num_classes).float()

    def test_batches(self, images: ImageSet) -> Batches:
        """Return images for evaluation."""
        return Batches(images, self.normalization, batch_size=max(self.config.batch_size, 64))


def centred(channels: int) -> Normalization:
    """Return what maps pixels to -1..1, which tells nobody anything of the images."""
    return Normalization((0.5,) * channels, (0.5,) * channels)
