r"""FedROD: a generic head that is balanced, and a personal one that corrects it.

.. math:: L = BSM(f(\phi(x)), y) + \ell(\mathrm{sg}(f(\phi(x))) + h_k(\mathrm{sg}(\phi(x))), y)

with the features :math:`\phi`, the balanced softmax loss BSM with the client's class counts, and
sg: no gradient. The server predicts with f, a client with the sum.

Source: Chen and Chao, "On Bridging Generic and Personalized Federated Learning for Image
Classification", ICLR 2022, equations 7 to 9, https://arxiv.org/abs/2107.00778.
"""

import copy

import torch
from torch import Tensor

from fl.losses import balanced_softmax
from fl.method import Client, Method, Side, View
from fl.network import Network, Outputs
from fl.quant_network import refit_
from fl.record import Tensors

HEAD = "personal_head"


class FedRODClient(Client):
    """Training of the features, the generic and the personal head."""

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the generic and the personal loss."""
        generic = balanced_softmax(outputs.logits, labels, self.context.own_counts)
        correction = self.context.network.extras[HEAD](outputs.known_features.detach())
        both = outputs.logits.detach() + correction
        return generic + self.context.criterion(both, labels)


class FedROD(Method):
    """FedAvg with a head beside."""

    client_type = FedRODClient
    tasks = ("classification",)
    needs_head = True

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the personal head."""
        network.extras[HEAD] = network.new_head(generator)

    def views(self, side: Side) -> dict[str, View]:
        """Return a client's personal and generic prediction; the server has the generic one."""
        generic: dict[str, View] = {"generic": _generic}
        return {"personal": _personal, **generic} if side == "client" else generic

    def personal(self, network: Network) -> Tensors:
        """Return the model with one head, the sum of both: what is linear may be added before.

        Of quantized heads the sum is rounded anew, with scales of its own.
        """
        state = super().personal(network)
        head = copy.deepcopy(network.head)
        correction = dict(network.extras[HEAD].named_parameters())
        with torch.no_grad():
            for name in ("weight", "bias"):
                if name in correction:
                    head.get_parameter(name).add_(correction[name])
        refit_(head)
        return state | {f"{network.head_name}.{n}": t for n, t in head.state_dict().items()}


def _generic(network: Network, images: Tensor) -> Tensor:
    return network.outputs(images).logits


def _personal(network: Network, images: Tensor) -> Tensor:
    outputs = network.outputs(images)
    logits: Tensor = outputs.logits + network.extras[HEAD](outputs.known_features)
    return logits
