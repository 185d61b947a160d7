"""EfficientNet-B0: inverted residuals with squeeze-and-excitation and SiLU.

Parameter names are torchvision's (``features.0.0``, ``features.1.0.block.0.0``, ...,
``classifier.1``), so that its weights load.

Source: Tan & Le, "EfficientNet", ICML 2019, table 1, https://arxiv.org/abs/1905.11946;
squeeze-and-excitation: Hu et al., CVPR 2018, https://arxiv.org/abs/1709.01507; stochastic depth:
Huang et al., ECCV 2016, https://arxiv.org/abs/1603.09382.
"""

from torch import Tensor, nn

from sdq.models._conv import conv_bn, init_weights_

STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip
"""Expansion, kernel, stride of the first block, output channels and blocks of each stage."""

DROP_RATE = 0.2
"""Of the classifier's dropout, and of the branch of a block behind the last."""


class StochasticDepth(nn.Module):
    """In training, drop the whole branch of an image with probability ``p``; scale the others.

    An image is made the single channel of a volume, of which torch's own module drops channels: so
    tracing leaves the training flag to that module.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout3d(p)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape; in evaluation the values are the same, too."""
        return self.dropout(x.unsqueeze(1)).squeeze(1)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in 0..1 that is computed from all channels' means.

    Args:
        channels: C.
        squeezed: channels between the two 1x1 convolutions.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        gate = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(gate) * x


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, linear 1x1 projection.

    Args:
        in_channels: C.
        out_channels: K; the input is added where C = K and the stride is 1.
        kernel_size: of the depthwise convolution.
        stride: of the depthwise convolution.
        expansion: depthwise channels are ``expansion * C``; at 1 there is no first convolution.
        drop_rate: probability that training drops the branch of an image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        drop_rate: float,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(conv_bn(in_channels, hidden, 1, activation=nn.SiLU))
        layers += [
            conv_bn(hidden, hidden, kernel_size, stride, hidden, nn.SiLU),
            SqueezeExcitation(hidden, in_channels // 4),
            conv_bn(hidden, out_channels, 1, activation=None),
        ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, K, H / stride, W / stride)``."""
        out = self.block(x)
        return self.stochastic_depth(out) + x if self.residual else out


class EfficientNetB0(nn.Module):
    """5,288,548 parameters with 3 input channels and 1000 classes."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = sum(depth for *_, depth in STAGES)
        channels, index = 32, 0
        layers = [conv_bn(in_channels, channels, stride=2, activation=nn.SiLU)]
        for expansion, kernel_size, stride, out_channels, depth in STAGES:
            stage = []
            for i in range(depth):
                step, drop_rate = stride if i == 0 else 1, DROP_RATE * index / blocks
                stage.append(
                    MBConv(channels, out_channels, kernel_size, step, expansion, drop_rate)
                )
                channels, index = out_channels, index + 1
            layers.append(nn.Sequential(*stage))
        layers.append(conv_bn(channels, 1280, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(DROP_RATE), nn.Linear(1280, num_classes))
        init_weights_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.features(x)  # (N, 1280, H / 32, W / 32)
        return self.classifier(self.avgpool(x).flatten(1))


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights; any image side will do."""
    return EfficientNetB0(num_classes, in_channels)
