"""The tables of README.md, tables.md and ../baselines/README.md, from scores_TIER.csv.gz.

    python -m results.evidence.table --out results/evidence/evidence.png
    python -m results.evidence.table --add      # first adds the finished runs of run.py
    python -m results.evidence.table --rows     # all rows: tables.md
    python -m results.evidence.table --baselines

scores_TIER.csv.gz has Dice and HD95 of each test case (mean over classes) for each run, so that a
table needs no runs. The row `published` is the authors' training step in the place of ours.

A gain is the difference of Dice to another row of the same method, mostly without g, in points,
paired over seeds and cases. Its 95% interval comes from 10,000 bootstrap samples: seeds and
patients (of video: sequences) are drawn with replacement, the same for both rows. Of three seeds
that is a rough interval, too narrow where seeds differ more than patients do; of one seed it is
over patients alone.
"""

import collections
import csv
import glob
import gzip
import io
import os
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import train_ssl
from data import figures
from data.files import InputError, replacing
from data.options import Parser, cli, picture
from data.tables import markdown
from results.evidence.run import DATA, ROWS, SEEDS, TIERS, sets_of

SCORES = os.path.join(os.path.dirname(__file__), "scores_{}.csv.gz")  # of a tier
COLUMNS = ["data", "method", "row", "seed", "checkpoint", "case", "patient", "dice", "hd95"]
CHECKPOINTS = {
    "best.pt": "at the best validation since lambda set in",
    "last.pt": "at the last step",
}


class Key(NamedTuple):
    """A run, and one of its two checkpoints."""

    data: str
    method: str
    row: str
    seed: int
    checkpoint: str


@dataclass
class Scores:
    """Of a checkpoint, for each test case."""

    patients: list
    dice: np.ndarray
    hd95: np.ndarray


class Gain(NamedTuple):
    """A difference of Dice to another row, in points, and its interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self):
        text = f"{self.mean:+z.1f} [{self.low:+z.1f}, {self.high:+z.1f}]"
        return text if self.seeds == len(SEEDS) else f"{text} ({self.seeds})"


# ------------------------------------------------------------------------------ scores of runs


def read(folder):
    """The scores of a finished run. -> {checkpoint: Scores}"""
    classes = collections.defaultdict(list)  # (Dice, HD95) of the classes of a case
    patient = {}
    with open(f"{folder}/test/cases.csv", newline="") as f:
        for row in csv.DictReader(f):
            patient[row["case"]] = row["patient"]
            key = os.path.basename(row["checkpoint"]), row["case"]
            classes[key].append((float(row["dice"]), float(row["hd95"])))
    found = {}
    for checkpoint in CHECKPOINTS:
        means = [np.mean(classes[checkpoint, case], 0).round(4) for case in patient]
        found[checkpoint] = Scores(list(patient.values()), *np.array(means).T)
    return found, list(patient)


def kept(tier):
    """The scores that are kept. -> {Key: Scores}, {data: its cases}"""
    lines, cases = collections.defaultdict(list), {}
    if os.path.isfile(SCORES.format(tier)):
        with gzip.open(SCORES.format(tier), "rt", newline="") as f:
            for row in csv.DictReader(f):
                of = row["data"], row["method"], row["row"], int(row["seed"]), row["checkpoint"]
                lines[Key(*of)].append(row)
    found = {}
    for key, rows in lines.items():
        cases[key.data] = [row["case"] for row in rows]
        dice, hd95 = (np.array([float(row[name]) for row in rows]) for name in ("dice", "hd95"))
        found[key] = Scores([row["patient"] for row in rows], dice, hd95)
    return found, cases


def add(tier):
    """Adds the finished runs to those that are kept, in the place of older ones of the same name.

    InputError for other test cases than those that are kept: they could not be compared.
    """
    found, cases = kept(tier)
    for path in sorted(glob.glob(f"runs/evidence/{tier}/*/*/test/cases.csv")):
        folder = os.path.dirname(os.path.dirname(path))
        data, name = folder.split(os.sep)[-2:]
        method, row, seed = name.rsplit("-", 2)
        scores, its_cases = read(folder)
        if sorted(cases.setdefault(data, its_cases)) != sorted(its_cases):
            raise InputError(
                f"{folder}: has other test cases than the runs in {SCORES.format(tier)}"
            )
        order = [its_cases.index(case) for case in cases[data]]  # files may order them otherwise
        for checkpoint, one in scores.items():
            patients = [one.patients[i] for i in order]
            ordered = Scores(patients, one.dice[order], one.hd95[order])
            found[Key(data, method, row, int(seed), checkpoint)] = ordered
    with replacing(SCORES.format(tier)) as temporary, open(temporary, "wb") as file:
        packed = gzip.GzipFile("", "wb", 9, file, mtime=0)  # the same scores give the same bytes
        with io.TextIOWrapper(packed, "utf-8", newline="") as unpacked:
            writer = csv.writer(unpacked, lineterminator="\n")
            writer.writerow(COLUMNS)
            for key, one in sorted(found.items(), key=lambda item: item[0]):
                columns = cases[key.data], one.patients, one.dice, one.hd95
                writer.writerows([*key, *line] for line in zip(*columns, strict=True))


class Table:
    """The scores of one checkpoint of each run, by data, method and row, then by seed."""

    def __init__(self, tier, checkpoint):
        self.sets = sets_of(tier)  # of data
        self.runs = collections.defaultdict(dict)
        for key, scores in kept(tier)[0].items():
            if key.checkpoint == checkpoint:
                self.runs[key.data, key.method, key.row][key.seed] = scores

    def methods(self, *rows):
        """The methods that have a run of one of the rows."""
        found = {method for _, method, row in self.runs if row in rows}
        return [method for method in train_ssl.METHODS if method in found]

    def dice(self, data, method, row):
        """Mean and deviation of Dice over seeds, %; fewer than three seeds are counted. -> text"""
        runs = self.runs.get((data, method, row), {})
        if not runs:
            return ""
        found = [100 * scores.dice.mean() for scores in runs.values()]
        text = f"{statistics.mean(found):.1f}"
        if len(found) > 1:
            text += f" ± {statistics.stdev(found):.1f}"
        return text if len(found) == len(SEEDS) else f"{text} ({len(found)})"

    def gain(self, data, methods, row, other=None):
        """The Gain of a row over another, in the mean over methods and the seeds that all have.

        other: a row; None: the method without g, see base(). -> None if there is no such seed
        """
        rows = {m: (row, other or self.base(data, m, row)) for m in methods}
        pairs = [[self.runs.get((data, m, r), {}) for r in rows[m]] for m in methods]
        seeds = sorted(set.intersection(*(set(a) & set(b) for a, b in pairs))) if pairs else []
        if not seeds:
            return None
        gains = [[100 * (a[seed].dice - b[seed].dice) for seed in seeds] for a, b in pairs]
        mean = np.mean(gains, 0)  # [seeds, cases]
        return Gain(mean.mean(), *interval(mean, pairs[0][0][seeds[0]].patients), len(seeds))

    def base(self, data, method, row):
        """What a row is a gain on: the run `none` of the machine that the row was made on."""
        apart = row in ELSEWHERE.get(data, ()) and (data, method, "elsewhere") in self.runs
        return "elsewhere" if apart else "none"


def interval(difference, groups, count=10_000):
    """95% bootstrap interval of the mean of difference [seeds, cases]; seeds and groups of cases (a
    name each) are drawn with replacement."""
    rng = np.random.default_rng(0)
    groups = np.asarray(groups)
    S = len(difference)
    members = [groups == g for g in np.unique(groups)]
    sums = np.stack([difference[:, m].sum(1) for m in members], 1)  # [seeds, groups]
    sizes = np.array([m.sum() for m in members])
    s = rng.integers(S, size=(count, S, 1))
    g = rng.integers(len(sizes), size=(count, 1, len(sizes)))
    means = sums[s, g].sum((1, 2)) / (S * sizes[g].sum((1, 2)))
    return np.percentile(means, [2.5, 97.5])


# ------------------------------------------------------------------------------ tables


def baselines(table):
    """Ours without guidance beside the published step, a line for each method. -> Markdown"""
    columns = {
        f"{data}, {code}": (data, row)
        for data in table.sets
        for code, row in (("ours", "none"), ("published", "published"))
        if not DATA[data].archive
    }
    lines = []
    for method in table.methods("none", "published"):
        cells = {name: table.dice(data, method, row) for name, (data, row) in columns.items()}
        lines.append({"method": method} | cells)
    return markdown(lines)


def overview(table):
    """What the rows of OVERVIEW gain, a part for each data set, a line for each method. -> Markdown

    The last line has means of the methods that have the most seeds.
    """
    parts = []
    for data in table.sets:
        lines = []
        for method in table.methods("none"):
            cells = {name: text(table.gain(data, [method], row)) for row, name in OVERVIEW.items()}
            unguided = table.dice(data, method, "none")
            lines.append({"method": method, "unguided": unguided} | cells)
        means = {name: text(mean_gain(table, data, row)) for row, name in OVERVIEW.items()}
        lines.append({"method": "**mean**", "unguided": ""} | means)
        found = [line for line in lines if any([*line.values()][2:])]
        if found:
            parts.append(f"**{data}**\n\n{markdown(found)}")
    return "\n\n".join(parts)


def mean_gain(table, data, row, other=None):
    """The Gain of a row in the mean over the methods that have the most seeds; None for one."""
    found = {m: table.gain(data, [m], row, other) for m in table.methods(row)}
    most = max((gain.seeds for gain in found.values() if gain), default=0)
    methods = [m for m, gain in found.items() if gain and gain.seeds == most]
    return table.gain(data, methods, row, other) if len(methods) > 1 else None


def gains(table):
    """Dice of DICE, what each other row gains on its base, and means over methods. -> Markdown"""
    lines = []
    for method in table.methods("none"):
        for row in ["none", "elsewhere", *(row for row in ROWS if row != "none")]:
            if row in DICE:
                cells = {data: table.dice(data, method, row) for data in table.sets}
            else:
                cells = {data: text(table.gain(data, [method], row)) for data in table.sets}
            lines.append({"method": method, "row": row} | cells)
        for pair in PAIRS:
            cells = {data: text(table.gain(data, [method], *pair)) for data in table.sets}
            lines.append({"method": method, "row": " over ".join(pair)} | cells)
    for rows in MEANS:
        cells = {data: text(mean_gain(table, data, *rows)) for data in table.sets}
        lines.append({"method": "**mean**", "row": " over ".join(rows)} | cells)
    return markdown([line for line in lines if any([*line.values()][2:])])


OVERVIEW = {  # rows, and what the overview and the figure call them
    "qw": "QW by g",
    "trust_qw": "guided by g",
    "distill_qw": "guided by ensemble",
    "at_test": "corrected by g",
    "at_test_ensemble": "corrected by ensemble",
}
DICE = ("none", "elsewhere", "all")
ELSEWHERE = {  # rows that were made on an earlier machine, where the run `none` is `elsewhere`
    "ph2": ("qw_half", "correct_qw_half", "qar_half", "distill_qw"),
    "acdc": ("qw_half", "correct_qw_half", "qar_half"),
}
PAIRS = [  # their difference: what quality adds to a second network
    ["at_test", "at_test_ensemble"],
    ["trust_qw", "distill_trust_qw"],
    ["trust_qw", "distill_qw"],
    ["correct_qw", "distill_qw"],
    ["correct_qw_half", "distill_qw"],
]
MEANS = [*([row] for row in ROWS if row not in DICE), *PAIRS]  # over methods


def text(gain):
    return str(gain) if gain else ""


# ------------------------------------------------------------------------------ figure


def draw(path, table):
    """Draws each gain with its interval, a panel for each data set."""
    points = {
        (data, method, row): table.gain(data, [method], row)
        for data in table.sets
        for method in table.methods("none")
        for row in OVERVIEW
    }
    points = {key: gain for key, gain in points.items() if gain}
    if not points:
        raise InputError("no row beside a method's `none` is kept, so there is nothing to draw")
    sets = [data for data in table.sets if any(key[0] == data for key in points)]
    methods = [m for m in table.methods("none") if any(key[1] == m for key in points)]
    rows = [row for row in OVERVIEW if any(key[2] == row for key in points)]
    step = 1 / (len(rows) + 1.5)  # a method is 1 high
    size = (3.2 * len(sets), 1.2 + 0.16 * len(methods) / step)
    figure, axes = figures.pyplot().subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    handles = {}
    for axis, data in zip(axes[0], sets):
        for (of, method, row), gain in points.items():
            if of == data:
                k = rows.index(row)
                y = methods.index(method) + (k + 1) * step
                handles[row] = axis.errorbar(
                    gain.mean,
                    y,
                    xerr=[[gain.mean - gain.low], [gain.high - gain.mean]],
                    fmt="os^Dv<"[k],
                    markersize=4,
                    color=figures.color(k),
                    capsize=2,
                )
        axis.axvline(0, color="black", linewidth=0.8)
        for y in range(1, len(methods)):
            axis.axhline(y, color="0.85", linewidth=0.8)
        axis.set(title=data, xlabel="gain in Dice, points", ylim=(len(methods), 0))
    axes[0, 0].set_yticks([i + 0.5 for i in range(len(methods))], methods)
    shown = [row for row in rows if row in handles]
    names = [OVERVIEW[row] for row in shown]
    figure.legend([handles[row] for row in shown], names, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.8 / size[1], 1, 1))
    figures.save_figure(figure, path)


def main(argv=None):
    p = Parser(__doc__, prog="python -m results.evidence.table")
    p.add_argument("--add", action="store_true", help="first add the finished runs to the scores")
    p.add_argument("--tier", choices=TIERS, default="small", help="of which runs")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--rows", action="store_true", help="all rows, not those of the overview")
    which.add_argument("--baselines", action="store_true", help="ours beside published code")
    p.add_argument("--out", type=picture, help="the figure")
    args = p.parse_args(argv)
    if args.add:
        add(args.tier)
    write = baselines if args.baselines else gains if args.rows else overview
    for checkpoint, when in CHECKPOINTS.items():
        print(f"Test Dice, %, {when}\n\n{write(Table(args.tier, checkpoint))}\n")
    if args.out:
        draw(args.out, Table(args.tier, "best.pt"))


if __name__ == "__main__":
    cli(main)
