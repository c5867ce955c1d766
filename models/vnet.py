"""The V-Net of the left-atrium baselines: 16 to 256 channels, batch norm, dropout at the bottom and before the head, 9.4 million parameters.

Milletari et al., V-Net, 3DV 2016; number of convolutions, widths, batch norm and dropout as in UA-MT (Yu et al., MICCAI 2019) and the
baselines that follow it: plain blocks, without the residual connections of the original.
"""
import torch
from torch import nn

CONVOLUTIONS = (1, 2, 3, 3, 3)  # at each level, from fine to coarse, on the way down and up again


class VNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis (multiples of 16 lose nothing)."""
    coarsest = 16

    def __init__(self, channels, classes, dims=3, width=16, dropout=0.5):
        super().__init__()
        Conv, Up, Norm, Drop = ((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Dropout2d),
                                (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.Dropout3d))[dims - 2]

        def unit(convolution):
            return nn.Sequential(convolution, Norm(convolution.out_channels), nn.ReLU(inplace=True))

        def block(count, inputs, outputs):
            return nn.Sequential(*(unit(Conv(inputs if i == 0 else outputs, outputs, 3, padding=1)) for i in range(count)))

        widths = [width * 2 ** i for i in range(5)]
        pairs = list(zip(widths, widths[1:]))                                        # (16, 32), (32, 64), ...
        self.down = nn.ModuleList(block(n, channels if i == 0 else w, w) for i, (n, w) in enumerate(zip(CONVOLUTIONS, widths)))
        self.shrink = nn.ModuleList(unit(Conv(fine, deep, 2, stride=2)) for fine, deep in pairs)
        self.grow = nn.ModuleList(Up(deep, fine, 2, stride=2) for fine, deep in pairs[::-1])
        self.grown = nn.ModuleList(nn.Sequential(Norm(fine), nn.ReLU(inplace=True)) for fine, _ in pairs[::-1])
        self.up = nn.ModuleList(block(n, w, w) for n, w in zip(CONVOLUTIONS[-2::-1], widths[-2::-1]))
        self.drop, self.head = Drop(dropout), Conv(width, classes, 1)

    def encode(self, x):
        features = [self.down[0](x)]                                                 # [B, 16, *S]
        for shrink, block in zip(self.shrink, self.down[1:]):
            features.append(block(shrink(features[-1])))
        return [*features[:-1], self.drop(features[-1])]                             # [B, 32, *S/2], ... [B, 256, *S/16]

    def decode(self, features):
        x = features[-1]
        for grow, norm, block, skip in zip(self.grow, self.grown, self.up, features[-2::-1]):
            x = block(norm(grow(x, output_size=skip.shape[2:])) + skip)
        return self.head(self.drop(x))

    def forward(self, x):
        return self.decode(self.encode(x))
