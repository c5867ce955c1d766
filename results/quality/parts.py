"""What the parts of a dense g buy: members, views and temperature, on outputs of runs for cases
that nobody has learned from.

    python -m results.quality.parts runs/cvc.h5 --qp runs/q/cvc_0.2/dense/qp.pt \\
        runs/q/cvc_0.2/f_[012]/step*.pt

Prints Pearson r and MAE (no calibration) of each slice and class that is present, mean over the
runs.
"""

import itertools

import numpy as np
import torch

import evaluate
from data import h5, loading, metrics, tables
from data.options import Parser, cli
from models import checkpoints, inference
from models.checkpoints import load_checkpoint
from models.device import compute
from models.losses import one_hot
from models.quality import Seen, foreground, quality_target, resample, true_dice


def views_of(g):
    """Which of a dense g's views to ask. -> {name: slice of its views}"""
    if g.mask_dropout == 0:
        return {"mask shown": slice(0, 1)}
    if g.mask_dropout == 1:
        return {"mask withheld": slice(0, 1)}
    return {"mask withheld": slice(0, 1), "mask shown": slice(1, 2), "both views": slice(0, 2)}


def outputs(path, slices, rows, on):
    """Probabilities of a run for all slices. -> [slices, K, S, S]"""
    net = checkpoints.load_run(path, "student", on)[0]
    found = []
    for part in rows:
        image = slices.batch(part, on.device)[0]
        found.append(inference.class_probabilities(net, image, on).cpu())
    return torch.cat(found)


def answers(g, slices, p, rows, on, variants):
    """Dice that each variant of g expects of outputs. -> {variant: [slices, classes]}"""
    says = {variant: [] for variant in variants}
    views = views_of(g)
    for part in rows:
        image = slices.batch(part, on.device)[0]
        with on.autocast():
            seen = Seen.of_probabilities(image, p[part].to(on.device))
            logits = g.logits(seen)  # [members, views, B, K, S, S]
        small = resample(seen.mask.cpu(), g.size)
        for members, view, temperature in variants:
            asked = logits[:members, views[view]] / temperature
            belief = asked.softmax(3).mean((0, 1))[:, 1:].cpu()
            says[members, view, temperature].append(quality_target(small, belief))
    return {variant: torch.cat(parts).numpy() for variant, parts in says.items()}


@torch.no_grad()
def main():
    p = Parser(__doc__, prog="python -m results.quality.parts")
    p.add_argument("data", help="dataset file")
    p.add_argument("checkpoints", nargs="+", help="runs of train_ssl.py, all of one --size")
    p.add_argument("--qp", required=True, help="dense quality predictor")
    args = p.parse_args()
    on = compute()
    info = h5.read_info(args.data)
    g, _ = checkpoints.load_quality(args.qp, info, on)
    states = {path: load_checkpoint(path, "ssl") for path in args.checkpoints}
    size = states[args.checkpoints[0]]["args"]["size"]
    states[args.qp] = load_checkpoint(args.qp, "qp")
    slices = loading.load_slices(info, "train", size, evaluate.held_out(info, states))
    rows = torch.arange(len(slices)).split(32)
    truth = one_hot(slices.label, len(info.classes))[:, 1:]
    present = truth.flatten(2).any(2).numpy()

    members = sorted({1, len(g.members)})
    temperatures = sorted({1.0, g.temperature.item()})
    variants = list(itertools.product(members, views_of(g), temperatures))
    found = {variant: [] for variant in variants}
    for path in args.checkpoints:
        p = outputs(path, slices, rows, on)
        true = true_dice(foreground(p), truth).numpy()[present]
        for variant, says in answers(g, slices, p, rows, on, variants).items():
            found[variant].append(metrics.agreement(says[present], true))
    table = []
    for (count, view, temperature), runs in found.items():
        table.append(
            {
                "members": count,
                "view": view,
                "temperature": f"{temperature:.2f}",
                "Pearson": float(np.mean([run["pearson"] for run in runs])),
                "MAE": float(np.mean([run["mae"] for run in runs])),
            }
        )
    print(tables.markdown(table))


if __name__ == "__main__":
    cli(main)
