"""vqm.h5, the masks of variable quality that corrupt.py hands to train_qp.py.

    attrs                format, stage="vqm", data's name, checksum, classes, channels;
                         catalog, seed, size, command, spec, flip
    /train, /val, /real  mask [N, *S] uint8, dice [N, K-1], case,
                         source (corruption or network), draw (its random seed)
                         at [N, 1] the mask's slice, or [N, 3] the first corner (z, y, x) of its
                         patch
                         prob [M, K-1, *S] uint8: the probabilities of the foreground classes in
                         1/255 that a weak network's mask was made from
                         prob_index [N]: the row of prob that belongs to a mask, -1 for none

A synthetic mask comes from no network and has no probabilities. So /val has none; those of all weak
networks for its samples are in /real, under the same case and at. A file that was written before
/real had probabilities is read as one without.

size: S, the side of slices, or *S, the (D, H, W) of patches. spec: the --labeled (and
--labeled-seed) of corrupt.py. flip: the axes along which its weak networks have seen flips, or
none; absent in older files.
"""

import zlib
from dataclasses import dataclass

import h5py
import numpy as np
import torch
from torch.nn import functional as F

from data import h5, loading
from data.files import FORMAT, InputError

REMEDY = "run corrupt.py again"


def write_attributes(f, info, **more):
    """Writes the attributes of an open file: what data it belongs to, and more."""
    f.attrs.update(
        format=FORMAT,
        stage="vqm",
        data=info.name,
        checksum=info.checksum,
        classes=info.classes,
        channels=info.channels,
        **more,
    )


def create(f, split, n, K, size, probabilities=0):
    """The empty datasets of a split of vqm.h5: n masks, and so many probabilities. -> the group

    size: the side of slices, or (D, H, W) of patches.
    """
    shape = loading.shape_of(size)
    one = (K - 1, *shape)  # probabilities of a mask
    text = h5py.string_dtype()
    group = f.create_group(split)
    pack = dict(compression="gzip", compression_opts=1)
    group.create_dataset("mask", (n, *shape), "uint8", chunks=(1, *shape), **pack)
    group.create_dataset(
        "prob", (probabilities, *one), "uint8", chunks=(1, *one), maxshape=(None, *one), **pack
    )
    group.create_dataset("dice", (n, K - 1), "float32")
    group.create_dataset("at", (n, 1 if len(shape) == 2 else 3), "int32")
    for name in ("case", "source"):
        group.create_dataset(name, (n,), text)
    for name in ("draw", "prob_index"):
        group.create_dataset(name, (n,), "int32", fillvalue=-1)
    return group


def chunk(mask):
    """A mask [*S] uint8 as the bytes of its chunk in the file.

    So the processes that make masks also compress them.
    """
    return zlib.compress(mask.tobytes(), 1)


def write_chunk(group, row, chunk):
    """Writes what chunk() made to a row of the masks of a split."""
    first = (row, *[0] * (group["mask"].ndim - 1))
    # No name for the dataset: on a full disk, HDF5 crashes when it closes one that is still held.
    group["mask"].id.write_direct_chunk(first, chunk)


@dataclass
class Masks:
    """The masks of one split on one grid, in memory, beside the slices or patches of theirs."""

    mask: torch.Tensor  # [N, *S] uint8
    index: torch.Tensor  # [N] each mask's slice or patch in samples
    samples: loading.Samples  # with labels
    prob: list  # M of [K-1, *S] uint8
    prob_index: torch.Tensor  # [N] into prob, -1: none
    spec: str  # --labeled of corrupt.py
    flip: str | None  # --flip of corrupt.py; None: the file does not say
    patch: tuple | None  # (D, H, W) of the patches of a volume, before they were resized
    own: tuple  # *S of the masks before they were resized


def open_split(f, path, split, info, probabilities):
    """The datasets of a split of an open vqm.h5. -> {name: dataset}

    probabilities: they will be read, too.
    InputError if the file belongs to other data than info's, or is damaged: if shapes and types are
    not those of create().
    """
    check_origin(f, path, info)
    group = h5.child(f, split, h5py.Group)
    names = ("mask", "prob", "dice", "at", "case", "prob_index")
    held = {name: h5.child(group, name, h5py.Dataset) for name in names}
    check_shapes(held, f"{path}: /{split}", info, probabilities)
    return held


def is_masks(path):
    """Whether a file is a vqm.h5 of corrupt.py, of any data and version."""
    try:
        with h5py.File(path, "r", locking=False) as f:
            return f.attrs.get("stage") == "vqm"
    except OSError:
        return False


def check_origin(f, path, info):
    """InputError unless an open vqm.h5 was made from the data of info."""
    if f.attrs.get("format") != FORMAT or f.attrs.get("stage") != "vqm":
        raise InputError(
            f"{path}: not a file of masks from corrupt.py (format {FORMAT}); "
            "give the vqm.h5 that it wrote"
        )
    classes = h5.attribute(f, "classes", str, path, None)
    channels = h5.attribute(f, "channels", int, path)
    if classes != info.classes or channels != info.channels:
        raise InputError(
            f"{path}: made for classes {', '.join(classes)} and {channels} channel(s); "
            f"{info.path} has {', '.join(info.classes)} and {info.channels}; {REMEDY}"
        )
    if h5.attribute(f, "checksum", int, path) != info.checksum:
        raise InputError(
            f"{path}: its masks belong to another file than {info.path} is now; "
            "run corrupt.py on this file again"
        )


def check_shapes(held, where, info, probabilities):
    """InputError unless the datasets of a split have the shapes and types of create().

    probabilities: they will be read, and must fit into memory as the rest.
    """
    own = held["mask"].shape[1:]
    if len(own) != info.dims:
        raise InputError(
            f"{where}/mask: holds masks in {len(own)}D, but {info.path} is segmented in "
            f"{info.dims}D; run corrupt.py on this file"
        )
    N, K = len(held["mask"]), len(info.classes)
    smallest = 32 if info.dims == 2 else 16
    square = info.dims == 3 or own[0] == own[1]
    if N == 0 or min(own) < smallest or not square:
        sides = " x ".join(map(str, own))
        raise InputError(f"{where}/mask: {N} masks of {sides}, none or too small; {REMEDY}")
    expected = {
        "mask": ("uint8", (N, *own)),
        "prob": ("uint8", (*held["prob"].shape[:1], K - 1, *own)),
        "dice": ("float32", (N, K - 1)),
        "at": ("int32", (N, 1 if info.dims == 2 else 3)),
        "case": ("object", (N,)),
        "prob_index": ("int32", (N,)),
    }
    for name, (kind, shape) in expected.items():
        found = held[name]
        if found.dtype != np.dtype(kind) or found.shape != shape:
            raise InputError(
                f"{where}/{name}: {found.dtype} of shape {found.shape}, but {kind} of shape "
                f"{shape} is needed; {REMEDY}"
            )
        if name != "prob" or probabilities:
            h5.check_memory(found, f"{where}/{name}")


def check_values(where, mask, dice, prob_index, *, classes, rows):
    """InputError unless the values of a split are in their ranges. rows: of prob"""
    in_range = (
        mask.max() < classes
        and ((dice >= 0) & (dice <= 1)).all()
        and prob_index.min() >= -1
        and prob_index.max() < rows
    )
    if not in_range:
        raise InputError(
            f"{where}: mask up to {mask.max()} (of {classes} classes), "
            f"dice {dice.min()} to {dice.max()} (of 1), "
            f"or prob_index {prob_index.min()} to {prob_index.max()} (of {rows} rows) "
            f"is out of range; {REMEDY}"
        )


def check_places(where, places, info, source, patch):
    """InputError unless each place of a mask, (case, at), lies in a labeled case of a split.

    source: that split of the data; patch: see Masks.
    """
    known = {e.name: e for e in info.entries(source) if e.labeled}
    for case, at in dict.fromkeys(places):
        if case not in known:
            raise InputError(
                f"{where}/case: {case!a} is no labeled case of /{source} of {info.path}; {REMEDY}"
            )
        grid = known[case].grid
        axes = grid if len(grid) == 3 else (1,)
        if any(not 0 <= p <= max(0, n - s) for p, n, s in zip(at, axes, patch or (1,))):
            raise InputError(f"{where}/at: {at} is no place in {case}, which has {grid}; {REMEDY}")


def find_samples(places, info, source, own):
    """The slices or patches at the places of masks, on the grid of these. -> Samples, index [N]

    places: (case, at) of each mask; source: a split of the data; own: *S of the masks.
    index: of each mask's slice or patch among them.
    """
    wanted = {e.name: [] for e in info.entries(source)}
    for case, at in dict.fromkeys(places):
        wanted[case].append(at)
    wanted = {case: found for case, found in wanted.items() if found}
    if info.dims == 3:
        samples = loading.load_patches(info, source, own, wanted)
    else:
        samples = loading.load_slices(info, source, own[0], wanted)
    number = {place: i for i, place in enumerate(zip(samples.case, samples.at))}
    return samples, torch.tensor([number[place] for place in places])


def resized_label(label, size):
    """A mask or a truth [*own] uint8 on a grid `size`, from the nearest pixels. -> [*S]

    models.quality.resample() does the same to the hard masks that g is asked about. Majorities
    would take thin structures away (results/quality).
    """
    x = torch.from_numpy(label)[None, None]
    return F.interpolate(x, loading.shape_of(size), mode="nearest-exact")[0, 0]


def resized_image(image, size):
    """An image, or probabilities, [C, *own] on a grid `size`. -> [C, *S]"""
    return torch.from_numpy(np.stack([loading.resize_image(one, size) for one in image]))


LEAST_SIDE = 64  # side below which g loses by seeing less than f (results/evidence)


def load(path, split, info, size, probabilities=False, shrink=1):
    """Reads a split on a grid, with its probabilities or without. -> Masks

    size: the grid, the side of slices or (D, H, W) of patches. None: its own; of slices divided by
    `shrink`, but at least LEAST_SIDE.
    InputError if the file belongs to other data than info's, or is damaged.
    """
    where = f"{path}: /{split}"
    source = "val" if split == "real" else split
    with h5.open_file(path) as f, h5.reading(where, REMEDY):
        held = open_split(f, path, split, info, probabilities)
        spec = h5.attribute(f, "spec", str, path)
        flip = h5.attribute(f, "flip", str, path, optional=True)
        own = tuple(map(int, held["mask"].shape[1:]))
        patch = own if info.dims == 3 else None
        if not size:
            size = patch or max(own[0] // shrink, min(own[0], LEAST_SIDE))
        cases = held["case"].asstr()[:].tolist()
        at = map(tuple, held["at"][:].tolist())
        places = list(zip(cases, at))  # [N] of (case, (z,)) or (case, (z, y, x))
        prob_index, dice = held["prob_index"][:], held["dice"][:]
        mask = torch.stack([resized_label(m, size) for m in held["mask"]])  # [N, *S]
        prob = []
        if probabilities:
            prob = [resized_image(p, size) for p in held["prob"]]  # M of [K-1, *S]
        rows = len(held["prob"])
    check_values(where, mask, dice, prob_index, classes=len(info.classes), rows=rows)
    check_places(where, places, info, source, patch)
    # The truth goes the way of the masks, over their own grid. Else it would differ from an
    # identical mask.
    samples, index = find_samples(places, info, source, own)
    samples.image = torch.stack([resized_image(one, size) for one in samples.image.numpy()])
    samples.label = torch.stack([resized_label(one, size) for one in samples.label.numpy()])
    counts = set(torch.bincount(index, minlength=len(samples)).tolist())
    if len(counts) > 1:
        raise InputError(
            f"{where}: {min(counts)} to {max(counts)} masks of a slice or patch, but all need the "
            f"same number; {REMEDY}"
        )
    return Masks(
        mask=mask,
        index=index,
        samples=samples,
        prob=prob,
        prob_index=torch.from_numpy(prob_index).long(),
        spec=spec,
        flip=flip,
        patch=patch,
        own=own,
    )
