"""The network of federated learning's first paper.

Two convolutions of 5 x 5 (32 and 64 channels), each before a maximum pooling, and 512 hidden units.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, section 3, https://arxiv.org/abs/1602.05629; without padding, as PFLlib has it.
"""

from torch import nn


def build(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Return the network with fresh weights: 878,538 parameters for CIFAR-10."""
    side = ((image_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * side**2, 512), nn.ReLU(), nn.Linear(512, num_classes),
    )  # fmt: skip
