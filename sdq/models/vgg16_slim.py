"""A slim VGG-16 with batch norm: 13 convolutions of 32 to 256 channels and two linear layers.

Parameter names: ``features.S.I.0`` is convolution I of stage S and ``features.S.I.1`` its batch
norm; then ``fc1``, ``bn1`` and ``fc2``.

Source: the network of Chen et al., "Personalized Retrogress-Resilient Federated Learning Toward
Imbalanced Medical Data", TMI 2022, https://github.com/CityU-AIM-Group/PRR-Imbalance, after Simonyan
& Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556.
"""

from torch import Tensor, nn

from sdq.models._conv import conv_bn, init_weights_

STAGES = ((32, 32), (64, 64), (128, 128, 128), (128, 128, 128), (256, 256, 256))
FEATURES = 64


class VGG16Slim(nn.Module):
    """2,371,104 parameters with 3 input channels and 3 classes."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        channels, side = in_channels, image_size
        stages = []
        for widths in STAGES:
            layers: list[nn.Module] = []
            for width in widths:
                layers.append(conv_bn(channels, width))
                channels = width
            layers.append(nn.MaxPool2d(2) if side > 1 else nn.Identity())
            side //= 2
            stages.append(nn.Sequential(*layers))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(channels, FEATURES, bias=False)
        self.bn1 = nn.BatchNorm1d(FEATURES)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(FEATURES, num_classes, bias=False)
        init_weights_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.avgpool(self.features(x)).flatten(1)  # (N, 256)
        return self.fc2(self.relu(self.bn1(self.fc1(x))))


def build(num_classes: int, in_channels: int = 3, image_size: int = 128) -> nn.Module:
    """Return the network with fresh weights, for images of at least ``image_size`` a side.

    Below 32 pixels the poolings that would leave nothing are left out; names and shapes of the
    parameters are the same at all sizes.
    """
    return VGG16Slim(num_classes, in_channels, image_size)
