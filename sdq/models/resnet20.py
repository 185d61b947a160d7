"""ResNet-20 in the form made for CIFAR: three stages of three blocks, parameter-free shortcuts.

Parameter names are those of the widely used CIFAR-10 checkpoint (``conv1``, ``layer1.0.conv1``,
..., ``linear``), so that it loads as it is.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2
(option A shortcuts), https://arxiv.org/abs/1512.03385.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: C.
        out_channels: K; a shortcut to more channels pads with zeros (option A).
        stride: of the first convolution; the shortcut takes every stride-th pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, K, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.extra_channels:
            x = x[:, :, :: self.stride, :: self.stride]
            half = self.extra_channels // 2
            x = F.pad(x, (0, 0, 0, 0, half, self.extra_channels - half))
        out = self.relu(out + x)
        return out


class ResNet20(nn.Module):
    """269,722 parameters with 3 input channels and 10 classes."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H / 4, W / 4)
        return self.linear(self.pool(x).flatten(1))


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights; any image side of at least 4 will do."""
    return ResNet20(num_classes, in_channels)
