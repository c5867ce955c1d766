"""Label values of any source -> class numbers 0, 1, 2, ..., or an error that names the values."""
import numpy as np

from data.files import InputError

NEARLY = 1e-3  # how far from a whole number a value may lie: formats with a slope store .9999 for 1


def class_numbers(values, where):
    """Values of a label, of any numeric type and shape -> the same as uint8.

    where: the file, for errors. InputError unless all are whole numbers from 0 to 255.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{where}: a label of type {values.dtype}; numbers are needed")
    whole = np.round(values) if values.dtype.kind == "f" else values
    with np.errstate(invalid="ignore"):
        wrong = ~((whole >= 0) & (whole <= 255))  # also NaN
        if values.dtype.kind == "f":
            wrong |= ~(np.abs(values - whole) <= NEARLY)
    if wrong.any():
        raise InputError(f"{where}: label value {values[wrong][0]:.9g}; class numbers, whole "
                         "and from 0 to 255, are needed")
    return whole.astype(np.uint8)
