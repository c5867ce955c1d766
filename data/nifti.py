"""Folders of NIfTI volumes -> one HDF5 file; and masks back to NIfTI.

    python -m data.nifti Task02_Heart --out heart.h5
    python -m data.nifti Task09_Spleen --out spleen.h5 --intensity ct --spacing 2,1,1
    python -m data.nifti ACDC --out acdc.h5 --patient '(patient\\d+)_'
    python -m data.nifti PETCT --out petct.h5 --clip 'CT=-175,250'

What is read under SRC (.nii or .nii.gz), as the Medical Segmentation Decathlon and nnU-Net have it:
    imagesTr, labelsTr   train and val; a case without a label stays unlabeled in train
    imagesTs             test, with labels where labelsTs has them
    dataset.json         its "labels" name the classes and their values; else they are numbered;
                         its "channel_names" or "modality" name the channels
    Decathlon            NAME.nii.gz for image and label; the volumes of a 4D image are channels
    nnU-Net              NAME_0000.nii.gz, NAME_0001.nii.gz (channels) and the label NAME.nii.gz

All channels are taken unless --channel chooses some. Those of a case lie on one grid. Each is
clipped, scaled and resampled by itself: of several, one that dataset.json calls CT, or that --clip
names, to its window, and the others, MR, to mean 0 and deviation 1.

Splits: SRC/train.txt, val.txt, test.txt (or --lists DIR), a case a line; otherwise by patient with
--seed. A note tells where names of different splits look like those of one patient.
Labels are class numbers, 0, 1, 2 and so on. Those with other values, 0 and 255, say, or 0, 1, 2, 4,
need a dataset.json that names these, or --labels, which lists them in the order of the classes.

Volumes are stored as (D, H, W), turned to the body axes of most of them by flips and swaps. Affine
and spacing, in mm, are those of the sform where its code is above 0, else of the qform where its
code is, else of pixdim. A header that contradicts itself, or places no boxes, is refused
(data/space.py). Masks have the header of their source, so its place, byte for byte.
"""

import argparse
import gzip
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import data_type_codes
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from data import h5, labels, space, splits
from data.files import InputError, read_text, replacing
from data.options import Parser, cli, decimals, file, ordered_numbers
from data.pixels import to_float32
from data.splits import Row, by_name, is_file, note_unread, plain_name

# no hidden files: archives made on a Mac are full of ._NAME.nii.gz
NAME = re.compile(r"(?i)([^.].*)\.nii(\.gz)?")
MOST = 64  # channels of a case, see data/h5.py
SOFT_TISSUE = -175.0, 250.0  # Hounsfield units


# ------------------------------------------------------------------------------------ finding cases


def volumes(folder):
    """Name without ending -> path, for the NIfTI files directly in a folder, sorted by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    named = ((NAME.fullmatch(path.name), path) for path in paths)
    return by_name((plain_name(match[1]), p) for match, p in named if match and is_file(p))


def say_unread(folders):
    """Prints how many files and folders in some folders are not read as NIfTI, if any."""
    is_volume = lambda path: NAME.fullmatch(path.name) and is_file(path)
    note_unread(folders, is_volume, ".nii, .nii.gz")


def find(src, chosen):
    """The cases of SRC, and whether their files are named as nnU-Net does.

    -> [Row, ...], {image of a row: the files of its channels}, [number, ...] of these, bool
    chosen: channels of --channel, None: all. A file that is not named as nnU-Net does is channel
    None. A case is its own patient; its split is "test" in imagesTs, else None.
    """
    rows, files = [], {}
    layout = {s: (volumes(src / f"images{s}"), volumes(src / f"labels{s}")) for s in ("Tr", "Ts")}
    images, labels = layout["Tr"]
    if not images:
        raise InputError(
            f"{src / 'imagesTr'}: no .nii or .nii.gz is there; see python -m data.nifti --help"
        )
    folders = [src / f"{what}{part}" for part in layout for what in ("images", "labels")]
    say_unread(folder for folder in folders if folder.is_dir())
    numbered = [n for n in images if re.search(r"_\d{4}$", n)]
    nnunet = len(numbered) == len(images) and not set(images) & set(labels)
    nnunet |= bool({n[:-5] for n in numbered} & (set(labels) - set(images)))
    cases = {part: by_channel(images, nnunet) for part, (images, _) in layout.items()}
    numbers = sorted({n for found in cases.values() for paths in found.values() for n in paths})
    if nnunet and chosen is not None:
        numbers = chosen
    for part, (_, labels) in layout.items():
        found = taken(cases[part], numbers)
        files |= {paths[0]: paths for paths in found.values()}
        if lost := sorted(set(labels) - set(found)):
            raise InputError(
                f"{labels[lost[0]]}: no image of that name in {src / f'images{part}'} "
                f"({len(lost)} such labels); add it, or take the label out"
            )
        if both := sorted(set(found) & {r.name for r in rows}):
            raise InputError(
                f"{src}: case '{both[0]}' is in both imagesTr and imagesTs; remove or rename one "
                "of the two"
            )
        split = "test" if part == "Ts" else None
        rows += [Row(n, paths[0], labels.get(n), n, split) for n, paths in found.items()]
    return rows, files, numbers, nnunet


def by_channel(images, nnunet):
    """The files of each case, {case: {number of a channel: path}}.

    images: {name: path}; nnunet: as in Preparation; where it is not, the number is None
    """
    cases = defaultdict(dict)
    for name, path in images.items():
        if not nnunet:
            cases[name][None] = path
        elif re.search(r"_\d{4}$", name):
            cases[name[:-5]][int(name[-4:])] = path
        else:
            raise InputError(
                f"{path}: the cases have names of nnU-Net, NAME_0000, and this has no channel; "
                "rename it"
            )
    return cases


def taken(cases, numbers):
    """The files of some channels, {case: [path, ...]}, of cases of by_channel()."""
    for name, paths in cases.items():
        if lost := [n for n in numbers if n not in paths]:
            raise InputError(
                f"{next(iter(paths.values())).parent}: case '{name}' has no channel {lost[0]} "
                f"(it has: {', '.join(map(str, paths))}); add it, take the case out, or convert "
                "data with another --channel"
            )
    return {name: [paths[n] for n in numbers] for name, paths in cases.items()}


def volumes_in(path):
    """How many volumes a file holds, as its header says."""
    size = space.size_of(space.parse(bytes_of(path, space.BYTES), path), path)
    return size[3] if len(size) == 4 else 1


def count_volumes(paths):
    """How many volumes each of some files holds. InputError if they differ, or are too many."""
    counts = {path: volumes_in(path) for path in paths}
    first, count = next(iter(counts.items()))
    if other := next((path for path in paths if counts[path] != count), None):
        raise InputError(
            f"{other}: holds {counts[other]} volumes (channels), but {first} holds {count}; give "
            "all cases the same channels, or choose some with --channel"
        )
    if count > MOST:
        raise InputError(
            f"{first}: holds {count} volumes, but a case has at most {MOST} channels (are they "
            "times?); choose some with --channel"
        )
    return count


def choose_channels(rows, numbers, args):
    """The channels that are taken, which it says where nobody chose. -> numbers, names

    numbers: those of find(), [None] where the volumes in a file are the channels. One channel needs
    no name: None.
    """
    if numbers == [None]:
        numbers = args.channel or list(range(count_volumes([r.image for r in rows])))
    if len(numbers) == 1:
        return numbers, None
    names = name_channels(args.src, numbers, bool(args.channel))
    if not args.channel:
        said = ", ".join(f"{n} ({name})" for n, name in zip(numbers, names))
        print(f"the cases have channels {said}; taking all (choose with --channel)")
    return numbers, names


def name_channels(src, numbers, chosen):
    """Names of several channels: those of dataset.json, else `channel 0` and so on.

    numbers: of the channels; chosen: whether --channel chose them. InputError if dataset.json names
    others than there are.
    """
    path = src / "dataset.json"
    table = read_json(path, "") if path.is_file() else {}
    key = "channel_names" if table.get("channel_names") else "modality"
    said = table.get(key)
    if not said:
        return [f"channel {n}" for n in numbers]
    try:
        names = {int(number): name.strip() for number, name in said.items()}
        usable = all(name and name.isprintable() for name in names.values())
    except (AttributeError, TypeError, ValueError):
        usable = False
    if not usable:
        raise InputError(f'{path}: "{key}" must map 0, 1 and so on to names; mend it')
    if not (chosen or set(names) == set(numbers)):
        raise InputError(
            f'{path}: "{key}" names channels {labels.in_words(sorted(names))}, but the cases have '
            f"{labels.in_words(numbers)}; mend it, or choose some with --channel"
        )
    found = [names.get(n, f"channel {n}") for n in numbers]
    return [f"{name} {n}" if found.count(name) > 1 else name for n, name in zip(numbers, found)]


def split_cases(rows, lists, args):
    """Gives every case its patient and split. -> rows in their final order

    Says what has no label, what is left out, and whose names look like those of one patient.
    """
    rows = splits.name_patients(rows, args)
    held = [r for r in rows if r.split]  # of imagesTs
    bare = [r for r in rows if not (r.mask or r.split)]
    if not any(r.mask for r in rows):
        raise InputError(
            f"{args.src}: no case has a label; labelsTr must hold files named like the cases, such "
            f"as {rows[0].name}.nii.gz"
        )
    if bare:
        print(
            f"{len(bare)} of {len(rows)} cases have no label and stay unlabeled (the first: "
            f"{bare[0].name})"
        )
    if lists:
        out = splits.assign_splits(rows, lists, args)
        named = {r.name for r in out}
        out += [r for r in held if r.name not in named]
        why = "they are in no list"
    else:
        out = splits.assign_splits(rows, None, args)
        why = "they have no label, and their patients are in val or test"
    splits.note_masks({r.name: r.image for r in out if not r.mask})
    splits.note_patients(out, splits.draws(rows, lists))
    if len(out) < len(rows):
        print(f"{len(rows) - len(out)} of {len(rows)} cases are left out: {why}")
    return out


def name_classes(args, paths):
    """Names of the classes, background first, and the values that stand for them in the labels.

    They are those of --classes and --labels, else of dataset.json. paths: of the labels, which must
    hold 0, 1, 2 and so on without a gap where nobody says anything.
    """
    names, values = args.classes, args.labels
    if names:
        return names, values or range(len(names))
    path = args.src / "dataset.json"
    if table := named_values(path) if path.is_file() else {}:
        values = values or sorted(table)
        if lost := [v for v in values if v not in table]:
            raise InputError(
                f"{path}: names no label value {lost[0]}, which --labels lists; give "
                "--classes, too, with a name for each"
            )
        return [table[v] for v in values], values
    if not values:
        found = {p: np.unique(labels.class_numbers(load(p).values, p)).tolist() for p in paths}
        values = range(labels.count_classes(found, paths[0].parent))
    return labels.numbered(len(values)), values


def named_values(path):
    """The "labels" of a dataset.json, {value: name}; empty if it has none."""

    table = read_json(path, ", or give --classes").get("labels")
    if not table:
        return {}
    try:
        numbers_first = all(key.isdigit() for key in table)  # as the Decathlon has it
        pairs = list(table.items()) if numbers_first else [(v, k) for k, v in table.items()]
        by_value = {int(str(value).removesuffix(".0")): name for value, name in pairs}
        others = [name for value, name in sorted(by_value.items()) if value != 0]
        wrong = labels.not_background_first([by_value.get(0, ""), *others])
    except (TypeError, ValueError, AttributeError):
        wrong = '"labels" must map one number to each name; regions are not supported'
    else:
        if "ignore" in others:
            wrong = "an 'ignore' label is not supported; change it to a class in the labels"
        elif len(by_value) < len(table):
            values = ", ".join(str(value) for value, _ in pairs)
            wrong = f"label values {values}, but each class needs its own"
    if wrong:
        raise InputError(
            f"{path}: {wrong}; mend it (label value 0 is the background), or give --classes and, "
            "if need be, --labels"
        )
    return by_value


def read_json(path, remedy):
    """A file that holds a JSON object -> dict. remedy: what else to do than to mend it"""

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name in it comes twice")
        return found

    try:
        return dict(json.loads(read_text(path), object_pairs_hook=once).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON object ({error}); mend it{remedy}") from None


# ------------------------------------------------------------------------------------ reading


@dataclass
class Volume:
    """One volume of a file, on its own axes."""

    values: np.ndarray  # (D, H, W), numbers of any type, the file's slope applied
    affine: np.ndarray  # [4, 4]: voxel (x, y, z) -> mm, see space.affine_of()
    header: nibabel.Nifti1Header

    @property
    def spacing(self):
        """mm per axis of (D, H, W)."""
        return space.spacing_of(self.affine)


def bytes_of(path, count=-1):
    """The first bytes of a file, packed or not, whatever its ending says; -1: all of them."""
    with open(path, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as f:
            return f.read(count)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: truncated or damaged; copy it again") from None


def load(path, channel=None):
    """One volume of a file. -> Volume. channel: which one, where the file holds several"""
    return load_volumes(path, [channel])[0]


def load_volumes(path, numbers):
    """Some volumes of a file. -> [Volume, ...]

    numbers: which ones, where the file holds several; [None]: the only one. InputError if one is
    not there, if there are several and none is chosen, and for anything but a whole file of plain,
    finite numbers.
    """
    raw = bytes_of(path)
    header = space.parse(raw, path)
    size = space.size_of(header, path)
    kind, start = type_of(header, path), start_of(header, path)
    whole = start + math.prod(size) * kind.itemsize
    if len(raw) < whole:
        raise InputError(f"{path}: truncated, {len(raw)} of {whole} bytes; copy it again")
    if len(raw) - whole >= size[0] * kind.itemsize and raw[whole:].strip(b"\0"):
        raise InputError(
            f"{path}: holds {len(raw) - whole} bytes beyond the voxels that its header tells of; "
            "mend the header (dim, datatype), or save the file anew"
        )
    if len(size) > 4:
        raise InputError(
            f"{path}: {len(size)}D with {math.prod(size[4:])} value(s) per voxel; "
            "save one volume of plain numbers"
        )
    count = size[3] if len(size) == 4 else 1
    if count > 1 and None in numbers:
        raise InputError(
            f"{path}: 4D, {count} volumes in one file; save the one that is meant alone, or "
            "convert data with --channel, which chooses an image's"
        )
    if lost := [n for n in numbers if (n or 0) >= count]:
        there = f"0 to {count - 1}" if count > 1 else "one volume"
        raise InputError(f"{path}: has no channel {lost[0]}, but {there}; add it, or leave it out")
    voxels, found = math.prod(size[:3]), []
    for n in numbers:
        values = np.frombuffer(raw, kind, voxels, start + (n or 0) * voxels * kind.itemsize)
        values = plain(values.reshape(size[2::-1]), header, path)
        found.append(Volume(values, space.affine_of(header, path), header))
    return found


def plain(values, header, path):
    """Voxels of a file, (D, H, W), as numbers of this machine, with the header's slope applied."""
    values = values.astype(values.dtype.newbyteorder("="))
    try:
        values = apply_read_scaling(values, *header.get_slope_inter())
    except HeaderDataError:
        raise InputError(
            f"{path}: the header's intercept (scl_inter) is {header['scl_inter']}; mend the header"
        ) from None
    with np.errstate(over="ignore"):
        usable = values.dtype.kind != "f" or np.isfinite(np.float32(values)).all()
    if not usable:
        raise InputError(
            f"{path}: NaN or infinite voxels, or above what float32 holds; replace them"
        )
    return values


def load_channels(name, paths, how):
    """The channels of a case, on one grid. -> [Volume, ...]

    paths: of each channel's file, or of one file; how: Preparation
    """
    if not how.nnunet:
        one = how.channel is None and not how.names
        return load_volumes(paths[0], [None] if one else how.numbers)
    found = [load(path) for path in paths]
    for k in range(1, len(found)):
        words = [f"channel {n}" for n in (how.numbers[0], how.numbers[k])]
        try:
            check_grids(found[0], found[k], paths[0], paths[k], *words)
        except InputError as error:
            raise InputError(f"case '{name}', {how.channel_text(k)}: {error}") from None
    return found


def type_of(header, path):
    """numpy's type of a file's voxels, in its byte order. InputError unless plain real numbers."""
    code = int(header["datatype"])
    name = data_type_codes.label.get(code, "unknown")
    kind = header.get_data_dtype() if name != "unknown" else np.dtype("V")
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise InputError(
            f"{path}: voxels of type {name} (datatype {code}); save them as plain "
            "integers, or as floats of 32 or 64 bits"
        )
    if header["bitpix"] not in (0, kind.itemsize * 8):  # 0: a program has not set it
        raise InputError(
            f"{path}: the header contradicts itself: voxels of type {name} (datatype), but of "
            f"{header['bitpix']} bits (bitpix); save the file anew"
        )
    return kind


def start_of(header, path):
    """At which byte of a file its voxels begin."""
    start = float(header["vox_offset"])
    if not space.VOXELS <= start < 2**31:
        raise InputError(
            f"{path}: the header says that the voxels begin at byte {start:g} "
            f"(vox_offset), not {space.VOXELS} or later; save the file anew"
        )
    return int(start)


def check_grids(image, other, image_path, other_path, a="the image", b="the label"):
    """InputError if two Volumes are not on one grid: none is moved onto the other by guess.

    a, b: what they are, in words
    """
    here, there = grid_of(image), grid_of(other)
    near = space.SAME_PLACE * here["spacing"].min()  # mm
    extent = here["size"] * here["spacing"]  # mm, by which an error of direction grows
    limits = dict(size=0, spacing=near / here["size"], origin=near, direction=near / extent)
    wrong = [w for w, most in limits.items() if (np.abs(there[w] - here[w]) > most).any()]
    if not wrong:
        return
    what, remedy = wrong[0], same_size_remedy(image, other, a, b)
    if what == "size":
        remedy = f"resample {b} to {a}"
    sizes = [" x ".join(map(str, g["size"][::-1].tolist())) for g in (here, there)]
    ours, theirs = (np.round(g[what], 6).tolist() for g in (here, there))
    raise InputError(
        f"{other_path} ({sizes[1]}) is on another grid than {image_path} "
        f"({sizes[0]}): {what} {theirs}, not {ours}; {remedy}"
    )


def grid_of(volume):
    """Size and spacing along x, y and z, origin and direction (a column an axis) of a Volume."""
    spacing = np.array(volume.spacing[::-1])
    return dict(
        size=np.array(volume.values.shape[::-1]),
        spacing=spacing,
        origin=volume.affine[:3, 3],
        direction=volume.affine[:3, :3] / spacing,
    )


def same_size_remedy(image, other, a, b):
    """What to do where two Volumes, called a and b, differ in place and not in size."""
    match = "if the two match voxel by voxel"
    if is_lost(other) == is_lost(image):
        return f"copy {a}'s header to {b} {match}, else resample {b} to {a}"
    if is_lost(image):
        return f"{a}'s header has lost its place: copy {b}'s header to it {match}"
    return (
        f"{b}'s header has lost its place: copy {a}'s header to it {match}, and do not resample it"
    )


def is_lost(volume):
    """Whether a header is one that programs write which know of no place: no code, or identity."""
    return not space.has_axes(volume.header) or is_identity(volume.affine)


def is_identity(affine):
    """Whether an affine is that of voxels of 1 mm which begin at 0, along the body's axes."""
    return (np.abs(affine) == np.eye(4)).all()


# ------------------------------------------------------------------------------------ intensity


def scale(image, window):
    """Intensities as networks see them. CT: the window becomes [-1, 1].

    MR (no window): clipped to the .5 and 99.5 percentile, if they differ; then mean 0 and standard
    deviation 1.
    """
    low, high = window or np.percentile(image, (0.5, 99.5))
    if low == high:
        low, high = image.min(), image.max()
    image = image.clip(low, high).astype(np.float64)
    if window:
        scaled = (image - low) / (high - low) * 2 - 1
    else:
        scaled = (image - image.mean()) / max(image.std(), 1e-6)
    return scaled.astype(np.float32)


@dataclass
class Preparation:
    """What is done to volumes; a dataset keeps it, so that it is done to new ones too."""

    spacing: tuple | None = None  # (D, H, W) in mm after resampling; None: each keeps its own
    window: tuple | None = None  # of CT: intensities that become -1 and 1; None: MR; where
    # channels differ: an entry for each
    channel: int | tuple | None = None  # that is taken, or those that are, of a 4D file or of
    # nnU-Net's NAME_0000, NAME_0001; None: all, where they have names, else the first
    nnunet: bool = False  # whether the channel is part of a file's name
    axes: str | None = None  # of the body, to which D, H and W are turned, such as SAR
    names: tuple | None = None  # of the channels, where several are taken

    @property
    def numbers(self):
        """Of the channels that are taken, in their order."""
        if self.channel is None:
            return list(range(len(self.names or [0])))
        return [self.channel] if isinstance(self.channel, int) else list(self.channel)

    @property
    def windows(self):
        """The window of each channel, or None."""
        if self.window is None or all(isinstance(v, (int, float)) for v in self.window):
            return [self.window] * len(self.numbers)
        return list(self.window)

    def channel_text(self, k):
        """What the k-th of several channels is called in messages."""
        name = f" ({self.names[k]})" if self.names else ""
        return f"channel {self.numbers[k]}{name}"

    def told(self):
        """What `prepared` of a dataset says of it, see data/h5.py."""
        about = {"from": "nifti", **asdict(self)}
        return {name: v for name, v in about.items() if name != "names" or v}


def common_axes(paths):
    """The body axes of most of some files, so that few have to be turned.

    None, and a note, if no file knows.
    """
    headers = [(space.parse(bytes_of(p, space.BYTES), p), p) for p in paths]
    found = [space.axes_of(space.affine_of(h, p)) for h, p in headers if space.has_axes(h)]
    if found:
        return Counter(found).most_common(1)[0][0]
    print(
        "note: no volume has an orientation (the codes of qform and sform are 0); they are "
        "taken as they are, so they should be stored alike"
    )
    return None


NOTES = {  # of cases, in the order in which they are said
    "turned": "lie along other body axes than {axes} (D, H, W) and were turned to these",
    "swapped": "had to swap axes of unequal spacing for that: D, H and W differ in resolution from "
    "those of the others, and slices are cut another way",
    "two places": "have a qform and an sform that differ; the sform is taken, and masks keep both",
    "unplaced": "have no orientation (the codes of qform and sform are 0); their D, H and W are "
    "taken for {axes}, as they are",
    "identity": "have a header that knows no place: voxels of 1 x 1 x 1 mm from 0 on, as programs "
    "write it that have lost the true ones; if so, no distance in mm and no --spacing is right",
    "tiny": "are less than {tiny} mm long; if that is a wrong unit, mend the spacing or its "
    "unit (xyzt_units)",
    "one slice": "have one slice alone, and a network for volumes learns and predicts little of it",
    "not HU": "do not look like Hounsfield units, and a window means nothing in others; if so, "
    "subtract the offset (often 1000 or 1024), or set the header's slope and intercept",
}


TINY = 2  # mm: a volume of a body that is shorter along each axis has a wrong unit


def say(notes, axes, info):
    """Prints what read_case() has noted. notes: {kind: [case, ...]}; info: of all cases"""
    total = sum(map(len, info.splits.values()))
    for kind, text in NOTES.items():
        names = notes[kind]
        if names and not (kind == "one slice" and info.dims == 2):
            print(
                f"note: {len(names)} of {total} volumes "
                f"{text.format(axes=axes, tiny=TINY)} (the first: {names[0]})"
            )


def read_case(row, paths, how, src, notes, values=range(labels.MOST)):
    """A row of split_cases() as an h5.Case.

    paths: of its channels, see load_channels(); how: Preparation; notes: {kind: [case, ...]} to
    fill; values: those that stand for the classes in its label.
    """
    found, label = load_channels(row.name, paths, how), None
    volume, affine = found[0], found[0].affine
    if row.mask:
        other = load(row.mask)
        check_grids(volume, other, row.image, row.mask)
        check_no_label(row, found, other, how)
        label = labels.class_numbers(other.values, row.mask, values)
    images = [to_float32(v.values, path) for v, path in zip(found, paths * len(found))]
    placed, swapped, turned = space.has_axes(volume.header), False, False
    if how.axes and placed:
        turn = space.turn_to(how.axes, affine)
        affine = space.reoriented_affine(affine, images[0].shape, turn)
        images = [space.reoriented(v, turn) for v in images]
        label = None if label is None else space.reoriented(label, turn)
        swapped = turn[:, 0].tolist() != [0, 1, 2]
        turned = swapped or (turn[:, 1] < 0).any()
    grid, spacing = images[0].shape, space.spacing_of(affine)
    doubts = {
        "turned": turned,
        "swapped": swapped and not how.spacing and max(spacing) > 1.01 * min(spacing),
        "two places": space.forms_differ(volume.header, row.image),
        "unplaced": how.axes and not placed,
        "identity": is_identity(volume.affine),
        "tiny": max(np.multiply(grid, spacing)) < TINY,
    }
    for kind in doubts:
        if doubts[kind]:
            notes[kind].append(row.name)
    for k, (image, window) in enumerate(zip(images, how.windows)):
        if window and (why := not_hounsfield(image, window)):
            which = f", {how.channel_text(k)}" if how.names else ""
            notes["not HU"].append(f"{row.name}{which}, {why}")
            break  # one channel tells enough
    header = np.frombuffer(space.without_texts(volume.header).binaryblock, np.uint8)
    about = dict(spacing=how.spacing or spacing, affine=affine, nifti_header=header)
    if how.spacing:
        about |= dict(source_grid=grid, source_label=label)
        ratio = np.divide(how.spacing, spacing)
        size = resampled_size(grid, ratio, row.image)
        images = [space.resample(v, size, ratio) for v in images]
        label = None if label is None else space.resample(label, size, ratio, nearest=True)
    if min(images[0].shape) == 1:
        notes["one slice"].append(row.name)
    if swapped and min(images[0].shape[1:]) < h5.SMALLEST:
        raise InputError(
            f"{row.image}: turned to the body axes of the others ({how.axes}), it has "
            f"{' x '.join(map(str, images[0].shape))} voxels, too few in a slice; leave it out"
        )
    images = [scale(image, window) for image, window in zip(images, how.windows)]
    image = images[0] if len(images) == 1 else np.stack(images, -1)
    return row.case(src, image, label, **about)


def check_no_label(row, found, label, how):
    """InputError if one of several channels, Volumes, is the label itself."""
    same = [k for k, v in enumerate(found) if np.array_equal(v.values, label.values)]
    if len(found) > 1 and same and label.values.any():
        raise InputError(
            f"case '{row.name}', {how.channel_text(same[0])}: is the label itself ({row.mask}); "
            "choose the others with --channel, or take it out"
        )


PADDINGS = 3  # values around a field of view, or beyond a scanner's range, that mean no intensity


def not_hounsfield(image, window):
    """Why the intensities (D, H, W) of a CT look unlike Hounsfield units; None: they do not."""
    low, high = window
    if np.ptp(image) < (high - low) / 20:
        return f"whose voxels are all between {image.min():g} and {image.max():g}"
    negative = np.bincount(np.minimum(-image[image < 0], 2**16).astype(int))
    negative[np.argsort(negative)[-PADDINGS:]] = 0
    if negative.sum() < 1e-3 * image.size:
        return "whose voxels, but for padding, are all 0 or more"
    # with an offset of 1000, noisy air is about 0, and a body above 600, where HU have little bone
    dense, bright = (np.count_nonzero(image > v) / image.size for v in (100, 600))
    if negative[200:].sum() < 0.01 * image.size and bright > max(0.01, dense - bright):
        return f"hardly any of whose voxels are below -200, as air is, and {bright:.0%} above 600"
    if np.count_nonzero((image > low) & (image < high)) < 0.02 * image.size:
        return "nearly all of which lies outside of the window"
    return None


def resampled_size(grid, ratio, path):
    """The grid (D, H, W) of the same extent at another spacing. ratio: of that to the volume's

    InputError if it is too large for any memory, or too small for networks.
    """
    size = tuple(max(1, round(n / s)) for n, s in zip(grid, ratio))
    small = min(size[1:]) < h5.SMALLEST <= min(grid[1:])
    if small or math.prod(size) > 2**31:
        why, other = ("too few in a slice", "smaller") if small else ("too many", "larger")
        raise InputError(
            f"{path}: {' x '.join(map(str, grid))} voxels would become "
            f"{' x '.join(map(str, size))}, {why}; leave it out, or convert data with a {other} "
            "--spacing"
        )
    return size


# ------------------------------------------------------------------------------------ writing


def write_mask(path, label, entry):
    """Writes a mask as NIfTI on its source's grid and axes, whole or not at all.

    label: (D, H, W) uint8 on the grid of entry (h5.Entry). The header is the source's; without
    it the affine places the mask, and without both the spacing alone.
    """
    if label.shape[-len(entry.grid) :] != entry.grid:
        raise ValueError(
            f"{path}: label of shape {label.shape}, but case '{entry.name}' has {entry.grid}"
        )
    where = f"case '{entry.name}'"
    label = space.to_source(label, entry)
    affine = entry.affine
    if affine is None:
        spacing = [1.0, *entry.source_spacing][-3:]  # a plain image is one slice
        affine = np.diag([*spacing[::-1], 1.0])
    if entry.nifti_header is None:
        header = space.new_header(affine, label.shape, where)
    else:
        header = space.parse(entry.nifti_header.tobytes(), where)
        label = space.reoriented(label, space.turn_to_source(header, affine, label.shape, where))
    raw = space.mask_header(header).binaryblock.ljust(space.VOXELS, b"\0")
    raw += np.ascontiguousarray(label, np.uint8).tobytes()
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(gzip.compress(raw, mtime=0) if str(path).endswith(".gz") else raw)


# ------------------------------------------------------------------------------------ main


def clip_windows(text):
    """argparse type: windows LOW,HIGH, with the channel's name or without. -> {name or None: it}"""
    found = {}
    for part in text.split(";"):
        name, _, window = part.rpartition("=")
        name = name.strip() or None
        if name in found:
            raise argparse.ArgumentTypeError(f"{text}: two windows for {name or 'all channels'}")
        found[name] = decimals(2)(window)
        if found[name][0] >= found[name][1]:
            raise argparse.ArgumentTypeError(f"{part}: the first number must be the lower one")
    return found


def window_of(args, names):
    """Preparation.window as --intensity and --clip say it. names: of several channels, or None"""
    clip = args.clip or {}
    if lost := [name for name in clip if name and name not in (names or ())]:
        there = f"there are: {', '.join(names or ())}"
        if not names:
            there = "there is one without a name; write --intensity ct --clip=LOW,HIGH"
        raise InputError(f"--clip: there is no channel '{lost[0]}'; {there}")
    windows = []
    for name in names or [None]:
        is_ct = args.intensity == "ct" or not args.intensity and calls_ct(name)
        windows.append(clip.get(name) or (clip.get(None, SOFT_TISSUE) if is_ct else None))
    return windows[0] if windows.count(windows[0]) == len(windows) else windows


def calls_ct(name):
    """Whether a channel is CT by its name: CT, ct, or CT 0 where several are called CT."""
    return (name or "").upper().split()[:1] == ["CT"]


def note_ct(args, numbers):
    """A note where dataset.json calls the only channel CT and --intensity does not say so."""
    if args.intensity or len(numbers) > 1:
        return
    try:
        (name,) = name_channels(args.src, numbers, True)
    except InputError:  # nothing needs the name
        return
    if calls_ct(name):
        print(
            "note: dataset.json calls the images CT, but they are taken as MR, each case by "
            "itself; give --intensity ct if they are CT"
        )


def standardized(windows):
    """`standardize` of data/h5.py: whether readers standardize channels, or which ones."""
    found = [window is None for window in windows]
    return found[0] if len(set(found)) == 1 else found


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m data.nifti")
    # else argparse takes the value of --clip -175,250 for an option
    p._negative_number_matcher = re.compile(r"-[\d.]+,")
    p.add_argument("src", type=Path, help="folder that holds imagesTr and labelsTr")
    p.add_argument("--out", type=file, required=True, help="dataset file to write")
    p.add_argument("--spacing", type=decimals(3, low=0), metavar="D,H,W",
                   help="resample to this spacing in mm; default: each case keeps its own")
    p.add_argument("--axes",
                   help="body axes that D, H and W are turned to, such as SAR for up, front and "
                        "right; default: those of most volumes")
    p.add_argument("--intensity", choices=("mr", "ct"),
                   help="mr: each case to mean 0, deviation 1; ct: one window for all (default: "
                        "mr; of several channels, ct where dataset.json calls one CT)")
    p.add_argument("--clip", type=clip_windows, metavar="LOW,HIGH",
                   help="window of --intensity ct in Hounsfield units (default: -175,250, soft "
                        "tissue); 'NAME=LOW,HIGH;NAME=...' makes some channels CT, by their names")
    p.add_argument("--channel", type=ordered_numbers, metavar="N,...",
                   help="which channels (nnU-Net) or volumes (of a 4D file) to take, in that "
                        "order, as in 0 or 0,2; default: all")
    p.add_argument("--dims", type=int, choices=(2, 3), default=3,
                   help="segmented as slices or volumes")
    labels.add_options(p)
    splits.add_options(p)
    args = p.parse_args(argv)
    labels.check_options(args)
    if not args.src.is_dir():
        raise InputError(f"{args.src}: no such folder; give the one that holds imagesTr")
    if args.clip and None in args.clip and args.intensity != "ct":
        raise InputError(
            "--clip is the window of --intensity ct; mr is clipped by percentiles (of several "
            "channels, 'NAME=LOW,HIGH' gives one a window)"
        )
    if args.axes and not space.are_axes(args.axes):
        raise InputError(
            f"--axes {args.axes}: one letter each of S or I, A or P, R or L is needed, as in SAR"
        )
    return args
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    lists = splits.find_lists(args)
    rows, files, numbers, nnunet = find(args.src, args.channel)
    rows = split_cases(rows, lists, args)
    numbers, names = choose_channels(rows, numbers, args)
    window = window_of(args, names)
    note_ct(args, numbers)
    classes, values = name_classes(args, [r.mask for r in rows if r.mask])
    axes = args.axes or common_axes([r.image for r in rows])
    whole = not args.channel and numbers == list(range(len(numbers)))
    channel = None if whole else numbers[0] if len(numbers) == 1 else numbers
    how = Preparation(args.spacing, window, channel, nnunet, axes, names)
    notes = defaultdict(list)
    info = h5.write(
        args.out,
        (read_case(row, files[row.image], how, args.src, notes, values) for row in rows),
        name=args.src.resolve().name,
        classes=classes,
        dims=args.dims,
        channels=len(numbers),
        channel_names=names,
        standardize=standardized(how.windows),
        prepared=how.told(),
    )
    labels.tell_mapping(values)
    h5.report(info)
    say(notes, axes, info)


if __name__ == "__main__":
    cli(main)
