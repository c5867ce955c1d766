"""What is fast, beside a plain loop that does the same, in one run. Prints a table of ratios, and how time and memory grow with size.

    python results/benchmark.py runs/acdc.h5 --out runs/benchmark [--device cuda] [--only step guidance] [--large 10]

The plain versions are written as the public 2D baselines of semi-supervised segmentation do it: float32, contiguous memory, images augmented one
by one, each weight averaged by itself, losses read back in every step, slices predicted one by one, medpy's metrics called one by one.
Versions take turns, round after round, and the shortest time of each counts. DATA.h5: a file that is segmented slice by slice.
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
from medpy.metric import binary
from scipy import ndimage
from torch.nn import functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
import models  # noqa: E402
import train_ssl  # noqa: E402
from data import h5  # noqa: E402
from data.files import InputError, Parser, cli, number  # noqa: E402
from models.device import Compute, channels_last, compiled, compute, device_name, fused  # noqa: E402
from models.losses import one_hot  # noqa: E402


def rounds(versions, count, device):
    """The shortest of `count` times of each version, which take turns. versions: {name: function} -> {name: seconds}"""
    best = dict.fromkeys(versions, float("inf"))
    for i in range(count + 1):  # the first round warms up
        for name, f in versions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def rows_of(part, seconds, base):
    """Lines of the table; ratio: how many times sooner than `base`."""
    return [{"part": part, "version": name, "seconds": s, "ratio": seconds[base] / s} for name, s in seconds.items()]


# ---------------------------------------------------------------------------------------------------- plain versions

class PlainSlices(torch.utils.data.Dataset):
    """Slices in memory, augmented one by one: a quarter turn and a flip, or a rotation by up to 20 degrees, then zoomed to the network's side."""

    def __init__(self, info, names, size):
        self.size, self.items = size, []
        with h5.open_file(info.path) as f:
            for name in names:
                image, label = h5.read_case(f, info, "train", name)
                self.items += list(zip(image, label))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image, label = self.items[i]
        if np.random.rand() > 0.5:
            turns, axis = np.random.randint(4), np.random.randint(2)
            image, label = (np.flip(np.rot90(v, turns), axis).copy() for v in (image, label))
        elif np.random.rand() > 0.5:
            angle = np.random.randint(-20, 20)
            image, label = (ndimage.rotate(v, angle, order=0, reshape=False) for v in (image, label))
        factors = [self.size / n for n in image.shape]
        image, label = (ndimage.zoom(v, factors, order=0) for v in (image, label))
        return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(label.astype(np.int64))


def plain_step(net, teacher, optimizer, image, label, labeled, step):
    """Mean teacher on a batch whose first `labeled` images have labels."""
    noise = torch.clamp(torch.randn_like(image[labeled:]) * 0.1, -0.2, 0.2)
    logits = net(image)
    p = torch.softmax(logits, 1)
    with torch.no_grad():
        target = torch.softmax(teacher(image[labeled:] + noise), 1)
    dice = 0
    for k in range(p.shape[1]):
        a, b = p[:labeled, k], (label == k).float()
        dice = dice + 1 - (2 * (a * b).sum() + 1e-5) / ((a * a).sum() + (b * b).sum() + 1e-5)
    loss_ce, loss_dice, consistency = F.cross_entropy(logits[:labeled], label), dice / p.shape[1], ((p[labeled:] - target) ** 2).mean()
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
    table = []
    with h5.open_file(info.path) as f:
        for name in names:
            image, label = h5.read_case(f, info, "val", name)
            out = np.zeros_like(label)
            for z in range(len(image)):
                x = ndimage.zoom(image[z], [size / n for n in image[z].shape], order=0)
                x = torch.from_numpy((x - image.mean()) / image.std()).float()[None, None].to(device)
                p = torch.softmax(net(x), 1).argmax(1)[0].cpu().numpy()
                out[z] = ndimage.zoom(p, [n / size for n in image[z].shape], order=0)
            for k in range(1, len(info.classes)):
                a, b = out == k, label == k
                table.append([m(a, b) if a.any() and b.any() else 0 for m in (binary.dc, binary.jc, binary.hd95, binary.asd)])
    return table


# ---------------------------------------------------------------------------------------------------- the parts

@dataclass
class Bench:
    """What all parts share."""
    args: object
    run: object             # options of a mean-teacher run of train_ssl.py at --size, with --batch images, half of them labeled
    info: h5.Info
    on: Compute
    feed: train_ssl.Feed

    def timed(self, versions, count=None):
        return rounds(versions, count or self.args.rounds, self.on.device)

    def network(self):
        torch.manual_seed(0)
        return self.on.place(models.build("unet", channels=self.info.channels, classes=len(self.info.classes)))


def prepare(args):
    half = str(args.batch // 2)
    run = train_ssl.parse_args([
        args.data, "--out", args.out, "--labeled", args.labeled, "--method", "mean_teacher", "--size", str(args.size), "--batch", half,
        "--batch-unlabeled", half, "--lam-warmup", "0", "--lam-ramp", "0", "--qar-warmup", "0", "--qar-ramp", "0", "--steps", "1000000"])
    info, on = h5.read_info(args.data), compute(args.device, args.amp)
    if info.dims != 2:
        raise InputError(f"{args.data}: is segmented in 3D; this benchmark takes slices (volumes: results/volumes_benchmark.py)")
    train_ssl.set_defaults(run, info)
    return Bench(args, run, info, on, train_ssl.Feed(*train_ssl.load_data(info, run, on), run))


def step_of(b, side=None, batch=None, g=None, **changes):
    """A function that makes one step of our training, on random images that are there."""
    run, side, half, K, net = copy.copy(b.run), side or b.args.size, (batch or b.args.batch) // 2, len(b.info.classes), b.network().train()
    vars(run).update(changes)
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    if b.args.compile:
        net, teacher = compiled(net), compiled(teacher)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    state = train_ssl.Run([net], teacher, g, optimizer, b.on.scaler(), b.on)
    image = lambda: channels_last(torch.randn(half, b.info.channels, side, side, device=b.on.device))
    batch = train_ssl.Batch(image(), one_hot(torch.randint(K, (half, side, side), device=b.on.device), K), image(), image(), image())
    return lambda: train_ssl.train_step(state, batch, run, 1000)


def plain_step_of(b):
    half, size = b.args.batch // 2, b.args.size
    net = b.network().to(memory_format=torch.contiguous_format).train()
    teacher = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    image, label = torch.randn(2 * half, b.info.channels, size, size), torch.randint(len(b.info.classes), (half, size, size))
    return lambda: plain_step(net, teacher, optimizer, image.to(b.on.device), label.to(b.on.device), half, 1000)


def feeding(b):
    """A batch of half labeled and half unlabeled images, augmented, on the device."""
    plain, step = PlainSlices(b.info, list(dict.fromkeys(b.feed.labeled.case)), b.args.size), iter(range(1, 10 ** 9))

    def one_by_one():
        x, y = zip(*(plain[i] for i in np.random.randint(len(plain), size=b.args.batch)))
        return torch.stack(x).to(b.on.device), torch.stack(y).to(b.on.device)
    base, ours = "one by one: a turn or rotation of each image", "ours: affine, and two views of contrast, gamma, blur and noise"
    seconds = b.timed({base: one_by_one, ours: lambda: train_ssl.views(b.feed[next(step)], len(b.info.classes), b.run, b.on.device)})
    whole = seconds[ours] + b.timed({"step": step_of(b)})["step"]
    rows = rows_of("feeding", seconds, base)
    return rows + [{"part": "feeding", "version": f"ours, with the step that it feeds: {100 * seconds[ours] / whole:.1f}% is feeding", "seconds": whole,
                    "ratio": None}]


def stepping(b):
    """A mean-teacher step on a batch that is there."""
    return rows_of("step", b.timed({"plain, float32": plain_step_of(b), f"ours, {b.on}": step_of(b)}), "plain, float32")


def guidance(b):
    """What a dense g of three U-Nets adds to a mean-teacher step, at f's side and at half of it."""
    versions = {"mean teacher": step_of(b)}
    for name, side in (("g at f's side", b.args.size), ("g at half of it", b.args.size // 2)):
        g = models.build("quality_dense", channels=b.info.channels, classes=len(b.info.classes), size=side)
        g = fused(b.on.place(g)).requires_grad_(False)
        versions[f"QW, {name}"] = step_of(b, g=g, weight="quality", weight_threshold=0.0)
        versions[f"QAR on all images, {name}"] = step_of(b, g=g, qar=0.01, qar_share=1.0)
        versions[f"QAR on a third, {name}"] = step_of(b, g=g, qar=0.01, qar_share=1 / 3)
    seconds = b.timed(versions)
    base = seconds["mean teacher"]
    return [{"part": "guidance", "version": f"{name}: {100 * (s / base - 1):+.0f}%", "seconds": s, "ratio": base / s} for name, s in seconds.items()]


def evaluation(b):
    """Every val volume to its scores, by an untrained network."""
    net = b.network().eval()
    plain, K, names = copy.deepcopy(net).to(memory_format=torch.contiguous_format), len(b.info.classes), [e.name for e in b.info.entries("val")]
    base = "slice by slice, medpy's metrics"
    with evaluate.scoring_pool(2, 10 ** 9) as pool:
        return rows_of("evaluation", b.timed({base: lambda: plain_evaluation(plain, b.info, b.args.size, names, b.on.device),
                                              "ours, in one process": lambda: our_scores(b, net, names, b.args.size),
                                              "ours, two processes for the scores": lambda: our_scores(b, net, names, b.args.size, pool)}, 1), base)


def our_scores(b, net, names, size, pool=None):
    cases = evaluate.Cases(b.info, "val", size, names)
    tasks = ((label, truth, entry.spacing, len(b.info.classes)) for entry, label, truth in evaluate.predict_cases(net, cases, b.on))
    return list(evaluate.in_order(pool, evaluate.score_case, tasks, 4))


def processes(b):
    """Milliseconds of a step in the log of one training at half of --size, on CPUs: two processes of a core each, and one process."""
    out, seconds, base = os.path.join(b.args.out, "processes"), {}, "one process, one core"
    command = ["train_ssl.py", b.args.data, "--out", out, "--labeled", b.args.labeled, "--method", "mean_teacher", "--size",
               str(b.args.size // 2), "--batch", "12", "--batch-unlabeled", "12", "--lam-warmup", "0", "--lam-ramp", "0", "--steps", "12",
               "--eval-every", "4", "--device", "cpu", "--overwrite"]
    for name, launch, threads in ((base, [], 1), ("one process, two cores", [], 2),
                                  ("torchrun --nproc_per_node=2", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 1)):
        subprocess.run([sys.executable, *launch, *command], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        with open(os.path.join(out, "log.csv"), newline="") as f:
            seconds[name] = min(float(row["ms"]) for row in csv.DictReader(f)) / 1000
    return rows_of("processes", seconds, base)


def growth(b):
    """Time and memory against size; the exponent is the slope of a line through the logarithms."""
    net, train, val = b.network().eval(), [e.name for e in b.info.entries("train")], [e.name for e in b.info.entries("val")]
    once = lambda f, count=1: b.timed({0: f}, count)[0]
    read = lambda n: h5.load_slices(b.info, "train", 128, train[:n])
    few, many = ([n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(v)][-4:] for v in (val, train))
    found = {"seconds of a step, batch 8, against its side": {s: once(step_of(b, s, 8), b.args.rounds) for s in (64, 96, 128, 192, 256)},
             "seconds of a step of side 128, against its batch": {n: once(step_of(b, 128, n), b.args.rounds) for n in (4, 8, 16, 32)},
             "seconds of scoring volumes at side 96, against their number": {n: once(lambda: our_scores(b, net, val[:n], 96)) for n in few},
             "seconds of reading volumes at side 128, against their number": {n: once(lambda: read(n)) for n in many},
             "bytes of volumes in memory at side 128, against their number": {n: read(n).image.nbytes for n in many}}
    return [{"growth of": name, "exponent": float(np.polyfit(np.log(list(v)), np.log(list(v.values())), 1)[0]),
             "values": ", ".join(f"{size}: {s:.3g}" for size, s in v.items())} for name, v in found.items()]


# ---------------------------------------------------------------------------------------------------- a file larger than memory

PEAK = """import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", *(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def large(args):
    """Trains with --cache off, in a process of its own, on a file of about --large GB, which is made first. Prints its peak resident memory."""
    path, gigabyte = os.path.join(args.out, "large.h5"), 2 ** 30
    if not os.path.isfile(path):
        noise, label = np.random.default_rng(0).integers(0, 255, (40, 512, 512), np.uint8), np.zeros((40, 512, 512), np.uint8)  # 10 MB, incompressible
        label[:, 100:300, 100:300] = 1
        h5.write(path, (h5.Case("val" if i < 2 else "train", f"case{i}", np.roll(noise, i, 1), label, f"patient{i}")
                        for i in range(int(args.large * gigabyte / noise.size))), name="large", classes=["background", "square"], dims=2, channels=1)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, "train_ssl.py", path, "--out", os.path.join(args.out, "large"), "--labeled", "0.5",
                           "--method", "mean_teacher", "--size", "96", "--batch", "8", "--batch-unlabeled", "8", "--steps", "200",
                           "--eval-every", "100", "--cache", "off", "--overwrite",
                           "--lam-warmup", "0", "--device", args.device], check=True, capture_output=True, text=True)
    mine, reader = (int(n) / 2 ** 20 for n in done.stdout.split("peak")[1].split())
    print(f"\n--cache off, a file of {os.path.getsize(path) / gigabyte:.1f} GB, 200 steps in {time.perf_counter() - start:.0f} s: peak resident memory "
          f"{mine:.2f} GB, of the largest reading process {reader:.2f} GB")


PARTS = {"feeding": feeding, "step": stepping, "guidance": guidance, "evaluation": evaluation, "processes": processes, "growth": growth}


def main():
    p = Parser(__doc__, prog="benchmark.py")
    p.add_argument("data", help="dataset file, segmented slice by slice")
    p.add_argument("--out", required=True, help="folder for what is written on the way")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to time")
    p.add_argument("--large", type=number(0.1, 1e4, float), help="also train on a file of so many GB that is made for it")
    p.add_argument("--labeled", default="7", help="labeled patients")
    p.add_argument("--size", type=number(64), default=256, help="side of images")
    p.add_argument("--batch", type=number(2), default=24, help="images in a step, half of them labeled")
    p.add_argument("--rounds", type=number(1), default=3, help="rounds, of which the shortest time counts")
    p.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="of ours; the plain versions are float32")
    p.add_argument("--compile", action="store_true", help="torch.compile our networks")
    args = p.parse_args()
    bench = prepare(args)
    name = torch.cuda.get_device_name(bench.on.device) if bench.on.device.type == "cuda" else processor()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {bench.on}; {bench.info.name}, side {args.size}, batch {args.batch}")
    tables = {part: PARTS[part](bench) for part in args.only}
    for rows in ([row for part, rows in tables.items() if part != "growth" for row in rows], tables.get("growth")):
        if rows:
            print("\n" + evaluate.markdown(rows))
    if args.large:
        large(args)


def processor():
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(": ")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    del __file__  # as in evaluate.py: the processes that score need not import this
    cli(main)
