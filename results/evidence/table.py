"""The tables and the figure of README.md, from scores.csv.gz.

    python -m results.evidence.table ph2 cvc acdc_3 --out results/evidence/evidence.png
    python -m results.evidence.table ph2 --add    # first adds the finished runs of run.py

scores.csv.gz has the best Dice on val of each run, and Dice and HD95 of each test case (mean over
classes), so that a table needs no runs.

For every family and row, lambda is the one with the best Dice on val for seed 0, of those that
were tried. Scores are those on test of best.pt (chosen on val): Dice in %, with its mean and
deviation over seeds, and HD95. The difference of Dice is to the family's own row `none`, paired
over the seeds that both rows have. Its 95% interval comes from 10,000 bootstrap samples: seeds and
cases (or patients) are drawn with replacement, the same for both rows. Of three seeds that is a
rough interval, too narrow where seeds differ more than cases do. Of one seed it is an interval over
cases alone. The figure has the intervals over patients.
"""

import collections
import csv
import glob
import gzip
import io
import os
from dataclasses import dataclass

import numpy as np

from data import figures
from data.files import InputError, checksum, replacing
from data.options import Parser, cli, picture
from results.evidence.run import DATA, FAMILIES, ROWS, best_on_val

SCORES = os.path.join(os.path.dirname(__file__), "scores.csv.gz")
COLUMNS = ["data", "g", "run", "val", "checkpoint", "case", "patient", "dice", "hd95"]
METRICS = ["dice", "hd95"]


@dataclass
class Run:
    val: float  # best Dice on val after the common start
    scores: dict  # {checkpoint: {metric: scores of the cases, an array}}


@dataclass
class DataSet:
    g: int  # CRC-32 of its file
    patients: dict  # {case: patient}
    runs: dict  # {FAMILY-ROW-LAM-SEED: Run}


@dataclass
class Gain:
    """A difference of Dice, in points, with its intervals (low, high)."""

    mean: float
    by_case: tuple
    by_patient: tuple


@dataclass
class Point:
    """What the figure shows of a row."""

    data: str
    family: str
    row: str
    gain: Gain


# ------------------------------------------------------------------------------ scores of runs


def read(folder, start):
    """Reads a finished run. -> Run, {case: patient}"""
    patients = {}
    classes = collections.defaultdict(list)  # scores of the classes of a case
    with open(f"{folder}/test/cases.csv", newline="") as f:
        for row in csv.DictReader(f):
            patients[row["case"]] = row["patient"]
            for metric in METRICS:
                key = (os.path.basename(row["checkpoint"]), metric, row["case"])
                classes[key].append(float(row[metric]))
    scores = {}
    for (checkpoint, metric, _), values in classes.items():
        of = scores.setdefault(checkpoint, {name: [] for name in METRICS})
        of[metric].append(np.mean(values).round(4))
    return Run(best_on_val(f"{folder}/log.csv", start), as_arrays(scores)), patients


def as_arrays(scores):
    """{checkpoint: {metric: list}} -> the same with arrays"""
    return {
        checkpoint: {metric: np.array(values) for metric, values in of.items()}
        for checkpoint, of in scores.items()
    }


def kept():
    """What scores.csv.gz holds. -> {data: DataSet}"""
    sets = {}
    if not os.path.isfile(SCORES):
        return sets
    with gzip.open(SCORES, "rt", newline="") as f:
        for row in csv.DictReader(f):
            mine = sets.setdefault(row["data"], DataSet(int(row["g"]), {}, {}))
            mine.patients[row["case"]] = row["patient"]
            run = mine.runs.setdefault(row["run"], Run(float(row["val"]), {}))
            of = run.scores.setdefault(row["checkpoint"], {name: [] for name in METRICS})
            for metric in METRICS:
                of[metric].append(float(row[metric]))
    for mine in sets.values():
        for run in mine.runs.values():
            run.scores = as_arrays(run.scores)
    return sets


def keep(sets):
    """Writes scores.csv.gz; the same scores give the same bytes."""
    with replacing(SCORES) as temporary, open(temporary, "wb") as file:
        packed = gzip.GzipFile("", "wb", 9, file, mtime=0)
        with io.TextIOWrapper(packed, "utf-8", newline="") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(lines_of(sets))


def lines_of(sets):
    """A line for each case of each checkpoint of each run."""
    for data, mine in sets.items():
        for name, run in sorted(mine.runs.items()):
            for checkpoint, of in run.scores.items():
                of_run = (data, mine.g, name, run.val, checkpoint)
                cases = zip(mine.patients.items(), of["dice"], of["hd95"], strict=True)
                for (case, patient), dice, hd95 in cases:
                    yield *of_run, case, patient, dice, hd95


def add(data):
    """Adds the finished runs of a data set to what is kept, in the place of older ones of the same
    name. InputError for runs with another g or other test cases: they could not be compared."""
    sets = kept()
    g = f"runs/v/{data}/g/qp.pt"
    for path in sorted(glob.glob(f"runs/v/{data}/*/test/cases.csv")):
        folder = os.path.dirname(os.path.dirname(path))
        run, patients = read(folder, DATA[data]["start"])
        mine = sets.setdefault(data, DataSet(checksum(g), patients, {}))
        same_cases = list(mine.patients.items()) == list(patients.items())
        if mine.g != checksum(g) or not same_cases:
            raise InputError(
                f"{folder}: has another g or other test cases than the runs of "
                f"{data} in {SCORES}; remove those"
            )
        mine.runs[os.path.basename(folder)] = run
    if data not in sets:
        raise InputError(f"runs/v/{data}: no finished run of run.py, and none in {SCORES}")
    keep(sets)


def runs_of(data):
    """-> {(family, row): {lambda: {seed: Run}}}, the patient of each case"""
    mine = kept().get(data)
    if not mine:
        raise InputError(f"{SCORES}: holds no run of {data}; --add those of run.py")
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for name, run in mine.runs.items():
        family, row, lam, seed = name.rsplit("-", 3)
        found[family, row][float(lam)][int(seed)] = run
    return found, list(mine.patients.values())


def chosen(by_lambda):
    """The lambda of the best Dice on val for seed 0, of those that were tried on it.

    -> lambda, {seed: Run}; None, None where seed 0 is missing
    """
    tried = sorted(lam for lam, seeds in by_lambda.items() if 0 in seeds)
    if not tried:
        return None, None
    best = max(tried, key=lambda lam: by_lambda[lam][0].val)
    return best, by_lambda[best]


# ------------------------------------------------------------------------------ differences


def interval(difference, groups, count=10_000):
    """95% bootstrap interval of the mean of difference [seeds, cases]; seeds and groups of cases (a
    number each) are drawn with replacement."""
    rng = np.random.default_rng(0)
    S = len(difference)
    members = [groups == g for g in np.unique(groups)]
    sums = np.stack([[row[m].sum() for m in members] for row in difference])  # [seeds, groups]
    sizes = np.array([m.sum() for m in members])
    means = []
    for _ in range(count):
        s = rng.integers(S, size=S)
        g = rng.integers(len(sizes), size=len(sizes))
        means.append(sums[s][:, g].sum() / (S * sizes[g].sum()))
    return np.percentile(means, [2.5, 97.5])


def differences(ours, base, checkpoint):
    """Paired differences of Dice, in points, over common seeds. -> [seeds, cases]"""
    dice = lambda run: run.scores[checkpoint]["dice"]
    seeds = sorted(set(ours) & set(base))
    return 100 * np.stack([dice(ours[s]) - dice(base[s]) for s in seeds])


def gain_of(difference, patients):
    """difference: [seeds, cases] -> Gain"""
    cases = np.arange(difference.shape[1])
    groups = np.unique(patients, return_inverse=True)[1]
    return Gain(difference.mean(), interval(difference, cases), interval(difference, groups))


def between(limits):
    """An interval as text."""
    low, high = limits
    return f"[{low:+.1f}, {high:+.1f}]"


# ------------------------------------------------------------------------------ tables


def table(data, checkpoint):
    """Prints the Markdown table of one data set. -> a Point for each row with a difference"""
    points = []
    runs, patients = runs_of(data)
    print(f"\n### {data}, {checkpoint}\n")
    print(
        "| family | guidance | lambda | seeds | Dice % | HD95 px "
        "| difference to its own baseline | by patient |\n|" + "---|" * 8
    )
    for family in FAMILIES:
        _, base = chosen(runs.get((family, "none"), {}))
        for row in ROWS:
            lam, seeds = chosen(runs.get((family, row), {}))
            if not seeds:
                continue
            cells = [family, row, f"{lam:g}", str(len(seeds)), *scores_of(seeds, checkpoint)]
            if base and row != "none" and set(base) & set(seeds):
                gain = gain_of(differences(seeds, base, checkpoint), patients)
                points.append(Point(data, family, row, gain))
                cells += [f"{gain.mean:+.1f} {between(gain.by_case)}", between(gain.by_patient)]
            else:
                cells += ["", ""]
            print("| " + " | ".join(cells) + " |")
    return points


def scores_of(seeds, checkpoint):
    """Dice in % with its deviation over seeds, and HD95, as text."""
    of = [run.scores[checkpoint] for run in seeds.values()]
    dice = np.array([100 * scores["dice"].mean() for scores in of])
    hd95 = np.mean([scores["hd95"].mean() for scores in of])
    scatter = f" ± {dice.std(ddof=1):.1f}" if len(dice) > 1 else ""
    return f"{dice.mean():.1f}{scatter}", f"{hd95:.1f}"


@dataclass
class Pair:
    """A family on a data set, with all three seeds of its baseline, guided row and all labels."""

    base: float  # Dice of the baseline
    guided: float  # Dice of the guided row
    full: float  # what all labels give above the baseline
    difference: np.ndarray
    gain: Gain

    def text(self):
        change = f"{self.base:.1f} → {self.guided:.1f}, {self.gain.mean:+.1f}"
        return f"{change} {between(self.gain.by_patient)}; all labels {self.full:+.1f}"


def glance(sets, guided, checkpoint="best.pt"):
    """Prints a guided row beside each family's own baseline and all labels, a column for each data
    set, and how many pairs gain.

    A pair counts once these three rows have run with seeds 0, 1 and 2. In the last row the
    difference is, for each seed and case, the mean over the families above, whose runs share seeds,
    cases and their supervised beginning.
    """
    cells = collections.defaultdict(dict)
    pairs = []
    for data in sets:
        runs, patients = runs_of(data)
        mine = {}
        for family in FAMILIES:
            rows = [chosen(runs.get((family, row), {}))[1] for row in ("none", guided, "full")]
            if family == "supervised" and rows[0]:
                cells[family][data] = f"{mean_dice(rows[0], checkpoint):.1f}"
            if all(seeds and set(seeds) == {0, 1, 2} for seeds in rows):
                mine[family] = pair_of(*rows, patients, checkpoint)
                cells[family][data] = mine[family].text()
        if len(mine) > 1:
            pooled = np.mean([pair.difference for pair in mine.values()], 0)
            gain = gain_of(pooled, patients)
            cells["mean of the families"][data] = f"{gain.mean:+.1f} {between(gain.by_patient)}"
        pairs += mine.values()
    if not pairs:
        return
    print(f"\n### {guided}\n\n| family | " + " | ".join(sets) + " |")
    print("|" + "---|" * (len(sets) + 1))
    for family in [*FAMILIES, "mean of the families"]:
        if family in cells:
            row = [cells[family].get(data, "") for data in sets]
            print(f"| {family} | " + " | ".join(row) + " |")
    print(f"\n{count(pairs, guided)}")


def mean_dice(seeds, checkpoint):
    """Mean Dice over seeds and cases, %."""
    return 100 * np.mean([run.scores[checkpoint]["dice"].mean() for run in seeds.values()])


def pair_of(none, ours, full, patients, checkpoint):
    base = mean_dice(none, checkpoint)
    most = mean_dice(full, checkpoint) - base
    difference = differences(ours, none, checkpoint)
    gain = gain_of(difference, patients)
    return Pair(base, mean_dice(ours, checkpoint), most, difference, gain)


def count(pairs, guided):
    """A sentence: how many pairs gain, how surely, and how much."""
    above = sum(p.gain.mean > 0 for p in pairs)
    surely = sum(p.gain.by_patient[0] > 0 for p in pairs)
    half = sum(0 < p.full <= 2 * p.gain.mean for p in pairs)
    below = sum(p.gain.mean < -0.3 for p in pairs)
    return (
        f"Of {len(pairs)} pairs of a family and a data set `{guided}` is above its own "
        f"baseline in {above}, with an interval above zero in {surely}; it reaches half of "
        f"what all labels would give in {half}; it is more than .3 points below in {below}."
    )


# ------------------------------------------------------------------------------ figure

SHOWN = {
    "correct": "correction",
    "correct_qw": "correction, weighted",
    "blind": "correction, mask unseen",
    "blind_qw": "correction, weighted, mask unseen",
    "qw_pixel": "QW, pixel",
    "qw": "QW, image (the paper's)",
    "conf": "confidence, image",
    "conf_pixel": "confidence, pixel",
    "shuffled_pixel": "QW, pixel, shuffled g",
    "qar": "QAR",
    "qar_hard": "QAR, hard masks",
    "qar_fresh": "QAR, g refreshed",
    "full": "all labels",
}


def draw(path, points):
    """Draws each difference to the family's own baseline with its interval over patients, a panel
    for each data set."""
    points = [p for p in points if p.row in SHOWN]
    if not points:
        raise InputError("no row beside a family's `none`, so there is nothing to draw")
    sets = list(dict.fromkeys(p.data for p in points))
    families = [f for f in FAMILIES if any(p.family == f for p in points)]
    rows = [row for row in SHOWN if any(p.row == row for p in points)]
    step = 1 / (len(rows) + 1.5)  # a family is 1 high

    size = (3.6 * len(sets), 1.2 + 0.16 * len(families) / step)
    figure, axes = figures.pyplot().subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    handles = {}
    for axis, data in zip(axes[0], sets):
        for point in points:
            if point.data == data:
                k = rows.index(point.row)
                y = families.index(point.family) + (k + 1) * step
                handles[point.row] = draw_point(axis, point, y, k)
        axis.axvline(0, color="black", linewidth=0.8)
        for y in range(1, len(families)):
            axis.axhline(y, color="0.85", linewidth=0.8)
        axis.set(title=data, xlabel="difference in Dice, points", ylim=(len(families), 0))
        middles = [i + 0.5 for i in range(len(families))]
        axis.set_yticks(middles, [f.replace("_", " ") for f in families])
    figure.legend(
        [handles[row] for row in rows],
        [SHOWN[row] for row in rows],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout()
    figures.save_figure(figure, path)


def draw_point(axis, point, y, k):
    """Draws one row, the k-th of the legend. -> its handle"""
    low, high = point.gain.by_patient
    mean = point.gain.mean
    return axis.errorbar(
        mean,
        y,
        xerr=[[mean - low], [high - mean]],
        fmt="os^D"[k % 4],
        markersize=4,
        color="0.5" if point.row == "full" else figures.color(k),
        capsize=2,
    )


def main():
    p = Parser(__doc__, prog="python -m results.evidence.table")
    p.add_argument("data", nargs="+", choices=DATA)
    p.add_argument(
        "--add",
        action="store_true",
        help="first add the finished runs under runs/v to scores.csv.gz",
    )
    p.add_argument("--out", type=picture, help="the figure")
    args = p.parse_args()
    if args.add:
        for data in args.data:
            add(data)
    for guided in ("correct_qw", "correct"):
        glance(args.data, guided)
    points = []
    for data in args.data:
        points += table(data, "best.pt")
    for data in args.data:
        table(data, "last.pt")
    if args.out:
        draw(args.out, points)


if __name__ == "__main__":
    cli(main)
