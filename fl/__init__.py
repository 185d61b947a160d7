"""Federated training. So far: how one data set is divided among clients."""

from fl.partition import dirichlet, iid

__all__ = ["dirichlet", "iid"]
