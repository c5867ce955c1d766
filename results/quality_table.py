"""Compares quality predictors on the same real outputs: those of one reference vqm.h5, made with a seed of its own.

    python results/quality_table.py DATA.h5 --reference runs/e/ph2/reference/vqm.h5 runs/e/ph2/qp_*/qp.pt [--out FILE.md]
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
from data import h5, vqm  # noqa: E402
from data.files import Parser, cli, load_checkpoint  # noqa: E402
from models.device import compute  # noqa: E402


def main():
    p = Parser(__doc__, prog="quality_table.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("qp", nargs="+", help="quality predictors")
    p.add_argument("--reference", required=True, help="vqm.h5 whose /val and /real are the test")
    p.add_argument("--out", help="Markdown file to write")
    args = p.parse_args()
    info, on, rows = h5.read_info(args.data), compute(), []
    for path in args.qp:
        g, _ = evaluate.load_quality(path, info, on)
        for split, title in (("val", "synthetic"), ("real", "real outputs")):
            masks = vqm.load(args.reference, split, info, load_checkpoint(path, "qp")["args"]["size"])
            found = evaluate.estimate_masks(g, masks, on)
            rows += evaluate.quality_rows(f"{os.path.basename(os.path.dirname(path))}, {title}", *found, info.classes)
    text = evaluate.markdown(rows)
    print(text)
    if args.out:
        evaluate.write_text(args.out, text + "\n")


if __name__ == "__main__":
    cli(main)
