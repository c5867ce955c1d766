"""vqm.h5, the masks of variable quality that corrupt.py hands to train_qp.py.

    attrs                    format, stage="vqm", data's name, checksum, classes, channels; catalog, seed, size, command, spec
    /train, /val, /real      mask [N, *S] uint8, dice [N, K-1], case, source (corruption or network), draw (its random seed)
                             at [N, 1] the mask's slice, or [N, 3] the first corner (z, y, x) of its patch
                             prob [M, K-1, *S] uint8: probabilities of the foreground classes in 1/255, of weak networks' outputs
                             prob_index [N]: the row of prob that belongs to a mask, -1 where there is none
    size: S, the side of slices, or *S, the (D, H, W) of patches; spec: the --labeled (and --labeled-seed) of corrupt.py
"""
import zlib
from dataclasses import dataclass

import h5py
import numpy as np
import torch

from data import h5
from data.files import FORMAT, InputError


def describe(f, info, **more):
    """Writes the attributes of an open file."""
    f.attrs.update(format=FORMAT, stage="vqm", data=info.name, checksum=info.checksum, classes=info.classes, channels=info.channels, **more)


def create(f, split, n, K, size, probabilities=0):
    """The empty datasets of a split of vqm.h5. size: the side of slices, or (D, H, W) of patches"""
    group, text, shape = f.create_group(split), h5py.string_dtype(), h5.shape_of(size)
    pack = dict(compression="gzip", compression_opts=1)
    group.create_dataset("mask", (n, *shape), "uint8", chunks=(1, *shape), **pack)
    group.create_dataset("prob", (probabilities, K - 1, *shape), "uint8", chunks=(1, K - 1, *shape), maxshape=(None, K - 1, *shape), **pack)
    group.create_dataset("dice", (n, K - 1), "float32")
    group.create_dataset("at", (n, 1 if len(shape) == 2 else 3), "int32")
    for name, kind in dict(case=text, source=text, draw="int32", prob_index="int32").items():
        group.create_dataset(name, (n,), kind, fillvalue=None if kind is text else -1)
    return group


def chunk(mask):
    """A mask [*S] uint8 as the bytes of its chunk in the file, so that the processes that make masks also compress them."""
    return zlib.compress(mask.tobytes(), 1)


@dataclass
class Masks:
    """The masks of one split on one grid, in memory, beside the slices or patches that they belong to."""
    mask: torch.Tensor        # [N, *S] uint8
    index: torch.Tensor       # [N] each mask's slice or patch in samples
    samples: h5.Samples       # with labels
    prob: list                # M of [K-1, *S] uint8
    prob_index: torch.Tensor  # [N] into prob, -1: none
    spec: str                 # --labeled of corrupt.py
    patch: tuple | None       # (D, H, W) of the patches of a volume, before they were resized
    own: tuple                # *S of the masks before they were resized


REMEDY = "run corrupt.py again"


def open_split(f, path, split, info):
    """The datasets of a split of an open vqm.h5, by name, as far as their shapes and types are those of create(). -> {name: dataset}

    InputError if it belongs to other data than info's, or is damaged.
    """
    if f.attrs.get("format") != FORMAT or f.attrs.get("stage") != "vqm":
        raise InputError(f"{path}: not a file of masks from corrupt.py (format {FORMAT}); give the vqm.h5 that it wrote")
    classes, channels = h5.attribute(f, "classes", str, path, None), h5.attribute(f, "channels", int, path)
    if classes != info.classes or channels != info.channels:
        raise InputError(f"{path}: made for classes {', '.join(classes)} and {channels} channel(s); "
                         f"{info.path} has {', '.join(info.classes)} and {info.channels}; {REMEDY}")
    if h5.attribute(f, "checksum", int, path) != info.checksum:
        raise InputError(f"{path}: its masks belong to another file than {info.path} is now; run corrupt.py on this file again")
    group, where = h5.child(f, split, h5py.Group), f"{path}: /{split}"
    held = {name: h5.child(group, name, h5py.Dataset) for name in ("mask", "prob", "dice", "at", "case", "prob_index")}
    N, own, K = held["mask"].shape[:1], held["mask"].shape[1:], len(info.classes)
    if len(own) != info.dims:
        raise InputError(f"{where}/mask: holds masks in {len(own)}D, but {info.path} is segmented in {info.dims}D; run corrupt.py on this file")
    if N == (0,) or min(own) < (32 if info.dims == 2 else 16) or (info.dims == 2 and own[0] != own[1]):
        raise InputError(f"{where}/mask: {N[0]} masks of {' x '.join(map(str, own))}, none or too small; {REMEDY}")
    axes = 1 if info.dims == 2 else 3
    for name, kind, shape in (("mask", "uint8", (*N, *own)), ("prob", "uint8", (*held["prob"].shape[:1], K - 1, *own)), ("dice", "float32", (*N, K - 1)),
                              ("at", "int32", (*N, axes)), ("case", "object", N), ("prob_index", "int32", N)):
        if held[name].dtype != np.dtype(kind) or held[name].shape != shape:
            raise InputError(f"{where}/{name}: {held[name].dtype} of shape {held[name].shape}, but {kind} of shape {shape} is needed; {REMEDY}")
        h5.check_memory(held[name], f"{where}/{name}")
    return held


def load(path, split, info, size, probabilities=False, shrink=1):
    """Reads a split on the grid `size` (the side of slices, (D, H, W) of patches; None: its own, of slices divided by `shrink`, but at least
    32). -> Masks

    InputError if it belongs to other data than info's, or is damaged.
    """
    source, where, K = "val" if split == "real" else split, f"{path}: /{split}", len(info.classes)
    with h5.open_file(path) as f, h5.reading(where, REMEDY):
        held, spec = open_split(f, path, split, info), h5.attribute(f, "spec", str, path)
        own = tuple(map(int, held["mask"].shape[1:]))
        patch, size = own if info.dims == 3 else None, size or (own if info.dims == 3 else max(32, own[0] // shrink))
        cases, at, prob_index, dice = held["case"].asstr()[:].tolist(), list(map(tuple, held["at"][:].tolist())), held["prob_index"][:], held["dice"][:]
        mask = np.stack([h5.resize_label(m, size) for m in held["mask"]])
        prob = [torch.from_numpy(np.stack([h5.resize_image(c, size) for c in p])) for p in held["prob"]] if probabilities else []
        rows = len(held["prob"])
    known = {e.name: e for e in info.entries(source) if e.labeled}
    if mask.max() >= K or not ((dice >= 0) & (dice <= 1)).all() or prob_index.min() < -1 or prob_index.max() >= rows:
        raise InputError(f"{where}: mask up to {mask.max()} (of {K} classes), dice {dice.min()} to {dice.max()} (of 1), or prob_index {prob_index.min()} to "
                         f"{prob_index.max()} (of {rows} rows) is out of range; {REMEDY}")
    for case, place in set(zip(cases, at)):
        if case not in known:
            raise InputError(f"{where}/case: {case!a} is no labeled case of /{source} of {info.path}; {REMEDY}")
        if any(not 0 <= p <= max(0, n - s) for p, n, s in zip(place, known[case].grid if len(known[case].grid) == 3 else (1,), patch or (1,))):
            raise InputError(f"{where}/at: {place} is no place in {case}, which has {known[case].grid}; {REMEDY}")
    wanted = {e.name: [] for e in info.entries(source)}
    for case, place in dict.fromkeys(zip(cases, at)):
        wanted[case].append(place)
    wanted = {case: places for case, places in wanted.items() if places}
    samples = h5.load_patches(info, source, patch, wanted, grid=size) if patch else h5.load_slices(info, source, size, wanted)
    number = {key: i for i, key in enumerate(zip(samples.case, samples.at))}
    index = torch.tensor([number[key] for key in zip(cases, at)])
    if len(counts := set(torch.bincount(index, minlength=len(samples)).tolist())) > 1:
        raise InputError(f"{where}: {min(counts)} to {max(counts)} masks of a slice or patch, but all need the same number; {REMEDY}")
    return Masks(torch.from_numpy(mask), index, samples, prob, torch.from_numpy(prob_index).long(), spec, patch, own)
