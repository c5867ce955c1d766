"""Tables: Markdown, CSV and text files."""

import csv

import numpy as np

from data.files import replacing


def show(value):
    """A table's cell: values over seeds as 'mean ± deviation' (n - 1), an interval 'low to high'.

    Counts of one seed are integers, of several their mean has one decimal. None, a value that does
    not exist, is '-'.
    """
    if isinstance(value, tuple):
        return " to ".join(f"{v:.3f}" for v in value)
    if isinstance(value, list):
        counts = all(isinstance(v, int) for v in value)
        digits = 2 if not counts else 1 if len(value) > 1 else 0
        mean = f"{np.mean(value):.{digits}f}"
        return f"{mean} ± {np.std(value, ddof=1):.{digits}f}" if len(value) > 1 else mean
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def markdown(rows):
    """A list of dicts with the same keys -> a Markdown table."""
    cells = [rows[0].keys(), *(map(show, row.values()) for row in rows)]
    head, *lines = ([cell.replace("|", r"\|") for cell in line] for line in cells)
    rule = "|" + "---|" * len(head)
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return "\n".join([first, rule, *rest])


def write_text(path, text):
    """Writes a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write(text)


def write_csv(path, rows):
    """Writes a list of dicts with the same keys as CSV, whole or not at all."""
    with replacing(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
