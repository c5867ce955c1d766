"""The .h5 + .list layout of many semi-supervised baselines (ACDC and LA) -> one HDF5 file.

    python -m data.ssl4mis ACDC --out acdc.h5
    python -m data.ssl4mis LA --out la.h5
    python -m data.ssl4mis PROSTATE --out prostate.h5 --classes background,prostate

    ACDC  train_slices.list, val.list[, test.list];
          data/slices/patientNNN_frameNN_slice_N.h5 (H, W), data/patientNNN_frameNN.h5 (D, H, W)
    LA    train.list, val.list and/or test.list;
          */ID/mri_norm2.h5 (H, W, D), stored as (D, H, W)

The slices of a frame become one volume again; the order of patients in the list is kept, because
`--labeled 7` means the first 7. Where there is no val.list (LA comes without), the last --val
volumes of train.list validate, so that nothing is chosen on test. Neither layout holds the voxel
spacing: pass --spacing if you know it (of the stored voxels, before --shrink).

A list names a file on each line, with or without its ending and its folder. The frames of
patientNNN are one patient; any other case is a patient of its own, unless --patient says
otherwise. A note tells where names of different splits look like those of one patient.

Labels are class numbers: 0 to 3 in ACDC, 0 and 1 (or 255) in LA. Only labels that hold all of these
take the names of the classes of ACDC or LA. Other data need --classes, and --labels if their values
are not 0, 1, 2 and so on.
"""

import re
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np

from data import h5, labels, loading
from data.files import InputError, read_lists
from data.options import Parser, cli, decimals, number
from data.pixels import to_float32
from data.splits import Row, add_patient, name_patients, note_patients, plain_name

LAYOUTS = {
    "ACDC": ["background", "right ventricle", "myocardium", "left ventricle"],
    "LA": ["background", "left atrium"],
}
VOLUME = "mri_norm2"  # how LA calls each of its files


def read(path, axes, values):
    """One source file. -> image as float32, label as uint8 class numbers, or None

    axes: how many it must have; values: those of the classes in its label.
    InputError for what is not finite, no class, or of another shape.
    """
    with h5.open_file(path) as f, h5.reading(path, "copy it again"):
        if "image" not in f:
            raise InputError(
                f"{path}: no dataset 'image' (it has: {', '.join(f) or 'nothing'}); "
                "make the file again"
            )
        image = h5.child(f, "image", h5py.Dataset)[()]
        label = h5.child(f, "label", h5py.Dataset)[()] if "label" in f else None
    if image.ndim != axes or image.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: image of shape {image.shape} and type {image.dtype}; numbers "
            f"with {axes} axes are needed; make the file again"
        )
    image = to_float32(image, path)
    if label is None:
        return image, None
    if label.shape != image.shape:
        raise InputError(
            f"{path}: label of shape {label.shape}, image of {image.shape}; make the file again"
        )
    return image, read_label(label, path, values)


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


def acdc_rows(src):
    """What the lists of the ACDC layout name. -> [Row, ...], {frame of train: its slices' names}"""
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
        if row.split != "train":
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


def la_rows(src, val):
    """What the lists of the LA layout name. -> [Row, ...]

    val: how many of train validate, the last ones, where no list says who does.
    """
    lists = {s: [] for s in ("train", "val", "test")}
    lists |= read_lists({s: src / f"{s}.list" for s in lists}, name_of)
    if not lists["val"]:
        train = lists["train"]
        if val >= len(train):
            raise InputError(
                f"--val {val}: train.list of {src} has only {len(train)} volumes; give fewer"
            )
        lists["train"], lists["val"] = train[:-val], train[-val:]
        print(f"no val.list: the last {val} of train.list validate (--val)")
    files = defaultdict(list)
    for path in sorted(src.rglob(f"{VOLUME}.h5")):
        files[plain_name(path.parent.name)].append(path)
    rows = []
    for split, names in lists.items():
        for name in names:
            if not files[name]:
                raise InputError(
                    f"{src}: {split}.list names '{name}', but there is no "
                    f"{name}/{VOLUME}.h5; mend the list"
                )
            path, *others = files[name]
            if others:
                raise InputError(f"{path}: {others[0]} has the same name; remove one of the two")
            rows.append(Row(name, path, None, name, split))
    return rows


def la_cases(rows, src, spacing, values, shrink):
    """Volumes of the LA layout as cases, each axis shrunk to a part."""
    for row in rows:
        image, label = (
            v if v is None else np.ascontiguousarray(v.transpose(2, 0, 1))
            for v in read(row.image, 3, values)
        )
        size = tuple(max(1, n // shrink) for n in image.shape)
        if min(size[1:]) < h5.SMALLEST <= min(image.shape[1:]):
            raise InputError(
                f"--shrink {shrink}: {row.image} would have {' x '.join(map(str, size))} voxels, "
                "too few in a slice; choose a smaller one"
            )
        wide = spacing and tuple(s * n / m for s, n, m in zip(spacing, image.shape, size))
        case = row.case(src, image, label, spacing=wide)
        if shrink > 1:
            case.source_grid, case.source_label = image.shape, label
            case.image = loading.resize_image(image, size)
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


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.ssl4mis")
    p.add_argument("src", help="folder that holds the .list files")
    p.add_argument("--out", required=True, help="dataset file to write")
    labels.add_options(p)
    p.add_argument(
        "--dims",
        type=int,
        choices=(2, 3),
        help="segmented as slices or volumes (default: ACDC 2, LA 3)",
    )
    add_patient(p)
    p.add_argument(
        "--spacing",
        type=decimals(3, low=0),
        metavar="D,H,W",
        help="voxel spacing in mm, if it is known",
    )
    p.add_argument(
        "--shrink",
        type=number(1),
        default=1,
        metavar="N",
        help="LA: average blocks of about N x N x N voxels, for quick experiments",
    )
    p.add_argument(
        "--val",
        type=number(1),
        default=8,
        help="LA without a val.list: how many of train.list validate, the last ones",
    )
    args = p.parse_args(argv)
    src = Path(args.src)
    if args.labels and not args.classes:
        raise InputError(
            "--labels says which values there are; give --classes, too, with a name for each"
        )
    labels.check_options(args)
    if (src / "train_slices.list").is_file():
        if args.shrink > 1:
            raise InputError(
                "--shrink is for the volumes of the LA layout; --size of the scripts shrinks slices"
            )
        layout, dims = "ACDC", 2
        rows, slices = acdc_rows(src)
    elif (src / "train.list").is_file():
        layout, dims = "LA", 3
        rows = la_rows(src, args.val)
    else:
        raise InputError(
            f"{src}: neither train_slices.list (ACDC) nor train.list (LA) is there; give the "
            "folder that holds one of them"
        )
    classes = args.classes or LAYOUTS[layout]
    values = args.labels or range(len(classes))
    rows = name_patients(rows, args)
    note_patients(rows)
    if layout == "ACDC":
        cases = acdc_cases(rows, slices, src, args.spacing, values)
    else:
        cases = la_cases(rows, src, args.spacing, values, args.shrink)
    info = h5.write(
        args.out,
        cases if args.classes else of_layout(cases, src, layout),
        name=src.resolve().name if args.classes else layout,
        classes=classes,
        dims=args.dims or dims,
        channels=1,
        prepared={"from": "ssl4mis", "shrink": args.shrink},
    )
    labels.tell_mapping(args.labels)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
