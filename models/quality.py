"""The quality predictors g(image, mask) -> Dice [B, K-1], the target that they learn, and simpler estimates of quality to compare with.

Abhishek and Hamarneh, Quality-Guided Semi-Supervised Learning for Medical Image Segmentation, MICCAI 2026, section 2.1; extended from
one foreground class to any number, to soft masks, and to a dense head.

Legend: B batch, C channels of the image, K classes, *S = H, W or D, H, W.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from models.losses import one_hot, soft_dice
from models.resnet import ResNet
from models.unet import UNet

SMOOTH = 1e-4  # share of the grid's pixels that is added to both sides of Dice: one pixel at 96 x 96, five at 224 x 224


def quality_target(mask, truth):
    """What g predicts: the smoothed Dice of each foreground class. masks [B, K-1, *S] in [0, 1], both -> [B, K-1]

    (2 |m t| + s) / (|m| + |t| + s) with s = a ten thousandth of the pixels. Plain Dice jumps between 0 and 1 on one pixel where a
    class is absent from the truth; with s it is 1 for an empty mask and falls with the area of what was invented. With
    probabilities as the truth it is the expected Dice (expectations of numerator and denominator, one over the other), and for an empty
    mask s / (s + expected area): near 1 only where nothing of the class is expected. The Dice that hard truths, drawn pixel by pixel from
    the probabilities, have on average; doubts that pixels share (is the whole organ there?) are beyond it.
    """
    return soft_dice(mask, truth, smooth=SMOOTH * mask[0, 0].numel())


def true_dice(mask, truth):
    """Dice of hard masks as evaluate.py scores it: 1 where both are empty, 0 where one is. [B, K-1, *S] twice -> [B, K-1]"""
    return soft_dice(mask, truth, smooth=1e-6)


def with_background(mask):
    """Foreground channels [B, K-1, *S] -> [B, K, *S], the background first."""
    return torch.cat([1 - mask.sum(1, keepdim=True), mask], 1)


def resample(x, size):
    """x [B, C, *S], differentiably, on a grid of `size` (a side, or one per axis); as it is where size is None. Averages when shrinking."""
    shape = x.shape[2:] if size is None else torch.Size([size] * (x.dim() - 2) if isinstance(size, int) else size)
    if x.shape[2:] == shape:
        return x
    if x.dim() == 4:
        return F.interpolate(x, shape, mode="bilinear", antialias=True)
    smaller = all(s <= n for s, n in zip(shape, x.shape[2:]))
    return F.interpolate(x, shape, mode="area") if smaller else F.interpolate(x, shape, mode="trilinear")


# ---------------------------------------------------------------------------------------------------- the two heads

class QualityPredictor(nn.Module):
    """The paper's scalar head: image [B, C, *S] (standardized), mask [B, K-1, *S] (hard or soft) -> Dice [B, K-1].

    A ResNet-18 on the joined channels. Other sizes than `size` are resampled to it, so that f may train at another.
    """

    def __init__(self, channels, classes, dims=2, size=None, width=64, dropout=0.15):
        super().__init__()
        self.size = size
        self.backbone = ResNet(channels + classes - 1, "resnet18", dims, width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, classes - 1))

    def forward(self, image, mask):
        x = resample(torch.cat([image, mask.to(image.dtype)], 1), self.size)   # [B, C + K-1, *S]
        features = self.backbone.encode(x)[-1].flatten(2).mean(2)              # [B, 8 width]
        return self.head(features).float().sigmoid()


class DenseQualityPredictor(nn.Module):
    """The dense head: image [B, C, *S] (standardized), mask [B, K-1, *S] (hard or soft) -> expected Dice [B, K-1].

    M `members`, U-Nets, see the image and the mask and predict the truth; the answer is the expected Dice of the mask under the mean of
    their probabilities, at a temperature that train_qp.py fits on val. A member sees the mask as K channels, the
    background's among them; where the mask is withheld, all are 0. mask_dropout is the share of training samples whose mask is
    withheld; at 0 or 1 a member knows but one of the V = 2 views, else both are averaged.
    """

    def __init__(self, channels, classes, dims=2, size=None, width=16, members=3, mask_dropout=0.5):
        super().__init__()
        self.size, self.mask_dropout = size, mask_dropout
        self.members = nn.ModuleList(UNet(channels + classes, classes, dims, width) for _ in range(members))
        self.register_buffer("temperature", torch.ones(()))

    def show(self, image, mask, withheld):
        """What a member sees. withheld [B] in {0, 1} -> [B, C + K, *S]"""
        shown = with_background(mask) * (1 - withheld.reshape(-1, *[1] * (mask.dim() - 1)))
        return torch.cat([image, shown.to(image.dtype)], 1)

    def logits(self, image, mask, both=True):
        """Every member's answer to every view that it knows, or, if not `both`, to that of the shown mask, on the grid of `size`. -> [M, V, B, K, *S]"""
        image, mask = resample(image, self.size), resample(mask.to(image.dtype), self.size)
        views = ([torch.ones] if self.mask_dropout > 0 and (both or self.mask_dropout == 1) else []) + ([torch.zeros] if self.mask_dropout < 1 else [])
        x = torch.cat([self.show(image, mask, view(len(image), device=image.device)) for view in views])
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        return torch.stack([member(x).float() for member in self.members]).unflatten(1, (len(views), len(image)))

    def truth(self, image, mask, both=True):
        """Probability of the truth, on the grid of `size`. -> [B, K, *S]"""
        return (self.logits(image, mask, both) / self.temperature).softmax(3).mean((0, 1))

    def forward(self, image, mask):
        return quality_target(resample(mask.to(image.dtype), self.size), self.truth(image, mask)[:, 1:])

    def belief(self, image, mask, both=False):
        """Probability of the truth for members that have seen the mask (if they know that view), on the mask's grid, to which it is interpolated; half the
        cost of asking also without it. -> [B, K, *S]"""
        return F.interpolate(self.truth(image, mask, both), mask.shape[2:], mode="bilinear" if mask.dim() == 4 else "trilinear")

    def error(self, image, mask):
        """Probability that each pixel's class in the mask is wrong. -> [B, *S] on the mask's own grid"""
        return 1 - (with_background(mask) * self.belief(image, mask, both=True)).sum(1)


# ---------------------------------------------------------------------------------------------------- what g has to beat
# Estimates from a network's own probabilities p [B, K, *S], of its output, their argmax. -> [B, K-1]; higher means better.

def foreground(p):
    """The output of probabilities p: a channel for each foreground class. -> [B, K-1, *S] in {0, 1}"""
    return one_hot(p.argmax(1), p.shape[1])[:, 1:]


def confidence(p):
    """Mean of the largest probability over all pixels, the same for every class."""
    return p.amax(1).flatten(1).mean(1)[:, None].expand(-1, p.shape[1] - 1)


def certainty(p):
    """1 - mean entropy over all pixels in units of log K, the same for every class."""
    entropy = -(p * p.clamp_min(1e-12).log()).sum(1) / math.log(p.shape[1])
    return 1 - entropy.flatten(1).mean(1)[:, None].expand(-1, p.shape[1] - 1)


def region_confidence(p):
    """Mean probability of a class over the pixels that it was given to; of not being it, at the likeliest pixel, if there are none."""
    mask, p = foreground(p).flatten(2), p[:, 1:].flatten(2)
    area = mask.sum(2)
    return torch.where(area > 0, (mask * p).sum(2) / area.clamp_min(1), 1 - p.amax(2))


def expected_dice(p, other=None):
    """Expected Dice of the output of p under the probabilities of another network, or p itself."""
    return quality_target(foreground(p), (p if other is None else other)[:, 1:])


def overlap(p, other):
    """Smoothed Dice of two outputs."""
    return quality_target(foreground(p), foreground(other))
