"""Collects what evaluate.py --qp found on several data sets into one table and one figure.

    python results/quality_figure.py --out results/quality.png "PH2, 14=runs/q/ph2_14" "CVC, 20%=runs/q/cvc_0.2" ...

Reads FOLDER/table_dense/quality.json, and FOLDER/table_scalar/quality.json where it is there. Prints, of each slice and class that is
present, Pearson r / MAE after the monotone calibration: the mean over early, middle and late f and their seeds (drawn, too), and all pooled.
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from data import figures  # noqa: E402
from data.files import Parser, cli  # noqa: E402


def read(path, run):
    """-> {estimate: its row}"""
    with open(path, encoding="utf-8") as f:
        return {r["estimate"]: r for r in json.load(f)["levels"]["present"] if r["run"] == run}


def main():
    p = Parser(__doc__, prog="quality_figure.py")
    p.add_argument("folders", nargs="+", metavar="TITLE=FOLDER", help="data sets")
    p.add_argument("--out", required=True, help="picture to draw")
    args = p.parse_args()
    for run in ("pooled", "mean of all"):
        found = {}
        for title, folder in (text.rsplit("=", 1) for text in args.folders):
            rows, scalar = read(os.path.join(folder, "table_dense", "quality.json"), run), os.path.join(folder, "table_scalar", "quality.json")
            found[title] = {"g, dense": rows.pop("g")} | ({"g, scalar": read(scalar, run)["g"]} if os.path.exists(scalar) else {}) | rows
        names = list(dict.fromkeys(name for rows in found.values() for name in rows))
        names.sort(key=lambda name: not name.startswith("g,"))
        show = lambda row: "-" if row is None else f"{row['Pearson'] or 0:.3f} / {row['MAE calibrated']:.3f}"
        print(f"{run}\n\n| estimate | " + " | ".join(found) + " |\n|" + "---|" * (1 + len(found)))
        for name in names:
            print(f"| {name} | " + " | ".join(show(rows.get(name)) for rows in found.values()) + " |")
        print()

    figures.estimates(args.out, [{"run": title, "estimate": name, **{k: row[k] for k in ("Pearson", "MAE calibrated")}}
                                       for name in names for title, rows in found.items() if (row := rows.get(name))])


if __name__ == "__main__":
    cli(main)
