"""Data sets larger than memory: slices and patches that are read from the file when a batch asks for them.

Legend: N samples, B batch, C channels, *S the grid that a network sees: S, S of slices, or D, H, W of patches of volumes.
"""

import math
import os
from pathlib import Path

import numpy as np
import psutil
import torch

from data import h5
from data.files import InputError


class Stored:
    """What h5.load_slices or h5.load_volumes would hold in memory, left in its file; fetch() gives the same.

    Each process opens the file for itself, so that an object may be handed to the workers of a DataLoader, forked or spawned. Of a volume
    only the slice, or the blocks of the file that a patch touches, are read.
    """

    def __init__(self, info, split, size, names=None, labels=True):
        """Arguments, and errors, of h5.load_slices and h5.load_volumes; wrong pixels are found when they are read."""
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
        """The samples of some numbers. index [B]; place [B, 3]: see h5.Volumes. -> image [B, C, *S], label [B, *S] or None, mean [B], std [B]"""
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
                    entry.grid, size, h5.part_at(tuple(map(max, entry.grid, size)), size, place)
                )
            )
        else:
            part = (slice(z, z + 1),) if len(entry.grid) == 3 else ()
        image, label = h5.read_case(self._file(path), info, split, entry.name, self.labels, part)
        if z is None:
            image, label = (
                h5.at_least(image, size)[None],
                h5.at_least(label, size) if self.labels else None,
            )
        else:
            image = h5.as_slice(image[0], size)
            label = h5.resize_label(label[0], size) if self.labels else None
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
        return h5.moments(h5.read_case(f, info, split, name, label=False)[0])
    mean, std = (h5.attribute(case, key, float, where) for key in ("mean", "std"))
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise InputError(
            f"{where}: mean {mean}, std {std} are not those of an image; convert the data again"
        )
    return mean, std


def bytes_in_memory(info, split, size, names=None):
    """What h5.load_slices or h5.load_volumes of these cases would hold."""
    names = None if names is None else set(names)
    entries = [e for e in info.splits[split] if names is None or e.name in names]
    if isinstance(size, int):
        return sum(
            (e.grid[0] if len(e.grid) == 3 else 1) * size**2 * (info.channels * e.itemsize + 1)
            for e in entries
        )
    return sum(math.prod(map(max, e.grid, size)) * (e.itemsize + 1) for e in entries)


def free_memory():
    """Bytes of main memory that are free: of the machine, and within the limits of this process's control groups (containers, batch systems),
    of which others of the group may have taken a part that is not known here."""
    free, mine = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    for limit in group_limits():
        free = min(free, limit - mine)
    return max(0, free)


def group_limits(root="/sys/fs/cgroup", mine="/proc/self/cgroup"):
    """Memory limits in bytes of the control groups around this process, of version 1 and 2; none where there are no groups."""
    try:
        with open(mine) as f:
            lines = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:
        return
    for _, controllers, path in lines:
        version = 2 if controllers == "" else 1 if "memory" in controllers.split(",") else None
        top = Path(root, *["memory"] * (version == 1))
        for group in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents) if version else ():
            file = group / ("memory.max" if version == 2 else "memory.limit_in_bytes")
            if (
                top in (group, *group.parents)
                and file.is_file()
                and (limit := file.read_text().strip()) != "max"
            ):
                yield int(limit)
