"""New images without labels, a folder of pictures or of NIfTI volumes or one of these files -> a dataset file that a trained network takes.

They are prepared as the data that the network has learned from were, which its checkpoint knows (`prepared`, see data/h5.py): gray or RGB, and of
volumes the spacing that they are resampled to, the window of CT, the channel. evaluate.py --predict writes masks for them.
"""
from pathlib import Path

import cv2

from data import h5, images, nifti
from data.files import InputError


def are_new(path):
    """Whether a path is a folder or file of images, and not a dataset."""
    path = Path(path)
    return path.is_dir() or path.is_file() and (path.suffix.lower() in images.PICTURES or nifti.NAME.fullmatch(path.name) is not None)


def find(path):
    """What a folder holds, directly or in a usual subfolder (images, imagesTs, imagesTr), or one file. -> "pictures" or "nifti", {name: path}"""
    if not path.is_dir():
        match = nifti.NAME.fullmatch(path.name)
        return ("nifti", {match[1]: path}) if match else ("pictures", {path.stem: path})
    for folder in (path, path / "images", path / "imagesTs", path / "imagesTr"):
        found = {kind: names for kind, names in (("pictures", images.pictures(folder)), ("nifti", nifti.volumes(folder))) if names}
        if len(found) > 1:
            raise InputError(f"{folder}: holds both pictures and NIfTI volumes; give a folder of one kind")
        if found:
            return *found.popitem(),
    raise InputError(f"{path}: no picture ({', '.join(sorted(images.PICTURES))}) and no .nii or .nii.gz is in it, nor in its images, imagesTs or imagesTr")


def convert(source, out, data):
    """Writes the images of a folder, or one, to a dataset file `out`, all in split `unlabeled`. data: what a checkpoint says of its data -> Info

    InputError if they cannot be what the network has learned from, or if one of them cannot be read.
    """
    kind, paths = find(Path(source))
    kinds = {"pictures": "pictures", "nifti": "NIfTI volumes"}
    prepared = data.get("prepared")
    if prepared is None:
        if not data.get("standardize", True):
            raise InputError(f"{source}: the network has learned from data that were brought to a window of intensities, and its checkpoint does not say which; "
                             "convert the data again, and train on them")
        print(f"note: the checkpoint does not say how its data were prepared; {kinds[kind]} are taken as they are, " + (
            "as MR, each at its own spacing" if kind == "nifti" else "gray" if data["channels"] == 1 else "RGB"))
        prepared = {"from": kind}
    if prepared.get("from") != kind:
        raise InputError(f"{source}: holds {kinds[kind]}, but the network has learned from {kinds.get(prepared.get('from'), 'another kind of images')}")
    if kind == "pictures" and data["dims"] == 3 or kind == "nifti" and data["channels"] == 3:
        raise InputError(f"{source}: holds {kinds[kind]}, but the network has learned from {'volumes' if data['dims'] == 3 else 'RGB pictures'}")
    cases = pictures(paths, data["channels"] == 1) if kind == "pictures" else volumes(paths, preparation(prepared, source))
    return h5.write(out, cases, name=Path(source).resolve().name, classes=data["classes"], dims=data["dims"], channels=data["channels"],
                    standardize=data.get("standardize", True), prepared=prepared)


def pictures(paths, gray):
    """Yields each of some pictures as an h5.Case, on its own grid."""
    for name, path in paths.items():
        image = images.read_picture(path, cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR_RGB)
        yield h5.Case("unlabeled", name, image, None, name, source=path.name)


def preparation(prepared, source):
    """nifti.Preparation of what a dataset or checkpoint, which may come from anybody, says of it. InputError if that is none."""
    numbers = lambda value, n: value is None or isinstance(value, (list, tuple)) and len(value) == n and all(isinstance(v, (int, float)) for v in value)
    how = {key: value for key, value in prepared.items() if key != "from"}
    if not (set(how) <= {"spacing", "window", "channel", "nnunet"} and numbers(how.get("spacing"), 3) and numbers(how.get("window"), 2)
            and isinstance(how.get("channel"), (int, type(None))) and all(s > 0 for s in how.get("spacing") or ())):
        raise InputError(f"{source}: the checkpoint says of its data what cannot be understood ({ascii(how)[:100]}); convert the data again, and train on them")
    return nifti.Preparation(**how)


def volumes(paths, how):
    """Yields each of some NIfTI volumes as an h5.Case, as nifti.Preparation says."""
    for name, path in nifti.one_channel(paths, how.channel, how.nnunet)[0].items():
        yield nifti.read_case((name, path, None, name, "unlabeled"), how, path.parent, set())
