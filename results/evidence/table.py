"""The tables and the figure of results/evidence.md.

    python results/evidence_table.py ph2 cvc acdc_3 --out results/evidence.png > results/evidence_tables.md    from results/evidence.json
    python results/evidence_table.py ph2 --add                                                  first adds the finished runs of evidence.py to it

results/evidence.json keeps, for each run, the best Dice on val and each test case's Dice and HD95 (mean over classes), so that a table needs no runs.
For every family and row, lambda is the one with the best Dice on val for seed 0, of those that were tried; then scores on test of best.pt (chosen on
val), %: Dice, mean and deviation over seeds, HD95, and the paired difference of Dice to the family's own row `none` over the seeds that both have, with a
95% interval from 10,000 bootstrap samples: seeds and cases (or patients) are drawn with replacement, the same for both rows. Of three seeds that is a
rough interval, too narrow where seeds differ more than cases do; of one seed it is one over cases alone. The figure has the intervals over patients.
"""
import collections
import csv
import glob
import itertools
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from data import figures  # noqa: E402
from data.files import InputError, Parser, checksum, cli, picture, replacing  # noqa: E402
from evidence import DATA, FAMILIES, ROWS, best_on_val  # noqa: E402

KEPT = os.path.join(os.path.dirname(__file__), "evidence.json")    # {data: {g: its CRC-32, patients: {case: patient}, runs: {FAMILY-ROW-LAM-SEED: ...}}}


def read(folder, start):
    """A finished run. -> (best Dice on val after its start, {checkpoint: {metric: [cases]}}, {case: patient})"""
    scores = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(list)))    # of each class of a case
    patients = {}
    with open(f"{folder}/test/cases.csv", newline="") as f:
        for row in csv.DictReader(f):
            patients[row["case"]] = row["patient"]
            for metric in ("dice", "hd95"):
                scores[os.path.basename(row["checkpoint"])][metric][row["case"]].append(float(row[metric]))
    means = {name: {metric: np.array([np.mean(v) for v in cases.values()]) for metric, cases in of.items()} for name, of in scores.items()}
    return best_on_val(f"{folder}/log.csv", start), means, patients


def kept():
    """What results/evidence.json holds."""
    if not os.path.isfile(KEPT):
        return {}
    with open(KEPT) as f:
        return json.load(f)


def add(data):
    """Adds the finished runs of a data set to what is kept, in the place of older ones of the same name; a line of the file for each run. Runs with another
    g, or other test cases, could not be compared with those that are there: InputError."""
    sets, g = kept(), f"runs/v/{data}/g/qp.pt"
    for path in sorted(glob.glob(f"runs/v/{data}/*/test/cases.csv")):
        folder = os.path.dirname(os.path.dirname(path))
        val, means, patients = read(folder, DATA[data]["start"])
        mine = sets.setdefault(data, dict(g=checksum(g), patients=patients, runs={}))
        if mine["g"] != checksum(g) or list(mine["patients"].items()) != list(patients.items()):
            raise InputError(f"{folder}: has another g or other test cases than the runs of {data} in {KEPT}; remove those")
        mine["runs"][os.path.basename(folder)] = {"val": val} | {
            checkpoint: {metric: np.round(v, 4).tolist() for metric, v in of.items()} for checkpoint, of in means.items()}
    lines = lambda runs: ",\n".join(f"  {json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs))
    if data not in sets:
        raise InputError(f"runs/v/{data}: no finished run of evidence.py, and none in {KEPT}")
    with replacing(KEPT) as temporary, open(temporary, "w") as f:
        f.write("{" + ",\n".join(f'{json.dumps(d)}: {{"g": {s["g"]}, "patients": {json.dumps(s["patients"])}, "runs": {{\n{lines(s["runs"])}\n}}}}'
                                 for d, s in sets.items()) + "}\n")


def runs_of(data):
    """-> {(family, row): {lambda: {seed: (val, {checkpoint: {metric: [cases]}}, patients)}}}"""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    mine = kept().get(data)
    if not mine:
        raise InputError(f"{KEPT}: holds no run of {data}; --add those of evidence.py")
    for name, run in mine["runs"].items():
        family, row, lam, seed = name.rsplit("-", 3)
        means = {checkpoint: {metric: np.array(v) for metric, v in of.items()} for checkpoint, of in run.items() if checkpoint != "val"}
        found[family, row][float(lam)][int(seed)] = run["val"], means, list(mine["patients"].values())
    return found


def chosen(by_lambda):
    """The lambda of the best Dice on val for seed 0, of those that were tried on it. -> lambda, {seed: run}; None where seed 0 is missing"""
    tried = sorted(lam for lam, seeds in by_lambda.items() if 0 in seeds)
    best = max(tried, key=lambda lam: by_lambda[lam][0][0], default=None)
    return best, by_lambda.get(best)


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


def differences(ours, base, checkpoint):
    """Paired differences of Dice in points over common seeds. -> [seeds, cases], the patient of each case as a number"""
    seeds = sorted(set(ours) & set(base))
    difference = 100 * np.stack([ours[s][1][checkpoint]["dice"] - base[s][1][checkpoint]["dice"] for s in seeds])
    return difference, np.unique(ours[seeds[0]][2], return_inverse=True)[1]


def compare(ours, base, checkpoint):
    """-> the mean of the paired differences, (low, high) over cases, (low, high) over patients"""
    difference, patients = differences(ours, base, checkpoint)
    return difference.mean(), interval(difference, np.arange(difference.shape[1])), interval(difference, patients)


def table(data, checkpoint):
    """Markdown rows of one data set, and what the figure shows of it."""
    runs, points = runs_of(data), []
    print(f"\n### {data}, {checkpoint}\n")
    print("| family | guidance | lambda | seeds | Dice % | HD95 px | difference to its own baseline | by patient |\n|" + "---|" * 8)
    for family in FAMILIES:
        base = chosen(runs[family, "none"])[1] if (family, "none") in runs else None
        for row in ROWS:
            if (family, row) not in runs:
                continue
            lam, seeds = chosen(runs[family, row])
            if not seeds:
                continue
            dice, hd95 = (np.array([s[1][checkpoint][m].mean() for s in seeds.values()]) for m in ("dice", "hd95"))
            scatter = f" ± {100 * dice.std(ddof=1):.1f}" if len(dice) > 1 else ""
            cells = [family, row, f"{lam:g}", str(len(seeds)), f"{100 * dice.mean():.1f}{scatter}", f"{hd95.mean():.1f}"]
            if base and row != "none" and set(base) & set(seeds):
                mean, case, patient = compare(seeds, base, checkpoint)
                points.append((data, family, row, mean, *patient))
                cells += [f"{mean:+.1f} [{case[0]:+.1f}, {case[1]:+.1f}]", f"[{patient[0]:+.1f}, {patient[1]:+.1f}]"]
            else:
                cells += ["", ""]
            print("| " + " | ".join(cells) + " |")
    return points


def glance(sets, guided, checkpoint="best.pt"):
    """Markdown: a guided row beside each family's own baseline and all labels, a column for each data set, and how many pairs gain. A pair counts
    once these three rows have run with seeds 0, 1 and 2. In the last row the difference is, for each seed and case, the mean over the families above,
    whose runs share seeds, cases and their supervised beginning."""
    found, cells, pairs = {data: runs_of(data) for data in sets}, collections.defaultdict(dict), []
    pooled = collections.defaultdict(list)
    dice = lambda seeds: 100 * np.mean([s[1][checkpoint]["dice"].mean() for s in seeds.values()])
    for data, family in itertools.product(sets, FAMILIES):
        none, ours, full = (chosen(found[data][family, row])[1] for row in ("none", guided, "full"))
        if family == "supervised" and none:
            cells[family][data] = f"{dice(none):.1f}"
        if all(seeds and {0, 1, 2} == set(seeds) for seeds in (none, ours, full)):
            mean, _, (low, high) = compare(ours, none, checkpoint)
            most = dice(full) - dice(none)
            pairs.append((mean, low, most))
            pooled[data].append(differences(ours, none, checkpoint))
            cells[family][data] = f"{dice(none):.1f} → {dice(ours):.1f}, {mean:+.1f} [{low:+.1f}, {high:+.1f}]; all labels {most:+.1f}"
    if not pairs:
        return
    for data, of in [item for item in pooled.items() if len(item[1]) > 1]:
        difference, patients = np.mean([d for d, _ in of], 0), of[0][1]
        low, high = interval(difference, patients)
        cells["mean of the families"][data] = f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    print(f"\n### {guided}\n\n| family | " + " | ".join(sets) + " |\n|" + "---|" * (len(sets) + 1))
    for family, row in cells.items():
        print(f"| {family} | " + " | ".join(row.get(data, "") for data in sets) + " |")
    print(f"\nOf {len(pairs)} pairs of a family and a data set `{guided}` is above its own baseline in {sum(m > 0 for m, _, _ in pairs)}, with an interval "
          f"above zero in {sum(low > 0 for _, low, _ in pairs)}; it reaches half of what all labels would give in "
          f"{sum(0 < most <= 2 * mean for mean, _, most in pairs)}; it is more than .3 points below in {sum(m < -0.3 for m, _, _ in pairs)}.")


SHOWN = {"correct": "correction", "correct_qw": "correction, weighted", "blind": "correction, mask unseen", "blind_qw": "correction, weighted, mask unseen",
         "qw_pixel": "QW, pixel", "qw": "QW, image (the paper's)", "conf": "confidence, image", "conf_pixel": "confidence, pixel",
         "shuffled_pixel": "QW, pixel, shuffled g", "qar": "QAR", "qar_hard": "QAR, hard masks", "qar_fresh": "QAR, g refreshed", "full": "all labels"}


def draw(path, points):
    """Difference to the family's own baseline with its interval, a panel for each data set."""
    if not points:
        raise InputError("no row beside a family's `none`, so there is nothing to draw")
    plt, sets = figures.pyplot(), list(dict.fromkeys(p[0] for p in points))
    families = [f for f in FAMILIES if any(p[1] == f for p in points)]
    rows = [row for row in SHOWN if any(p[2] == row for p in points)]
    figure, axes = plt.subplots(1, len(sets), figsize=(3.6 * len(sets), 1.2 + 0.16 * len(families) * (len(rows) + 1.5)), sharey=True, squeeze=False)
    for axis, data in zip(axes[0], sets):
        for _, family, row, mean, low, high in (p for p in points if p[0] == data and p[2] in rows):
            k = rows.index(row)
            axis.errorbar(mean, families.index(family) + (k + 1) / (len(rows) + 1.5), xerr=[[mean - low], [high - mean]], fmt="os^D"[k % 4],
                          markersize=4, color="0.5" if row == "full" else figures.color(k), capsize=2, label=SHOWN[row])
        axis.axvline(0, color="black", linewidth=0.8)
        for y in range(1, len(families)):
            axis.axhline(y, color="0.85", linewidth=0.8)
        axis.set(title=data, xlabel="difference in Dice, points", ylim=(len(families), 0))
        axis.set_yticks([i + 0.5 for i in range(len(families))], [f.replace("_", " ") for f in families])
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    handles = {SHOWN[row]: handles[SHOWN[row]] for row in rows}
    figure.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8, frameon=False)
    figure.tight_layout()
    figures.save_figure(figure, path)


def main():
    p = Parser(__doc__, prog="evidence_table.py")
    p.add_argument("data", nargs="+", choices=DATA)
    p.add_argument("--add", action="store_true", help="first add the finished runs under runs/v to results/evidence.json")
    p.add_argument("--out", type=picture, help="the figure")
    args = p.parse_args()
    for data in args.data if args.add else []:
        add(data)
    for guided in ("correct_qw", "correct"):
        glance(args.data, guided)
    points = [point for data in args.data for point in table(data, "best.pt")]
    for data in args.data:
        table(data, "last.pt")
    if args.out:
        draw(args.out, points)


if __name__ == "__main__":
    cli(main)
