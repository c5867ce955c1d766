"""Folders of NIfTI volumes, as of the Medical Segmentation Decathlon and of nnU-Net -> one HDF5 file; and masks back to NIfTI.

    python -m data.nifti Task02_Heart --out heart.h5
    python -m data.nifti Task09_Spleen --out spleen.h5 --intensity ct --spacing 2,1,1
    python -m data.nifti ACDC --out acdc.h5 --patient '(patient\\d+)_'

What is read under SRC (.nii or .nii.gz):
    imagesTr, labelsTr   train and val; a case without a label stays unlabeled in train
    imagesTs             test, with labels where labelsTs has them
    dataset.json         its "labels" name the classes and their values; else they are numbered
    Decathlon: NAME.nii.gz for image and label; nnU-Net: NAME_0000.nii.gz, NAME_0001.nii.gz (channels) and the label NAME.nii.gz

Splits: SRC/train.txt, val.txt, test.txt (or --lists DIR), a case a line; otherwise by patient with --seed. Volumes are stored as (D, H, W).
Labels are class numbers, 0, 1, 2 and so on. Those with other values, 0 and 255, say, or 0, 1, 2, 4,
need a dataset.json that names these, or --labels, which lists them in the order of the classes.
"""
import gzip
import json
import math
import os
import re
import struct
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data import h5, labels
from data.files import SEED, SHARE, InputError, Parser, cli, number, read_text, replacing
from data.images import assign_splits, lists_of, name_patients, note_patients

NAME = re.compile(r"([^.].*)\.nii(\.gz)?")  # no hidden files: archives made on a Mac are full of ._NAME.nii.gz


# ---------------------------------------------------------------------------------------------------- finding cases

def volumes(folder):
    """Name without ending -> path, for the NIfTI files directly in a folder, in order of their names."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            if match[1] in found:
                raise InputError(f"{path}: {found[match[1]].name} is there too; remove one of the two")
            found[match[1]] = path
    return found


def find(src, channel):
    """The cases of SRC, and whether their files are named as nnU-Net does. -> [(name, image path, label path or None, patient = name, "test" or None)], bool"""
    rows, channels = [], set()
    layout = {s: (volumes(src / f"images{s}"), volumes(src / f"labels{s}")) for s in ("Tr", "Ts")}
    images, labels = layout["Tr"]
    if not images:
        raise InputError(f"{src / 'imagesTr'}: no .nii or .nii.gz is there; see python -m data.nifti --help")
    nnunet = all(re.search(r"_\d{4}$", n) for n in images) and not set(images) & set(labels)
    for part, (images, labels) in layout.items():
        cases, found = one_channel(images, channel, nnunet)
        channels |= found
        rows += [(name, path, labels.get(name), name, "test" if part == "Ts" else None) for name, path in cases.items()]
        if lost := sorted(set(labels) - set(cases)):
            raise InputError(f"{labels[lost[0]]}: no image of that name in {src / f'images{part}'} ({len(lost)} such labels)")
    if both := {r[0] for r in rows if r[4]} & {r[0] for r in rows if not r[4]}:
        raise InputError(f"{src}: case '{min(both)}' is in both imagesTr and imagesTs; remove or rename one of the two")
    if channel is None and len(channels) > 1:
        print(f"the cases have channels {', '.join(map(str, sorted(channels)))}; taking 0 (choose with --channel)")
    return rows, nnunet


def one_channel(images, channel, nnunet):
    """The files of one channel (default: 0), and the numbers of all there are. images: {name: path}; nnunet: as in Preparation -> {case: path}, set"""
    if nnunet and (lost := [n for n in images if not re.search(r"_\d{4}$", n)]):
        raise InputError(f"{images[lost[0]]}: the cases have names of nnU-Net, NAME_0000, and this has no channel; rename it")
    cases = {}  # name -> {channel: path}
    for name, path in images.items():
        cases.setdefault(name[:-5] if nnunet else name, {})[int(name[-4:]) if nnunet else channel or 0] = path
    for name, paths in cases.items():
        if (channel or 0) not in paths:
            raise InputError(f"{next(iter(paths.values())).parent}: case '{name}' has no channel {channel or 0} (it has: {', '.join(map(str, paths))})")
    return {name: paths[channel or 0] for name, paths in cases.items()}, {c for paths in cases.values() for c in paths}


def split_cases(rows, lists, args):
    """Gives every case its split. -> rows in their final order; says what has no label and what is left out"""
    bare = [r[0] for r in rows if not (r[2] or r[4])]
    if not any(r[2] for r in rows):
        raise InputError(f"{args.src}: no case has a label; labelsTr must hold files named like the cases, such as {rows[0][0]}.nii.gz")
    if bare:
        print(f"{len(bare)} of {len(rows)} cases have no label and stay unlabeled (the first: {bare[0]})")
    if lists:
        out = assign_splits(rows, lists, args)
        if lost := [r[0] for r in out if r[4] == "val" and not r[2]]:
            raise InputError(f"val.txt: case '{lost[0]}' has no label ({len(lost)} such cases); list it in train.txt or unlabeled.txt")
        named = {r[0] for r in out}
        out += [r for r in rows if r[4] and r[0] not in named]
    else:
        print(f"no list of splits: by patient, with seed {args.seed}")
        note_patients([r for r in rows if not r[4]])
        out = assign_splits([r for r in rows if r[2] and not r[4]], None, args)
        held_out = {r[3] for r in out if r[4] != "train"}
        out += [(*r[:4], "train") for r in rows if not (r[2] or r[4] or r[3] in held_out)] + [r for r in rows if r[4]]
    if len(out) < len(rows):
        print(f"{len(rows) - len(out)} of {len(rows)} cases are left out: "
              + ("they are in no list" if lists else "they have no label, and their patients are in val or test"))
    return out


def name_classes(src, names, values, paths):
    """Names of the classes, background first, and the values that stand for them in the labels.

    names, values: of --classes and --labels, or None, which dataset.json then says; paths: of the
    labels, which must hold 0, 1, 2 and so on without a gap where nobody says anything.
    """
    labels.check_options(values, names)
    if names:
        return names, values or range(len(names))
    path = src / "dataset.json"
    if table := named_values(path) if path.is_file() else {}:
        values = values or sorted(table)
        if lost := [v for v in values if v not in table]:
            raise InputError(f"{path}: names no label value {lost[0]}, which --labels lists; give "
                             "--classes, too, with a name for each")
        return [table[v] for v in values], values
    if values:
        return labels.numbered(len(values)), values
    found = set().union(*(np.unique(to_label(read(p), p)).tolist() for p in paths))
    count = labels.count_classes(found, paths[0].parent)
    return labels.numbered(count), range(count)


def named_values(path):
    """The "labels" of a dataset.json, {value: name}; empty if it has none."""
    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name in it comes twice")
        return found
    try:
        table = json.loads(read_text(path), object_pairs_hook=once).get("labels")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON object ({error}); mend it, or give "
                         "--classes") from None
    if not table:
        return {}
    try:
        numbers_first = all(key.isdigit() for key in table)  # as the Decathlon has it
        pairs = list(table.items()) if numbers_first else [(v, k) for k, v in table.items()]
        by_value = {int(str(value).removesuffix(".0")): name for value, name in pairs}
        if not all(isinstance(name, str) for name in by_value.values()):
            raise TypeError
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: \"labels\" must map one number to each name; regions (lists of "
                         "numbers) are not supported; mend it, or give --classes") from None
    if "ignore" in by_value.values():
        raise InputError(f"{path}: an 'ignore' label is not supported; change it to a class in the labels, or give --classes")
    if len(by_value) < len(table):
        values = ", ".join(str(value) for value, _ in pairs)
        raise InputError(f"{path}: label values {values}; each class needs its own; mend it, or "
                         "give --classes")
    zero = by_value.get(0)
    if zero is None or zero != "background" and "background" in by_value.values():
        raise InputError(f"{path}: label value 0, which must be the background, is "
                         f"{'not named' if zero is None else zero}; mend it, or give --labels and "
                         "--classes")
    return by_value


# ---------------------------------------------------------------------------------------------------- reading

def check_bytes(path):
    """Refuses what ITK mends without a word: it fills up a truncated file, takes a spacing of 0 or NaN for 1 mm, and NaN voxels for 0."""
    with open(path, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as f:
            raw = f.read()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: truncated or damaged; copy it again") from None
    order = next((o for o in "<>" if len(raw) > 348 and struct.unpack_from(f"{o}i", raw)[0] == 348), None)
    if order is None:
        raise InputError(f"{path}: not a NIfTI-1 file (or truncated); copy it again, or save it as NIfTI-1")
    fields = ("8h", 40), ("2h", 70), ("8f", 76), ("f", 108)
    dim, (kind, bits), pixdim, (start,) = (struct.unpack_from(order + form, raw, at) for form, at in fields)
    count, start = math.prod(max(n, 1) for n in dim[1:dim[0] + 1]), int(start)
    if len(raw) < start + count * bits // 8:
        raise InputError(f"{path}: truncated, {len(raw)} of {start + count * bits // 8} bytes; copy it again")
    if not all(0 < s < math.inf for s in pixdim[1:min(dim[0], 3) + 1]):
        raise InputError(f"{path}: the header has a spacing (pixdim) of {' x '.join(f'{s:g}' for s in pixdim[1:4])}; mend the header")
    if kind in (16, 64) and not np.isfinite(np.frombuffer(raw, f"{order}f{bits // 8}", count, start)).all():  # float32, float64
        raise InputError(f"{path}: NaN or infinite voxels; replace them")


def read(path, channel=None):
    """One volume of a file as a SimpleITK image; InputError if it is not there, or if there are several and channel is None."""
    check_bytes(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        if reader.GetNumberOfComponents() > 1 or len(size) not in (3, 4):
            raise InputError(f"{path}: {len(size)}D with {reader.GetNumberOfComponents()} value(s) per voxel; "
                             "a volume of plain numbers is needed")
        if len(size) == 4:
            if channel is None:
                raise InputError(f"{path}: 4D, {size[3]} volumes in one file; choose an image's with --channel; a label must have one")
            if channel >= size[3]:
                raise InputError(f"{path}: has no channel {channel}; it has 0 to {size[3] - 1}")
            reader.SetExtractSize([*size[:3], 0])
            reader.SetExtractIndex([0, 0, 0, channel])
        elif channel and not re.search(rf"_{channel:04d}\.nii", path.name):
            raise InputError(f"{path}: has no channel {channel}; it holds one volume")
        return reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{path}: ITK cannot read it: {str(error).strip().splitlines()[-1].split('ERROR: ')[-1]}") from None


def to_label(image, path, values=range(labels.MOST)):
    """A label's class numbers (D, H, W) uint8. values: those that stand for the classes"""
    return labels.class_numbers(sitk.GetArrayFromImage(image), path, values)


def check_grids(image, label, image_path, label_path):
    """InputError if the two are not on one grid: a label is never moved onto its image by guessing."""
    for what in ("Size", "Spacing", "Origin", "Direction"):
        a, b = (np.array(getattr(v, f"Get{what}")()) for v in (image, label))
        if np.abs(a - b).max() > 1e-3:
            sizes = [" x ".join(map(str, v.GetSize()[::-1])) for v in (image, label)]
            raise InputError(f"{label_path} ({sizes[1]}) is on another grid than {image_path} ({sizes[0]}): {what.lower()} "
                             f"{np.round(b, 4).tolist()}, not {np.round(a, 4).tolist()}; resample the label to its image")


# ---------------------------------------------------------------------------------------------------- space and intensity

def affine_of(image):
    """[4, 4]: voxel (x, y, z) -> mm in NIfTI's axes (right, anterior, superior); ITK's point to the left and posterior."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    return affine


def resample(image, size, spacing, how):
    """A SimpleITK image on a grid of other size and spacing (x, y, z), with the same origin and direction."""
    f = sitk.ResampleImageFilter()
    f.SetOutputOrigin(image.GetOrigin()), f.SetOutputDirection(image.GetDirection())
    f.SetOutputSpacing(spacing), f.SetSize(size), f.SetInterpolator(how)
    f.SetUseNearestNeighborExtrapolator(True)  # a finer grid ends beyond the last voxel's center, where ITK would put zeros
    return f.Execute(image)


def scale(image, window):
    """MR (no window): clipped to its .5 and 99.5 percentile, then mean 0 and standard deviation 1. CT: the window becomes [-1, 1]."""
    low, high = window or np.percentile(image, (0.5, 99.5))
    image = image.clip(low, high).astype(np.float64)
    scaled = (image - low) / (high - low) * 2 - 1 if window else (image - image.mean()) / max(image.std(), 1e-6)
    return scaled.astype(np.float32)


@dataclass
class Preparation:
    """What is done to volumes; a dataset keeps it, so that it is done to new ones too."""
    spacing: tuple | None = None  # (D, H, W) mm that they are resampled to; None: each keeps its own
    window: tuple | None = None   # of CT: intensities that become -1 and 1; None: MR
    channel: int | None = None    # that is taken, of a 4D file or of nnU-Net's NAME_0000, NAME_0001
    nnunet: bool = False          # whether the channel is part of a file's name


def read_case(row, how, src, axes, values=range(labels.MOST)):
    """A row of split_cases() as an h5.Case. how: Preparation; axes: a set that notes along which
    body axes its voxels lie; values: those that stand for the classes in its label"""
    name, image_path, label_path, patient, split = row
    image, source_grid = sitk.Cast(read(image_path, how.channel), sitk.sitkFloat32), None
    if label_path:
        label = read(label_path)
        check_grids(image, label, image_path, label_path)
        label = sitk.GetImageFromArray(to_label(label, label_path, values))
        label.CopyInformation(image)
    affine = affine_of(image)
    axes.add(tuple(np.abs(affine[:3, :3]).argmax(0).tolist()))
    if how.spacing:
        source_grid, spacing = image.GetSize()[::-1], how.spacing[::-1]
        size = [max(1, round(n * old / new)) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing)]
        image = resample(image, size, spacing, sitk.sitkLinear)
        label = resample(label, size, spacing, sitk.sitkNearestNeighbor) if label_path else None
    return h5.Case(split, name, scale(sitk.GetArrayFromImage(image), how.window), sitk.GetArrayFromImage(label) if label_path else None,
                   patient, image.GetSpacing()[::-1], str(image_path.relative_to(src)), affine, source_grid)


# ---------------------------------------------------------------------------------------------------- writing

def write_mask(path, label, entry):
    """Writes a mask as NIfTI on its source's grid, whole or not at all.

    label: (D, H, W) uint8 on the grid of entry (h5.Entry). Where the entry has no affine, the spacing alone places the mask.
    """
    if label.shape[-len(entry.grid):] != entry.grid:
        raise ValueError(f"{path}: label of shape {label.shape}, but case '{entry.name}' has {entry.grid}")
    spacing = [*entry.spacing[::-1], 1.0][:3]  # (x, y, z); a plain image is one slice
    affine = np.diag([*spacing, 1.0]) if entry.affine is None else np.array(entry.affine)
    affine[:2] *= -1  # see affine_of()
    source_spacing = np.linalg.norm(affine[:3, :3], axis=0)
    mask = sitk.GetImageFromArray(np.ascontiguousarray(label, np.uint8))
    mask.SetOrigin(affine[:3, 3].tolist()), mask.SetDirection((affine[:3, :3] / source_spacing).ravel().tolist())
    if entry.source_grid:
        mask.SetSpacing(spacing)
        mask = resample(mask, entry.source_grid[::-1], source_spacing.tolist(), sitk.sitkNearestNeighbor)
    mask.SetSpacing(source_spacing.tolist())
    with replacing(path) as temporary, tempfile.TemporaryDirectory(prefix=".", dir=os.path.dirname(temporary)) as folder:
        whole = os.path.join(folder, os.path.basename(path))  # ITK goes by the ending
        sitk.WriteImage(mask, whole, useCompression=True)
        os.replace(whole, temporary)


# ---------------------------------------------------------------------------------------------------- main

def decimals(option, text, count, low=-math.inf):
    """`count` numbers above `low`, joined by commas. -> tuple"""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if len(values) != count or not all(low < v < math.inf for v in values):
        raise InputError(f"{option} {text}: {count} numbers{f' above {low}' if low > -math.inf else ''}, joined by commas, are needed")
    return values


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.nifti")
    p._negative_number_matcher = re.compile(r"-[\d.]+,")  # else argparse takes the value of --clip -175,250 for an option
    p.add_argument("src", help="folder that holds imagesTr and labelsTr")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument("--spacing", metavar="D,H,W", help="resample to this spacing in mm; default: each case keeps its own")
    p.add_argument("--intensity", choices=("mr", "ct"), default="mr",
                   help="mr: each case to mean 0, deviation 1; ct: one window for all")
    p.add_argument("--clip", metavar="LOW,HIGH", help="window of --intensity ct in Hounsfield units (default: -175,250, soft tissue)")
    p.add_argument("--channel", type=number(0), help="which channel (nnU-Net) or volume (of a 4D file) to take")
    p.add_argument("--patient", metavar="REGEX", help="its one group gives the patient from a case's name; default: a case is a patient")
    p.add_argument("--dims", type=int, choices=(2, 3), default=3, help="segmented as slices or volumes")
    p.add_argument("--lists", metavar="DIR", help="folder with train.txt, val.txt, test.txt; default: SRC, if it has them")
    p.add_argument("--val", type=SHARE, default=0.2, help="share of the patients for val, where no list says")
    p.add_argument("--test", type=SHARE, default=0.0, help="share of the imagesTr patients for test, where no list says")
    p.add_argument("--seed", type=SEED, default=0, help="of the split by patient")
    p.add_argument("--classes", type=labels.class_names, metavar="NAMES",
                   help="names, background first; default: those of dataset.json")
    p.add_argument("--labels", type=labels.label_values, metavar="VALUES",
                   help="the values in the labels that stand for the classes, background first, "
                        "as in 0,1,2,4; default: those of dataset.json, or 0, 1, 2, ...")
    args = p.parse_args(argv)
    src = Path(args.src)
    if not src.is_dir():
        raise InputError(f"{src}: no such folder; give the one that holds imagesTr")
    if args.val + args.test >= 1:
        raise InputError("--val and --test are shares that must leave something to train on")
    if args.clip and args.intensity == "mr":
        raise InputError("--clip is the window of --intensity ct; mr is clipped by percentiles")
    args.spacing = decimals("--spacing", args.spacing, 3, low=0) if args.spacing else None
    window = decimals("--clip", args.clip or "-175,250", 2) if args.intensity == "ct" else None
    if window and window[0] >= window[1]:
        raise InputError(f"--clip {args.clip}: the first number must be the lower one")
    rows, nnunet = find(src, args.channel)
    rows = name_patients(rows, args.patient) if args.patient else rows
    lists = lists_of(Path(args.lists) if args.lists else src)
    if args.lists and not lists:
        raise InputError(f"--lists {args.lists}: none of {', '.join(f'{s}.txt' for s in h5.SPLITS)} is there")
    rows = split_cases(rows, lists, args)
    classes, values = name_classes(src, args.classes, args.labels, [r[2] for r in rows if r[2]])
    how, axes = Preparation(args.spacing, window, args.channel, nnunet), set()
    cases = (read_case(row, how, src, axes, values) for row in rows)
    info = h5.write(args.out, cases, name=src.resolve().name, classes=classes, dims=args.dims,
                    channels=1, standardize=window is None,
                    prepared={"from": "nifti", **asdict(how)})
    labels.tell_mapping(values)
    h5.report(info)
    if len(axes) > 1:
        print("note: the volumes' axes point along different body axes (axial and sagittal scans, say), so D, H, W do not mean the same in all")


if __name__ == "__main__":
    cli(main)
