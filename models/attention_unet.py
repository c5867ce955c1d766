"""Attention U-Net on a ResNet encoder: the coarser level gates each skip connection.

Oktay et al., Attention U-Net, MIDL 2018, with the additive gate of its public implementation (one
coefficient per pixel, half as many inner channels as the skip connection has). Deviations from the
paper: a ResNet encoder; one output without deep supervision; the deepest level gates without a
convolution of its own.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.layers import CONV, NORM, conv_block, upsample
from models.resnet import ResNet


class Gate(nn.Module):
    """x -> W (a x), with a = sigmoid(psi(relu(theta x + phi g))) (the paper's Eq. 1 and 2).

    x [B, F, *s] comes through the skip connection, g [B, G, *s/2] from the coarser level. a is
    computed on the coarser grid and enlarged. -> [B, F, *s]
    """

    def __init__(self, dims, inputs, gating):
        super().__init__()
        Conv, Norm = CONV[dims], NORM[dims]
        self.theta = Conv(inputs, inputs // 2, 2, stride=2, bias=False)
        self.phi = Conv(gating, inputs // 2, 1)
        self.psi = Conv(inputs // 2, 1, 1)
        self.W = nn.Sequential(Conv(inputs, inputs, 1), Norm(inputs))

    def forward(self, x, g):
        padding = [n for side in x.shape[:1:-1] for n in (0, side % 2)]  # to even sides
        x_half = self.theta(F.pad(x, padding))  # [B, F/2, *s/2]
        a = self.psi((x_half + self.phi(g)).relu()).sigmoid()  # [B, 1, *s/2]
        return self.W(upsample(a, x) * x)


class AttentionUNet(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis.

    The finest skip connection, of the first convolution, has no gate, as in the paper.
    """

    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        deepest, *skips = self.encoder.widths[::-1]
        outputs = (4 * width, 2 * width, width, width // 2)
        inputs = (deepest, *outputs[:-1])
        self.gates = nn.ModuleList(
            Gate(dims, skip, before) for before, skip in zip(inputs[:-1], skips)
        )
        self.up = nn.ModuleList(
            conv_block(dims, before + skip, after)
            for before, skip, after in zip(inputs, skips, outputs)
        )
        self.head = CONV[dims](outputs[-1], classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        image, *skips, x = features
        for i, skip in enumerate(skips[::-1]):  # at S/16, S/8, S/4, S/2
            gated = self.gates[i](skip, x) if i < len(self.gates) else skip
            x = self.up[i](torch.cat([gated, upsample(x, skip)], 1))
        return upsample(self.head(x), image)

    def forward(self, x):
        return self.decode(self.encode(x))
