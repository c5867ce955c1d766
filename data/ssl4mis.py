"""The .h5 files and lists of many semi-supervised baselines (ACDC, LA, BraTS) -> one HDF5 file.

    python -m data.ssl4mis ACDC --out acdc.h5
    python -m data.ssl4mis LA --out la.h5
    python -m data.ssl4mis BraTS2019 --out brats.h5
    python -m data.ssl4mis PROSTATE --out prostate.h5 --classes background,prostate

    ACDC  train_slices.list[, val.list][, test.list];
          data/slices/patientNNN_frameNN_slice_N.h5 (H, W), data/patientNNN_frameNN.h5 (D, H, W)
    LA    train.list, val.list and/or test.list;
          */ID/mri_norm2.h5 (W, H, D), stored as (D, H, W)
    BraTS train.txt, val.txt and/or test.txt;
          data/ID.h5 (D, H, W), as it is; of several channels (C, D, H, W) or (D, H, W, C)

The axes of BraTS are taken as they are: nothing in its files says where they point. Of channels the
label's shape says which axis they are, or, without a label, that no slice is narrower than 8.

The slices of a frame become one volume again; the order of patients in the list is kept, because
`--labeled 7` means the first 7. Where there is no val.list (LA comes without), the last --val
of the train list validate, so that nothing is chosen on test. No layout holds the voxel
spacing: pass --spacing if you know it (of the stored voxels, before --shrink).

A list names a file on each line, with or without its ending and its folder. The frames of
patientNNN are one patient; any other case is a patient of its own, unless --patient says
otherwise. A note tells where names of different splits look like those of one patient.

Labels are class numbers: 0 to 3 in ACDC, 0 and 1 (or 255) in LA and BraTS. Only labels that hold
all of these take the names of the classes of their layout. Other data need --classes, and --labels
if their values are not 0, 1, 2 and so on.
"""

import re
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np

from data import h5, labels, loading
from data.files import InputError, read_lists
from data.options import Parser, cli, decimals, file, number
from data.pixels import to_float32
from data.splits import Row, add_patient, below, name_patients, note_patients, plain_name

LAYOUTS = {
    "ACDC": ["background", "right ventricle", "myocardium", "left ventricle"],
    "LA": ["background", "left atrium"],
    "BraTS": ["background", "whole tumor"],
}
LISTS = {"ACDC": "train_slices.list", "LA": "train.list", "BraTS": "train.txt"}
VAL = 8  # how many validate where neither a list nor --val says it
VOLUME = "mri_norm2"  # how LA calls each of its files


def read(path, axes, values, channels=1):
    """One source file. -> image as float32, label as uint8 class numbers, or None

    axes: how many it must have; values: those of the classes in its label; channels: if several,
    the image has one more axis, which becomes the last one.
    InputError for what is not finite, no class, or of another shape.
    """
    with h5.open_file(path) as f, h5.reading(path, "copy it again"):
        image = image_in(f, path)[()]
        label = h5.child(f, "label", h5py.Dataset)[()] if "label" in f else None
    if channels > 1:
        image = np.moveaxis(image, channel_axis(image.shape, np.shape(label), path), -1)
    if image.ndim != axes + (channels > 1) or image.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: image of shape {image.shape} and type {image.dtype}; numbers "
            f"with {axes} axes are needed; make the file again"
        )
    image = to_float32(image, path)
    if label is None:
        return image, None
    if label.shape != image.shape[:axes]:
        raise InputError(
            f"{path}: label of shape {label.shape}, image of {image.shape}; make the file again"
        )
    return image, read_label(label, path, values)


def image_in(f, path):
    """The dataset `image` of an open file."""
    if "image" not in f:
        raise InputError(
            f"{path}: no dataset 'image' (it has: {', '.join(f) or 'nothing'}); make the file again"
        )
    return h5.child(f, "image", h5py.Dataset)


def channel_axis(shape, grid, path):
    """Which axis of an image of four axes is that of its channels, 0 or 3.

    grid: shape of its label, () for none. InputError if it is not clear.
    """
    fits = {0: shape[1:] == grid, 3: shape[:-1] == grid}
    if not grid:  # H and W have 8 or more
        fits = {0: shape[0] < h5.SMALLEST <= shape[3], 3: shape[3] < h5.SMALLEST}
    if sum(fits.values()) != 1:
        raise InputError(
            f"{path}: image of shape {shape}, label of {grid or 'none'}: which axis is that of the "
            "channels is not clear; save it as the last one, beside a label of another shape"
        )
    return 0 if fits[0] else 3


def count_channels(paths):
    """How many channels the images (D, H, W) of some files have. InputError if they differ."""
    counts = {}
    for path in paths:
        with h5.open_file(path) as f, h5.reading(path, "copy it again"):
            shape = image_in(f, path).shape
            grid = h5.child(f, "label", h5py.Dataset).shape if "label" in f else ()
        counts[path] = shape[channel_axis(shape, grid, path)] if len(shape) == 4 else 1
    first, count = next(iter(counts.items()))
    if other := next((path for path in paths if counts[path] != count), None):
        raise InputError(
            f"{other}: has {counts[other]} channel(s), but {first} has {count}; give all cases the "
            "same channels"
        )
    return count


def read_label(label, path, values):
    """A label's values -> class numbers, see labels.class_numbers(). Of two classes, the other one
    than background may be 1 or 255 where nobody has listed the values."""
    if values == range(2) and label.dtype.kind in "biuf" and ((label == 0) | (label == 255)).all():
        return (label == 255).astype(np.uint8)
    return labels.class_numbers(label, path, values)


def name_of(line):
    """The case in a line of a list: the file's name without ending, in LA that of its folder."""
    line = plain_name(line).removesuffix(".h5")
    parts = [part for part in re.split(r"[/\\]", line) if part] or [line]
    return parts[-2] if parts[-1] == VOLUME and len(parts) > 1 else parts[-1]


def files_in(folder):
    """{name without ending: path} of a folder's .h5 files."""
    return {plain_name(p.stem): p for p in sorted(folder.glob("*.h5"))}


def patient_of(frame):
    """The patient of ACDC's patientNNN_frameNN; a frame of any other name is its own."""
    match = re.fullmatch(r"(patient\d+)_frame\d+", frame)
    return match[1] if match else frame


def frame_of(slice_name):
    return slice_name.split("_slice_")[0]


def validating(rows, val, path):
    """Rows, of which the last `val` patients of train validate where no list says who does.

    val: None for VAL; path: of the list of train. InputError if nobody would be left to train.
    """
    patients = [*dict.fromkeys(row.patient for row in rows if row.split == "train")]
    listed = any(row.split == "val" for row in rows)
    if listed and val:
        print(f"note: without effect: --val; val{path.suffix} says who validates")
    if not patients or listed:
        return rows
    val = val or VAL
    if val >= len(patients):
        kind = "patients" if path.name == LISTS["ACDC"] else "volumes"
        raise InputError(f"--val {val}: {path} has only {len(patients)} {kind}; give fewer")
    print(f"no val{path.suffix}: the last {val} of {path.name} validate (--val)")
    late = [row for row in rows if row.split == "train" and row.patient in patients[-val:]]
    return [row._replace(split="val") if row in late else row for row in rows]


def acdc_rows(src):
    """What the lists of the ACDC layout name.

    -> [Row, ...], {frame in train_slices.list: its slices' names}
    """
    paths = {"train": src / "train_slices.list"} | {s: src / f"{s}.list" for s in ("val", "test")}
    lists = read_lists(paths, name_of)
    slices = {}  # dicts keep the list's order
    for name in lists["train"]:
        slices.setdefault(frame_of(name), []).append(name)
    for names in slices.values():
        if not all(re.fullmatch(r".*_slice_\d+", n) for n in names):
            raise InputError(
                f"{src}: train_slices.list names '{names[0]}', which is not of the "
                "form FRAME_slice_N; mend the list"
            )
        names.sort(key=number_of)
    files = files_in(src / "data")
    rows = []
    for split, names in (lists | {"train": slices}).items():
        for name in names:
            path = files.get(name, src / "data" / f"{name}.h5")
            rows.append(Row(name, path, None, patient_of(name), split))
    return rows, slices


def number_of(slice_name):
    return int(slice_name.rsplit("_", 1)[1])


def note_slices(slices, files):
    """Notes which slices of the frames in train_slices.list are missing in their volumes.

    slices: {frame: names in the list}; files: {name: path} of all slices
    """
    listed = {name for names in slices.values() for name in names}
    others = [n for n in files if frame_of(n) in slices and n not in listed]
    if others:
        print(
            f"note: {len(others)} slices of frames in train_slices.list are not in it, such as "
            f"{others[0]}; the volumes are made without them"
        )
    told = set(map(frame_of, others))
    for frame, names in slices.items():
        first, last = number_of(names[0]), number_of(names[-1])
        if last - first + 1 != len(names) and frame not in told:
            print(
                f"note: {frame} has {len(names)} slices between {first} and {last}; its volume "
                "is made of these alone"
            )


def acdc_cases(rows, slices, src, spacing, values):
    """Frames of the ACDC layout as cases. rows, slices: of acdc_rows()"""
    files = files_in(src / "data" / "slices")
    note_slices(slices, files)
    for row in rows:
        if row.name not in slices:
            yield row.case(src, *read(row.image, 3, values), spacing=spacing)
            continue
        names = slices[row.name]
        paths = [files.get(n, src / "data" / "slices" / f"{n}.h5") for n in names]
        image, label = stack(row.name, names, [read(p, 2, values) for p in paths], src)
        case = row.case(src, image, label, spacing=spacing)
        case.source = f"data/slices/{row.name}_slice_*.h5"
        yield case


def stack(frame, names, found, src):
    """The slices of a frame as one volume. found: [(image, label or None), ...] -> image, label"""
    slices, truth = zip(*found)
    if len({i.shape for i in slices}) > 1:
        raise InputError(f"{src}: the slices of {frame} differ in size; make them equal")
    bare = [n for n, y in zip(names, truth) if y is None]
    if 0 < len(bare) < len(names):
        print(
            f"note: {frame} stays unlabeled, since {bare[0]} has no label "
            f"({len(bare)} of its {len(names)} slices)"
        )
    return np.stack(slices), None if bare else np.stack(truth)


def volume_rows(src, layout):
    """What the lists of the LA or BraTS layout name. -> [Row, ...]"""
    ending, name = "list", name_of
    if layout == "BraTS":  # the baselines read no further than a comma
        ending, name = "txt", lambda line: name_of(line.split(",")[0].strip())
    lists = {s: [] for s in ("train", "val", "test")}
    lists |= read_lists({s: src / f"{s}.{ending}" for s in lists}, name)
    files = defaultdict(list)
    if layout == "LA":
        for path in below(src, f"{VOLUME}.h5"):
            files[plain_name(path.parent.name)].append(path)
    else:
        files |= {name: [path] for name, path in files_in(src / "data").items()}
    rows = []
    for split, names in lists.items():
        for name in names:
            if not files[name]:
                where = f"{name}/{VOLUME}.h5" if layout == "LA" else f"data/{name}.h5"
                raise InputError(
                    f"{src}: {split}.{ending} names '{name}', but there is no {where}; mend the "
                    "list"
                )
            path, *others = files[name]
            if others:
                raise InputError(f"{path}: {others[0]} has the same name; remove one of the two")
            rows.append(Row(name, path, None, name, split))
    return rows


def volume_cases(rows, args, values, layout, channels):
    """Volumes of the LA or BraTS layout as cases, each axis shrunk to a part."""
    for row in rows:
        image, label = read(row.image, 3, values, channels)
        if layout == "LA":
            turned = (None if v is None else v.transpose(2, 1, 0) for v in (image, label))
            image, label = (None if v is None else np.ascontiguousarray(v) for v in turned)
        grid, spacing, shrink = image.shape[:3], args.spacing, args.shrink
        size = tuple(max(1, n // shrink) for n in grid)
        if min(size[1:]) < h5.SMALLEST <= min(grid[1:]):
            raise InputError(
                f"--shrink {shrink}: {row.image} would have {' x '.join(map(str, size))} voxels, "
                "too few in a slice; choose a smaller one"
            )
        wide = spacing and tuple(s * n / m for s, n, m in zip(spacing, grid, size))
        case = row.case(args.src, image, label, spacing=wide)
        if shrink > 1:
            case.source_grid, case.source_label = grid, label
            each = [loading.resize_image(v, size) for v in h5.channels_first(image, channels)]
            case.image = each[0] if channels == 1 else np.stack(each, -1)
            case.label = None if label is None else loading.resize_label(label, size)
        yield case


def of_layout(cases, src, layout):
    """Yields cases whose classes nobody has named. InputError unless their labels, if there are
    any, hold exactly the classes of the layout, LAYOUTS."""
    found = set()
    for case in cases:
        found |= set() if case.label is None else set(np.unique(case.label).tolist())
        yield case
    labels.check_not_empty(found, src)
    if found and len(found) != len(LAYOUTS[layout]):
        raise InputError(
            f"{src}: the labels hold {labels.in_words(sorted(found))}, and {layout} has "
            f"{len(LAYOUTS[layout])} classes; name those of these data with "
            "--classes, background first"
        )


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m data.ssl4mis")
    p.add_argument("src", type=Path, help="folder that holds the .list files")
    p.add_argument("--out", type=file, required=True, help="dataset file to write")
    labels.add_options(p)
    p.add_argument("--dims", type=int, choices=(2, 3),
                   help="segmented as slices or volumes (default: ACDC 2, LA and BraTS 3)")
    add_patient(p)
    p.add_argument("--spacing", type=decimals(3, low=0), metavar="D,H,W",
                   help="voxel spacing in mm, if it is known")
    p.add_argument("--shrink", type=number(1), default=1, metavar="N",
                   help="LA, BraTS: average blocks of about N x N x N voxels, for quick "
                        "experiments")
    p.add_argument("--val", type=number(1),
                   help="without a val.list or val.txt: how many of train validate, the last ones "
                        f"(patients of ACDC, else volumes; default: {VAL})")
    args = p.parse_args(argv)
    if args.labels and not args.classes:
        raise InputError(
            "--labels says which values there are; give --classes, too, with a name for each"
        )
    labels.check_options(args)
    return args
# fmt: on


def layout_of(args):
    """The layout of SRC, as the list that it holds tells. InputError if --shrink is not for it."""
    found = [layout for layout, name in LISTS.items() if (args.src / name).is_file()]
    if not found:
        raise InputError(
            f"{args.src}: neither train_slices.list (ACDC) nor train.list (LA) nor train.txt "
            "(BraTS) is there; give the folder that holds one of them"
        )
    if found[0] == "ACDC" and args.shrink > 1:
        raise InputError(
            "--shrink is for the volumes of the LA layout; --size of the scripts shrinks slices"
        )
    return found[0]


def main(argv=None):
    args = parse_args(argv)
    src, layout = args.src, layout_of(args)
    if layout == "ACDC":
        rows, slices = acdc_rows(src)
    else:
        rows = volume_rows(src, layout)
    if not rows:
        raise InputError(f"{src / LISTS[layout]}: names no case; fill it")
    rows = validating(name_patients(rows, args), args.val, src / LISTS[layout])
    note_patients(rows)
    classes = args.classes or LAYOUTS[layout]
    values = args.labels or range(len(classes))
    channels = count_channels([r.image for r in rows]) if layout == "BraTS" else 1
    if layout == "ACDC":
        cases = acdc_cases(rows, slices, src, args.spacing, values)
    else:
        cases = volume_cases(rows, args, values, layout, channels)
    info = h5.write(
        args.out,
        cases if args.classes else of_layout(cases, src, layout),
        name=src.resolve().name if args.classes else layout,
        classes=classes,
        dims=args.dims or (2 if layout == "ACDC" else 3),
        channels=channels,
        channel_names=[f"channel {k}" for k in range(channels)] if channels > 1 else None,
        prepared={"from": "ssl4mis", "shrink": args.shrink},
    )
    labels.tell_mapping(args.labels)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
