"""Folders of pictures with masks -> one HDF5 file.

    python -m data.images --preset ph2 "PH2Dataset" --out ph2.h5 --size 224
    python -m data.images --preset cvc CVC-ClinicDB --out cvc.h5
    python -m data.images --preset isic ISIC2018 --out isic.h5
    python -m data.images --preset folder MINE --out mine.h5 --classes background,polyp
    python -m data.images EYES --out eyes.h5 --patient '(\\d+)_'

What each preset reads under SRC:
    ph2     **/IMDxxx_Dermoscopic_Image/*.bmp, **/IMDxxx_lesion/*.bmp; train.txt and val.txt (a case a line) if they are there
    cvc     Original/N.*, "Ground Truth"/N.*; sequences.csv (frame,sequence): a video sequence is one patient
    isic    *Input*/ISIC_*.jpg, *GroundTruth*/ISIC_*_segmentation.png
    folder  images/NAME.*, masks/NAME.*; also train|val|test|unlabeled/{images,masks}/NAME.* (no masks: unlabeled)

Splits: SRC/train.txt, val.txt, test.txt (or --lists DIR), a name a line and no name twice;
otherwise by patient with --seed. A picture is a patient unless --patient or the preset says
otherwise. Masks of two classes are 0 and 1, or black and white with edges that may be gray. With
more than two --classes, mask pixels are class numbers. --labels lists the values of other masks:
0,128,255 become the classes 0, 1, 2. All else is refused, and so are pictures that a decoder would
cut short; data/pixels.py has the rules. Notes tell which files are not read.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from data import h5, labels, loading
from data.files import InputError, read_lists, read_table
from data.options import SEED, SHARE, Parser, cli, number
from data.pixels import PICTURES, read_mask, read_picture, say

IGNORED = {".txt", ".csv", ".md", ".db", ".ini"}  # lists and notes; Thumbs.db and desktop.ini


def pictures(folder):
    """Name without ending -> path, for the pictures directly in a folder, in natural order (2 before 10)."""
    found = (
        [
            p
            for p in Path(folder).iterdir()
            if p.suffix.lower() in PICTURES and not p.name.startswith(".")
        ]
        if Path(folder).is_dir()
        else []
    )
    by_number = sorted(
        found, key=lambda p: (not p.stem.isdigit(), int(p.stem) if p.stem.isdigit() else 0, p.stem)
    )
    by_name = {
        p.stem.lower(): p for p in by_number
    }  # their masks must not be one file where endings or capitals are all that differs
    if twice := [p for p in by_number if by_name[p.stem.lower()] != p]:
        raise InputError(
            f"{twice[0]}: {by_name[twice[0].stem.lower()].name} is there too; remove or rename one of the two"
        )
    return {p.stem: p for p in by_number}


def say_unread(folders):
    """Prints how many files and folders in some folders are not read as pictures, if any."""
    found = [p for folder in folders for p in sorted(folder.iterdir()) if p.name[0] != "."]
    unread = [p for p in found if p.suffix.lower() not in PICTURES | IGNORED]
    if unread:
        print(
            f"note: {len(unread)} of {len(found)} files and folders are not read, such as "
            f"{unread[0]}; read are {', '.join(sorted(PICTURES))}"
        )


# Each preset: folder -> [(name, image path, mask path or None, patient, split or None)]


def find_ph2(src):
    """A lesion is a patient: PH2 does not say whose it is."""
    masks = {
        p.parent.name.removesuffix("_lesion"): p
        for p in src.rglob("*_lesion/*")
        if p.suffix.lower() in PICTURES
    }
    images = {
        p.parent.name.removesuffix("_Dermoscopic_Image"): p
        for p in sorted(src.rglob("*_Dermoscopic_Image/*"))
        if p.suffix.lower() in PICTURES
    }
    return [(name, path, masks.get(name), name, None) for name, path in images.items()]


def find_cvc(src):
    """A video sequence is a patient."""
    images, masks, table = (
        pictures(src / "Original"),
        pictures(src / "Ground Truth"),
        src / "sequences.csv",
    )
    if not table.is_file():
        raise InputError(
            f"{table}: missing; it maps frame to sequence, and neighboring frames must not be split"
        )
    sequence = {}
    for row in read_table(table, ("frame", "sequence")):
        frame, text = row["frame"], row["sequence"]
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise InputError(
                f"{table}: frame {frame} is of sequence '{text}'; write a whole number"
            )
        if frame in sequence:
            raise InputError(f"{table}: frame {frame} comes twice; remove one of its lines")
        sequence[frame] = f"sequence{int(text):02d}"
    if lost := [name for name in images if name not in sequence]:
        raise InputError(
            f"{table}: frame {lost[0]} has no sequence ({len(lost)} such frames); add "
            "it, called as its picture without ending"
        )
    return [(name, path, masks.get(name), sequence[name], None) for name, path in images.items()]


def find_isic(src):
    """An image is a patient."""
    images = {n: p for folder in sorted(src.rglob("*Input*")) for n, p in pictures(folder).items()}
    masks = {
        n.removesuffix("_segmentation"): p
        for folder in sorted(src.rglob("*GroundTruth*"))
        for n, p in pictures(folder).items()
    }
    return [(name, path, masks.get(name), name, None) for name, path in images.items()]


def find_folder(src):
    """A picture is a patient, with or without split folders."""
    rows = []
    for split in (None, *h5.SPLITS):
        base = src / split if split else src
        images, masks = pictures(base / "images"), pictures(base / "masks")
        if lost := sorted(set(masks) - set(images)):
            raise InputError(
                f"{masks[lost[0]]}: no picture of that name in {base / 'images'} ({len(lost)} such masks)"
            )
        rows += [
            (name, path, masks.get(name), f"{split}/{name}" if split else name, split)
            for name, path in images.items()
        ]
    if other := [p.parent for p in sorted(src.glob("*/images")) if p.parent.name not in h5.SPLITS]:
        print(f"note: {other[0]} is not read; the names of splits are {', '.join(h5.SPLITS)}")
    return rows


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


def assign_splits(rows, lists, args):
    """Gives every row its split: from list files, from its folder, or by patient with a seed. -> rows in their final order"""
    if lists:
        by_name, out = {r[0]: r for r in rows}, []
        twice = [name for name, count in Counter(r[0] for r in rows).items() if count > 1]
        for split, names in lists.items():
            for name in names:
                if name in twice:
                    raise InputError(
                        f"{split}.txt: {args.src} has several cases called '{name}'; "
                        "rename them, or remove the lists"
                    )
                if name not in by_name:
                    raise InputError(
                        f"{split}.txt: case '{name}' is not among the pictures of "
                        f"{args.src}; write names such as '{rows[0][0]}', one a line"
                    )
                out.append((*by_name[name][:4], split))
        return out
    if any(r[4] for r in rows):
        return [(*r[:4], r[4] or "train") for r in rows]
    patients = sorted({r[3] for r in rows})
    order = np.random.default_rng(args.seed).permutation(len(patients))
    n_val, n_test = (
        max(round(share * len(patients)), int(share > 0 and len(patients) > 2))
        for share in (args.val, args.test)
    )
    split = {
        patients[i]: "val" if j < n_val else "test" if j < n_val + n_test else "train"
        for j, i in enumerate(order)
    }
    rank = {
        patients[i]: j for j, i in enumerate(order)
    }  # train order is random too: --labeled takes the first patients
    return [(*r[:4], split[r[3]]) for r in sorted(rows, key=lambda r: rank[r[3]])]


def lists_of(folder):
    """train.txt, val.txt, test.txt, unlabeled.txt of a folder, a name a line -> {split: [names]}"""
    return read_lists({s: folder / f"{s}.txt" for s in h5.SPLITS})


def name_patients(rows, regex):
    """Rows whose patient is what the one group of a regular expression finds in the case's name."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise InputError(f"--patient {regex}: not a regular expression ({error})") from None
    if pattern.groups != 1:
        raise InputError(
            f"--patient {regex}: {pattern.groups} groups; one is needed, as in '(patient\\d+)_'"
        )
    found = [pattern.search(r[0]) for r in rows]
    if lost := [r[0] for r, match in zip(rows, found) if not match or not match[1]]:
        raise InputError(
            f"--patient {regex}: finds nothing in the name of case '{lost[0]}' "
            f"({len(lost)} such cases); give one that fits every name"
        )
    return [(*r[:3], match[1], r[4]) for r, match in zip(rows, found)]


OF_ONE = (
    r"(.*\d.*)[ _.-]+[^ _.-]+",  # p01_2, patient001_frame01: what comes before the last mark
    r"(.*\d)[A-Za-z]+\d*",
)  # p01b, P1S3: what comes before the last letters


def stem_of(name):
    """The part of a name that may be a patient's, which holds a number, or None."""
    for pattern in OF_ONE:
        if match := re.fullmatch(pattern, name):
            return match[1]
    return None


def note_patients(rows):
    """A note where each case counts as a patient, but many names begin like another one's."""
    groups = {}
    for name, _, _, patient, _ in rows:
        if patient == name:
            groups.setdefault(stem_of(name) or name, []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    if len(groups) > 1 and sum(map(len, several)) >= max(2, len(rows) / 10):
        print(
            f"note: {several[0][0]} and {several[0][1]} count as two patients and may be split "
            f"apart; if they are of one, give --patient ({len(several)} such groups)"
        )


def read_pair(image_path, mask_path, classes, gray, notes=None, listed=None):
    """One picture and its mask, on the picture's grid.

    -> image (H, W, 3) or (H, W), uint8 or float32; label (H, W) uint8 or None.
    notes: pixels.note(); listed: the mask's values, of --labels
    """
    turned = {}
    image = read_picture(image_path, gray, turned if mask_path else notes)
    if mask_path is None:
        return image, None
    if turned:  # many programs would have shown it turned when its mask was drawn
        raise InputError(
            f"{image_path}: is stored turned (EXIF orientation), so nobody knows "
            "whether its mask is, too; save both upright"
        )
    mask = read_mask(mask_path, classes, notes, listed)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"{mask_path}: mask of {mask.shape[1]} x {mask.shape[0]} pixels, but its image {image_path} "
            f"has {image.shape[1]} x {image.shape[0]}; make them equal"
        )
    return image, mask


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.images")
    p.add_argument("src", help="folder of the pictures")
    p.add_argument("--preset", choices=PRESETS, default="folder", help="layout of the folder")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument(
        "--size",
        type=number(0),
        default=0,
        help="resize to a square of this side; 0 keeps the pictures' own sizes",
    )
    p.add_argument(
        "--classes",
        type=labels.class_names,
        metavar="NAMES",
        help="names, background first (default: background, and what the preset shows)",
    )
    p.add_argument(
        "--labels",
        type=labels.label_values,
        metavar="VALUES",
        help="the masks' values that stand for the classes, background first, as in 0,128,255",
    )
    p.add_argument(
        "--patient",
        metavar="REGEX",
        help="its one group gives the patient from a picture's name; default: as the "
        "preset says, mostly a picture is a patient",
    )
    p.add_argument("--gray", action="store_true", help="read the pictures as gray")
    p.add_argument(
        "--lists",
        metavar="DIR",
        help="folder with train.txt, val.txt, test.txt; default: SRC, if it has them",
    )
    p.add_argument(
        "--val", type=SHARE, default=0.2, help="share of the patients for val, where no list says"
    )
    p.add_argument(
        "--test", type=SHARE, default=0.0, help="share of the patients for test, where no list says"
    )
    p.add_argument("--seed", type=SEED, default=0, help="of the split by patient")
    args = p.parse_args(argv)
    src, classes = Path(args.src), args.classes or ["background", SHOWS[args.preset]]
    if args.labels and not args.classes and len(args.labels) > 2:
        classes = labels.numbered(len(args.labels))
    labels.check_options(args.labels, classes)
    if not src.is_dir():
        raise InputError(f"{src}: no such folder; give the one that holds the pictures")
    if args.val + args.test >= 1:
        raise InputError("--val and --test are shares that must leave something to train on")
    rows, notes = PRESETS[args.preset](src), {}
    say_unread(p for name in FOLDERS[args.preset] for p in sorted(src.glob(name)) if p.is_dir())
    if not rows:
        raise InputError(
            f"{src}: no picture in the layout of preset '{args.preset}'; see python -m data.images --help"
        )
    rows = name_patients(rows, args.patient) if args.patient else rows
    lists = lists_of(Path(args.lists) if args.lists else src)
    if args.lists and not lists:
        raise InputError(
            f"--lists {args.lists}: none of {', '.join(f'{s}.txt' for s in h5.SPLITS)} is there"
        )
    if not lists and not any(split for *_, split in rows):
        print(f"no list of splits: by patient, with seed {args.seed}")
        note_patients(rows)
    found, rows = len(rows), assign_splits(rows, lists, args)
    if len(rows) < found:
        print(f"{found - len(rows)} of {found} pictures are in no list and left out")
    if bare := sum(
        mask is None and split in ("train", "val", "test") for _, _, mask, _, split in rows
    ):
        print(f"{bare} of {len(rows)} pictures have no mask and stay unlabeled")

    def cases():
        for name, image_path, mask_path, patient, split in rows:
            image, label = read_pair(image_path, mask_path, classes, args.gray, notes, args.labels)
            source = str(image_path.relative_to(src))
            case = h5.Case(split, name, image, label, patient, source=source)
            if args.size:
                case.source_grid, case.source_label = image.shape[:2], label
                case.image = loading.resize_image(image, args.size)
                case.label = None if label is None else loading.resize_label(label, args.size)
            yield case

    info = h5.write(
        args.out,
        cases(),
        name=args.preset if args.preset != "folder" else src.resolve().name,
        classes=classes,
        dims=2,
        channels=1 if args.gray else 3,
        prepared={"from": "pictures"},
    )
    labels.tell_mapping(args.labels)
    say(notes)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
