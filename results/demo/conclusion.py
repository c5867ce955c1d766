"""Says in plain words what a table of evaluate.py shows: the last lines of `make demo`.

    python -m results.demo.conclusion runs/demo/table --new runs/demo/new
    python -m results.demo.conclusion runs/demo/table runs/demo-seed1/table ...   # a row each

Reads TABLE/cases.csv (made without --regions), and TABLE/quality.json where evaluate.py was given
--qp. Four runs have a part: supervised training with few labels and with all, a method without
guidance, and the same method with guidance. What is missing is named. --new adds how many of the
archive's foreign patients are among the first of NEW/worst_first.csv.
"""

import csv
import json
import os
from typing import NamedTuple

import numpy as np

from data.files import InputError
from data.metrics import TOGETHER, paired
from data.options import Parser, cli
from data.tables import markdown

FEW, PLAIN, GUIDED, FULL = "supervised", "a method", "the method guided", "all labels"


def read(folder):
    """What evaluate.py wrote. -> rows of cases.csv, dicts of text; rows of the estimates, or []"""
    try:
        with open(os.path.join(folder, "cases.csv"), encoding="utf-8", newline="") as f:
            scores = list(csv.DictReader(f))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; is it the --out of evaluate.py?") from None
    path = os.path.join(folder, "quality.json")
    if not os.path.exists(path):
        return scores, []
    with open(path, encoding="utf-8") as f:
        return scores, json.load(f)["levels"].get("present", [])


def part_of(run, labeled):
    """Which part a row of the table has in the story. "fixmatch + QW", "2" -> GUIDED"""
    method, _, guidance = run.partition(" + ")
    if guidance:
        return GUIDED
    if method != "supervised":
        return PLAIN
    return FULL if labeled == "all" else FEW


def dice_of(scores):
    """-> {part: its name in the text}, {part: {(case, patient): Dice %, mean over classes}}"""
    names, values = {}, {}
    for row in scores:
        part = part_of(row["run"], row["labeled"])
        if names.setdefault(part, row["run"]) != row["run"]:
            raise InputError(f"{names[part]} and {row['run']}: the story has room for one of them")
        case = row["case"], row["patient"]
        values.setdefault(part, {}).setdefault(case, []).append(100 * float(row["dice"]))
    return names, {
        part: {case: np.mean(dice) for case, dice in sorted(cases.items())}
        for part, cases in values.items()
    }


def gain(dice, part, base):
    """'+9.5 [6.1, 12.9]' of a part over another, and the interval: over patients, 95%, or None"""
    patients = [patient for _, patient in dice[part]]
    found = paired(list(dice[part].values()), list(dice[base].values()), patients)
    if found.interval is None:
        return f"{found.mean:+.1f}", None
    low, high = found.interval
    return f"{found.mean:+.1f} [{low:.1f}, {high:.1f}]", found.interval


def verdict(interval):
    """What an interval of a gain says, as the end of a sentence."""
    if interval is None:
        return ", of one patient"
    if interval[0] > 0:
        return ""
    return ": a loss" if interval[1] < 0 else ": no gain that can be told from chance"


def conclusion(scores, estimates):
    """Lines of text. scores, estimates: of read()"""
    names, dice = dice_of(scores)
    parts = [part for part in (FEW, PLAIN, GUIDED, FULL) if part in dice]
    shown = {FEW: FEW, PLAIN: names.get(PLAIN), GUIDED: names.get(GUIDED), FULL: FULL}
    means = [f"{shown[part]} {np.mean(list(dice[part].values())):.1f}" for part in parts]
    lines = [f"Dice of unseen patients, %: {', '.join(means)}."]
    if {FEW, PLAIN} <= dice.keys():
        text, interval = gain(dice, PLAIN, FEW)
        lines.append(f"Unlabeled images: {text} over the same labels alone{verdict(interval)}.")
    if {PLAIN, GUIDED} <= dice.keys():
        text, interval = gain(dice, GUIDED, PLAIN)
        lines.append(f"Guidance: {text} over the same method without it{verdict(interval)}.")
    lines += judgment(estimates)
    missing = [part for part in (FEW, PLAIN, GUIDED, FULL) if part not in dice]
    if missing:
        lines.append(f"The table has no run of: {', '.join(missing)}.")
    return lines


class Correlations(NamedTuple):
    """Pearson r of estimates of quality with the truth."""

    g: float
    both: float | None  # of g and f together, which older tables have not
    best: float  # without g
    name: str  # of the best one


def correlations(estimates):
    """-> Correlations, or None. estimates: of read()"""
    r = {row["estimate"]: row["Pearson"] for row in estimates if row["run"] == "mean of all"}
    r = {name: value for name, value in r.items() if value is not None}
    mine = r.pop("g", None)
    both = r.pop(TOGETHER, None)
    if mine is None or not r:
        return None
    best = max(r, key=r.get)
    return Correlations(mine, both, r[best], best)


def judgment(estimates):
    """Whether g tells good masks from bad ones, as lines of text. estimates: of read()"""
    r = correlations(estimates)
    if r is None:
        return []
    words = "tells good masks from bad ones" if r.g >= r.best else "trails a simpler estimate"
    both = "" if r.both is None else f", together with f {r.both:.2f}"
    return [f"g {words}: r = {r.g:.2f}{both}; the best without g: r = {r.best:.2f} ({r.name})."]


def found_first(folder):
    """What the order of NEW/worst_first.csv says of a phantom's foreign patients, as a line."""
    with open(os.path.join(folder, "worst_first.csv"), encoding="utf-8", newline="") as f:
        foreign = ["foreign" in row["source"] for row in csv.DictReader(f)]
    count = sum(foreign)
    first = sum(foreign[:count])
    text = f"New images: {count} of {len(foreign)} patients are foreign"
    return f"{text}; {first} of these are among the first {count} of the list, worst first."


def row_of(folder):
    """A row of the table of several demos."""
    scores, estimates = read(folder)
    names, dice = dice_of(scores)
    row = {"table": folder}
    for part in (FEW, PLAIN, GUIDED, FULL):
        if part in dice:
            name = FULL if part == FULL else names[part]
            row[name] = [float(np.mean(list(dice[part].values())))]
    found = correlations(estimates)
    if found:
        row["r of g"] = [found.g]
        if found.both is not None:
            row["together with f"] = [found.both]
        row["best r without g"] = [found.best]
    return row


def table(folders):
    """The Markdown table of several demos, and of their mean and deviation."""
    rows = [row_of(folder) for folder in folders]
    for folder, row in zip(folders, rows):
        if row.keys() != rows[0].keys():
            raise InputError(f"{folder}: has not the runs of {folders[0]}")
    mean = {"table": "mean ± deviation"}
    for name in list(rows[0])[1:]:
        mean[name] = [value for row in rows for value in row[name]]
    return markdown([*rows, mean])


def main(argv=None):
    p = Parser(__doc__, prog="python -m results.demo.conclusion")
    p.add_argument("tables", nargs="+", metavar="TABLE", help="the --out of evaluate.py")
    p.add_argument("--new", help="what evaluate.py --predict --qp wrote of the archive")
    args = p.parse_args(argv)
    if len(args.tables) == 1:
        print("\n".join(conclusion(*read(args.tables[0]))))
        if args.new:
            print(found_first(args.new))
    else:
        if args.new:
            p.error("--new is for one table")
        print(table(args.tables))


if __name__ == "__main__":
    cli(main)
