"""Collects what evaluate.py --qp found on several data sets into one table and one figure.

    python results/quality_figure.py --out results/quality.png "PH2, 14=runs/q/ph2_14" "CVC, 20%=runs/q/cvc_0.2" ...

Reads FOLDER/table_dense/quality.json, and FOLDER/table_scalar/quality.json where it is there. Prints the table: Pearson r / MAE after the
monotone calibration, of each slice and class that is present, mean over early, middle and late f and their seeds.
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from data import h5  # noqa: E402
from data.files import Parser, cli  # noqa: E402


def read(path, level="present"):
    """-> {estimate: its row of the mean over all runs}"""
    with open(path, encoding="utf-8") as f:
        return {r["estimate"]: r for r in json.load(f)["levels"][level] if r["run"] == "mean of all"}


def main():
    p = Parser(__doc__, prog="quality_figure.py")
    p.add_argument("folders", nargs="+", metavar="TITLE=FOLDER", help="data sets")
    p.add_argument("--out", required=True, help="picture to draw")
    args = p.parse_args()
    found = {}
    for title, folder in (text.rsplit("=", 1) for text in args.folders):
        rows = read(os.path.join(folder, "table_dense", "quality.json"))
        found[title] = {"g, dense": rows.pop("g")} | rows
        scalar = os.path.join(folder, "table_scalar", "quality.json")
        if os.path.exists(scalar):
            found[title] = {"g, dense": found[title]["g, dense"], "g, scalar (the paper)": read(scalar)["g"]} | rows
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    names.sort(key=lambda name: (not name.startswith("g,"), name))
    show = lambda row: "-" if row is None else f"{row['Pearson'] or 0:.3f} / {row['MAE calibrated']:.3f}"
    print("| estimate | " + " | ".join(found) + " |\n|" + "---|" * (1 + len(found)))
    for name in names:
        print(f"| {name} | " + " | ".join(show(rows.get(name)) for rows in found.values()) + " |")

    plt = h5.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.36 * len(names)), sharey=True, layout="constrained")
    for axis, column, label in zip(axes, ("Pearson", "MAE calibrated"), ("Pearson r (right is better)", "MAE after calibration (left is better)")):
        for i, (title, rows) in enumerate(found.items()):
            shown = [(rows[name][column], y) for y, name in enumerate(names) if name in rows and rows[name][column] is not None]
            axis.scatter(*zip(*shown), s=36, color=h5.COLORS[i % len(h5.COLORS)], marker="osD^vP"[i % 6], label=title, zorder=3)
        axis.axhspan(-0.5, 0.5, color="0.93", zorder=0)
        axis.grid(axis="x", lw=0.4)
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found), fontsize=8, frameon=False)
    h5.save_figure(figure, args.out)


if __name__ == "__main__":
    cli(main)
