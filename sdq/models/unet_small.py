"""The U-Net of :mod:`sdq.models.unet` with a quarter of its channels: 16, 32, 64, 128 and 128.

839,777 parameters with 3 input channels and 1 class; for small sets, and for training on a CPU.

Source: see :mod:`sdq.models.unet`, whose parameter names it has.
"""

from torch import nn

from sdq.models.unet import UNet


def build(num_classes: int, in_channels: int = 3, width: int = 16) -> nn.Module:
    """Return the network with fresh weights; any image side of at least 16 will do."""
    return UNet(num_classes, in_channels, width)
