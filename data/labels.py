"""Label values of any source -> class numbers 0, 1, 2, ..., or an error that names the values."""

import argparse

import numpy as np

from data.files import InputError

NEARLY = 1e-3  # how far from a whole number a value may lie: formats with a slope store .9999 for 1
MOST = 256  # classes that a label of uint8 can tell apart


def class_numbers(values, where, listed=range(MOST)):
    """Values of a label, of any numeric type and shape -> class numbers as uint8.

    listed: the values that stand for the classes 0, 1, 2, ...; where: the file, for errors.
    InputError for a value that is not whole, or not listed.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{where}: a label of type {values.dtype}; numbers are needed")
    whole = np.round(values) if values.dtype.kind == "f" else values
    if list(listed) == list(range(len(listed))):
        numbers, right = whole, (whole >= 0) & (whole < len(listed))
    else:
        numbers, right = np.zeros(whole.shape, np.uint8), np.zeros(whole.shape, bool)
        for k, value in enumerate(listed):
            numbers[whole == value] = k
            right |= whole == value
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # infinity less infinity
            right &= np.abs(values - whole) <= NEARLY  # False also for NaN
    if not right.all():
        raise InputError(
            f"{where}: label value {values[~right][0]:.9g} stands for no class; "
            f"{said(listed)} do; mend the label, or say with --labels and --classes "
            "which values there are and what they mean"
        )
    return numbers.astype(np.uint8)


def said(values):
    """Some whole numbers in words: "0 to 3", or each of them, or, of many, some of them."""
    values = [int(v) for v in values]
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    if len(values) > 12:
        return f"{said(values[:6])}, ... {values[-1]} ({len(values)} values)"
    return ", ".join(map(str, values))


def count_classes(found, where):
    """How many classes there are, if values that were found in labels are their numbers.

    InputError if these have a gap: a class that no label holds is none.
    """
    found = sorted({0, *found})
    if found == [0]:
        raise InputError(
            f"{where}: all labels are 0, the background, so there is nothing to "
            "learn; replace them by labels of something"
        )
    if found != list(range(len(found))):
        listed = ",".join(map(str, found)) if len(found) < 13 else "and their values"
        remedy = f"give --labels {listed} if these are all classes, background first, or "
        raise InputError(
            f"{where}: the labels hold {said(found)}, not each number from 0 on; "
            f"{remedy}name every class with --classes"
        )
    return len(found)


# ------------------------------------------------------------------------------------ options


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
    """argparse type: names of classes, background first. -> a list"""
    return [name.strip() for name in text.split(",")]


def check_options(labels, classes):
    """InputError unless there is one name for each label value, where both are given."""
    if labels and classes and len(labels) != len(classes):
        raise InputError(
            f"--labels names {len(labels)} values, --classes {len(classes)} classes; "
            "give one name for each value"
        )


def numbered(count):
    """Names of classes that nobody has named."""
    return ["background", *(f"class {k}" for k in range(1, count))]


def tell_mapping(labels):
    """Says which class each label value becomes, unless it is its own number."""
    if labels and list(labels) != list(range(len(labels))):
        pairs = ", ".join(f"{value} becomes {k}" for k, value in enumerate(labels))
        print(f"label values: {pairs}; predicted masks hold the numbers of classes")
