"""The widely used .h5 + .list layout of semi-supervised baselines (ACDC slices and volumes, LA volumes) -> one HDF5 file.

    python -m data.ssl4mis ACDC --out acdc.h5
    python -m data.ssl4mis LA --out la.h5

    ACDC  train_slices.list, val.list[, test.list]; data/slices/patientNNN_frameNN_slice_N.h5, data/patientNNN_frameNN.h5 (D, H, W)
    LA    train.list, val.list and/or test.list; */ID/mri_norm2.h5 (H, W, D), stored as (D, H, W)

The slices of a frame become one volume again; the order of patients in the list is kept, because `--labeled 7` means the first 7. Where there is
no val.list (LA comes without), the last --val volumes of train.list validate, so that nothing is chosen on test.
Neither layout holds the voxel spacing: pass --spacing if you know it (of the stored voxels, before --shrink).
"""
import re
from pathlib import Path

import numpy as np

from data import h5
from data.files import InputError, Parser, cli, number

ACDC_CLASSES, LA_CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"], ["background", "left atrium"]


def read(path, names=("image", "label")):
    """image as float32, label as uint8 (None where there is none) of one source file."""
    with h5.open_file(path) as f:
        if "image" not in f:
            raise InputError(f"{path}: no dataset 'image' (it has: {', '.join(f)})")
        return f["image"][:].astype(np.float32), f["label"][:].astype(np.uint8) if "label" in f else None


def lines(path):
    return [Path(line).name.removesuffix(".h5") for line in path.read_text().split()] if path.is_file() else []


def acdc_cases(src, spacing):
    """Frames of the ACDC layout as cases; the patient is the name's first part."""
    frames = {}  # frame -> its slices' names; dicts keep the list's order
    for name in lines(src / "train_slices.list"):
        frames.setdefault(name.split("_slice_")[0], []).append(name)
    for frame, names in frames.items():
        if not all(re.fullmatch(r".*_slice_\d+", n) for n in names):
            raise InputError(f"{src}: train_slices.list names '{names[0]}', which is not of the form FRAME_slice_N")
        names.sort(key=lambda n: int(n.rsplit("_", 1)[1]))
        images, labels = zip(*(read(src / "data" / "slices" / f"{n}.h5") for n in names))
        if len({i.shape for i in images}) > 1:
            raise InputError(f"{src}: the slices of {frame} differ in size")
        label = None if any(y is None for y in labels) else np.stack(labels)
        yield h5.Case("train", frame, np.stack(images), label, frame.split("_")[0], spacing, f"data/slices/{frame}_slice_*.h5")
    for split in ("val", "test"):
        for frame in lines(src / f"{split}.list"):
            image, label = read(src / "data" / f"{frame}.h5")
            yield h5.Case(split, frame, image, label, frame.split("_")[0], spacing, f"data/{frame}.h5")


def la_splits(src, val):
    """{split: names} of the LA layout's lists; the last `val` of train validate where no list says who does."""
    splits = {split: lines(src / f"{split}.list") for split in ("train", "val", "test")}
    if not splits["val"]:
        if val >= len(splits["train"]):
            raise InputError(f"--val {val}: train.list of {src} has only {len(splits['train'])} volumes; give fewer")
        splits["train"], splits["val"] = splits["train"][:len(splits["train"]) - val], splits["train"][len(splits["train"]) - val:]
        print(f"no val.list: the last {val} of train.list validate (--val)")
    return splits


def la_cases(src, spacing, shrink, val):
    """Volumes of the LA layout as cases, each axis shrunk to a part."""
    files = {p.parent.name: p for p in sorted(src.rglob("mri_norm2.h5"))}
    for split, names in la_splits(src, val).items():
        for name in names:
            if name not in files:
                raise InputError(f"{src}: {split}.list names '{name}', but there is no {name}/mri_norm2.h5; mend the list")
            image, label = read(files[name])
            image, label = (v if v is None else np.ascontiguousarray(v.transpose(2, 0, 1)) for v in (image, label))
            size = tuple(max(1, n // shrink) for n in image.shape)
            wide = spacing and tuple(s * n / m for s, n, m in zip(spacing, image.shape, size))
            image, label = h5.resize_image(image, size), None if label is None else h5.resize_label((label > 0).astype(np.uint8), size)
            yield h5.Case(split, name, image, label, name, wide, str(files[name].relative_to(src)))


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.ssl4mis")
    p.add_argument("src", help="folder that holds the .list files")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument("--dims", type=int, choices=(2, 3), help="segmented as slices or volumes (default: ACDC 2, LA 3)")
    p.add_argument("--spacing", metavar="D,H,W", help="voxel spacing in mm, if it is known")
    p.add_argument("--shrink", type=number(1), default=1, metavar="N", help="LA: average blocks of about N x N x N voxels, for quick experiments")
    p.add_argument("--val", type=number(1), default=8, help="LA without a val.list: how many of train.list validate, the last ones")
    args = p.parse_args(argv)
    src = Path(args.src)
    if args.spacing and not re.fullmatch(r"(\d+\.?\d*,){2}\d+\.?\d*", args.spacing):
        raise InputError(f"--spacing {args.spacing}: three numbers in mm are needed, as in 10,1.25,1.25")
    spacing = tuple(map(float, args.spacing.split(","))) if args.spacing else None
    if (src / "train_slices.list").is_file():
        if args.shrink > 1:
            raise InputError("--shrink is for the volumes of the LA layout; --size of the scripts shrinks slices")
        layout = dict(name="ACDC", classes=ACDC_CLASSES, dims=args.dims or 2)
        cases = acdc_cases(src, spacing)
    elif (src / "train.list").is_file():
        layout = dict(name="LA", classes=LA_CLASSES, dims=args.dims or 3)
        cases = la_cases(src, spacing, args.shrink, args.val)
    else:
        raise InputError(f"{src}: neither train_slices.list (ACDC) nor train.list (LA) is there; give the folder that holds one of them")
    h5.report(h5.write(args.out, cases, channels=1, **layout))


if __name__ == "__main__":
    cli(main)
