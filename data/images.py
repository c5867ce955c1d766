"""Folders of pictures with masks -> one HDF5 file.

    python -m data.images --preset ph2 "PH2Dataset" --out ph2.h5 --size 224
    python -m data.images --preset cvc CVC-ClinicDB --out cvc.h5
    python -m data.images --preset isic ISIC2018 --out isic.h5
    python -m data.images --preset folder MINE --out mine.h5 --classes background,polyp
    python -m data.images EYES --out eyes.h5 --patient '(\\d+)_'
    python -m data.images CELLS --out cells.h5 --channels phase,dapi

What each preset reads under SRC:
    ph2     **/IMDxxx_Dermoscopic_Image/*.bmp, **/IMDxxx_lesion/*.bmp;
            train.txt and val.txt (a case a line) if they are there
    cvc     Original/N.*, "Ground Truth"/N.*;
            sequences.csv (frame,sequence): a video sequence is one patient
    isic    *Input*/ISIC_*.jpg, *GroundTruth*/ISIC_*_segmentation.png
    folder  images/NAME.*, masks/NAME.*;
            also train|val|test|unlabeled/{images,masks}/NAME.* (no masks: unlabeled);
            with --channels, gray pictures phase/NAME.*, dapi/NAME.* in place of images/NAME.*

Images are RGB, or gray with --gray. With --channels a case has a gray picture in each of several
folders, whose names are those of the channels. TIFFs of several channels that are no colors are
taken as such, and all pictures must have as many; data/pixels.py says which TIFFs these are. Colors
beside a further channel, such as RGB and depth, are not supported: make each color a folder.

Splits: SRC/train.txt, val.txt, test.txt (or --lists DIR), a name a line and no name twice;
otherwise the folders train, val, test and unlabeled; without val, by patient with --seed, where
pictures without a mask train. A picture is a patient unless --patient or the preset says
otherwise; a note tells where names of different splits look like those of one patient. A list that
contradicts the folders of splits is refused.

Masks of two classes are 0 and 1, or black and white with edges that may be gray. With more than two
--classes, mask pixels are class numbers. --labels lists the values of other masks: 0,128,255 become
the classes 0, 1, 2. All else is refused, and so are masks without a picture, and pictures that a
decoder would cut short; data/pixels.py has the rules. Notes tell which files are not read.
"""

import argparse
import re
from pathlib import Path

from data import h5, labels, loading, splits
from data.files import InputError, read_table
from data.options import Parser, cli, file, number
from data.pixels import (
    PICTURES,
    TURNED,
    channels_in,
    note,
    read_channels,
    read_mask,
    read_picture,
    say,
)
from data.splits import Row, below, by_name, is_file, note_unread, plain_name


def pictures(folder):
    """Name without ending -> path, for the pictures directly in a folder.

    They come in natural order (2 before 10).
    """
    if not Path(folder).is_dir():
        return {}
    found = [p for p in Path(folder).iterdir() if is_picture(p)]
    found.sort(
        key=lambda p: (not p.stem.isdecimal(), int(p.stem) if p.stem.isdecimal() else 0, p.stem)
    )
    return by_name((plain_name(p.stem), p) for p in found)


def is_picture(path):
    named = path.suffix.lower() in PICTURES and not path.name.startswith(".")
    return named and is_file(path)


def say_unread(folders):
    """Prints how many files and folders in some folders are not read as pictures, if any."""
    note_unread(folders, is_picture, ", ".join(sorted(PICTURES)))


# Each preset: folder -> [Row, ...]


def rows_of(images, masks, where):
    """A row for each of some pictures, {name: path}, which is a patient of its own.

    InputError for a mask without a picture. where: the folder of the pictures
    """
    if lost := sorted(set(masks) - set(images)):
        raise InputError(
            f"{masks[lost[0]]}: no picture of that name in {where} ({len(lost)} such masks); add "
            "it, or take the mask out"
        )
    return [Row(name, path, masks.get(name), name, None) for name, path in images.items()]


def find_ph2(src):
    """A lesion is a patient: PH2 does not say whose it is."""

    def of_folders(ending):
        found = [p for p in below(src, f"*{ending}/*") if is_picture(p)]
        return by_name((plain_name(p.parent.name).removesuffix(ending), p) for p in found)

    return rows_of(of_folders("_Dermoscopic_Image"), of_folders("_lesion"), src)


def find_cvc(src):
    """A video sequence is a patient."""
    table = src / "sequences.csv"
    if not table.is_file():
        raise InputError(
            f"{table}: missing; it maps frame to sequence, and neighboring frames must not be split"
        )
    sequence = {}
    for row in read_table(table, ("frame", "sequence")):
        frame, text = plain_name(row["frame"]), row["sequence"]
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise InputError(
                f"{table}: frame {frame} is of sequence '{text}'; write a whole number"
            )
        if frame in sequence:
            raise InputError(f"{table}: frame {frame} comes twice; remove one of its lines")
        sequence[frame] = f"sequence{int(text):02d}"
    base = src / "Original"
    rows = rows_of(pictures(base), pictures(src / "Ground Truth"), base)
    if lost := [r.name for r in rows if r.name not in sequence]:
        raise InputError(
            f"{table}: frame {lost[0]} has no sequence ({len(lost)} such frames); add "
            "it, called as its picture without ending"
        )
    return [r._replace(patient=sequence[r.name]) for r in rows]


def find_isic(src):
    """An image is a patient."""

    def of_folders(pattern, ending=""):
        found = [pair for folder in below(src, pattern) for pair in pictures(folder).items()]
        return by_name((name.removesuffix(ending), path) for name, path in found)

    masks = of_folders("*GroundTruth*", "_segmentation")
    # ISIC 2018 has masks of a second task, of the same pictures
    masks = {name: path for name, path in masks.items() if "_attribute_" not in name}
    return rows_of(of_folders("*Input*"), masks, src)


def find_folder(src, folder="images"):
    """A picture is a patient, with or without split folders. folder: which one holds pictures"""
    rows = []
    for split in (None, *h5.SPLITS):
        base = src / (split or "")
        found = rows_of(pictures(base / folder), pictures(base / "masks"), base / folder)
        if split:
            found = [r._replace(patient=f"{split}/{r.name}", split=split) for r in found]
        rows += found
    if other := [p.parent for p in sorted(src.glob("*/images")) if p.parent.name not in h5.SPLITS]:
        print(f"note: {other[0]} is not read; the names of splits are {', '.join(h5.SPLITS)}")
    return rows


# Several channels


def of_channels(bases, folders):
    """The pictures of cases that have one in each of some folders. -> {the first: all of a case}

    bases: where the folders are. InputError for a case that lacks a channel.
    """
    files = {}
    for base in bases:
        found = [pictures(base / folder) for folder in folders]
        for name, path in {name: path for each in found for name, path in each.items()}.items():
            if lost := [folder for folder, each in zip(folders, found) if name not in each]:
                raise InputError(
                    f"{path}: case '{name}' has no channel {lost[0]} (no picture in "
                    f"{base / lost[0]}); add it, or take the case out"
                )
            files[found[0][name]] = [each[name] for each in found]
    return files


def count_channels(paths):
    """How many channels pictures have that are no colors; 0: they are gray or RGB.

    InputError if they differ.
    """
    counts = {path: channels_in(path) for path in paths}
    first, count = next(iter(counts.items()))
    if other := next((path for path in paths if counts[path] != count), None):
        a, b = (
            f"has {counts[p]} channels" if counts[p] else "is gray or RGB" for p in (other, first)
        )
        raise InputError(
            f"{other}: {a}, but {first} {b}; all pictures of a data set need the same channels, so "
            "convert those of each kind alone"
        )
    return count


def channel_folders(text):
    """argparse type: names of folders, one for each channel, joined by commas. -> a list"""
    names = [name.strip() for name in text.split(",")]
    plain = all(name and name.isprintable() and Path(name).name == name != ".." for name in names)
    if not plain or not 2 <= len(set(names)) == len(names):
        raise argparse.ArgumentTypeError(
            f"{text}: two or more different folders in SRC are needed, joined by commas, as in "
            "phase,dapi"
        )
    if "masks" in names:
        raise argparse.ArgumentTypeError(f"{text}: masks are the truth, and no channel")
    return names


SHOWS = dict(ph2="lesion", cvc="polyp", isic="lesion", folder="foreground")
FOLDERS = dict(
    ph2=["**/*_Dermoscopic_Image", "**/*_lesion"],
    cvc=["Original", "Ground Truth"],
    isic=["**/*Input*", "**/*GroundTruth*"],
    folder=["images", "masks", "*/images", "*/masks"],
)
PRESETS = {
    f.__name__.removeprefix("find_"): f for f in (find_ph2, find_cvc, find_isic, find_folder)
}


def read_image(paths, colors, notes=None):
    """The image of a case: of one picture, or of one for each channel.

    colors: "gray", "RGB", or None for channels that are no colors -> (H, W), (H, W, 3), (H, W, C)
    """
    if colors is None:
        return read_channels(paths, notes)
    return read_picture(paths[0], colors == "gray", notes)


def read_pair(paths, mask_path, classes, colors, *, notes=None, values=None, known=None):
    """An image, see read_image(), and its mask, on the image's grid.

    -> image, uint8 or float32; label (H, W) uint8 or None.
    notes: pixels.note(); values: those of the mask that --labels names; known: colors of
    palettes, see pixels.check_palette()
    """
    found, image_path = {}, paths[0]
    image = read_image(paths, colors, found)
    if mask_path and TURNED in found:  # many programs show it turned when a mask is drawn
        raise InputError(
            f"{image_path}: is stored turned (EXIF orientation), so nobody knows "
            "whether its mask is, too; save both upright"
        )
    for text in found:
        note(notes, text, image_path)
    if mask_path is None:
        return image, None
    mask = read_mask(mask_path, classes, notes, values, known)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"{mask_path}: mask of {mask.shape[1]} x {mask.shape[0]} pixels, but its image "
            f"{image_path} has {image.shape[1]} x {image.shape[0]}; make them equal"
        )
    return image, mask


def resized(case, size):
    """An h5.Case whose image and label are squares of this side; 0: as they are."""
    if size:
        case.source_grid, case.source_label = case.image.shape[:2], case.label
        case.image = loading.resize_image(case.image, size)
        case.label = None if case.label is None else loading.resize_label(case.label, size)
    return case


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m data.images")
    p.add_argument("src", type=Path, help="folder of the pictures")
    p.add_argument("--preset", choices=PRESETS, default="folder", help="layout of the folder")
    p.add_argument("--out", type=file, required=True, help="dataset file to write")
    p.add_argument("--size", type=number(0), default=0,
                   help=f"resize to a square of this side, at least {h5.SMALLEST}; 0 keeps the "
                        "pictures' own sizes")
    p.add_argument("--gray", action="store_true", help="read the pictures as gray")
    p.add_argument("--channels", type=channel_folders, metavar="DIR,DIR,...",
                   help="preset folder: a gray picture of each case in each of these folders, in "
                        "place of images")
    labels.add_options(p)
    splits.add_options(p)
    args = p.parse_args(argv)
    labels.check_options(args)
    if not args.src.is_dir():
        raise InputError(f"{args.src}: no such folder; give the one that holds the pictures")
    if 0 < args.size < h5.SMALLEST:
        raise InputError(f"--size {args.size}: networks need {h5.SMALLEST} pixels or more")
    if args.channels and (args.gray or args.preset != "folder"):
        raise InputError("--channels: for the preset folder, without --gray; leave one of them out")
    return args
# fmt: on


def find(args):
    """The cases of SRC. -> [Row, ...], {image of a row: the pictures of its channels}"""
    src = args.src
    if args.channels:
        folders = [f"{part}{name}" for part in ("", "*/") for name in (*args.channels, "masks")]
        files = of_channels([src, *(src / split for split in h5.SPLITS)], args.channels)
        rows = find_folder(src, args.channels[0])
    else:
        folders, rows = FOLDERS[args.preset], PRESETS[args.preset](src)
        files = {row.image: [row.image] for row in rows}
    say_unread(p for name in folders for p in sorted(src.glob(name)) if p.is_dir())
    if not rows:
        raise InputError(
            f"{src}: no picture in the layout of preset '{args.preset}'; "
            "see python -m data.images --help"
        )
    return rows, files


def split_cases(rows, lists, args):
    """Gives every case its patient and split. -> rows in their final order

    Says what is left out, what has no mask, and whose names look like those of one patient.
    """
    found, drawn = len(rows), splits.draws(rows, lists)
    rows = splits.assign_splits(splits.name_patients(rows, args), lists, args)
    splits.note_patients(rows, drawn)
    if len(rows) < found:
        why = "have no mask, and their patients are in val or test"
        why = "are in no list" if lists else why
        print(f"{found - len(rows)} of {found} pictures are left out: they {why}")
    if bare := sum(r.mask is None and r.split != "unlabeled" for r in rows):
        print(f"{bare} of {len(rows)} pictures have no mask and stay unlabeled")
    splits.note_masks({r.name: r.image for r in rows if not r.mask})
    return rows


def name_classes(args):
    """Names of the classes: of --classes, else numbers for --labels, else those of the preset."""
    if args.classes:
        return args.classes
    if args.labels and len(args.labels) > 2:
        return labels.numbered(len(args.labels))
    return ["background", SHOWS[args.preset]]


def name_channels(rows, args):
    """What the pictures show. -> colors of read_image(), names of channels that are no colors"""
    if args.channels:
        return None, args.channels
    count = count_channels([r.image for r in rows])
    if not count:
        return "gray" if args.gray else "RGB", None
    if args.gray:
        raise InputError(f"--gray: {rows[0].image} has {count} channels; leave --gray out")
    return None, [f"channel {k}" for k in range(count)]


def main(argv=None):
    args = parse_args(argv)
    lists = splits.find_lists(args)
    rows, files = find(args)
    rows = split_cases(rows, lists, args)
    classes = name_classes(args)
    colors, names = name_channels(rows, args)
    notes = {}
    reading = dict(notes=notes, values=args.labels, known={})

    def to_case(row):
        paths = files[row.image]
        image, label = read_pair(paths, row.mask, classes, colors, **reading)
        return resized(row.case(args.src, image, label), args.size)

    info = h5.write(
        args.out,
        map(to_case, rows),
        name=args.preset if args.preset != "folder" else args.src.resolve().name,
        classes=classes,
        dims=2,
        channels=len(names) if names else 1 if args.gray else 3,
        channel_names=names,
        prepared={"from": "pictures"} | ({"folders": names} if args.channels else {}),
    )
    labels.tell_mapping(args.labels)
    say(notes)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
