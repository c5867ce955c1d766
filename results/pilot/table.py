"""Compares quality predictors on the same real outputs: those of one reference vqm.h5, made with a
seed of its own.

    python -m results.pilot.table runs/ph2.h5 --reference runs/e/ph2/reference/vqm.h5 \\
        runs/e/ph2/qp_*/qp.pt --out runs/e/ph2/quality.md
"""

import os

from data import h5, loading, metrics, quality_masks, tables
from data.options import Parser, cli
from models import checkpoints, inference
from models.checkpoints import load_checkpoint
from models.device import compute


def main():
    p = Parser(__doc__, prog="python -m results.pilot.table")
    p.add_argument("data", help="dataset file")
    p.add_argument("qp", nargs="+", help="quality predictors")
    p.add_argument("--reference", required=True, help="vqm.h5 whose /val and /real are the test")
    p.add_argument("--out", help="Markdown file to write")
    args = p.parse_args()
    info = h5.read_info(args.data)
    on = compute()
    rows = []
    for path in args.qp:
        g, _ = checkpoints.load_quality(path, info, on)
        size = load_checkpoint(path, "qp")["args"]["size"]
        side = size and loading.network_grid(info, size)
        name = os.path.basename(os.path.dirname(path))
        for split, title in (("val", "synthetic"), ("real", "real outputs")):
            masks = quality_masks.load(args.reference, split, info, side)
            found = inference.estimate_masks(g, masks, on)
            rows += metrics.quality_rows(f"{name}, {title}", *found, info.classes)
    text = tables.markdown(rows)
    print(text)
    if args.out:
        tables.write_text(args.out, text + "\n")


if __name__ == "__main__":
    cli(main)
