"""Federated training: methods, partitions, and the rounds."""

from fl.config import FederationConfig
from fl.losses import LossConfig
from fl.method import ClientData, method
from fl.partition import dirichlet, iid
from fl.run import Federated, run

__all__ = [
    "ClientData",
    "Federated",
    "FederationConfig",
    "LossConfig",
    "dirichlet",
    "iid",
    "method",
    "run",
]
