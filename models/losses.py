"""Losses of a batch, in float32, for any number of classes and dimensions.

Every loss takes weights of pixels, which stand inside its sums over the batch; pixel_contrast()
gives a loss of each pixel instead. Only the ratios of weights matter, and a pixel of no weight is
as if it were not there. Several processes take their sums together.

Legend: B batch, K classes, *S = H, W or D, H, W.
"""

import torch
from torch.nn import functional as F

from models import distributed

LOSS_SMOOTH = 1e-5  # of Dice in losses, in pixels; at 1, an empty target rewards empty predictions


def one_hot(label, classes):
    """Integer labels [B, *S] -> float [B, K, *S]"""
    return F.one_hot(label.long(), classes).movedim(-1, 1).float()


def label_map(p, dim=1):
    """The most probable class of each pixel, the first of equal ones. [B, K, *S] -> [B, *S]

    On a CPU, max() is often ten times as fast as argmax().
    """
    return p.max(dim).indices


def harden(p):
    """The one-hot label of the most probable class. [B, K, *S] -> [B, K, *S]"""
    return one_hot(label_map(p), p.shape[1])


def pixel_entropy(p, least):
    """Entropy in nats, with log p no lower than log least. p [B, K, *S] -> [B, *S]"""
    return -(p * p.clamp_min(least).log()).sum(1)


def soft_dice(a, b, smooth):
    """(2 sum(a b) + s) / (sum a + sum b + s) over space.

    a, b [B, K, *S] in [0, 1] -> [B, K]; two empty masks score 1.
    """
    a = a.float().flatten(2)  # [B, K, P]
    b = b.float().flatten(2)
    return (2 * (a * b).sum(2) + smooth) / (a.sum(2) + b.sum(2) + smooth)


def dice_loss(logits, target, weight=None):
    """1 - mean soft Dice of all classes.

    logits and target (one-hot) [B, K, *S], weight [B, *S] -> scalar

    Dice of a class is 2 sum(w p y) / (sum(w p^2) + sum(w y^2)), with sums over the batch, so that
    an image without a class is not pulled toward empty predictions. The squares are those of V-Net
    (Milletari et al., 3DV 2016), the sums over the batch those of SSL4MIS (Luo et al.).
    """
    p = logits.float().softmax(1)
    y = target.float()
    if weight is None:
        weight = torch.ones_like(p[:, 0])
    w = (weight / distributed.mean(weight.mean()).clamp_min(1e-8))[:, None]  # [B, 1, *S]
    both = in_batch(w * (p * y))  # [K]
    one = in_batch(w * (p * p))
    other = in_batch(w * (y * y))
    return 1 - ((2 * both + LOSS_SMOOTH) / (one + other + LOSS_SMOOTH)).mean()


def seg_loss(logits, target, weight=None):
    """(cross-entropy + Dice loss) / 2; 0 where nothing has weight.

    logits and target (one-hot) [B, K, *S], weight [B, *S] -> scalar
    """
    cross_entropy = -(target * logits.float().log_softmax(1)).sum(1)  # [B, *S]
    return (weighted_mean(cross_entropy, weight) + dice_loss(logits, target, weight)) / 2


def mse_loss(logits, target, weight=None):
    """Squared difference of probabilities, mean over classes.

    logits, target probabilities [B, K, *S], weight [B, *S] -> scalar
    """
    error = (logits.float().softmax(1) - target).square().mean(1)  # [B, *S]
    return weighted_mean(error, weight)


def pixel_contrast(anchors, keys, label, clear, *, negatives, temperature):
    """InfoNCE of each clear pixel: near the mean key of its class, far from keys of the others.

    anchors [B, F, *S]: features that learn; keys [B, F, *S]: features that do not; label [B, *S];
    clear [B, *S] bool: the pixels that take part. -> [B, *S], 0 for pixels without a loss

    -log(exp(a.k+ / T) / (exp(a.k+ / T) + sum over negatives exp(a.k- / T)))

    a and k have unit length. k+ is the mean of the class over the batch. `negatives` k- are drawn
    from the pixels of the other classes in the batch, the same for all anchors of a class.
    van den Oord et al., CPC, 2018; Wang et al., U2PL, CVPR 2022.
    """
    loss = torch.zeros(label.shape, device=label.device)
    with torch.autocast(label.device.type, enabled=False):  # it would halve precision
        a = F.normalize(anchors.float(), dim=1).movedim(1, -1)  # [B, *S, F]
        k = F.normalize(keys.detach().float(), dim=1).movedim(1, -1)
        for c in label[clear].unique():
            mine = clear & (label == c)
            others = k[clear & (label != c)]
            if not len(others):
                continue
            drawn = torch.randperm(len(others), device=k.device)[:negatives]
            k_pos = F.normalize(k[mine].mean(0), dim=0)
            k_all = torch.cat([k_pos[None], others[drawn]])  # [1 + negatives, F]
            similar = a[mine] @ k_all.T / temperature  # [N, 1 + negatives]
            loss[mine] = similar.logsumexp(1) - similar[:, 0]
    return loss


def to_samples(value, like):
    """One number per sample [B], shaped [B, 1, ...] to broadcast over `like` [B, ...]."""
    return value.reshape(-1, *(1,) * (like.dim() - 1))


def in_batch(x):
    """Sum over batch, space and processes. [B, K, *S] -> [K]"""
    mine = x.sum([0, *range(2, x.dim())])
    return distributed.world() * distributed.differentiable_mean(mine)


def weighted_mean(value, weight=None):
    """sum(w v) / sum(w) over the batch, 0 where nothing has weight. value, weight [B, *S] -> scalar

    Once the gradients of several processes are averaged, they are those of sums over all of them.
    """
    if weight is None:
        return value.mean()
    return (value * weight).sum() / distributed.mean(weight.sum()).clamp_min(1e-8)
