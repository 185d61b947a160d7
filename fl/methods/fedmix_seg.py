r"""FedMix for segmentation: clients with masks, boxes, image labels or nothing learn together.

Two networks of one architecture are shared. A client without masks labels its training images anew
each round with both *received* networks, in evaluation mode: :math:`y_a = [p_a > 1/2]`, cleared
where its boxes or image labels say that a class is not. It keeps the images for which
:math:`\mathrm{Dice}(y_1, y_2) \ge \epsilon` and, with boxes, :math:`\mathrm{Dice}(y_1, box) \ge
0.5`, and trains each network on the other's labels. A client that keeps none sits the round out. A
client with masks trains both networks on them. Client k weighs

.. math:: w_k \propto \frac{n_k}{\sum_j n_j} + \lambda \frac{d_k}{\sum_j d_j},
          \qquad d_k = (\text{mean loss of the first network})^\beta

for both networks, with :math:`n_k` the images it trained on. The first network is the model.

Not to be confused with the FedMix of Yoon et al. (ICLR 2021), which mixes images up.

Source: Wicaksana et al., "FedMix: Mixed Supervised Federated Learning for Medical Image
Segmentation", IEEE TMI 42(7), 2023, https://arxiv.org/abs/2205.01840. Where the released code keeps
nothing it goes on with the client's true masks. The labels are made on images as they are, and
augmented with them in each epoch; the code augments first, and once a round.
"""

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.config import FederationConfig
from fl.losses import LossConfig
from fl.method import LEVELS, Client, Method, Progress, Server, SitsOut
from fl.network import Network, Outputs
from fl.record import Record, Reply, no_number
from fl.state import Route
from sdq.batches import Loader
from sdq.config import Config
from sdq.segmentation import soft_dice

SECOND = "second"
GROUP = "fedmix_seg"

BREAST = FederationConfig(
    rounds=300, batch_size=16, lr=1e-3, weight_decay=1e-4, keep_optimizer=True
)
"""The paper's federation for breast ultrasound: lambda 10, beta 1.5."""
SKIN = BREAST
"""For dermoscopy: lambda 10, beta 3."""
OCT = BREAST.replaced(rounds=150, lr=1.5e-3, weight_decay=1e-5)
"""For fluids in retinal OCT: lambda 2, beta 3."""


class FedMixSegConfig(Config):
    """Hyper-parameters; the defaults are the paper's for breast ultrasound.

    Args:
        loss_weight: lambda, of the losses beside the numbers of images.
        loss_power: beta; 1.5, or 3 for the paper's other tasks.
        agreement: epsilon, least Dice between the networks' labels of an image that is kept.
        box_overlap: least Dice between the first network's labels and the boxes.
    """

    loss_weight: Annotated[float, Field(ge=0)] = 10.0
    loss_power: Annotated[float, Field(ge=0)] = 1.5
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.9
    box_overlap: Annotated[float, Field(ge=0, le=1)] = 0.5


def adaptive_weights(
    counts: Sequence[float], losses: Sequence[float], loss_weight: float, loss_power: float
) -> list[float]:
    """Return the clients' weights, of sum 1.

    Args:
        counts: images that each trained on.
        losses: each one's mean loss of the first network.
        loss_weight: lambda.
        loss_power: beta.

    >>> [round(w, 4) for w in adaptive_weights([100, 200, 130], [0.3, 0.2, 0.1], 10, 1.5)]
    [0.5446, 0.3272, 0.1282]
    """
    n = torch.tensor(counts, dtype=torch.float64)
    d = torch.tensor(losses, dtype=torch.float64) ** loss_power
    total = d.sum()
    w = n / n.sum() + loss_weight * (d / total if total > 0 else d)
    return (w / w.sum()).tolist()


def agreeing(
    first: Tensor, second: Tensor, agreement: float, boxes: Tensor | None, box_overlap: float
) -> Tensor:
    """Tell of which images the labels are to be believed, bool ``(B,)``.

    Args:
        first: where the first network found each class, bool ``(B, classes, H, W)``.
        second: where the second did.
        agreement: least Dice between them, over all classes together; two empty ones agree.
        boxes: the inside of the known boxes, of the same shape, or None.
        box_overlap: least Dice between the first network's labels and the boxes.
    """
    keep = soft_dice(first, second) >= agreement
    if boxes is not None:
        keep &= soft_dice(first, boxes) >= box_overlap
    return keep


class FedMixSegClient(Client):
    """Training of two networks, on masks or on each other's labels."""

    def start(self) -> None:
        """Label the images that have no masks."""
        self.total, self.count = 0.0, 0
        self.indices: Tensor | None = None
        if self.context.supervision != "pixel":
            self.indices, self.found = self._pseudo_labels()
            if not len(self.indices):
                raise SitsOut("the two networks agree on the labels of none of its images")

    @torch.no_grad()
    def _pseudo_labels(self) -> tuple[Tensor, Tensor]:
        """Return which images are kept, and both labels of each, uint8 ``(M, 2 classes, H, W)``."""
        context, config = self.context, self.method.config
        network = context.network.eval()
        device = next(network.parameters()).device
        indices, found, end = [], [], 0
        for images, _ in context.batches(0, augmented=False):
            start, end = end, end + len(images)
            first, second = (
                (net(images.to(device)) > 0).cpu()
                for net in (network.model, network.extras[SECOND])
            )
            boxes = None
            if context.where is not None:
                where = context.where[start:end]
                first, second = first & where, second & where
                boxes = where if context.supervision == "box" else None
            keep = agreeing(first, second, config.agreement, boxes, config.box_overlap)
            indices.append(keep.nonzero()[:, 0] + start)
            found.append(torch.cat([first, second], 1)[keep])
        return torch.cat(indices), torch.cat(found).to(torch.uint8)

    def batches(self, epoch: int) -> Loader:
        """Return the images that are kept, with both labels of each."""
        if self.indices is None:
            return super().batches(epoch)
        return self.context.batches(epoch, indices=self.indices, masks=self.found)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return both networks' losses: on the masks, or on what the other network found."""
        second = self.context.network.extras[SECOND](outputs.images)
        found_by_first = found_by_second = labels
        if self.indices is not None:
            found_by_first, found_by_second = labels.float().chunk(2, dim=1)
        loss = self.context.criterion(outputs.logits, found_by_second)
        self.total += float(loss.detach()) * len(labels)
        self.count += len(labels)
        return loss + self.context.criterion(second, found_by_first)

    def finish(self, progress: Progress) -> Record:
        """Tell the first network's loss, and of how many images."""
        count = len(self.context.labels) if self.indices is None else len(self.indices)
        return Record({}, {GROUP: self.total / self.count, "num_examples": count})


class FedMixSeg(Method):
    """Two shared networks, and weights that follow the losses."""

    config_type = FedMixSegConfig
    client_type = FedMixSegClient
    loss = LossConfig(name="dice")
    tasks = ("segmentation",)
    supervision = LEVELS
    comparable_updates = False
    refuses = refusals(
        aggregation="its weights are the method, and a median has none",
        noise="losses and numbers of images leave the client",
    )

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the second network, with the first one's weights in another order.

        However they were drawn, the second network's are drawn alike. Two equal networks would
        always agree.
        """
        second = copy.deepcopy(network.model)
        with torch.no_grad():
            for parameter in second.parameters():
                if parameter.dim() > 1:
                    order = torch.randperm(parameter.numel(), generator=generator)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
        network.extras[SECOND] = second

    def route(self, name: str, network: Network) -> Route:
        """Share both networks."""
        return Route.SHARE

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look for the loss."""
        return no_number(reply.record.values, GROUP, least=0.0)

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return the adaptive weights."""
        return adaptive_weights(
            [r.num_examples for r in replies],
            [r.record.values[GROUP] for r in replies],
            self.config.loss_weight,
            self.config.loss_power,
        )
