"""Collects who finds the bad masks, on several data sets, into one table and one figure.

    python results/triage_figure.py --out results/triage.png "PH2, val=runs/q/ph2_14/triage_val" "CVC, val=runs/q/cvc_0.2/triage_val" ...

Reads FOLDER/quality.json of evaluate.py --qp. Prints, for each estimate, the share of the bad cases among the 20% of the lowest estimates, and the area under
the curve.
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
from data import figures  # noqa: E402
from data.files import Parser, cli, picture  # noqa: E402


def main():
    p = Parser(__doc__, prog="triage_figure.py")
    p.add_argument("tables", nargs="+", metavar="TITLE=FOLDER", help="what evaluate.py --qp wrote")
    p.add_argument("--out", type=picture, required=True, metavar="FILE.png", help="the figure")
    args = p.parse_args()
    found = {}
    for title, folder in (text.rsplit("=", 1) for text in args.tables):
        with open(os.path.join(folder, "quality.json"), encoding="utf-8") as f:
            found[title] = json.load(f)["triage"]
    names = [row["estimate"] for row in next(iter(found.values()))["rows"]]
    cell = lambda row: f"{row['found']:.2f} / {row['area under curve']:.2f}"
    rows = [{"estimate": name} | {title: cell(next(r for r in t["rows"] if r["estimate"] == name)) for title, t in found.items()} for name in names]
    rows.append({"estimate": "cases, bad ones (mean over runs), runs"} | {
        title: f"{t['rows'][0]['cases']}, {t['rows'][0]['bad']:.1f}, {t['rows'][0]['runs']}" for title, t in found.items()})
    print(evaluate.markdown(rows))
    figures.triage(args.out, {title: t["curves"] for title, t in found.items()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
