"""Tables: Markdown, CSV and text files."""

import csv

import numpy as np

from data.files import replacing


def show(value):
    """A table's cell: values over seeds as 'mean ± deviation' (n - 1), an interval 'low to high'.

    None, a value that does not exist, is '-'.
    """
    if isinstance(value, tuple):
        return " to ".join(f"{v:.3f}" for v in value)
    if isinstance(value, list):
        mean = f"{np.mean(value):.2f}"
        return f"{mean} ± {np.std(value, ddof=1):.2f}" if len(value) > 1 else mean
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def markdown(rows):
    """A list of dicts with the same keys -> a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    lines += [f"| {' | '.join(map(show, row.values()))} |" for row in rows]
    return "\n".join(lines)


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
