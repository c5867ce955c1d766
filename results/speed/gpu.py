"""What a GPU makes of training, in a few minutes. Tables, the most important first, row by row.

    bash results/gpu.sh [SECONDS]    the tests marked gpu, then this, in so many seconds (300)
    python -m results.speed.gpu --out runs/gpu [--seconds 240] [--only steps runs]

OUT/PART.md is written anew at each row, so that nothing is lost when the time is up. Without a GPU
the parts are the same at a tiny size, which says only that they run.
"""

import argparse
import contextlib
import copy
import csv
import io
import itertools
import os
import shlex
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.func import functional_call, stack_module_state, vmap

import models
import train_ssl
from data import loading, phantom, workers
from data.options import Parser, cli, number
from data.tables import markdown, write_text
from models.device import Compute, channels_last, compute, fused
from results.speed import benchmark

CLASSES = 4
INFO = SimpleNamespace(classes=range(CLASSES), color=False)  # what a step asks of the data


@dataclass
class Setting:
    """What is measured, and how large it is."""

    out: str
    on: Compute
    end: float  # by time.monotonic()
    size: int = 256
    batch: int = 12  # labeled, and as many unlabeled
    patch: str = "80,112,112"
    width: int = 16
    warm: int = 5  # steps before those that are timed
    count: int = 20  # steps that are timed together
    together: tuple = (1, 4, 12)  # runs at once
    steps: int = 300  # of a run
    sides: tuple = (64, 128, 256)
    masks: str = ""  # options of corrupt.py

    def left(self):
        """Seconds."""
        return self.end - time.monotonic()


TINY = dict(size=32, batch=2, patch="16,16,16", width=2, warm=0, count=1, steps=2, sides=(16, 32))
TINY["together"] = (1,)
TINY["masks"] = "--masks 2 --val-masks 1 --harvest-epochs 1 --harvest-steps 2"


def stepper(s, argv, batch=None, size=None):
    """A function that makes steps of a run with these options, each on other random numbers.

    None where --graph is given and cannot be.
    """
    shared = f"DATA --out OUT --qp QP --batch {batch or s.batch} --width {s.width} --strength 0.5"
    at_once = "--lam-warmup 0 --lam-ramp 0 --qar-warmup 0 --qar-ramp 0 --conf-threshold 0"
    more = ["--size", str(size or s.size), "--steps", "1000000", "--weight-threshold", "0"]
    args = train_ssl.parse_args([*shared.split(), *at_once.split(), *more, *argv])
    if args.graph and train_ssl.why_no_graph(s.on, args):
        return None
    grid = args.size if len(args.size) == 3 else 2 * args.size
    dims = len(grid)
    shape = dict(channels=1, classes=CLASSES, dims=dims)
    torch.manual_seed(0)
    g = None
    if args.qar or args.weight == "quality" or args.correct:
        half = tuple(max(16, side // 2) for side in grid)
        g = models.build("quality_dense", **shape, size=half, width=s.width)
        g = fused(s.on.place(g)).requires_grad_(False)
    network = dict(name=args.model or "unet", width=s.width, **shape)
    run = train_ssl.build_run(network, g, args, s.on, fresh=True)
    if args.graph:
        run.graph = train_ssl.graph_of(run, INFO, args)
    item = random_item(args.batch, grid, s.on.device)
    numbers = itertools.count(2)
    return lambda: train_ssl.whole_step(run, item, INFO, args, next(numbers))


def random_item(batch, grid, device):
    """What Feed gives, on the device: as many unlabeled images as labeled ones."""
    image = torch.randint(256, (batch, 1, *grid), dtype=torch.uint8, device=device)
    label = image[:, 0] // (256 // CLASSES)
    mean = torch.full((batch,), 128.0, device=device)
    std = torch.full((batch,), 74.0, device=device)
    labeled = loading.Fetched(image, label, mean, std)
    return labeled, labeled._replace(label=None), torch.ones(batch, device=device)


def seconds_of(s, step):
    """Seconds of a call: the mean of some, after those that warm up."""
    for _ in range(s.warm):
        step()
    benchmark.synchronize(s.on.device)
    start = time.perf_counter()
    for _ in range(s.count):
        step()
    benchmark.synchronize(s.on.device)
    return (time.perf_counter() - start) / s.count


def pair(s, version, argv, **size):
    """A row: milliseconds of a step, plain and with --graph."""
    plain = seconds_of(s, stepper(s, argv, **size))
    graph = stepper(s, [*argv, "--graph"], **size)
    replayed = seconds_of(s, graph) if graph else None
    return {
        "step": version,
        "ms": 1000 * plain,
        "ms with --graph": replayed and 1000 * replayed,
        "times as fast": replayed and plain / replayed,
    }


# ------------------------------------------------------------------------------ the parts
# part(setting) yields rows.

GUIDED = {
    "QW": "--weight quality --weight-level pixel",
    "QAR on a third": "--qar 0.01",
    "correction": "--correct",
}


def steps(s):
    """Whole steps with their augmentation, of slices."""
    yield pair(s, "mean_teacher", ["--method", "mean_teacher"])
    for name, more in GUIDED.items():
        yield pair(s, f"mean_teacher, {name}", ["--method", "mean_teacher", *more.split()])
    options = argparse.Namespace(size=s.size, batch=2 * s.batch, rounds=1, compile=False)
    info = SimpleNamespace(channels=1, classes=range(CLASSES))
    b = benchmark.Bench(options, None, info, s.on, None)
    plain = seconds_of(s, benchmark.plain_step_of(b))
    yield {"step": "plain float32 loop, no augmentation", "ms": 1000 * plain} | NO_GRAPH
    for method in train_ssl.METHODS:
        if method != "mean_teacher":
            yield pair(s, method, ["--method", method])


NO_GRAPH = {"ms with --graph": None, "times as fast": None}


def volumes(s):
    """Whole steps of V-Net on volumes."""
    size = ["--size", s.patch, "--model", "vnet"]
    for method, *more in (["mean_teacher"], ["mean_teacher", "--qar", "0.01"], ["ua_mt"]):
        yield pair(s, " ".join([method, *more]), ["--method", method, *more, *size], batch=2)


def growth(s):
    """Whole steps of mean teacher against side and batch."""
    for side in s.sides:
        yield pair(s, f"side {side}, batch 8", ["--method", "mean_teacher"], batch=4, size=side)
    for batch in (s.batch, 4 * s.batch):
        name = f"side {s.sides[0]}, batch {2 * batch}"
        yield pair(s, name, ["--method", "mean_teacher"], batch=batch, size=s.sides[0])


def members(s):
    """The members of a dense g, one after the other and in one pass of stacked weights.

    In one pass they need half of the kernels, but grouped convolutions: 1.7 to 2 times slower on a
    CPU. So the product has the loop.
    """
    for count in (1, 3, 5):
        torch.manual_seed(0)
        side = max(16, s.size // 2)
        shape = dict(channels=1, classes=CLASSES, size=side, width=s.width)
        g = models.build("quality_dense", **shape, members=count)
        g = fused(s.on.place(g)).requires_grad_(False)
        x = torch.randn(2 * s.batch, 1 + CLASSES, side, side, device=s.on.device)
        x = channels_last(x).requires_grad_()
        weights, buffers = stack_module_state(list(g.members))
        one = lambda w, b, g=g: functional_call(copy.copy(g.members[0]), (w, b), (x,))
        ways = {
            "loop": lambda g=g: torch.stack([member(x) for member in g.members]),
            "stacked": lambda one=one, w=weights, b=buffers: vmap(one)(w, b),
        }
        row = {"members": count}
        for name, ask in ways.items():
            row[f"ms, {name}"] = 1000 * seconds_of(s, lambda ask=ask: gradient(s, ask, x))
        yield row


def gradient(s, ask, x):
    """Answers, and their gradient to what was asked."""
    with s.on.autocast():
        answers = ask()
    torch.autograd.grad(answers.float().square().sum(), x)


def runs(s):
    """train_ssl.py as it is started, one run and several at once."""
    data = phantom_file(s)
    for together in s.together:
        for graph in ([], ["--graph"]):
            yield at_once(s, data, together, graph)


def stage1(s):
    """corrupt.py with default settings, 7 patients and 3 folds (goal: 60 s)."""
    argv = [phantom_file(s), "--out", os.path.join(s.out, "vqm"), "--size", str(s.size)]
    argv += ["--labeled", "7", "--folds", "3", "--device", str(s.on.device), "--overwrite"]
    argv += s.masks.split()
    command = [sys.executable, "corrupt.py", *argv]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=max(1, s.left()))
    yield {"stage": "corrupt.py", "seconds": time.perf_counter() - start}


def phantom_file(s):
    """A dataset file of the side that is measured. -> its path"""
    data = os.path.join(s.out, "phantom.h5")
    argv = f"--train 12 --val 4 --test 1 --depth 10 --size {s.size}".split()
    if not os.path.isfile(data):
        with contextlib.redirect_stdout(io.StringIO()):
            phantom.main(["--out", data, *argv])
    return data


def at_once(s, data, together, more):
    """A row of runs() for `together` runs."""
    outs = [os.path.join(s.out, f"run{i}") for i in range(together)]
    options = f"--labeled 7 --method mean_teacher --size {s.size} --batch {s.batch}"
    options += (
        f" --batch-unlabeled {s.batch} --width {s.width} --lam-warmup 0 --device {s.on.device}"
    )
    options += f" --steps {s.steps} --eval-every {s.steps // 2} --overwrite"
    command = [sys.executable, "train_ssl.py", data, *options.split(), *more]
    start = time.perf_counter()
    started = [
        subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL) for out in outs
    ]
    try:
        ended = [process.wait(max(1, s.left())) for process in started]
    finally:
        for process in started:
            process.kill()
    seconds = time.perf_counter() - start
    if any(ended):
        raise RuntimeError(f"a run of {shlex.join(command)} failed")
    last = []  # ms of the second half, when all are under way
    for out in outs:
        with open(os.path.join(out, "log.csv"), newline="") as f:
            last.append(float(list(csv.DictReader(f))[-1]["ms"]))
    ms = sum(last) / together
    return {
        "runs at once": together,
        "options": " ".join(more) or "-",
        "ms of a step": ms,
        "steps a second, all": 1000 * together / ms,
        "seconds from start to end": seconds,
    }


PARTS = {
    "steps": steps,
    "volumes": volumes,
    "runs": runs,
    "stage1": stage1,
    "growth": growth,
    "members": members,
}


def run_tests(s):
    """The tests marked gpu, as they end; at most 60 s."""
    seconds = str(int(min(60, s.left())))
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "tests/test_gpu.py"]
    command = ["timeout", "-s", "INT", seconds, *pytest]  # interrupted, pytest says what failed
    with (
        open(os.path.join(s.out, "tests.txt"), "w", encoding="utf-8") as f,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        for line in process.stdout:
            print(line, end="", flush=True)
            f.write(line)


def measure(s, name):
    """Makes a table, as far as time reaches, prints its rows and keeps them in a file."""
    rows = []
    made = PARTS[name](s)
    while s.left() > 0:
        try:
            row = next(made, None)
        except subprocess.TimeoutExpired:
            break
        except Exception:  # the time on a GPU is short, so the other parts go on
            traceback.print_exc()
            return
        if row is None:
            return
        rows.append(row)
        lines = markdown(rows)
        print(lines if len(rows) == 1 else lines.splitlines()[-1], flush=True)
        write_text(os.path.join(s.out, f"{name}.md"), lines + "\n")
    print(f"{name}: the time is up", flush=True)


def main(argv=None):
    p = Parser(__doc__, prog="python -m results.speed.gpu")
    p.add_argument("--out", required=True, help="folder of the tables")
    p.add_argument("--seconds", type=number(0, 1e6, float), default=240, help="for all parts")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    args = p.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    on = compute()
    end = time.monotonic() + args.seconds
    tiny = {} if on.device.type == "cuda" else TINY
    s = Setting(args.out, on, end, **tiny)
    print(f"{benchmark.processor(on.device)}, torch {torch.__version__}, {on}", flush=True)
    if on.device.type == "cuda":
        run_tests(s)
    for name in args.only:
        print(f"\n{PARTS[name].__doc__.splitlines()[0]}\n", flush=True)
        measure(s, name)


if __name__ == "__main__":
    workers.forget_script()
    cli(main)
