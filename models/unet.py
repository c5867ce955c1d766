"""The U-Net of the ACDC baselines: 16 to 256 channels, dropout that grows with depth.

1.8 million parameters in 2D, 5.3 million in 3D. Ronneberger et al., U-Net, MICCAI 2015; widths,
dropout and bilinear upsampling as in the SSL4MIS baselines (Luo et al.).
"""

import torch
from torch import nn

from models.layers import CONV, POOL, conv_block, upsample


class UNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis."""

    coarsest = 31  # the longest side that is one pixel in the deepest level

    def __init__(self, channels, classes, dims=2, width=16, dropouts=(0.05, 0.1, 0.2, 0.3, 0.5)):
        super().__init__()
        Conv = CONV[dims]
        widths = [width * 2**i for i in range(5)]
        inputs = (channels, *widths)
        self.down = nn.ModuleList(
            conv_block(dims, before, after, dropout)
            for before, after, dropout in zip(inputs, widths, dropouts)
        )
        self.pool = POOL[dims](2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))  # (256, 128), (128, 64), ...
        self.shrink = nn.ModuleList(Conv(deep, fine, 1) for deep, fine in pairs)
        self.up = nn.ModuleList(conv_block(dims, 2 * fine, fine) for _, fine in pairs)
        self.head = Conv(widths[0], classes, 3, padding=1)

    def encode(self, x):
        features = [self.down[0](x)]  # [B, 16, *S]
        for block in self.down[1:]:
            features.append(block(self.pool(features[-1])))  # [B, 32, *S/2], ... [B, 256, *S/16]
        return features

    def decode(self, features):
        x = features[-1]
        for shrink, up, skip in zip(self.shrink, self.up, features[-2::-1]):
            x = up(torch.cat([skip, upsample(shrink(x), skip)], 1))
        return self.head(x)

    def forward(self, x):
        return self.decode(self.encode(x))
