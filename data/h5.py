"""One HDF5 file per dataset: the schema, and writing, checking, reading and previewing it.

    python -m data.h5 FILE [--preview FILE.png]

    attrs: format=1, name, classes (background first), dims (2 or 3: how it is segmented),
           channels (1 to 64), channel_names (absent: "image", or red, green, blue),
           standardize (whether readers bring each case to zero mean and unit variance, or whether
           they do it to each channel; CT comes ready from its clip window),
           prepared (JSON: what a converter did to images, so that new ones can be prepared alike;
           absent where nobody says)
    /<split>/<case>/image   (H, W), or a volume (D, H, W), of several channels (H, W, C) or
                            (D, H, W, C); uint8 or float32
    /<split>/<case>/label   uint8 on the image's grid; absent where there is none
    /<split>/<case>/source_label   uint8 on source_grid: the label before it was resampled
             attrs         patient, spacing (mm per axis), spacing_known, source, checksum, mean and
                           std of the image, or of each channel unless they are colors;
                           affine where the source has a place in space, source_grid where it
                           has another grid than image;
                           nifti_header (uint8, 348 bytes, without its texts) of a NIfTI source,
                           source_checksum of source_label
    A NIfTI source may have been turned to the body axes of the others (prepared: axes). affine,
    source_grid and source_label are of the source on the axes of image; nifti_header has its own.
    split: train, val, test, unlabeled; cases keep the order in which they were written

A file may come from anybody: it is read only as far as it is plain. A link, data that lie elsewhere
(external storage, virtual datasets), sizes that the file does not hold, and a wrong kind, type or
shape are refused when it is opened; wrong pixels, labels and checksums when they are read.

Legend: K classes, C channels, D depth, H height, W width.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shlex
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import h5py
import numpy as np
import psutil

from data import figures
from data.files import (
    FORMAT,
    HDF5,
    NO_LOCKS,
    InputError,
    absent,
    errno_of,
    kind_of,
    replacing,
    unreadable,
)
from data.labels import without
from data.options import Parser, cli, picture

SPLITS = ("train", "val", "test", "unlabeled")
LARGE = 2**30  # bytes from which on a dataset must prove that it holds what it declares
SMALLEST = 8  # pixels of an image's side in the plane
RGB = ["red", "green", "blue"]
NEEDED = {"format", "name", "classes", "dims", "channels"}  # attributes of a dataset file


@dataclass
class Case:
    """One image or volume, to be written."""

    split: str
    name: str
    image: np.ndarray  # (H, W) or (D, H, W), or with a last axis of several channels
    label: np.ndarray | None  # uint8 on the image's grid
    patient: str
    spacing: tuple | None = None  # mm per axis, None if the source has none
    source: str = ""
    affine: np.ndarray | None = None  # [4, 4] of the source, voxel (x, y, z) -> mm, as in NIfTI
    source_grid: tuple | None = None  # of the source, where the image was resampled
    nifti_header: np.ndarray | None = None  # [348] uint8 of a NIfTI source, see data/space.py
    source_label: np.ndarray | None = None  # uint8 on source_grid


@dataclass
class Entry:
    """What a file says of a case without its pixels."""

    name: str
    patient: str
    grid: tuple  # (H, W) or (D, H, W)
    labeled: bool
    spacing: tuple  # per axis of the grid, 1.0 where unknown
    spacing_known: bool
    source: str
    checksum: int  # CRC-32 of image and label, taken when they were written
    affine: np.ndarray | None = None  # of the source, see Case
    source_grid: tuple | None = None
    itemsize: int = 1  # bytes of a number of the image
    nifti_header: np.ndarray | None = None  # of the source, see Case
    source_labeled: bool = False  # whether the label is there on source_grid, too
    mean: float | tuple | None = None  # see mean_and_std(); None in files of older versions
    std: float | tuple | None = None

    @property
    def source_spacing(self):
        """mm per axis of the source's grid, or pixels where no spacing is known."""
        if self.source_grid is None or not self.spacing_known:
            return self.spacing
        if self.affine is None:
            return tuple(s * n / m for s, n, m in zip(self.spacing, self.grid, self.source_grid))
        from data import space  # brings nibabel, which pictures do not need

        return space.spacing_of(self.affine)

    @property
    def aspect(self):
        """Height of a pixel of its slices over its width."""
        return self.spacing[-2] / self.spacing[-1]


@dataclass
class Info:
    """An opened and checked dataset."""

    path: str
    name: str
    classes: list
    dims: int
    channels: int
    splits: dict  # {split: its entries, in order}
    checksum: int  # of all cases, as written
    channel_names: list  # [C]
    standardize: bool | list = True  # a list: of each channel
    prepared: dict | None = None  # see write()
    shown: int = 0  # the channel that pictures show, unless they show colors
    spacing: list | None = None  # mm per axis that networks see: the median of what cases know

    @property
    def color(self):
        """Whether the channels are colors, which have one scale of intensities."""
        return self.channel_names == RGB

    def describe(self):
        """What a checkpoint says of the data it was made for."""
        known = {k: v for k, v in vars(self).items() if k not in ("path", "splits", "shown")}
        train = [(entry.name, entry.patient) for entry in self.splits.get("train", ())]
        return known | {"patients_checksum": zlib.crc32(repr(train).encode())}

    def picture(self, image):
        """What pictures show of an image [C, *S]: the colors (*S, 3), or one channel (*S)."""
        return np.moveaxis(image, 0, -1) if self.color else image[self.shown]

    def entries(self, split):
        """The entries of a split. InputError if it is absent or empty."""
        if not self.splits.get(split):
            raise InputError(
                f"{self.path}: split '{split}' is empty (it has: "
                f"{', '.join(self.splits) or 'nothing'}); convert the data again with lists, "
                "folders or shares that fill it"
            )
        return self.splits[split]


# ----------------------------------------------------------------------------------------- writing


def write(
    path,
    cases,
    *,
    name,
    classes,
    dims,
    channels,
    channel_names=None,
    standardize=True,
    prepared=None,
):
    """Writes cases (an iterable of Case) to `path`, whole or not at all. -> Info

    channel_names: C texts; RGB are colors. None: of one channel "image", of three of slices RGB.
    standardize: whether readers do it; a list: to each channel.
    prepared: what was done to the images, for data/new_images.py to do it to new ones: a dict with
    "from" ("pictures", "nifti" or "ssl4mis"), of pictures in a folder for each channel "folders",
    and, of NIfTI, the entries of nifti.Preparation; None: nobody knows.
    InputError names the case whose shapes, types, values or patient contradict the schema; it is
    raised, too, where `path` is a file that is no dataset.
    """
    check_text(path, "the dataset's name", name)
    _check_replaced(path)
    _remove_left(path)
    usual = usual_names(channels, dims)
    names = usual if channel_names is None else list(channel_names)
    _check_layout(path, classes, dims, channels, names)
    if isinstance(standardize, list):
        standardize = _one_for_all(path, standardize, names)
    with replacing(path) as temporary:
        with h5py.File(temporary, "w", track_order=True, locking=False) as f:  # nobody else's
            f.attrs.update(
                format=FORMAT,
                name=name,
                classes=list(classes),
                dims=dims,
                channels=channels,
                standardize=standardize,
            )
            if names != usual:
                f.attrs["channel_names"] = names
            if prepared:
                f.attrs["prepared"] = json.dumps(prepared)
            for case in cases:
                _check_case(path, case, len(classes), channels, dims)
                _check_spread(f"{path}: case '{case.name}'", case.image, names, standardize)
                if case.split not in f:
                    f.create_group(case.split, track_order=True)
                group = f[case.split]
                if case.name in group:
                    raise InputError(
                        f"{path}: case '{case.name}' comes twice in split '{case.split}'"
                    )
                _write_case(group.create_group(case.name), case, names, dims)
            patients = {s: {g.attrs["patient"] for g in f[s].values()} for s in f}
        if not patients:
            raise InputError(f"{path}: no case was found, so nothing was written")
        _check_patients(path, patients)
    return read_info(path)


def _check_replaced(path):
    """InputError where a file is there that is no dataset: it may be somebody's image or notes."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return
    with contextlib.suppress(OSError, RuntimeError, KeyError):
        with h5py.File(path, "r", locking=False) as f:
            if NEEDED <= set(f.attrs):  # the masks of stage 1 have some of these
                return
    raise InputError(
        f"{path}: this file is no dataset, so it is not replaced; move it, or choose another --out"
    )


def _remove_left(path):
    """Removes what killed processes of this machine left of a file, see files.replacing()."""
    folder, name = os.path.split(os.path.abspath(path))
    for left in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name)}.*.part")):
        match = re.fullmatch(rf"\.{re.escape(name)}\.(\d{{1,9}})\.part", os.path.basename(left))
        if match and not psutil.pid_exists(int(match[1])):
            with contextlib.suppress(OSError):  # another one may remove it, too
                os.remove(left)


def _one_for_all(path, standardize, channel_names):
    """A list of bools -> one, if all are alike. InputError unless there is one for each channel."""
    if len(standardize) != len(channel_names) or len(set(standardize)) > 1 and channel_names == RGB:
        raise InputError(
            f"{path}: standardize {standardize} does not fit the channels "
            f"{', '.join(channel_names)}; give one for each, and the same for colors"
        )
    return standardize if len(set(standardize)) > 1 else standardize[0]


def usual_names(channels, dims):
    """The names of channels that a file need not say; [] where it must."""
    if channels == 1:
        return ["image"]
    return RGB if (channels, dims) == (3, 2) else []


def names_of(data):
    """The channel_names in what Info.describe() says; older checkpoints do not say them."""
    return data.get("channel_names") or usual_names(data["channels"], data["dims"])


def _write_case(group, case, channel_names, dims):
    """Writes the arrays and attributes of a Case into its group."""
    grid = _grid_of(case.image, len(channel_names))
    arrays = {
        "image": (case.image, grid),
        "label": (case.label, grid),
        "source_label": (case.source_label, case.source_grid),
    }
    for name, (values, size) in arrays.items():
        if values is not None:
            chunks = _chunk_of(size, dims) + values.shape[len(size) :]
            packed = dict(compression="gzip", compression_opts=1, shuffle=True)
            group.create_dataset(name, data=values, chunks=chunks, **packed)
    mean, std = mean_and_std(case.image, channel_names)
    source_checksum = None
    if case.source_label is not None:
        source_checksum = zlib.crc32(np.ascontiguousarray(case.source_label))
    attributes = dict(
        source_checksum=source_checksum,
        patient=str(case.patient),
        spacing=np.float64((1.0,) * len(grid) if case.spacing is None else case.spacing),
        spacing_known=case.spacing is not None,
        source=case.source,
        checksum=checksum_of(case.image, case.label),
        mean=mean,
        std=std,
        affine=case.affine,
        source_grid=case.source_grid,
        nifti_header=case.nifti_header,
    )
    group.attrs.update({name: v for name, v in attributes.items() if v is not None})


def _grid_of(image, channels):
    """(H, W) or (D, H, W) of an image, an array or a dataset."""
    return image.shape if channels == 1 else image.shape[:-1]


def _chunk_of(grid, dims):
    """What of a grid is read alone: a slice, or the blocks that a patch touches."""
    if len(grid) == 2:
        return tuple(grid)
    return (1, *grid[1:]) if dims == 2 else tuple(map(min, grid, (32, 64, 64)))


def checksum_of(image, label):
    """CRC-32 of a case's label (None: of nothing) and image."""
    of_label = zlib.crc32(b"" if label is None else np.ascontiguousarray(label))
    return zlib.crc32(np.ascontiguousarray(image), of_label)


# ---------------------------------------------------------------------------------------- checking


def check_text(where, what, text):
    """InputError unless a name is fit for screens, tables and files.

    It is printable, not empty and has at most 200 bytes.
    """
    if not text or not text.isprintable() or len(text.encode()) > 200:
        raise InputError(
            f"{where}: {what} {ascii(text[:60])} must be printable and have 1 to 200 bytes; rename "
            "it and convert the data again"
        )


def check_name(where, name):
    """InputError unless a case's name can be that of a file, below --out and nowhere else."""
    check_text(where, "a case's name", name)
    if name.startswith(".") or "/" in name or "\\" in name:
        raise InputError(
            f"{where}: a case's name, '{name}', must not start with a dot or contain a slash; "
            "rename it and convert the data again"
        )


def _check_layout(path, classes, dims, channels, channel_names):
    """InputError unless a file's numbers of classes, dims and channels can be, and fit names."""
    if not (2 <= len(classes) <= 256 and dims in (2, 3) and 1 <= channels <= 64):
        raise InputError(
            f"{path}: {len(classes)} classes, dims {dims}, channels {channels}: needs 2 to 256 "
            "classes, dims 2 or 3 and 1 to 64 channels; convert the data again"
        )
    if len(channel_names) != channels:
        raise InputError(
            f"{path}: {len(channel_names)} channel_names for {channels} channel(s); name each and "
            "convert the data again"
        )
    _check_names(path, classes, "class", "classes")
    _check_names(path, channel_names, "channel", "channels")


def _check_names(path, names, one, many):
    """InputError unless names are fit for tables, and different. one, many: what they name"""
    for name in names:
        check_text(path, f"a {one}'s name", name)
        if names.count(name) > 1:
            raise InputError(
                f"{path}: two {many} are called '{name}'; give each its own name and convert the "
                "data again"
            )


def _check_arrays(where, arrays, source_grid, channels, dims):
    """InputError unless arrays or datasets have the types and shapes of the schema.

    arrays: image, label and source_label, the last two of which may be None.
    """
    image, label, source_label = arrays
    grid = _grid_of(image, channels)
    whole = channels == 1 or image.shape[-1:] == (channels,)
    if image.dtype not in (np.uint8, np.float32) or not whole or len(grid) not in (dims, 3):
        raise InputError(
            f"{where}: image of shape {image.shape} and type {image.dtype} does not fit {channels} "
            f"channel(s) and dims={dims} (uint8 or float32 is needed); convert the data again"
        )
    for name, found, size in (("label", label, grid), ("source_label", source_label, source_grid)):
        if found is not None and (found.shape != tuple(size or ()) or found.dtype != np.uint8):
            raise InputError(
                f"{where}: {name} of shape {found.shape} and type {found.dtype}, but shape {size} "
                "and class numbers of uint8 are needed; convert the data again"
            )
    if min(grid) < 1 or min(grid[-2:]) < SMALLEST:
        raise InputError(
            f"{where}: a grid of {' x '.join(map(str, grid))}, but H and W must be at least "
            f"{SMALLEST}; leave it out, or pad it, and convert the data again"
        )


def _check_case(path, case, K, channels, dims):
    """InputError unless a Case can be written."""
    where = f"{path}: case '{case.name}'"
    check_name(path, case.name)
    check_text(where, "patient", str(case.patient))
    if case.split not in SPLITS:
        raise InputError(f"{where}: split '{case.split}' is none of {', '.join(SPLITS)}")
    arrays = case.image, case.label, case.source_label
    _check_arrays(where, arrays, case.source_grid, channels, dims)
    _check_place(where, case, _grid_of(case.image, channels))
    _check_pixels(where, case.image)
    _check_label(where, case.label, K)
    _check_label(f"{where}: source_label", case.source_label, K)


def _check_place(where, case, grid):
    """InputError unless what a Case or an Entry says of its place in space fits its grid."""
    size = case.source_grid
    side = 2**15 if len(grid) == 3 else 2**30  # NIfTI allows no more
    for what, values, most in (("spacing", case.spacing, math.inf), ("source_grid", size, side)):
        if values is not None and not (
            len(values) == len(grid) and all(0 < v < most for v in values)
        ):
            raise InputError(
                f"{where}: {what} {values} does not fit the grid {grid}; convert the data again"
            )
    if case.affine is not None and not np.isfinite(case.affine).all():
        raise InputError(f"{where}: affine has NaN or infinity; convert the data again")
    _check_header(where, case.nifti_header, case.affine, size or grid)


def _check_scale(where, entry):
    """InputError for a mean and a deviation that no image has. Older files have none."""
    mean, std = (np.atleast_1d(v if v is not None else 1.0) for v in (entry.mean, entry.std))
    if not (np.isfinite([*mean, *std]).all() and (std > 0).all()):
        raise InputError(
            f"{where}: mean {entry.mean} or std {entry.std} cannot be; convert the data again"
        )


def _check_pixels(where, image):
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise InputError(f"{where}: NaN or infinite pixels; mend them and convert the data again")


def _check_spread(where, image, names, standardize):
    """InputError for a deviation below LEAST_STD that is no rounding, see _mean_and_std()."""
    apart = np.moveaxis(image, -1, 0) if has_scales(names) else [image]
    wanted = standardize if isinstance(standardize, list) else [standardize] * len(apart)
    for name, one, divided in zip(names, apart, wanted):
        if divided and not is_flat(one) and one.std(dtype=np.float64) < LEAST_STD:
            raise InputError(
                f"{where}: values of {name} from {one.min():.9g} to {one.max():.9g} lie too close "
                "together; bring them to a usual range, such as 0 to 1"
            )


def _check_label(where, label, K):
    """InputError for a label, if there is one, that holds more than the K classes."""
    if label is not None and label.max() >= K:
        raise InputError(
            f"{where}: label values up to {label.max()}, but there are {K} classes (0 to {K - 1}); "
            "convert the data again"
        )


def _check_header(where, header, affine, grid):
    """InputError unless a NIfTI header is none, or of the volume that affine and grid describe."""
    if header is None:
        return
    header = np.asarray(header)
    if affine is None or len(grid) != 3 or header.shape != (348,) or header.dtype != np.uint8:
        raise InputError(
            f"{where}: nifti_header: {header.dtype} of shape {header.shape}, but 348 "
            "of uint8 and an affine of a volume are needed; convert the data again"
        )
    from data import space

    where = f"{where}: nifti_header"
    space.turn_to_source(space.parse(header.tobytes(), where), affine, grid, where)


def _check_patients(path, patients):
    """InputError if a patient is in two splits. patients: {split: set of names}"""
    for a, b in combinations(patients, 2):
        both = sorted(patients[a] & patients[b])
        if both:
            raise InputError(
                f"{path}: patient '{both[0]}' is in both '{a}' and '{b}' ({len(both)} such "
                "patients); split by patient"
            )


# ----------------------------------------------------------------------------------------- reading


def open_file(path):
    """h5py.File for reading. InputError if it is missing, damaged, locked or not permitted."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {absent(path, 'file')}; give the HDF5 file")
    try:
        return _opened(path)
    except OSError as error:
        if "unable to lock file" in str(error):
            why = "another process is writing to it; wait until it ends"
        elif "already open for write" in str(error):
            why = (
                "another process is writing to it, or was killed while it did; wait until it ends, "
                "or, if none does, run h5clear -s on the file"
            )
        elif failed := unreadable(path, error):
            raise failed from None
        elif kind_of(path) == HDF5:
            why = "not a readable HDF5 file (truncated?); convert the data again"
        else:
            why = f"{kind_of(path) or 'of another kind'}, not an HDF5 file; give the .h5 file"
        raise InputError(f"{path}: {why}") from None


def _opened(path):
    """h5py.File for reading, without a lock where the file system has none."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        # a file that is open already must be opened as it was the first time
        if errno_of(error) not in NO_LOCKS and "locking flag" not in str(error):
            raise
    return h5py.File(path, "r", locking=False)


@contextlib.contextmanager
def reading(where, remedy="convert the data again"):
    """Whatever HDF5 cannot make sense of in its block is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise unreadable(where, error) or InputError(
            f"{where}: damaged or incomplete ({error or type(error).__name__}); {remedy}"
        ) from None


def child(group, name, kind):
    """The member of a group that is of a kind, h5py.Group or h5py.Dataset, in the file itself.

    InputError for anything else. To be called in a block of reading().
    """
    shown = name if name.isprintable() else ascii(name)
    where = f"{group.file.filename}: {group.name.rstrip('/')}/{shown}"
    try:
        link = group.id.links.get_info(name.encode(errors="surrogateescape")).type
    except (KeyError, RuntimeError, ValueError):
        raise InputError(f"{where}: missing; make the file again") from None
    if link != h5py.h5l.TYPE_HARD:
        raise InputError(
            f"{where}: a link to another place or file, which is not followed; copy what it stands "
            "for into the file"
        )
    found = group[name]
    if not isinstance(found, kind):
        expected = "group" if kind is h5py.Group else "dataset"
        raise InputError(f"{where}: is no {expected}; make the file again")
    if kind is h5py.Dataset:
        _check_storage(found, where)
    return found


def _check_storage(data, where):
    """InputError unless a dataset lies in its file and can hold what it declares.

    gzip makes no more than 1032 bytes of one.
    """
    plist = data.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise InputError(
            f"{where}: lies in other files (virtual dataset or external storage), which are not "
            "opened; copy it into the file"
        )
    if data.shape is None:
        raise InputError(f"{where}: holds nothing; make the file again")
    declared = math.prod(data.shape) * data.dtype.itemsize
    stored = data.id.get_storage_size()
    if declared > LARGE and declared > 1032 * stored:
        raise InputError(
            f"{where}: declares {declared:,} bytes, but the file holds {stored:,} of it; make the "
            "file again"
        )


def free_memory():
    """Bytes of main memory that are free."""
    return psutil.virtual_memory().available


# kinds of an attribute, as h5py has them -> numpy's letters for them
KINDS = {str: "SUO", int: "iu", bool: "biu", float: "iuf"}


def attribute(of, name, kind, where, shape=(), optional=False):
    """An attribute of a group. InputError unless it is of a kind and a shape.

    kind: str, int, bool or float; shape: () for one value, which is returned as such, None for a
    vector of any length; optional: None where there is no such attribute. To be called in a block
    of reading(). -> value, tuple of values (a list of texts), or an array
    """
    if optional and name not in of.attrs:
        return None
    found = np.asarray(of.attrs[name])
    fits = found.ndim == 1 if shape is None else found.shape == shape
    if found.dtype.kind not in KINDS[kind] or not fits:
        raise InputError(
            f"{where}: attribute '{name}' is {ascii(found.tolist())[:60]}, but {kind.__name__} of "
            f"shape {'(n,)' if shape is None else shape} is needed; convert the data again"
        )
    found = found.astype(kind)
    if found.ndim > 1:
        return found
    return tuple(found.tolist()) if found.ndim and kind is not str else found.tolist()


def read_info(path):
    """Opens a dataset file, checks its structure (not its pixels). -> Info"""
    with open_file(path) as f, reading(path):
        if not NEEDED <= set(f.attrs) or attribute(f, "format", int, path) != FORMAT:
            raise InputError(
                f"{path}: not a dataset of this project (format {FORMAT}); see python -m data.h5 "
                "--help"
            )
        prepared = json.loads(attribute(f, "prepared", str, path, optional=True) or "null")
        if prepared is not None and not isinstance(prepared, dict):
            raise InputError(
                f"{path}: attribute 'prepared' is no JSON object; convert the data again"
            )
        dims, channels = (attribute(f, name, int, path) for name in ("dims", "channels"))
        names = attribute(f, "channel_names", str, path, None, optional=True)
        info = Info(
            path=path,
            name=attribute(f, "name", str, path),
            classes=attribute(f, "classes", str, path, None),
            dims=dims,
            channels=channels,
            splits={},
            checksum=0,
            channel_names=usual_names(channels, dims) if names is None else names,
            standardize=True,
            prepared=prepared,
        )
        check_text(path, "the dataset's name", info.name)
        _check_layout(path, info.classes, dims, channels, info.channel_names)
        info.standardize = _standardize(f, info)
        for split in (s for s in SPLITS if s in set(f)):
            group = child(f, split, h5py.Group)
            info.splits[split] = [_entry(info, group, name) for name in group]
    _check_patients(path, {s: {e.patient for e in entries} for s, entries in info.splits.items()})
    sums = [(s, e.name, e.checksum) for s, entries in info.splits.items() for e in entries]
    info.checksum = zlib.crc32(repr(sums).encode())
    cases = [e for entries in info.splits.values() for e in entries]
    if known := [e.spacing[-info.dims :] for e in cases if e.spacing_known]:
        info.spacing = np.median(known, 0).tolist()
    return info


def _standardize(f, info):
    """Info.standardize of an open file; older ones do not say it."""
    of_each = has_scales(info.channel_names) and np.ndim(f.attrs.get("standardize")) > 0
    shape = (info.channels,) if of_each else ()
    found = attribute(f, "standardize", bool, info.path, shape, optional=True)
    return list(map(bool, found)) if of_each else found is not False


def _entry(info, split, name):
    """The Entry of a case of a split, a group. InputError unless it keeps the schema."""
    check_name(f"{info.path}: {split.name}", name)
    where = f"{info.path}: {split.name}/{name}"
    group = child(split, name, h5py.Group)
    image = child(group, "image", h5py.Dataset)
    label = _optional_dataset(group, "label")
    source_label = _optional_dataset(group, "source_label")
    grid = _grid_of(image, info.channels)
    axes = (len(grid),)
    source_grid = attribute(group, "source_grid", int, where, axes, optional=True)
    _check_arrays(where, (image, label, source_label), source_grid, info.channels, info.dims)
    scales = (info.channels,) if has_scales(info.channel_names) else ()
    entry = Entry(
        name=name,
        patient=attribute(group, "patient", str, where),
        grid=grid,
        labeled=label is not None,
        spacing=attribute(group, "spacing", float, where, axes),
        spacing_known=attribute(group, "spacing_known", bool, where),
        source=attribute(group, "source", str, where),
        checksum=attribute(group, "checksum", int, where, optional=True) or 0,
        affine=attribute(group, "affine", float, where, (4, 4), optional=True),
        source_grid=source_grid,
        itemsize=image.dtype.itemsize,
        nifti_header=group.attrs.get("nifti_header"),
        source_labeled=source_label is not None,
        mean=attribute(group, "mean", float, where, scales, optional=True),
        std=attribute(group, "std", float, where, scales, optional=True),
    )
    check_text(where, "patient", entry.patient)
    _check_place(where, entry, grid)
    _check_scale(where, entry)
    return entry


def _optional_dataset(group, name):
    return child(group, name, h5py.Dataset) if group.id.links.exists(name.encode()) else None


def read_case(f, info, split, name, label=True, part=()):
    """Pixels of one case of an open file.

    -> image (D, H, W[, C]), label (D, H, W) or None; D is 1 for a plain image. label: whether it is
    read; part: slices of the first axes, which alone are read. A case that is read whole, with its
    label, is compared with its checksum. InputError for wrong pixels, labels and checksums.
    """
    where = f"{info.path}: /{split}/{name}"
    with reading(where):
        group = f[split][name]
        image = _read(group, "image", where, part)
        y = _read(group, "label", where, part) if label and "label" in group else None
        checksum = group.attrs.get("checksum")
    _check_pixels(where, image)
    _check_label(where, y, len(info.classes))
    whole = y is not None and not part and checksum is not None
    if whole and checksum != checksum_of(image, y):
        raise InputError(
            f"{where}: image and label are not those that were written (checksum); convert the "
            "data again"
        )
    if len(_grid_of(image, info.channels)) == 2:
        return image[None], None if y is None else y[None]
    return image, y


def check_unchanged(f, info, split, entry):
    """InputError if the case of an open file is not the one of which read_info() has told."""
    case = f.get(f"{split}/{entry.name}")
    if case is None or case.attrs.get("checksum", 0) != entry.checksum:
        raise InputError(
            f"{info.path}: was replaced by another file while this ran; put it back and begin again"
        )


def read_shown(f, info, split, name, label=True):
    """read_case() for pictures. -> image (D, H, W), of colors (D, H, W, 3); label or None"""
    image, label = read_case(f, info, split, name, label)
    return info.picture(channels_first(image, info.channels)), label


def channels_first(image, channels):
    """An image as files have it, (*S) or (*S, C). -> [C, *S]"""
    return image[None] if channels == 1 else np.moveaxis(image, -1, 0)


def _read(group, name, where, part=()):
    """A dataset of a case, or a part of it. InputError if all of it does not fit into memory."""
    if not part:
        check_memory(group[name], f"{where}/{name}")
    return group[name][part]


def check_memory(data, where):
    """InputError for a dataset that does not fit into memory."""
    if data.nbytes > LARGE and data.nbytes > (free := free_memory()):
        raise InputError(
            f"{where}: takes {data.nbytes / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory "
            "are free; crop or resample it"
        )


def read_label(f, info, split, name):
    """The label of one case of an open file, on its own grid. -> (H, W) or (D, H, W) uint8"""
    where = f"{info.path}: /{split}/{name}"
    with reading(where):
        return _read(f[split][name], "label", where)


def read_source_label(info, split, entry):
    """The label of a case on its source's grid. -> (D, H, W) uint8; D is 1 for a plain image

    InputError if there is none, or if it is not what was written.
    """
    where = f"{info.path}: /{split}/{entry.name}"
    if not entry.source_labeled:
        raise InputError(
            f"{where}/source_label: missing, so the case cannot be scored on its source's grid; "
            "convert the data again, or use --grid stored"
        )
    with open_file(info.path) as f, reading(where):
        group = f[split][entry.name]
        label = _read(group, "source_label", where)
        checksum = group.attrs.get("source_checksum")
    where = f"{where}/source_label"
    _check_label(where, label, len(info.classes))
    if checksum is not None and checksum != zlib.crc32(label):
        raise InputError(f"{where}: not what was written (checksum); convert the data again")
    return label if label.ndim == 3 else label[None]


# -------------------------------------------------------------------------------- what networks see


def has_scales(channel_names):
    """Whether each channel has its own scale of intensities. Colors share one."""
    return len(channel_names) > 1 and channel_names != RGB


def mean_and_std(image, channel_names=()):
    """Mean and standard deviation of a case's intensities: numbers, or tuples if has_scales()."""
    if has_scales(channel_names):
        each = (_mean_and_std(image[..., c]) for c in range(len(channel_names)))
        return tuple(zip(*each))
    return _mean_and_std(image)


LEAST_STD = 1e-6  # readers divide by no less


def _mean_and_std(image):
    """Mean and deviation of an image: at least LEAST_STD, and 1e-5 of the mean, above rounding."""
    mean, std = (float(v) for v in (image.mean(dtype=np.float64), image.std(dtype=np.float64)))
    return mean, max(std, LEAST_STD, 1e-5 * abs(mean))


def is_flat(image):
    """Whether an image, or a channel of it, has one value everywhere, but for rounding."""
    return float(np.ptp(image)) <= 1e-6 * float(np.abs(image).max())


def scaling(info, mean, std):
    """What readers subtract from a case and divide by, of mean_and_std(): 0 and 1 where ready."""
    if not isinstance(info.standardize, list):
        return (mean, std) if info.standardize else (0.0, 1.0)
    each = zip(info.standardize, mean, std)
    return tuple(zip(*((m, s) if wanted else (0.0, 1.0) for wanted, m, s in each)))


def add_show(p):
    """The option --show of scripts that draw."""
    p.add_argument(
        "--show",
        metavar="NAME",
        help="channel that pictures show, by its name (default: the first; RGB: colors)",
    )


def choose_shown(info, name):
    """Sets the channel that pictures show, by its name; None: the first. InputError: no such."""
    if name is not None and name not in info.channel_names:
        raise InputError(
            f"--show {name:.40}: {info.path} has the channels {', '.join(info.channel_names)}; "
            "give one of them"
        )
    info.shown = info.channel_names.index(name or info.channel_names[0])


def check_flip(info, flip):
    """What --flip means for a file: axes as augment.may_flip() takes them; None: all.

    flip: a text as options.flip_axes() gives it, or None. InputError if the file has no such axis.
    """
    everything = "DHW"[-info.dims :]
    if flip in (None, ",".join(everything)):
        return None
    names = set(flip.split(",")) if isinstance(flip, str) else {None}
    if flip != "none" and not names <= set(everything):
        raise InputError(
            f"--flip {flip!s:.40}: {info.path} is segmented in {info.dims}D, along "
            f"the axes {', '.join(everything)}; give some of them, or none"
        )
    return flip


# ------------------------------------------------------------------------------------------ showing


def preview(info, path):
    """Draws cases of each split, evenly spread, with outlines, to a picture.

    They are four of each, or, of volumes that are segmented in 3D, two, in three planes each.
    """
    rows = []
    with open_file(info.path) as f:
        for split, entries in info.splits.items():
            count = min(4 if info.dims == 2 else 2, len(entries))
            chosen = [entries[i * len(entries) // count] for i in range(count)]
            row = [panel for entry in chosen for panel in _panels(f, info, split, entry)]
            if row:
                rows.append(row)
    figures.cases(path, rows, info.classes)


def _panels(f, info, split, entry):
    """A case of an open file, as a slice or three planes. -> list of figures.Panel"""
    image, label = read_shown(f, info, split, entry.name)
    title = f"{split}: {entry.name}"
    if info.dims == 3:
        first, *others = figures.planes(image, label, label, entry.spacing)
        return [first._replace(title=title), *others]
    z = figures.middle(label, len(image))
    outline = None if label is None else label[z]
    return [figures.Panel(title, image[z], outline, entry.aspect)]


def summary(info):
    """Reads every pixel and label (so it validates the file) and returns a few lines of text."""
    counts = {}  # of each split: pixels of each class [K]
    images = defaultdict(list)  # (split, case) of each different image
    constant, flat = [], []
    classes = ", ".join(f"{k} {name}" for k, name in enumerate(info.classes))
    names = f": {', '.join(info.channel_names)}" if has_scales(info.channel_names) else ""
    lines = [
        f"{info.path}: {info.name}, segmented in {info.dims}D, {info.channels} channel(s){names}, "
        f"classes {classes}"
    ]
    with open_file(info.path) as f:
        for split, entries in info.splits.items():
            count = np.zeros(len(info.classes))
            for entry in entries:
                image, label = read_case(f, info, split, entry.name)
                each = zip(info.channel_names, channels_first(image, info.channels))
                flat += [f"{name} of {split}/{entry.name}" for name, c in each if is_flat(c)]
                if is_flat(image):
                    constant.append(f"{split}/{entry.name}")
                else:
                    digest = hashlib.sha1(np.ascontiguousarray(image)).digest()
                    images[digest].append((split, entry.name))
                if entry.source_labeled:
                    read_source_label(info, split, entry)
                if label is not None:
                    count += np.bincount(label.ravel(), minlength=len(count))
            lines += _lines_on_split(info, split, count)
            if count.any():
                counts[split] = count
    lines += _notes_on_labels(info, counts) + _notes_on_images(images, constant)
    if flat and has_scales(info.channel_names):
        lines.append(f"note: a channel has one value everywhere: {flat[0]} ({len(flat)} in all)")
    return "\n".join(lines)


def _lines_on_split(info, split, count):
    """Two lines on the cases of a split and on its labels. count: pixels of each class [K]"""
    entries = info.splits[split]
    grids = sorted({e.grid for e in entries})
    ends = dict.fromkeys(" x ".join(map(str, grid)) for grid in grids[:1] + grids[-1:])
    spacings = {_spacing_in_words(e) for e in entries}
    shares = "no labels"
    if count.any():
        each = zip(info.classes, count / count.sum())
        shares = ", ".join(f"{name} {share:.3f}" for name, share in each)
    return [
        f"  {split:10s} {len(entries)} cases, {sum(e.labeled for e in entries)} labeled, "
        f"{len({e.patient for e in entries})} patients, grid {' to '.join(ends) or '-'}, "
        f"spacing {' / '.join(sorted(spacings)[:3])}",
        f"  {'':10s} share of pixels: {shares}",
    ]


def _spacing_in_words(entry):
    if not entry.spacing_known:
        return "unknown"
    return " x ".join(f"{mm:g}" for mm in entry.spacing) + " mm"


SCORES = "left out of its scores"
ABSENT = {  # what follows where no label of a split holds a class that others hold
    "train": "nothing can learn it, and scores count it",
    "val": SCORES,
    "test": SCORES,
}


def _notes_on_labels(info, counts):
    """Lines on classes that are missing, or suspiciously frequent. counts: {split: pixels [K]}"""
    total, lines = sum(counts.values(), np.zeros(len(info.classes))), []
    missing = {"this file": (total == 0) & (total.sum() > 0)}
    missing |= {s: (count == 0) & (total > 0) for s, count in counts.items() if s in ABSENT}
    for split, lost in missing.items():
        names = [info.classes[k] for k in np.flatnonzero(lost[1:]) + 1]
        why = ABSENT.get(split, "nothing can learn it, and no score counts it")
        if lost[0]:
            lines.append(f"note: {without(info.classes[:1], split)}: is a mask inverted?")
        if names:
            lines.append(f"note: {without(names, split)}: {why}")
    if 0 < total[0] < 0.2 * total.sum():
        share = total[0] / total.sum()
        lines.append(f"note: {info.classes[0]} is {share:.0%} of all pixels: are masks inverted?")
    return lines


def _notes_on_images(images, constant):
    """Lines on images that are scored and stand in another split, too, or that show nothing.

    images: {digest: [(split, case), ...]} of others than `constant`, names of those of one value
    """
    splits = [{split for split, _ in cases} for cases in images.values()]
    among = [len(held) > 1 and held & {"val", "test"} for held in splits]
    twice = [cases for cases, is_twice in zip(images.values(), among) if is_twice]
    lines = []
    if twice:
        first = twice[0][0]
        second = next(case for case in twice[0] if case[0] != first[0])
        lines.append(
            f"note: {len(twice)} {'image is' if len(twice) == 1 else 'images are'} in two splits, "
            f"such as {'/'.join(first)}, which is {'/'.join(second)}, too: scores would be too "
            "good; take one of the two out"
        )
    if constant:
        lines.append(
            f"note: {len(constant)} {'image has' if len(constant) == 1 else 'images have'} one "
            f"value everywhere, such as {constant[0]}"
        )
    return lines


def report(info):
    """Prints what a converter has written, or summary() alone says, and what comes next."""
    print(summary(info))
    trains = any(e.labeled for e in info.splits.get("train", ()))
    if trains and info.splits.get("val"):
        out = f"runs/{os.path.splitext(os.path.basename(info.path))[0]}/vqm"
        words = ["python", "corrupt.py", str(info.path), "--labeled", "all", "--out", out]
        print(f"next: {shlex.join(words)}    (--labeled 7: as if only 7 patients had labels)")
    for split in ("train", "val"):
        if not info.splits.get(split):
            print(f"note: the split {split} is empty, so no network can be trained on this file")


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.h5")
    p.add_argument("file", help="dataset to validate and describe")
    p.add_argument(
        "--preview",
        type=picture,
        metavar="FILE.png",
        help="draw samples of each split with outlines",
    )
    add_show(p)
    args = p.parse_args(argv)
    info = read_info(args.file)
    choose_shown(info, args.show)
    report(info)
    if args.preview:
        preview(info, args.preview)
        print(f"wrote {args.preview}")


if __name__ == "__main__":
    cli(main)
