"""Collects what evaluate.py --qp found on several data sets into one table and one figure.

    python -m results.quality.figure --out results/quality/quality.png "PH2, 14=runs/q/ph2_14" ...

Reads FOLDER/table_dense/quality.json, and FOLDER/table_scalar/quality.json where it is there.

Prints Pearson r / MAE after the monotone calibration, of each slice and class that is present: once
all outputs pooled, and once as the mean over early, middle and late f and their seeds. The figure
shows the mean.
"""

import json
import os

from data import figures
from data.options import Parser, cli, picture


def titled(texts):
    """["TITLE=FOLDER", ...] -> {title: folder}"""
    return dict(text.rsplit("=", 1) for text in texts)


def read(folder):
    """What evaluate.py --qp wrote."""
    with open(os.path.join(folder, "quality.json"), encoding="utf-8") as f:
        return json.load(f)


def estimates(folder, run):
    """-> {estimate: its row}, those of g first"""
    dense = read(os.path.join(folder, "table_dense"))
    rows = {row["estimate"]: row for row in dense["levels"]["present"] if row["run"] == run}
    found = {"g, dense": rows.pop("g")}
    scalar = os.path.join(folder, "table_scalar")
    if os.path.isdir(scalar):
        for row in read(scalar)["levels"]["present"]:
            if row["run"] == run and row["estimate"] == "g":
                found["g, scalar"] = row
    return found | rows


def names_of(found):
    """The names of all estimates, those of g first."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    return sorted(names, key=lambda name: not name.startswith("g,"))


def table(found):
    """A Markdown table, a line for each estimate. found: {title: {estimate: its row}}"""
    lines = ["| estimate | " + " | ".join(found) + " |", "|" + "---|" * (1 + len(found))]
    for name in names_of(found):
        cells = [cell(rows.get(name)) for rows in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row):
    if row is None:
        return "-"
    r = row["Pearson"] or 0
    return f"{r:.3f} / {row['MAE calibrated']:.3f}"


def points(found):
    """What the figure shows: a line for each estimate of each data set."""
    for name in names_of(found):
        for title, rows in found.items():
            if name in rows:
                scores = {key: rows[name][key] for key in ("Pearson", "MAE calibrated")}
                yield {"run": title, "estimate": name, **scores}


def main():
    p = Parser(__doc__, prog="python -m results.quality.figure")
    p.add_argument("folders", nargs="+", metavar="TITLE=FOLDER", help="data sets")
    p.add_argument("--out", type=picture, required=True, metavar="FILE.png", help="the figure")
    args = p.parse_args()
    for run in ("pooled", "mean of all"):
        found = {title: estimates(folder, run) for title, folder in titled(args.folders).items()}
        print(f"{run}\n\n{table(found)}\n")
    figures.estimates(args.out, list(points(found)))


if __name__ == "__main__":
    cli(main)
