"""Are our baselines as strong as their published code, and what does guidance add? (README.md)

    python -m results.baselines.compare ph2 --rows supervised mean_teacher --seeds 0 1 2
    python -m results.baselines.compare     # adds finished runs to scores.csv, prints its tables

Reads  runs/ph2.h5, cvc.h5, acdc.h5, whose test split nobody trains on (evidence/protocol.md says
       how they are made); guided rows also runs/b/DATA/g/qp.pt.
Writes runs/b/DATA/ROW-SEED/: a run of train_ssl.py, and its scores on test;
       results/baselines/scores.csv: a line for each run.

Until lambda sets in, all runs of a seed are the same supervised training. The supervised run keeps
a checkpoint of that step, and the others go on from it: their weights and logs are those of the
whole command, to the last bit. Several processes may share a list of runs.

Runs of published code are in runs/b/DATA/published-METHOD-SEED. Its training step took the place of
ours, and all else is the same. That code is not part of the project; its scores are kept.
"""

import csv
import glob
import json
import os
import statistics
import time

import torch

import evaluate
import train_ssl
from data import h5
from data.files import checksum
from data.options import Parser, cli
from results.evidence.run import alone

SCORES = os.path.join(os.path.dirname(__file__), "scores.csv")
COLUMNS = ["code", "data", "row", "seed", "best", "last"]
STEPS = 1000
START = 300
COMMON = (
    f"--size 64 --width 8 --batch 8 --batch-unlabeled 8 --mc-passes 4 --patience 100 "
    f"--steps {STEPS} --eval-every 100 --lam-warmup {START / STEPS} --lam-ramp 0.1"
).split()
DATA = {
    "ph2": "--labeled 14 --lr 1e-3",
    "cvc": "--labeled 4 --lr 1e-3",
    "acdc": "--labeled 7 --lr 3e-3",
}
METHODS = [
    "supervised",
    "pseudo_label",
    "mean_teacher",
    "ua_mt",
    "ict",
    "cps",
    "contrastive",
    "fixmatch",
    "unimatch",
    "bcp",
]
QW = "--weight quality --weight-level image"
ROWS = {method: f"--method {method}" for method in METHODS}
for method in ("pseudo_label", "mean_teacher", "bcp"):
    ROWS[f"{method}_qw"] = f"--method {method} {QW}"
    ROWS[f"{method}_correct_qw"] = f"--method {method} --correct {QW}"


# ------------------------------------------------------------------------------ runs


def command(data, row, seed, out):
    """What train_ssl.py is called with."""
    guide = ROWS[row].split()
    qp = ["--qp", f"runs/b/{data}/g/qp.pt"] if "quality" in guide else []
    options = [*DATA[data].split(), *COMMON, "--seed", str(seed), *guide, *qp]
    return [f"runs/{data}.h5", "--out", out, *options]


def run(data, row, seed, folder=None):
    """Trains one run and scores it on test, in runs/b/DATA/ROW-SEED, unless that is done already.

    The runs of a method go on from the supervised run of its seed; cps, which has two students, and
    bcp, whose warm-up is its own, run from the start. Published code, put in the place of ours,
    calls this with a `folder` of its own.
    """
    out = folder or f"runs/b/{data}/{row}-{seed}"
    with alone(out) as first:
        if os.path.isfile(f"{out}/test/summary.json"):
            return
        if not first:
            print(f"{out}: another process is at it, or was killed; then remove {out}/busy")
            return
        print(f"\n{out}", flush=True)
        argv = command(data, row, seed, out)
        method = train_ssl.parse_args(argv).method
        own_start = method in (*train_ssl.STUDENTS, *train_ssl.WARM_UP)
        origin = method if own_start else "supervised"
        if out == f"runs/b/{data}/{origin}-{seed}":
            train_ssl.main([*argv, "--keep", str(START), "--resume"])
        else:
            go_on(data, origin, seed, argv, out)
        scored = [f"{out}/best.pt", f"{out}/last.pt", "--split", "test"]
        evaluate.main([f"runs/{data}.h5", *scored, "--out", f"{out}/test", "--pictures", "0"])


def go_on(data, origin, seed, argv, out):
    """Trains a run from step START of the row `origin`, which is trained first if nobody has."""
    start = f"runs/b/{data}/{origin}-{seed}/step{START}.pt"
    while not os.path.isfile(start):
        run(data, origin, seed)
        time.sleep(0 if os.path.isfile(start) else 5)
    if not os.path.isfile(f"{out}/last.pt"):
        args = train_ssl.parse_args(argv)
        train_ssl.set_defaults(args, h5.read_info(args.data))
        state = torch.load(start, weights_only=True)
        state["args"] = vars(args)
        state["inputs"] = dict(qp=args.qp and checksum(args.qp), unlabeled=None)
        state["teacher"] = state["nets"][0]
        state["best"] = dict(dice=-1.0, step=0)
        state["parts"] = state["parts"][:0]
        state["seconds"] = 0.0
        torch.save(state, f"{out}/last.pt")
    train_ssl.main([*argv, "--resume"])


# ------------------------------------------------------------------------------ tables


def collect():
    """Scores of scores.csv, or of the same run where it is at hand.

    -> {(code, data, row, seed): (Dice of best.pt, Dice of last.pt)}, in %
    """
    scores = {}
    if os.path.isfile(SCORES):
        with open(SCORES, newline="") as f:
            for *key, best, last in list(csv.reader(f))[1:]:
                scores[tuple(key)] = float(best), float(last)
    for path in glob.glob("runs/b/*/*/test/summary.json"):
        data, name = path.split(os.sep)[2:4]
        code = "published" if name.startswith("published-") else "ours"
        row, seed = name.removeprefix("published-").rsplit("-", 1)
        if row in ROWS:
            with open(path) as f:
                best, last = (one["Dice %"][0] for one in json.load(f)["rows"])
            scores[code, data, row, seed] = round(best, 2), round(last, 2)
    return scores


def keep(scores):
    """Writes scores.csv."""
    lines = [[*key, *value] for key, value in sorted(scores.items())]
    with open(SCORES, "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *lines])


def cell(found):
    """Mean and deviation of a list of scores; fewer than three are counted."""
    if not found:
        return ""
    text = f"{statistics.mean(found):.1f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.1f}"
    return text if len(found) > 2 else f"{text} ({len(found)})"


def table(scores, which):
    """A Markdown table over seeds, a line for each row. which: 0 best.pt, 1 last.pt"""
    lines = [
        "| method | " + " | ".join(f"{data}, ours | published" for data in DATA) + " |",
        "|---" * (1 + 2 * len(DATA)) + "|",
    ]
    for row in ROWS:
        cells = []
        for data in DATA:
            for code in ("ours", "published"):
                key = (code, data, row)
                cells.append(cell([value[which] for k, value in scores.items() if k[:3] == key]))
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    p = Parser(__doc__, prog="python -m results.baselines.compare")
    p.add_argument("data", choices=DATA, nargs="?", help="no data set: the tables")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    if args.data:
        for seed in args.seeds:
            for row in args.rows:
                run(args.data, row, seed)
        return
    scores = collect()
    keep(scores)
    for which, when in enumerate(("best validation since lambda set in", "last step")):
        print(f"Test Dice, %, at the {when}\n\n{table(scores, which)}\n")


if __name__ == "__main__":
    cli(main)
