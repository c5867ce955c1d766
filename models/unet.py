"""The U-Net of the ACDC baselines: 16 to 256 channels, dropout that grows with depth in the encoder, 1.8 million parameters (5.3 in 3D).

Ronneberger et al., U-Net, MICCAI 2015; widths, dropout and bilinear upsampling as in the SSL4MIS baselines (Luo et al.).
"""
import torch
from torch import nn
from torch.nn import functional as F


def conv_block(dims, inputs, outputs, dropout=0.0):
    """(convolution 3, batch norm, leaky ReLU) twice, with dropout in between."""
    Conv, Norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    return nn.Sequential(Conv(inputs, outputs, 3, padding=1), Norm(outputs), nn.LeakyReLU(inplace=True), nn.Dropout(dropout),
                         Conv(outputs, outputs, 3, padding=1), Norm(outputs), nn.LeakyReLU(inplace=True))


def upsample(x, like):
    """Linear interpolation of x [B, C, *s] to the spatial size of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear" if x.dim() == 4 else "trilinear", align_corners=True)


class UNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis."""
    coarsest = 16  # pixels along a side of one of its deepest level

    def __init__(self, channels, classes, dims=2, width=16, dropouts=(0.05, 0.1, 0.2, 0.3, 0.5)):
        super().__init__()
        widths = [width * 2 ** i for i in range(5)]
        Conv, Pool = ((nn.Conv2d, nn.MaxPool2d), (nn.Conv3d, nn.MaxPool3d))[dims - 2]
        self.down = nn.ModuleList(conv_block(dims, i, o, d) for i, o, d in zip((channels, *widths), widths, dropouts))
        self.pool = Pool(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))  # (256, 128), (128, 64), ...
        self.shrink = nn.ModuleList(Conv(deep, fine, 1) for deep, fine in pairs)
        self.up = nn.ModuleList(conv_block(dims, 2 * fine, fine) for _, fine in pairs)
        self.head = Conv(widths[0], classes, 3, padding=1)

    def encode(self, x):
        features = [self.down[0](x)]                      # [B, 16, *S]
        for block in self.down[1:]:
            features.append(block(self.pool(features[-1])))
        return features                                   # [B, 32, *S/2], ... [B, 256, *S/16]

    def decode(self, features):
        x = features[-1]
        for shrink, up, skip in zip(self.shrink, self.up, features[-2::-1]):
            x = up(torch.cat([skip, upsample(shrink(x), skip)], 1))
        return self.head(x)

    def forward(self, x):
        return self.decode(self.encode(x))
