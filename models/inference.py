"""How a trained network is asked: labels of whole cases, their Dice, and g's estimate of it.

    Cases            the cases of a split, read one at a time
    predict_cases    the label of each: slices in full batches, volumes by a sliding window
    dice_table       Dice of each case and class, what training selects by
    estimate_masks   what g says of masks, and the truth

Legend: N samples, B batch, K classes, C channels, D depth, H height, W width, *S the network's
grid: S, S of slices, D, H, W of patches.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data import h5, loading
from data.files import InputError
from data.metrics import dice
from data.options import grid
from models import distributed, quality
from models.device import channels_last, fused, samples_in
from models.losses import label_map, one_hot

# ------------------------------------------------------------------------------------------- cases


class ReadCase(NamedTuple):
    """A case that was read."""

    entry: h5.Entry
    image: loading.Samples | loading.WholeCase  # its slices; in 3D the volume; without labels
    truth: np.ndarray | None  # (D, H, W) uint8


class Cases:
    """The cases of a split, read one at a time, in the file's order: iterating yields ReadCase.

    names: of the cases (default: all). keep: they stay in memory once they are read.
    """

    def __init__(self, info, split, size, names=None, keep=True):
        self.info = info
        self.split = split
        self.size = size
        self.keep = keep
        self.kept = []
        self.entries = info.entries(split)
        if names is not None:
            names = set(names)
            self.entries = [entry for entry in self.entries if entry.name in names]

    def __len__(self):
        return len(self.entries)

    def __iter__(self):
        for i, entry in enumerate(self.entries):
            case = self.kept[i] if i < len(self.kept) else self.read(entry)
            if self.keep and i == len(self.kept):
                self.kept.append(case)
            yield case

    def read(self, entry):
        """-> ReadCase"""
        (case,) = loading.whole_cases(self.info, self.split, [entry.name], entry.labeled)
        image = case._replace(label=None)
        if self.info.dims == 2:
            image = loading.samples_of(image, self.size)
        return ReadCase(entry, image, case.label)


def samples_of(case, size):
    """What loading.load_samples() gives for a case that was read, without labels. -> Samples"""
    if isinstance(case.image, loading.Samples):
        return case.image
    return loading.samples_of(case.image, size)


def class_probabilities(net, x, on):
    """What a network says of images. [B, C, *S] -> [B, K, *S] float32 on the device"""
    with on.autocast():
        return net(channels_last(x)).float().softmax(1)


# ----------------------------------------------------------------------------------------- windows


def add_window_options(p):
    """The options of evaluate.py and train_ssl.py that say how a network sees a volume."""
    p.section("volumes")
    p.add_argument(
        "--window",
        choices=("sliding", "whole"),
        default="sliding",
        help="overlapping windows of the size of the training patches, or all of a volume in one "
        "pass (faster, takes more memory)",
    )
    p.add_argument(
        "--stride",
        type=grid,
        metavar="D,H,W",
        help="steps between windows (default: half of the window)",
    )
    p.add_argument(
        "--blend",
        choices=("gaussian", "uniform"),
        default="gaussian",
        help="weights of a window's voxels where windows overlap",
    )


def window_words(args):
    """The options of add_window_options() that are not the defaults, as words of a command."""
    words = ["--window", "whole"] if args.window == "whole" else []
    if args.stride:
        words += ["--stride", ",".join(map(str, args.stride))]
    if args.blend != "gaussian":
        words += ["--blend", args.blend]
    return words


@dataclass
class Window:
    """How a network sees a volume."""

    size: tuple  # (D, H, W)
    stride: tuple  # (D, H, W)
    gaussian: bool = True  # weights of a window's voxels, see blending()
    whole: bool = False  # one window of the volume's own size instead
    batch: int = 2  # windows in one pass

    def __str__(self):
        if self.whole:
            return "whole volumes"
        size = " x ".join(map(str, self.size))
        stride = " x ".join(map(str, self.stride))
        return f"windows of {size}, stride {stride}"


def window_of(size, args, batch=None):
    """The Window of a network's size and of --window, --stride and --blend; None for slices.

    size: (D, H, W) of its patches, or the side of its slices; batch: windows in a pass (default: as
    large a pass as 32 slices are). InputError for options that do not fit the size.
    """
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
            f"--stride {','.join(map(str, stride))}: larger than the window, "
            f"{','.join(map(str, size))}; it would leave gaps"
        )
    return Window(
        size=tuple(size),
        stride=stride,
        gaussian=args.blend == "gaussian",
        whole=args.window == "whole",
        batch=batch or samples_in(32, size),
    )


def blending(size, gaussian):
    """Weights of a window's voxels. -> [D, H, W]

    They are a Gaussian, whose sigma is an eighth of each side, or all 1.
    """
    weight = torch.ones(())
    for side in size:
        at = (torch.arange(side) - (side - 1) / 2) / (side / 8)  # in sigmas from the middle
        along = torch.exp(-(at**2) / 2) if gaussian else torch.ones(side)
        weight = weight[..., None] * along
    return weight


def sliding_window(net, x, window, on):
    """Yields the mean probabilities of overlapping windows of a volume, from front to back.

    x [C, D, H, W] -> slabs [K, d, H, W]. A slab is ready when no window to come reaches it, so that
    the map of scores is never deeper than one window.
    """
    depth = window.size[0]
    weight = blending(window.size, window.gaussian).to(on.device)
    zs, ys, xs = map(loading.starts, x.shape[1:], window.size, window.stride)
    planes = [  # the windows that begin at one z
        (slice(b, b + window.size[1]), slice(c, c + window.size[2]))
        for b, c in itertools.product(ys, xs)
    ]
    total = None  # [K + 1, depth, H, W]: weighted probabilities, and weights
    for z, following in zip(zs, [*zs[1:], None]):
        for first in range(0, len(planes), window.batch):
            here = planes[first : first + window.batch]
            windows = torch.stack([x[:, z : z + depth, *at] for at in here])
            found = class_probabilities(net, windows, on)  # [B, K, *S]
            if total is None:
                total = torch.zeros(found.shape[1] + 1, depth, *x.shape[2:], device=on.device)
            for p, at in zip(found, here):
                total[(slice(-1), slice(None), *at)] += p * weight
                total[(-1, slice(None), *at)] += weight
        done = depth if following is None else following - z
        yield total[:-1, :done] / total[-1, :done]
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)


# ------------------------------------------------------------------------------------------ labels


class Answer(NamedTuple):
    """What a network says of a case."""

    case: ReadCase
    label: np.ndarray  # (D, H, W) uint8 on the case's own grid


def predict_cases(net, cases, on, window=None, batch=32):
    """Yields each of `cases` as entry, predicted label and truth, (D, H, W) uint8 on its own grid.

    window: Window, for volumes; batch: slices in a pass.
    """
    for answer in answers(net, cases, on, window, batch):
        yield answer.case.entry, answer.label, answer.case.truth


def answers(net, cases, on, window, batch):
    """Yields the Answer to each of `cases`. The arguments are those of predict_cases()."""
    if window:
        return labels_of_volumes(net, cases, on, window)
    return labels_of_slices(net, cases, on, batch)


@torch.no_grad()
def labels_of_volumes(net, cases, on, window):
    """answers() to volumes, one after the other."""
    net = fused(net)
    for case in cases:
        whole = case.image
        shape = window.size
        this = window
        if window.whole:  # sides that lose nothing where V-Net halves them
            shape = tuple(-(-n // 16) * 16 for n in case.entry.grid)
            this = Window(shape, shape, gaussian=False)
        x = torch.from_numpy(loading.at_least(whole.image, shape)).to(on.device, torch.float32)
        mean, std = (
            torch.tensor(v, device=on.device).reshape(-1, 1, 1, 1) for v in (whole.mean, whole.std)
        )
        slabs = sliding_window(net, (x - mean) / std, this, on)
        label = torch.cat([label_map(slab, 0).to(torch.uint8).cpu() for slab in slabs])
        yield Answer(case, loading.cut_back(label.numpy(), case.entry.grid))


@torch.no_grad()
def labels_of_slices(net, cases, on, batch):
    """answers() to slices, in full batches.

    Many single pictures are in one batch, a long volume is in several.
    """
    net = fused(net)
    label = []
    for parts in full_batches(cases, batch):
        x = torch.cat([case.image.batch(part, on.device)[0] for case, part in parts])  # [B,C,S,S]
        found = class_probabilities(net, x, on).split([len_of(part) for _, part in parts])
        for p, (case, part) in zip(found, parts):
            size = case.entry.grid[-2:]
            back = F.interpolate(p, size=size, mode="bilinear", align_corners=False)
            label.append(label_map(back).to(torch.uint8).cpu().numpy())
            if part.stop == len(case.image):
                yield Answer(case, np.concatenate(label))
                label = []


def len_of(part):
    """The length of a slice from start to stop."""
    return part.stop - part.start


def full_batches(cases, batch):
    """Yields lists of (case, slice of its samples) that hold `batch` samples together.

    The last one may hold fewer.
    """
    parts = []
    room = batch
    for case in cases:
        start = 0
        while start < len(case.image):
            part = slice(start, min(len(case.image), start + room))
            parts.append((case, part))
            start = part.stop
            room -= len_of(part)
            if room == 0:
                yield parts
                parts = []
                room = batch
    if parts:
        yield parts


def dice_table(net, cases, on, K, window=None, batch=32):
    """Dice of each case and foreground class. -> a list per case

    The arguments are those of predict_cases(). K: classes.
    """
    return [
        [dice(label == k, truth == k) for k in range(1, K)]
        for _, label, truth in predict_cases(net, cases, on, window, batch)
    ]


def mean_dice(table, held):
    """Mean over cases and then classes, and per class: what training selects by.

    table: of dice_table(); held [K-1]: supervision.held_classes(). The mean leaves the other
    classes out, and their Dice is None.
    """
    per_class = np.mean(table, 0)  # [K-1]
    shown = [d if h else None for d, h in zip(per_class.tolist(), held)]
    return float(per_class[held].mean()), shown


# ------------------------------------------------------------------- what g is asked, what it says


def judged_outputs(net, samples, on, batch):
    """Yields a net's outputs for labeled samples: Seen, truth [B, K-1, *S], softmax [B, K, *S]."""
    for rows in torch.arange(len(samples)).split(batch):
        x, y = samples.batch(rows, on.device)
        p = class_probabilities(net, x, on)
        truth = one_hot(y, p.shape[1])[:, 1:]
        yield quality.Seen.of_probabilities(x, p), truth, p


def judged_masks(masks, K, on, most=None, batch=64):
    """Yields this process's share of the masks of a split of vqm.h5: Seen, truth [B, K-1, *S].

    most: masks, evenly thinned out; batch: of slices of 224 x 224, see samples_in().
    """
    N = len(masks.mask)
    every = torch.arange(N) if most is None else torch.linspace(0, N - 1, min(most, N)).long()
    mine = every[distributed.rank() :: distributed.world()]
    for rows in mine.split(samples_in(batch, masks.mask.shape[1:])) if len(mine) else ():
        x, y = masks.samples.batch(masks.index[rows], on.device)
        seen = quality.Seen.of_label(x, masks.mask[rows].to(on.device), K)
        yield seen, one_hot(y, K)[:, 1:]


class Estimates(NamedTuple):
    """What g says of masks, and the truth."""

    predicted: np.ndarray  # [N, K-1] Dice
    true: np.ndarray  # [N, K-1] Dice
    present: np.ndarray  # [N, K-1] whether the truth holds the class


@torch.no_grad()
def estimate_quality(g, judged, on):
    """g's estimate and the true Dice of what a judged_...() yields, hard masks. -> Estimates

    They are empty where it yields nothing, as to a process that has no share.
    """
    found = []
    for seen, truth, *_ in judged:
        with on.autocast():
            predicted = g(seen)  # [B, K-1]
        true = quality.true_dice(seen.mask, truth)
        present = truth.flatten(2).any(2)
        found.append((predicted.cpu(), true.cpu(), present.cpu()))
    if not found:
        return Estimates(*[np.zeros((0, 0))] * 3)
    return Estimates(*(torch.cat(parts).numpy() for parts in zip(*found)))


def estimate_masks(g, masks, on, most=None):
    """estimate_quality() on judged_masks(), by all processes together."""
    found = estimate_quality(g, judged_masks(masks, g.config["classes"], on, most), on)
    every = distributed.gather(list(zip(*found)))  # N of a mask's predicted, true, present
    return Estimates(*(np.stack(parts) for parts in zip(*every)))
