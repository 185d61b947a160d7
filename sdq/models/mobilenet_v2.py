"""MobileNetV2 of width 1.0: inverted residuals with linear bottlenecks.

Parameter names are torchvision's (``features.0.0``, ``features.1.conv.0.0``, ...,
``classifier.1``), so that its weights load.

Source: Sandler et al., "MobileNetV2", CVPR 2018, table 2, https://arxiv.org/abs/1801.04381.
"""

from torch import Tensor, nn

from sdq.models._conv import conv_bn, init_weights_

STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
"""Expansion, output channels, blocks and stride of the first block of each stage."""


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection.

    Args:
        in_channels: C.
        out_channels: K; the input is added where C = K and the stride is 1.
        stride: of the depthwise convolution.
        expansion: depthwise channels are ``expansion * C``; at 1 there is no first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(conv_bn(in_channels, hidden, 1, activation=nn.ReLU6))
        layers += [
            conv_bn(hidden, hidden, stride=stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, K, H / stride, W / stride)``."""
        out = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """3,504,872 parameters with 3 input channels and 1000 classes."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = 32
        layers: list[nn.Module] = [conv_bn(in_channels, channels, stride=2, activation=nn.ReLU6)]
        for expansion, out_channels, depth, stride in STAGES:
            for i in range(depth):
                step = stride if i == 0 else 1
                layers.append(InvertedResidual(channels, out_channels, step, expansion))
                channels = out_channels
        layers.append(conv_bn(channels, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        init_weights_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.features(x)  # (N, 1280, H / 32, W / 32)
        return self.classifier(self.avgpool(x).flatten(1))


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights; any image side will do."""
    return MobileNetV2(num_classes, in_channels)
