"""What does --foreground do for a small class, and for the others? (README.md)

    python -m results.foreground.run scar     # all runs that are missing, then the table
    python -m results.foreground.run heart --methods supervised --shares 0 1/3 --seeds 0 1 2

Makes  runs/foreground/scar-SEED.h5, heart-SEED.h5; data.ssl4mis makes runs/acdc3d.h5, runs/la2.h5.
Writes runs/foreground/DATA-METHOD-SHARE-SEED/: a run of train_ssl.py, its scores at the last step.
"""

import json
import os
from fractions import Fraction

import numpy as np

import evaluate
import train_ssl
from data import h5, loading, phantom
from data.options import Parser, cli
from data.tables import markdown

OUT = "runs/foreground"
PHANTOM = "--rare --dims 3 --depth 32 --train 24 --val 4 --test 16"
COMMON = "--width 8 --dropout 0 --lr 3e-3 --batch 4 --batch-unlabeled 2 --lam-warmup 0.4"
DATA = {  # the split that scores; options of train_ssl.py
    "scar": ("test", "--labeled 12 --size 16,24,24 --steps 600 --eval-every 200"),
    "heart": ("test", "--labeled 12 --size 16,24,24 --steps 1200 --eval-every 400"),
    "acdc3d": ("val", "--labeled 7 --size 16,48,48 --steps 600 --eval-every 600 --window whole"),
    "la2": ("val", "--labeled 4 --size 16,32,32 --steps 600 --eval-every 600 --window whole"),
}


def make_data(data, seed):
    """The file of a seed, made unless it is there. -> its path"""
    path = f"{OUT}/{data}-{seed}.h5"
    if data not in ("scar", "heart"):
        return f"runs/{data}.h5"
    if os.path.isfile(path):
        return path
    os.makedirs(OUT, exist_ok=True)
    side = "48" if data == "heart" else "64"
    phantom.main(["--out", path, *PHANTOM.split(), "--size", side, "--seed", str(seed)])
    if data == "scar":
        alone(path)
    return path


def alone(path):
    """Makes the heart background in a file of phantoms, so that the scar is the only class."""
    info = h5.read_info(path)
    cases = [
        h5.Case(split, case.name, case.image[0], np.uint8(case.label == 4), case.name)
        for split in info.splits
        for case in loading.whole_cases(info, split)
    ]
    about = dict(name="scar", classes=["background", phantom.RARE], dims=3, channels=1)
    h5.write(path, cases, **about)


def run(data, method, share, seed):
    """Trains and scores one run, unless that is done. -> {column: Dice in %}"""
    split, options = DATA[data]
    path = make_data(data, seed)
    out = f"{OUT}/{data}-{method}-{share.replace('/', 'of')}-{seed}"
    if not os.path.isfile(f"{out}/{split}/summary.md"):  # evaluate.py writes it last
        ours = ["--method", method, "--foreground", f"{float(Fraction(share)):.4f}"]
        given = [*COMMON.split(), *options.split(), *ours, "--seed", str(seed)]
        train_ssl.main([path, "--out", out, *given, "--resume"])
        scored = ["--split", split, "--out", f"{out}/{split}", "--pictures", "0"]
        evaluate.main([path, f"{out}/last.pt", *scored])
    with open(f"{out}/{split}/summary.json") as f:
        row = json.load(f)["rows"][0]
    return {name: value[0] for name, value in row.items() if name.startswith("Dice %")}


def main():
    p = Parser(__doc__, prog="python -m results.foreground.run")
    p.add_argument("data", choices=DATA)
    p.add_argument("--methods", nargs="+", default=["supervised", "mean_teacher"])
    p.add_argument("--shares", nargs="+", default=["0", "1/3"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    rows = {(method, share): [] for method in args.methods for share in args.shares}
    for seed in args.seeds:
        for method, share in rows:
            rows[method, share].append(run(args.data, method, share, seed))
    lines = []
    for (method, share), found in rows.items():
        scores = {name: [one[name] for one in found] for name in found[0]}
        lines.append({"method": method, "--foreground": share} | scores)
    print(markdown(lines))


if __name__ == "__main__":
    cli(main)
