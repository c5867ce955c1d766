"""Samples: slices and patches on the grid that a network sees, in memory or read when a batch asks for them.

Legend: N samples, B batch, C channels, *S the grid that a network sees: S, S of slices, or D, H, W of patches of volumes.
"""

import itertools
import math
import os
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from data import h5
from data.files import InputError


@dataclass
class Samples:
    """2D slices, or patches of volumes, on one grid, in memory. A plain image is one slice; a volume gives D."""

    image: torch.Tensor  # [N, C, *S] uint8 or float32, as stored
    mean: torch.Tensor  # [N] intensity of the sample's whole case
    std: torch.Tensor  # [N]
    label: torch.Tensor | None  # [N, *S] uint8
    case: list  # [N] names
    at: list  # [N] where in the case: (z,) of a slice, (z, y, x) of the first corner of a patch

    def __len__(self):
        return len(self.image)

    def fetch(self, index, place=None):
        """What batch() standardizes. -> image [B, C, *S] and label [B, *S] or None, as stored, mean [B], std [B]. place: of Volumes"""
        if torch.is_tensor(index):
            index = index.to(self.image.device)
        return (
            self.image[index],
            None if self.label is None else self.label[index],
            self.mean[index],
            self.std[index],
        )

    def batch(self, index, device="cpu"):
        """Standardized images [B, C, *S] float32, and labels [B, *S] int64 or None."""
        return standardized(self.fetch(index), device)

    def to(self, device):
        """Itself, held by a device."""
        for name in ("image", "mean", "std", "label"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(device))
        return self

    def __add__(self, other):
        """Both, one after the other (images of mixed types become float32); labels are kept only if both have them."""
        same = self.image.dtype == other.image.dtype
        return Samples(
            torch.cat([s.image if same else s.image.float() for s in (self, other)]),
            torch.cat([self.mean, other.mean]),
            torch.cat([self.std, other.std]),
            None
            if self.label is None or other.label is None
            else torch.cat([self.label, other.label]),
            self.case + other.case,
            self.at + other.at,
        )


@dataclass
class Volumes:
    """Whole volumes in memory, each on its own grid of at least `size`, from which patches are cut."""

    image: list  # N of [D, H, W] uint8 or float32, as stored, mirrored up to `size` where smaller
    mean: list  # N
    std: list  # N
    label: list | None  # N of [D, H, W] uint8
    case: list  # N names
    size: tuple  # (D, H, W) of a patch

    def __len__(self):
        return len(self.image)

    def fetch(self, index, place):
        """A patch of each of some volumes, as Samples.fetch() gives it. place [B, 3]: of its corner, as a share of where it could be, in [0, 1)"""
        parts = [
            part_at(self.image[i].shape, self.size, at) for i, at in zip(index.tolist(), place)
        ]
        x, y = (
            None
            if v is None
            else torch.stack([v[i][part] for i, part in zip(index.tolist(), parts)])
            for v in (self.image, self.label)
        )
        mean, std = (
            torch.tensor([v[i] for i in index.tolist()], device=x.device)
            for v in (self.mean, self.std)
        )
        return x[:, None], y, mean, std

    def batch(self, index, device="cpu"):
        """Patches at places that torch's global generator draws, as Samples.batch() gives them."""
        return standardized(self.fetch(index, torch.rand(len(index), 3)), device)

    def to(self, device):
        """Itself, held by a device."""
        self.image, self.label = (
            None if v is None else [one.to(device) for one in v] for v in (self.image, self.label)
        )
        return self

    def __add__(self, other):
        """Both, one after the other; labels are kept only if both have them."""
        return Volumes(
            self.image + other.image,
            self.mean + other.mean,
            self.std + other.std,
            None if self.label is None or other.label is None else self.label + other.label,
            self.case + other.case,
            self.size,
        )


def standardized(fetched, device):
    """What fetch() gave, on a device. -> images [B, C, *S] float32 of mean 0 and deviation 1 of their cases, labels [B, *S] int64 or None"""
    image, label, mean, std = (
        None if v is None else v.to(device, non_blocking=True) for v in fetched
    )
    mean, std = (v.reshape(-1, *[1] * (image.dim() - 1)) for v in (mean, std))
    return (image.float() - mean) / std, None if label is None else label.long()


def part_at(grid, size, place):
    """The slices of a patch of `size` in a grid that is no smaller. place [3] in [0, 1): of its corner, as a share of where it could be"""
    corner = [int(p * (n - s + 1)) for p, n, s in zip(place.tolist(), grid, size)]
    return tuple(slice(c, c + s) for c, s in zip(corner, size))


def check_size(info, size):
    """InputError unless --size, one whole number or three, fits a file's dims. -> (S,) or (D, H, W)"""
    text = f"--size {','.join(map(str, size))}"
    if info.dims == 2 and len(size) != 1:
        raise InputError(
            f"{text}: {info.path} is segmented slice by slice (dims=2), which takes one side; give one"
        )
    if info.dims == 2 and not 32 <= size[0] <= 4096:
        raise InputError(
            f"{text}: slices need a side of at least 32 and at most 4096 pixels; give another"
        )
    size = size * 3 if info.dims == 3 and len(size) == 1 else size
    if info.dims == 3 and (min(size) < 16 or math.prod(size) > 2**27):
        raise InputError(
            f"{text}: a patch needs at least 16 voxels per axis, and at most {2**27:,} together; give another"
        )
    return size


def network_grid(info, size):
    """What --size means for a file: the side of slices (default 224), or the (D, H, W) of patches (default 80, 112, 112).

    size: a tuple of one or three whole numbers, or None. InputError if it does not fit the file's dims.
    """
    size = check_size(info, size or ((224,) if info.dims == 2 else (80, 112, 112)))
    if info.dims == 2:
        return size[0]
    volumes = [e for entries in info.splits.values() for e in entries]
    if small := [e for e in volumes if any(n < s for n, s in zip(e.grid, size))]:
        print(
            f"note: {len(small)} of {len(volumes)} volumes are smaller than a patch of {' x '.join(map(str, size))}, among them {small[0].name} of "
            f"{' x '.join(map(str, small[0].grid))}; they are mirrored at their ends"
        )
    return size


def shape_of(size):
    """The *S of a network's grid: (S, S) of the side of slices, (D, H, W) of a patch as it is."""
    return (size, size) if isinstance(size, int) else tuple(size)


def resize_image(image, size):
    """(H, W[, 3]) -> (S, S[, 3]), or (D, H, W) -> (*S,) where size is a tuple of three; averages when shrinking."""
    shape = shape_of(size)
    if image.shape[: len(shape)] == shape:
        return image
    if len(shape) == 3:
        smaller = all(n >= s for n, s in zip(image.shape, shape))
        x = torch.from_numpy(image)[None, None].float()
        x = (
            F.interpolate(x, shape, mode="area")
            if smaller
            else F.interpolate(x, shape, mode="trilinear", align_corners=False)
        )
        return (x.round() if image.dtype == np.uint8 else x)[0, 0].numpy().astype(image.dtype)
    return cv2.resize(
        image,
        shape,
        interpolation=cv2.INTER_AREA if min(image.shape[:2]) >= size else cv2.INTER_LINEAR,
    )


def resize_label(label, size):
    """(H, W) -> (S, S), nearest; or (D, H, W) -> (*S,) where size is a tuple of three: the class of most voxels, nearest where it grows."""
    shape = shape_of(size)
    if label.shape == shape:
        return label
    if len(shape) == 3 and all(n >= s for n, s in zip(label.shape, shape)):
        classes = np.unique(label)
        shares = [
            F.interpolate(torch.from_numpy(label == k)[None, None].float(), shape, mode="area")[
                0, 0
            ]
            for k in classes
        ]
        return classes[torch.stack(shares).argmax(0).numpy()]
    if len(shape) == 3:
        return F.interpolate(torch.from_numpy(label)[None, None], shape, mode="nearest-exact")[
            0, 0
        ].numpy()
    return cv2.resize(label, shape, interpolation=cv2.INTER_NEAREST_EXACT)


def as_slice(image, size):
    """A slice as networks see it. (H, W[, 3]) -> (C, S, S)"""
    return resize_image(image, size).reshape(size, size, -1).transpose(2, 0, 1)


def whole_cases(info, split, names=None, labels=True):
    """Yields name, image (D, H, W[, 3]), label (D, H, W) or None, mean and deviation of the named cases (default: of all).

    InputError for a case that has no label, where labels are asked for, and where there is no case at all.
    """
    names = [e.name for e in info.entries(split)] if names is None else list(names)
    if not names:
        raise InputError(f"{info.path}: no case to read in split '{split}'")
    with h5.open_file(info.path) as f:
        for name in names:
            image, label = h5.read_case(f, info, split, name, labels)
            if labels and label is None:
                raise InputError(
                    f"{info.path}: /{split}/{name} has no label, but one is needed here"
                )
            yield name, image, label, *(h5.mean_and_std(image) if info.standardize else (0.0, 1.0))


def load_slices(info, split, size, names=None, labels=True):
    """All slices of the named cases of a split (default: every case), resized to size x size. -> Samples"""
    images, ys, means, stds, cases, at = [], [], [], [], [], []
    for name, image, label, mean, std in whole_cases(info, split, names, labels):
        for z in range(len(image)):
            images.append(as_slice(image[z], size))
            ys.append(resize_label(label[z], size) if labels else None)
            means.append(mean), stds.append(std), cases.append(name), at.append((z,))
    return Samples(
        torch.from_numpy(np.stack(images)),
        torch.tensor(means),
        torch.tensor(stds),
        torch.from_numpy(np.stack(ys)) if labels else None,
        cases,
        at,
    )


def at_least(volume, size):
    """A volume (D, H, W), mirrored on both sides of an axis that is shorter than in size."""
    missing = [max(0, s - n) for n, s in zip(volume.shape, size)]
    return (
        np.pad(volume, [(m // 2, m - m // 2) for m in missing], mode="symmetric")
        if any(missing)
        else volume
    )


def cut_back(volume, grid):
    """What at_least() added is taken away again. (..., *larger) -> (..., D, H, W)"""
    first = [(n - g) // 2 for n, g in zip(volume.shape[-3:], grid)]
    return volume[(..., *(slice(f, f + g) for f, g in zip(first, grid)))]


def load_patches(info, split, size, corners, labels=True, grid=None):
    """Patches of `size` (D, H, W) of volumes, resized to `grid` (default: as they are). corners: {case: [(z, y, x), ...]} -> Samples"""
    images, ys, means, stds, cases, at = [], [], [], [], [], []
    for name, image, label, mean, std in whole_cases(info, split, corners, labels):
        image, label = at_least(image, size), at_least(label, size) if labels else None
        for corner in corners[name]:
            part = tuple(slice(c, c + s) for c, s in zip(corner, size))
            if image[part].shape != tuple(size):
                raise InputError(f"{info.path}: /{split}/{name} has no patch of {size} at {corner}")
            images.append(resize_image(image[part], grid or size)[None])
            ys.append(resize_label(label[part], grid or size) if labels else None)
            means.append(mean), stds.append(std), cases.append(name), at.append(tuple(corner))
    return Samples(
        torch.from_numpy(np.stack(images)),
        torch.tensor(means),
        torch.tensor(stds),
        torch.from_numpy(np.stack(ys)) if labels else None,
        cases,
        at,
    )


def load_samples(info, split, size, names=None, labels=True):
    """What stands for whole cases on the network's grid: all their slices, or patches that cover their volumes. -> Samples"""
    if info.dims == 2:
        return load_slices(info, split, size, names, labels)
    return load_patches(
        info,
        split,
        size,
        {
            e.name: tiles(e.grid, size)
            for e in info.entries(split)
            if names is None or e.name in names
        },
        labels,
    )


def showcase(info, split, size, most=16):
    """One sample of each of at most `most` cases, evenly spread: the slice, or the patch, with the most foreground. -> Samples"""
    found = None
    for entry in info.entries(split)[:: -(-len(info.entries(split)) // most)]:
        every = load_samples(info, split, size, [entry.name])
        i = int((every.label > 0).flatten(1).sum(1).argmax())
        one = Samples(
            every.image[i : i + 1],
            every.mean[i : i + 1],
            every.std[i : i + 1],
            every.label[i : i + 1],
            [entry.name],
            [every.at[i]],
        )
        found = one if found is None else found + one
    return found


def load_volumes(info, split, size, names=None, labels=True):
    """The named volumes of a split (default: every one), for patches of `size` (D, H, W). -> Volumes"""
    names, images, ys, means, stds = zip(
        *(
            (
                name,
                torch.from_numpy(at_least(image, size)),
                torch.from_numpy(at_least(label, size)) if labels else None,
                mean,
                std,
            )
            for name, image, label, mean, std in whole_cases(info, split, names, labels)
        )
    )
    return Volumes(
        list(images),
        list(means),
        list(stds),
        list(ys) if labels else None,
        list(names),
        tuple(size),
    )


def starts(length, size, stride):
    """First positions of windows of `size` along an axis of `length`, `stride` apart, the last one moved back to end with the axis."""
    last = max(0, length - size)
    return [*range(0, last, stride), last]


def tiles(grid, size):
    """Corners of the fewest patches of `size` that cover a volume of `grid`. -> [(z, y, x), ...]"""
    return list(itertools.product(*(starts(n, s, s) for n, s in zip(grid, size))))


def random_corners(grid, size, count, rng):
    """Corners of `count` patches at random places of a volume, of fewer where they coincide. -> [(z, y, x), ...]"""
    return list(
        dict.fromkeys(
            tuple(int(rng.integers(max(0, n - s) + 1)) for n, s in zip(grid, size))
            for _ in range(count)
        )
    )


class Stored:
    """What load_slices or load_volumes would hold in memory, left in its file; fetch() gives the same.

    Each process opens the file for itself, so that an object may be handed to the workers of a DataLoader, forked or spawned. Of a volume
    only the slice, or the blocks of the file that a patch touches, are read.
    """

    def __init__(self, info, split, size, names=None, labels=True):
        """Arguments, and errors, of load_slices and load_volumes; wrong pixels are found when they are read."""
        self.infos, self.size, self.labels, self.files = {info.path: info}, size, labels, {}
        names = None if names is None else set(names)
        entries = [e for e in info.entries(split) if names is None or e.name in names]
        if not entries:
            raise InputError(f"{info.path}: no case to read in split '{split}'")
        if labels and (missing := [e.name for e in entries if not e.labeled]):
            raise InputError(
                f"{info.path}: /{split}/{missing[0]} has no label, but one is needed here"
            )
        if isinstance(size, int):
            self.items = [
                (info.path, split, e, z)
                for e in entries
                for z in range(e.grid[0] if len(e.grid) == 3 else 1)
            ]
        else:
            self.items = [(info.path, split, e, None) for e in entries]
        self.moments = dict(
            zip(((info.path, split, e.name) for e in entries), _moments(info, split, entries))
        )

    def __len__(self):
        return len(self.items)

    @property
    def case(self):
        return [entry.name for _, _, entry, _ in self.items]

    def fetch(self, index, place):
        """The samples of some numbers. index [B]; place [B, 3]: see Volumes. -> image [B, C, *S], label [B, *S] or None, mean [B], std [B]"""
        found = [self._read(*self.items[i], at) for i, at in zip(index.tolist(), place)]
        image, label, mean, std = zip(*found)
        kinds = np.result_type(*image)  # images of two files may differ
        return (
            torch.from_numpy(np.stack(image).astype(kinds, copy=False)),
            torch.from_numpy(np.stack(label)) if self.labels else None,
            torch.tensor(mean),
            torch.tensor(std),
        )

    def _read(self, path, split, entry, z, place):
        info, size = self.infos[path], self.size
        if z is None:
            part = tuple(
                slice(None) if n < s else one
                for n, s, one in zip(
                    entry.grid, size, part_at(tuple(map(max, entry.grid, size)), size, place)
                )
            )
        else:
            part = (slice(z, z + 1),) if len(entry.grid) == 3 else ()
        image, label = h5.read_case(self._file(path), info, split, entry.name, self.labels, part)
        if z is None:
            image, label = (
                at_least(image, size)[None],
                at_least(label, size) if self.labels else None,
            )
        else:
            image = as_slice(image[0], size)
            label = resize_label(label[0], size) if self.labels else None
        return image, label, *self.moments[path, split, entry.name]

    def _file(self, path):
        key = os.getpid(), path  # a forked process must not share the file of its parent
        if key not in self.files:
            self.files = {k: f for k, f in self.files.items() if k[0] == os.getpid()} | {
                key: h5.open_file(path)
            }
        return self.files[key]

    def __getstate__(self):
        return self.__dict__ | {"files": {}}

    def __add__(self, other):
        """Both, one after the other; labels are kept only if both have them."""
        both = Stored.__new__(Stored)
        both.infos, both.size, both.labels, both.files = (
            self.infos | other.infos,
            self.size,
            self.labels and other.labels,
            {},
        )
        both.items, both.moments = self.items + other.items, self.moments | other.moments
        return both


def _moments(info, split, entries):
    """Mean and deviation of each case's intensities, as its file says, or, of files of older versions, as its pixels say."""
    if not info.standardize:
        return [(0.0, 1.0)] * len(entries)
    with h5.open_file(info.path) as f:
        return [_moment(f, info, split, e.name) for e in entries]


def _moment(f, info, split, name):
    case, where = f[split][name], f"{info.path}: /{split}/{name}"
    if "mean" not in case.attrs:
        return h5.mean_and_std(h5.read_case(f, info, split, name, label=False)[0])
    mean, std = (h5.attribute(case, key, float, where) for key in ("mean", "std"))
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise InputError(
            f"{where}: mean {mean}, std {std} are not those of an image; convert the data again"
        )
    return mean, std


def bytes_in_memory(info, split, size, names=None):
    """What load_slices or load_volumes of these cases would hold."""
    names = None if names is None else set(names)
    entries = [e for e in info.splits[split] if names is None or e.name in names]
    if isinstance(size, int):
        return sum(
            (e.grid[0] if len(e.grid) == 3 else 1) * size**2 * (info.channels * e.itemsize + 1)
            for e in entries
        )
    return sum(math.prod(map(max, e.grid, size)) * (e.itemsize + 1) for e in entries)
