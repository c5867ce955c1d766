"""One HDF5 file per dataset: the schema, and writing, checking, reading and previewing it.

    python -m data.h5 FILE [--preview FILE.png]

    attrs: format=1, name, classes (background first), dims (2 or 3: how it is segmented), channels (1 or 3)
    /<split>/<case>/image   (H, W) or (H, W, 3), or a volume (D, H, W); uint8 or float32
    /<split>/<case>/label   uint8 on the image's grid; absent where there is none
             attrs         patient, spacing (mm per axis), spacing_known, source
    split: train, val, test, unlabeled; cases keep the order in which they were written

Legend: N slices, B batch, K classes, C channels, D depth, H height, W width, S side of the square training grid.
"""
import os
import zlib
from dataclasses import dataclass

import cv2
import h5py
import numpy as np
import torch

from data.files import FORMAT, InputError, Parser, cli, replacing

SPLITS = ("train", "val", "test", "unlabeled")
COLORS = np.array([[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0]]) / 255
#        Okabe and Ito's palette: distinguishable for color-blind readers


@dataclass
class Case:
    """One image or volume. image: (H, W), (H, W, 3) or (D, H, W); label: the same grid, uint8, or None."""
    split: str
    name: str
    image: np.ndarray
    label: np.ndarray | None
    patient: str
    spacing: tuple | None = None  # mm per axis, None if the source has none
    source: str = ""


@dataclass
class Entry:
    """What a file says of a case without its pixels."""
    name: str
    patient: str
    grid: tuple       # (H, W) or (D, H, W)
    labeled: bool
    spacing: tuple    # per axis of the grid, 1.0 where unknown
    spacing_known: bool
    source: str
    checksum: int     # CRC-32 of image and label, taken when they were written


@dataclass
class Info:
    """An opened and checked dataset. splits maps a split's name to its entries, in order."""
    path: str
    name: str
    classes: list
    dims: int
    channels: int
    splits: dict
    checksum: int  # of all cases, as written

    def describe(self):
        """What a checkpoint says of the data it was made for."""
        return dict(name=self.name, classes=self.classes, channels=self.channels, dims=self.dims, checksum=self.checksum)

    def entries(self, split):
        """The entries of a split; an absent or empty one is an error."""
        if not self.splits.get(split):
            raise InputError(f"{self.path}: split '{split}' is empty (it has: {', '.join(self.splits) or 'nothing'})")
        return self.splits[split]


# ---------------------------------------------------------------------------------------------------- writing

def write(path, cases, *, name, classes, dims, channels):
    """Writes cases (an iterable of Case) to `path`, whole or not at all, and returns its Info.

    InputError names the case whose shapes, types, values or patient contradict the schema.
    """
    if len(classes) < 2 or dims not in (2, 3) or channels not in (1, 3):
        raise InputError(f"{path}: {len(classes)} classes, dims {dims}, channels {channels}: needs 2 or more, 2|3, 1|3")
    with replacing(path) as temporary:
        with h5py.File(temporary, "w", track_order=True) as f:
            f.attrs.update(format=FORMAT, name=name, classes=list(classes), dims=dims, channels=channels)
            for case in cases:
                _check_case(path, case, len(classes), channels)
                group = f.require_group(case.split) if case.split in f else f.create_group(case.split, track_order=True)
                if case.name in group:
                    raise InputError(f"{path}: case '{case.name}' comes twice in split '{case.split}'")
                _write_case(group.create_group(case.name), case, channels)
            patients = {s: {g.attrs["patient"] for g in f[s].values()} for s in f}
        if not patients:
            raise InputError(f"{path}: no case was found, so nothing was written")
        _check_patients(path, patients)
    return read_info(path)


def _check_case(path, case, K, channels):
    where = f"{path}: case '{case.name}'"
    grid = case.image.shape[:-1] if channels == 3 else case.image.shape
    if not case.name or "/" in case.name or case.name.startswith("."):
        raise InputError(f"{where}: a case's name must not be empty, start with a dot or contain a slash")
    if case.split not in SPLITS:
        raise InputError(f"{where}: split '{case.split}' is none of {', '.join(SPLITS)}")
    if case.image.dtype not in (np.uint8, np.float32):
        raise InputError(f"{where}: image of type {case.image.dtype}; uint8 or float32 is needed")
    if len(grid) not in (2, 3) or min(grid) < 1 or (channels == 3 and case.image.shape[-1] != 3):
        raise InputError(f"{where}: image of shape {case.image.shape} does not fit {channels} channel(s)")
    if not np.isfinite(case.image).all():
        raise InputError(f"{where}: image has NaN or infinite pixels")
    if case.label is not None:
        if case.label.shape != grid:
            raise InputError(f"{where}: label of shape {case.label.shape}, image of {grid} ({case.source})")
        if case.label.dtype != np.uint8:
            raise InputError(f"{where}: label of type {case.label.dtype}; uint8 class numbers are needed")
        if case.label.max() >= K:
            raise InputError(f"{where}: label values up to {case.label.max()}, but there are {K} classes (0 to {K - 1})")
    if case.spacing is not None and (len(case.spacing) != len(grid) or not all(s > 0 for s in case.spacing)):
        raise InputError(f"{where}: spacing {case.spacing} does not fit the grid {grid}")


def _write_case(group, case, channels):
    grid = case.image.shape[:-1] if channels == 3 else case.image.shape
    pack = dict(compression="gzip", compression_opts=1, shuffle=True)
    whole_slice = (1, *grid[1:]) if len(grid) == 3 else grid  # a slice of a volume is read alone
    group.create_dataset("image", data=case.image, chunks=(*whole_slice, 3) if channels == 3 else whole_slice, **pack)
    if case.label is not None:
        group.create_dataset("label", data=case.label, chunks=whole_slice, **pack)
    spacing = case.spacing or (1.0,) * len(grid)
    group.attrs.update(patient=str(case.patient), spacing=np.float64(spacing), spacing_known=case.spacing is not None,
                       source=case.source, checksum=zlib.crc32(case.image.tobytes(), zlib.crc32(b"" if case.label is None else case.label.tobytes())))


def _check_patients(path, patients):
    splits = list(patients)
    for i, a in enumerate(splits):
        for b in splits[i + 1:]:
            if both := sorted(patients[a] & patients[b]):
                raise InputError(f"{path}: patient '{both[0]}' is in both '{a}' and '{b}' ({len(both)} such patients); "
                                 "split by patient")


# ---------------------------------------------------------------------------------------------------- reading

def open_file(path):
    """h5py.File for reading; a missing or damaged file is an InputError."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError:
        raise InputError(f"{path}: not a readable HDF5 file (truncated?); convert the data again") from None


def read_info(path):
    """Opens a dataset file, checks its structure (not its pixels), and returns its Info."""
    with open_file(path) as f:
        a = f.attrs
        if a.get("format") != FORMAT or not {"name", "classes", "dims", "channels"} <= set(a):
            raise InputError(f"{path}: not a dataset of this project (format {FORMAT}); see python -m data.h5 --help")
        classes = [c.decode() if isinstance(c, bytes) else str(c) for c in a["classes"]]
        name, dims, channels = str(a["name"]), int(a["dims"]), int(a["channels"])
        if len(classes) < 2 or dims not in (2, 3) or channels not in (1, 3):
            raise InputError(f"{path}: {len(classes)} classes, dims {dims}, channels {channels}: needs 2 or more, 2|3, 1|3")
        try:
            splits = {s: [_entry(path, s, n, g, channels) for n, g in f[s].items()] for s in SPLITS if s in f}
        except (KeyError, AttributeError, RuntimeError, OSError) as error:
            raise InputError(f"{path}: damaged or incomplete ({error}); convert the data again") from None
    _check_patients(path, {s: {e.patient for e in entries} for s, entries in splits.items()})
    checksum = zlib.crc32(repr([(s, e.name, e.checksum) for s in splits for e in splits[s]]).encode())
    return Info(path, name, classes, dims, channels, splits, checksum)


def _entry(path, split, name, group, channels):
    image, where = group["image"], f"{path}: /{split}/{name}"
    grid = tuple(image.shape[:-1] if channels == 3 else image.shape)
    if image.dtype not in (np.uint8, np.float32) or len(grid) not in (2, 3):
        raise InputError(f"{where}/image: {image.dtype} of shape {image.shape} does not fit {channels} channel(s)")
    if "label" in group and group["label"].shape != grid:
        raise InputError(f"{where}/label: shape {group['label'].shape}, but the image has {grid}")
    return Entry(name, str(group.attrs["patient"]), grid, "label" in group, tuple(map(float, group.attrs["spacing"])),
                 bool(group.attrs["spacing_known"]), str(group.attrs["source"]), int(group.attrs.get("checksum", 0)))


def read_case(f, info, split, name, label=True):
    """Pixels of one case of an open file. -> image (D, H, W[, 3]) (D = 1 for an image), label (D, H, W) or None."""
    group, where = f[split][name], f"{info.path}: /{split}/{name}"
    try:
        image = group["image"][:]
        y = group["label"][:] if label and "label" in group else None
    except (OSError, KeyError) as error:
        raise InputError(f"{where}: cannot be read ({error}); convert the data again") from None
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise InputError(f"{where}/image: NaN or infinite pixels")
    if y is not None and (y.dtype != np.uint8 or y.max() >= len(info.classes)):
        raise InputError(f"{where}/label: value {y.max()}, but the file has {len(info.classes)} classes "
                         f"(0 to {len(info.classes) - 1})")
    if image.ndim - (info.channels == 3) == 2:
        image, y = image[None], None if y is None else y[None]
    return image, y


def choose_labeled(info, spec, seed=None):
    """Names of the train cases whose labels may be read, and of all others.

    spec: "7" takes the first 7 patients that have labels, "0.1" that fraction of them, "all" every one.
    seed: draws the patients at random instead of taking the first ones.
    """
    train = info.entries("train")
    patients = list(dict.fromkeys(e.patient for e in train if e.labeled))
    try:
        n = len(patients) if spec == "all" else round(float(spec) * len(patients)) if "." in spec else int(spec)
    except ValueError:
        raise InputError(f"--labeled {spec}: a number of patients (7), a fraction (0.1) or 'all' is needed") from None
    if not patients:
        raise InputError(f"{info.path}: no train case has a label")
    if not 1 <= n <= len(patients):
        raise InputError(f"--labeled {spec}: that is {n} patients, and {info.path} has {len(patients)} labeled train patients")
    if seed is not None:
        patients = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    chosen = set(patients[:n])
    labeled = [e.name for e in train if e.labeled and e.patient in chosen]
    return labeled, [e.name for e in train if e.name not in set(labeled)]


# ---------------------------------------------------------------------------------------------------- slices for 2D networks

@dataclass
class Slices:
    """2D slices on one S x S grid, in memory. A plain image is one slice; a volume gives D."""
    image: torch.Tensor         # [N, C, S, S] uint8 or float32, as stored
    mean: torch.Tensor          # [N] intensity of the slice's whole case
    std: torch.Tensor           # [N]
    label: torch.Tensor | None  # [N, S, S] uint8
    case: list                  # [N] names
    z: list                     # [N] index in the case

    def __len__(self):
        return len(self.image)

    def batch(self, index, device="cpu"):
        """Standardized images [B, C, S, S] float32, and labels [B, S, S] int64 or None."""
        x = self.image[index].to(device, torch.float32)
        mean, std = (v[index].to(device)[:, None, None, None] for v in (self.mean, self.std))
        y = None if self.label is None else self.label[index].to(device, torch.int64)
        return (x - mean) / std, y


def standard(image):
    """Mean and standard deviation of a case's intensities (all channels together: color is kept)."""
    return float(image.mean(dtype=np.float64)), max(float(image.std(dtype=np.float64)), 1e-6)


def resize_image(image, size):
    """(H, W[, 3]) -> (S, S[, 3]); averages when shrinking."""
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if min(image.shape[:2]) >= size else cv2.INTER_LINEAR)


def resize_label(label, size):
    """(H, W) -> (S, S), nearest."""
    return cv2.resize(label, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def load_slices(info, split, size, names=None, labels=True):
    """All slices of the named cases of a split (default: every case), resized to size x size."""
    if info.dims != 2:
        raise InputError(f"{info.path}: made to be segmented in 3D (dims=3), but only 2D networks exist here so far; "
                         "convert it with --dims 2 to train on its slices")
    images, ys, means, stds, cases, zs = [], [], [], [], [], []
    with open_file(info.path) as f:
        for name in [e.name for e in info.entries(split)] if names is None else names:
            image, label = read_case(f, info, split, name, labels)
            if labels and label is None:
                raise InputError(f"{info.path}: /{split}/{name} has no label, but one is needed here")
            mean, std = standard(image)
            for z in range(len(image)):
                images.append(resize_image(image[z], size).reshape(size, size, -1).transpose(2, 0, 1))
                ys.append(resize_label(label[z], size) if labels else None)
                means.append(mean), stds.append(std), cases.append(name), zs.append(z)
    if not images:
        raise InputError(f"{info.path}: no case to read in split '{split}'")
    return Slices(torch.from_numpy(np.stack(images)), torch.tensor(means), torch.tensor(stds),
                  torch.from_numpy(np.stack(ys)) if labels else None, cases, zs)


def join(parts):
    """Several Slices as one (images of mixed types become float32); labels are kept only if all have them."""
    same = len({p.image.dtype for p in parts}) == 1
    labeled = all(p.label is not None for p in parts)
    return Slices(torch.cat([p.image if same else p.image.float() for p in parts]),
                  torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]),
                  torch.cat([p.label for p in parts]) if labeled else None,
                  sum((p.case for p in parts), []), sum((p.z for p in parts), []))


# ---------------------------------------------------------------------------------------------------- showing

def pyplot():
    """matplotlib.pyplot without a display, imported only where something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, path):
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
    pyplot().close(figure)


def draw(axis, image, label=None, title="", style="-"):
    """Shows a slice (H, W) or (H, W, 3) on a matplotlib axis with the outline of each class of label (H, W)."""
    low, high = float(image.min()), float(image.max())
    axis.imshow((image - low) / max(high - low, 1e-6), cmap="gray", vmin=0, vmax=1)
    for k in range(1, 0 if label is None else int(label.max()) + 1):
        if 0 < (label == k).sum():
            axis.contour(label == k, [0.5], colors=[COLORS[(k - 1) % len(COLORS)]], linewidths=1.4, linestyles=style)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def legend(figure, classes):
    """A legend of the foreground classes' colors under the figure."""
    from matplotlib.lines import Line2D
    figure.legend(handles=[Line2D([], [], color=COLORS[(k - 1) % len(COLORS)], label=c) for k, c in enumerate(classes) if k],
                  loc="outside lower center", ncols=min(len(classes), 6), fontsize=8, frameon=False)


def middle(label, depth):
    """The slice to show: the one with the most foreground, or the middle one."""
    return depth // 2 if label is None or not label.any() else int((label > 0).sum((1, 2)).argmax())


def preview(info, path, count=4):
    """Draws `count` cases per split, evenly spread, with outlines, to a picture."""
    splits = [s for s in info.splits if info.splits[s]]
    figure, axes = pyplot().subplots(len(splits), count, figsize=(2.4 * count, 2.7 * len(splits)), squeeze=False, layout="constrained")
    with open_file(info.path) as f:
        for row, split in zip(axes, splits):
            entries = info.splits[split]
            for axis, i in zip(row, range(count)):
                axis.axis("off")
                if i < len(entries):
                    entry = entries[i * len(entries) // min(count, len(entries))]
                    image, label = read_case(f, info, split, entry.name)
                    z = middle(label, len(image))
                    draw(axis, image[z], None if label is None else label[z], f"{split}: {entry.name}")
    legend(figure, info.classes)
    save_figure(figure, path)


def summary(info):
    """Reads every pixel and label (so it validates the file) and returns a few lines of text."""
    lines = [f"{info.path}: {info.name}, segmented in {info.dims}D, {info.channels} channel(s), "
             f"classes {', '.join(f'{k} {c}' for k, c in enumerate(info.classes))}"]
    with open_file(info.path) as f:
        for split, entries in info.splits.items():
            count, sizes, spacings = np.zeros(len(info.classes)), {e.grid for e in entries}, set()
            for e in entries:
                _, label = read_case(f, info, split, e.name)
                spacings.add(" x ".join(f"{s:g}" for s in e.spacing) + " mm" if e.spacing_known else "unknown")
                if label is not None:
                    count += np.bincount(label.ravel(), minlength=len(count))
            size = " to ".join(dict.fromkeys(" x ".join(map(str, g)) for g in (min(sizes), max(sizes)))) if sizes else "-"
            shares = ", ".join(f"{c} {n / max(count.sum(), 1):.3f}" for c, n in zip(info.classes, count))
            lines.append(f"  {split:10s} {len(entries)} cases, {sum(e.labeled for e in entries)} labeled, "
                         f"{len({e.patient for e in entries})} patients, grid {size}, spacing {' / '.join(sorted(spacings)[:3])}")
            lines.append(f"  {'':10s} share of pixels: {shares}")
    return "\n".join(lines)


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.h5")
    p.add_argument("file", help="dataset to validate and describe")
    p.add_argument("--preview", metavar="FILE.png", help="draw samples of each split with outlines")
    args = p.parse_args(argv)
    info = read_info(args.file)
    print(summary(info))
    if args.preview:
        preview(info, args.preview)
        print(f"wrote {args.preview}")


if __name__ == "__main__":
    cli(main)
