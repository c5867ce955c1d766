"""Volumes against plain baselines, in one run: inference of a whole volume, and metrics. Prints a table of ratios.

    python results/volumes_benchmark.py runs/la.h5 runs/la_full/best.pt [--case 1] [--half]

The loop over patches is written as the public baselines of the left atrium do: one patch of 80 x 112 x 112 at a time, stride 4 x 18 x 18, float32,
the map of scores in numpy. --half: the same for volumes at half resolution, patches and stride halved. medpy's metrics are its four separate calls.
"""
import functools
import itertools
import os
import sys
import time

import numpy as np
import torch
from medpy.metric import binary

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
from data import h5  # noqa: E402
from data.files import Parser, cli, number  # noqa: E402
from models.device import compute  # noqa: E402


def timed(f, repeat=1):
    """The shortest of `repeat` times, and what f returned."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        value = f()
        times.append(time.perf_counter() - start)
    return min(times), value


@torch.no_grad()
def plain_loop(net, x, size, stride):
    """The loop over patches of the public baselines. x (D, H, W) -> label (D, H, W), number of patches"""
    score, count = np.zeros((2, *x.shape), np.float32), np.zeros(x.shape, np.float32)
    steps = [int(np.ceil((n - s) / t)) + 1 for n, s, t in zip(x.shape, size, stride)]
    for step in itertools.product(*map(range, steps)):
        part = tuple(slice(a, a + s) for a, s in zip((min(t * i, n - s) for t, i, n, s in zip(stride, step, x.shape, size)), size))
        p = torch.softmax(net(torch.from_numpy(x[part][None, None])), 1)[0].numpy()
        score[(slice(None), *part)] += p
        count[part] += 1
    return (score / count).argmax(0).astype(np.uint8), int(np.prod(steps))


def main():
    p = Parser(__doc__, prog="volumes_benchmark.py")
    p.add_argument("data", help="left atrium, full resolution")
    p.add_argument("checkpoint", help="V-Net run of train_ssl.py")
    p.add_argument("--case", type=number(0), default=1, help="which val volume")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision of ours; the baseline is float32")
    p.add_argument("--half", action="store_true", help="the volumes were made with --shrink 2")
    args = p.parse_args()
    size, stride = ((40, 56, 56), (2, 9, 9)) if args.half else ((80, 112, 112), (4, 18, 18))
    info, on = h5.read_info(args.data), compute("cpu", args.amp)
    entry = info.entries("val")[args.case]
    cases = evaluate.Cases(info, "val", size, [entry.name])
    (_, (volume, mean, std), truth), = cases
    print(f"{entry.name}, {' x '.join(map(str, entry.grid))}; {on}, {torch.get_num_threads()} threads")
    plain = evaluate.load_run(args.checkpoint, "student", compute("cpu", "off"))[0].to(memory_format=torch.contiguous_format)
    x = ((volume - mean) / std).astype(np.float32)
    base, (loop, patches) = timed(functools.partial(plain_loop, plain, x, size, stride))
    net, rows = evaluate.load_run(args.checkpoint, "student", on)[0], []
    show = lambda label: f"Dice {100 * evaluate.dice(label > 0, truth > 0):.2f}"
    rows.append({"what": f"one patch at a time, {patches} patches", "seconds": base, "ratio": 1.0, "result": show(loop)})
    half, whole = evaluate.Window(size, tuple(n // 2 for n in size)), evaluate.Window(size, size, whole=True)
    for name, cut in ((f"--stride {','.join(map(str, stride))} --blend uniform", evaluate.Window(size, stride, False)),
                      ("--window sliding (default)", half), ("--window whole", whole)):
        seconds, label = timed(lambda: next(evaluate.predict_cases(net, cases, on, cut))[1], 1 if cut.stride == stride else 3)
        rows.append({"what": name, "seconds": seconds, "ratio": base / seconds,
                     "result": f"{show(label)}, Dice with the loop {100 * evaluate.dice(label > 0, loop > 0):.2f}"})

    true = truth > 0
    for name, mask in (("the loop's output", loop > 0), ("the truth moved by 3 voxels", np.roll(true, (3, 3, 3), (0, 1, 2)))):
        base, theirs = timed(lambda: (binary.dc(mask, true), binary.jc(mask, true), binary.hd95(mask, true), binary.asd(mask, true)), 5)
        seconds, ours = timed(lambda: evaluate.score(mask, true, entry.spacing), 5)
        text = lambda values: " ".join(f"{v:.6f}" for v in values)
        rows += [{"what": f"medpy's dc, jc, hd95, asd of {name}", "seconds": base, "ratio": 1.0, "result": text(theirs)},
                 {"what": "evaluate.score", "seconds": seconds, "ratio": base / seconds, "result": text((ours.dice, ours.jaccard, ours.hd95, ours.asd))}]
    print(evaluate.markdown(rows))


if __name__ == "__main__":
    cli(main)
