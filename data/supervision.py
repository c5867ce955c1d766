"""Which train cases have labels that may be read, and which classes the labels of a split hold."""

import numpy as np

from data import h5
from data.files import InputError
from data.labels import without


def choose_labeled(info, spec, seed=None):
    """Names of the train cases whose labels may be read, and of all others.

    spec: "7" takes the first 7 patients that have labels, "0.1" that fraction of them, "all" every
    one. seed: draws the patients at random instead of taking the first ones. InputError for a spec
    that is none of these, or that no number of patients fits.
    """
    train = info.entries("train")
    patients = list(dict.fromkeys(entry.patient for entry in train if entry.labeled))
    if not patients:
        raise InputError(
            f"{info.path}: no train case has a label; convert the data again with labels of some"
        )
    try:
        n = len(patients)
        if spec != "all":
            n = round(float(spec) * n) if "." in spec else int(spec)
    except (ValueError, OverflowError):
        n = 0
    if not 1 <= n <= len(patients):
        raise InputError(
            f"--labeled {spec}: {info.path} has {len(patients)} labeled train patients; give a "
            "number of these from 1 on, a fraction such as 0.1 that is one or more, or all"
        )
    if seed is not None:
        patients = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    chosen = set(patients[:n])
    labeled = [entry.name for entry in train if entry.labeled and entry.patient in chosen]
    known = set(labeled)
    return labeled, [entry.name for entry in train if entry.name not in known]


def check_foreground(info, names):
    """InputError if the labels of some train cases are background and nothing else.

    A note names the classes that these lack, though val holds them.
    """
    learned = _found_classes(info, "train", names)
    if not learned.any():
        raise InputError(
            f"{info.path}: /train: the labels of all {len(names)} labeled cases are empty "
            "(background alone), and nothing can be learned from them; give other or more patients "
            "(--labeled, --labeled-seed), or convert the data again"
        )
    if not learned.all() and (lost := ~learned & _found_classes(info, "val")).any():
        lost = [name for name, is_lost in zip(info.classes[1:], lost) if is_lost]
        print(
            f"note: {without(lost, 'the labeled cases')}, but val does: nothing can learn it, and "
            "scores count it"
        )


def held_classes(info, split, names=None, source=False):
    """Whether the labels of a split hold each class of the foreground. -> [K-1] bool

    names: those of the cases that count (default: all); source: those labels count that are on the
    grids of sources, where cases were resampled.
    Stops reading labels once every class is found. InputError if there is no class at all.
    """
    info.entries(split)  # which refuses an empty split
    held = _found_classes(info, split, names, source)
    if not held.any():
        raise InputError(
            f"{info.path}: /{split}: its labels hold no class but the background, so "
            "nothing can be scored; take another split, or convert the data again"
        )
    return held


def _found_classes(info, split, names=None, source=False):
    """Which classes of the foreground the labels of a split hold, none perhaps. -> [K-1] bool"""
    held = np.zeros(len(info.classes) - 1, bool)
    names = None if names is None else set(names)
    with h5.open_file(info.path) as f:
        for entry in info.splits.get(split, ()):
            if held.all():
                break
            if entry.labeled and (names is None or entry.name in names):
                if source and entry.source_grid:
                    label = h5.read_source_label(info, split, entry)
                else:
                    label = h5.read_label(f, info, split, entry.name)
                for k in np.flatnonzero(~held):
                    held[k] = (label == k + 1).any()
    return held
