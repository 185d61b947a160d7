"""FedBN: batch normalisation, factors and statistics, is each client's own.

Source: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
ICLR 2021, algorithm 1, https://arxiv.org/abs/2102.07623.
"""

import torch

from fl.config import FederationConfig
from fl.method import Method
from fl.network import Network
from fl.state import norm_names
from sdq.errors import RequestError


class FedBN(Method):
    """FedAvg with that policy of batch normalisation."""

    batch_norm = "local_all"

    def check(self, config: FederationConfig) -> None:
        """Refuse another policy: this method is one."""
        if config.batch_norm not in (None, "local_all"):
            raise RequestError(
                f"fedbn: batch_norm must be local_all, got {config.batch_norm!r}; leave it out, "
                "or use fedavg"
            )

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Refuse a network for which this would be FedAvg."""
        if not any(norm_names(network)):
            raise RequestError(
                "fedbn: the network must have batch normalisation, got none; use fedavg, which "
                "would be the same"
            )
