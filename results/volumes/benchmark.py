"""Volumes against plain baselines, in one run: inference of a whole volume, and metrics. Prints a
table of ratios.

    python -m results.volumes.benchmark runs/la.h5 runs/la_full/best.pt [--case 1] [--half]

The loop over patches is written as the public baselines of the left atrium do: one patch of
80 x 112 x 112 at a time, stride 4 x 18 x 18, float32, the map of scores in numpy. --half is the
same for volumes at half resolution, with patches and stride halved. medpy's metrics are its four
separate calls.
"""

import itertools
import time

import numpy as np
import torch
from medpy.metric import binary

from data import h5, metrics, tables
from data.options import Parser, cli, number
from models import checkpoints, inference
from models.device import compute


def timed(f, repeat=1):
    """The shortest of `repeat` times, and what f returned."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        value = f()
        times.append(time.perf_counter() - start)
    return min(times), value


def windows(shape, size, stride):
    """Where the patches of the public baselines lie: a tuple of slices for each."""
    along_axes = []
    for n, side, step in zip(shape, size, stride):
        count = int(np.ceil((n - side) / step)) + 1
        starts = [min(step * i, n - side) for i in range(count)]
        along_axes.append([slice(start, start + side) for start in starts])
    return list(itertools.product(*along_axes))


@torch.no_grad()
def plain_loop(net, x, size, stride):
    """The loop over patches of the public baselines. x (D, H, W) -> label (D, H, W)"""
    score = np.zeros((2, *x.shape), np.float32)
    count = np.zeros(x.shape, np.float32)
    for part in windows(x.shape, size, stride):
        patch = torch.from_numpy(x[part][None, None])
        p = torch.softmax(net(patch), 1)[0].numpy()
        score[(slice(None), *part)] += p
        count[part] += 1
    return (score / count).argmax(0).astype(np.uint8)


def row(what, seconds, base, result):
    return {"what": what, "seconds": seconds, "ratio": base / seconds, "result": result}


def predicting(args, on, cases, size, stride):
    """Lines of the table for the label of a volume, and the label by the plain loop."""
    ((_, (volume, mean, std), truth),) = cases
    x = ((volume[0] - mean) / std).astype(np.float32)  # of one channel
    plain = checkpoints.load_run(args.checkpoint, "student", compute("cpu", "off"))[0]
    plain = plain.to(memory_format=torch.contiguous_format)
    base, loop = timed(lambda: plain_loop(plain, x, size, stride))
    patches = len(windows(x.shape, size, stride))
    dice = lambda label, other: f"{100 * metrics.dice(label > 0, other > 0):.2f}"
    title = f"one patch at a time, {patches} patches"
    rows = [row(title, base, base, f"Dice {dice(loop, truth)}")]

    net = checkpoints.load_run(args.checkpoint, "student", on)[0]
    steps = ",".join(map(str, stride))
    cuts = {
        f"--stride {steps} --blend uniform": inference.Window(size, stride, False),
        "--window sliding (default)": inference.Window(size, tuple(n // 2 for n in size)),
        "--window whole": inference.Window(size, size, whole=True),
    }
    for name, cut in cuts.items():
        predict = lambda: next(inference.predict_cases(net, cases, on, cut))[1]
        seconds, label = timed(predict, 1 if cut.stride == stride else 3)
        result = f"Dice {dice(label, truth)}, Dice with the loop {dice(label, loop)}"
        rows.append(row(name, seconds, base, result))
    return rows, loop


def scoring(name, mask, true, spacing):
    """Lines of the table for medpy's metrics of a mask and ours."""
    theirs = (binary.dc, binary.jc, binary.hd95, binary.asd)
    text = lambda values: " ".join(f"{v:.6f}" for v in values)
    base, found = timed(lambda: [metric(mask, true) for metric in theirs], 5)
    first = row(f"medpy's dc, jc, hd95, asd of {name}", base, base, text(found))
    seconds, ours = timed(lambda: metrics.score(mask, true, spacing), 5)
    values = (ours.dice, ours.jaccard, ours.hd95, ours.asd)
    return [first, row("metrics.score", seconds, base, text(values))]


def main():
    p = Parser(__doc__, prog="python -m results.volumes.benchmark")
    p.add_argument("data", help="left atrium, full resolution")
    p.add_argument("checkpoint", help="V-Net run of train_ssl.py")
    p.add_argument("--case", type=number(0), default=1, help="which val volume")
    p.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="mixed precision of ours; the baseline is float32",
    )
    p.add_argument("--half", action="store_true", help="the volumes were made with --shrink 2")
    args = p.parse_args()
    size = (40, 56, 56) if args.half else (80, 112, 112)
    stride = (2, 9, 9) if args.half else (4, 18, 18)
    info = h5.read_info(args.data)
    on = compute("cpu", args.amp)
    entry = info.entries("val")[args.case]
    cases = inference.Cases(info, "val", size, [entry.name])
    grid = " x ".join(map(str, entry.grid))
    print(f"{entry.name}, {grid}; {on}, {torch.get_num_threads()} threads")

    rows, loop = predicting(args, on, cases, size, stride)
    ((_, _, truth),) = cases
    true = truth > 0
    moved = np.roll(true, (3, 3, 3), (0, 1, 2))
    rows += scoring("the loop's output", loop > 0, true, entry.spacing)
    rows += scoring("the truth moved by 3 voxels", moved, true, entry.spacing)
    print(tables.markdown(rows))


if __name__ == "__main__":
    cli(main)
