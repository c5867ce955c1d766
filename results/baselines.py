"""Are our baselines as strong as the published code? Every method on three data sets, and guidance beside it (results/baselines.md).

    python results/baselines.py ph2 --rows supervised mean_teacher --seeds 0 1 2
    python results/baselines.py     adds the runs that are finished to baselines.csv, and prints its tables

Reads  runs/ph2.h5, cvc.h5, acdc.h5, whose test split nobody trains on (results/protocol.md says how they are made); guided rows
       also runs/b/DATA/g/qp.pt.
Writes runs/b/DATA/ROW-SEED/: a run of train_ssl.py and its scores on test; results/baselines.csv: a line for each run.

Until lambda sets in, all runs of a seed are the same supervised training. The supervised run keeps a checkpoint of that step, and the others go
on from it: their weights and logs are those of the whole command, to the last bit. Several processes may share a list of runs.
Runs of published code are in runs/b/DATA/published-METHOD-SEED: its training step took the place of ours, all else is the same. That code is
not part of the project; its scores are kept in baselines.csv.
"""
import csv
import glob
import json
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
import train_ssl  # noqa: E402
from data import h5  # noqa: E402
from data.files import Parser, checksum  # noqa: E402
from evidence import alone  # noqa: E402

SCORES = os.path.join(os.path.dirname(__file__), "baselines.csv")
STEPS, START = 1000, 300
COMMON = (f"--size 64 --width 8 --batch 8 --batch-unlabeled 8 --steps {STEPS} --eval-every 100 --patience 100 --mc-passes 4 "
          f"--lam-warmup {START / STEPS} --lam-ramp 0.1 --qar-warmup {START / STEPS} --qar-ramp 0.1").split()
DATA = {
    "ph2": "--labeled 14 --lr 1e-3",
    "cvc": "--labeled 4 --lr 1e-3",
    "acdc": "--labeled 7 --lr 3e-3",
}
METHODS = ["supervised", "pseudo_label", "mean_teacher", "ua_mt", "ict", "cps", "contrastive", "fixmatch", "unimatch", "bcp"]
GUIDED = ["pseudo_label", "mean_teacher", "bcp"]
ROWS = {method: f"--method {method}" for method in METHODS}
QW = "--weight quality --weight-level image"
ROWS |= {f"{method}_qw": f"--method {method} {QW}" for method in GUIDED}
ROWS |= {f"{method}_correct_qw": f"--method {method} --correct {QW}" for method in GUIDED}


def command(data, row, seed, out, extra=()):
    """What train_ssl.py is called with."""
    guide = ROWS[row].split()
    qp = ["--qp", f"runs/b/{data}/g/qp.pt"] if "quality" in guide else []
    return [f"runs/{data}.h5", "--out", out, *DATA[data].split(), *COMMON, "--seed", str(seed), *guide, *qp, *extra]


def run(data, row, seed, folder=None):
    """One run of train_ssl.py and its scores on test, in runs/b/DATA/ROW-SEED; what is finished, or another process is at, is passed over.

    A supervised run keeps its checkpoint of step START, from which the runs of all methods with the same warm-up go on; so do
    cps, which has two students, and bcp, whose warm-up is its own. Published code in the place of ours calls this with a `folder`.
    """
    out = folder or f"runs/b/{data}/{row}-{seed}"
    with alone(out) as first:
        if os.path.isfile(f"{out}/test/summary.json"):
            return
        print(f"\n{out}" + ("" if first else f": passed over; another process is at it, or was killed: then remove {out}/busy"), flush=True)
        if not first:
            return
        method = train_ssl.parse_args(command(data, row, seed, out)).method
        origin = method if method in (*train_ssl.STUDENTS, *train_ssl.WARM_UP) else "supervised"
        if out == f"runs/b/{data}/{origin}-{seed}":
            train_ssl.main([*command(data, row, seed, out), "--keep", str(START), "--resume"])
        else:
            go_on(data, row, seed, out, origin)
        evaluate.main([f"runs/{data}.h5", f"{out}/best.pt", f"{out}/last.pt", "--split", "test", "--out", f"{out}/test", "--pictures", "0"])


def go_on(data, row, seed, out, origin):
    """A run from step START of the row `origin`, which is run first if nobody has; if another process is at it, this one waits."""
    start = f"runs/b/{data}/{origin}-{seed}/step{START}.pt"
    while not os.path.isfile(start):
        run(data, origin, seed)
        time.sleep(0 if os.path.isfile(start) else 5)
    argv = command(data, row, seed, out)
    if not os.path.isfile(f"{out}/last.pt"):
        args = train_ssl.parse_args(argv)
        train_ssl.set_defaults(args, h5.read_info(args.data))
        state = torch.load(start, weights_only=True)
        inputs = dict(qp=args.qp and checksum(args.qp), unlabeled=None)
        state |= dict(args=vars(args), inputs=inputs, teacher=state["nets"][0],  # it starts from the student
                      best=dict(dice=-1.0, step=0), parts=state["parts"][:0], seconds=0.0)
        torch.save(state, f"{out}/last.pt")
    train_ssl.main([*argv, "--resume"])


COLUMNS = ["code", "data", "row", "seed", "best", "last"]


def collect():
    """The scores of baselines.csv, and of the runs that are at hand in their place. -> {(code, data, row, seed): (best, last)}, Dice in %"""
    scores = {}
    if os.path.isfile(SCORES):
        with open(SCORES, newline="") as f:
            scores = {tuple(line[:4]): tuple(map(float, line[4:])) for line in list(csv.reader(f))[1:]}
    for path in glob.glob("runs/b/*/*/test/summary.json"):
        data, run = path.split(os.sep)[2:4]
        row, seed = run.removeprefix("published-").rsplit("-", 1)
        code = "published" if run.startswith("published-") else "ours"
        if row in ROWS:
            with open(path) as f:
                scores[code, data, row, seed] = tuple(round(one["Dice %"][0], 2) for one in json.load(f)["rows"])
    return scores


def keep(scores):
    """Writes baselines.csv."""
    with open(SCORES, "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *([*key, *value] for key, value in sorted(scores.items()))])


def table(scores, which):
    """Mean and deviation over seeds, a line for each row. which: 0 best.pt, 1 last.pt -> Markdown"""
    def cell(code, data, row):
        found = [value[which] for key, value in scores.items() if key[:3] == (code, data, row)]
        if not found:
            return ""
        deviation = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.1f}{deviation}" + (f" ({len(found)})" if len(found) < 3 else "")
    lines = ["| method | " + " | ".join(f"{data}, ours | published" for data in DATA) + " |", "|---" * (1 + 2 * len(DATA)) + "|"]
    for row in ROWS:
        cells = [cell(code, data, row) for data in DATA for code in ("ours", "published")]
        if any(cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    p = Parser(__doc__, prog="baselines.py")
    p.add_argument("data", choices=DATA, nargs="?", help="no data set: the tables")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    if not args.data:
        keep(scores := collect())
        for which, name in enumerate(("at the best validation since lambda set in", "at the last step")):
            print(f"Test Dice, %, {name}\n\n{table(scores, which)}\n")
        return
    for seed in args.seeds:
        for row in args.rows:
            run(args.data, row, seed)


if __name__ == "__main__":
    main()
