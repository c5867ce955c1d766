"""Losses per sample, in float32, for any number of classes and dimensions. Reduction over the batch is the caller's.

Legend: B batch, K classes, *S = H, W or D, H, W.
"""
import torch
from torch.nn import functional as F


def one_hot(label, classes):
    """Integer labels [B, *S] -> float [B, K, *S]"""
    return F.one_hot(label.long(), classes).movedim(-1, 1).float()


def soft_dice(a, b, weight=None, smooth=1.0):
    """(2 sum(a b) + s) / (sum a + sum b + s) over space. a, b [B, K, *S] in [0, 1], weight [B, *S] -> [B, K]

    Milletari et al., V-Net, 3DV 2016, with plain instead of squared sums, smoothed so that two empty masks score 1.
    """
    a, b = a.float().flatten(2), b.float().flatten(2)                          # [B, K, P]
    w = 1.0 if weight is None else weight.flatten(1)[:, None]                  # [B, 1, P]
    return (2 * (a * b * w).sum(2) + smooth) / ((a * w).sum(2) + (b * w).sum(2) + smooth)


def dice_loss(logits, target, weight=None):
    """1 - mean soft Dice of the foreground classes. logits and target [B, K, *S] -> [B]"""
    return 1 - soft_dice(logits.float().softmax(1)[:, 1:], target[:, 1:], weight).mean(1)


def seg_loss(logits, target, weight=None):
    """(cross-entropy + soft Dice loss) / 2. logits and target (one-hot or probabilities) [B, K, *S] -> [B]

    weight [B, *S] counts each pixel by its share in the sample's total weight; a sample of no weight has loss 0.
    """
    ce = -(target * logits.float().log_softmax(1)).sum(1)                      # [B, *S]
    if weight is None:
        return (ce.flatten(1).mean(1) + dice_loss(logits, target)) / 2
    return (weighted_mean(ce, weight) + dice_loss(logits, target, relative(weight))) / 2


def mse_loss(logits, target, weight=None):
    """Squared difference of probabilities, mean over classes. logits, target probabilities [B, K, *S], weight [B, *S] -> [B]"""
    error = (logits.float().softmax(1) - target).square().mean(1)              # [B, *S]
    return error.flatten(1).mean(1) if weight is None else weighted_mean(error, weight)


def pixel_contrast(anchors, keys, label, clear, *, negatives, temperature):
    """InfoNCE of each clear pixel: near the mean key of its class, far from keys of the others. -> [B, *S], 0 for pixels without a loss

    anchors [B, F, *S] features that learn; keys [B, F, *S] features that do not; label [B, *S]; clear [B, *S] bool: the pixels that take part.
    -log(exp(a.k+ / T) / (exp(a.k+ / T) + sum over negatives exp(a.k- / T))), a and k of unit length, k+ the mean of the class over the batch,
    `negatives` k- drawn from the other classes' pixels of the batch, the same for all anchors of a class.
    van den Oord et al., CPC, 2018; Wang et al., U2PL, CVPR 2022.
    """
    loss = torch.zeros(label.shape, device=label.device)
    with torch.autocast(label.device.type, enabled=False):  # matrix products would drop to half precision
        a, k = (F.normalize(x.float(), dim=1).movedim(1, -1) for x in (anchors, keys.detach()))          # [B, *S, F]
        for c in label[clear].unique():
            mine, others = clear & (label == c), k[clear & (label != c)]
            if not len(others):
                continue
            k_pos, k_neg = F.normalize(k[mine].mean(0), dim=0), others[torch.randperm(len(others), device=k.device)[:negatives]]
            similar = a[mine] @ torch.cat([k_pos[None], k_neg]).T / temperature                             # [N, 1 + negatives]
            loss[mine] = similar.logsumexp(1) - similar[:, 0]
    return loss


def to_samples(value, like):
    """One number per sample [B], shaped [B, 1, ...] to broadcast over `like` [B, ...]."""
    return value.reshape(-1, *(1,) * (like.dim() - 1))


def weighted_mean(value, weight):
    """sum(w v) / sum(w) over space, 0 where all weights are. [B, *S] twice -> [B]"""
    value, weight = value.flatten(1), weight.flatten(1)
    return (value * weight).sum(1) / weight.sum(1).clamp_min(1e-8)


def relative(weight):
    """Weights scaled to a largest value of 1 per sample, so that the smoothing of Dice means the same for all. [B, *S]"""
    most = weight.flatten(1).amax(1).clamp_min(1e-8)
    return weight / to_samples(most, weight)
