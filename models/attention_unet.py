"""Attention U-Net on a ResNet encoder: what comes through a skip connection is gated by what the coarser level has seen.

Oktay et al., Attention U-Net, MIDL 2018; the additive gate of its public implementation (one coefficient per pixel, half as many inner channels
as the skip connection has). Deviations from the paper: a ResNet encoder, one output without deep supervision; the deepest level gates as it is,
without a convolution of its own.
"""
import torch
from torch import nn
from torch.nn import functional as F

from models.resnet import ResNet
from models.unet import conv_block, upsample


class Gate(nn.Module):
    """a = sigmoid(psi(relu(theta x + phi g))) on a grid of half the side, enlarged; x -> W (a x). (The paper's Eq. 1 and 2.)

    x [B, F, *s] comes through the skip connection, g [B, G, *s/2] from the coarser level. -> [B, F, *s]
    """

    def __init__(self, dims, inputs, gating):
        super().__init__()
        Conv, Norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
        self.theta = Conv(inputs, inputs // 2, 2, stride=2, bias=False)
        self.phi = Conv(gating, inputs // 2, 1)
        self.psi = Conv(inputs // 2, 1, 1)
        self.W = nn.Sequential(Conv(inputs, inputs, 1), Norm(inputs))

    def forward(self, x, g):
        x_half = self.theta(F.pad(x, [n for side in x.shape[:1:-1] for n in (0, side % 2)]))
        a = self.psi((x_half + self.phi(g)).relu()).sigmoid()                       # [B, 1, *s/2]
        return self.W(upsample(a, x) * x)


class AttentionUNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis. The finest skip connection, of ResNet's
    first convolution, has no gate, as in the paper."""
    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        deep, fine = self.encoder.widths[-1], self.encoder.widths[-2::-1]
        outputs = (4 * width, 2 * width, width, width // 2)
        inputs = (deep, *outputs[:-1])
        self.gates = nn.ModuleList(Gate(dims, f, i) for i, f in zip(inputs[:-1], fine))
        self.up = nn.ModuleList(conv_block(dims, i + f, o) for i, f, o in zip(inputs, fine, outputs))
        self.head = (nn.Conv2d, nn.Conv3d)[dims - 2](outputs[-1], classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        x = features[-1]
        skips = features[-2:0:-1]                                                   # at S/16, S/8, S/4, S/2
        for gate, up, skip in zip([*self.gates, lambda skip, x: skip], self.up, skips):
            x = up(torch.cat([gate(skip, x), upsample(x, skip)], 1))
        return upsample(self.head(x), features[0])

    def forward(self, x):
        return self.decode(self.encode(x))
