"""The widely used .h5 + .list layout of semi-supervised baselines (ACDC slices and volumes, LA volumes) -> one HDF5 file.

    python -m data.ssl4mis ACDC --out acdc.h5
    python -m data.ssl4mis LA --out la.h5
    python -m data.ssl4mis PROSTATE --out prostate.h5 --classes background,prostate

    ACDC  train_slices.list, val.list[, test.list]; data/slices/patientNNN_frameNN_slice_N.h5, data/patientNNN_frameNN.h5 (D, H, W)
    LA    train.list, val.list and/or test.list; */ID/mri_norm2.h5 (H, W, D), stored as (D, H, W)

The slices of a frame become one volume again; the order of patients in the list is kept, because `--labeled 7` means the first 7. Where there is
no val.list (LA comes without), the last --val volumes of train.list validate, so that nothing is chosen on test.
Neither layout holds the voxel spacing: pass --spacing if you know it (of the stored voxels, before --shrink).

A list names a file on each line, with or without its ending and its folder. Labels are class
numbers: 0 to 3 in ACDC, 0 and 1 (or 255) in LA. Only labels that hold all of these take the names
of the classes of ACDC or LA. Other data need --classes, and --labels if their values are not 0, 1,
2 and so on.
"""

import re
from pathlib import Path

import h5py
import numpy as np

from data import h5, labels, loading
from data.files import InputError, read_lists
from data.options import Parser, cli, number

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
    with np.errstate(over="ignore"):
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise InputError(f"{path}: image has NaN or infinite pixels; mend them, or leave it out")
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
    parts = [part for part in re.split(r"[/\\]", line.removesuffix(".h5")) if part] or [line]
    return parts[-2] if parts[-1] == VOLUME and len(parts) > 1 else parts[-1]


def acdc_cases(src, spacing, values):
    """Frames of the ACDC layout as cases; the patient is the name's first part."""
    paths = {"train": src / "train_slices.list"} | {s: src / f"{s}.list" for s in ("val", "test")}
    lists = read_lists(paths, name_of)
    frames = {}  # frame -> its slices' names; dicts keep the list's order
    for name in lists.pop("train"):
        frames.setdefault(name.split("_slice_")[0], []).append(name)
    for frame, names in frames.items():
        if not all(re.fullmatch(r".*_slice_\d+", n) for n in names):
            raise InputError(
                f"{src}: train_slices.list names '{names[0]}', which is not of the "
                "form FRAME_slice_N; mend the list"
            )
        names.sort(key=lambda n: int(n.rsplit("_", 1)[1]))
        first, last = (int(names[i].rsplit("_", 1)[1]) for i in (0, -1))
        if last - first + 1 != len(names):
            print(
                f"note: {frame} has {len(names)} slices between {first} and {last}; its volume "
                "is made of these alone"
            )
        found = [read(src / "data" / "slices" / f"{n}.h5", 2, values) for n in names]
        slices, truth = zip(*found)
        if len({i.shape for i in slices}) > 1:
            raise InputError(f"{src}: the slices of {frame} differ in size; make them equal")
        bare = [n for n, y in zip(names, truth) if y is None]
        if 0 < len(bare) < len(names):
            print(
                f"note: {frame} stays unlabeled, since {bare[0]} has no label "
                f"({len(bare)} of its {len(names)} slices)"
            )
        label = None if bare else np.stack(truth)
        source = f"data/slices/{frame}_slice_*.h5"
        patient = frame.split("_")[0]
        yield h5.Case("train", frame, np.stack(slices), label, patient, spacing, source)
    for split, names in lists.items():
        for frame in names:
            image, label = read(src / "data" / f"{frame}.h5", 3, values)
            yield h5.Case(
                split, frame, image, label, frame.split("_")[0], spacing, f"data/{frame}.h5"
            )


def la_splits(src, val):
    """{split: names} of the LA layout's lists; the last `val` of train validate where no list says who does."""
    splits = {s: [] for s in ("train", "val", "test")}
    splits |= read_lists({s: src / f"{s}.list" for s in splits}, name_of)
    if not splits["val"]:
        if val >= len(splits["train"]):
            raise InputError(
                f"--val {val}: train.list of {src} has only {len(splits['train'])} volumes; give fewer"
            )
        splits["train"], splits["val"] = (
            splits["train"][: len(splits["train"]) - val],
            splits["train"][len(splits["train"]) - val :],
        )
        print(f"no val.list: the last {val} of train.list validate (--val)")
    return splits


def la_cases(src, spacing, values, shrink, val):
    """Volumes of the LA layout as cases, each axis shrunk to a part."""
    files = {}
    for path in sorted(src.rglob(f"{VOLUME}.h5")):
        files.setdefault(path.parent.name, []).append(path)
    for split, names in la_splits(src, val).items():
        for name in names:
            if name not in files:
                raise InputError(
                    f"{src}: {split}.list names '{name}', but there is no "
                    f"{name}/{VOLUME}.h5; mend the list"
                )
            path = files[name][0]
            if len(files[name]) > 1:
                raise InputError(
                    f"{path}: {files[name][1]} has the same name; remove one of the two"
                )
            image, label = read(path, 3, values)
            image, label = (
                v if v is None else np.ascontiguousarray(v.transpose(2, 0, 1))
                for v in (image, label)
            )
            size = tuple(max(1, n // shrink) for n in image.shape)
            wide = spacing and tuple(s * n / m for s, n, m in zip(spacing, image.shape, size))
            image = loading.resize_image(image, size)
            label = None if label is None else loading.resize_label(label, size)
            yield h5.Case(split, name, image, label, name, wide, str(path.relative_to(src)))


def of_layout(cases, src, layout):
    """Yields cases whose classes nobody has named. InputError unless their labels, if there are
    any, hold exactly the classes of the layout, LAYOUTS."""
    found = set()
    for case in cases:
        found |= set() if case.label is None else set(np.unique(case.label).tolist())
        yield case
    if found and len(found) != len(LAYOUTS[layout]):
        raise InputError(
            f"{src}: the labels hold {labels.said(sorted(found))}, and {layout} has "
            f"{len(LAYOUTS[layout])} classes; name those of these data with "
            "--classes, background first"
        )


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.ssl4mis")
    p.add_argument("src", help="folder that holds the .list files")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument(
        "--classes",
        type=labels.class_names,
        metavar="NAMES",
        help="names, background first (default: those of ACDC or LA)",
    )
    p.add_argument(
        "--labels",
        type=labels.label_values,
        metavar="VALUES",
        help="with --classes: the values in the labels that stand for them, as in "
        "0,1,2,4 (default: 0, 1, 2, ...)",
    )
    p.add_argument(
        "--dims",
        type=int,
        choices=(2, 3),
        help="segmented as slices or volumes (default: ACDC 2, LA 3)",
    )
    p.add_argument("--spacing", metavar="D,H,W", help="voxel spacing in mm, if it is known")
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
    if args.spacing and not re.fullmatch(r"(\d+\.?\d*,){2}\d+\.?\d*", args.spacing):
        raise InputError(
            f"--spacing {args.spacing}: three numbers in mm are needed, as in 10,1.25,1.25"
        )
    spacing = tuple(map(float, args.spacing.split(","))) if args.spacing else None
    if args.labels and not args.classes:
        raise InputError(
            "--labels says which values there are; give --classes, too, with a name for each"
        )
    labels.check_options(args.labels, args.classes)
    if (src / "train_slices.list").is_file():
        if args.shrink > 1:
            raise InputError(
                "--shrink is for the volumes of the LA layout; --size of the scripts shrinks slices"
            )
        layout, dims = "ACDC", 2
    elif (src / "train.list").is_file():
        layout, dims = "LA", 3
    else:
        raise InputError(
            f"{src}: neither train_slices.list (ACDC) nor train.list (LA) is there; give the folder that holds one of them"
        )
    classes = args.classes or LAYOUTS[layout]
    values = args.labels or range(len(classes))
    if layout == "ACDC":
        cases = acdc_cases(src, spacing, values)
    else:
        cases = la_cases(src, spacing, values, args.shrink, args.val)
    cases = cases if args.classes else of_layout(cases, src, layout)
    name = src.resolve().name if args.classes else layout
    info = h5.write(args.out, cases, name=name, classes=classes, dims=args.dims or dims, channels=1)
    labels.tell_mapping(args.labels)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
