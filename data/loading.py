"""Samples: slices and patches on the grid that a network sees.

Three classes hold them. fetch() of each gives the same:

    Samples  slices, or patches at given places, in memory
    Volumes  whole volumes in memory; fetch() cuts patches at any place
    Stored   slices or volumes in their file; fetch() reads what a batch asks for

Legend: N samples, B batch, K classes, C channels, D depth, H height, W width, *S the network's
grid: S, S of slices, D, H, W of patches.
"""

import copy
import itertools
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from data import h5
from data.files import InputError

cv2.setNumThreads(1)  # else forked processes may wait forever for threads of their parent

# ------------------------------------------------------------------------------ samples in memory


class Fetched(NamedTuple):
    """Samples as they are stored, and what standardized() needs."""

    image: torch.Tensor  # [B, C, *S] uint8 or float32
    label: torch.Tensor | None  # [B, *S] uint8
    mean: torch.Tensor  # [B] or [B, C] intensity of the sample's whole case
    std: torch.Tensor  # as mean


@dataclass
class Samples:
    """Slices, or patches of volumes, on one grid, in memory.

    A plain image is one slice. A volume that is segmented slice by slice gives D of them.
    """

    image: torch.Tensor  # [N, C, *S] uint8 or float32, as stored
    mean: torch.Tensor  # [N] or [N, C] intensity of the sample's whole case
    std: torch.Tensor  # as mean
    label: torch.Tensor | None  # [N, *S] uint8
    case: list  # [N] names
    at: list  # [N] place in the case: (z,) of a slice, (z, y, x) of the first corner of a patch

    def __len__(self):
        return len(self.image)

    def fetch(self, index, place=None):
        """Some samples as they are stored. index [B]; place: only Volumes read it -> Fetched"""
        if torch.is_tensor(index):
            index = index.to(self.image.device, non_blocking=True)
        label = None if self.label is None else self.label[index]
        return Fetched(self.image[index], label, self.mean[index], self.std[index])

    def batch(self, index, device="cpu"):
        """Standardized images [B, C, *S] float32, and labels [B, *S] int64 or None."""
        return standardized(self.fetch(index), device)

    def to(self, device):
        """Moves the tensors to a device, in place. -> itself"""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        return self

    def __add__(self, other):
        return joined(self, other)


@dataclass
class Volumes:
    """Whole volumes in memory, each on its own grid of at least `size`, to cut patches from."""

    image: list  # N of [C, D, H, W] uint8 or float32, as stored, mirrored to `size` if smaller
    mean: list  # N of numbers, or of C numbers
    std: list  # N
    label: list | None  # N of [D, H, W] uint8
    case: list  # N names
    size: tuple  # (D, H, W) of a patch
    targets: dict | None = None  # of target_places(), where they are asked for

    def __len__(self):
        return len(self.image)

    def fetch(self, index, place):
        """A patch of each of some volumes. index [B]; place [B, 3]: see part_at() -> Fetched"""
        index = index.tolist()
        parts = [part_at(self.image[i].shape[1:], self.size, at) for i, at in zip(index, place)]
        image = torch.stack([self.image[i][:, *part] for i, part in zip(index, parts)])
        label = None
        if self.label is not None:
            label = torch.stack([self.label[i][part] for i, part in zip(index, parts)])
        mean = torch.tensor([self.mean[i] for i in index], device=image.device)  # [B]
        std = torch.tensor([self.std[i] for i in index], device=image.device)
        return Fetched(image, label, mean, std)

    def to(self, device):
        """Moves the tensors to a device, in place. -> itself"""
        self.image = [volume.to(device) for volume in self.image]
        if self.label is not None:
            self.label = [volume.to(device) for volume in self.label]
        return self

    def __add__(self, other):
        return joined(self, other)


def joined(a, b):
    """Two Samples, or two Volumes, one after the other.

    Images of mixed types become float32. Labels are kept only if both have them.
    """
    parts = {}
    for name, mine in vars(a).items():
        theirs = getattr(b, name)
        if mine is None or theirs is None:
            parts[name] = None
        elif torch.is_tensor(mine):
            parts[name] = torch.cat([mine, theirs])
        else:
            parts[name] = mine + theirs if isinstance(mine, list) else mine
    return type(a)(**parts)


def standardized(fetched, device):
    """Fetched samples on a device, each case, or channel of it, brought to mean 0, deviation 1.

    -> images [B, C, *S] float32, labels [B, *S] int64 or None
    """
    image, label, mean, std = (
        None if part is None else part.to(device, non_blocking=True) for part in fetched
    )
    shape = len(image), -1, *(1 for _ in image.shape[2:])  # [B, 1 or C, 1, 1(, 1)]
    image = (image.float() - mean.reshape(shape)) / std.reshape(shape)
    return image, None if label is None else label.long()


# --------------------------------------------------------------------------- samples in their file


class Item(NamedTuple):
    """A sample of Stored."""

    path: str
    split: str
    entry: h5.Entry
    z: int | None  # of a slice; None: a patch of the volume
    mean: float | tuple  # intensity of the sample's whole case, or of its channels
    std: float | tuple


class Stored:
    """What load_slices() or load_volumes() would hold in memory, left in its file.

    fetch() gives the same. Each process opens the file for itself, so that an object may be handed
    to the workers of a DataLoader, forked or spawned. Of a volume only the slice, or the blocks of
    the file that a patch touches, are read.
    """

    def __init__(self, info, split, size, names=None, labels=True):
        """Arguments and errors of load_slices() and load_volumes().

        Wrong pixels are found when they are read.
        """
        self.size = size
        self.labels = labels
        self.targets = None  # as in Volumes
        self.infos = {info.path: info}
        self.files = {}  # (process, path) -> the open file
        self.items = []
        for entry in _entries(info, split, names, labels):
            slices = range(_slices(entry)) if isinstance(size, int) else [None]
            mean_std = _stored_mean(info, split, entry)
            self.items += [Item(info.path, split, entry, z, *mean_std) for z in slices]

    def __len__(self):
        return len(self.items)

    @property
    def case(self):
        """[N] names, as in Samples."""
        return [item.entry.name for item in self.items]

    def fetch(self, index, place):
        """Some samples, read now. index [B]; place [B, 3]: see part_at() -> Fetched"""
        items = [self.items[i] for i in index.tolist()]
        image, label = zip(*map(self._read, items, place))
        return Fetched(
            image=torch.from_numpy(np.stack(image)),
            label=torch.from_numpy(np.stack(label)) if self.labels else None,
            mean=torch.tensor([item.mean for item in items]),
            std=torch.tensor([item.std for item in items]),
        )

    def _read(self, item, place):
        """-> image [C, *S], label [*S] or None"""
        path, split, entry, z, *_ = item
        if z is None:
            part = self._patch(entry, place)
        else:
            part = (slice(z, z + 1),) if len(entry.grid) == 3 else ()
        image, label = h5.read_case(
            self._file(path), self.infos[path], split, entry.name, self.labels, part
        )
        image = h5.channels_first(image, self.infos[path].channels)  # [C, D, H, W]
        if z is None:
            label = at_least(label, self.size) if self.labels else None
            return at_least(image, self.size), label
        label = resize_label(label[0], self.size) if self.labels else None
        return as_slice(image[:, 0], self.size), label

    def _patch(self, entry, place):
        """The slices of the stored volume that a patch takes: all of an axis that is too short."""
        mirrored = tuple(map(max, entry.grid, self.size))
        parts = part_at(mirrored, self.size, place)
        return tuple(
            slice(None) if n < s else part for n, s, part in zip(entry.grid, self.size, parts)
        )

    def _file(self, path):
        """The file, opened by this process: a forked one must not share that of its parent."""
        process = os.getpid()
        if (process, path) not in self.files:
            self.files = {key: f for key, f in self.files.items() if key[0] == process}
            self.files[process, path] = h5.open_file(path)
        return self.files[process, path]

    def __getstate__(self):
        return self.__dict__ | {"files": {}}

    def __add__(self, other):
        """Both, one after the other. Labels are kept only if both have them."""
        both = copy.copy(self)
        both.labels = self.labels and other.labels
        both.infos = self.infos | other.infos
        both.items = self.items + other.items
        return both


def _slices(entry):
    """The number of slices of a case."""
    return entry.grid[0] if len(entry.grid) == 3 else 1


def _stored_mean(info, split, entry):
    """What to scale a case by, as its file says. Old files do not say it."""
    if entry.mean is not None or not info.standardize:
        return h5.scaling(info, entry.mean, entry.std)
    with h5.open_file(info.path) as f:
        image, _ = h5.read_case(f, info, split, entry.name, label=False)
    return h5.scaling(info, *h5.mean_and_std(image, info.channel_names))


# ---------------------------------------------------------------------------------------- loading


class WholeCase(NamedTuple):
    """A case as its file has it."""

    name: str
    image: np.ndarray  # [C, D, H, W]; D is 1 for a plain image
    label: np.ndarray | None  # (D, H, W)
    mean: float | tuple  # see h5.scaling()
    std: float | tuple


def whole_cases(info, split, names=None, labels=True):
    """Yields the named cases of a split, or all of them, as WholeCase.

    InputError: see _entries(); also where another file has taken the place of the one in `info`.

    Labels are read only where they are asked for.
    """
    entries = _entries(info, split, names, labels)
    with h5.open_file(info.path) as f:
        for entry in entries:
            h5.check_unchanged(f, info, split, entry)
            image, label = h5.read_case(f, info, split, entry.name, labels)
            mean, std = h5.scaling(info, *h5.mean_and_std(image, info.channel_names))
            image = h5.channels_first(image, info.channels)
            yield WholeCase(entry.name, image, label, mean, std)


def _entries(info, split, names=None, labels=False):
    """The entries of the named cases of a split, or all of them, in the file's order.

    InputError if there is none, and, where labels are asked for, for a case without one.
    """
    entries = info.entries(split)
    if names is not None:
        names = set(names)
        entries = [entry for entry in entries if entry.name in names]
    if not entries:
        raise InputError(f"{info.path}: no case to read in split '{split}'")
    if labels and (bare := [entry.name for entry in entries if not entry.labeled]):
        raise InputError(f"{info.path}: /{split}/{bare[0]} has no label, but one is needed here")
    return entries


def load_slices(info, split, size, names=None, labels=True):
    """All slices of the named cases, or of all cases, resized to size x size. -> Samples"""
    cases = whole_cases(info, split, names, labels)
    return _stacked([one for case in cases for one in slices_of(case, size)])


def load_patches(info, split, size, corners):
    """Patches of volumes. -> Samples

    size: (D, H, W); corners: {case: [(z, y, x), ...]}, each within the volume.
    """
    cases = whole_cases(info, split, corners)
    return _stacked([one for case in cases for one in patches_of(case, size, corners[case.name])])


def load_samples(info, split, size, names=None):
    """What stands for whole cases on the network's grid. -> Samples

    These are all slices, or the fewest patches that cover the volumes.
    """
    if info.dims == 2:
        return load_slices(info, split, size, names)
    cases = whole_cases(info, split, names)
    return _stacked([one for case in cases for one in parts_of(case, size)])


def load_volumes(info, split, size, names=None, labels=True):
    """The named volumes of a split, or all of them, for patches of `size` (D, H, W). -> Volumes"""
    volumes = Volumes([], [], [], [] if labels else None, [], tuple(size))
    for case in whole_cases(info, split, names, labels):
        image = np.ascontiguousarray(at_least(case.image, size))
        volumes.image.append(torch.from_numpy(image))
        volumes.mean.append(case.mean)
        volumes.std.append(case.std)
        volumes.case.append(case.name)
        if labels:
            volumes.label.append(torch.from_numpy(at_least(case.label, size)))
    return volumes


def showcase(info, split, size, most=16):
    """One sample of each of at most `most` cases, evenly spread. -> Samples

    It is the slice, or the patch, with the most foreground.
    """
    entries = info.entries(split)
    names = [entry.name for entry in entries[:: -(-len(entries) // most)]]
    found = []
    for case in whole_cases(info, split, names):
        found.append(max(parts_of(case, size), key=lambda one: np.count_nonzero(one.label)))
    return _stacked(found)


class _Sample(NamedTuple):
    """One row of Samples, as numpy arrays."""

    image: np.ndarray  # [C, *S]
    label: np.ndarray | None  # [*S]
    mean: float
    std: float
    case: str
    at: tuple


def slices_of(case, size):
    """All slices of a WholeCase, resized to size x size. -> list, for _stacked()"""
    found = []
    for z in range(case.image.shape[1]):
        label = None if case.label is None else resize_label(case.label[z], size)
        image = as_slice(case.image[:, z], size)
        found.append(_Sample(image, label, case.mean, case.std, case.name, (z,)))
    return found


def patches_of(case, size, corners):
    """Patches of a WholeCase, see load_patches(). -> list, for _stacked()"""
    volume = at_least(case.image, size)
    truth = None if case.label is None else at_least(case.label, size)
    found = []
    for corner in corners:
        part = tuple(slice(c, c + s) for c, s in zip(corner, size))
        label = None if truth is None else truth[part]
        image = volume[:, *part]
        found.append(_Sample(image, label, case.mean, case.std, case.name, tuple(corner)))
    return found


def parts_of(case, size):
    """The slices of a WholeCase, or the fewest patches that cover it. -> list, for _stacked()"""
    if isinstance(size, int):
        return slices_of(case, size)
    return patches_of(case, size, tiles(case.image.shape[1:], size))


def samples_of(case, size):
    """What load_samples() gives for one WholeCase. -> Samples"""
    return _stacked(parts_of(case, size))


def _stacked(found):
    """A list of _Sample -> Samples"""
    image, label, mean, std, case, at = zip(*found)
    return Samples(
        image=torch.from_numpy(np.stack(image)),
        mean=torch.tensor(mean),
        std=torch.tensor(std),
        label=None if label[0] is None else torch.from_numpy(np.stack(label)),
        case=list(case),
        at=list(at),
    )


def bytes_in_memory(info, split, size, names=None):
    """Bytes that load_slices() or load_volumes() of these cases would hold."""
    total = 0
    for entry in _entries(info, split, names):
        pixels = math.prod(shape_of(size)) * _slices(entry)
        if info.dims == 3:
            pixels = math.prod(map(max, entry.grid, size))
        total += pixels * (info.channels * entry.itemsize + 1)
    return total


# ------------------------------------------------------------------------------ the network's grid


def check_size(info, size):
    """--size, one whole number or three, for a file. -> (S,) or (D, H, W)

    InputError if it does not fit the file's dims, or is too small or too large.
    """
    text = f"--size {','.join(map(str, size))}"
    if info.dims == 2:
        if len(size) != 1:
            raise InputError(
                f"{text}: {info.path} is segmented slice by slice (dims=2), which takes one side; "
                "give one"
            )
        if not 32 <= size[0] <= 4096:
            raise InputError(
                f"{text}: slices need a side of at least 32 and at most 4096 pixels; give another"
            )
        return size
    size = size * 3 if len(size) == 1 else size
    if min(size) < 16 or math.prod(size) > 2**27:
        raise InputError(
            f"{text}: a patch needs at least 16 voxels per axis, and at most {2**27:,} together; "
            "give another"
        )
    return size


def network_grid(info, size):
    """What --size means for a file.

    size: a tuple of one or three whole numbers, or None. -> the side of slices (default 224), or
    (D, H, W) of patches (default 80, 112, 112). A note says which volumes are smaller than these.
    InputError as of check_size().
    """
    default = (224,) if info.dims == 2 else (80, 112, 112)
    size = check_size(info, size or default)
    if info.dims == 2:
        return size[0]
    volumes = [entry for entries in info.splits.values() for entry in entries]
    small = [entry for entry in volumes if any(n < s for n, s in zip(entry.grid, size))]
    if small:
        print(
            f"note: {len(small)} of {len(volumes)} volumes are smaller than a patch of "
            f"{' x '.join(map(str, size))}, among them {small[0].name} of "
            f"{' x '.join(map(str, small[0].grid))}; they are mirrored at their ends"
        )
    return size


def shape_of(size):
    """The *S of a network's grid: (S, S) of the side of slices, (D, H, W) of a patch as it is."""
    return (size, size) if isinstance(size, int) else tuple(size)


def resize_image(image, size):
    """(H, W[, C]) -> (S, S[, C]) for a side; (D, H, W) -> (*S,) for a size of three.

    Values are averaged along the axes that shrink, then interpolated linearly along those that
    grow.
    """
    shape = shape_of(size)
    if image.shape[: len(shape)] == shape:
        return image
    if len(shape) == 2 and image.ndim == 3 and image.shape[2] > 4:  # more than OpenCV takes
        return np.stack([resize_image(one, size) for one in np.moveaxis(image, 2, 0)], 2)
    small = tuple(map(min, image.shape, shape))
    if len(shape) == 2:
        image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
        return cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR)
    x = torch.from_numpy(image)[None, None].float()  # [1, 1, D, H, W]
    x = F.interpolate(x, small, mode="area")
    x = F.interpolate(x, shape, mode="trilinear", align_corners=False)
    if image.dtype == np.uint8:
        x = x.round()
    return x[0, 0].numpy().astype(image.dtype)


def resize_label(label, size):
    """(H, W) -> (S, S) for a side, nearest; (D, H, W) -> (*S,) for a size of three.

    In a volume that shrinks, a voxel gets the class of most voxels that it stands for.
    """
    shape = shape_of(size)
    if label.shape == shape:
        return label
    if len(shape) == 2:
        return cv2.resize(label, shape, interpolation=cv2.INTER_NEAREST_EXACT)
    if any(n < s for n, s in zip(label.shape, shape)):
        x = torch.from_numpy(label)[None, None]  # [1, 1, D, H, W]
        return F.interpolate(x, shape, mode="nearest-exact")[0, 0].numpy()
    classes = np.unique(label)
    shares = []  # of each class, [*S]
    for k in classes:
        x = torch.from_numpy(label == k)[None, None].float()
        shares.append(F.interpolate(x, shape, mode="area")[0, 0])
    return classes[torch.stack(shares).max(0).indices.numpy()]


def as_slice(image, size):
    """A slice as networks see it. [C, H, W] -> [C, S, S]"""
    resized = resize_image(np.moveaxis(image, 0, -1), size)  # without its last axis if C is 1
    return resized.reshape(size, size, -1).transpose(2, 0, 1)


# ----------------------------------------------------------------------------- patches of volumes


def at_least(volume, size):
    """A volume (..., D, H, W), mirrored on both sides of an axis that is shorter than in size."""
    missing = [max(0, s - n) for n, s in zip(volume.shape[-3:], size)]
    if not any(missing):
        return volume
    width = [(m // 2, m - m // 2) for m in missing]
    return np.pad(volume, [(0, 0)] * (volume.ndim - 3) + width, mode="symmetric")


def cut_back(volume, grid):
    """A volume without what at_least() added. (..., *larger) -> (..., D, H, W)"""
    first = [(n - g) // 2 for n, g in zip(volume.shape[-3:], grid)]
    return volume[(..., *(slice(f, f + g) for f, g in zip(first, grid)))]


def part_at(grid, size, place):
    """The slices of a patch of `size` in a grid that is no smaller.

    place [3]: the corner of the patch, as a share of where it could be, in [0, 1).
    """
    corner = [int(p * (n - s + 1)) for p, n, s in zip(place.tolist(), grid, size)]
    return tuple(slice(c, c + s) for c, s in zip(corner, size))


def starts(length, size, stride):
    """First positions of windows of `size` along an axis of `length`, `stride` apart.

    The last window is moved back to end with the axis.
    """
    last = max(0, length - size)
    return [*range(0, last, stride), last]


def tiles(grid, size):
    """Corners of the fewest patches of `size` that cover a volume. -> [(z, y, x), ...]"""
    return list(itertools.product(*(starts(n, s, s) for n, s in zip(grid, size))))


def random_corners(grid, size, count, rng, targets=(), share=0.0):
    """Corners of `count` patches at random places of a volume. -> [(z, y, x), ...]

    There are fewer where some coincide. rng: a generator of numpy. targets: of target_places(), for
    this volume; share: of the patches that lie around them.
    """
    ends = [max(0, n - s) + 1 for n, s in zip(grid, size)]
    corners = [tuple(int(rng.integers(end)) for end in ends) for _ in range(count)]
    for i in range(count if share else 0):
        place = place_of_target(targets, share, rng.random(3))
        if place is not None:
            corners[i] = tuple(int(p * end) for p, end in zip(place.tolist(), ends))
    return list(dict.fromkeys(corners))


# ------------------------------------------------------------------------ patches that hold targets

TARGETS = 2000  # voxels of a class of a case from which patches are drawn, at most


def target_share(info, share):
    """What --foreground means for a file: 1/3 unless given; 0 of slices. InputError for others."""
    if info.dims == 2 and share:
        raise InputError(
            f"--foreground {share:g}: is for volumes, but {info.path} is segmented slice by slice "
            "(dims=2); leave it out"
        )
    if share is None:
        return 1 / 3 if info.dims == 3 else 0.0
    return share


def target_places(info, split, size, names):
    """Places of patches of `size` that are centered on the foreground. InputError: see _entries()

    -> {case: [places [n, 3] float32 of each class that it holds]}; places: see part_at()
    """
    found = {}
    with h5.open_file(info.path) as f:
        for entry in _entries(info, split, names, labels=True):
            label = h5.read_label(f, info, split, entry.name)
            voxels = (np.flatnonzero(label == k) for k in range(1, len(info.classes)))
            found[entry.name] = [_places_around(v, label.shape, size) for v in voxels if len(v)]
    return found


def _places_around(voxels, grid, size):
    """Places of patches around some voxels, as far as the volume reaches. -> [n, 3] float32

    voxels: flat indices, of which at most TARGETS are drawn, always the same.
    """
    rng = np.random.default_rng(0)
    some = rng.choice(voxels, min(TARGETS, len(voxels)), replace=False)
    center = np.stack(np.unravel_index(some, grid), 1)  # [n, 3]
    last = np.maximum(0, np.subtract(grid, size))
    corner = np.clip(center - np.array(size) // 2, 0, last)
    return ((corner + 0.5) / (last + 1)).astype(np.float32)


def place_of_target(classes, share, chance):
    """The place of a patch around a target, its class drawn first. -> [3], or None: anywhere

    classes: of target_places(), for one case; chance [3] in [0, 1): draws whether, class and voxel
    """
    whether, which, voxel = chance
    if whether >= share or not classes:
        return None
    places = classes[int(which * len(classes))]
    return places[int(voxel * len(places))]
