r"""DET, deputy-enhanced transfer: a personal model learns beside the one that travels, its deputy.

Before each epoch the macro-F1 of both on the client's training images, :math:`F_p` and
:math:`F_d`, sets the stage; each round begins anew with *recover*.

- *recover*, where :math:`F_d < \alpha_1 F_p` or the round begins:
  P learns L(P), D learns L(D) + KL(P to D);
- *exchange*, else, after *recover* or where :math:`F_d < \alpha_2 F_p`:
  P learns L(P) + KL(D to P), D learns L(D) + KL(P to D);
- *sublimate*, else: P learns L(P) + KL(D to P), D learns L(D).

KL(t to s) is :math:`KL(p_t \Vert p_s)`, without gradient to t. In segmentation Dice stands for
macro-F1, and ten times the mean squared difference of probabilities for the divergence. With one
epoch a round the stage is always *exchange*; *sublimate* needs three. A client predicts with its
personal model. As a wrapper the deputy is any method's network.

Source: Chen et al., "Personalized Retrogress-Resilient Framework for Real-World Medical Federated
Learning", MICCAI 2021, section 2.3, https://arxiv.org/abs/2110.00394; and IEEE TMI 41(12), 2022.
"""

import copy
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fl.method import Side, View
from fl.network import Network, Outputs
from fl.record import Tensors
from fl.state import Route
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig
from sdq.mask_metrics import overlap
from sdq.metrics import classification_metrics, predict

PERSONAL = "det"
RECOVER, EXCHANGE, SUBLIMATE = 1, 2, 3


class DETConfig(WrapperConfig):
    """Hyper-parameters; the defaults are the paper's.

    Args:
        around: name of the method inside.
        inner: its hyper-parameters.
        alpha1: share of the personal model's macro-F1 that the deputy must reach to teach.
        alpha2: share with which it teaches alone.
        augmented: measure on augmented images, as the released code does; it costs no less.
    """

    alpha1: Annotated[float, Field(ge=0)] = 0.7
    alpha2: Annotated[float, Field(ge=0)] = 0.9
    augmented: bool = False


def next_stage(stage: int, personal: float, deputy: float, alpha1: float, alpha2: float) -> int:
    """Return the stage after a measurement; ``stage`` is the last one, 0 when a round begins.

    >>> next_stage(0, 0.5, 0.5, 0.7, 0.9), next_stage(1, 0.5, 0.5, 0.7, 0.9)
    (1, 2)
    """
    if stage == 0 or deputy < alpha1 * personal:
        return RECOVER
    if stage == RECOVER or deputy < alpha2 * personal:
        return EXCHANGE
    return SUBLIMATE


def transfer(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits ``(N, C)``, mean over the batch.

    Of maps ``(N, C, H, W)`` it is ten times the mean squared difference of probabilities.
    """
    if student.dim() == 4:
        return 10 * F.mse_loss(student.sigmoid(), teacher.detach().sigmoid())
    p = teacher.detach().softmax(1)
    return F.kl_div(student.log_softmax(1), p, reduction="batchmean")


def both_losses(stage: int, personal: Tensor, deputy: Tensor) -> Tensor:
    """Return what the stage adds to the two models' own losses, from their logits."""
    terms = []
    if stage in (RECOVER, EXCHANGE):
        terms.append(transfer(personal, deputy))
    if stage in (EXCHANGE, SUBLIMATE):
        terms.append(transfer(deputy, personal))
    return torch.stack(terms).sum()


class DETClient(WrapperClient):
    """The inner client's network is the deputy."""

    def start(self) -> None:
        """Begin before the first stage."""
        self.stage = 0
        super().start()

    def start_epoch(self, epoch: int) -> None:
        """Measure both models and set the stage."""
        super().start_epoch(epoch)
        if sum(phase.epochs for phase in self.phases()) < 2:
            self.stage = EXCHANGE
            return
        network, config = self.context.network, self.method.config

        def score(model: nn.Module) -> float:
            batches = self.context.batches(epoch, augmented=config.augmented)
            logits, labels = predict(model, batches)
            if logits.dim() == 4:
                return float(overlap(logits, labels)["dice"] or 0)
            return float(classification_metrics(logits, labels)["macro_f1"])

        self.stage = next_stage(
            self.stage, score(network.extras[PERSONAL]), score(network.model),
            config.alpha1, config.alpha2,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Outputs:
        """Return the deputy's outputs, with the personal model's."""
        network = self.context.network
        own = network.outputs(images, network.extras[PERSONAL])
        return replace(super().forward(images), own=own)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return both models' losses and what the stage transfers."""
        assert outputs.own is not None
        own = self.context.criterion(outputs.own.logits, labels)
        moved = both_losses(self.stage, outputs.own.logits, outputs.logits)
        return super().loss(outputs, labels) + own + moved


class DET(Wrapper):
    """A personal model beside the inner method's."""

    config_type = DETConfig
    client_type = DETClient

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the personal model, which begins as its deputy does."""
        super().extend_(network, generator)
        network.extras[PERSONAL] = copy.deepcopy(network.model)

    def route(self, name: str, network: Network) -> Route:
        """Keep the personal model, whatever the inner method does with what it added."""
        if name.startswith(f"extras.{PERSONAL}."):
            return Route.LOCAL
        return super().route(name, network)

    def views(self, side: Side) -> dict[str, View]:
        """Return a client's personal model and its deputy; the server has the deputies alone."""
        inner = super().views(side)
        if side == "server":
            return inner
        deputies = {"deputy" if n == "model" else f"deputy {n}": v for n, v in inner.items()}
        return {"personal": _personal, **deputies}

    def personal(self, network: Network) -> Tensors:
        """Return the copy."""
        return dict(network.extras[PERSONAL].state_dict())


def _personal(network: Network, images: Tensor) -> Tensor:
    logits: Tensor = network.extras[PERSONAL](images)
    return logits
