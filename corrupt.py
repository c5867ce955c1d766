"""Stage 1: makes masks of variable quality, from which train_qp.py learns what quality is.

    python corrupt.py DATA.h5 --out runs/vqm --labeled 7 [--workers 2] [--preview FILE.png]

Reads  DATA.h5: the labeled train cases and val. It never opens test, and never reads the label of
       an unlabeled case.
Writes OUT/weak/fold*.pt  partly trained networks f, the weak networks
       OUT/weak/last.pt   to --resume
       OUT/vqm.h5         masks, in the schema of data/quality_masks.py:
         /train  synthetic masks, and outputs of weak networks ("harvest ..."). With --folds 2 or
                 more, a weak network has not seen the patient whose mask it makes
         /val    synthetic masks
         /real   outputs of all weak networks on val, which none has seen

Synthetic masks are truths that are corrupted as the catalog says, drawn in the paper's shares. Of
those of train, --balance keeps the ones that make the histogram of Dice flat. The masks depend on
--seed alone, not on --workers.

Legend: N samples (slices or patches), K classes, n dimensions, 2 or 3; *S the masks' grid, S, S of
slices or D, H, W of patches of volumes; m a binary mask, label a label map, uint8 [*S] both.
"""

import argparse
import contextlib
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, quality_masks, shapes, supervision, workers
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
from models.checkpoints import (
    check_finite,
    files_of_run,
    load_checkpoint,
    save_checkpoint,
    start_run,
)
from models.device import (
    Compute,
    channels_last,
    compute,
    device_name,
    restore_scaler,
    samples_in,
)
from models.losses import dice_loss, label_map, one_hot

# ------------------------------------------------------------------------------------------- sizes
# The paper gives sizes for a side of 224 pixels. Here they are relative to the grid or the object.


def plane_side(m):
    """The geometric mean of the grid's last two sides, in pixels."""
    return (m.shape[-2] * m.shape[-1]) ** 0.5


def in_pixels(size, m):
    """A size of the catalog in pixels of m.

    Small objects get smaller sizes, in proportion to an object that spans 100 of the 224 pixels.
    """
    return size * min(plane_side(m) / 224, shapes.extent(m) / 100)


def odd(width):
    """The nearest odd number of at least 3. On a small grid, small sizes fall together."""
    return max(3, 2 * round((width - 1) / 2) + 1)


def element(width, m):
    """The structuring element of a catalog size: a disc, or in a volume a ball as flat as m."""
    return shapes.ball(odd(in_pixels(width, m)), shapes.flatness(m))


def object_sides(m):
    """The sizes that shares of an object refer to: its extent; along the depth its depth. -> [n]"""
    depth = shapes.bounds(m).sides[:-2]
    extent = shapes.extent(m)
    return np.array([*depth, extent, extent])


# ------------------------------------------------------------------------------------------ chance
# Random numbers are drawn x first, then y and z. [::-1] puts them in the order of the axes, (z,) y,
# x. In another order, a seed would make other masks.


def random_sign(rng):
    return 1 if rng.random() < 0.5 else -1


def rotation(degrees):
    """The matrix [2, 2] of a rotation."""
    a = np.radians(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def random_direction(rng, n):
    """A random unit vector [n]."""
    depth = rng.uniform(-1, 1, n - 2)  # Archimedes: on a sphere, each coordinate is uniform
    in_plane = rotation(rng.uniform(0, 360))[0, ::-1]
    return np.append(depth, in_plane * (1 - (depth**2).sum()) ** 0.5)


def random_bytes(m, rng):
    """A random byte for each pixel of m. -> uint8 [*S]"""
    return np.frombuffer(rng.bytes(m.size), np.uint8).reshape(m.shape)


def random_pixel(shape, rng):
    """A random position [n] in a grid."""
    x_first = [rng.integers(side) for side in shape[::-1]]
    return x_first[::-1]


def random_one_of(pixels, shape, rng):
    """One of some pixels of a grid, given by their flat indices. -> position [n]"""
    return np.unravel_index(pixels[rng.integers(len(pixels))], shape)


def foreground_pixels(m):
    """The flat indices of the foreground."""
    return np.flatnonzero(m.view(bool))


def weighted_choice(items, weights, rng):
    """One of the items, drawn by weight."""
    left = rng.random() * sum(weights)
    for item, weight in zip(items, weights):
        left -= weight
        if left < 0:
            return item
    return items[-1]


# ------------------------------------------------------------------------------------- corruptions
# f(m, rng, *parameters) -> a corrupted copy of a binary mask [*S] that has some foreground. m holds
# 0 and 1, uint8; of the copy, all above 0 counts.
# A function in WARPS (below the catalog) also takes a whole label map.


def erode(m, rng, width):
    return shapes.erode(m, element(width, m))


def dilate(m, rng, width):
    return shapes.dilate(m, element(width, m))


def opening(m, rng, width):
    return shapes.opening(m, element(width, m))


def closing(m, rng, width):
    return shapes.closing(m, element(width, m))


def ellipse(m, rng):
    """The ellipse or ellipsoid with the mask's second moments."""
    return shapes.ellipsoid(m.shape, *shapes.mass_moments(m))


def polygon(m, rng, sides):
    """Corners evenly spaced along each slice's outline, from a random start."""
    return shapes.polygon(m, sides, rng.random())


def hull(m, rng):
    return shapes.hull(m)


def box(m, rng):
    return shapes.box(m)


def jagged(m, rng, width):
    """Flips pixels of the boundary band with p = .5."""
    band = dilate(m, rng, width) ^ erode(m, rng, width)
    return m ^ (band & random_bytes(m, rng) & 1)


def smooth(m, rng, width):
    return shapes.smooth(m, odd(in_pixels(width, m)), shapes.flatness(m))


def elastic(m, rng, alpha, sigma):
    """Uniform noise, smoothed with sigma, times alpha (Simard et al. 2003).

    A field of the same amplitude and wave length is drawn on a grid of step 2 sigma here and
    interpolated, which is 20 times faster.
    """
    unit = plane_side(m) / 224
    amplitude = unit * alpha * 3**-0.5 / (2 * sigma * np.pi**0.5)
    return shapes.elastic(m, rng, 2 * sigma * unit, amplitude)


def grid_distortion(m, rng, steps, limit):
    """Along each axis, stretches and squeezes the cells of a regular grid by up to `limit`."""

    def sources(side):
        """The source of each position along an axis. -> int [side]"""
        cells = 1 + rng.uniform(-limit, limit, steps)
        knots = np.concatenate([[0], np.cumsum(cells)])
        knots = knots / knots[-1] * (side - 1)
        regular = np.linspace(0, side - 1, steps + 1)
        return np.interp(np.arange(side), regular, knots).round().astype(int)

    return shapes.take_at(m, [sources(side) for side in m.shape])


def holes(m, rng, count, low, high):
    """Empties balls around random foreground pixels, of a radius from low to high."""
    out = m.copy()
    foreground = foreground_pixels(m)
    unit = in_pixels(1, m)
    flat = shapes.flatness(m)
    for _ in range(count):
        center = random_one_of(foreground, m.shape, rng)
        radius = max(1, round(rng.uniform(low, high) * unit))
        shapes.paint_ball(out, center, radius, radius * flat, 0)
    return out


def islands(m, rng, count, low, high):
    """Adds balls around random pixels, of a radius from low to high."""
    out = m.copy()
    unit = in_pixels(1, m)
    flat = shapes.flatness(m)
    for _ in range(count):
        center = random_pixel(m.shape, rng)
        radius = max(1, round(rng.uniform(low, high) * unit))
        shapes.paint_ball(out, center, radius, radius * flat, 1)
    return out


def holes_and_islands(m, rng, count, low, high):
    return islands(holes(m, rng, count, low, high), rng, count, low, high)


def largest_component(m, rng):
    labels, sizes = shapes.components(m)
    return (labels == 1 + sizes[1:].argmax()).view(np.uint8)


def drop_component(m, rng):
    """Removes one component. Of a single one, removes a side of a random cut through its centroid.

    The cut is a line, in a volume a plane.
    """
    labels, sizes = shapes.components(m)
    if len(sizes) > 2:
        return m * (labels != rng.integers(1, len(sizes)))
    return m * shapes.half_space(m.shape, shapes.center(m), random_direction(rng, m.ndim))


def rectangle_dropout(m, rng, low, high):
    """Empties a box around a random foreground pixel; its sides are shares of the object's."""
    out = m.copy()
    center = random_one_of(foreground_pixels(m), m.shape, rng)
    shares = rng.uniform(low, high, m.ndim)[::-1]
    sides = np.maximum(1, shares * object_sides(m)).astype(int)
    out[tuple(slice(max(0, c - s // 2), c + s // 2 + 1) for c, s in zip(center, sides))] = 0
    return out


def shift(m, rng, share):
    """By a share of the object's size, in a random direction."""
    moved = random_direction(rng, m.ndim) * share * object_sides(m)
    return shapes.affine_map(m, np.eye(2), shift=moved)


def scale(m, rng, low, high):
    """About the centroid, along all axes."""
    factor = rng.uniform(low, high)
    return shapes.affine_map(m, np.eye(2) * factor, factor)


def rotate(m, rng, degrees):
    """In the plane of the last two axes, since depth is often coarser."""
    angle = rng.uniform(0.5, 1) * degrees
    return shapes.affine_map(m, rotation(angle * random_sign(rng)))


def affine(m, rng):
    """Rotation and shear in the plane of the last two axes; scale and shift along all."""
    turn = rotation(rng.uniform(-15, 15))
    shear = np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]])
    plane = turn @ shear * rng.uniform(0.85, 1.15)
    moved = rng.uniform(-0.1, 0.1, m.ndim)[::-1] * object_sides(m)
    depth = rng.uniform(0.85, 1.15) if m.ndim == 3 else 1
    return shapes.affine_map(m, plane, depth, moved)


def gaussian_blob(m, rng, size):
    """An upright ellipse or ellipsoid at the centroid, with the mask's spread on each axis.

    size: a factor of that spread.
    """
    center, covariance = shapes.mass_moments(m)
    upright = np.diag(np.diag(covariance))
    return shapes.ellipsoid(m.shape, np.rint(center), upright * size**2)


def disc(m, rng):
    """A disc or ball of the mask's size at its centroid."""
    out = np.zeros_like(m)
    depth = shapes.bounds(m).sides[0] / 2 if m.ndim == 3 else 0
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
    """Each pixel is foreground with p = share."""
    return (random_bytes(m, rng) < 256 * share).view(np.uint8)


# Two corruptions of a label map with several classes: f(label, rng, K).


def swap(label, rng, K):
    """Two classes trade their names."""
    a, b = rng.permutation(np.arange(1, K))[:2]
    return rename_classes(label, {a: b, b: a})


def merge(label, rng, K):
    """One class is taken for the one that it touches most, or for any if it touches none."""
    a = int(rng.integers(1, K))
    near = shapes.dilate((label == a).view(np.uint8), shapes.ball(3, label.ndim - 2.0))
    touching = np.bincount(label[near > 0], minlength=K)  # pixels of each class
    touching[[0, a]] = 0
    other = touching.argmax() if touching.any() else rng.integers(1, K)
    return rename_classes(label, {a: int(other)})


def rename_classes(label, names):
    """The label map with other numbers for some classes. names: {old: new}"""
    table = np.arange(256, dtype=np.uint8)
    for old, new in names.items():
        table[old] = new
    return cv2.LUT(label.reshape(len(label), -1), table).reshape(label.shape)


# ------------------------------------------------------------------------------------- the catalog
# A row is (name, weight, function, parameters ...). To add a corruption: a function above, a row
# here. Sizes are those of a 224-pixel side.

CATALOG_VERSION = 2

# fmt: off
MIX = {  # the paper's shares of the kinds of masks
    "identity": 0.20, "single": 0.28, "chain": 0.18, "cross": 0.10,
    "heavy": 0.12, "catastrophic": 0.05, "blob": 0.07,
}
SINGLE = [
    # morphology
    ("erode 5", 1, erode, 5), ("erode 7", 1, erode, 7), ("erode 9", 0.8, erode, 9),
    ("dilate 5", 1, dilate, 5), ("dilate 7", 1, dilate, 7), ("dilate 9", 0.8, dilate, 9),
    ("open 5", 0.5, opening, 5), ("close 5", 0.5, closing, 5),
    # shape
    ("ellipse", 1, ellipse),
    ("polygon 3", 0.5, polygon, 3), ("polygon 5", 0.8, polygon, 5), ("polygon 8", 0.8, polygon, 8),
    ("convex hull", 1, hull), ("bounding box", 0.5, box),
    # boundary
    ("jagged 3", 1, jagged, 3), ("jagged 5", 1, jagged, 5),
    ("smooth 11", 0.8, smooth, 11), ("smooth 15", 0.8, smooth, 15),
    ("elastic 30", 1, elastic, 30, 4), ("elastic 60", 0.8, elastic, 60, 5),
    ("grid 5", 1, grid_distortion, 5, 0.2), ("grid 8", 0.7, grid_distortion, 8, 0.4),
    # structure
    ("holes small", 1, holes, 2, 3, 8), ("holes large", 0.8, holes, 3, 8, 15),
    ("islands", 1, islands, 2, 3, 8), ("holes and islands", 1, holes_and_islands, 2, 3, 8),
    ("largest component", 0.8, largest_component), ("drop component", 0.5, drop_component),
    ("rectangle dropout", 0.8, rectangle_dropout, 0.1, 0.3),
    # geometry
    ("shift .1", 1, shift, 0.1), ("shift .2", 0.8, shift, 0.2), ("shift .3", 0.5, shift, 0.3),
    ("scale down", 1, scale, 0.75, 0.9), ("scale up", 1, scale, 1.1, 1.25),
    ("rotate 15", 1, rotate, 15), ("rotate 30", 0.7, rotate, 30),
    ("affine", 0.8, affine),
]
SEVERAL_CLASSES = [  # joins SINGLE where K > 2
    ("swap classes", 0.5, swap), ("merge classes", 0.5, merge),
]
HEAVY = [
    ("erode 11", 1, erode, 11), ("dilate 11", 1, dilate, 11),
    ("grid 12", 1, grid_distortion, 12, 0.6), ("holes heavy", 1, holes, 5, 10, 20),
    ("shift .4", 1, shift, 0.4),
    ("scale .5-.7", 1, scale, 0.5, 0.7), ("scale 1.4-1.6", 1, scale, 1.4, 1.6),
]
BLOB = [
    ("gaussian 1.0", 1, gaussian_blob, 1.0), ("gaussian 1.2", 0.7, gaussian_blob, 1.2),
    ("disc", 0.8, disc), ("hull", 1, hull), ("box", 1, box),
]
CATASTROPHIC = [
    ("inverted", 1, inverted), ("empty", 0.5, empty), ("full", 0.5, full),
    ("random .5", 0.3, noise, 0.5),
]
# fmt: on
WARPS = {elastic, grid_distortion, shift, scale, rotate, affine}


class Corruption(NamedTuple):
    """A row of the catalog."""

    name: str
    function: Callable
    parameters: list


def corruption_of(row):
    name, _, function, *parameters = row
    return Corruption(name, function, parameters)


# ---------------------------------------------------------------------------------- drawing a mask


def corrupt_classes(corruption, label, K, rng):
    """A corruption of one, some or all classes of a label map. -> label map

    A class that grows takes background. In half of the draws it also takes pixels of its neighbors.
    A warp of all classes moves them together. A label map without foreground stays as it is.
    """

    def corrupted(m):
        return corruption.function(m, rng, *corruption.parameters)

    present = [k for k in range(1, K) if np.any(label == k)]
    if not present:
        return label
    if corruption.function in (swap, merge):
        return corruption.function(label, rng, K)
    if K == 2:
        return (corrupted(label) > 0).view(np.uint8)
    everything = rng.random() < 0.4
    if everything and corruption.function in WARPS:
        return corrupted(label)
    order = rng.permutation(present)
    count = len(order) if everything else rng.integers(1, len(order) + 1)
    parts = {k: corrupted((label == k).view(np.uint8)) > 0 for k in order[:count]}
    return put_back(parts, label, over=rng.random() < 0.5)


def put_back(parts, label, over):
    """Corrupted classes in the place of those of a label map. -> label map

    parts: {class: bool [*S]}. over: they take the other classes' pixels, too, not only background.
    Of the parts themselves, none takes what an earlier one has just taken.
    """
    others = rename_classes(label, dict.fromkeys(parts, 0))
    out = others.copy()
    if not over:
        for k, part in parts.items():  # what was a class's own stays its own
            out[part & (label == k)] = k
    for k, part in parts.items():
        free = out == others if over else out == 0
        out[part & free] = k
    return out


def add_absent_class(label, K, rng):
    """A label map with a ball of an absent class on background: all that can go wrong with it."""
    absent = [k for k in range(1, K) if not np.any(label == k)]
    side = plane_side(label)
    flat = min(1, len(label) / side) if label.ndim == 3 else 0
    center = random_pixel(label.shape, rng)
    radius = max(1, round(side * rng.uniform(0.01, 0.1)))
    ball = np.zeros_like(label)
    shapes.paint_ball(ball, center, radius, radius * flat, 1)
    k = np.uint8(absent[rng.integers(len(absent))])
    return np.where((ball > 0) & (label == 0), k, label)


def draw_mask(label, K, similar, rng):
    """A mask of variable quality, made of a true label map. -> mask [*S], name

    similar: label maps of other cases, near in size.
    """
    kind = weighted_choice(list(MIX), MIX.values(), rng)
    if kind == "identity" or (kind == "cross" and not similar):
        return label, "identity"
    if kind == "cross":
        return similar[rng.integers(len(similar))], "cross image"
    present = sum(bool(np.any(label == k)) for k in range(1, K))
    if not present or (present < K - 1 and rng.random() < 0.1):
        return add_absent_class(label, K, rng), "invented"
    corruptions = draw_corruptions(kind, K, rng)
    mask = label
    for corruption in corruptions:
        mask = corrupt_classes(corruption, mask, K, rng)
    return mask, " + ".join(corruption.name for corruption in corruptions)


def draw_corruptions(kind, K, rng):
    """The corruptions of a mask of a kind, a key of MIX: one, or the two or three of a chain."""
    single = SINGLE + SEVERAL_CLASSES if K > 2 else SINGLE
    tables = {"heavy": HEAVY, "blob": BLOB, "catastrophic": CATASTROPHIC}
    rows = single if kind in ("single", "chain") else tables[kind]
    weights = [weight for _, weight, *_ in rows]
    length = int(rng.integers(2, 4))  # of a chain; always drawn, so that seeds keep their masks
    count = length if kind == "chain" else 1
    return [corruption_of(weighted_choice(rows, weights, rng)) for _ in range(count)]


def dice_of(mask, label, K):
    """Dice of each foreground class between two label maps; 1 where both are empty.

    -> [K-1] float32
    """
    dice = np.ones(K - 1, np.float32)
    mask = mask.reshape(len(mask), -1)
    label = label.reshape(len(label), -1)
    for k in range(1, K):
        a = cv2.inRange(mask, k, k)
        b = cv2.inRange(label, k, k)
        if total := cv2.countNonZero(a) + cv2.countNonZero(b):
            dice[k - 1] = 2 * cv2.countNonZero(a & b) / total
    return dice


# ---------------------------------------------------------------------------- the masks of a split

CANDIDATES = 4  # masks drawn for each one that --balance keeps
SPLIT_SEED = {"train": 0, "val": 1}


@dataclass(frozen=True)
class Truths:
    """The truths of a split, and how many masks are made of each."""

    split: str  # train or val
    labels: np.ndarray  # [N, *S] uint8
    cases: list  # [N] names
    K: int
    count: int  # masks of each
    balance: bool  # the masks' histogram of Dice is flat
    seed: int

    @functools.cached_property
    def area(self):
        """Foreground pixels of each. -> [N]"""
        return np.array([np.count_nonzero(label) for label in self.labels])


class Drawn(NamedTuple):
    """A synthetic mask."""

    mask: np.ndarray  # [*S] uint8
    dice: np.ndarray  # [K-1] float32
    source: str
    draw: int  # its number among the draws of its truth


class SampleMasks(NamedTuple):
    """The synthetic masks of one truth, compressed."""

    chunks: list  # of quality_masks.chunk()
    dice: np.ndarray  # [count, K-1] float32
    source: list
    draw: list


def masks_of_sample(truths, i):
    """The synthetic masks of truth i, the same whoever computes them. -> SampleMasks"""
    label = truths.labels[i]
    similar = similar_labels(truths, i)
    drawn = []
    for draw in range(truths.count * CANDIDATES if truths.balance else truths.count):
        rng = np.random.default_rng([truths.seed, SPLIT_SEED[truths.split], i, draw])
        mask, name = draw_mask(label, truths.K, similar, rng)
        drawn.append(Drawn(mask, dice_of(mask, label, truths.K), name, draw))
    if truths.balance:
        drawn = balanced(drawn, truths.count)
    return SampleMasks(
        chunks=[quality_masks.chunk(d.mask) for d in drawn],
        dice=np.stack([d.dice for d in drawn]),
        source=[d.source for d in drawn],
        draw=[d.draw for d in drawn],
    )


def similar_labels(truths, i):
    """The label maps of other cases than that of truth i: the 20% that are nearest in area."""
    by_area = np.argsort(abs(truths.area - truths.area[i]), kind="stable")
    others = [j for j in by_area if truths.cases[j] != truths.cases[i]]
    return [truths.labels[j] for j in others[: max(1, len(others) // 5)]]


def balanced(drawn, count, bins=10):
    """Keeps `count` masks, one from each bin of mean Dice in turn, as far as each bin reaches."""
    seen = np.zeros(bins, int)
    turns = []  # (round, bin, position) of each mask
    for position, one in enumerate(drawn):
        b = min(int(one.dice.mean() * bins), bins - 1)
        turns.append((seen[b], b, position))
        seen[b] += 1
    kept = sorted(position for _, _, position in sorted(turns)[:count])
    return [drawn[position] for position in kept]


# ------------------------------------------------------------------------------- the weak networks
# The paper's harvest: a U-Net from scratch, Adam 1e-3, batch 16, Dice loss, flips and rotation,
# saved after a few epochs. Patients are dealt out to --folds folds.


@dataclass
class Labeled:
    """The labeled samples of train and val that masks are made of."""

    info: h5.Info
    train: loading.Samples  # slices, or patches at random places
    val: loading.Samples  # slices, or patches that tile the volumes
    patients: list  # of each sample of train


@dataclass
class WeakRun:
    """The training of the weak network of one fold."""

    fold: int  # that it does not see, if there are several
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    on: Compute
    epoch: int = 0  # epochs done


def train_weak_networks(labeled, args, state):
    """The weak networks of all folds. -> {(fold, epoch): weights}

    state: last.pt of an interrupted run, whose finished folds are not trained again, or None.
    """
    weak = {}
    for fold in range(args.folds):
        index = seen_by(fold, labeled.patients, args.folds)
        if not (state and state["fold"] > fold):  # else it is trained
            run = build_run(fold, labeled.info, args, state)
            train_weak(run, labeled.train, index, labeled.info, args)
        for epoch in args.harvest_epochs:
            weak[fold, epoch] = load_checkpoint(weak_path(args, fold, epoch), "weak")["weights"]
    return weak


def folds_of(patients, folds):
    """The fold of each sample. patients: of each sample -> [N]"""
    number_of = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    return [number_of[patient] % folds for patient in patients]


def seen_by(fold, patients, folds):
    """The samples that a fold's network is trained on: all other folds', or all if there is one.

    patients: of each sample -> numbers of samples
    """
    fold_of = folds_of(patients, folds)
    return [i for i in range(len(patients)) if folds == 1 or fold_of[i] != fold]


def weak_config(info):
    """What models.build() makes a weak network of: f's U-Net, for the dataset."""
    classes = len(info.classes)
    return dict(name="unet", channels=info.channels, classes=classes, dims=info.dims)


def build_run(fold, info, args, state=None):
    """A fold's run at its start, or where an interrupted one left it. state: its last.pt"""
    torch.manual_seed(seed_of(args.seed, 0, fold))
    on = compute(args.device, args.amp, args.deterministic)
    net = on.place(models.build(**weak_config(info)))
    run = WeakRun(fold, net, torch.optim.Adam(net.parameters(), 1e-3), on.scaler(), on)
    if state and state["fold"] == fold:
        restore(run, state)
    return run


def restore(run, state):
    """Sets a run to the state of last.pt."""
    run.net.load_state_dict(state["net"])
    run.optimizer.load_state_dict(state["optimizer"])
    restore_scaler(run.scaler, state)
    run.epoch = state["epoch"]


def train_weak(run, samples, index, info, args):
    """Trains a fold's network on the samples of an index and saves it after --harvest-epochs."""
    steps = max(args.harvest_steps, -(-len(index) // args.harvest_batch))
    for epoch in tqdm(
        range(run.epoch + 1, args.harvest_epochs[-1] + 1),
        desc=f"weak networks, fold {run.fold}",
        disable=not sys.stderr.isatty(),
    ):
        torch.manual_seed(seed_of(args.seed, epoch, run.fold))
        batches = weak_batches(index, steps, args.harvest_batch)
        losses = torch.stack([weak_step(run, samples, batch, args) for batch in batches])
        name = f"weak network of fold {run.fold}"
        check_finite(losses[:, None], [name], [run.net], epoch * steps, lambda _: "try --amp off")
        run.epoch = epoch
        if epoch in args.harvest_epochs:
            save_weak(run, info, args)
        save_run(run, info, args)


def weak_batches(index, steps, batch):
    """`steps` batches of an index, each of its samples as often as any other. -> [batch] each"""
    rounds = 1 + steps * batch // len(index)
    order = torch.cat([torch.randperm(len(index)) for _ in range(rounds)])
    return torch.tensor(index)[order[: steps * batch]].split(batch)


def weak_step(run, samples, batch, args):
    """One step. batch: numbers of samples -> loss (a tensor)"""
    x, y = augment.weak(*samples.batch(batch, run.on.device), args.flip)  # [B, C, *S], [B, *S]
    with run.on.autocast():
        logits = run.net(channels_last(x))  # [B, K, *S]
    loss = dice_loss(logits, one_hot(y, logits.shape[1]))
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach()


def weak_path(args, fold, epoch):
    return os.path.join(args.out, "weak", f"fold{fold}_epoch{epoch:02d}.pt")


def save_weak(run, info, args):
    """Writes a weak network."""
    save_checkpoint(
        weak_path(args, run.fold, run.epoch),
        "weak",
        model=run.net.config,
        weights=run.net.state_dict(),
        epoch=run.epoch,
        fold=run.fold,
        args=vars(args),
        data=info.describe(),
    )


def save_run(run, info, args):
    """Writes OUT/weak/last.pt, from which --resume goes on with a fold; earlier folds are done."""
    write_last(
        args,
        info,
        fold=run.fold,
        finished=False,
        epoch=run.epoch,
        net=run.net.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
    )


def write_last(args, info, **state):
    """Writes OUT/weak/last.pt: the state of the run, and what start_run() compares."""
    save_checkpoint(
        os.path.join(args.out, "weak", "last.pt"),
        "corrupt",
        args=vars(args),
        data=info.describe(),
        inputs={},
        **state,
    )


# ------------------------------------------------------------------------------------- the harvest


class Task(NamedTuple):
    """A mask that a weak network is to make."""

    row: int  # of the mask in its split of vqm.h5
    sample: int
    change: bool  # the intensity is changed first, for variety


class Output(NamedTuple):
    """A mask that a weak network made."""

    row: int
    sample: int
    probabilities: np.ndarray  # [K-1, *S] uint8, in 1/255
    mask: np.ndarray  # [*S] uint8


def train_tasks(patients, weak, first, views, args):
    """Every train sample gets `views` outputs of the networks whose fold it was left out of.

    patients: of each sample; weak: {(fold, epoch): weights}. -> {(fold, epoch): [Task, ...]}
    Rows are counted from `first`. The first output of a network is of the image as it is.
    """
    tasks = {network: [] for network in weak}
    for i, fold in enumerate(folds_of(patients, args.folds)):
        networks = [network for network in weak if network[0] == fold]
        for v in range(views):
            task = Task(first + i * views + v, i, change=v >= len(networks))
            tasks[networks[(v + i) % len(networks)]].append(task)
    return tasks


def val_tasks(count, weak):
    """Every network predicts each of `count` samples as it is. -> as train_tasks()"""
    return {
        network: [Task(n * count + i, i, change=False) for i in range(count)]
        for n, network in enumerate(weak)
    }


def harvest(weak, samples, tasks, info, args):
    """Yields the name of a weak network and an Output, for all tasks of all networks."""
    for i, ((fold, epoch), todo) in enumerate(tasks.items()):
        torch.manual_seed(seed_of(args.seed, i, args.folds))
        for output in weak_outputs(weak[fold, epoch], samples, todo, info, args):
            yield f"harvest fold {fold} epoch {epoch}", output


@torch.no_grad()
def weak_outputs(weights, samples, tasks, info, args):
    """Yields a weak network's Output of each task, in their order."""
    on = compute(args.device, args.amp, args.deterministic)
    net = on.place(models.build(**weak_config(info)))
    net.load_state_dict(weights)
    net.eval()
    batch = samples_in(32, samples.image.shape[2:])
    for start in range(0, len(tasks), batch):
        rows, index, change = zip(*tasks[start : start + batch])
        x, _ = samples.batch(torch.tensor(index), on.device)  # [B, C, *S]
        change = torch.tensor(change, device=on.device).reshape(-1, *[1] * (x.dim() - 1))
        x = torch.where(change, augment.strong(x, color=info.color), x)
        with on.autocast():
            p = net(channels_last(x)).float().softmax(1)  # [B, K, *S]
        in_bytes = (p[:, 1:] * 255).round().to(torch.uint8).cpu().numpy()
        masks = label_map(p).to(torch.uint8).cpu().numpy()
        yield from map(Output, rows, index, in_bytes, masks)


WEAK_LEARNED_NOTHING = 0.01  # mean Dice up to which weak networks have learned nothing


def best_of_weak(dice, label):
    """Mean Dice of the best weak network on val, over samples and the classes in them.

    dice [networks * N, K-1], label [N, *S] -> None where label holds no class
    """
    K = dice.shape[1] + 1
    present = np.stack([(label == k).flatten(1).any(1) for k in range(1, K)], 1)  # [N, K-1]
    dice = dice.reshape(-1, *present.shape)[:, present]  # [networks, present]
    return dice.mean(1).max() if present.any() else None


# ------------------------------------------------------------------------------------------ vqm.h5


def write_masks(path, labeled, weak, args, command):
    """Writes vqm.h5. weak: {(fold, epoch): weights}; command: the words of the command line"""
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as f:
        seed = "" if args.labeled_seed is None else f" --labeled-seed {args.labeled_seed}"
        quality_masks.write_attributes(
            f,
            labeled.info,
            catalog=CATALOG_VERSION,
            seed=args.seed,
            size=args.size,
            spec=args.labeled + seed,
            flip=args.flip or ",".join("DHW"[-labeled.info.dims :]),
            command=shlex.join(command).encode(errors="backslashreplace").decode(),
        )
        n_harvest = round(args.masks * args.harvest_share)  # of each train sample
        groups = create_splits(f, labeled, n_harvest, len(weak), args)
        write_synthetic(groups, labeled, args.masks - n_harvest, args)
        write_harvest(groups, labeled, weak, n_harvest, args)
        for split, group in groups.items():
            print_quality(split, group["dice"][:].mean(1))
        warn_if_nothing_learned(groups["real"]["dice"][:], labeled)


def create_splits(f, labeled, n_harvest, n_weak, args):
    """The empty groups of vqm.h5. -> {name: group}

    n_harvest: outputs of weak networks for each train sample; n_weak: networks, each of which
    predicts all of val.
    """
    K = len(labeled.info.classes)
    N = len(labeled.train)
    N_val = len(labeled.val)
    real = N_val * n_weak
    return {
        "train": quality_masks.create(f, "train", N * args.masks, K, args.size, N * n_harvest),
        "val": quality_masks.create(f, "val", N_val * args.val_masks, K, args.size),
        "real": quality_masks.create(f, "real", real, K, args.size, real),
    }


def write_synthetic(groups, labeled, n_train, args):
    """Fills /val, and the first rows of /train: n_train of each sample.

    Val keeps the paper's mix, so that reports stay comparable.
    """
    start = time.perf_counter()
    made = 0
    for split, samples, count in (
        ("train", labeled.train, n_train),
        ("val", labeled.val, args.val_masks),
    ):
        if count == 0:
            continue
        truths = Truths(
            split=split,
            labels=samples.label.numpy(),
            cases=samples.case,
            K=len(labeled.info.classes),
            count=count,
            balance=args.balance and split == "train",
            seed=args.seed,
        )
        for i, masks in enumerate(synthetic_masks(truths, args.workers)):
            rows = slice(i * count, (i + 1) * count)
            write_sample(groups[split], rows, masks, samples.case[i], samples.at[i])
        made += len(samples) * count
    seconds = time.perf_counter() - start
    sides = " x ".join(map(str, loading.shape_of(args.size)))
    rate = f"{made / seconds:.0f} a second"
    print(f"{made} synthetic masks of {sides} in {seconds:.1f} s ({rate})")


def synthetic_masks(truths, processes):
    """Yields the SampleMasks of every truth in order."""
    numbers_of_truths = range(len(truths.labels))
    yield from tqdm(
        workers.map_in_processes(masks_of_sample, truths, numbers_of_truths, processes),
        total=len(truths.labels),
        desc=f"{truths.split} masks",
        disable=not sys.stderr.isatty(),
    )


def write_sample(group, rows, masks, case, at):
    """Fills some rows of a split with the SampleMasks of one truth, which lies `at` in its case."""
    for row, chunk in enumerate(masks.chunks, rows.start):
        quality_masks.write_chunk(group, row, chunk)
    group["dice"][rows] = masks.dice
    group["source"][rows] = masks.source
    group["draw"][rows] = masks.draw
    group["case"][rows] = [case] * len(masks.chunks)
    group["at"][rows] = at


def write_harvest(groups, labeled, weak, n_harvest, args):
    """Fills /real, and the last rows of /train: n_harvest of each sample."""
    info = labeled.info
    first = len(labeled.train) * (args.masks - n_harvest)
    tasks = train_tasks(labeled.patients, weak, first, n_harvest, args)
    outputs = harvest(weak, labeled.train, tasks, info, args)
    write_outputs(groups["train"], labeled.train, outputs, first)
    tasks = val_tasks(len(labeled.val), weak)
    outputs = harvest(weak, labeled.val, tasks, info, args)
    write_outputs(groups["real"], labeled.val, outputs, first=0)


def write_outputs(group, samples, outputs, first):
    """Fills the rows of a split from `first` on. outputs: of harvest()"""
    K = group["dice"].shape[1] + 1
    small = {}  # of each row; written together, which is sooner
    for name, (row, i, probabilities, mask) in outputs:
        quality_masks.write_chunk(group, row, quality_masks.chunk(mask))
        group["prob"][row - first] = probabilities
        small[row] = dict(
            dice=dice_of(mask, samples.label[i].numpy(), K),
            source=name,
            case=samples.case[i],
            at=samples.at[i],
            prob_index=row - first,
        )
    rows = sorted(small)  # without a gap
    for column in small[rows[0]] if rows else ():
        group[column][rows[0] : rows[-1] + 1] = [small[row][column] for row in rows]


def print_quality(split, dice):
    """A line on the masks of a split. dice [N]: mean over classes"""
    below = f"below .6 {np.mean(dice < 0.6):.0%}"
    above = f"above .9 {np.mean(dice > 0.9):.0%}"
    print(f"{split:6s} {len(dice):6d} masks, mean Dice {dice.mean():.3f}, {below}, {above}")


def warn_if_nothing_learned(dice, labeled):
    """A warning if no weak network has learned anything. dice [N, K-1]: of /real"""
    best = best_of_weak(dice, labeled.val.label)
    if best is not None and best <= WEAK_LEARNED_NOTHING:
        print(
            f"warning: no weak network has a mean Dice above {WEAK_LEARNED_NOTHING} on val, so "
            "they have learned nothing; look at the labels (python -m data.h5 "
            f"{shlex.quote(labeled.info.path)} --preview FILE.png), --harvest-epochs and "
            "--harvest-steps"
        )


# ------------------------------------------------------------------------------------- the preview


def draw_preview(path, vqm_path, info, samples):
    """Random train masks as outlines on their images, with name and Dice.

    Of a volume, three planes are shown.
    """
    views, columns, lines = (1, 8, 6) if info.dims == 2 else (3, 3, 6)
    width = columns * views
    figure, axes = figures.pyplot().subplots(
        lines, width, figsize=(1.75 * width, 2.15 * lines), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    number_of = {place: i for i, place in enumerate(zip(samples.case, samples.at))}
    spacing = {e.name: e.spacing for e in info.entries("train")}
    with h5.open_file(vqm_path) as f:
        group = f["train"]
        rows = np.random.default_rng(0).permutation(len(group["mask"]))
        for panels, row in zip(axes.reshape(-1, views), rows):
            case = group["case"].asstr()[row]
            i = number_of[case, tuple(group["at"][row].tolist())]
            shown = mask_views(info, samples, i, group["mask"][row], spacing[case])
            for axis, panel in zip(panels, shown):
                figures.draw(axis, panel)
            name = group["source"].asstr()[row][:30]
            dice = " ".join(f"{d:.2f}" for d in group["dice"][row])
            panels[views // 2].set_title(f"{name}\n{dice}", fontsize=6.5)
    figures.legend(figure, info.classes)
    figures.save_figure(figure, path)


def mask_views(info, samples, i, mask, spacing):
    """What is shown of a mask of sample i. -> list of figures.Panel"""
    image = info.picture(samples.image[i].numpy())  # [*S], or [*S, 3] of colors
    if mask.ndim == 2:
        return [figures.Panel("", image, mask)]
    return figures.planes(image, mask, samples.label[i].numpy(), spacing)


# -------------------------------------------------------------------------------- options and main


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="corrupt.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--out", type=folder, required=True, help="folder for vqm.h5 and weak/")
    p.section("what is labeled, and what is made of it")
    p.add_argument("--labeled", default="all",
                   help="labeled train patients: a number (7: the first 7), a fraction (0.1) or "
                        "all")
    p.add_argument("--labeled-seed", type=SEED, help="draw the labeled patients at random")
    p.add_argument("--size", type=grid,
                   help="side of the masks' grid (default 224); of volumes D,H,W of a patch "
                        "(default 80,112,112)")
    p.add_argument("--patches", type=number(1, 10_000), default=8,
                   help="volumes: patches of each labeled train volume, at random places")
    p.add_argument("--foreground", type=SHARE, metavar="SHARE",
                   help="volumes: the chance of each of these patches to be centered on a voxel "
                        "of a class that the volume holds, the class drawn first (default: 1/3, "
                        "as in train_ssl.py)")
    p.add_argument("--masks", type=number(1, 100_000),
                   help="masks of each labeled train slice (default 200) or patch (default 50)")
    p.add_argument("--val-masks", type=number(1, 100_000), default=20,
                   help="synthetic masks of each val slice, or of each patch that tiles a val "
                        "volume")
    p.add_argument("--balance", action=argparse.BooleanOptionalAction, default=True,
                   help="draw train masks so that the histogram of Dice is flat; the paper does "
                        "not")
    p.section("harvest")
    p.add_argument("--harvest-share", type=SHARE, default=0.5,
                   help="share of train masks that are outputs of weak networks; paper: 0.05")
    p.add_argument("--folds", type=number(1), default=2,
                   help="groups of patients; weak networks make masks of the group that they were "
                        "not trained on; 1: of all patients, as in the paper")
    p.add_argument("--harvest-epochs", type=numbers, default="1,3,5,10,15,20",
                   help="epochs after which a weak network is saved")
    p.add_argument("--harvest-steps", type=number(1), default=10,
                   help="steps of a harvest epoch at least, where images are few")
    p.add_argument("--harvest-batch", type=number(1, 65_536),
                   help="slices (default 16) or patches (default 2) in a step of the weak networks")
    p.add_argument("--flip", type=flip_axes, metavar="AXES",
                   help="axes along which images of the weak networks may be flipped: H,W or H or "
                        "none (default: all; give stages 1 to 3 the same)")
    p.section("running")
    p.add_argument("--workers", type=number(1, 1000), default=1, help="processes that make masks")
    p.add_argument("--preview", type=picture, metavar="FILE.png",
                   help="draw a grid of masks with name and Dice")
    h5.add_show(p)
    p.add_argument("--seed", type=SEED, default=0, help="of all random numbers")
    p.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                   help="mixed precision of the weak networks")
    p.add_argument("--deterministic", action="store_true",
                   help="the same masks each time also on a GPU, at a price (on a CPU they are "
                        "anyway)")
    p.add_argument("--resume", action="store_true",
                   help="go on with a run that was interrupted: keeps the weak networks that it "
                        "has trained")
    p.add_argument("--overwrite", action="store_true", help="replace the masks that OUT holds")
    return p.parse_args(argv)
# fmt: on


def set_defaults(args, info):
    """Fills in what depends on the data. InputError for an option that does not fit them."""
    slices = info.dims == 2
    args.size = loading.network_grid(info, args.size)
    args.flip = h5.check_flip(info, args.flip)
    args.foreground = loading.target_share(info, args.foreground)
    args.masks = args.masks or (200 if slices else 50)
    args.harvest_batch = args.harvest_batch or (16 if slices else 2)
    try:
        models.check(weak_config(info), loading.shape_of(args.size), args.harvest_batch)
    except ValueError:
        raise InputError(
            "--harvest-batch 1: a patch is a single voxel in the deepest level of a weak network, "
            "where batch norm needs two; give 2, or a larger --size"
        ) from None


def choose_cases(info, args):
    """The names of the labeled cases of train, and of val. InputError for too few of them."""
    train, _ = supervision.choose_labeled(info, args.labeled, args.labeled_seed)
    supervision.check_foreground(info, train)
    val = [e.name for e in info.entries("val") if e.labeled]
    if not val:
        raise InputError(
            f"{args.data}: no val case has a label; convert the data again with labels of val"
        )
    patients = {e.patient for e in info.entries("train") if e.name in set(train)}
    if args.folds > len(patients):
        raise InputError(
            f"--folds {args.folds}: only {len(patients)} patients are labeled; "
            "give at most that many folds"
        )
    return train, val


def load_labeled(info, train, val, args):
    """The slices of named cases, or patches: --patches of each train volume, tiles of val."""
    if info.dims == 2:
        train = loading.load_slices(info, "train", args.size, train)
    else:
        targets = loading.target_places(info, "train", args.size, train)
        corners = {}  # at places fixed by the seed
        for i, e in enumerate(info.entries("train")):
            if e.name in train:
                rng = np.random.default_rng([args.seed, 2, i])
                corners[e.name] = loading.random_corners(
                    e.grid, args.size, args.patches, rng, targets[e.name], args.foreground
                )
        train = loading.load_patches(info, "train", args.size, corners)
    val = loading.load_samples(info, "val", args.size, val)
    patient = {e.name: e.patient for e in info.entries("train")}
    return Labeled(info, train, val, [patient[name] for name in train.case])


def remove_former_run(args, vqm):
    """Removes what another run left in OUT; last.pt first, without which the rest is no run."""
    for path in (*files_of_run("corrupt", os.path.join(args.out, "weak")), vqm):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def print_finished(vqm):
    print(f"{vqm}: these masks are finished; --overwrite makes them again")


def print_end(args, written, vqm):
    """What was written, and the next command."""
    qp = os.path.join(os.path.dirname(args.out), "qp")
    command = ["python", "train_qp.py", args.data, "--vqm", vqm, "--out", qp]
    if args.flip:
        command += ["--flip", args.flip]
    print(f"wrote {', '.join(written)}\nnext: {shlex.join(command)}")


def main(argv=None):
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    words = [word for word in words if word not in ("--resume", "--overwrite")]
    vqm = os.path.join(args.out, "vqm.h5")
    weak_folder = os.path.join(args.out, "weak")

    info = h5.read_info(args.data)
    h5.choose_shown(info, args.show)
    set_defaults(args, info)
    train, val = choose_cases(info, args)

    lock = claim(args.out, "weak") if os.path.isdir(args.out) else None  # held until main ends
    free = ("workers", "preview", "show")
    state, _ = start_run("corrupt", args, info.describe(), free=free, folder=weak_folder)
    if os.path.exists(vqm) and not quality_masks.is_masks(vqm):
        raise InputError(f"{vqm}: is no file of masks, and would be replaced; choose another --out")
    if os.path.exists(vqm) and not (args.overwrite or state):
        raise InputError(
            f"{vqm}: is there already; replace it with --overwrite, or choose another --out"
        )
    finished = bool(state) and state["finished"] and os.path.exists(vqm)
    if finished and not args.preview:
        print_finished(vqm)
        return
    labeled = load_labeled(info, train, val, args)
    written = []

    if not finished:
        lock = lock or claim(args.out, "weak")
        if not state:
            remove_former_run(args, vqm)
        weak = train_weak_networks(labeled, args, state)
        write_masks(vqm, labeled, weak, args, ["python", "corrupt.py", *words])
        write_last(args, info, fold=args.folds, finished=True)
        written += [vqm, f"{args.folds * len(args.harvest_epochs)} networks in {weak_folder}"]

    if args.preview:
        draw_preview(args.preview, vqm, info, labeled.train)
        written.append(args.preview)
    print_end(args, written, vqm)


if __name__ == "__main__":
    cli(main)
