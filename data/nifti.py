"""Folders of NIfTI volumes -> one HDF5 file; and masks back to NIfTI.

    python -m data.nifti Task02_Heart --out heart.h5
    python -m data.nifti Task09_Spleen --out spleen.h5 --intensity ct --spacing 2,1,1
    python -m data.nifti ACDC --out acdc.h5 --patient '(patient\\d+)_'

What is read under SRC (.nii or .nii.gz), as the Medical Segmentation Decathlon and nnU-Net have it:
    imagesTr, labelsTr   train and val; a case without a label stays unlabeled in train
    imagesTs             test, with labels where labelsTs has them
    dataset.json         its "labels" name the classes and their values; else they are numbered
    Decathlon            NAME.nii.gz for image and label
    nnU-Net              NAME_0000.nii.gz, NAME_0001.nii.gz (channels) and the label NAME.nii.gz

Splits: SRC/train.txt, val.txt, test.txt (or --lists DIR), a case a line; otherwise by patient with
--seed. A note tells where names of different splits look like those of one patient.
Labels are class numbers, 0, 1, 2 and so on. Those with other values, 0 and 255, say, or 0, 1, 2, 4,
need a dataset.json that names these, or --labels, which lists them in the order of the classes.

Volumes are stored as (D, H, W), turned to the body axes of most of them by flips and swaps. Affine
and spacing, in mm, are those of the sform where its code is above 0, else of the qform where its
code is, else of pixdim. A header that contradicts itself, or places no boxes, is refused
(data/space.py). Masks have the header of their source, so its place, byte for byte.
"""

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
from data.options import Parser, cli, decimals, number
from data.pixels import to_float32
from data.splits import Row, by_name, note_unread, plain_name

# no hidden files: archives made on a Mac are full of ._NAME.nii.gz
NAME = re.compile(r"(?i)([^.].*)\.nii(\.gz)?")


# ------------------------------------------------------------------------------------ finding cases


def volumes(folder):
    """Name without ending -> path, for the NIfTI files directly in a folder, sorted by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    named = ((NAME.fullmatch(path.name), path) for path in paths)
    return by_name((plain_name(match[1]), path) for match, path in named if match)


def say_unread(folders):
    """Prints how many files and folders in some folders are not read as NIfTI, if any."""
    note_unread(folders, lambda path: NAME.fullmatch(path.name), ".nii, .nii.gz")


def find(src, channel):
    """The cases of SRC, and whether their files are named as nnU-Net does. -> [Row, ...], bool

    A case is its own patient; its split is "test" in imagesTs, else None.
    """
    rows, channels = [], set()
    layout = {s: (volumes(src / f"images{s}"), volumes(src / f"labels{s}")) for s in ("Tr", "Ts")}
    images, labels = layout["Tr"]
    if not images:
        raise InputError(
            f"{src / 'imagesTr'}: no .nii or .nii.gz is there; see python -m data.nifti --help"
        )
    folders = [src / f"{what}{part}" for part in layout for what in ("images", "labels")]
    say_unread(folder for folder in folders if folder.is_dir())
    nnunet = all(re.search(r"_\d{4}$", n) for n in images) and not set(images) & set(labels)
    for part, (images, labels) in layout.items():
        cases, found = one_channel(images, channel, nnunet)
        channels |= found
        if lost := sorted(set(labels) - set(cases)):
            raise InputError(
                f"{labels[lost[0]]}: no image of that name in {src / f'images{part}'} "
                f"({len(lost)} such labels); add it, or take the label out"
            )
        if both := sorted(set(cases) & {r.name for r in rows}):
            raise InputError(
                f"{src}: case '{both[0]}' is in both imagesTr and imagesTs; remove or rename one "
                "of the two"
            )
        split = "test" if part == "Ts" else None
        rows += [Row(name, path, labels.get(name), name, split) for name, path in cases.items()]
    if channel is None and len(channels) > 1:
        print(
            f"the cases have channels {', '.join(map(str, sorted(channels)))}; taking 0 (choose "
            "with --channel)"
        )
    return rows, nnunet


def one_channel(images, channel, nnunet):
    """The files of one channel (default: 0), and the numbers of all there are.

    images: {name: path}; nnunet: as in Preparation -> {case: path}, set
    """
    taken = channel or 0
    cases = defaultdict(dict)  # name -> {channel: path}
    for name, path in images.items():
        if not nnunet:
            cases[name][taken] = path
        elif re.search(r"_\d{4}$", name):
            cases[name[:-5]][int(name[-4:])] = path
        else:
            raise InputError(
                f"{path}: the cases have names of nnU-Net, NAME_0000, and this has no channel; "
                "rename it"
            )
    for name, paths in cases.items():
        if taken not in paths:
            raise InputError(
                f"{next(iter(paths.values())).parent}: case '{name}' has no channel {taken} "
                f"(it has: {', '.join(map(str, paths))}); add it, or convert data "
                "with another --channel"
            )
    found = {name: paths[taken] for name, paths in cases.items()}
    return found, set().union(*cases.values())


def split_cases(rows, lists, args):
    """Gives every case its split. -> rows in their final order

    Says what has no label, what is left out, and whose names look like those of one patient.
    """
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
        if lost := [r.name for r in out if r.split == "val" and not r.mask]:
            raise InputError(
                f"val.txt: case '{lost[0]}' has no label ({len(lost)} such cases); list it in "
                "train.txt or unlabeled.txt"
            )
        named = {r.name for r in out}
        out += [r for r in held if r.name not in named]
        why = "they are in no list"
    else:
        out = splits.assign_splits([r for r in rows if r.mask and not r.split], None, args)
        others = {r.patient for r in out if r.split != "train"}
        out += [r._replace(split="train") for r in bare if r.patient not in others]
        out += held
        why = "they have no label, and their patients are in val or test"
    splits.note_patients(out, drawn=not lists)
    if len(out) < len(rows):
        print(f"{len(rows) - len(out)} of {len(rows)} cases are left out: {why}")
    return out


def name_classes(src, args, paths):
    """Names of the classes, background first, and the values that stand for them in the labels.

    They are those of --classes and --labels, else of dataset.json. paths: of the labels, which must
    hold 0, 1, 2 and so on without a gap where nobody says anything.
    """
    labels.check_options(args)
    names, values = args.classes, args.labels
    if names:
        return names, values or range(len(names))
    path = src / "dataset.json"
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

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name in it comes twice")
        return found

    try:
        table = json.loads(read_text(path), object_pairs_hook=once).get("labels")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a readable JSON object ({error}); mend it, or give --classes"
        ) from None
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
    """One volume of a file. -> Volume

    channel: which one, where the file holds several. InputError if it is not there, if there are
    several and channel is None, and for anything but a whole file of plain, finite numbers.
    """
    raw = bytes_of(path)
    header = space.parse(raw, path)
    size = space.size_of(header, path)
    kind, start = type_of(header, path), start_of(header, path)
    whole = start + math.prod(size) * kind.itemsize
    if len(raw) < whole:
        raise InputError(f"{path}: truncated, {len(raw)} of {whole} bytes; copy it again")
    if len(size) > 4:
        raise InputError(
            f"{path}: {len(size)}D with {math.prod(size[4:])} value(s) per voxel; "
            "save one volume of plain numbers"
        )
    if len(size) == 4:
        if channel is None:
            raise InputError(
                f"{path}: 4D, {size[3]} volumes in one file; save the one that is meant alone, or "
                "convert data with --channel, which chooses an image's"
            )
        if channel >= size[3]:
            raise InputError(
                f"{path}: has no channel {channel}, but 0 to {size[3] - 1}; add it, or leave it out"
            )
        start += channel * math.prod(size[:3]) * kind.itemsize
    elif channel and not re.search(rf"(?i)_{channel:04d}\.nii", path.name):
        raise InputError(
            f"{path}: has no channel {channel}, but one volume; add it, or leave it out"
        )
    values = np.frombuffer(raw, kind, math.prod(size[:3]), start).reshape(size[2::-1])
    values = values.astype(kind.newbyteorder("="))
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
    return Volume(values, space.affine_of(header, path), header)


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


def check_grids(image, label, image_path, label_path):
    """InputError if two Volumes are not on one grid: no label is moved onto its image by guess."""
    a, b = grid_of(image), grid_of(label)
    near = space.SAME_PLACE * a["spacing"].min()  # mm
    extent = a["size"] * a["spacing"]  # mm, by which an error of direction grows
    limits = dict(size=0, spacing=near / a["size"], origin=near, direction=near / extent)
    wrong = [what for what, most in limits.items() if (np.abs(b[what] - a[what]) > most).any()]
    if not wrong:
        return
    what, remedy = wrong[0], same_size_remedy(image, label)
    if what == "size":
        remedy = "resample the label to its image"
    sizes = [" x ".join(map(str, g["size"][::-1].tolist())) for g in (a, b)]
    there, here = (np.round(g[what], 6).tolist() for g in (b, a))
    raise InputError(
        f"{label_path} ({sizes[1]}) is on another grid than {image_path} "
        f"({sizes[0]}): {what} {there}, not {here}; {remedy}"
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


def same_size_remedy(image, label):
    """What to do where a label has its image's size and not its place."""
    match = "if the two match voxel by voxel"
    if is_lost(label) == is_lost(image):
        return f"copy the image's header to the label {match}, else resample the label to its image"
    if is_lost(image):
        return f"the image's header has lost its place: copy the label's header to it {match}"
    return (
        "the label's header has lost its place: copy the image's header to it "
        f"{match}, and do not resample it"
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

    MR (no window): clipped to the .5 and 99.5 percentile, then mean 0 and standard deviation 1.
    """
    low, high = window or np.percentile(image, (0.5, 99.5))
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
    window: tuple | None = None  # of CT: intensities that become -1 and 1; None: MR
    channel: int | None = None  # that is taken, of a 4D file or of nnU-Net's NAME_0000, NAME_0001
    nnunet: bool = False  # whether the channel is part of a file's name
    axes: str | None = None  # of the body, to which D, H and W are turned, such as SAR


def common_axes(paths):
    """The body axes of most of some files, so that few have to be turned; None: no file knows."""
    headers = [(space.parse(bytes_of(p, space.BYTES), p), p) for p in paths]
    found = [space.axes_of(space.affine_of(h, p)) for h, p in headers if space.has_axes(h)]
    return Counter(found).most_common(1)[0][0] if found else None


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


def read_case(row, how, src, notes, values=range(labels.MOST)):
    """A row of split_cases() as an h5.Case.

    how: Preparation; notes: {kind: [case, ...]} to fill; values: those that stand for the classes
    in its label.
    """
    volume, label = load(row.image, how.channel), None
    if row.mask:
        other = load(row.mask)
        check_grids(volume, other, row.image, row.mask)
        label = labels.class_numbers(other.values, row.mask, values)
    image, affine = to_float32(volume.values, row.image), volume.affine
    placed, swapped, turned = space.has_axes(volume.header), False, False
    if how.axes and placed:
        turn = space.turn_to(how.axes, affine)
        affine = space.reoriented_affine(affine, image.shape, turn)
        image, label = (None if v is None else space.reoriented(v, turn) for v in (image, label))
        swapped = turn[:, 0].tolist() != [0, 1, 2]
        turned = swapped or (turn[:, 1] < 0).any()
    spacing = space.spacing_of(affine)
    doubts = {
        "turned": turned,
        "swapped": swapped and not how.spacing and max(spacing) > 1.01 * min(spacing),
        "two places": space.forms_differ(volume.header, row.image),
        "unplaced": how.axes and not placed,
        "identity": is_identity(volume.affine),
        "tiny": max(np.multiply(image.shape, spacing)) < TINY,
        "one slice": min(image.shape) == 1,
    }
    for kind in doubts:
        if doubts[kind]:
            notes[kind].append(row.name)
    if how.window and (why := not_hounsfield(image, how.window)):
        notes["not HU"].append(f"{row.name}, {why}")
    header = np.frombuffer(space.without_texts(volume.header).binaryblock, np.uint8)
    case = row.case(
        src, image, label, spacing=how.spacing or spacing, affine=affine, nifti_header=header
    )
    if how.spacing:
        case.source_grid, case.source_label = image.shape, label
        ratio = np.divide(how.spacing, spacing)
        size = resampled_size(image.shape, ratio, row.image)
        case.image = space.resample(image, size, ratio)
        case.label = None if label is None else space.resample(label, size, ratio, nearest=True)
    if swapped and min(case.image.shape[1:]) < h5.SMALLEST:
        raise InputError(
            f"{row.image}: turned to the body axes of the others ({how.axes}), it has "
            f"{' x '.join(map(str, case.image.shape))} voxels, too few in a slice; leave it out"
        )
    case.image = scale(case.image, how.window)
    return case


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


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.nifti")
    # else argparse takes the value of --clip -175,250 for an option
    p._negative_number_matcher = re.compile(r"-[\d.]+,")
    p.add_argument("src", help="folder that holds imagesTr and labelsTr")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument(
        "--spacing",
        type=decimals(3, low=0),
        metavar="D,H,W",
        help="resample to this spacing in mm; default: each case keeps its own",
    )
    p.add_argument(
        "--axes",
        help="body axes that D, H and W are turned to, such as SAR for up, "
        "front and right; default: those of most volumes",
    )
    p.add_argument(
        "--intensity",
        choices=("mr", "ct"),
        default="mr",
        help="mr: each case to mean 0, deviation 1; ct: one window for all",
    )
    p.add_argument(
        "--clip",
        type=decimals(2),
        metavar="LOW,HIGH",
        help="window of --intensity ct in Hounsfield units (default: -175,250, soft tissue)",
    )
    p.add_argument(
        "--channel", type=number(0), help="which channel (nnU-Net) or volume (of a 4D file) to take"
    )
    p.add_argument(
        "--dims", type=int, choices=(2, 3), default=3, help="segmented as slices or volumes"
    )
    labels.add_options(p)
    splits.add_options(p)
    args = p.parse_args(argv)
    src = Path(args.src)
    if not src.is_dir():
        raise InputError(f"{src}: no such folder; give the one that holds imagesTr")
    if args.clip and args.intensity == "mr":
        raise InputError("--clip is the window of --intensity ct; mr is clipped by percentiles")
    if args.axes and not space.are_axes(args.axes):
        raise InputError(
            f"--axes {args.axes}: one letter each of S or I, A or P, R or L is needed, as in SAR"
        )
    window = args.clip or (-175.0, 250.0) if args.intensity == "ct" else None
    if window and window[0] >= window[1]:
        raise InputError(f"--clip {window}: the first number must be the lower one")
    lists = splits.find_lists(args)
    rows, nnunet = find(src, args.channel)
    rows = split_cases(splits.name_patients(rows, args), lists, args)
    classes, values = name_classes(src, args, [r.mask for r in rows if r.mask])
    axes = args.axes or common_axes([r.image for r in rows])
    if axes is None:
        print(
            "note: no volume has an orientation (the codes of qform and sform are 0); they are "
            "taken as they are, so they should be stored alike"
        )
    how = Preparation(args.spacing, window, args.channel, nnunet, axes)
    notes = defaultdict(list)
    info = h5.write(
        args.out,
        (read_case(row, how, src, notes, values) for row in rows),
        name=src.resolve().name,
        classes=classes,
        dims=args.dims,
        channels=1,
        standardize=window is None,
        prepared={"from": "nifti", **asdict(how)},
    )
    labels.tell_mapping(values)
    h5.report(info)
    say(notes, axes, info)


if __name__ == "__main__":
    cli(main)
