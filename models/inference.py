"""Inference: cases read one at a time, probabilities, sliding windows, and what g says of masks."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from data import loading
from data.files import InputError
from data.metrics import dice
from data.options import grid
from models import distributed, quality
from models.device import channels_last, fused, samples_in
from models.losses import one_hot


def add_window_options(p):
    """The options of evaluate.py and train_ssl.py that say how a network sees a volume."""
    p.section("volumes")
    p.add_argument(
        "--window",
        choices=("sliding", "whole"),
        default="sliding",
        help="overlapping windows of the size of the training patches, or all of a volume in one pass (faster, takes more memory)",
    )
    p.add_argument(
        "--stride", type=grid, metavar="D,H,W", help="between windows (default: half of the window)"
    )
    p.add_argument(
        "--blend",
        choices=("gaussian", "uniform"),
        default="gaussian",
        help="weights of a window's voxels where windows overlap",
    )


class Cases:
    """The cases of a split, read one at a time: all of them, or those in `names`, in the file's order.

    Each is its Entry, what a network sees of it, and its truth (D, H, W) uint8 or None. A network sees Samples of all slices, or, where dims
    is 3, the volume (D, H, W) as it is, with mean and deviation of its intensities. keep: they stay in memory once they are read.
    """

    def __init__(self, info, split, size, names=None, keep=True):
        self.info, self.split, self.size, self.keep, self.kept = info, split, size, keep, []
        names = None if names is None else set(names)
        self.entries = [e for e in info.entries(split) if names is None or e.name in names]

    def __len__(self):
        return len(self.entries)

    def __iter__(self):
        for i, entry in enumerate(self.entries):
            case = self.kept[i] if i < len(self.kept) else self.read(entry)
            if self.keep and i == len(self.kept):
                self.kept.append(case)
            yield case

    def read(self, entry):
        ((name, image, truth, mean, std),) = loading.whole_cases(
            self.info, self.split, [entry.name], entry.labeled
        )
        if self.info.dims == 3:
            return entry, (image, mean, std), truth
        slices, N = (
            torch.from_numpy(np.stack([loading.as_slice(z, self.size) for z in image])),
            len(image),
        )
        return (
            entry,
            loading.Samples(
                slices,
                torch.full((N,), mean),
                torch.full((N,), std),
                None,
                [name] * N,
                [(z,) for z in range(N)],
            ),
            truth,
        )


def class_probabilities(net, x, on):
    """What a network says of images. [B, C, *S] -> [B, K, *S] float32 on the device"""
    with on.autocast():
        return net(channels_last(x)).float().softmax(1)


@dataclass
class Window:
    """How a network sees a volume."""

    size: tuple  # (D, H, W)
    stride: tuple  # (D, H, W)
    gaussian: bool = (
        True  # weights of a window's voxels: a Gaussian of an eighth of each side, or all alike
    )
    whole: bool = False  # one window of the volume's own size instead
    batch: int = 2  # windows in one pass

    def __str__(self):
        return (
            "whole volumes"
            if self.whole
            else f"windows of {' x '.join(map(str, self.size))}, stride {' x '.join(map(str, self.stride))}"
        )


def window_of(size, args, batch=None):
    """The Window of a network trained on patches of `size` and of the options --window, --stride and --blend; None for the side of slices.
    batch: windows in a pass"""
    if isinstance(size, int):
        if args.stride or args.window != "sliding" or args.blend != "gaussian":
            raise InputError(
                "--window, --stride and --blend are for volumes (dims=3); these networks see slices"
            )
        return None
    stride = tuple(args.stride or (max(1, s // 2) for s in size))
    stride = stride * 3 if len(stride) == 1 else stride
    if any(step > side for step, side in zip(stride, size)):
        raise InputError(
            f"--stride {','.join(map(str, stride))}: larger than the window, {','.join(map(str, size))}; it would leave gaps"
        )
    return Window(
        tuple(size),
        stride,
        args.blend == "gaussian",
        args.window == "whole",
        batch or samples_in(32, size),
    )


def blending(size, gaussian):
    """Weights of a window's voxels. -> [D, H, W]"""
    weight = torch.ones(())
    for side in size:
        at = (torch.arange(side) - (side - 1) / 2) / (side / 8)
        weight = weight[..., None] * (torch.exp(-(at**2) / 2) if gaussian else torch.ones(side))
    return weight


def sliding_window(net, x, cut, on):
    """Yields the mean probabilities of overlapping windows of a volume x [D, H, W], as slabs [K, d, H, W] from front to back.

    A slab is ready when no window to come reaches it, so that the map of scores is never deeper than one window. cut: Window
    """
    depth, weight = cut.size[0], blending(cut.size, cut.gaussian).to(on.device)
    zs, *others = (loading.starts(n, s, step) for n, s, step in zip(x.shape, cut.size, cut.stride))
    places = [
        tuple(slice(c, c + s) for c, s in zip(corner, cut.size[1:]))
        for corner in itertools.product(*others)
    ]
    total = None  # [K + 1, depth, H, W]: weighted probabilities, and weights
    for z, following in zip(zs, [*zs[1:], None]):
        for start in range(0, len(places), cut.batch):
            here = places[start : start + cut.batch]
            windows = torch.stack([x[(slice(z, z + depth), *place)] for place in here])[
                :, None
            ]  # [B, 1, *S]
            found = class_probabilities(net, windows, on)  # [B, K, *S]
            if total is None:
                total = torch.zeros(found.shape[1] + 1, depth, *x.shape[1:], device=on.device)
            for p, place in zip(found, here):
                total[(slice(-1), slice(None), *place)] += p * weight
                total[(-1, slice(None), *place)] += weight
        done = depth if following is None else following - z
        yield total[:-1, :done] / total[-1, :done]
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)


def predict_cases(net, cases, on, cut=None, batch=32):
    """Yields each of `cases` as entry, predicted label (D, H, W) uint8 on its own grid, and truth. cut: Window, for volumes; batch: slices in a pass"""
    return (
        labels_of_volumes(net, cases, on, cut) if cut else labels_of_slices(net, cases, on, batch)
    )


@torch.no_grad()
def labels_of_volumes(net, cases, on, cut):
    """predict_cases() for volumes, one after the other."""
    net = fused(net)
    for entry, (volume, mean, std), truth in cases:
        shape, this = cut.size, cut
        if cut.whole:  # networks halve the grid up to four times
            shape = tuple(-(-n // 16) * 16 for n in entry.grid)
            this = Window(shape, shape, gaussian=False)
        x = (
            torch.from_numpy(loading.at_least(volume, shape)).to(on.device, torch.float32) - mean
        ) / std
        label = torch.cat(
            [slab.argmax(0).to(torch.uint8).cpu() for slab in sliding_window(net, x, this, on)]
        )
        yield entry, loading.cut_back(label.numpy(), entry.grid), truth


@torch.no_grad()
def labels_of_slices(net, cases, on, batch):
    """predict_cases() for slices, whichever cases they belong to in full batches: many single pictures in one, a long volume in several."""
    net, label = fused(net), []
    for parts in full_batches(cases, batch):
        x = torch.cat(
            [slices.batch(part, on.device)[0] for (_, slices, _), part in parts]
        )  # [B, C, S, S]
        found = class_probabilities(net, x, on).split([part.stop - part.start for _, part in parts])
        for p, ((entry, slices, truth), part) in zip(found, parts):
            back = F.interpolate(p, size=entry.grid[-2:], mode="bilinear", align_corners=False)
            label.append(back.argmax(1).to(torch.uint8).cpu().numpy())
            if part.stop == len(slices):
                yield entry, np.concatenate(label), truth
                label = []


def full_batches(cases, batch):
    """Yields lists of (case, slice of its samples) that hold `batch` samples together, fewer at the end of all cases."""
    parts, room = [], batch
    for case in cases:
        start, end = 0, len(case[1])
        while start < end:
            part = slice(start, min(end, start + room))
            parts.append((case, part))
            start, room = part.stop, room - (part.stop - part.start)
            if room == 0:
                yield parts
                parts, room = [], batch
    if parts:
        yield parts


def dice_table(net, cases, on, K, cut=None, batch=32):
    """Dice of each case and foreground class. -> a list per case; for the rest see predict_cases()"""
    return [
        [dice(label == k, truth == k) for k in range(1, K)]
        for _, label, truth in predict_cases(net, cases, on, cut, batch)
    ]


def mean_dice(table, held):
    """Mean over cases and then classes, and per class: what the table shows, and what training
    selects by.

    table: of dice_table(); held [K-1]: h5.held_classes(). The mean leaves the other classes out, and
    their Dice is None.
    """
    per_class = np.mean(table, 0)
    shown = [d if h else None for d, h in zip(per_class.tolist(), held)]
    return float(per_class[held].mean()), shown


@torch.no_grad()
def estimate_quality(g, samples, index, mask, on, change=lambda x: x):
    """g's estimate and the true Dice of hard masks. -> two arrays [N, K-1], and whether the truth holds the class [N, K-1]

    index [N]: the sample of each mask [N, *S] in samples, which have labels; change: what to do to the images first.
    """
    predicted, true, present, K, batch = (
        [],
        [],
        [],
        g.config["classes"],
        samples_in(64, mask.shape[1:]),
    )
    for rows, m in zip(index.split(batch), mask.split(batch)):
        x, y = samples.batch(rows, on.device)
        m, truth = (one_hot(v.to(on.device), K)[:, 1:] for v in (m, y))
        with on.autocast():
            predicted.append(g(change(x), m).cpu())
        (
            true.append(quality.true_dice(m, truth).cpu()),
            present.append(truth.flatten(2).any(2).cpu()),
        )
    return torch.cat(predicted).numpy(), torch.cat(true).numpy(), torch.cat(present).numpy()


def estimate_masks(g, masks, on, most=None, **how):
    """estimate_quality on the masks of a split of vqm.h5, evenly thinned out to `most`, by all processes together; how: another index or change
    for it."""
    rows, index = (
        thinned(len(masks.mask), most)[distributed.rank() :: distributed.world()],
        how.pop("index", masks.index),
    )
    found = estimate_quality(g, masks.samples, index[rows], masks.mask[rows], on, **how)
    return [np.stack(v) for v in zip(*distributed.gather(list(zip(*found))))]


def thinned(n, most=None):
    """Numbers below n, all or `most` that are evenly spread."""
    return torch.arange(n) if most is None else torch.linspace(0, n - 1, min(most, n)).long()
