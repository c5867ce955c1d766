"""Is the demo's gain knowledge of quality, or does any second network teach f as well?

    python -m results.demo.distillation 0 1 2 3 4

For each seed, a second supervised network takes the place of g in the demo's guided run. It is a
U-Net like f and g, has the same labels, another seed, and has never seen a mask. It is trained as
long as g, and with its augmentation. All else is as in the demo.

Reads  the Makefile, for the demo's commands.
Writes runs/distillation/SEED/: the phantom; second/ and distilled/, runs of train_ssl.py; table/,
       their scores on test. What is finished is not done again.
"""

import os
import shlex
import subprocess

import numpy as np

import evaluate
import train_ssl
from data import phantom
from data.files import InputError
from data.options import Parser, cli
from data.tables import markdown
from models import checkpoints
from models.device import compute, fused
from results.demo.conclusion import dice_of, read
from results.evidence.controls import Ensemble, stand_in

FOLDER = "runs/distillation"
AS_G = "--steps 560 --batch 16 --lr 1e-3 --strength 1 --geometry 2"  # as `make demo` trains g


def commands(seed):
    """The demo's arguments. -> {the last part of --out: [argument, ...]}"""
    shown = ["make", "-n", "-B", "demo", f"SEED={seed}", f"FOLDER={FOLDER}/demo"]
    text = subprocess.run(shown, capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        words = shlex.split(line.split(" > ")[0]) if " --out " in line else []
        if words and "python" in words[0]:
            out = words[words.index("--out") + 1]
            start = 3 if words[1] == "-m" else 2
            found[os.path.basename(out)] = words[start:]
    if "guided" not in found:
        raise InputError(f"{' '.join(shown)}: shows no guided run; run it in the project's folder")
    return found


def changed(words, **options):
    """Arguments with other values of some options."""
    words = list(words)
    for name, value in options.items():
        words[words.index(f"--{name}") + 1] = value
    return words


def distill(seed):
    """Trains and scores the runs. -> {run: Dice on test}"""
    out = f"{FOLDER}/{seed}"
    argv, data = commands(seed), f"{out}/phantom.h5"
    os.makedirs(out, exist_ok=True)
    if not os.path.isfile(data):
        phantom.main(changed(argv["phantom.h5"], out=data))
    second, distilled = f"{out}/second", f"{out}/distilled"
    words = changed(argv["supervised"], out=second, seed=str(100 + seed))
    train_ssl.main([data, *words[1:], *AS_G.split()])
    on = compute("auto", "off", False)
    net = fused(checkpoints.load_run(f"{second}/best.pt", "student", on)[0])
    with stand_in(Ensemble([net])):
        words = changed(argv["guided"], out=distilled, qp=f"{second}/best.pt")
        train_ssl.main([data, *words[1:]])
    best = [f"{run}/best.pt" for run in (second, distilled)]
    evaluate.main([data, *best, "--split", "test", "--out", f"{out}/table", "--pictures", "0"])
    _, values = dice_of(read(f"{out}/table")[0])
    of_runs = (f"{np.mean([*dice.values()]):.2f}" for dice in values.values())
    return dict(zip(("the second network itself", "taught by it"), of_runs))


def main(argv=None):
    p = Parser(__doc__, prog="python -m results.demo.distillation")
    p.add_argument("seeds", nargs="+", type=int)
    print(markdown([{"seed": seed} | distill(seed) for seed in p.parse_args(argv).seeds]))


if __name__ == "__main__":
    cli(main)
