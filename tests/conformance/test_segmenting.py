"""Methods that classify and segment: with masks they learn too, and report what masks are worth."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fl
from sdq import plugins

BOTH = [n for n in plugins.names("fl.methods") if len(fl.method(n).tasks) > 1]
CONFIG = fl.FederationConfig(rounds=3, local_epochs=2, lr=1e-2, batch_size=8, evaluate_every=100)


@pytest.mark.parametrize("name", BOTH)
def test_it_segments(
    name: str, tiny_maps: Callable[..., nn.Module],
    hospitals_with_masks: Callable[..., list[fl.ClientData]],
) -> None:  # fmt: skip
    net, clients = tiny_maps(), hospitals_with_masks()
    found = fl.run(net, method=name, clients=clients, num_classes=3, config=CONFIG)
    losses = [r["train_loss"] for r in found.history]
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(t).all() for t in found.state.values())
    assert found.specialization is not None
    assert set(found.specialization["clients"]["0"]) == {"dice", "iou", "hd95"}
    assert "masked" not in found.specialization["views"]
    if found.generalization is not None:
        assert found.generalization["num_examples"] == sum(len(c.test) for c in clients)
