"""What is fast, beside a plain loop that does the same, in one run. Prints a table of ratios, and
how time and memory grow with size.

    python -m results.speed.benchmark runs/acdc.h5 --out runs/benchmark [--device cuda]
        [--only step guidance] [--large 10]

The plain versions are written as the public 2D baselines of semi-supervised segmentation do it:
float32, contiguous memory, images augmented one by one, each weight averaged by itself, losses read
back in every step, slices predicted one by one, medpy's metrics called one by one. Versions take
turns, round after round, and the shortest time of each counts. DATA.h5 is a file that is segmented
slice by slice.
"""

import copy
import csv
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

import evaluate
import models
import train_ssl
from data import h5, loading, metrics, workers
from data.files import InputError
from data.options import Parser, cli, number
from data.tables import markdown
from models import inference
from models.device import Compute, channels_last, compiled, compute, device_name, fused
from models.losses import one_hot

GIGABYTE = 2**30


def rounds(versions, count, device):
    """The shortest of `count` times of each version, which take turns.

    versions: {name: function} -> {name: seconds}
    """
    best = dict.fromkeys(versions, float("inf"))
    for i in range(count + 1):  # the first round warms up
        for name, f in versions.items():
            synchronize(device)
            start = time.perf_counter()
            f()
            synchronize(device)
            if i:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def line_of(part, version, seconds, ratio):
    return {"part": part, "version": version, "seconds": seconds, "ratio": ratio}


def lines_of(part, seconds, base):
    """Lines of the table; ratio: how many times sooner than `base`."""
    return [line_of(part, name, s, seconds[base] / s) for name, s in seconds.items()]


# ------------------------------------------------------------------------------ plain versions


class PlainSlices(torch.utils.data.Dataset):
    """Slices in memory, augmented one by one: a quarter turn and a flip, or a rotation by up to 20
    degrees, then zoomed to the network's side."""

    def __init__(self, info, names, size):
        self.size = size
        self.items = []
        with h5.open_file(info.path) as f:
            for name in names:
                image, label = h5.read_case(f, info, "train", name)
                self.items += list(zip(image, label))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image, label = self.items[i]
        change = lambda v: v
        if np.random.rand() > 0.5:
            turns = np.random.randint(4)
            axis = np.random.randint(2)
            change = lambda v: np.flip(np.rot90(v, turns), axis).copy()
        elif np.random.rand() > 0.5:
            angle = np.random.randint(-20, 20)
            change = lambda v: ndimage.rotate(v, angle, order=0, reshape=False)
        image = zoomed(change(image), self.size)
        label = zoomed(change(label), self.size)
        image = torch.from_numpy(image.astype(np.float32))[None]
        return image, torch.from_numpy(label.astype(np.int64))


def zoomed(v, size):
    """A slice with both sides changed to `size`."""
    return ndimage.zoom(v, [size / n for n in v.shape], order=0)


def plain_step(net, teacher, optimizer, image, label, step):
    """Mean teacher on a batch whose first images have labels."""
    labeled = len(label)
    noise = torch.clamp(torch.randn_like(image[labeled:]) * 0.1, -0.2, 0.2)
    logits = net(image)
    p = torch.softmax(logits, 1)
    with torch.no_grad():
        target = torch.softmax(teacher(image[labeled:] + noise), 1)
    dice = 0
    for k in range(p.shape[1]):
        a = p[:labeled, k]
        b = (label == k).float()
        squares = (a * a).sum() + (b * b).sum()
        dice = dice + 1 - (2 * (a * b).sum() + 1e-5) / (squares + 1e-5)
    loss_ce = F.cross_entropy(logits[:labeled], label)
    loss_dice = dice / p.shape[1]
    consistency = ((p[labeled:] - target) ** 2).mean()
    loss = 0.5 * (loss_ce + loss_dice) + 0.1 * consistency
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    alpha = min(1 - 1 / (step + 1), 0.99)
    for mine, theirs in zip(teacher.parameters(), net.parameters()):
        mine.data.mul_(alpha).add_(theirs.data, alpha=1 - alpha)
    return loss.item(), loss_ce.item(), loss_dice.item(), consistency.item()


@torch.no_grad()
def plain_evaluation(net, info, size, names, device):
    """Slice by slice to the network's side and back, then medpy's four metrics, class by class."""
    from medpy.metric import binary  # only this part needs it

    four = (binary.dc, binary.jc, binary.hd95, binary.asd)
    table = []
    with h5.open_file(info.path) as f:
        for name in names:
            image, label = h5.read_case(f, info, "val", name)
            out = np.zeros_like(label)
            for z in range(len(image)):
                x = (zoomed(image[z], size) - image.mean()) / image.std()
                x = torch.from_numpy(x).float()[None, None].to(device)
                p = torch.softmax(net(x), 1).argmax(1)[0].cpu().numpy()
                back = [n / size for n in image[z].shape]
                out[z] = ndimage.zoom(p, back, order=0)
            for k in range(1, len(info.classes)):
                table.append(plain_scores(out == k, label == k, four))
    return table


def plain_scores(a, b, four):
    if not (a.any() and b.any()):
        return [0, 0, 0, 0]
    return [metric(a, b) for metric in four]


# ------------------------------------------------------------------------------ the parts


@dataclass
class Bench:
    """What all parts share."""

    args: object
    run: object  # options of a mean-teacher run at --size, with --batch images, half labeled
    info: h5.Info
    on: Compute
    feed: train_ssl.Feed

    def timed(self, versions, count=None):
        return rounds(versions, count or self.args.rounds, self.on.device)

    def network(self):
        torch.manual_seed(0)
        classes = len(self.info.classes)
        return self.on.place(models.build("unet", channels=self.info.channels, classes=classes))


AT_ONCE = "--lam-warmup 0 --lam-ramp 0 --qar-warmup 0 --qar-ramp 0".split()


def prepare(args):
    """The data, options and feed that all parts share. -> Bench"""
    half = args.batch // 2
    options = f"--method mean_teacher --size {args.size} --batch {half} --batch-unlabeled {half}"
    words = [args.data, "--out", args.out, "--labeled", args.labeled, *options.split()]
    run = train_ssl.parse_args([*words, *AT_ONCE, "--steps", "1000000"])
    info = h5.read_info(args.data)
    on = compute(args.device, args.amp)
    if info.dims != 2:
        raise InputError(
            f"{args.data}: is segmented in 3D; this benchmark takes slices "
            "(volumes: results/volumes/benchmark.py)"
        )
    train_ssl.set_defaults(run, info)
    feed = train_ssl.Feed(*train_ssl.load_data(info, run, on), run)
    return Bench(args, run, info, on, feed)


def step_of(b, side=None, batch=None, g=None, **changes):
    """A function that makes one step of our training, on random images that are there."""
    run = copy.copy(b.run)
    vars(run).update(changes)
    side = side or b.args.size
    half = (batch or b.args.batch) // 2
    K = len(b.info.classes)
    net = b.network().train()
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    if b.args.compile:
        net = compiled(net)
        teacher = compiled(teacher)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    state = train_ssl.Run([net], teacher, g, optimizer, b.on.scaler(), b.on)

    def image():
        x = torch.randn(half, b.info.channels, side, side, device=b.on.device)
        return channels_last(x)

    label = torch.randint(K, (half, side, side), device=b.on.device)
    batch = train_ssl.Batch(image(), one_hot(label, K), image(), image(), image())
    return lambda: train_ssl.train_step(state, batch, run, 1000)


def plain_step_of(b):
    """A step of mean teacher as the public baselines write it. -> a function without arguments"""
    half = b.args.batch // 2
    size = b.args.size
    net = b.network().to(memory_format=torch.contiguous_format).train()
    teacher = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    image = torch.randn(2 * half, b.info.channels, size, size)
    label = torch.randint(len(b.info.classes), (half, size, size))

    def step():
        x = image.to(b.on.device)
        y = label.to(b.on.device)
        return plain_step(net, teacher, optimizer, x, y, 1000)

    return step


def feeding(b):
    """A batch of half labeled and half unlabeled images, augmented, on the device."""
    labeled = list(dict.fromkeys(b.feed.labeled.case))
    plain = PlainSlices(b.info, labeled, b.args.size)
    step = iter(range(1, 10**9))

    def one_by_one():
        picked = np.random.randint(len(plain), size=b.args.batch)
        x, y = zip(*(plain[i] for i in picked))
        return torch.stack(x).to(b.on.device), torch.stack(y).to(b.on.device)

    def views():
        return train_ssl.views(b.feed[next(step)], b.info, b.run, b.on.device)

    base = "one by one: a turn or rotation of each image"
    ours = "ours: affine, and two views of contrast, gamma, blur and noise"
    seconds = b.timed({base: one_by_one, ours: views})
    whole = seconds[ours] + b.timed({"step": step_of(b)})["step"]
    share = f"{100 * seconds[ours] / whole:.1f}%"
    last = line_of("feeding", f"ours, with the step that it feeds: {share} is feeding", whole, None)
    return [*lines_of("feeding", seconds, base), last]


def stepping(b):
    """A mean-teacher step on a batch that is there."""
    base = "plain, float32"
    seconds = b.timed({base: plain_step_of(b), f"ours, {b.on}": step_of(b)})
    return lines_of("step", seconds, base)


def guidance(b):
    """What a dense g of three U-Nets adds to a mean-teacher step, at f's side and at half of it."""
    versions = {"mean teacher": step_of(b)}
    sides = {"g at f's side": b.args.size, "g at half of it": b.args.size // 2}
    for name, side in sides.items():
        g = models.build(
            "quality_dense", channels=b.info.channels, classes=len(b.info.classes), size=side
        )
        g = fused(b.on.place(g)).requires_grad_(False)
        versions[f"QW, {name}"] = step_of(b, g=g, weight="quality", weight_threshold=0.0)
        versions[f"QAR on all images, {name}"] = step_of(b, g=g, qar=0.01, qar_share=1.0)
        versions[f"QAR on a third, {name}"] = step_of(b, g=g, qar=0.01, qar_share=1 / 3)
    seconds = b.timed(versions)
    base = seconds["mean teacher"]
    lines = []
    for name, s in seconds.items():
        cost = f"{100 * (s / base - 1):+.0f}%"
        lines.append(line_of("guidance", f"{name}: {cost}", s, base / s))
    return lines


def evaluation(b):
    """Every val volume to its scores, by an untrained network."""
    net = b.network().eval()
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    names = [e.name for e in b.info.entries("val")]
    size = b.args.size
    base = "slice by slice, medpy's metrics"
    with evaluate.scoring_pool(2, 10**9) as pool:
        seconds = b.timed(
            {
                base: lambda: plain_evaluation(plain, b.info, size, names, b.on.device),
                "ours, in one process": lambda: our_scores(b, net, names, size),
                "ours, two processes for the scores": lambda: our_scores(b, net, names, size, pool),
            },
            1,
        )
    return lines_of("evaluation", seconds, base)


def our_scores(b, net, names, size, pool=None):
    cases = inference.Cases(b.info, "val", size, names)
    K = len(b.info.classes)
    predicted = inference.predict_cases(net, cases, b.on)
    calls = evaluate.Calls(metrics.score_case, pool, 4)
    for entry, label, truth in predicted:
        calls.add(label, truth, entry.spacing, K)
    return calls.results()


def processes(b):
    """Milliseconds of a step in the log of one training at half of --size, on CPUs: two processes
    of a core each, and one process."""
    out = os.path.join(b.args.out, "processes")
    command = [
        *("train_ssl.py", b.args.data, "--out", out, "--labeled", b.args.labeled),
        *f"--method mean_teacher --size {b.args.size // 2} --batch 12 --batch-unlabeled 12".split(),
        *"--lam-warmup 0 --lam-ramp 0 --steps 12 --eval-every 4 --device cpu --overwrite".split(),
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    base = "one process, one core"
    launches = [
        (base, [], 1),
        ("one process, two cores", [], 2),
        ("torchrun --nproc_per_node=2", torchrun, 1),
    ]
    seconds = {}
    for name, launch, threads in launches:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        argv = [sys.executable, *launch, *command]
        subprocess.run(argv, check=True, capture_output=True, env=env)
        with open(os.path.join(out, "log.csv"), newline="") as f:
            seconds[name] = min(float(row["ms"]) for row in csv.DictReader(f)) / 1000
    return lines_of("processes", seconds, base)


def growth(b):
    """Time and memory against size; the exponent is the slope of a line through the logarithms."""
    net = b.network().eval()
    train = [e.name for e in b.info.entries("train")]
    val = [e.name for e in b.info.entries("val")]
    once = lambda f, count=1: b.timed({0: f}, count)[0]
    step = lambda side, batch: once(step_of(b, side, batch), b.args.rounds)
    read = lambda n: loading.load_slices(b.info, "train", 128, train[:n])
    few = numbers_up_to(len(val))
    many = numbers_up_to(len(train))
    found = {
        "seconds of a step, batch 8, against its side": {
            s: step(s, 8) for s in (64, 96, 128, 192, 256)
        },
        "seconds of a step of side 128, against its batch": {
            n: step(128, n) for n in (4, 8, 16, 32)
        },
        "seconds of scoring volumes at side 96, against their number": {
            n: once(lambda: our_scores(b, net, val[:n], 96)) for n in few
        },
        "seconds of reading volumes at side 128, against their number": {
            n: once(lambda: read(n)) for n in many
        },
        "bytes of volumes in memory at side 128, against their number": {
            n: read(n).image.nbytes for n in many
        },
    }
    lines = []
    for name, values in found.items():
        slope, _ = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)
        listed = ", ".join(f"{size}: {value:.3g}" for size, value in values.items())
        lines.append({"growth of": name, "exponent": float(slope), "values": listed})
    return lines


def numbers_up_to(most):
    """The last four powers of two, 64 or less, that are not above `most`."""
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most][-4:]


# ------------------------------------------------------------------------------ a large file

PEAK = """import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print("peak", resource.getrusage(who).ru_maxrss)
"""


def large_cases(size):
    """Cases of about `size` bytes together; their noise cannot be compressed."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 512, 512), np.uint8)  # 10 MB
    label = np.zeros((40, 512, 512), np.uint8)
    label[:, 100:300, 100:300] = 1
    for i in range(int(size / noise.size)):
        split = "val" if i < 2 else "train"
        yield h5.Case(
            split=split,
            name=f"case{i}",
            image=np.roll(noise, i, 1),
            label=label,
            patient=f"patient{i}",
        )


def large(args):
    """Trains with --cache off, in a process of its own, on a file of about --large GB, which is
    made first. Prints its peak resident memory."""
    path = os.path.join(args.out, "large.h5")
    if not os.path.isfile(path):
        cases = large_cases(args.large * GIGABYTE)
        h5.write(path, cases, name="large", classes=["background", "square"], dims=2, channels=1)
    start = time.perf_counter()
    command = [
        *("train_ssl.py", path, "--out", os.path.join(args.out, "large"), "--device", args.device),
        *"--labeled 0.5 --method mean_teacher --size 96 --batch 8 --batch-unlabeled 8".split(),
        *"--steps 200 --eval-every 100 --cache off --overwrite --lam-warmup 0".split(),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    mine, reader = (int(n) / 2**20 for n in done.stdout.split("peak")[-2:])
    size = os.path.getsize(path) / GIGABYTE
    print(
        f"\n--cache off, a file of {size:.1f} GB, 200 steps in {seconds:.0f} s: "
        f"peak resident memory {mine:.2f} GB, of the largest reading process {reader:.2f} GB"
    )


# ------------------------------------------------------------------------------ command

PARTS = {
    "feeding": feeding,
    "step": stepping,
    "guidance": guidance,
    "evaluation": evaluation,
    "processes": processes,
    "growth": growth,
}


def main():
    p = Parser(__doc__, prog="python -m results.speed.benchmark")
    p.add_argument("data", help="dataset file, segmented slice by slice")
    p.add_argument("--out", required=True, help="folder for what is written on the way")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to time")
    p.add_argument(
        "--large",
        type=number(0.1, 1e4, float),
        help="also train on a file of so many GB that is made for it",
    )
    p.add_argument("--labeled", default="7", help="labeled patients")
    p.add_argument("--size", type=number(64), default=256, help="side of images")
    p.add_argument(
        "--batch", type=number(2), default=24, help="images in a step, half of them labeled"
    )
    p.add_argument(
        "--rounds", type=number(1), default=3, help="rounds, of which the shortest time counts"
    )
    p.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda")
    p.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="of ours; the plain versions are float32",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile our networks")
    args = p.parse_args()
    bench = prepare(args)
    print(
        f"{processor(bench.on.device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {bench.on}; "
        f"{bench.info.name}, side {args.size}, batch {args.batch}"
    )
    tables = {part: PARTS[part](bench) for part in args.only}
    growing = tables.pop("growth", None)
    timed = [line for lines in tables.values() for line in lines]
    for lines in (timed, growing):
        if lines:
            print("\n" + markdown(lines))
    if args.large:
        large(args)


def processor(device):
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            names = [line for line in f if line.startswith("model name")]
        return names[0].split(": ")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    workers.forget_script()
    cli(main)
