"""What the parts of a dense g buy: members, views and temperature, on outputs of runs for cases that nobody has learned from.

    python results/quality_parts.py DATA.h5 --qp runs/q/cvc_0.2/dense/qp.pt runs/q/cvc_0.2/f_[012]/step*.pt

Prints Pearson r and MAE (no calibration) of each slice and class that is present, mean over the runs.
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
from data import h5  # noqa: E402
from data.files import Parser, cli, load_checkpoint  # noqa: E402
from models.device import compute  # noqa: E402
from models.quality import foreground, quality_target, resample, true_dice  # noqa: E402
from models.losses import one_hot  # noqa: E402


@torch.no_grad()
def main():
    p = Parser(__doc__, prog="quality_parts.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("checkpoints", nargs="+", help="runs of train_ssl.py, all of one --size")
    p.add_argument("--qp", required=True, help="dense quality predictor")
    args = p.parse_args()
    on, info = compute(), h5.read_info(args.data)
    g, _ = evaluate.load_quality(args.qp, info, on)
    states = {path: load_checkpoint(path, "ssl") for path in args.checkpoints} | {args.qp: load_checkpoint(args.qp, "qp")}
    slices = h5.load_slices(info, "train", states[args.checkpoints[0]]["args"]["size"], evaluate.held_out(info, states))
    truth = one_hot(slices.label, len(info.classes))[:, 1:]
    present, members, fitted = truth.flatten(2).any(2).numpy(), len(g.members), g.temperature.item()
    views = ["withheld", "shown"] if 0 < g.mask_dropout < 1 else ["withheld" if g.mask_dropout else "shown"]
    picks = {f"mask {view}": slice(i, i + 1) for i, view in enumerate(views)} | ({"both views": slice(0, 2)} if len(views) > 1 else {})
    variants = [(m, name, t) for m in sorted({1, members}) for name in picks for t in sorted({1.0, fitted})]
    found = {v: [] for v in variants}
    for path in args.checkpoints:
        net = evaluate.load_run(path, "student", on)[0]
        mask = torch.cat([foreground(evaluate.probabilities(net, slices.batch(rows, on.device)[0], on)).cpu() for rows in torch.arange(len(slices)).split(32)])
        true, says = true_dice(mask, truth).numpy()[present], {v: [] for v in variants}
        for rows in torch.arange(len(slices)).split(32):
            with on.autocast():
                logits = g.logits(slices.batch(rows, on.device)[0], mask[rows].to(on.device))      # [M, V, B, K, S, S]
            seen = resample(mask[rows], g.size)
            for m, name, t in variants:
                q = quality_target(seen, (logits[:m, picks[name]] / t).softmax(3).mean((0, 1))[:, 1:].cpu())
                says[m, name, t].append(q)
        for v in variants:
            found[v].append(evaluate.agreement(torch.cat(says[v]).numpy()[present], true))
    print(evaluate.markdown([{"members": m, "view": name, "temperature": f"{t:.2f}", "Pearson": float(np.mean([a["pearson"] for a in found[m, name, t]])),
                              "MAE": float(np.mean([a["mae"] for a in found[m, name, t]]))} for m, name, t in variants]))


if __name__ == "__main__":
    cli(main)
