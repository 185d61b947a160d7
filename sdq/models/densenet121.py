"""DenseNet-121: each layer reads the maps of all layers before it in its block.

Parameter names are torchvision's (``features.conv0``, ``features.denseblock1.denselayer1.norm1``,
..., ``classifier``), so that its weights load.

Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, table 1,
https://arxiv.org/abs/1608.06993.
"""

import torch
from torch import Tensor, nn

from sdq.models._conv import init_weights_

DEPTHS = (6, 12, 24, 16)
GROWTH = 32
BOTTLENECK = 4


class DenseLayer(nn.Module):
    """A 1x1 convolution to 128 channels and a 3x3 one to 32, each behind batch norm and ReLU.

    Args:
        in_channels: C.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        hidden = BOTTLENECK * GROWTH
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + 32, H, W)``: the input, then the new maps."""
        out = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat((x, self.conv2(self.relu2(self.norm2(out)))), 1)


class DenseNet121(nn.Module):
    """7,978,856 parameters with 3 input channels and 1000 classes."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        channels, side = 2 * GROWTH, (image_size + 3) // 4
        features = nn.Sequential()
        features.add_module("conv0", nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False))
        features.add_module("norm0", nn.BatchNorm2d(channels))
        features.add_module("relu0", nn.ReLU())
        features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for number, depth in enumerate(DEPTHS, start=1):
            block = nn.Sequential()
            for i in range(depth):
                block.add_module(f"denselayer{i + 1}", DenseLayer(channels))
                channels += GROWTH
            features.add_module(f"denseblock{number}", block)
            if number < len(DEPTHS):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2) if side > 1 else nn.Identity())
                features.add_module(f"transition{number}", transition)
                channels, side = channels // 2, side // 2
        features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features = features
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_weights_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.relu(self.features(x))  # (N, 1024, H / 32, W / 32)
        return self.classifier(self.avgpool(x).flatten(1))


def build(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """Return the network with fresh weights, for images of at least ``image_size`` a side.

    Below 29 pixels the poolings that would leave nothing are left out; parameters are the same at
    all sizes.
    """
    return DenseNet121(num_classes, in_channels, image_size)
