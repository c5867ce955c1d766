"""New images without labels -> a dataset file that a trained network takes.

They are a folder of pictures or of NIfTI volumes, or one of these files, and are prepared as the
data that the network has learned from were. Its checkpoint knows how (`prepared`, see data/h5.py):
gray or RGB, and of volumes the spacing that they are resampled to, the window of CT, the channel
and the body axes. evaluate.py --predict writes masks for them.
"""

import re
from collections import defaultdict
from pathlib import Path

from data import h5, images, nifti, pixels, space
from data.files import InputError, kind_of
from data.splits import Row, plain_name

KINDS = {"pictures": "pictures", "nifti": "NIfTI volumes"}


def are_new(source):
    """Whether a path is a folder or file of images, and not a dataset.

    InputError if nothing is there.
    """
    path = Path(source)
    if not source or not path.exists():
        raise InputError(f"{source}: no such file or folder; give new images, or a dataset file")
    if not path.is_file():
        return path.is_dir()
    if path.suffix.lower() in pixels.PICTURES or nifti.NAME.fullmatch(path.name):
        return True
    if kind_of(path) is None:
        kinds = ", ".join(sorted(pixels.PICTURES))
        raise InputError(
            f"{source}: is of a kind that is not read; save it as {kinds}, .nii or .nii.gz"
        )
    return False


FOLDERS = ("", "images", "imagesTs", "imagesTr")  # of a source, in which images may be
OF_MASKS = re.compile(r"(?i).+[_-](seg|segmentation|mask|label|labels|gt)")  # names


def find(path):
    """The images directly in a folder or in a usual subfolder, or one file.

    -> "pictures" or "nifti", {name: path}. Notes tell what is not read, or looks like a mask.
    """
    if not path.is_dir():
        match = nifti.NAME.fullmatch(path.name)
        kind, name = ("nifti", match[1]) if match else ("pictures", path.stem)
        paths = {plain_name(name): path}
    else:
        kind, paths = find_in(path)
    if masks := [name for name in paths if OF_MASKS.fullmatch(name)]:
        print(
            f"note: {len(masks)} of {len(paths)} files have names of masks, such as "
            f"{paths[masks[0]]}; they are taken for images, so move them elsewhere if they are none"
        )
    return kind, paths


def find_in(path):
    """The work of find() for a folder."""
    found = []
    for folder in dict.fromkeys(path / name for name in FOLDERS):
        kinds = {"pictures": images.pictures(folder), "nifti": nifti.volumes(folder)}
        found += [(folder, kind, names) for kind, names in kinds.items() if names]
    if not found:
        raise InputError(
            f"{path}: no picture ({', '.join(sorted(pixels.PICTURES))}) and no .nii or .nii.gz is "
            "in it, nor in its images, imagesTs or imagesTr; give a folder of images"
        )
    (folder, kind, names), *others = found
    if others and others[0][0] == folder:
        raise InputError(
            f"{folder}: holds both pictures and NIfTI volumes; give a folder of one kind"
        )
    (images if kind == "pictures" else nifti).say_unread([folder])
    if others:
        print(
            f"note: images of {folder} alone are taken; those of {others[0][0]} need a run of "
            "their own"
        )
    return kind, names


def convert(source, out, data):
    """Writes the images of a folder, or one, to a dataset file `out`, all in split `unlabeled`.

    data: what a checkpoint says of its data -> Info. InputError if they cannot be what the network
    has learned from, or if one of them cannot be read.
    """
    kind, paths = find(Path(source))
    prepared, said = data.get("prepared"), True
    if prepared is None or isinstance(prepared, dict) and prepared.get("from") == "ssl4mis":
        prepared, said = assumed(kind, source, data), False
    how = preparation(prepared, source)
    learned = prepared["from"]
    if learned == kind and (data["dims"] == 3 or data["channels"] == 3):
        learned = "nifti" if data["dims"] == 3 else "pictures"
    if learned != kind:
        raise InputError(
            f"{source}: holds {KINDS[kind]}, but the network has learned from {KINDS[learned]}; "
            "give images of that kind"
        )
    notes = defaultdict(list)
    gray = data["channels"] == 1
    cases = pictures(paths, gray, notes) if kind == "pictures" else volumes(paths, how, notes)
    try:
        info = h5.write(
            out,
            noted(cases, constant := []),
            name=Path(source).resolve().name,
            classes=data["classes"],
            dims=data["dims"],
            channels=data["channels"],
            standardize=data.get("standardize", True),
            prepared=prepared if said else None,
        )
    except InputError as error:  # in words that fit images which nobody had to convert
        text = re.sub("( and|;) convert the data again", "", str(error))
        raise InputError(text.replace(str(out), str(source))) from None
    if kind == "pictures":
        pixels.say(notes)
    else:
        nifti.say(notes, how.axes, info)
    if constant:
        print(f"note: {len(constant)} images have one value everywhere, such as {constant[0]}")
    return info


def assumed(kind, source, data):
    """What `prepared` is taken for, with a note, where a checkpoint does not say it."""
    if not data.get("standardize", True):
        raise InputError(
            f"{source}: the network has learned from data that were brought to a window of "
            "intensities, and its checkpoint does not say which; convert the data again, and "
            "train on them"
        )
    manner = "gray" if data["channels"] == 1 else "RGB"
    if kind == "nifti":
        manner = "as MR, each at its own spacing"
    print(
        "note: the checkpoint does not say how its data were prepared; "
        f"{KINDS[kind]} are taken as they are, {manner}"
    )
    shrink = (data.get("prepared") or {}).get("shrink")
    if type(shrink) is int and shrink > 1:
        print(
            f"note: {source}: the network has learned from volumes of --shrink {shrink}; give it "
            "volumes as coarse, or train one without --shrink"
        )
    return {"from": kind}


def noted(cases, constant):
    """Yields cases, and appends the names of those of one value to `constant`."""
    for case in cases:
        if case.image.min() == case.image.max():
            constant.append(case.name)
        yield case


def pictures(paths, gray, notes):
    """Yields each of some pictures as an h5.Case, on its own grid. notes: see pixels.note()"""
    for name, path in paths.items():
        h5.check_name(path, name)
        image = pixels.read_picture(path, gray, notes)
        yield Row(name, path, None, name, "unlabeled").case(path.parent, image, None)


def preparation(prepared, source):
    """nifti.Preparation of what a checkpoint, which may come from anybody, says of it.

    InputError if that is none.
    """

    def numbers(value, n, low, high):  # no NaN, no bool
        fits = isinstance(value, (list, tuple)) and len(value) == n
        return fits and all(type(v) in (int, float) and low < v < high for v in value)

    try:
        how = nifti.Preparation(**{k: v for k, v in prepared.items() if k != "from"})
        spacing, window, channel = how.spacing, how.window, how.channel
        known = (
            prepared["from"] in KINDS
            and (spacing is None or numbers(spacing, 3, 1e-5, 1000))
            and (how.axes is None or space.are_axes(how.axes))
            and (window is None or numbers(window, 2, -1e9, 1e9) and window[0] < window[1])
            and (channel is None or type(channel) is int and 0 <= channel < 10_000)
            and type(how.nnunet) is bool
        )
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        raise InputError(
            f"{source}: the checkpoint says of its data what cannot be understood "
            f"({ascii(prepared)[:100]}); convert the data again, and train on them"
        )
    return how


def volumes(paths, how, notes):
    """Yields each of some NIfTI volumes as an h5.Case, as nifti.Preparation says.

    notes: what nifti.read_case() is to fill.
    """
    cases, _ = nifti.one_channel(paths, how.channel, how.nnunet)
    if further := len(paths) - len(cases):
        print(
            f"note: {further} of {len(paths)} files are further channels of a case by their names "
            "(NAME_0001) and are not read; rename those that are cases of their own"
        )
    if how.axes is None:
        print(
            "note: the checkpoint does not know along which body axes its volumes lay; these are "
            "taken as they are, so they should be stored alike"
        )
    for name, path in cases.items():
        yield nifti.read_case(Row(name, path, None, name, "unlabeled"), how, path.parent, notes)
