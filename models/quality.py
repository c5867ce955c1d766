"""The quality predictor g(image, mask) -> Dice, and the target that it learns.

Abhishek and Hamarneh, Quality-Guided Semi-Supervised Learning for Medical Image Segmentation, MICCAI 2026, section 2.1; extended from
one foreground class to any number, and to soft masks.
"""
import torch
from torch import nn
from torch.nn import functional as F

from models.losses import soft_dice
from models.resnet import ResNet

SMOOTH = 1e-3  # share of the grid's pixels that is added to Dice's two sides in g's target


def quality_target(mask, truth):
    """What g predicts: the smoothed Dice of each foreground class. masks [B, K-1, *S] in [0, 1], both -> [B, K-1]

    (2 |m t| + s) / (|m| + |t| + s) with s = a thousandth of the pixels. Plain Dice jumps between 0 and 1 on one pixel where a
    class is absent from the truth; with s it is 1 for an empty mask and falls with the area of what was invented.
    """
    return soft_dice(mask, truth, smooth=SMOOTH * mask[0, 0].numel())


class QualityPredictor(nn.Module):
    """image [B, C, *S] (standardized), mask [B, K-1, *S] (one channel per foreground class, hard or soft) -> Dice [B, K-1].

    A ResNet-18 on the joined channels. Other sizes than `size` are resampled to it, differentiably, so that f may train at another.
    """

    def __init__(self, channels, classes, dims=2, size=None, width=64, dropout=0.15):
        super().__init__()
        self.size, self.dims = size, dims
        self.backbone = ResNet(channels + classes - 1, 18, dims, width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, classes - 1))

    def forward(self, image, mask):
        x = torch.cat([image, mask.to(image.dtype)], 1)                        # [B, C + K-1, *S]
        if self.size and x.shape[2:] != torch.Size((self.size,) * self.dims):
            x = F.interpolate(x, (self.size,) * self.dims, mode="bilinear" if self.dims == 2 else "trilinear",
                              antialias=self.dims == 2)
        features = self.backbone.encode(x)[-1].flatten(2).mean(2)              # [B, 8 width]
        return self.head(features).float().sigmoid()
