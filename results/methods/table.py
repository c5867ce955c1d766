"""The tables of README.md, from the logs of run.sh.

    python -m results.methods.table 0 runs/m/cvc runs/m/acdc

A line for each method: mean foreground Dice on val (%), without and with QW, at the best of the
validations and at the last step, and the cost of a step once the unlabeled loss has set in,
relative to the supervised step of the same data set.
"""

import csv
import os
from dataclasses import dataclass

from data.files import InputError
from data.options import Parser, cli

METHODS = [
    "sup",
    "pl",
    "pl_t",
    "pl_c",
    "mt",
    "ua_mt",
    "ict",
    "cps",
    "cl",
    "fixmatch",
    "unimatch",
    "bcp",
]
STEPS = "600"


@dataclass
class Run:
    best: float  # Dice on val, %
    last: float
    milliseconds: float  # of a step


def read(path):
    """A run from its log; None where it is not there or was not finished."""
    if not os.path.exists(path):
        return None
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or rows[-1]["step"] != STEPS:
        return None
    dice = [100 * float(row["val_dice"]) for row in rows]
    return Run(max(dice), dice[-1], min(float(row["ms"]) for row in rows[-3:]))


def table(folder, seed):
    """A Markdown table of the runs in a folder."""
    run = lambda name: read(f"{folder}/{name}_{seed}/log.csv")
    supervised = run("sup")
    if not supervised:
        raise InputError(f"{folder}/sup_{seed}: no finished run, which the costs are relative to")
    pairs = {method: (run(method), run(f"{method}_qw")) for method in METHODS}
    pairs["sup + QAR"] = (run("sup_qar"), None)
    best = lambda run: f"{run.best:.1f}" if run else "-"
    last = lambda run: f"{run.last:.1f}" if run else "-"
    cost = lambda run: f"{run.milliseconds / supervised.milliseconds:.1f}" if run else "-"
    lines = [
        "| method | best | with QW | last | with QW | cost of a step | with QW |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, pair in pairs.items():
        if any(pair):
            cells = [show(run) for show in (best, last, cost) for run in pair]
            lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def main():
    p = Parser(__doc__, prog="python -m results.methods.table")
    p.add_argument("seed", type=int)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="runs of a data set")
    args = p.parse_args()
    for folder in args.folders:
        print(f"\n{folder}\n\n{table(folder, args.seed)}")


if __name__ == "__main__":
    cli(main)
