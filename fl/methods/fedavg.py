"""FedAvg: the mean of the clients' models, weighted by their images.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, algorithm 1, https://arxiv.org/abs/1602.05629.
"""

from fl.method import Method


class FedAvg(Method):
    """The defaults of the contract."""
