"""U-Net++ on a ResNet encoder: the nested U-Nets' dense skip connections, 26.1 million parameters with ResNet-34.

Zhou et al., UNet++, DLMIA 2018; widths, nearest-neighbor upsampling and blocks without residual connections as in segmentation_models_pytorch.
Deviation from the paper: no deep supervision (one output serves every method).
"""
import torch
from torch import nn
from torch.nn import functional as F

from models.resnet import ResNet


def block(dims, inputs, outputs):
    """(convolution 3, batch norm, ReLU) twice."""
    Conv, Norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    return nn.Sequential(Conv(inputs, outputs, 3, padding=1, bias=False), Norm(outputs), nn.ReLU(inplace=True),
                         Conv(outputs, outputs, 3, padding=1, bias=False), Norm(outputs), nn.ReLU(inplace=True))


def enlarged(x, like):
    """x [B, F, *s] on the grid of `like`, by nearest neighbors."""
    return F.interpolate(x, like.shape[2:], mode="nearest")


class UNetPlusPlus(nn.Module):
    """images [B, C, *S] -> logits [B, K, *S], for any S of at least 16 per axis.

    Node X[i, j] lies in row i, on the grid S / 2^(i+1), and sees its whole row and the node below: X[i, 0] is the encoder's,
    X[i, j] = block([X[i+1, j-1] enlarged, X[i, j-1], ..., X[i, 0]]) (the paper's Eq. 1).
    """
    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        first, last = self.encoder.widths, [width // 2, width, 2 * width, 4 * width]    # of a row's nodes, and of its last one, X[i, 4 - i]
        self.nodes = nn.ModuleDict()
        for j in range(1, 5):
            for i in range(5 - j):
                below = last[i + 1] if i + j == 4 and j > 1 else first[i + 1]
                self.nodes[f"{i}_{j}"] = block(dims, below + j * first[i], last[i] if i + j == 4 else first[i])
        self.top = block(dims, last[0], width // 4)
        self.head = (nn.Conv2d, nn.Conv3d)[dims - 2](width // 4, classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        rows = [[f] for f in features[1:]]
        for j in range(1, 5):
            for i in range(5 - j):
                below = enlarged(rows[i + 1][j - 1], rows[i][0])
                rows[i].append(self.nodes[f"{i}_{j}"](torch.cat([below, *rows[i][::-1]], 1)))
        return self.head(self.top(enlarged(rows[0][4], features[0])))

    def forward(self, x):
        return self.decode(self.encode(x))
