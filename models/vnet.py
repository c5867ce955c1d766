"""The V-Net of the left-atrium baselines: 16 to 256 channels, 9.4 million parameters.

Milletari et al., V-Net, 3DV 2016. Number of convolutions, widths, batch norm and dropout (at the
bottom and before the head) as in UA-MT (Yu et al., MICCAI 2019) and the baselines that follow it:
plain blocks, without the residual connections of the original.
"""

from torch import nn

from models.layers import CONV, CONV_TRANSPOSE, DROPOUT, NORM

CONVOLUTIONS = (1, 2, 3, 3, 3)  # at each level, from fine to coarse, on the way down and up again


def unit(dims, convolution):
    """A convolution, batch norm, ReLU."""
    norm = NORM[dims](convolution.out_channels)
    return nn.Sequential(convolution, norm, nn.ReLU(inplace=True))


def block(dims, count, inputs, outputs):
    """`count` units with convolutions of side 3."""
    channels = [inputs] + (count - 1) * [outputs]
    convolutions = [CONV[dims](before, outputs, 3, padding=1) for before in channels]
    return nn.Sequential(*(unit(dims, convolution) for convolution in convolutions))


class VNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis.

    Sides that are multiples of 16 lose nothing.
    """

    coarsest = 31  # the longest side that is one pixel in the deepest level

    def __init__(self, channels, classes, dims=3, width=16, dropout=0.5):
        super().__init__()
        Conv, Up, Norm = CONV[dims], CONV_TRANSPOSE[dims], NORM[dims]
        widths = [width * 2**i for i in range(5)]
        pairs = list(zip(widths, widths[1:]))  # (16, 32), (32, 64), ...
        inputs = (channels, *widths[1:])
        self.down = nn.ModuleList(
            block(dims, count, before, after)
            for count, before, after in zip(CONVOLUTIONS, inputs, widths)
        )
        self.shrink = nn.ModuleList(
            unit(dims, Conv(fine, deep, 2, stride=2)) for fine, deep in pairs
        )
        self.grow = nn.ModuleList(Up(deep, fine, 2, stride=2) for fine, deep in pairs[::-1])
        self.grown = nn.ModuleList(
            nn.Sequential(Norm(fine), nn.ReLU(inplace=True)) for fine, _ in pairs[::-1]
        )
        self.up = nn.ModuleList(
            block(dims, count, fine, fine)
            for count, fine in zip(CONVOLUTIONS[-2::-1], widths[-2::-1])
        )
        self.drop = DROPOUT[dims](dropout)
        self.head = Conv(width, classes, 1)

    def encode(self, x):
        features = [self.down[0](x)]  # [B, 16, *S]
        for shrink, level in zip(self.shrink, self.down[1:]):
            features.append(level(shrink(features[-1])))  # [B, 32, *S/2], ... [B, 256, *S/16]
        return [*features[:-1], self.drop(features[-1])]

    def decode(self, features):
        x = features[-1]
        for grow, norm, level, skip in zip(self.grow, self.grown, self.up, features[-2::-1]):
            x = level(norm(grow(x, output_size=skip.shape[2:])) + skip)
        return self.head(self.drop(x))

    def forward(self, x):
        return self.decode(self.encode(x))
