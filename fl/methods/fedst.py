r"""FedST, federated self-training: clients without masks learn what the model is sure of.

For a share of the rounds only clients with masks train. Then an image without a mask is labelled by
the received model, where its probability of a class is above a threshold or below one minus it, and
the network learns these pixels on the image with another gamma. The weights are fixed: clients with
masks share one part, the others the rest. Boxes and image labels are not used.

Source: Yang et al., "Federated semi-supervised learning for COVID region segmentation in chest CT
using multi-national data from China, Italy, Japan", Medical Image Analysis 70, 2021,
https://doi.org/10.1016/j.media.2021.101992, in the form in which the authors of FedMix compare with
it: their thresholds, range of gamma, warm-up and weights. Which model labels the images that form
leaves open; here it is the one received in the round.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.method import LEVELS, Client, ClientContext, Method, Progress, Server, SitsOut
from fl.network import Outputs
from fl.record import Record, Reply
from sdq.config import Config

GROUP = "fedst"


class FedSTConfig(Config):
    """Hyper-parameters.

    Args:
        labelled_weight: of all clients with masks together; the others have the rest.
        warm_up: share of the rounds in which only clients with masks train.
        threshold: of a probability that is believed.
        largest_gamma: exponents of intensities are drawn from 0 to it.
    """

    labelled_weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.5
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    largest_gamma: Annotated[float, Field(gt=0)] = 2.0


def with_gamma(images: Tensor, gamma: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` with intensities raised to a power, ``(B,)``.

    An image's least and greatest intensity stay what they are, whatever the images were normalised
    with.
    """
    low = images.amin((1, 2, 3), keepdim=True)
    span = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-6)
    return ((images - low) / span) ** gamma.view(-1, 1, 1, 1) * span + low


def confident(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return labels 0 and 1 of every pixel and class, and whether each is believed.

    Args:
        logits: ``(B, classes, H, W)``.
        threshold: with 0.9 a probability above 0.9 or below 0.1 is believed.

    Returns:
        Of the logits' shape, float and bool.
    """
    p = logits.sigmoid()
    return (p > 0.5).float(), torch.maximum(p, 1 - p) > threshold


class SelfTrainingClient(Client):
    """Plain training with masks; without them, on what the received model is sure of."""

    def __init__(self, method: Method, context: ClientContext) -> None:
        super().__init__(method, context)
        self.labelled = context.supervision == "pixel"

    def start(self) -> None:
        """Set the received model aside."""
        context = self.context
        if self.labelled:
            return
        if context.round < self.method.config.warm_up * context.config.rounds:
            raise SitsOut("it has no masks, and the first rounds are for clients with masks")
        self.received = context.network.frozen_copy()
        self.rng = context.generator("gamma")

    def forward(self, images: Tensor) -> Outputs:
        """Return the outputs, of images without masks with another gamma."""
        if self.labelled:
            return super().forward(images)
        with torch.no_grad():
            config = self.method.config
            self.label, self.sure = confident(self.received(images), config.threshold)
            gamma = torch.rand(len(images), generator=self.rng) * config.largest_gamma
        return super().forward(with_gamma(images, gamma.to(images)))

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the criterion, or the cross-entropy of the labels that are believed."""
        if self.labelled:
            return super().loss(outputs, labels)
        each = F.binary_cross_entropy_with_logits(outputs.logits, self.label, reduction="none")
        return (each * self.sure).sum() / self.sure.sum().clamp_min(1)

    def finish(self, progress: Progress) -> Record:
        """Tell whether there are masks."""
        return Record({}, {GROUP: self.labelled})


class FedST(Method):
    """FedAvg with fixed weights and another client."""

    config_type = FedSTConfig
    client_type = SelfTrainingClient
    tasks = ("segmentation",)
    supervision = LEVELS
    comparable_updates = False
    refuses = refusals(
        aggregation="its weights are fixed, and a median has none",
        noise="what a client knows of its images leaves it",
    )

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look whether it tells of masks."""
        told = reply.record.values.get(GROUP)
        return None if isinstance(told, bool) else f"{GROUP!r} is {told!r:.40} instead of a bool"

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return equal shares of what each of the two kinds has."""
        labelled = [bool(r.record.values[GROUP]) for r in replies]
        share = self.config.labelled_weight
        if all(labelled) or not any(labelled):
            return [1.0] * len(replies)
        masks = sum(labelled)
        return [share / masks if has else (1 - share) / (len(replies) - masks) for has in labelled]
