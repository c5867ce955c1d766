"""The quality predictors g(seen) -> Dice [B, K-1], their target, and simpler estimates.

Abhishek and Hamarneh, Quality-Guided Semi-Supervised Learning for Medical Image Segmentation,
MICCAI 2026, section 2.1; extended from one foreground class to any number, to soft masks, and to a
dense head.

Legend: B batch, C channels of the image, K classes, *S = H, W or D, H, W.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.device import channels_last
from models.losses import harden, one_hot, pixel_entropy, soft_dice, to_samples
from models.resnet import ResNet
from models.unet import UNet

# Of the Dice that g predicts, as a share of the grid's pixels: one at 96 x 96, five at 224 x 224.
SMOOTH_SHARE = 1e-4


def quality_target(mask, truth):
    """What g predicts: the smoothed Dice of each foreground class.

    mask, truth [B, K-1, *S] in [0, 1] -> [B, K-1]

    (2 |m t| + s) / (|m| + |t| + s), where s is a ten thousandth of the pixels. Plain Dice jumps
    between 0 and 1 on one pixel where the truth lacks a class. With s, Dice is 1 for an empty mask
    and falls with the area that was invented.

    If the truth is given as probabilities, this is the expected Dice: the expectation of the
    numerator over that of the denominator. Unless areas are a few pixels, it is nearly the Dice
    that hard truths, drawn pixel by pixel from the probabilities, have on average. Doubts that
    pixels share (is the whole organ there?) are beyond it. For an empty mask, it is s / (s +
    expected area): near 1 only where much less than s is expected.
    """
    return soft_dice(mask, truth, smooth=SMOOTH_SHARE * mask[0, 0].numel())


def true_dice(mask, truth):
    """Dice of hard masks as evaluate.py scores it: 1 where both are empty, 0 where one is.

    mask, truth [B, K-1, *S] -> [B, K-1]
    """
    return soft_dice(mask, truth, smooth=1e-6)


def with_background(mask):
    """Foreground channels [B, K-1, *S] -> [B, K, *S], the background first."""
    return torch.cat([1 - mask.sum(1, keepdim=True), mask], 1)


def resample(x, size):
    """x [B, C, *S] on a grid of `size`, differentiably.

    size: a side, or one per axis, or None, which leaves x as it is.
    Axes that shrink take averages. A sample of zeros and ones, a hard mask, takes the nearest
    pixels, as the masks did that g has learned from (data/quality_masks.py). It stays hard.
    """
    grid = x.shape[2:]
    if size is None:
        return x
    if isinstance(size, int):
        size = [size] * len(grid)
    shape = torch.Size(size)
    if shape == grid:
        return x
    if len(grid) == 2:
        smooth = F.interpolate(x, shape, mode="bilinear", antialias=True)
    else:
        smooth = F.interpolate(x, tuple(map(min, shape, grid)), mode="area")
        smooth = F.interpolate(smooth, shape, mode="trilinear")
    nearest = F.interpolate(x, shape, mode="nearest-exact")
    hard = ((x == 0) | (x == 1)).flatten(1).all(1)  # [B]
    return torch.where(to_samples(hard, x), nearest, smooth)


def interpolated(p, grid):
    """Probabilities [B, K, *S] on another grid, linear between pixels."""
    return F.interpolate(p, grid, mode="bilinear" if len(grid) == 2 else "trilinear")


# ------------------------------------------------------------------------------------- what g sees


@dataclass(eq=False)
class Seen:
    """What g is asked about: images, and a mask of each.

    A further input of g is one more field, its entries in joined() and channels(), and its value:
    in of_probabilities(), and where masks are label maps (of_label() and train_qp.py's batches).
    """

    image: torch.Tensor  # [B, C, *S] standardized
    mask: torch.Tensor  # [B, K-1, *S] foreground, hard or soft, in [0, 1]

    def __len__(self):
        return len(self.mask)

    @classmethod
    def of_label(cls, image, label, classes):
        """Images and the hard masks of label maps [B, *S] of integers below `classes`."""
        return cls(image, one_hot(label, classes)[:, 1:])

    @classmethod
    def of_probabilities(cls, image, p, soft=False):
        """Images and the output of f for them, hard or `soft`, of its probabilities p [B, K, *S]"""
        return cls(image, p[:, 1:] if soft else foreground(p))

    def joined(self, shown=None):
        """Everything that g sees, as channels. -> [B, channels(), *S]

        shown [B]: 1 where the mask is shown, 0 where it is withheld. With it, the background is a
        channel, too: else a withheld mask would look like an empty one. None: all are shown.
        """
        mask = self.mask
        if shown is not None:
            mask = with_background(mask) * to_samples(shown, mask)
        return torch.cat([self.image, mask.to(self.image.dtype)], 1)

    @staticmethod
    def channels(of_image, of_mask):
        """How many channels joined() gives."""
        return of_image + of_mask

    def on_grid(self, size):
        """The same on a grid of `size`, as resample() takes it."""
        fields = (field.to(self.image.dtype) for field in vars(self).values())
        return type(self)(*(resample(field, size) for field in fields))


# ------------------------------------------------------------------------------------ the two heads


class QualityPredictor(nn.Module):
    """The scalar head of the paper, a ResNet-18 on the joined channels of image and mask.

    g(Seen) -> Dice [B, K-1]. Image and mask are resampled to `size`, so f may train at another one.
    """

    def __init__(self, channels, classes, *, dims=2, size=None, width=64, dropout=0.15):
        super().__init__()
        self.size = size
        inputs = Seen.channels(channels, classes - 1)
        self.backbone = ResNet(inputs, "resnet18", dims, width)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, classes - 1))

    def forward(self, seen):
        x = seen.on_grid(self.size).joined()  # [B, C + K-1, *S]
        features = self.backbone.encode(x)[-1].flatten(2).mean(2)  # [B, 8 width]
        return self.head(features).float().sigmoid()


class DenseQualityPredictor(nn.Module):
    """The dense head, M `members`, each a U-Net that predicts the truth from image and mask.

    g(Seen) -> expected Dice [B, K-1]

    The answer is the expected Dice of the mask under the mean probabilities of the members, at a
    temperature that train_qp.py fits on val. A member sees the mask as K channels, with that of the
    background. Where the mask is withheld, all K channels are 0. mask_dropout is the share of the
    training samples whose mask is withheld. At 0 or 1 a member knows one view only; else it knows
    V = 2, with and without the mask, and both are averaged.
    """

    def __init__(
        self,
        channels,
        classes,
        *,
        dims=2,
        size=None,
        width=16,
        members=3,
        mask_dropout=0.5,
    ):
        super().__init__()
        self.size = size
        self.mask_dropout = mask_dropout
        inputs = Seen.channels(channels, classes)
        self.members = nn.ModuleList(UNet(inputs, classes, dims, width) for _ in range(members))
        self.register_buffer("temperature", torch.ones(()))

    def show(self, seen, shown):
        """What a member sees. shown [B]: 1 where the mask is, else 0 -> [B, C + K, *S]"""
        return seen.joined(shown)

    def logits(self, seen, both=True):
        """The answer of every member to every view, on the grid of `size`. -> [M, V, B, K, *S]

        both: all views that the members know. Otherwise only the view with the mask, if they know
        it.
        """
        seen = seen.on_grid(self.size)
        views = []  # whether the mask is shown
        if self.mask_dropout > 0 and (both or self.mask_dropout == 1):
            views.append(0.0)
        if self.mask_dropout < 1:
            views.append(1.0)
        ones = torch.ones(len(seen), device=seen.image.device)
        x = channels_last(torch.cat([self.show(seen, shown * ones) for shown in views]))
        answers = torch.stack([member(x).float() for member in self.members])  # [M, V B, K, *S]
        return answers.unflatten(1, (len(views), len(seen)))

    def truth(self, seen, both=True):
        """The probability of the truth, on the grid of `size`. -> [B, K, *S]"""
        logits = self.logits(seen, both)  # [M, V, B, K, *S]
        return (logits / self.temperature).softmax(3).mean((0, 1))

    def forward(self, seen):
        truth = self.truth(seen)[:, 1:]  # [B, K-1, *S]
        mask = seen.mask.to(seen.image.dtype)
        return quality_target(resample(mask, self.size), truth)

    def belief(self, seen, both=False):
        """The probability of the truth, interpolated to the grid of the mask. -> [B, K, *S]

        Unless `both`, only the view with the mask is asked, if members know it: at half the cost.
        """
        return interpolated(self.truth(seen, both), seen.mask.shape[2:])

    def error(self, seen):
        """The probability that the class of each pixel of the mask is wrong. -> [B, *S]"""
        right = with_background(seen.mask) * self.belief(seen, both=True)  # [B, K, *S]
        return 1 - right.sum(1)


# -------------------------------------------------------------------------------------- correction


def corrected(g, image, p, trust):
    """Probabilities p of f for images, of which g's belief replaces the share `trust`.

    image [B, C, *S], p [B, K, *S] -> [B, K, *S]
    """
    belief = g.belief(Seen.of_probabilities(image, p))
    return torch.lerp(p, belief, trust)


class Corrected(nn.Module):
    """A segmentation network f whose output g corrects. [B, C, *S] -> logits [B, K, *S]"""

    def __init__(self, f, g, trust):
        super().__init__()
        self.f = f
        self.g = g
        self.trust = trust

    def forward(self, image):
        p = self.f(image).float().softmax(1)
        return corrected(self.g, image, p, self.trust).log()


# ------------------------------------------------------------------------------- what g has to beat
# Estimates of the Dice of a network's output, the argmax of its probabilities p [B, K, *S], from p
# itself. -> [B, K-1]; higher means better.


def foreground(p):
    """The output of probabilities p, by foreground class. -> [B, K-1, *S] in {0, 1}"""
    return harden(p)[:, 1:]


def confidence(p):
    """The mean of the largest probability over all pixels, the same for every class."""
    mean = p.amax(1).flatten(1).mean(1)  # [B]
    return mean[:, None].expand(-1, p.shape[1] - 1)


def certainty(p):
    """1 - the mean entropy over all pixels in units of log K, the same for every class."""
    entropy = pixel_entropy(p, least=1e-12) / math.log(p.shape[1])  # [B, *S]
    return 1 - entropy.flatten(1).mean(1)[:, None].expand(-1, p.shape[1] - 1)


def region_confidence(p):
    """The mean probability of a class over the pixels that it was given to.

    If there are none: the probability that the likeliest pixel is not of the class.
    """
    mask = foreground(p).flatten(2)  # [B, K-1, P]
    p = p[:, 1:].flatten(2)
    area = mask.sum(2)  # [B, K-1]
    return torch.where(area > 0, (mask * p).sum(2) / area.clamp_min(1), 1 - p.amax(2))


def expected_dice(p, other=None):
    """Expected Dice of the output of p, under other probabilities or under p itself."""
    truth = p if other is None else other
    return quality_target(foreground(p), truth[:, 1:])


def overlap(p, other):
    """Smoothed Dice of the outputs of two networks."""
    return quality_target(foreground(p), foreground(other))


# --------------------------------------------------------------------------------- g and f together


def together(by_g, mask, p):
    """What g and f say together: the mean of both expected Dice, times f's certainty. -> [B, K-1]

    by_g [B, K-1]: what g says of the mask; mask [B, K-1, *S]: hard; p [B, K, *S]: f's
    probabilities, from which the mask came.

    g and f often err apart. Both may overlook that an image is strange as a whole, since expected
    Dice looks at one region; f's certainty looks at all pixels. This ranks masks. It is no Dice.
    """
    own = quality_target(mask, p[:, 1:])
    return (by_g + own) / 2 * certainty(p)
