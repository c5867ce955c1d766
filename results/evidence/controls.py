"""What stands in for g in the experiment's controls, and train_ssl.py with such a stand-in.

The oracle needs labels that training must not see, so that none of this is in train_ssl.py.

Legend: B batch, U unlabeled batch, K classes, C channels, *S the grid.
"""

import contextlib

import torch

import train_ssl
from data import augment, loading
from models import checkpoints
from models.losses import one_hot
from models.quality import Seen, interpolated, quality_target, true_dice, with_background


class Oracle(torch.nn.Module):
    """Answers by the labels [U, *S] of the unlabeled images: the true Dice, and where it is wrong.

    views() of show_labels() sets `label` and `classes`.
    """

    def forward(self, seen):
        return true_dice(seen.mask, self.truth(len(seen))[:, 1:])

    def error(self, seen):
        return (seen.mask != self.truth(len(seen))[:, 1:]).any(1).float()

    def belief(self, seen):
        return self.truth(len(seen))

    def truth(self, count):
        return one_hot(self.label[:count], self.classes)


class Shuffled(torch.nn.Module):
    """g, whose answers go to the next image of the batch: the same values, without knowledge."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, seen):
        return self.g(seen).roll(1, 0)

    def error(self, seen):
        return self.g.error(seen).roll(1, 0)

    def belief(self, seen):
        return self.g.belief(seen).roll(1, 0)


class Blind(torch.nn.Module):
    """g that is not shown the mask, as if it were f's teacher."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def belief(self, seen):
        logits = self.g.logits(seen) / self.g.temperature  # [members, views, B, K, *S]
        withheld = logits[:, 0]  # the first view does not show the mask
        p = withheld.softmax(2).mean(0)
        return interpolated(p, seen.mask.shape[2:])


class Ensemble(torch.nn.Module):
    """Supervised segmentation networks that answer as g does, by the mean of their probabilities.

    They have never seen a mask. What they teach is distillation, without a quality predictor.
    """

    def __init__(self, nets):
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)

    def belief(self, seen):
        return torch.stack([net(seen.image).float().softmax(1) for net in self.nets]).mean(0)

    def forward(self, seen):
        return quality_target(seen.mask, self.belief(seen)[:, 1:])

    def error(self, seen):
        return 1 - (with_background(seen.mask) * self.belief(seen)).sum(1)


class Segments(torch.nn.Module):
    """A stand-in for g as a segmentation network, by its belief for an empty mask.

    [B, C, *S] -> logits [B, K, *S]
    """

    def __init__(self, g, classes):
        super().__init__()
        self.g = g
        self.classes = classes

    def forward(self, image):
        nothing = image.new_zeros(len(image), self.classes, *image.shape[2:])
        return self.g.belief(Seen.of_probabilities(image, nothing, soft=True)).log()


PATCHED = [
    (train_ssl, "views"),
    (train_ssl, "look"),
    (checkpoints, "load_quality"),
    (loading, "load_slices"),
]


@contextlib.contextmanager
def stand_in(control):
    """train_ssl.py with a control in the place of g: one that is ready, or a class that takes g.

    None leaves g as it is.
    """
    kept = [getattr(module, name) for module, name in PATCHED]
    load = checkpoints.load_quality

    def load_quality(*args):
        if isinstance(control, torch.nn.Module):
            return control, []
        g, _ = load(*args)
        return control(g), []

    if control is not None:
        train_ssl.look = lambda *_: {}  # it would ask a stand-in about val
        checkpoints.load_quality = load_quality
    if isinstance(control, Oracle):
        show_labels(control)
    try:
        yield
    finally:
        for (module, name), value in zip(PATCHED, kept):
            setattr(module, name, value)


def show_labels(oracle):
    """Each batch tells an oracle the labels of its unlabeled images, moved as these are."""
    load_slices = loading.load_slices
    plain_views, plain_weak = train_ssl.views, augment.weak

    def with_labels(info, split, size, names=None, labels=True):
        return load_slices(info, split, size, names)

    def views(fetched, info, args, device):
        """train_ssl.views(), in which unlabeled images are those that come without a label."""
        _, unlabeled, _ = fetched
        oracle.classes = len(info.classes)

        def weak(image, *label, **how):
            if label:
                return plain_weak(image, *label, **how)
            truth = loading.standardized(unlabeled, device)[1]
            moved, oracle.label = plain_weak(image, truth, **how)
            return moved

        augment.weak = weak
        try:
            return plain_views(fetched, info, args, device)
        finally:
            augment.weak = plain_weak

    train_ssl.views = views
    loading.load_slices = with_labels
