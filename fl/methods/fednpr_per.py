"""FedNPR-Per: FedNPR with a head of each client's own, which is FedNPR around FedPer.

Source: Wicaksana et al., "FedNPR", 2024, https://arxiv.org/abs/2407.12446.
"""

from fl.methods.fednpr import FedNPR, FedNPRConfig


class FedNPRPerConfig(FedNPRConfig):
    """Hyper-parameters: those of FedNPR, around ``fedper``."""

    around: str = "fedper"


class FedNPRPer(FedNPR):
    """FedNPR around FedPer."""

    config_type = FedNPRPerConfig
