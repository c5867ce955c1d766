"""Tables: Markdown, CSV and text files."""

import csv

import numpy as np

from data.files import replacing


def show(value):
    """A table's cell: values over seeds become 'mean ± deviation' (n - 1), an interval 'low to high'."""
    if isinstance(value, tuple):
        return " to ".join(f"{v:.3f}" for v in value)
    if isinstance(value, list):
        return f"{np.mean(value):.2f}" + (
            f" ± {np.std(value, ddof=1):.2f}" if len(value) > 1 else ""
        )
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(rows):
    """A list of dicts with the same keys -> a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(show, row.values())) + " |" for row in rows])


def write_text(path, text):
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write(text)


def write_csv(path, rows):
    """A list of dicts with the same keys -> CSV."""
    with replacing(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
