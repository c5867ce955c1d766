"""U-Net++ on a ResNet encoder: nested U-Nets with dense skip connections.

26.1 million parameters with ResNet-34. Zhou et al., UNet++, DLMIA 2018; widths, nearest-neighbor
upsampling and blocks without residual connections as in segmentation_models_pytorch. Deviation
from the paper: no deep supervision (one output serves every method).
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.layers import CONV, NORM
from models.resnet import ResNet


def block(dims, inputs, outputs):
    """(convolution 3, batch norm, ReLU) twice."""
    Conv, Norm = CONV[dims], NORM[dims]
    return nn.Sequential(
        Conv(inputs, outputs, 3, padding=1, bias=False),
        Norm(outputs),
        nn.ReLU(inplace=True),
        Conv(outputs, outputs, 3, padding=1, bias=False),
        Norm(outputs),
        nn.ReLU(inplace=True),
    )


def enlarged(x, like):
    """x [B, F, *s] on the grid of `like`, by nearest neighbors."""
    return F.interpolate(x, like.shape[2:], mode="nearest")


class UNetPlusPlus(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis.

    Node X[i, j] lies in row i, on the grid S / 2^(i+1). X[i, 0] is a feature of the encoder. The
    other nodes see their whole row and the node below (the paper's Eq. 1):

        X[i, j] = block([X[i+1, j-1] enlarged, X[i, j-1], ..., X[i, 0]])
    """

    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        inner = self.encoder.widths  # of the nodes of a row
        last = [width // 2, width, 2 * width, 4 * width]  # of its last node, X[i, 4 - i]
        self.nodes = nn.ModuleDict()
        for j in range(1, 5):
            for i in range(5 - j):
                ends = i + j == 4
                below = last[i + 1] if ends and j > 1 else inner[i + 1]
                outputs = last[i] if ends else inner[i]
                self.nodes[f"{i}_{j}"] = block(dims, below + j * inner[i], outputs)
        self.top = block(dims, last[0], width // 4)
        self.head = CONV[dims](width // 4, classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        rows = [[feature] for feature in features[1:]]
        for j in range(1, 5):
            for i in range(5 - j):
                below = enlarged(rows[i + 1][j - 1], rows[i][0])
                node = self.nodes[f"{i}_{j}"](torch.cat([below, *rows[i][::-1]], 1))
                rows[i].append(node)
        return self.head(self.top(enlarged(rows[0][4], features[0])))

    def forward(self, x):
        return self.decode(self.encode(x))
