"""U-Net with bilinear upsampling and group norm, for segmentation.

The network of FedMix: widths 64, 128, 256, 512 and 512, padded convolutions (a map has its input's
size), groups of two channels. Its output is logits: the sigmoid belongs to the loss.

Parameter names: ``encoder.S`` and ``decoder.S`` are stages of two convolutions ``0`` and ``3`` with
group norms ``1`` and ``4``, the decoder's from the smallest map on; then ``head``.

Source: Ronneberger et al., "U-Net", MICCAI 2015, https://arxiv.org/abs/1505.04597; Wicaksana et
al., "FedMix", TMI 2023, https://arxiv.org/abs/2205.01840; group norm: Wu & He, ECCV 2018,
https://arxiv.org/abs/1803.08494.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.GroupNorm(out_channels // 2, out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """13,395,329 parameters with 3 input channels, 1 class and width 64.

    Args:
        num_classes: maps of logits.
        in_channels: of the images.
        width: channels at full size, an even number; 2, 4, 8 and 8 times as many below.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        down = (in_channels, width, 2 * width, 4 * width, 8 * width, 8 * width)
        up = (8 * width, 4 * width, 2 * width, width, width)
        self.encoder = nn.ModuleList(_stage(down[i], down[i + 1]) for i in range(5))
        self.decoder = nn.ModuleList(_stage(2 * up[i], up[i + 1]) for i in range(4))
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.head = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes, H, W)``."""
        skips: list[Tensor] = []
        for stage in self.encoder:
            if skips:
                x = self.pool(x)
            x = stage(x)
            skips.append(x)
        for stage, skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = self.upsample(x)
            # a pooling drops the last row or column of an odd side: zeros stand in for it
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = stage(torch.cat((skip, x), 1))
        return self.head(x)


def build(num_classes: int, in_channels: int = 3, width: int = 64) -> nn.Module:
    """Return the network with fresh weights; any image side of at least 16 will do."""
    return UNet(num_classes, in_channels, width)
