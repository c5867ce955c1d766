"""Collects who finds the bad masks, on several data sets, into one table and one figure.

    python -m results.triage.figure --out results/triage/triage.png \\
        "PH2, test=runs/triage/ph2_test/table_dense" "PH2, held out=..." ...

Reads FOLDER/quality.json of evaluate.py --qp. Prints, for each estimate, the share of the bad cases
among the 20% of the lowest estimates, and the area under the curve.
"""

from data import figures, tables
from data.files import InputError
from data.options import Parser, cli, picture
from results.quality.figure import read, titled


def table(found):
    """A Markdown table, a line for each estimate. found: {title: triage of quality.json}"""
    names = [row["estimate"] for row in next(iter(found.values()))["rows"]]
    rows = [{"estimate": name} for name in names]
    counts = {"estimate": "cases, bad ones (mean over runs), runs"}
    for title, triage in found.items():
        by_name = {row["estimate"]: row for row in triage["rows"]}
        for row in rows:
            mine = by_name[row["estimate"]]
            row[title] = f"{mine['found']:.2f} / {mine['area under curve']:.2f}"
        first = triage["rows"][0]
        counts[title] = f"{first['cases']}, {first['bad']:.1f}, {first['runs']}"
    return tables.markdown([*rows, counts])


def main():
    p = Parser(__doc__, prog="python -m results.triage.figure")
    p.add_argument("tables", nargs="+", metavar="TITLE=FOLDER", help="what evaluate.py --qp wrote")
    p.add_argument("--out", type=picture, required=True, metavar="FILE.png", help="the figure")
    args = p.parse_args()
    found = {}
    for title, folder in titled(args.tables).items():
        found[title] = read(folder)["triage"]
        if not found[title]["rows"]:
            raise InputError(f"{folder}: all cases are bad there, or none is, so nothing is ranked")
    print(table(found))
    figures.triage(args.out, {title: triage["curves"] for title, triage in found.items()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
