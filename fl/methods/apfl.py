r"""APFL: a client predicts with a mixture of a model of its own and the shared one.

.. math:: \bar v = \alpha v + (1 - \alpha) w, \qquad
          v \leftarrow v - \eta \nabla_v L(\bar v), \qquad
          \alpha \leftarrow \alpha - \eta_\alpha \langle v - w, \nabla L(\bar v)\rangle

with :math:`\alpha` kept in [0, 1]. The shared model w learns as in FedAvg; the mixture does not
move it.

Source: Deng et al., "Adaptive Personalized Federated Learning", 2020, algorithm 1 and equation 10,
https://arxiv.org/abs/2003.13461.
"""

import copy
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fl.method import Client, Method, Side, View
from fl.network import Network, Outputs
from fl.record import Tensors
from sdq.config import Config

PERSONAL = "personal"


class APFLConfig(Config):
    """Hyper-parameters.

    Args:
        alpha: share of the client's own model at first.
        alpha_lr: of alpha's plain gradient step, whatever the clients' optimizer; None: the
            clients' learning rate; 0: alpha stays.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    alpha_lr: Annotated[float, Field(ge=0)] | None = None


class Mixed(nn.Module):
    """A model of a client's own, and its share in the mixture."""

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__()
        self.model = model
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def mix(self, shared: nn.Module, images: Tensor) -> Tensor:
        """Return the mixture's logits; statistics of batch normalisation are its own."""
        return cast(Tensor, functional_call(self.model, self.mixed(shared), (images,)))

    def mixed(self, shared: nn.Module) -> Tensors:
        """Return the mixture's parameters."""
        others = dict(shared.named_parameters())
        return {
            n: self.alpha * v + (1 - self.alpha) * others[n].detach()
            for n, v in self.model.named_parameters()
            # while bits are learned, the two models differ in their quantizers
            if n in others
        }


class APFLClient(Client):
    """Training of the shared model, and of the mixture."""

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the shared model's loss and the mixture's."""
        mixed = _personal(self.context.network, outputs.images)
        return super().loss(outputs, labels) + self.context.criterion(mixed, labels)

    def correct_gradients_(self) -> None:
        """Take alpha's step, which is no matter of the optimizer."""
        alpha = cast(Mixed, self.context.network.extras[PERSONAL]).alpha
        rate = self.method.config.alpha_lr
        if alpha.grad is not None:
            with torch.no_grad():
                alpha.sub_((self.context.lr if rate is None else rate) * alpha.grad).clamp_(0, 1)
            alpha.grad = None  # an optimizer leaves out what has no gradient


class APFL(Method):
    """FedAvg with a mixture."""

    config_type = APFLConfig
    client_type = APFLClient

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the model of a client's own, which begins as the shared one does."""
        network.extras[PERSONAL] = Mixed(copy.deepcopy(network.model), self.config.alpha)

    def views(self, side: Side) -> dict[str, View]:
        """Return a client's mixture and the shared model; the server has the shared one."""
        shared = super().views(side)
        return {"personal": _personal, **shared} if side == "client" else shared

    def personal(self, network: Network) -> Tensors:
        """Return the mixture."""
        own = cast(Mixed, network.extras[PERSONAL])
        with torch.no_grad():
            return {**own.model.state_dict(), **own.mixed(network.model)}


def _personal(network: Network, images: Tensor) -> Tensor:
    return cast(Mixed, network.extras[PERSONAL]).mix(network.model, images)
