"""ResNet-50 for ImageNet, with torchvision's parameter names (``layer1.0.conv1``, ..., ``fc``).

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1,
https://arxiv.org/abs/1512.03385. 25,557,032 parameters with 3 input channels and 1000 classes.
"""

from torch import nn

from sdq.models._resnet import Bottleneck, ResNet


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights; any image side will do."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)
