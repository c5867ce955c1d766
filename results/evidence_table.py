"""The tables and the figure of results/evidence.md, from the runs of evidence.py.

    python results/evidence_table.py ph2 cvc acdc --out results/evidence.png > results/evidence_tables.md

For every family and row, lambda is the one with the best Dice on val, mean over the seeds that all its lambdas have; then scores on test of best.pt (chosen on val), %:
Dice, mean and deviation over seeds, HD95, and the paired difference of Dice to the family's own row `none`, with a 95% interval from 10,000 bootstrap samples: seeds
and cases are drawn with replacement, the same for both rows.
"""
import collections
import csv
import glob
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from data.files import Parser, cli, picture  # noqa: E402
from results.evidence import DATA, FAMILIES, ROWS  # noqa: E402


def read(folder, start):
    """A finished run. -> (best Dice on val after its start, {checkpoint: {metric: [cases]}}, the cases' patients)"""
    with open(f"{folder}/log.csv", newline="") as f:
        val = max(float(row["val_dice"]) for row in csv.DictReader(f) if int(row["step"]) > start)
    scores = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(list)))
    patients = {}
    with open(f"{folder}/test/cases.csv", newline="") as f:
        for row in csv.DictReader(f):
            patients[row["case"]] = row["patient"]
            for metric in ("dice", "hd95"):
                scores[os.path.basename(row["checkpoint"])][metric][row["case"]].append(float(row[metric]))
    return val, {c: {m: np.array([np.mean(v) for v in cases.values()]) for m, cases in s.items()} for c, s in scores.items()}, list(patients.values())


def runs_of(data):
    """-> {(family, row): {lambda: {seed: read()}}}"""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in glob.glob(f"runs/v/{data}/*/test/cases.csv"):
        folder = os.path.dirname(os.path.dirname(path))
        family, row, lam, seed = os.path.basename(folder).rsplit("-", 3)
        found[family, row][float(lam)][int(seed)] = read(folder, DATA[data]["start"])
    return found


def chosen(by_lambda):
    """The lambda of the best mean Dice on val over the seeds that all lambdas have. -> lambda, {seed: read()}"""
    common = set.intersection(*(set(seeds) for seeds in by_lambda.values()))
    best = max(by_lambda, key=lambda lam: np.mean([by_lambda[lam][s][0] for s in common]))
    return best, by_lambda[best]


def interval(difference, groups, count=10_000):
    """95% bootstrap interval of the mean of difference [seeds, cases], seeds and groups of cases (a number each) drawn with replacement."""
    rng, (S, _) = np.random.default_rng(0), difference.shape
    sums = np.stack([[row[groups == g].sum() for g in np.unique(groups)] for row in difference])    # [seeds, groups]
    sizes = np.array([(groups == g).sum() for g in np.unique(groups)])
    means = []
    for _ in range(count):
        s, g = rng.integers(S, size=S), rng.integers(len(sizes), size=len(sizes))
        means.append(sums[s][:, g].sum() / (S * sizes[g].sum()))
    return np.percentile(means, [2.5, 97.5])


def compare(ours, base, checkpoint):
    """Paired difference of Dice in points over common seeds. -> mean, (low, high) over cases, (low, high) over patients"""
    seeds = sorted(set(ours) & set(base))
    difference = 100 * np.stack([ours[s][1][checkpoint]["dice"] - base[s][1][checkpoint]["dice"] for s in seeds])    # [seeds, cases]
    patients = np.unique(ours[seeds[0]][2], return_inverse=True)[1]
    return difference.mean(), interval(difference, np.arange(difference.shape[1])), interval(difference, patients)


def table(data, checkpoint):
    """Markdown rows of one data set, and what the figure shows of it."""
    runs, points = runs_of(data), []
    print(f"\n### {data}, {checkpoint}\n\n| family | guidance | lambda | seeds | Dice % | HD95 px | difference to its own baseline | by patient |\n|---|---|---|---|---|---|---|---|")
    for family in FAMILIES:
        base = chosen(runs[family, "none"])[1] if (family, "none") in runs else None
        for row in ROWS:
            if (family, row) not in runs:
                continue
            lam, seeds = chosen(runs[family, row])
            dice, hd95 = (np.array([s[1][checkpoint][m].mean() for s in seeds.values()]) for m in ("dice", "hd95"))
            cells = [family, row, f"{lam:g}", str(len(seeds)), f"{100 * dice.mean():.1f} ± {100 * dice.std(ddof=1) if len(dice) > 1 else 0:.1f}", f"{hd95.mean():.1f}"]
            if base and row != "none":
                mean, case, patient = compare(seeds, base, checkpoint)
                points.append((data, family, row, mean, *case))
                cells += [f"{mean:+.1f} [{case[0]:+.1f}, {case[1]:+.1f}]", f"[{patient[0]:+.1f}, {patient[1]:+.1f}]"]
            else:
                cells += ["", ""]
            print("| " + " | ".join(cells) + " |")
    return points


def main():
    p = Parser(__doc__, prog="evidence_table.py")
    p.add_argument("data", nargs="+", choices=DATA)
    p.add_argument("--out", type=picture, help="the figure")
    args = p.parse_args()
    points = [table(data, checkpoint) for data in args.data for checkpoint in ("best.pt", "last.pt")]


if __name__ == "__main__":
    cli(main)
