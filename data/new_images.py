"""New images without labels -> a dataset file that a trained network takes.

They are a folder of pictures or of NIfTI volumes, or one of these files, and are prepared as the
data that the network has learned from were. Its checkpoint knows how (`prepared`, see data/h5.py):
gray, RGB or other channels, and of volumes the spacing that they are resampled to, the window of
CT, the channels and the body axes. evaluate.py --predict writes masks for them.
"""

import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from data import h5, images, nifti, pixels, space
from data.files import DiskFull, InputError, kind_of
from data.splits import Row, note_masks, plain_name

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


def may_hold(source):
    """The folders in which the images of a folder, or one image, and their masks may be."""
    path = Path(os.path.abspath(source))
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in FOLDERS]
    return [*found, folder.parent] if folder.name in FOLDERS else found


def find(path, channels=()):
    """The images directly in a folder or in a usual subfolder, or one file.

    channels: folders in it that hold a picture of each case, if the network has learned from such
    -> "pictures" or "nifti", {name: path}, of pictures in several folders the paths of a case.
    Notes tell what is not read, or looks like a mask.
    """
    if channels:
        return "pictures", find_channels(path, channels)
    if not path.is_dir():
        match = nifti.NAME.fullmatch(path.name)
        kind, name = ("nifti", match[1]) if match else ("pictures", path.stem)
        paths = {plain_name(name): path}
    else:
        kind, paths = find_in(path)
    note_masks(paths)
    return kind, paths


def find_channels(path, folders):
    """The pictures of a folder that holds one for each channel. -> {name: [path, ...]}"""
    there = [path / folder for folder in folders]
    if lost := [folder for folder in there if not folder.is_dir()]:
        raise InputError(
            f"{lost[0]}: no such folder, but the network has learned from pictures in the folders "
            f"{', '.join(folders)}, one for each channel; give the folder that holds these"
        )
    images.say_unread(there)
    files = images.of_channels([path], folders)
    if not files:
        raise InputError(f"{there[0]}: no picture is in it; give a folder of images")
    return {plain_name(first.stem): paths for first, paths in files.items()}


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
    said = prepared = data.get("prepared")
    names = h5.names_of(data)
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or len(names) != data["channels"]:
        raise not_understood(names, source)
    kind, paths = find(Path(source), folders_of(said, names, source))
    if prepared is None or isinstance(prepared, dict) and prepared.get("from") == "ssl4mis":
        prepared, said = assumed(kind, source, data), None
    how = preparation(prepared, names, source)
    learned = prepared["from"]
    if learned == kind and (data["dims"] == 3 or said is None and names == h5.RGB):
        learned = "nifti" if data["dims"] == 3 else "pictures"
    if learned != kind:
        raise InputError(
            f"{source}: holds {KINDS[kind]}, but the network has learned from {KINDS[learned]}; "
            "give images of that kind"
        )
    notes = defaultdict(list)
    cases = pictures(paths, names, notes) if kind == "pictures" else volumes(paths, how, notes)
    try:
        info = h5.write(
            out,
            noted(cases, names, constant := []),
            name=Path(source).resolve().name,
            classes=data["classes"],
            dims=data["dims"],
            channels=data["channels"],
            channel_names=names,
            standardize=data.get("standardize", True),
            prepared=said,
        )
    except DiskFull:
        raise
    except InputError as error:  # in words that fit images which nobody had to convert
        text = re.sub("(,? and|;) convert the data again", "", str(error))
        raise InputError(text.replace(str(out), str(source))) from None
    if kind == "pictures":
        pixels.say(notes)
    else:
        nifti.say(notes, how.axes, info)
    if constant:
        print(f"note: {len(constant)} images have one value everywhere, such as {constant[0]}")
    return info


def folders_of(prepared, names, source):
    """The folders of data.images --channels, as a checkpoint says them; [] for none.

    InputError unless they are the channels' names.
    """
    folders = prepared.get("folders") if isinstance(prepared, dict) else None
    if folders is None:
        return []
    if folders != names or len(names) < 2 or any(Path(n).name != n or n == ".." for n in names):
        raise not_understood(prepared, source)
    return folders


def assumed(kind, source, data):
    """What `prepared` is taken for, with a note, where a checkpoint does not say it."""
    if not data.get("standardize", True):
        raise InputError(
            f"{source}: the network has learned from data that were brought to a window of "
            "intensities, and its checkpoint does not say which; convert the data again, and "
            "train on them"
        )
    names = h5.names_of(data)
    manner = "gray" if len(names) == 1 else "RGB" if names == h5.RGB else "channel by channel"
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
    several = {"names": names} if kind == "nifti" and len(names) > 1 else {}
    return {"from": kind} | several


def noted(cases, names, constant):
    """Yields cases, and appends to `constant` what has one value: a case, or a channel of it.

    names: of the channels
    """
    for case in cases:
        each = zip(names, h5.channels_first(case.image, len(names)))
        flat = [name for name, channel in each if h5.is_flat(channel)]
        if h5.is_flat(case.image):
            constant.append(case.name)
        elif names != h5.RGB:
            constant.extend(f"{name} of {case.name}" for name in flat)
        yield case


def pictures(paths, channel_names, notes):
    """Yields each of some pictures as an h5.Case, on its own grid.

    paths: {name: path, or a path for each channel}; notes: see pixels.note()
    """
    count = len(channel_names)
    for name, found in paths.items():
        several = isinstance(found, list)
        found = found if several else [found]
        h5.check_name(found[0], name)
        colors = "gray" if count == 1 else "RGB" if channel_names == h5.RGB else None
        if colors is None and not several and (there := pixels.channels_in(found[0])) != count:
            there = f"has {there} channels" if there else "is gray or RGB"
            raise InputError(
                f"{found[0]}: {there}, but the network has learned from {count} channels "
                f"({', '.join(channel_names)}); give a TIFF of these"
            )
        image = images.read_image(found, None if several else colors, notes)
        folder = found[0].parent.parent if several else found[0].parent
        yield Row(name, found[0], None, name, "unlabeled").case(folder, image, None)


def not_understood(prepared, source):
    return InputError(
        f"{source}: the checkpoint says of its data what cannot be understood "
        f"({ascii(prepared)[:100]}); convert the data again, and train on them"
    )


def preparation(prepared, channel_names, source):
    """nifti.Preparation of what a checkpoint, which may come from anybody, says of it.

    channel_names: of its data. InputError if that is none.
    """

    def numbers(value, n, low, high):  # no NaN, no bool
        fits = isinstance(value, (list, tuple)) and len(value) == n
        return fits and all(type(v) in (int, float) and low < v < high for v in value)

    def is_window(value):
        return value is None or numbers(value, 2, -1e9, 1e9) and value[0] < value[1]

    several = channel_names if len(channel_names) > 1 else None
    try:
        about = {k: v for k, v in prepared.items() if k not in ("from", "folders")}
        how = nifti.Preparation(**about)
        spacing, channel, windows = how.spacing, how.channel, how.windows
        fits = how.names == several and len(windows) == len(channel_names)
        known = (
            prepared["from"] in KINDS
            and (spacing is None or numbers(spacing, 3, 1e-5, 1000))
            and (how.axes is None or space.are_axes(how.axes))
            and (fits or prepared["from"] == "pictures")
            and (channel is None or are_channels(channel, several))
            and all(map(is_window, windows))
            and type(how.nnunet) is bool
        )
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        raise not_understood(prepared, source)
    return how


def are_channels(value, several):
    """Whether a value of anybody is what Preparation.channel holds for some names, or for one."""
    found = value if several and isinstance(value, list) else [value]
    usable = all(type(n) is int and 0 <= n < 10_000 for n in found)
    return usable and len(set(found)) == len(found) == len(several or found)


def note_channels(names):
    """A note where files, taken for cases, are named like nnU-Net's channels of one case."""
    stems = [name[:-5] for name in names if re.search(r"_\d{4}$", name)]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        print(
            f"note: {twice}_0000 and so on are taken for cases of their own, since the network has "
            "learned from one channel; if they are channels of one case, give that channel alone"
        )


def volumes(paths, how, notes):
    """Yields each of some NIfTI volumes as an h5.Case, as nifti.Preparation says.

    notes: what nifti.read_case() is to fill. InputError for a case that lacks a channel, or has one
    too many.
    """
    if how.names:  # the files of new data may be of the other kind
        first = next(iter(paths.values()))
        how = replace(how, nnunet=nifti.volumes_in(first) == 1)
        if how.nnunet and not any(re.search(r"_\d{4}$", name) for name in paths):
            raise InputError(
                f"{first}: holds one volume, but the network has learned from {len(how.names)} "
                f"channels ({', '.join(how.names)}); give NAME_0000, NAME_0001 and so on, or 4D"
            )
    if not how.nnunet and not how.names:
        note_channels(paths)
    cases = nifti.by_channel(paths, how.nnunet)
    files = nifti.taken(cases, how.numbers if how.nnunet else [None])
    if how.names and how.channel is None:
        for name, found in cases.items():
            count = len(found) if how.nnunet else nifti.volumes_in(found[None])
            if count > len(how.names):
                raise InputError(
                    f"{next(iter(found.values()))}: case '{name}' has {count} channels, but the "
                    f"network has learned from {len(how.names)} ({', '.join(how.names)}); take the "
                    "others out"
                )
    if further := len(paths) - sum(map(len, files.values())):
        print(
            f"note: {further} of {len(paths)} files are of other channels than the network has "
            "learned from, by their names (NAME_0001), and are not read; rename those that are "
            "cases of their own"
        )
    if how.axes is None:
        print(
            "note: the checkpoint does not know along which body axes its volumes lay; these are "
            "taken as they are, so they should be stored alike"
        )
    for name, found in files.items():
        row = Row(name, found[0], None, name, "unlabeled")
        yield nifti.read_case(row, found, how, found[0].parent, notes)
