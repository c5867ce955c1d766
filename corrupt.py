"""Stage 1: makes masks of variable quality, from which train_qp.py learns what quality is.

    python corrupt.py DATA.h5 --out runs/vqm --labeled 7 [--workers 2] [--preview runs/vqm/preview.png]

Reads  DATA.h5: the labeled train cases and val; never test, never the label of an unlabeled case.
Writes OUT/weak/fold*.pt, partly trained networks f, OUT/weak/last.pt (to --resume), and OUT/vqm.h5:
         /train, /val       synthetic masks; train also holds outputs of weak networks ("harvest ..."), which with --folds 2 or more
                            have not seen the patient
         /real              outputs of all weak networks on val, which none has seen
       Its schema is that of data/quality_masks.py.

The masks depend on --seed alone, not on --workers.

Legend: N masks, K classes, D depth, H height, W width, *S the masks' grid: S, S of slices, or D, H, W of patches of volumes; m a binary mask
or a label map, uint8 [H, W] or [D, H, W].
"""

import argparse
import contextlib
import functools
import glob
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, quality_masks, shapes, workers
from data.files import InputError, claim, replacing
from data.options import (
    SEED,
    SHARE,
    Parser,
    cli,
    flip_axes,
    folder,
    grid,
    number,
    numbers,
    picture,
    seed_of,
)
from models.checkpoints import check_finite, load_checkpoint, save_checkpoint, start_run
from models.device import channels_last, compute, device_name, samples_in
from models.losses import dice_loss, one_hot

CATALOG_VERSION = 2


def parse_args(argv=None):
    p = Parser(__doc__, prog="corrupt.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--out", type=folder, required=True, help="folder for vqm.h5 and weak/")
    p.section("what is labeled, and what is made of it")
    p.add_argument(
        "--labeled",
        default="all",
        help="labeled train patients: a number (7: the first 7), a fraction (0.1) or all",
    )
    p.add_argument("--labeled-seed", type=SEED, help="draw the labeled patients at random")
    p.add_argument(
        "--size",
        type=grid,
        help="side of the masks' grid (default 224); of volumes D,H,W of a patch (default 80,112,112)",
    )
    p.add_argument(
        "--patches",
        type=number(1, 10_000),
        default=8,
        help="volumes: patches of each labeled train volume, at random places",
    )
    p.add_argument(
        "--masks",
        type=number(1, 100_000),
        help="masks of each labeled train slice (default 200) or patch (default 50)",
    )
    p.add_argument(
        "--val-masks",
        type=number(1, 100_000),
        default=20,
        help="synthetic masks of each val slice, or of each patch that tiles a val volume",
    )
    p.add_argument(
        "--balance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw train masks so that the histogram of Dice is flat; the paper does not",
    )
    p.section("harvest")
    p.add_argument(
        "--harvest-share",
        type=SHARE,
        default=0.5,
        help="share of train masks that are outputs of weak networks; paper: 0.05",
    )
    p.add_argument(
        "--folds",
        type=number(1),
        default=2,
        help="weak networks predict the fold that they were not trained on; 1: one for all, the paper",
    )
    p.add_argument(
        "--harvest-epochs",
        type=numbers,
        default="1,3,5,10,15,20",
        help="epochs after which a weak network is saved",
    )
    p.add_argument(
        "--harvest-steps",
        type=number(1),
        default=10,
        help="least steps of a harvest epoch, for few images",
    )
    p.add_argument(
        "--harvest-batch",
        type=number(1, 65_536),
        help="slices (default 16) or patches (default 2) in a step of the weak networks",
    )
    p.add_argument(
        "--flip",
        type=flip_axes,
        metavar="AXES",
        help="axes along which images of the weak networks may be flipped: H,W or H "
        "or none (default: all; give stages 1 to 3 the same)",
    )
    p.section("running")
    p.add_argument("--workers", type=number(1, 1000), default=1, help="processes that make masks")
    p.add_argument(
        "--preview",
        type=picture,
        metavar="FILE.png",
        help="draw a grid of masks with name and Dice",
    )
    p.add_argument("--seed", type=SEED, default=0, help="of everything")
    p.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, ...")
    p.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="mixed precision of the weak networks",
    )
    p.add_argument(
        "--deterministic",
        action="store_true",
        help="the same masks each time also on a GPU, at a price (on a CPU they are anyway)",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was interrupted: keeps the weak networks that it has trained",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the masks that OUT holds")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- sizes


def side(m):
    """Geometric mean of the grid's sides in the plane of the last two axes, pixels."""
    return (m.shape[-2] * m.shape[-1]) ** 0.5


def pixels(n, m):
    """A catalog size in pixels. The paper gives sizes for a 224-pixel side; small objects get smaller ones, in proportion to an
    object that spans 100 of these 224 pixels."""
    return n * min(side(m) / 224, shapes.extent(m) / 100)


def odd(width):
    """The nearest odd number of at least 3: on a small grid, small sizes of the catalog fall together."""
    return max(3, 2 * round((width - 1) / 2) + 1)


def ball(width, m):
    """Structuring element of a catalog size: a disc, in a volume a ball that is as flat as the object."""
    return shapes.ball(odd(pixels(width, m)), shapes.flatness(m))


def spans(m):
    """What shares of an object's size refer to: its extent, in a volume also its depth. -> [n]"""
    return np.array([*shapes.bounds(m)[1][:-2], shapes.extent(m), shapes.extent(m)])


# ---------------------------------------------------------------------------------------------------- chance


def sign(rng):
    return 1 if rng.random() < 0.5 else -1


def rotation(degrees):
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def direction(rng, n):
    """A random unit vector [n]."""
    depth = rng.uniform(-1, 1, n - 2)  # Archimedes: on a sphere, each coordinate is uniform
    return np.append(depth, rotation(rng.uniform(0, 360))[0, ::-1] * (1 - (depth**2).sum()) ** 0.5)


def random_bytes(m, rng):
    """A random byte for each pixel."""
    return np.frombuffer(rng.bytes(m.size), np.uint8).reshape(m.shape)


def places(m, rng):
    """Endless random foreground pixels [n]."""
    inside = np.flatnonzero(m.view(bool))
    while True:
        yield np.unravel_index(inside[rng.integers(len(inside))], m.shape)


# ---------------------------------------------------------------------------------------------------- corruptions
# f(m, rng, *parameters) -> corrupted copy, of a binary mask with some foreground, a slice or a volume. Those in WARPS also take a
# whole label map.


def erode(m, rng, width):
    return shapes.erode(m, ball(width, m))


def dilate(m, rng, width):
    return shapes.dilate(m, ball(width, m))


def opening(m, rng, width):
    return shapes.opening(m, ball(width, m))


def closing(m, rng, width):
    return shapes.closing(m, ball(width, m))


def ellipse(m, rng):
    """The ellipse or ellipsoid with the mask's second moments."""
    return shapes.ellipsoid(m.shape, *shapes.moments(m))


def polygon(m, rng, sides):
    """Corners evenly spaced along each slice's outline, from a random start."""
    return shapes.polygon(m, sides, rng.random())


def hull(m, rng):
    return shapes.hull(m)


def box(m, rng):
    return shapes.box(m)


def jagged(m, rng, width):
    """Flips pixels of the boundary band with p = .5."""
    return m ^ ((dilate(m, rng, width) ^ erode(m, rng, width)) & random_bytes(m, rng) & 1)


def smooth(m, rng, width):
    return shapes.smooth(m, odd(pixels(width, m)), shapes.flatness(m))


def elastic(m, rng, alpha, sigma):
    """Simard et al. 2003: uniform noise, smoothed with sigma, times alpha. Its field of the same amplitude and wave length is drawn
    on a grid of step 2 sigma here and interpolated, which is 20 times faster."""
    unit = side(m) / 224
    return shapes.elastic(
        m, rng, 2 * sigma * unit, unit * alpha * 3**-0.5 / (2 * sigma * np.pi**0.5)
    )


def grid_distortion(m, rng, steps, limit):
    """Along each axis, stretches and squeezes the cells of a regular grid by up to `limit`."""

    def axis(n):
        knots = np.concatenate([[0], np.cumsum(1 + rng.uniform(-limit, limit, steps))])
        return (
            np.interp(np.arange(n), np.linspace(0, n - 1, steps + 1), knots / knots[-1] * (n - 1))
            .round()
            .astype(int)
        )

    return shapes.resample(m, [axis(n) for n in m.shape])


def balls(m, rng, count, low, high, value):
    """Balls of radius low to high, inside the mask (value 0) or anywhere (value 1)."""
    out, unit, flat, inside = m.copy(), pixels(1, m), shapes.flatness(m), places(m, rng)
    for _ in range(count):
        at = next(inside) if value == 0 else [rng.integers(n) for n in m.shape[::-1]][::-1]
        radius = max(1, round(rng.uniform(low, high) * unit))
        shapes.paint_ball(out, at, radius, radius * flat, value)
    return out


def holes(m, rng, count, low, high):
    return balls(m, rng, count, low, high, 0)


def islands(m, rng, count, low, high):
    return balls(m, rng, count, low, high, 1)


def holes_and_islands(m, rng, count, low, high):
    return islands(holes(m, rng, count, low, high), rng, count, low, high) if m.any() else m


def largest(m, rng):
    labels, sizes = shapes.components(m)
    return (labels == 1 + sizes[1:].argmax()).view(np.uint8)


def drop_component(m, rng):
    """Removes one component; of a single one, the part beyond a random line or plane through its centroid."""
    labels, sizes = shapes.components(m)
    if len(sizes) > 2:
        return m * (labels != rng.integers(1, len(sizes)))
    return m * shapes.half_space(m.shape, shapes.center(m), direction(rng, m.ndim))


def rectangle_dropout(m, rng, low, high):
    """Empties a box around a random foreground pixel; its sides are shares of the object's extent."""
    at, out = next(places(m, rng)), m.copy()
    sides = np.maximum(1, rng.uniform(low, high, m.ndim)[::-1] * spans(m)).astype(int)
    out[tuple(slice(max(0, a - s // 2), a + s // 2 + 1) for a, s in zip(at, sides))] = 0
    return out


def shift(m, rng, share):
    """By a share of the object's extent, in a random direction."""
    return shapes.affine_map(m, np.eye(2), shift=direction(rng, m.ndim) * share * spans(m))


def scale(m, rng, low, high):
    factor = rng.uniform(low, high)
    return shapes.affine_map(m, np.eye(2) * factor, factor)


def rotate(m, rng, degrees):
    """In the plane of the last two axes: depth is often coarser."""
    return shapes.affine_map(m, rotation(rng.uniform(0.5, 1) * degrees * sign(rng)))


def affine(m, rng):
    """Rotation and shear in the plane of the last two axes, scale and shift along all."""
    factor = (
        rotation(rng.uniform(-15, 15))
        @ np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]])
        * rng.uniform(0.85, 1.15)
    )
    moved = rng.uniform(-0.1, 0.1, m.ndim)[::-1] * spans(m)
    return shapes.affine_map(m, factor, rng.uniform(0.85, 1.15) if m.ndim == 3 else 1, moved)


def gaussian_blob(m, rng, size):
    """Upright ellipse or ellipsoid at the centroid with the mask's spread along each axis, times size."""
    at, covariance = shapes.moments(m)
    return shapes.ellipsoid(m.shape, np.rint(at), np.diag(np.diag(covariance)) * size**2)


def disc(m, rng):
    """A disc or ball of the mask's size at its centroid."""
    out, depth = np.zeros_like(m), shapes.bounds(m)[1][0] / 2 if m.ndim == 3 else 0
    radius, depth = shapes.ball_of(np.count_nonzero(m), depth)
    shapes.paint_ball(out, np.rint(shapes.center(m)), max(1, round(radius)), depth, 1)
    return out


def inverted(m, rng):
    return 1 - m


def empty(m, rng):
    return np.zeros_like(m)


def full(m, rng):
    return np.ones_like(m)


def noise(m, rng, share):
    """Each pixel foreground with p = share."""
    return (random_bytes(m, rng) < 256 * share).view(np.uint8)


def swap(m, rng, K):
    """Two of several classes trade their names. Takes a label map."""
    a, b = rng.permutation(np.arange(1, K))[:2]
    return rename(m, {a: b, b: a})


def merge(m, rng, K):
    """One class is taken for its neighbor. Takes a label map."""
    a = int(rng.integers(1, K))
    touching = np.bincount(
        m[shapes.dilate((m == a).view(np.uint8), shapes.ball(3, m.ndim - 2.0)) > 0], minlength=K
    )
    touching[[0, a]] = 0
    return rename(m, {a: int(touching.argmax()) if touching.any() else int(rng.integers(1, K))})


def rename(m, names):
    """The label map with other numbers for some classes."""
    table = np.arange(256, dtype=np.uint8)
    for old, new in names.items():
        table[old] = new
    return cv2.LUT(m.reshape(len(m), -1), table).reshape(m.shape)


# A line is (name, weight, function, parameters ...). To add a corruption: a function above, a line here.
SINGLE = [
    ("erode 5", 1, erode, 5),
    ("erode 7", 1, erode, 7),
    ("erode 9", 0.8, erode, 9),
    ("dilate 5", 1, dilate, 5),
    ("dilate 7", 1, dilate, 7),
    ("dilate 9", 0.8, dilate, 9),
    ("open 5", 0.5, opening, 5),
    ("close 5", 0.5, closing, 5),
    ("ellipse", 1, ellipse),
    ("polygon 3", 0.5, polygon, 3),
    ("polygon 5", 0.8, polygon, 5),
    ("polygon 8", 0.8, polygon, 8),
    ("convex hull", 1, hull),
    ("bounding box", 0.5, box),
    ("jagged 3", 1, jagged, 3),
    ("jagged 5", 1, jagged, 5),
    ("smooth 11", 0.8, smooth, 11),
    ("smooth 15", 0.8, smooth, 15),
    ("elastic 30", 1, elastic, 30, 4),
    ("elastic 60", 0.8, elastic, 60, 5),
    ("grid 5", 1, grid_distortion, 5, 0.2),
    ("grid 8", 0.7, grid_distortion, 8, 0.4),
    ("holes small", 1, holes, 2, 3, 8),
    ("holes large", 0.8, holes, 3, 8, 15),
    ("islands", 1, islands, 2, 3, 8),
    ("holes and islands", 1, holes_and_islands, 2, 3, 8),
    ("largest component", 0.8, largest),
    ("drop component", 0.5, drop_component),
    ("rectangle dropout", 0.8, rectangle_dropout, 0.1, 0.3),
    ("shift .1", 1, shift, 0.1),
    ("shift .2", 0.8, shift, 0.2),
    ("shift .3", 0.5, shift, 0.3),
    ("scale down", 1, scale, 0.75, 0.9),
    ("scale up", 1, scale, 1.1, 1.25),
    ("rotate 15", 1, rotate, 15),
    ("rotate 30", 0.7, rotate, 30),
    ("affine", 0.8, affine),
]
SEVERAL_CLASSES = [
    ("swap classes", 0.5, swap),
    ("merge classes", 0.5, merge),
]  # joins SINGLE when K > 2
HEAVY = [
    ("erode 11", 1, erode, 11),
    ("dilate 11", 1, dilate, 11),
    ("grid 12", 1, grid_distortion, 12, 0.6),
    ("holes heavy", 1, holes, 5, 10, 20),
    ("shift .4", 1, shift, 0.4),
    ("scale .5-.7", 1, scale, 0.5, 0.7),
    ("scale 1.4-1.6", 1, scale, 1.4, 1.6),
]
BLOB = [
    ("gaussian 1.0", 1, gaussian_blob, 1.0),
    ("gaussian 1.2", 0.7, gaussian_blob, 1.2),
    ("disc", 0.8, disc),
    ("hull", 1, hull),
    ("box", 1, box),
]
CATASTROPHIC = [
    ("inverted", 1, inverted),
    ("empty", 0.5, empty),
    ("full", 0.5, full),
    ("random .5", 0.3, noise, 0.5),
]
MIX = dict(
    identity=0.20, single=0.28, chain=0.18, cross=0.10, heavy=0.12, catastrophic=0.05, blob=0.07
)  # the paper's shares
WARPS = {elastic, grid_distortion, shift, scale, rotate, affine}


def pick(table, rng):
    """A line of a table, drawn by weight."""
    total = rng.random() * sum(line[1] for line in table)
    for line in table:
        total -= line[1]
        if total < 0:
            return line
    return table[-1]


def apply(line, label, K, rng):
    """One catalog line on one, some or all classes of a label map. -> label map

    A class that grows takes background; half of the time, it also takes its neighbors' pixels. A warp of all classes moves them
    together. A label map without foreground stays as it is.
    """
    _, _, f, *parameters = line
    present = [k for k in range(1, K) if np.any(label == k)]
    if not present:
        return label
    if f in (swap, merge):
        return f(label, rng, K)
    if K == 2:
        return f(label, rng, *parameters)
    everything = rng.random() < 0.4
    if everything and f in WARPS:
        return f(label, rng, *parameters)
    chosen = rng.permutation(present)[: None if everything else rng.integers(1, len(present) + 1)]
    parts = [(k, f((label == k).view(np.uint8), rng, *parameters) > 0) for k in chosen]
    base = rename(label, dict.fromkeys(chosen, 0))  # the other classes
    out, over = base.copy(), rng.random() < 0.5
    if not over:
        for k, part in parts:  # what was a class's own stays its own
            out[part & (label == k)] = k
    for k, part in parts:  # never over what an earlier one has just taken
        out[part & (out == base if over else out == 0)] = k
    return out


def invent(label, K, rng):
    """A ball of a class that is absent from the label map, on background: all that can go wrong with an absent class."""
    absent = [k for k in range(1, K) if not np.any(label == k)]
    spot, flat = np.zeros_like(label), min(1, len(label) / side(label)) if label.ndim == 3 else 0
    at = [rng.integers(n) for n in label.shape[::-1]][::-1]
    radius = max(1, round(side(label) * rng.uniform(0.01, 0.1)))
    shapes.paint_ball(spot, at, radius, radius * flat, 1)
    return np.where((spot > 0) & (label == 0), np.uint8(absent[rng.integers(len(absent))]), label)


def sample(label, K, similar, rng):
    """One mask of variable quality from a true label map. similar: label maps of other cases, near in size. -> mask, name"""
    kind = pick([(k, v) for k, v in MIX.items()], rng)[0]
    single = SINGLE + SEVERAL_CLASSES if K > 2 else SINGLE
    if kind == "identity" or (kind == "cross" and not similar):
        return label, "identity"
    if kind == "cross":
        return similar[rng.integers(len(similar))], "cross image"
    present = sum(bool(np.any(label == k)) for k in range(1, K))
    if not present or (present < K - 1 and rng.random() < 0.1):
        return invent(label, K, rng), "invented"
    lines = {
        "single": [single],
        "chain": [single] * int(rng.integers(2, 4)),
        "heavy": [HEAVY],
        "blob": [BLOB],
        "catastrophic": [CATASTROPHIC],
    }[kind]
    lines, out = [pick(table, rng) for table in lines], label
    for line in lines:
        out = apply(line, out, K, rng)
    return out, " + ".join(line[0] for line in lines)


def dice_of(mask, label, K):
    """Dice of each foreground class between two label maps; 1 where both are empty. -> [K-1] float32"""
    out, mask, label = (
        np.ones(K - 1, np.float32),
        mask.reshape(len(mask), -1),
        label.reshape(len(label), -1),
    )
    for k in range(1, K):
        a, b = cv2.inRange(mask, k, k), cv2.inRange(label, k, k)
        if total := cv2.countNonZero(a) + cv2.countNonZero(b):
            out[k - 1] = 2 * cv2.countNonZero(a & b) / total
    return out


# ---------------------------------------------------------------------------------------------------- the masks of a split

CANDIDATES = 4  # masks drawn for each one that --balance keeps
SPLIT_SEED = {"train": 0, "val": 1}
work = {}  # what a process needs to make masks; set by start_work, before the first task


def start_work(shared):
    cv2.setNumThreads(1)  # parallel are the processes
    work.clear()
    work.update(shared, area=np.array([np.count_nonzero(label) for label in shared["labels"]]))


def start_process(shared):
    workers.start_worker()
    start_work(shared)


def masks_of_sample(i):
    """The synthetic masks of slice or patch i. -> n masks as HDF5 chunks, Dice [n, K-1], names, draws; the same whoever computes them"""
    labels, cases, K, count, area = (work[k] for k in ("labels", "cases", "K", "count", "area"))
    others = [j for j in np.argsort(abs(area - area[i]), kind="stable") if cases[j] != cases[i]]
    similar = [labels[j] for j in others[: max(1, len(others) // 5)]]  # the nearest 20% in area
    drawn = []
    for draw in range(count * CANDIDATES if work["balance"] else count):
        mask, name = sample(
            labels[i],
            K,
            similar,
            np.random.default_rng([work["seed"], SPLIT_SEED[work["split"]], i, draw]),
        )
        drawn.append((mask, dice_of(mask, labels[i], K), name, draw))
    if work["balance"]:
        drawn = flatten(drawn, count)
    masks, dice, names, draws = zip(*drawn)
    return [quality_masks.chunk(mask) for mask in masks], np.stack(dice), names, draws


def flatten(drawn, count, bins=10):
    """Keeps `count` masks, one from each bin of mean Dice in turn, as far as each bin reaches."""
    seen, turn = np.zeros(bins, int), []
    for position, (_, dice, _, _) in enumerate(drawn):
        b = min(int(dice.mean() * bins), bins - 1)
        turn.append((seen[b], b, position))
        seen[b] += 1
    return [drawn[position] for _, _, position in sorted(sorted(turn)[:count], key=lambda t: t[2])]


def synthetic(samples, split, K, count, args):
    """Yields masks_of_sample of every sample in order, made by --workers processes. Val keeps the paper's mix, to stay comparable."""
    shared = dict(
        labels=samples.label.numpy(),
        cases=samples.case,
        K=K,
        count=count,
        seed=args.seed,
        split=split,
        balance=args.balance and split == "train",
    )
    bar = functools.partial(
        tqdm, total=len(samples), desc=f"{split} masks", disable=not sys.stderr.isatty()
    )
    if args.workers == 1:
        start_work(shared)
        yield from bar(map(masks_of_sample, range(len(samples))))
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        args.workers, context, start_process, (shared,)
    ) as pool:  # unlike Pool, it notices a killed worker
        yield from bar(pool.map(masks_of_sample, range(len(samples))))


# ---------------------------------------------------------------------------------------------------- harvest


def train_weak(samples, patients, info, fold, args, done=None):
    """Trains a U-Net from scratch on all folds but `fold` (on all if there is one fold), and saves it after --harvest-epochs. -> {epoch: weights}

    The paper's harvest: Adam 1e-3, batch 16, Dice loss, flips and rotation. done: last.pt of an interrupted run to go on from
    """
    path = os.path.join(args.out, "weak", "fold{}_epoch{:02d}.pt").format
    torch.manual_seed(seed_of(args.seed, 0, fold))
    names = list(dict.fromkeys(patients))
    mine = [
        i for i, p in enumerate(patients) if args.folds == 1 or names.index(p) % args.folds != fold
    ]
    K, on = len(info.classes), compute(args.device, args.amp, args.deterministic)
    net = on.place(models.build("unet", channels=info.channels, classes=K, dims=info.dims))
    optimizer, scaler, first = torch.optim.Adam(net.parameters(), 1e-3), on.scaler(), 0
    if done and done["fold"] == fold:
        net.load_state_dict(done["net"])
        optimizer.load_state_dict(done["optimizer"])
        scaler.load_state_dict(done["scaler"])
        first = done["epoch"]
    elif done and done["fold"] > fold:
        first = args.harvest_epochs[-1]
    steps = max(args.harvest_steps, -(-len(mine) // args.harvest_batch))
    for epoch in tqdm(
        range(first + 1, args.harvest_epochs[-1] + 1),
        desc=f"weak networks, fold {fold}",
        disable=not sys.stderr.isatty(),
    ):
        torch.manual_seed(seed_of(args.seed, epoch, fold))
        losses = []
        order = torch.cat(
            [torch.randperm(len(mine)) for _ in range(1 + steps * args.harvest_batch // len(mine))]
        )
        for step in range(steps):
            index = torch.tensor(mine)[
                order[step * args.harvest_batch : (step + 1) * args.harvest_batch]
            ]
            x, y = augment.weak(*samples.batch(index, on.device), args.flip)
            with on.autocast():
                logits = net(channels_last(x))
            loss = dice_loss(logits, one_hot(y, K))
            losses.append(loss.detach())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        check_finite(
            torch.stack(losses)[:, None],
            [f"weak network of fold {fold}"],
            [net],
            epoch * steps,
            lambda _: "try --amp off",
        )
        if epoch in args.harvest_epochs:
            save_checkpoint(
                path(fold, epoch),
                "weak",
                model=net.config,
                weights=net.state_dict(),
                epoch=epoch,
                fold=fold,
                args=vars(args),
                data=info.describe(),
            )
        save_state(
            args,
            info,
            fold,
            epoch=epoch,
            net=net.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )
    return {
        epoch: load_checkpoint(path(fold, epoch), "weak")["weights"]
        for epoch in args.harvest_epochs
    }


def save_state(args, info, fold, finished=False, **state):
    """Writes OUT/weak/last.pt, from which --resume goes on: the network of a fold; its earlier folds are done."""
    save_checkpoint(
        os.path.join(args.out, "weak", "last.pt"),
        "corrupt",
        fold=fold,
        args=vars(args),
        data=info.describe(),
        inputs={},
        finished=finished,
        **state,
    )


@torch.no_grad()
def outputs(weights, samples, tasks, info, args):
    """Runs a weak network on samples. tasks: [(row, sample index, whether to change the intensity for variety)]

    Yields, in the tasks' order: row, sample index, probabilities [K-1, *S] uint8 in 1/255, label map [*S].
    """
    on = compute(args.device, args.amp, args.deterministic)
    net = on.place(
        models.build("unet", channels=info.channels, classes=len(info.classes), dims=info.dims)
    )
    net.load_state_dict(weights)
    net.eval()
    batch = samples_in(32, samples.image.shape[2:])
    for start in range(0, len(tasks), batch):
        rows, index, change = zip(*tasks[start : start + batch])
        x, _ = samples.batch(torch.tensor(index), on.device)
        x = torch.where(
            torch.tensor(change, device=on.device).reshape(-1, *[1] * (x.dim() - 1)),
            augment.strong(x),
            x,
        )
        with on.autocast():
            p = net(channels_last(x)).float().softmax(1)
        probabilities, labels = (
            (p[:, 1:] * 255).round().to(torch.uint8).cpu().numpy(),
            p.argmax(1).to(torch.uint8).cpu().numpy(),
        )
        yield from zip(rows, index, probabilities, labels)


def run_tasks(weak, samples, tasks, info, args):
    """Yields (fold, epoch) and outputs() of every weak network's tasks."""
    for i, (key, todo) in enumerate(tasks.items()):
        torch.manual_seed(seed_of(args.seed, i, args.folds))
        yield key, outputs(weak[key], samples, todo, info, args)


def harvest_tasks(patients, weak, first, views, args):
    """Which weak network predicts what: every slice or patch gets `views` outputs of the networks whose fold it was left out of.

    -> {(fold, epoch): tasks of outputs()}, rows counted from `first`; the first output of a network is of the image as it is
    """
    names, tasks = list(dict.fromkeys(patients)), {key: [] for key in weak}
    for i, patient in enumerate(patients):
        mine = [key for key in weak if key[0] == names.index(patient) % args.folds]
        for v in range(views):
            tasks[mine[(v + i) % len(mine)]].append((first + i * views + v, i, v >= len(mine)))
    return tasks


# ---------------------------------------------------------------------------------------------------- main


def write_synthetic(group, samples, split, K, count, args):
    """Fills the first len(samples) * count rows."""
    for i, (masks, dice, names, draws) in enumerate(synthetic(samples, split, K, count, args)):
        rows = slice(i * count, (i + 1) * count)
        for row, chunk in enumerate(masks, rows.start):
            group["mask"].id.write_direct_chunk((row, *[0] * (group["mask"].ndim - 1)), chunk)
        group["dice"][rows], group["source"][rows], group["draw"][rows] = dice, names, draws
        group["case"][rows], group["at"][rows] = [samples.case[i]] * count, samples.at[i]


def write_outputs(group, samples, found, info, prob_from=None):
    """Fills rows with outputs of weak networks, as (fold, epoch) and what outputs() yields; keeps probabilities from row prob_from on."""
    for key, rows in found:
        for row, i, probability, mask in rows:
            group["mask"][row], group["source"][row] = mask, f"harvest fold {key[0]} epoch {key[1]}"
            group["dice"][row] = dice_of(mask, samples.label[i].numpy(), len(info.classes))
            group["case"][row], group["at"][row] = samples.case[i], samples.at[i]
            if prob_from is not None:
                group["prob"][row - prob_from], group["prob_index"][row] = (
                    probability,
                    row - prob_from,
                )


def draw_preview(path, vqm_path, info, samples):
    """A grid of train masks as outlines on their images, with name and Dice, drawn at random; of volumes three planes each."""
    views, columns, lines = (1, 8, 6) if info.dims == 2 else (3, 3, 6)
    figure, axes = figures.pyplot().subplots(
        lines, columns * views, figsize=(1.75 * columns * views, 2.15 * lines), layout="constrained"
    )
    where, spacing = (
        {key: i for i, key in enumerate(zip(samples.case, samples.at))},
        {e.name: e.spacing for e in info.entries("train")},
    )
    for axis in axes.flat:
        axis.axis("off")
    with h5.open_file(vqm_path) as f:
        group = f["train"]
        for axis, row in zip(
            axes.reshape(-1, views), np.random.default_rng(0).permutation(len(group["mask"]))
        ):
            case, mask = group["case"].asstr()[row], group["mask"][row]
            i = where[case, tuple(group["at"][row].tolist())]
            image, truth = samples.image[i].numpy(), samples.label[i].numpy()  # [C, *S], [*S]
            shown = (
                [(image.transpose(1, 2, 0).squeeze(), mask, 1.0)]
                if views == 1
                else figures.planes(image[0], mask, truth, spacing[case])
            )
            for one, (picture, outline, aspect) in zip(axis, shown):
                figures.draw(one, picture, outline, aspect=aspect)
            axis[views // 2].set_title(
                f"{group['source'].asstr()[row][:30]}\n{' '.join(f'{d:.2f}' for d in group['dice'][row])}",
                fontsize=6.5,
            )
    figures.legend(figure, info.classes)
    figures.save_figure(figure, path)


def load_train(info, names, args):
    """The labeled slices, or --patches of each labeled volume, at places fixed by the seed. -> Samples"""
    if info.dims == 2:
        return loading.load_slices(info, "train", args.size, names)
    corners = {
        e.name: loading.random_corners(
            e.grid, args.size, args.patches, np.random.default_rng([args.seed, 2, i])
        )
        for i, e in enumerate(info.entries("train"))
        if e.name in names
    }
    return loading.load_patches(info, "train", args.size, corners)


def make_masks(train, val, info, args, done, command):
    """Trains the weak networks and writes vqm.h5. done: last.pt of an interrupted run or None; command: how this was asked for, in words"""
    K, weak, patient = len(info.classes), {}, {e.name: e.patient for e in info.entries("train")}
    patients = [patient[name] for name in train.case]
    n_harvest, n_weak = (
        round(args.masks * args.harvest_share),
        args.folds * len(args.harvest_epochs),
    )
    n_train = args.masks - n_harvest
    for fold in range(args.folds):
        weak |= {
            (fold, epoch): weights
            for epoch, weights in train_weak(train, patients, info, fold, args, done).items()
        }

    path = os.path.join(args.out, "vqm.h5")
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as f:
        quality_masks.describe(
            f,
            info,
            catalog=CATALOG_VERSION,
            seed=args.seed,
            size=args.size,
            spec=args.labeled
            + ("" if args.labeled_seed is None else f" --labeled-seed {args.labeled_seed}"),
            command=shlex.join(command).encode(errors="backslashreplace").decode(),
        )
        groups = {
            "train": quality_masks.create(
                f, "train", len(train) * args.masks, K, args.size, len(train) * n_harvest
            ),
            "val": quality_masks.create(f, "val", len(val) * args.val_masks, K, args.size),
            "real": quality_masks.create(f, "real", len(val) * n_weak, K, args.size),
        }
        start = time.perf_counter()
        if n_train:
            write_synthetic(groups["train"], train, "train", K, n_train, args)
        write_synthetic(groups["val"], val, "val", K, args.val_masks, args)
        made, seconds = (
            len(train) * n_train + len(val) * args.val_masks,
            time.perf_counter() - start,
        )
        print(
            f"{made} synthetic masks of {' x '.join(map(str, loading.shape_of(args.size)))} in {seconds:.1f} s ({made / seconds:.0f} a second)"
        )

        first = len(train) * n_train
        tasks = harvest_tasks(patients, weak, first, n_harvest, args)
        write_outputs(
            groups["train"], train, run_tasks(weak, train, tasks, info, args), info, first
        )
        tasks = {
            key: [(n * len(val) + i, i, False) for i in range(len(val))]
            for n, key in enumerate(weak)
        }
        write_outputs(groups["real"], val, run_tasks(weak, val, tasks, info, args), info)

        for split, group in groups.items():
            dice = group["dice"][:].mean(1)
            print(
                f"{split:6s} {len(dice):6d} masks, mean Dice {dice.mean():.3f}, below .6 {np.mean(dice < 0.6):.0%}, "
                f"above .9 {np.mean(dice > 0.9):.0%}"
            )
        best = best_of_weak(groups["real"]["dice"][:], val.label)
        if best is not None and best <= NOTHING:
            print(
                f"warning: no weak network has a mean Dice above {NOTHING} on val, so they have "
                "learned nothing; look at the labels (python -m data.h5 "
                f"{shlex.quote(info.path)} --preview FILE.png), --harvest-epochs and "
                "--harvest-steps"
            )


NOTHING = 0.01  # mean Dice up to which nothing has been learned


def best_of_weak(dice, label):
    """Mean Dice of the best weak network on val, over slices or patches and the classes in them.

    dice: [networks * N, K-1]; label: [N, *S] -> None where label holds no class
    """
    K = dice.shape[1] + 1
    present = np.stack([(label == k).flatten(1).any(1) for k in range(1, K)], 1)  # [N, K-1]
    dice = dice.reshape(-1, *present.shape)[:, present]
    return dice.mean(1).max() if present.any() else None


def main(argv=None):
    args = parse_args(argv)
    info, path = h5.read_info(args.data), os.path.join(args.out, "vqm.h5")
    args.size, args.flip = loading.network_grid(info, args.size), h5.check_flip(info, args.flip)
    args.masks, args.harvest_batch = (
        args.masks or {2: 200, 3: 50}[info.dims],
        args.harvest_batch or {2: 16, 3: 2}[info.dims],
    )
    labeled, _ = h5.choose_labeled(info, args.labeled, args.labeled_seed)
    h5.check_foreground(info, labeled)
    val_names = [e.name for e in info.entries("val") if e.labeled]
    if not val_names:
        raise InputError(
            f"{args.data}: no val case has a label; convert the data again with labels of val"
        )
    patient = {e.name: e.patient for e in info.entries("train")}
    if args.folds > len({patient[name] for name in labeled}):
        raise InputError(
            f"--folds {args.folds}: only {len({patient[n] for n in labeled})} patients are labeled; give at most that many folds"
        )
    weak_folder = os.path.join(args.out, "weak")
    held = claim(args.out, "weak") if os.path.isdir(args.out) else None  # until main ends
    done, _ = start_run(
        "corrupt", args, info.describe(), free=("workers", "preview"), folder=weak_folder
    )
    if os.path.exists(path) and not (args.overwrite or done):
        raise InputError(
            f"{path}: is there already; replace it with --overwrite, or choose another --out"
        )
    if done and done["finished"] and os.path.exists(path) and not args.preview:
        print(f"{path}: these masks are finished; --overwrite makes them again")
        return
    train, val = (
        load_train(info, labeled, args),
        loading.load_samples(info, "val", args.size, val_names),
    )
    if not (done and done["finished"] and os.path.exists(path)):
        held = held or claim(args.out, "weak")
        for former in (
            []
            if done
            else [
                os.path.join(weak_folder, "last.pt"),
                path,
                *glob.glob(os.path.join(glob.escape(weak_folder), "fold*.pt")),
            ]
        ):
            with contextlib.suppress(FileNotFoundError):
                os.remove(former)
        words = sys.argv[1:] if argv is None else argv
        make_masks(
            train,
            val,
            info,
            args,
            done,
            [
                "python",
                "corrupt.py",
                *(word for word in words if word not in ("--resume", "--overwrite")),
            ],
        )
        save_state(args, info, fold=args.folds, finished=True)
    if args.preview:
        draw_preview(args.preview, path, info, train)
    print(
        f"wrote {path}, {args.folds * len(args.harvest_epochs)} networks in {weak_folder}"
        + (f", {args.preview}" if args.preview else "")
        + "\nnext: "
        + shlex.join(
            [
                "python",
                "train_qp.py",
                args.data,
                "--vqm",
                path,
                "--out",
                os.path.join(os.path.dirname(args.out), "qp"),
                *(["--flip", args.flip] if args.flip else []),
            ]
        )
    )


if __name__ == "__main__":
    cli(main)
