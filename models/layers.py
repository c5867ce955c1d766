"""The layers of networks for slices (2 axes) and volumes (3 axes), and what decoders share."""

from torch import nn
from torch.nn import functional as F

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}  # of whole channels


def conv_block(dims, inputs, outputs, dropout=0.0):
    """(convolution 3, batch norm, leaky ReLU) twice, with dropout in between."""
    Conv, Norm = CONV[dims], NORM[dims]
    return nn.Sequential(
        Conv(inputs, outputs, 3, padding=1),
        Norm(outputs),
        nn.LeakyReLU(inplace=True),
        nn.Dropout(dropout),
        Conv(outputs, outputs, 3, padding=1),
        Norm(outputs),
        nn.LeakyReLU(inplace=True),
    )


def upsample(x, like):
    """x [B, C, *s] on the grid of `like` [B, F, *S], by linear interpolation."""
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=True)
