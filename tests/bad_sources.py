"""Bad sources for the converters: pictures, NIfTI volumes, lists of SSL4MIS, and channels of each.

bad_inputs.py runs them. A source is made by fill(src), which writes the folder `src`; most are a
good one, and then change(src).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import nibabel
import numpy as np
import SimpleITK as sitk

from data import pixels


class Input(NamedTuple):
    """A bad input of one script."""

    stage: str  # the script that must refuse it
    name: str  # what is wrong with it
    make: Callable[[Path], list]  # make(work) writes it in `work`, and gives the arguments
    words: list[str]  # what the message must hold
    loose: bool = False  # the input may also be good enough to work with


# ------------------------------------------------------------------------------- parts of a source


def source(fill, options=""):
    """make(work) of an Input: a converter reads what fill(src) writes."""

    def make(work):
        src = work / "src"
        src.mkdir()
        fill(src)
        return [src, "--out", work / "out.h5", *options.split()]

    return make


def untouched(src):
    """The change of a source that is good: its options are not."""


def written(content, *paths):
    """A change: the same bytes at some paths, the folders of which are made."""

    def change(src):
        for path in paths:
            (src / path).parent.mkdir(exist_ok=True)
            (src / path).write_bytes(content)

    return change


def painted(array, *paths):
    """A change: the same picture at some paths."""
    return lambda src: [cv2.imwrite(str(src / path), array) for path in paths]


def removed(path):
    """A change: a file is missing."""
    return lambda src: (src / path).unlink()


def write_tiff(path, image, extra=0, **tags):
    """(H, W, C) as a TIFF of several gray samples.

    extra: what it says of those beyond the first; tags: others, as in t262=2
    """
    packed = np.ascontiguousarray(image).tobytes()
    bits, kind = image.itemsize * 8, {"u": 1, "i": 2, "f": 3}[image.dtype.kind]
    H, W, C = image.shape
    found = {256: [W], 257: [H], 258: [bits] * C, 259: [1], 262: [1], 273: [8], 277: [C]}
    found |= {278: [H], 279: [len(packed)], 284: [1], 338: [extra] * (C - 1), 339: [kind] * C}
    found |= {int(name[1:]): [value] for name, value in tags.items()}
    start = 8 + len(packed) + len(packed) % 2
    head = b"II*\0" + start.to_bytes(4, "little") + packed
    path.write_bytes(head.ljust(start, b"\0") + pixels.directory(found, "<", start))
    return path


def write_volume(path, array, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing), image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


def write_4d(path, volumes):
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(v) for v in volumes]), str(path))


# ---------------------------------------------------------------------------------------- pictures


def pictures(change):
    """Four pictures and their masks, of which the first is empty, then changed."""

    def fill(src):
        for folder in ("images", "masks"):
            (src / folder).mkdir()
            for i in range(4):
                value = 255 if folder == "masks" and i else 0
                painted(np.full((16, 16), value, np.uint8), f"{folder}/p{i}.png")(src)
        change(src)

    return fill


def two_pages(src):
    cv2.imwritemulti(str(src / "images/p4.tif"), [np.eye(16)] * 2)


def mask_as_jpeg(src):
    removed("masks/p1.png")(src)
    painted(np.eye(16), "masks/p1.jpg")(src)


def newline_in_name(src):
    for folder in ("images", "masks"):
        (src / folder / "p1.png").rename(src / folder / "p\n1.png")


IMAGE, MASK = "images/p1.png", "masks/p1.png"
TRANSPARENT = np.full((16, 16, 4), 128, np.uint8)
VOID = np.tile(np.repeat(np.uint8([0, 0, 1, 255]), 4), (16, 1))
PICTURES = (  # name, change, word
    ("a picture is text", written(b"x", IMAGE), "p1.png"),
    ("a picture is empty", written(b"", IMAGE), "p1.png"),
    ("a mask is cut", lambda src: os.truncate(src / MASK, 40), "p1.png"),
    ("a mask of another size", painted(np.zeros((9, 9), np.uint8), MASK), "p1.png"),
    ("a picture of two pages", two_pages, "p4.tif"),
    ("a picture with NaN", painted(np.full((16, 16), np.nan), "images/p4.tif"), "p4.tif"),
    ("a transparent picture", painted(TRANSPARENT, IMAGE), "p1.png"),
    ("a mask of 0, 1 and void", painted(VOID, MASK), "255"),
    ("a transparent mask", painted(TRANSPARENT, MASK), "p1.png"),
    ("a mask of class numbers as JPEG", mask_as_jpeg, "p1.jpg"),
    ("pictures of 2 x 2", painted(np.zeros((2, 2), np.uint8), IMAGE, MASK), "p1"),
    ("a name with a newline", newline_in_name, "printable"),
    ("no pictures", lambda src: [path.unlink() for path in src.rglob("*.png")], "src"),
)


def bad_pictures():
    """Pictures and masks that cannot be read, or do not belong together."""
    for name, change, word in PICTURES:
        yield Input("data.images", name, source(pictures(change), "--val 0.5"), [word])


def missing(work):
    return ["none", "--out", work / "out.h5"]


def a_file(work):
    (work / "text.txt").write_text("no folder")
    return [work / "text.txt", "--out", work / "out.h5"]


def no_folder():
    """Paths where no folder lies."""
    for name, make, word in (("missing", missing, "none"), ("a file", a_file, "text.txt")):
        for stage in ("data.images", "data.nifti", "data.ssl4mis"):
            yield Input(stage, name, make, [word])


# ----------------------------------------------------------------------------------- NIfTI volumes


def header_alone(src):
    """A file that declares 32 TB."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((32767, 32767, 32767)), header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    written(header.binaryblock + bytes(4096), "imagesTr/a.nii", "labelsTr/a.nii")(src)


def unreadable(content):
    return written(content, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")


UNREADABLE = (  # name, fill, word
    ("more voxels than there are", header_alone, "a.nii"),
    ("text", unreadable(b"no image"), "a.nii.gz"),
    ("empty", unreadable(b""), "a.nii.gz"),
    (
        "gzip of nothing",
        unreadable(bytes.fromhex("1f8b08000000000000ff03000000000000000000")),
        "a.nii.gz",
    ),
)


def unreadable_volumes():
    """Files that hold no volume."""
    for name, fill, word in UNREADABLE:
        yield Input("data.nifti", name, source(fill), [word])


def labeled(values, table=None):
    """Two volumes and their labels, of some values; table: the content of dataset.json."""

    def fill(src):
        volume, label = np.arange(500.0).reshape(5, 10, 10), np.resize(values, (5, 10, 10))
        for folder, array in (("imagesTr", volume), ("labelsTr", label)):
            (src / folder).mkdir()
            for name in "ab":
                write_volume(src / folder / f"{name}.nii", array)
        if table is not None:
            (src / "dataset.json").write_bytes(table)

    return fill


TWO_CLASSES = b'{"labels": {"background": 0, "a": 1}}'
LABELS = (  # name, values of the labels, dataset.json, words
    ("labels 0 alone", [0], None, ["labelsTr"]),
    ("dataset.json, not UTF-8", [0, 1], b'{"labels": {"\xe4": 0}}', ["dataset.json"]),
    ("dataset.json, nested", [0, 1], b"[" * 100_000, ["dataset.json"]),
    ("a value that dataset.json does not name", [0, 2], TWO_CLASSES, ["labelsTr/", "2"]),
)


def bad_labels():
    """Labels and tables of them that cannot be followed (of others, see test_labels.py)."""
    for name, values, table, words in LABELS:
        yield Input("data.nifti", name, source(labeled(np.uint8(values), table)), words)


# --------------------------------------------------------------------------------- lists of SSL4MIS

SHAPE = (16, 16, 9)
NO_IMAGE, TWO_LABELS = np.zeros(SHAPE), np.resize([0, 1], SHAPE)


def left_atria(write, train=b"a\nb\n", cases="abc"):
    """A folder for each case, where write(path) puts its file; the last case is in val.list."""

    def fill(src):
        for case in cases:
            (src / case).mkdir()
            write(src / case / "mri_norm2.h5")
        (src / "train.list").write_bytes(train)
        (src / "val.list").write_text(f"{cases[-1]}\n")

    return fill


def volume(image=NO_IMAGE, label=TWO_LABELS):
    def write(path):
        with h5py.File(path, "w") as f:
            f["image"], f["label"] = image, label

    return write


def raw(content):
    return lambda path: path.write_bytes(content)


LEFT_ATRIA = (  # name, fill, words
    ("a volume is text", left_atria(raw(b"no HDF5"), b"a\n", "ab"), ["a/mri_norm2.h5"]),
    ("a list names nobody", left_atria(raw(b""), b"nobody\n", "ab"), ["train.list", "nobody"]),
    ("labels texts", left_atria(volume(label=np.full(SHAPE, b"x"))), ["a/mri_norm2.h5"]),
    ("labels of another shape", left_atria(volume(label=NO_IMAGE[..., 1:])), ["a/mri_norm2.h5"]),
    (
        "gray levels beyond 32 bits",
        left_atria(volume(np.resize(2**31 + np.arange(9), SHAPE))),
        ["a/mri_norm2.h5", "float32 cannot hold or tell apart"],
    ),
    ("a name twice in a list", left_atria(volume(), b"a\nb\na/mri_norm2.h5\n"), ["train.list"]),
    ("a name in two lists", left_atria(volume(), b"a\nc\n"), ["val.list"]),
    ("a list in cp1252", left_atria(volume(), "\u00e4\n".encode("cp1252")), ["train.list"]),
    ("a list of bytes", left_atria(volume(), b"a\0b\n"), ["train.list"]),
)


def bad_lists():
    """Lists and the files that they name."""
    for name, fill, words in LEFT_ATRIA:
        yield Input("data.ssl4mis", name, source(fill), words)


# ----------------------------------------------------------------------- channels of NIfTI volumes

NOISE = np.random.default_rng(0).integers(0, 200, (6, 10, 12)).astype(np.int16)
LABEL = np.resize(np.uint8([0, 0, 1]), (6, 10, 12))
TABLE = {"channel_names": {"0": "T2", "1": "CT"}, "labels": {"background": 0, "x": 1}}


def two_channels(change):
    """Two cases of two channels, a file for each, then changed."""

    def fill(src):
        for folder in ("imagesTr", "labelsTr"):
            (src / folder).mkdir()
        for name in "ab":
            for c in range(2):
                write_volume(src / f"imagesTr/{name}_{c:04d}.nii", NOISE + c)
            write_volume(src / f"labelsTr/{name}.nii", LABEL)
        said()(src)
        change(src)

    return fill


def said(**more):
    """A change: what dataset.json says."""
    return lambda src: (src / "dataset.json").write_text(json.dumps(TABLE | more))


def put(array, name="b_0001", **place):
    """A change: another volume, as the last channel of case b."""
    return lambda src: write_volume(src / f"imagesTr/{name}.nii", array, **place)


def in_4d(*counts):
    """A change: so many channels of each case, all in one file."""

    def change(src):
        for name, count in zip("ab", counts):
            for path in (src / "imagesTr").glob(f"{name}_*"):
                path.unlink()
            write_4d(src / f"imagesTr/{name}.nii", [NOISE + i for i in range(count)])

    return change


def channel_in_4d(src):
    write_4d(src / "imagesTr/b_0001.nii", [NOISE, NOISE + 1])


CASE_B, JSON = ["case 'b', channel 1 (CT)", "b_0001.nii"], ["dataset.json"]
VOLUMES = (  # name, change, words
    ("a channel is missing", removed("imagesTr/b_0001.nii"), ["case 'b' has no channel 1"]),
    ("a channel too many", put(NOISE, "b_0002"), ["case 'a' has no channel 2"]),
    (
        "a channel of another size",
        put(NOISE[:5]),
        [*CASE_B, "size", "resample channel 1 to channel 0"],
    ),
    ("a channel elsewhere", put(NOISE, origin=(0.0, 5.0, 0.0)), [*CASE_B, "origin"]),
    ("a channel of other voxels", put(NOISE, spacing=(1.0, 1.0, 2.0)), [*CASE_B, "spacing"]),
    ("a channel is the label", put(LABEL), [CASE_B[0], "is the label itself", "b.nii"]),
    ("4D in files of channels", channel_in_4d, ["b_0001.nii", "4D"]),
    ("other numbers of volumes", in_4d(2, 3), ["b.nii", "holds 3 volumes", "a.nii"]),
    ("volumes that are times", in_4d(65, 65), ["holds 65 volumes", "at most 64"]),
    ("names of other channels", in_4d(3, 3), ["dataset.json", "names channels 0, 1"]),
    ("channels without names", said(channel_names=["T2", "CT"]), JSON),
    ("a name of a channel is a number", said(channel_names={"0": 1}), JSON),
    ("names by letters", said(channel_names={"a": "T2"}), JSON),
    ("modality is a list", said(channel_names=None, modality=["MR"]), JSON),
)
# a line of argparse itself ends with a semicolon and --help: that is its remedy
VOLUME_OPTIONS = (  # name, options, words
    ("--channel that is not there", "--channel 0,2", ["no channel 2"]),
    ("--channel twice", "--channel 1,1", ["--channel", "comes twice"]),
    ("--channel of a text", "--channel T2", ["--channel"]),
    ("--clip of no channel", "--clip MR=0,9", ["--clip", "'MR'", "T2, CT"]),
    ("--clip by name of one", "--clip CT=0,9 --channel 1", ["--clip", "'CT'"]),
    ("--clip twice", "--clip CT=0,9;CT=1,2", ["--clip", "two windows"]),
    ("--clip from high to low", "--clip CT=9,0", ["--clip", "lower"]),
    ("--clip of all that are MR", "--clip 0,9", ["--clip", "--intensity ct"]),
)


def channels_of_volumes():
    """Channels of volumes, and options that name them."""
    for name, change, words in VOLUMES:
        yield Input("data.nifti", f"channels, {name}", source(two_channels(change)), words)
    for name, options, words in VOLUME_OPTIONS:
        make = source(two_channels(untouched), options)
        yield Input("data.nifti", f"channels, {name}", make, words)


# ----------------------------------------------------------------------------- channels of pictures

GRAY = np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)
FIVE = np.dstack([GRAY] * 5)
FIVE_WITH_NAN = np.where(FIVE > 250, np.nan, FIVE).astype(np.float32)


def folders(change):
    """Three pictures as channels a and b, and as images with masks, then changed."""

    def fill(src):
        for folder in ("a", "b", "images", "masks"):
            (src / folder).mkdir()
            array = np.eye(16) * 255 if folder == "masks" else GRAY
            painted(array, *[f"{folder}/p{i}.png" for i in range(3)])(src)
        change(src)

    return fill


def tiffs(*images, **tags):
    """A change: TIFFs of several channels in the place of the first pictures."""

    def change(src):
        for i, image in enumerate(images):
            (src / f"images/p{i}.png").unlink()
            write_tiff(src / f"images/p{i}.tif", image, **tags)

    return change


def mask_of_five(src):
    removed("masks/p1.png")(src)
    write_tiff(src / "masks/p1.tif", FIVE)


AB, SRC = "--channels a,b", "src/images/p"
CHANNELS = (  # name, change, options, words
    ("a channel is missing", removed("b/p1.png"), AB, ["case 'p1' has no channel b"]),
    ("the first channel is missing", removed("a/p1.png"), AB, ["case 'p1' has no channel a"]),
    (
        "a channel of another size",
        painted(GRAY[:9], "b/p1.png"),
        AB,
        ["b/p1.png", "16 x 9", "a/p1.png"],
    ),
    (
        "a colored channel",
        painted(np.dstack([GRAY, GRAY, 255 - GRAY]), "b/p1.png"),
        AB,
        ["b/p1.png", "colored"],
    ),
    ("one folder", untouched, "--channels a", ["--channels"]),
    ("a folder twice", untouched, "--channels a,a", ["--channels"]),
    ("a folder elsewhere", untouched, "--channels a,../b", ["--channels"]),
    ("masks as a channel", untouched, "--channels a,masks", ["--channels", "truth"]),
    ("no such folders", untouched, "--channels c,d", ["src/c"]),
    ("--channels and --gray", untouched, "--channels a,b --gray", ["--channels"]),
    ("--channels of a preset", untouched, "--channels a,b --preset ph2", ["--channels"]),
    ("TIFFs of 5 and 4", tiffs(FIVE, FIVE, FIVE[..., :4]), "", ["p2.tif", "has 4 channels"]),
    ("a TIFF of 5 beside gray", tiffs(FIVE), "", ["p0.tif", "is gray or RGB", "has 5 channels"]),
    ("TIFFs of 5 as gray", tiffs(FIVE, FIVE, FIVE), "--gray", ["--gray", "5 channels"]),
    ("65 channels", tiffs(*[np.dstack([GRAY] * 65)] * 3), "", ["out.h5", "64 channels"]),
    ("an alpha of 2", tiffs(FIVE[..., :2], extra=1), "", ["p0.tif", "2 channels"]),
    ("4 that may be RGBA", tiffs(FIVE[..., :4], t262=2), "", ["p0.tif", "4 channels"]),
    ("5 with an alpha", tiffs(FIVE, extra=2), "", ["p0.tif", "5 channels"]),
    ("turned", tiffs(FIVE, FIVE, FIVE, t274=6), "", [SRC, "orientation 6"]),
    ("damaged", tiffs(FIVE, FIVE, FIVE, t259=8), "", [SRC, "not a readable"]),  # not deflated
    ("JPEG", tiffs(FIVE, FIVE, FIVE, t259=7), "", [SRC, "compressed", "TIFF 7"]),
    ("floats in steps", tiffs(FIVE, FIVE, FIVE, t317=3), "", [SRC, "predictor"]),
    ("NaN", tiffs(*[FIVE_WITH_NAN] * 3), "", [SRC, "NaN"]),
    ("a mask of 5", mask_of_five, "", ["masks/p1.tif", "5 channels"]),
)


def channels_of_pictures():
    """Folders of channels, and TIFFs of several."""
    for name, change, options, words in CHANNELS:
        make = source(folders(change), f"--val 0 {options}")
        yield Input("data.images", f"channels, {name}", make, words)


# ------------------------------------------------------------------------------ channels of SSL4MIS

MANY = np.random.default_rng(2).random((4, 10, 12, 9))
CUBE, WHOLE = np.resize(MANY, (9,) * 4), np.resize(np.uint8([0, 0, 1]), (10, 12, 9))


def brats(*images, labels=None):
    """A file data/ID.h5 for each image; labels: those of each, None: without."""

    def fill(src):
        (src / "data").mkdir()
        for i, image in enumerate(images):
            with h5py.File(src / f"data/c{i}.h5", "w") as f:
                f["image"] = image
                if labels is not None:
                    f["label"] = labels
        (src / "train.txt").write_text("c0\n")
        (src / "val.txt").write_text("c1,0.5\n")

    return fill


BRATS = (  # name, fill, words
    ("a cube of channels", brats(CUBE, CUBE, labels=WHOLE[:9, :9, :9]), ["c0.h5", "axis"]),
    ("an axis nobody knows", brats(np.resize(MANY, (9, 10, 12, 9)), MANY), ["c0.h5", "axis"]),
    ("other channels", brats(MANY, MANY[:3], labels=WHOLE), ["c1.h5", "3 channel", "c0.h5"]),
    ("a label of another shape", brats(MANY, MANY, labels=WHOLE[1:]), ["c0.h5", "(9, 12, 9)"]),
    ("a case that is not there", brats(MANY, labels=WHOLE), ["val.txt", "c1", "data/c1.h5"]),
)


def channels_of_lists():
    """Channels of the volumes that lists name."""
    for name, fill, words in BRATS:
        yield Input("data.ssl4mis", f"channels, {name}", source(fill), words)


def converters():
    """All bad sources."""
    yield from bad_pictures()
    yield from no_folder()
    yield from unreadable_volumes()
    yield from bad_lists()
    yield from bad_labels()
    yield from channels_of_volumes()
    yield from channels_of_pictures()
    yield from channels_of_lists()
