"""Stage 1: makes masks of variable quality, from which train_qp.py learns what quality is.

    python corrupt.py DATA.h5 --out runs/vqm --labeled 7 [--workers 2] [--preview runs/vqm/preview.png]

Reads  DATA.h5: the labeled train cases and val; never test, never the label of an unlabeled case.
Writes OUT/weak/*.pt, partly trained networks f, and OUT/vqm.h5:
         /train, /val       synthetic masks; train also holds outputs of weak networks ("harvest ..."), which with --folds 2 or more
                            have not seen the patient
         /real              outputs of all weak networks on val, which none has seen
       Its schema is that of data/vqm.py.

The masks depend on --seed alone, not on --workers.

Legend: N masks, K classes, H height, W width, S side of the masks' grid; m a binary mask or a label map, uint8 [H, W].
"""
import argparse
import functools
import multiprocessing
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

import models
from data import augment, h5, vqm
from data.files import SEED, SHARE, InputError, Parser, cli, number, numbers, replacing, save_checkpoint
from models.losses import dice_loss, one_hot

CATALOG_VERSION = 1


def parse_args(argv=None):
    p = Parser(__doc__, prog="corrupt.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--out", required=True, help="folder for vqm.h5 and weak/")
    p.add_argument("--labeled", default="all", help="labeled train patients: a number (7: the first 7), a fraction (0.1) or all")
    p.add_argument("--labeled-seed", type=SEED, help="draw the labeled patients at random")
    p.add_argument("--size", type=number(32), default=224, help="side of the masks' grid, pixels")
    p.add_argument("--masks", type=number(1), default=200, help="masks of each labeled train slice")
    p.add_argument("--val-masks", type=number(1), default=20, help="synthetic masks of each val slice")
    p.add_argument("--balance", action=argparse.BooleanOptionalAction, default=True,
                   help="draw train masks so that the histogram of Dice is flat; the paper does not")
    # harvest
    p.add_argument("--harvest-share", type=SHARE, default=0.5,
                   help="share of train masks that are outputs of weak networks; paper: 0.05")
    p.add_argument("--folds", type=number(1), default=2,
                   help="weak networks predict the fold that they were not trained on; 1: one for all, the paper")
    p.add_argument("--harvest-epochs", type=numbers, default="1,3,5,10,15,20", help="epochs after which a weak network is saved")
    p.add_argument("--harvest-steps", type=number(1), default=10, help="least steps of a harvest epoch, for few images")
    p.add_argument("--harvest-batch", type=number(1), default=16, help="slices in a step of the weak networks")
    # running
    p.add_argument("--workers", type=number(1), default=1, help="processes that make masks")
    p.add_argument("--preview", metavar="FILE.png", help="draw a grid of masks with name and Dice")
    p.add_argument("--seed", type=SEED, default=0, help="of everything")
    p.add_argument("--device", type=models.device_name, default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision of the weak networks")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- geometry of a mask

def center(m):
    """Centroid (x, y) of the foreground."""
    M = cv2.moments(m, binaryImage=True)
    return M["m10"] / M["m00"], M["m01"] / M["m00"]


def extent(m):
    """Geometric mean of the sides of the foreground's bounding box, pixels."""
    _, _, w, h = cv2.boundingRect(m)
    return (w * h) ** 0.5


def pixels(n, m):
    """A catalog size in pixels. The paper gives sizes for a 224-pixel side; small objects get smaller ones, in proportion to an
    object that spans 100 of these 224 pixels."""
    return n * min((m.shape[0] * m.shape[1]) ** 0.5 / 224, extent(m) / 100)


def odd(width):
    """The nearest odd number of at least 3: on a small grid, small sizes of the catalog fall together."""
    return max(3, 2 * round((width - 1) / 2) + 1)


@functools.lru_cache(64)
def kernel(width):
    """Round structuring element of an odd width."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))


def place(m, rng):
    """A random foreground pixel (x, y)."""
    inside = np.flatnonzero(m)
    y, x = divmod(int(inside[rng.integers(len(inside))]), m.shape[1])
    return x, y


def contour(m):
    """The longest outline of a component, [n, 2] (x, y)."""
    found, _ = cv2.findContours((m > 0).view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(found, key=len)[:, 0]


def sign(rng):
    return 1 if rng.random() < 0.5 else -1


# ---------------------------------------------------------------------------------------------------- corruptions
# f(m, rng, *parameters) -> corrupted copy, of a binary mask with some foreground. Those in WARPS also take a whole label map.

def erode(m, rng, width):
    return cv2.erode(m, kernel(odd(pixels(width, m))), borderType=cv2.BORDER_CONSTANT, borderValue=0)


def dilate(m, rng, width):
    return cv2.dilate(m, kernel(odd(pixels(width, m))))


def opening(m, rng, width):
    return cv2.morphologyEx(m, cv2.MORPH_OPEN, kernel(odd(pixels(width, m))))


def closing(m, rng, width):
    return cv2.morphologyEx(m, cv2.MORPH_CLOSE, kernel(odd(pixels(width, m))))


def ellipse(m, rng):
    """The ellipse with the mask's second moments."""
    M = cv2.moments(m, binaryImage=True)
    covariance = np.array([[M["mu20"], M["mu11"]], [M["mu11"], M["mu02"]]]) / M["m00"]
    (minor, major), axes = np.linalg.eigh(covariance)
    angle = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    around = (center(m), (4 * max(major, 0.1) ** 0.5, 4 * max(minor, 0.1) ** 0.5), angle)
    return cv2.ellipse(np.zeros_like(m), around, 1, -1)


def polygon(m, rng, sides):
    """Corners evenly spaced along the outline, from a random start."""
    outline = contour(m)
    corners = (rng.random() + np.arange(sides)) * len(outline) / sides
    return cv2.fillPoly(np.zeros_like(m), [outline[corners.astype(int) % len(outline)]], 1)


def hull(m, rng):
    points = cv2.findNonZero(m)
    return cv2.fillConvexPoly(np.zeros_like(m), cv2.convexHull(points), 1)


def box(m, rng):
    x, y, w, h = cv2.boundingRect(m)
    out = np.zeros_like(m)
    out[y:y + h, x:x + w] = 1
    return out


def jagged(m, rng, width):
    """Flips pixels of the boundary band with p = .5."""
    round_ = kernel(odd(pixels(width, m)))
    band = cv2.dilate(m, round_) ^ cv2.erode(m, round_, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    coin = np.frombuffer(rng.bytes(m.size), np.uint8).reshape(m.shape) & 1
    return m ^ (band & coin)


def smooth(m, rng, width):
    width = odd(pixels(width, m))
    return (cv2.GaussianBlur(m * 255, (width, width), 0) > 127).view(np.uint8)


def elastic(m, rng, alpha, sigma):
    """Simard et al. 2003: uniform noise, smoothed with sigma, times alpha. Its field of the same amplitude and wave length is drawn
    on a grid of step 2 sigma here and interpolated, which is 20 times faster."""
    h, w = m.shape
    unit = (h * w) ** 0.5 / 224
    amplitude = unit * alpha * 3 ** -0.5 / (2 * sigma * np.pi ** 0.5)
    coarse = rng.standard_normal((int(h / (2 * sigma * unit)) + 2, int(w / (2 * sigma * unit)) + 2, 2), dtype=np.float32)
    field = cv2.resize(coarse * (1.25 * amplitude), (w, h), interpolation=cv2.INTER_CUBIC)
    return cv2.remap(m, field + pixel_grid(h, w), None, cv2.INTER_NEAREST)


@functools.lru_cache(8)
def pixel_grid(h, w):
    return np.dstack(np.meshgrid(np.arange(w), np.arange(h))).astype(np.float32)


def grid_distortion(m, rng, steps, limit):
    """Stretches and squeezes the columns and rows of a steps x steps grid by up to `limit`."""
    def axis(n):
        knots = np.concatenate([[0], np.cumsum(1 + rng.uniform(-limit, limit, steps))])
        return np.interp(np.arange(n), np.linspace(0, n - 1, steps + 1), knots / knots[-1] * (n - 1)).round().astype(int)
    return m.take(axis(m.shape[0]), 0).take(axis(m.shape[1]), 1)


def circles(m, rng, count, low, high, value):
    """Discs of radius low to high, inside the mask (value 0) or anywhere (value 1)."""
    out, unit = m.copy(), pixels(1, m)
    for _ in range(count):
        x, y = place(m, rng) if value == 0 else (int(rng.integers(m.shape[1])), int(rng.integers(m.shape[0])))
        cv2.circle(out, (x, y), max(1, round(rng.uniform(low, high) * unit)), value, -1)
    return out


def holes(m, rng, count, low, high):
    return circles(m, rng, count, low, high, 0)


def islands(m, rng, count, low, high):
    return circles(m, rng, count, low, high, 1)


def holes_and_islands(m, rng, count, low, high):
    return islands(holes(m, rng, count, low, high), rng, count, low, high) if m.any() else m


def components(m):
    """Label map of the components, and their areas (background first)."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(m)
    return labels, stats[:, cv2.CC_STAT_AREA]


def largest(m, rng):
    labels, area = components(m)
    return (labels == 1 + area[1:].argmax()).view(np.uint8)


def drop_component(m, rng):
    """Removes one component; of a single one, the part beyond a random line through its centroid."""
    labels, area = components(m)
    if len(area) > 2:
        return m * (labels != rng.integers(1, len(area)))
    (x, y), angle = center(m), rng.uniform(0, 2 * np.pi)
    grid = pixel_grid(*m.shape)
    return m * ((grid[..., 0] - x) * np.cos(angle) + (grid[..., 1] - y) * np.sin(angle) < 0)


def rectangle_dropout(m, rng, low, high):
    """Empties a rectangle around a random foreground pixel; its sides are shares of the object's extent."""
    x, y = place(m, rng)
    w, h = np.maximum(1, rng.uniform(low, high, 2) * extent(m)).astype(int)
    out = m.copy()
    out[max(0, y - h // 2):y + h // 2 + 1, max(0, x - w // 2):x + w // 2 + 1] = 0
    return out


def affine_map(m, matrix, shift=(0, 0)):
    """Applies a 2 x 2 matrix about the foreground's centroid, then a shift (x, y) in pixels; nearest neighbor."""
    c = np.array(center(m))
    offset = c + shift - matrix @ c
    return cv2.warpAffine(m, np.hstack([matrix, offset[:, None]]), m.shape[::-1], flags=cv2.INTER_NEAREST)


def rotation(degrees):
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def shift(m, rng, share):
    """By a share of the object's extent, in a random direction."""
    return affine_map(m, np.eye(2), rotation(rng.uniform(0, 360))[0] * share * extent(m))


def scale(m, rng, low, high):
    return affine_map(m, np.eye(2) * rng.uniform(low, high))


def rotate(m, rng, degrees):
    return affine_map(m, rotation(rng.uniform(0.5, 1) * degrees * sign(rng)))


def affine(m, rng):
    matrix = rotation(rng.uniform(-15, 15)) @ np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]]) * rng.uniform(0.85, 1.15)
    return affine_map(m, matrix, rng.uniform(-0.1, 0.1, 2) * extent(m))


def gaussian_blob(m, rng, size):
    """Upright ellipse at the centroid with the mask's spread along x and y, times size."""
    M = cv2.moments(m, binaryImage=True)
    axes = tuple(max(1, round(2 * size * (M[k] / M["m00"]) ** 0.5)) for k in ("mu20", "mu02"))
    return cv2.ellipse(np.zeros_like(m), tuple(map(round, center(m))), axes, 0, 0, 360, 1, -1)


def disc(m, rng):
    """A disc of the mask's area at its centroid."""
    radius = max(1, round((cv2.countNonZero(m) / np.pi) ** 0.5))
    return cv2.circle(np.zeros_like(m), tuple(map(round, center(m))), radius, 1, -1)


def inverted(m, rng):
    return 1 - m


def empty(m, rng):
    return np.zeros_like(m)


def full(m, rng):
    return np.ones_like(m)


def noise(m, rng, share):
    """Each pixel foreground with p = share."""
    return (np.frombuffer(rng.bytes(m.size), np.uint8).reshape(m.shape) < 256 * share).view(np.uint8)


def swap(m, rng, K):
    """Two of several classes trade their names. Takes a label map."""
    a, b = rng.permutation(np.arange(1, K))[:2]
    return exchange(m, K, {a: b, b: a})


def merge(m, rng, K):
    """One class is taken for its neighbor. Takes a label map."""
    a = int(rng.integers(1, K))
    touching = np.bincount(m[cv2.dilate((m == a).view(np.uint8), kernel(3)) > 0], minlength=K)
    touching[[0, a]] = 0
    return exchange(m, K, {a: int(touching.argmax()) if touching.any() else int(rng.integers(1, K))})


def exchange(m, K, names):
    table = np.arange(K, dtype=np.uint8)
    for old, new in names.items():
        table[old] = new
    return table[m]


# A line is (name, weight, function, parameters ...). To add a corruption: a function above, a line here.
SINGLE = [
    ("erode 5", 1, erode, 5), ("erode 7", 1, erode, 7), ("erode 9", 0.8, erode, 9),
    ("dilate 5", 1, dilate, 5), ("dilate 7", 1, dilate, 7), ("dilate 9", 0.8, dilate, 9),
    ("open 5", 0.5, opening, 5), ("close 5", 0.5, closing, 5),
    ("ellipse", 1, ellipse), ("polygon 3", 0.5, polygon, 3), ("polygon 5", 0.8, polygon, 5), ("polygon 8", 0.8, polygon, 8),
    ("convex hull", 1, hull), ("bounding box", 0.5, box),
    ("jagged 3", 1, jagged, 3), ("jagged 5", 1, jagged, 5), ("smooth 11", 0.8, smooth, 11), ("smooth 15", 0.8, smooth, 15),
    ("elastic 30", 1, elastic, 30, 4), ("elastic 60", 0.8, elastic, 60, 5),
    ("grid 5", 1, grid_distortion, 5, 0.2), ("grid 8", 0.7, grid_distortion, 8, 0.4),
    ("holes small", 1, holes, 2, 3, 8), ("holes large", 0.8, holes, 3, 8, 15), ("islands", 1, islands, 2, 3, 8),
    ("holes and islands", 1, holes_and_islands, 2, 3, 8),
    ("largest component", 0.8, largest), ("drop component", 0.5, drop_component),
    ("rectangle dropout", 0.8, rectangle_dropout, 0.1, 0.3),
    ("shift .1", 1, shift, 0.1), ("shift .2", 0.8, shift, 0.2), ("shift .3", 0.5, shift, 0.3),
    ("scale down", 1, scale, 0.75, 0.9), ("scale up", 1, scale, 1.1, 1.25),
    ("rotate 15", 1, rotate, 15), ("rotate 30", 0.7, rotate, 30), ("affine", 0.8, affine),
]
SEVERAL_CLASSES = [("swap classes", 0.5, swap), ("merge classes", 0.5, merge)]  # joins SINGLE when K > 2
HEAVY = [
    ("erode 11", 1, erode, 11), ("dilate 11", 1, dilate, 11), ("grid 12", 1, grid_distortion, 12, 0.6),
    ("holes heavy", 1, holes, 5, 10, 20), ("shift .4", 1, shift, 0.4),
    ("scale .5-.7", 1, scale, 0.5, 0.7), ("scale 1.4-1.6", 1, scale, 1.4, 1.6),
]
BLOB = [("gaussian 1.0", 1, gaussian_blob, 1.0), ("gaussian 1.2", 0.7, gaussian_blob, 1.2), ("disc", 0.8, disc),
        ("hull", 1, hull), ("box", 1, box)]
CATASTROPHIC = [("inverted", 1, inverted), ("empty", 0.5, empty), ("full", 0.5, full), ("random .5", 0.3, noise, 0.5)]
MIX = dict(identity=0.20, single=0.28, chain=0.18, cross=0.10, heavy=0.12, catastrophic=0.05, blob=0.07)  # the paper's shares
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
    """One catalog line on one, some or all classes of a label map [H, W]. -> label map

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
    chosen = rng.permutation(present)[:None if everything else rng.integers(1, len(present) + 1)]
    parts = [(k, f((label == k).view(np.uint8), rng, *parameters) > 0) for k in chosen]
    base = label * ~np.isin(label, chosen)                        # the other classes
    out, over = base.copy(), rng.random() < 0.5
    if not over:
        for k, part in parts:                                     # what was a class's own stays its own
            out[part & (label == k)] = k
    for k, part in parts:                                         # never over what an earlier one has just taken
        out[part & (out == base if over else out == 0)] = k
    return out


def invent(label, K, rng):
    """A disc of a class that the slice does not hold, on background: all that can go wrong with an absent class."""
    absent = [k for k in range(1, K) if not np.any(label == k)]
    side = (label.shape[0] * label.shape[1]) ** 0.5
    spot = np.zeros_like(label)
    at = (int(rng.integers(label.shape[1])), int(rng.integers(label.shape[0])))
    cv2.circle(spot, at, max(1, round(side * rng.uniform(0.01, 0.1))), 1, -1)
    return np.where((spot > 0) & (label == 0), np.uint8(absent[rng.integers(len(absent))]), label)


def sample(label, K, similar, rng):
    """One mask of variable quality from a true label map [H, W]. similar: label maps of other cases, near in area. -> mask, name"""
    kind = pick([(k, v) for k, v in MIX.items()], rng)[0]
    single = SINGLE + SEVERAL_CLASSES if K > 2 else SINGLE
    if kind == "identity" or (kind == "cross" and not similar):
        return label, "identity"
    if kind == "cross":
        return similar[rng.integers(len(similar))], "cross image"
    present = sum(bool(np.any(label == k)) for k in range(1, K))
    if not present or (present < K - 1 and rng.random() < 0.1):
        return invent(label, K, rng), "invented"
    lines = {"single": [single], "chain": [single] * int(rng.integers(2, 4)), "heavy": [HEAVY], "blob": [BLOB],
             "catastrophic": [CATASTROPHIC]}[kind]
    lines, out = [pick(table, rng) for table in lines], label
    for line in lines:
        out = apply(line, out, K, rng)
    return out, " + ".join(line[0] for line in lines)


def dice_of(mask, label, K):
    """Dice of each foreground class between two label maps [H, W]; 1 where both are empty. -> [K-1] float32"""
    out = np.ones(K - 1, np.float32)
    for k in range(1, K):
        a, b = cv2.inRange(mask, k, k), cv2.inRange(label, k, k)
        if total := cv2.countNonZero(a) + cv2.countNonZero(b):
            out[k - 1] = 2 * cv2.countNonZero(a & b) / total
    return out


# ---------------------------------------------------------------------------------------------------- the masks of a split

CANDIDATES = 4  # masks drawn for each one that --balance keeps
SPLIT_SEED = {"train": 0, "val": 1}
work = {}       # what a process needs to make masks; set by start_work, before the first task


def start_work(shared):
    cv2.setNumThreads(1)  # parallel are the processes
    work.clear()
    work.update(shared, area=(shared["labels"] > 0).sum((1, 2)))


def start_process(shared):
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and so is its way to unwind
    start_work(shared)


def masks_of_slice(i):
    """The synthetic masks of slice i. -> n masks as HDF5 chunks, Dice [n, K-1], names, draws; the same whoever computes them"""
    labels, cases, K, count, area = (work[k] for k in ("labels", "cases", "K", "count", "area"))
    others = [j for j in np.argsort(abs(area - area[i]), kind="stable") if cases[j] != cases[i]]
    similar = [labels[j] for j in others[:max(1, len(others) // 5)]]  # the nearest 20% in area
    drawn = []
    for draw in range(count * CANDIDATES if work["balance"] else count):
        mask, name = sample(labels[i], K, similar, np.random.default_rng([work["seed"], SPLIT_SEED[work["split"]], i, draw]))
        drawn.append((mask, dice_of(mask, labels[i], K), name, draw))
    if work["balance"]:
        drawn = flatten(drawn, count)
    masks, dice, names, draws = zip(*drawn)
    return [vqm.chunk(mask) for mask in masks], np.stack(dice), names, draws


def flatten(drawn, count, bins=10):
    """Keeps `count` masks, one from each bin of mean Dice in turn, as far as each bin reaches."""
    seen, turn = np.zeros(bins, int), []
    for position, (_, dice, _, _) in enumerate(drawn):
        b = min(int(dice.mean() * bins), bins - 1)
        turn.append((seen[b], b, position))
        seen[b] += 1
    return [drawn[position] for _, _, position in sorted(sorted(turn)[:count], key=lambda t: t[2])]


def synthetic(slices, split, K, count, args):
    """Yields masks_of_slice of every slice in order, made by --workers processes. Val keeps the paper's mix, to stay comparable."""
    shared = dict(labels=slices.label.numpy(), cases=slices.case, K=K, count=count, seed=args.seed, split=split,
                  balance=args.balance and split == "train")
    bar = functools.partial(tqdm, total=len(slices), desc=f"{split} masks", disable=not sys.stderr.isatty())
    if args.workers == 1:
        start_work(shared)
        yield from bar(map(masks_of_slice, range(len(slices))))
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(args.workers, context, start_process, (shared,)) as pool:  # unlike Pool, it notices a killed worker
        yield from bar(pool.map(masks_of_slice, range(len(slices))))


# ---------------------------------------------------------------------------------------------------- harvest

def train_weak(slices, patients, info, fold, args):
    """Trains a U-Net from scratch on all folds but `fold` (on all if there is one fold). -> {epoch: weights}

    The paper's harvest: Adam 1e-3, batch 16, Dice loss, flips and rotation.
    """
    torch.manual_seed(args.seed * 1000 + fold)
    names = list(dict.fromkeys(patients))
    mine = [i for i, p in enumerate(patients) if args.folds == 1 or names.index(p) % args.folds != fold]
    K, on = len(info.classes), models.compute(args.device, args.amp)
    net = on.place(models.build("unet", channels=info.channels, classes=K))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    scaler = on.scaler()
    steps, saved = max(args.harvest_steps, -(-len(mine) // args.harvest_batch)), {}
    for epoch in tqdm(range(1, args.harvest_epochs[-1] + 1), desc=f"weak networks, fold {fold}", disable=not sys.stderr.isatty()):
        order = torch.cat([torch.randperm(len(mine)) for _ in range(1 + steps * args.harvest_batch // len(mine))])
        for step in range(steps):
            index = torch.tensor(mine)[order[step * args.harvest_batch:(step + 1) * args.harvest_batch]]
            x, y = augment.weak(*slices.batch(index, on.device))
            with on.autocast():
                logits = net(models.channels_last(x))
            loss = dice_loss(logits, one_hot(y, K)).mean()
            if not loss.isfinite():
                raise InputError(f"harvest: the loss is not finite in epoch {epoch}; try --amp off")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if epoch in args.harvest_epochs:
            saved[epoch] = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
            save_checkpoint(os.path.join(args.out, "weak", f"fold{fold}_epoch{epoch:02d}.pt"), "weak", model=net.config,
                            weights=saved[epoch], epoch=epoch, fold=fold, args=vars(args), data=info.describe())
    return saved


@torch.no_grad()
def outputs(weights, slices, tasks, info, args):
    """Runs a weak network on slices. tasks: [(row, slice index, whether to change the intensity for variety)]

    Yields, in the tasks' order: row, slice index, probabilities [K-1, S, S] uint8 in 1/255, label map [S, S].
    """
    on = models.compute(args.device, args.amp)
    net = on.place(models.build("unet", channels=info.channels, classes=len(info.classes)))
    net.load_state_dict(weights)
    net.eval()
    for start in range(0, len(tasks), 32):
        rows, index, change = zip(*tasks[start:start + 32])
        x, _ = slices.batch(torch.tensor(index), on.device)
        x = torch.where(torch.tensor(change, device=on.device)[:, None, None, None], augment.strong(x), x)
        with on.autocast():
            p = net(models.channels_last(x)).float().softmax(1)
        probabilities, labels = (p[:, 1:] * 255).round().to(torch.uint8).cpu().numpy(), p.argmax(1).to(torch.uint8).cpu().numpy()
        yield from zip(rows, index, probabilities, labels)


def run_tasks(weak, slices, tasks, info, args):
    """Yields (fold, epoch) and outputs() of every weak network's tasks."""
    for i, (key, todo) in enumerate(tasks.items()):
        torch.manual_seed(args.seed * 1000 + 500 + i)
        yield key, outputs(weak[key], slices, todo, info, args)


def harvest_tasks(patients, weak, first, views, args):
    """Which weak network predicts what: every slice gets `views` outputs of the networks whose fold it was left out of.

    -> {(fold, epoch): tasks of outputs()}, rows counted from `first`; the first output of a network is of the image as it is
    """
    names, tasks = list(dict.fromkeys(patients)), {key: [] for key in weak}
    for i, patient in enumerate(patients):
        mine = [key for key in weak if key[0] == names.index(patient) % args.folds]
        for v in range(views):
            tasks[mine[(v + i) % len(mine)]].append((first + i * views + v, i, v >= len(mine)))
    return tasks


# ---------------------------------------------------------------------------------------------------- main

def write_synthetic(group, slices, split, K, count, args):
    """Fills the first len(slices) * count rows."""
    for i, (masks, dice, names, draws) in enumerate(synthetic(slices, split, K, count, args)):
        rows = slice(i * count, (i + 1) * count)
        for row, chunk in enumerate(masks, rows.start):
            group["mask"].id.write_direct_chunk((row, 0, 0), chunk)
        group["dice"][rows], group["source"][rows], group["draw"][rows] = dice, names, draws
        group["case"][rows], group["slice"][rows] = [slices.case[i]] * count, slices.z[i]


def write_outputs(group, slices, found, info, prob_from=None):
    """Fills rows with outputs of weak networks, as (fold, epoch) and what outputs() yields; keeps probabilities from row prob_from on."""
    for key, rows in found:
        for row, i, probability, mask in rows:
            group["mask"][row], group["source"][row] = mask, f"harvest fold {key[0]} epoch {key[1]}"
            group["dice"][row] = dice_of(mask, slices.label[i].numpy(), len(info.classes))
            group["case"][row], group["slice"][row] = slices.case[i], slices.z[i]
            if prob_from is not None:
                group["prob"][row - prob_from], group["prob_index"][row] = probability, row - prob_from


def draw_preview(path, vqm_path, info, count=48, columns=8):
    """A grid of train masks as outlines on their images, with name and Dice, drawn at random."""
    plt = h5.pyplot()
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(1.75 * columns, 2.15 * -(-count // columns)), layout="constrained")
    with h5.open_file(vqm_path) as f, h5.open_file(info.path) as source:
        group, n = f["train"], len(f["train/mask"])
        for axis in axes.flat:
            axis.axis("off")
        for axis, row in zip(axes.flat, np.random.default_rng(0).permutation(n)[:count]):
            image, _ = h5.read_case(source, info, "train", group["case"].asstr()[row], label=False)
            picture = h5.resize_image(image[group["slice"][row]], group["mask"].shape[1])
            dice = " ".join(f"{d:.2f}" for d in group["dice"][row])
            h5.draw(axis, picture, group["mask"][row], f"{group['source'].asstr()[row][:30]}\n{dice}")
            axis.title.set_fontsize(6.5)
    h5.legend(figure, info.classes)
    h5.save_figure(figure, path)


def main(argv=None):
    args = parse_args(argv)
    info, path = h5.read_info(args.data), os.path.join(args.out, "vqm.h5")
    K = len(info.classes)
    labeled, _ = h5.choose_labeled(info, args.labeled, args.labeled_seed)
    val_names = [e.name for e in info.entries("val") if e.labeled]
    if not val_names:
        raise InputError(f"{args.data}: no val case has a label")
    patient = {e.name: e.patient for e in info.entries("train")}
    if args.folds > len({patient[name] for name in labeled}):
        raise InputError(f"--folds {args.folds}: only {len({patient[n] for n in labeled})} patients are labeled; give at most that many folds")
    train, val = h5.load_slices(info, "train", args.size, labeled), h5.load_slices(info, "val", args.size, val_names)
    patients, weak_count = [patient[name] for name in train.case], args.folds * len(args.harvest_epochs)
    n_harvest = round(args.masks * args.harvest_share)
    n_train = args.masks - n_harvest

    with replacing(path) as temporary, h5py.File(temporary, "w") as f:
        vqm.describe(f, info, catalog=CATALOG_VERSION, seed=args.seed, size=args.size, 
                     spec=args.labeled + ("" if args.labeled_seed is None else f" --labeled-seed {args.labeled_seed}"),
                     command=shlex.join(["python", "corrupt.py", *(sys.argv[1:] if argv is None else argv)]))
        groups = {"train": vqm.create(f, "train", len(train) * args.masks, K, args.size, len(train) * n_harvest),
                  "val": vqm.create(f, "val", len(val) * args.val_masks, K, args.size),
                  "real": vqm.create(f, "real", len(val) * weak_count, K, args.size)}
        start = time.perf_counter()
        if n_train:
            write_synthetic(groups["train"], train, "train", K, n_train, args)
        write_synthetic(groups["val"], val, "val", K, args.val_masks, args)
        made, seconds = len(train) * n_train + len(val) * args.val_masks, time.perf_counter() - start
        print(f"{made} synthetic masks of {args.size} x {args.size} in {seconds:.1f} s ({made / seconds:.0f} a second)")

        weak = {(fold, epoch): weights for fold in range(args.folds)
                for epoch, weights in train_weak(train, patients, info, fold, args).items()}
        first = len(train) * n_train
        tasks = harvest_tasks(patients, weak, first, n_harvest, args)
        write_outputs(groups["train"], train, run_tasks(weak, train, tasks, info, args), info, first)
        tasks = {key: [(n * len(val) + i, i, False) for i in range(len(val))] for n, key in enumerate(weak)}
        write_outputs(groups["real"], val, run_tasks(weak, val, tasks, info, args), info)

        for split, group in groups.items():
            dice = group["dice"][:].mean(1)
            print(f"{split:6s} {len(dice):6d} masks, mean Dice {dice.mean():.3f}, below .6 {np.mean(dice < 0.6):.0%}, "
                  f"above .9 {np.mean(dice > 0.9):.0%}")
    if args.preview:
        draw_preview(args.preview, path, info)
    print(f"wrote {path}, {weak_count} networks in {args.out}/weak" + (f", {args.preview}" if args.preview else "")
          + "\nnext: " + shlex.join(["python", "train_qp.py", args.data, "--vqm", path, "--size", str(args.size), "--out",
                                    os.path.join(os.path.dirname(args.out), "qp")]))


if __name__ == "__main__":
    cli(main)
