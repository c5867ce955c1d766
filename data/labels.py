"""Label values of any source -> class numbers 0, 1, 2, ..., or an error that names the values."""

import argparse

import numpy as np

from data.files import InputError

ROUNDING = 1e-3  # of a value that is meant as whole: formats with a slope store .9999 for 1
MOST = 256  # classes that a label of uint8 can tell apart


def class_numbers(label, where, values=range(MOST)):
    """A label of any numeric type and shape -> class numbers as uint8.

    values: those that stand for the classes 0, 1, 2, ...; where: the file, for errors.
    InputError for a number that is not whole, or not one of these.
    """
    label = np.asarray(label)
    if label.dtype.kind not in "biuf":
        raise InputError(f"{where}: a label of type {label.dtype}; numbers are needed")
    whole = np.round(label) if label.dtype.kind == "f" else label
    if list(values) == list(range(len(values))):
        numbers, right = whole, (whole >= 0) & (whole < len(values))
    else:
        numbers, right = np.zeros(whole.shape, np.uint8), np.zeros(whole.shape, bool)
        for k, value in enumerate(values):
            numbers[whole == value] = k
            right |= whole == value
    right &= are_whole(label)
    if not right.all():
        raise InputError(
            f"{where}: label value {label[~right][0]:.9g} stands for no class; "
            f"{in_words(values)} do; mend the label, or say with --labels and --classes "
            "which values there are and what they mean"
        )
    return numbers.astype(np.uint8)


def are_whole(label):
    """Where an array holds whole numbers, but for rounding. NaN and infinity are none."""
    if label.dtype.kind != "f":
        return np.ones(label.shape, bool)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return np.abs(label - np.round(label)) <= ROUNDING


def in_words(values):
    """Some whole numbers in words: "0 to 3", or each of them, or, of many, some of them."""
    values = [int(v) for v in values]
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    if len(values) > 12:
        return f"{in_words(values[:6])}, ... {values[-1]} ({len(values)} values)"
    return ", ".join(map(str, values))


def count_classes(files, where):
    """How many classes there are, if the values in labels are their numbers.

    files: {label's path: the values that it holds}. InputError if all values together have a gap
    (a class that no label holds is none), or if none is above 0.
    """
    found = sorted({0}.union(*files.values()))
    check_not_empty(found, where)
    if found == list(range(len(found))):
        note_lone(files, found)
        return len(found)
    text = f"{where}: the labels hold {in_words(found)}, not each number from 0 on; "
    others = {max(held): path for path, held in files.items() if set(held) != {0}}
    if len(others) > 1 and all(set(held) <= {0, max(held)} for held in files.values()):
        (a, first), (b, second) = sorted(others.items())[:2]
        text += (
            f"{first.name} holds {a} and {second.name} {b}: if both mean one class, write it alike "
            "in all files; if not, "
        )
    values = ",".join(map(str, found)) if len(found) < 13 else "and their values"
    raise InputError(
        f"{text}give --labels {values} if these are all classes, background first, or name "
        "every class with --classes"
    )


def note_lone(files, found):
    """A note where one of several classes occurs in one file alone, which may number them its way.

    files: of count_classes(); found: all values
    """
    holders = {k: [path for path, held in files.items() if k in held] for k in found[1:]}
    lone = [(k, paths[0]) for k, paths in holders.items() if len(paths) == 1]
    if lone and len(found) > 2 and len(files) > 1:
        print(
            f"note: {lone[0][1]} alone holds label value {lone[0][0]} of {in_words(found)}; if it "
            "means a class of the other files, write it alike in all files"
        )


def check_not_empty(found, where):
    """InputError if the values found in all labels are those of the background alone."""
    if set(found) == {0}:
        raise InputError(
            f"{where}: all labels are 0, the background, so there is nothing to "
            "learn; replace them by labels of something"
        )


def without(classes, split):
    """What to say of classes that no label of a split holds. -> a sentence"""
    names = ", ".join(f"'{name}'" for name in classes[:6])
    more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    return f"no label of {split} holds {names}{more}"


# ------------------------------------------------------------------------------------ options


def add_options(p):
    """The options of converters that name the classes and the values that stand for them."""
    p.add_argument(
        "--classes",
        type=class_names,
        metavar="NAMES",
        help="names of the classes, background first; default: as the data or the layout say",
    )
    p.add_argument(
        "--labels",
        type=label_values,
        metavar="VALUES",
        help="the labels' values that stand for the classes, background first, as in 0,1,2,4",
    )


def check_options(args):
    """InputError unless there is one name for each label value, where both are given."""
    values, classes = args.labels, args.classes
    if values and classes and len(values) != len(classes):
        raise InputError(
            f"--labels names {len(values)} values, --classes {len(classes)} classes; "
            "give one name for each value"
        )


def label_values(text):
    """argparse type: label values, background first. -> a tuple of different whole numbers"""
    try:
        values = tuple(map(int, text.split(",")))
    except ValueError:
        values = ()
    if not 2 <= len(set(values)) == len(values) <= MOST:
        raise argparse.ArgumentTypeError(
            f"{text}: 2 to {MOST} different whole numbers, joined by "
            "commas, are needed, as in 0,1,2,4"
        )
    return values


def class_names(text):
    """argparse type: two names of classes or more, background first. -> a list"""
    names = [name.strip() for name in text.split(",")]
    if wrong := not_background_first(names):
        others = ",".join(name for name in names if not is_background(name))
        raise argparse.ArgumentTypeError(f"{text}: {wrong}; write background,{others or 'thing'}")
    if not 2 <= len(names) == len(set(names)) or not all(names):
        raise argparse.ArgumentTypeError(
            f"{text}: two different names or more, joined by commas, are needed, as in "
            "background,polyp"
        )
    return names


def regions_of(text, classes):
    """Named unions of classes, as in "whole=1,2;core=edema". -> {name: numbers of its classes}

    classes [K]: names. InputError for any other text, and for a name that is taken.
    """
    numbers = {str(k): k for k in range(len(classes))}
    numbers |= {name: k for k, name in enumerate(classes)}  # which go before numbers
    found = {}
    for part in text.split(";"):
        name, *members = map(str.strip, part.split("="))
        if not name or not name.isprintable() or len(members) != 1:
            raise InputError(
                f"--regions: '{part}' is not NAME=CLASSES; write it as in whole=1,2,3;core=1,3"
            )
        if name in found or name in classes:
            raise InputError(f"--regions: '{name}' is a class or comes twice; choose another name")
        members = [member.strip() for member in members[0].split(",")]
        if wrong := [member for member in members if not numbers.get(member)]:
            raise InputError(
                f"--regions: '{wrong[0]}' in '{name}' is no class of the foreground; these are "
                f"{in_words(range(1, len(classes)))}, or their names, which python -m data.h5 lists"
            )
        found[name] = [numbers[member] for member in members]
    return found


def is_background(name):
    """Whether a name is one that people give to the background."""
    return name.lower() in ("background", "bg", "back", "none")


def not_background_first(names):
    """What is wrong with the order of classes whose first must be the background, or None."""
    if not is_background(names[0]):
        return f"the first class is {names[0] or 'not named'}, but class 0 must be the background"
    if any(map(is_background, names[1:])):
        return "the background comes twice"
    return None


def numbered(count):
    """Names of classes that nobody has named."""
    return ["background", *(f"class {k}" for k in range(1, count))]


def tell_mapping(values):
    """Says which class each label value becomes, unless it is its own number."""
    if values and list(values) != list(range(len(values))):
        pairs = ", ".join(f"{value} becomes {k}" for k, value in enumerate(values))
        print(f"label values: {pairs}; predicted masks hold the numbers of classes")
