"""The experiments behind results/evidence.md: every family of methods with every kind of guidance, and the controls that tell why.

    python results/evidence.py split FULL.h5 runs/ph2.h5 --patients 46       the last train patients become the test split
    python results/evidence.py g ph2 cvc acdc                                Dice on test of g itself
    python results/evidence.py ph2 --families mean_teacher --rows none qw_pixel --lams 0.3 1 --seeds 0

Reads  runs/DATA.h5 (acdc.h5 of acdc_3), runs/v/DATA/g/qp.pt (evidence.sh makes it).
Writes runs/v/DATA/FAMILY-ROW-LAM-SEED/: a run of train_ssl.py and its scores on test. Runs that are finished, or that another process is at, are
       passed over, so that several processes may share a list.

Until lambda sets in, all runs of a seed are the same supervised training. It is done once (FAMILY `start`), and each run goes on from its checkpoint: the
weights are those of the whole command, to the last bit. Validations before that step do not count for `best.pt`.
Controls live here, not in train_ssl.py: they need labels that training must not see.
"""
import contextlib
import csv
import glob
import itertools
import os
import shutil
import sys
import time

import h5py
import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import evaluate  # noqa: E402
import train_ssl  # noqa: E402
from data import augment, h5  # noqa: E402
from data.files import InputError, Parser, checksum, cli  # noqa: E402
from models.device import channels_last, compute  # noqa: E402
from models.losses import one_hot  # noqa: E402
from models.quality import quality_target, true_dice  # noqa: E402

COMMON = "--size 64 --width 8 --batch 8 --batch-unlabeled 8 --ema 0.99".split()
DATA = {  # labeled patients; learning rate; steps, of which the first are supervised; steps between validations
    "ph2": dict(labeled=14, lr=1e-3, steps=450, start=150, every=50),
    "cvc": dict(labeled=4, lr=1e-3, steps=500, start=200, every=100),
    "acdc": dict(labeled=7, lr=3e-3, steps=800, start=400, every=100),
    "acdc_3": dict(labeled=3, lr=3e-3, steps=800, start=400, every=100),
}
FAMILIES = {
    "supervised": "--method supervised",
    "pseudo_label": "--method pseudo_label --conf-threshold 0",
    "pseudo_label_t": "--method pseudo_label --conf-threshold 0.9",
    "mean_teacher": "--method mean_teacher",
    "ict": "--method ict",
    "unimatch": "--method unimatch --conf-threshold 0.95",
    "cps": "--method cps",
    "contrastive": "--method contrastive",
    "bcp": "--method bcp",
}
QUALITY = "--weight quality --weight-level"
ROWS = {  # flags of train_ssl.py, and the control that stands in for g
    "none": ("", None),
    "conf": ("--weight confidence", None),
    "conf_class": ("--weight confidence --weight-level class --weight-threshold 0.5", None),
    "conf_pixel": ("--weight confidence --weight-level pixel --weight-threshold 0.5", None),
    "qw": (f"{QUALITY} image", None),
    "qw_class": (f"{QUALITY} class", None),
    "qw_pixel": (f"{QUALITY} pixel", None),
    "oracle": (f"{QUALITY} image", "oracle"),
    "oracle_class": (f"{QUALITY} class", "oracle"),
    "oracle_pixel": (f"{QUALITY} pixel", "oracle"),
    "correct": ("--correct", None),
    "correct_conf": ("--correct --weight confidence --weight-level pixel --weight-threshold 0.5", None),
    "correct_qw": (f"--correct {QUALITY} image", None),
    "correct_qw_class": (f"--correct {QUALITY} class", None),
    "blind": ("--correct", "blind"),
    "blind_qw": (f"--correct {QUALITY} image", "blind"),
    "full": ("--correct", "oracle"),
    "shuffled": (f"{QUALITY} image", "shuffled"),
    "shuffled_pixel": (f"{QUALITY} pixel", "shuffled"),
    "qar": ("--qar 0.01", None),
    "qar_hard": ("--qar 0.01", "hard"),
    "qar_fresh": ("--qar 0.01", "fresh"),
    "qar_strong": ("--qar 0.1", None),
    "qw_pixel_qar": (f"{QUALITY} pixel --qar 0.01", None),
}


# ---------------------------------------------------------------------------------------------------- controls

class Oracle(torch.nn.Module):
    """In the place of g: the true Dice of a mask, or where it is wrong, from labels [U, *S] that training must not see."""

    def forward(self, image, mask):
        return true_dice(mask, self.truth(len(mask))[:, 1:])

    def error(self, image, mask):
        return (mask != self.truth(len(mask))[:, 1:]).any(1).float()

    def belief(self, image, mask):
        return self.truth(len(mask))

    def truth(self, count):
        return one_hot(self.label[:count], self.classes)


class Shuffled(torch.nn.Module):
    """g, whose answers go to the next image of the batch: the same values, without knowledge."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, image, mask):
        return self.g(image, mask).roll(1, 0)

    def error(self, image, mask):
        return self.g.error(image, mask).roll(1, 0)

    def belief(self, image, mask):
        return self.g.belief(image, mask).roll(1, 0)


class Blind(torch.nn.Module):
    """g, whose belief comes from the image alone, as if it were f's teacher."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def belief(self, image, mask):
        logits = self.g.logits(image, mask) / self.g.temperature                 # [M, V, B, K, *S], the first view is that of the withheld mask
        return F.interpolate(logits[:, 0].softmax(2).mean(0), mask.shape[2:], mode="bilinear")


def hard_quality_loss(g, nets, image):
    """QAR on hard masks; the gradient passes straight through the argmax."""
    def mask(p):
        return train_ssl.harden(p) + p - p.detach()
    return sum((1 - g(image, mask(net(image).float().softmax(1))[:, 1:])).mean() for net in nets)


def fresh_step(run, batch, args, step, train_step=train_ssl.train_step):
    """A step of training before which g learns from f's present outputs for the labeled images (smooth L1, AdamW 1e-4), once QAR has set in."""
    if train_ssl.lambdas(args, (step - 1) / args.steps)[1]:
        run.g.requires_grad_(True)
        if not hasattr(run.g, "optimizer"):
            run.g.optimizer = torch.optim.AdamW(run.g.parameters(), 1e-4)
        run.nets[0].eval()
        mask = train_ssl.probabilities(run.nets[0], batch.x)[:, 1:]
        run.nets[0].train()
        run.g.optimizer.zero_grad()
        F.smooth_l1_loss(run.g(batch.x, mask), quality_target(mask, batch.y[:, 1:])).backward()
        run.g.optimizer.step()
        run.g.requires_grad_(False)
    return train_step(run, batch, args, step)


@contextlib.contextmanager
def controlled(control):
    """train_ssl.py with a control in the place of g, or of a part of QAR."""
    patched = [(train_ssl, name) for name in ("views", "look", "quality_loss", "train_step")] + [(evaluate, "load_quality"), (h5, "load_slices")]
    kept = [getattr(*where) for where in patched]
    load_quality, load_slices, oracle = evaluate.load_quality, h5.load_slices, Oracle()

    def views(fetched, K, args, device):
        labeled, unlabeled = fetched
        x, y = augment.weak(*h5.standardized(labeled, device))
        x = augment.strong(x, args.strength)
        if unlabeled is None:
            return train_ssl.Batch(channels_last(x), one_hot(y, K), x[:0], x[:0], x[:0])
        u, oracle.label = augment.weak(*h5.standardized(unlabeled, device))
        oracle.classes, u = K, channels_last(u)
        return train_ssl.Batch(channels_last(x), one_hot(y, K), u, *(channels_last(augment.strong(u)) for _ in range(2)))
    if control in ("oracle", "shuffled", "blind"):
        train_ssl.look = lambda *_: {}
    if control == "oracle":
        train_ssl.views, evaluate.load_quality = views, lambda *_: (oracle, [])
        h5.load_slices = lambda info, split, size, names=None, labels=True: load_slices(info, split, size, names)
    if control in ("shuffled", "blind"):
        evaluate.load_quality = lambda *a: ({"shuffled": Shuffled, "blind": Blind}[control](load_quality(*a)[0]), [])
    if control == "hard":
        train_ssl.quality_loss = hard_quality_loss
    if control == "fresh":
        train_ssl.train_step = fresh_step
    try:
        yield
    finally:
        for where, value in zip(patched, kept):
            setattr(*where, value)


# ---------------------------------------------------------------------------------------------------- runs

def file_of(data):
    """acdc_3 is a part of acdc."""
    return f"runs/{data.split('_')[0]}.h5"


def command(data, family, row, lam, seed, out):
    """What train_ssl.py is called with."""
    d, guide = DATA[data], ROWS[row][0].split()
    qp = ["--qp", f"runs/v/{data}/g/qp.pt"] if "quality" in guide or "--qar" in guide or "--correct" in guide else []
    warm = d["start"] / d["steps"]
    return [file_of(data), "--out", out, "--labeled", str(d["labeled"]), "--steps", str(d["steps"]), "--eval-every", str(d["every"]), *COMMON,
            "--lr", str(d["lr"]), "--seed", str(seed), "--lam", str(lam), "--lam-warmup", str(warm), "--lam-ramp", "0.1", "--qar-warmup", str(warm),
            "--qar-ramp", "0.1", *FAMILIES[family].split(), *guide, *qp]


@contextlib.contextmanager
def alone(folder):
    """Whether this process is the first at a folder."""
    os.makedirs(folder, exist_ok=True)
    try:
        os.mkdir(f"{folder}/busy")
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        os.rmdir(f"{folder}/busy")


def start(data, family, seed):
    """The supervised part that all runs of a seed share. -> its checkpoint"""
    kind = family if family in (*train_ssl.STUDENTS, *train_ssl.WARM_UP) else "supervised"
    out, step = f"runs/v/{data}/start-{kind}-{seed}", DATA[data]["start"]
    path = f"{out}/step{step}.pt"
    while not os.path.isfile(f"{out}/done"):
        with alone(out) as first:
            if first:
                train_ssl.main([*command(data, kind, "none", 0, seed, out), "--keep", str(step), "--resume"])
                open(f"{out}/done", "w").close()
            else:
                time.sleep(5)
    return path


def train(data, family, row, lam, seed, out):
    """One run, from its seed's common start, and its scores on test."""
    argv = command(data, family, row, lam, seed, out)
    if not os.path.isfile(f"{out}/last.pt"):
        args = train_ssl.parse_args(argv)
        train_ssl.set_defaults(args, h5.read_info(args.data))
        state = torch.load(start(data, family, seed), weights_only=True)
        state |= dict(args=vars(args), inputs=dict(qp=checksum(args.qp), unlabeled=None), best=dict(dice=-1.0, step=0), seconds=0.0)
        torch.save(state, f"{out}/last.pt")
    with controlled(ROWS[row][1]):
        train_ssl.main([*argv, "--resume"])
    evaluate.main([file_of(data), f"{out}/best.pt", f"{out}/last.pt", "--split", "test", "--out", f"{out}/test", "--pictures", "0"])


def best_on_val(log, start):
    """The best Dice on val of a run after its common start."""
    with open(log, newline="") as f:
        return max(float(row["val_dice"]) for row in csv.DictReader(f) if int(row["step"]) > start)


def tuned(data, family, row):
    """The lambda that was best on val for seed 0."""
    folders = [os.path.dirname(os.path.dirname(path)) for path in glob.glob(f"runs/v/{data}/{family}-{row}-*-0/test/cases.csv")]
    if unfinished := [folder for folder in glob.glob(f"runs/v/{data}/{family}-{row}-*-0") if not os.path.isfile(f"{folder}/test/cases.csv")]:
        raise InputError(f"{unfinished[0]} is not finished, so that lambda cannot be chosen yet")
    found = {folder.rsplit("-", 2)[1]: best_on_val(f"{folder}/log.csv", DATA[data]["start"]) for folder in folders}
    if not found:
        raise InputError(f"{data}, {family}, {row}: no run of seed 0 that would say which lambda is best; give --lams")
    return float(max(sorted(found, key=float), key=found.get))


def run(args):
    """All runs of the options, seed by seed; those that are finished are left."""
    for seed, family, row in itertools.product(args.seeds, args.families, args.rows):
        for lam in args.lams or [tuned(args.data, family, args.like or row)]:
            out = f"runs/v/{args.data}/{family}-{row}-{lam:g}-{seed}"
            if not os.path.isfile(f"{out}/test/cases.csv"):
                with alone(out) as first:
                    print(f"\n{out}" + ("" if first else f": passed over; another process is at it, or was killed: then remove {out}/busy"), flush=True)
                    if first:
                        train(args.data, family, row, lam, seed, out)


def split(argv):
    """Copies a dataset file, with its last train patients as the test split."""
    p = Parser(__doc__, prog="evidence.py split")
    p.add_argument("source", metavar="FULL.h5")
    p.add_argument("out", metavar="DATA.h5")
    p.add_argument("--patients", type=int, required=True)
    args = p.parse_args(argv)
    train = h5.read_info(args.source).entries("train")
    last = list(dict.fromkeys(e.patient for e in train))[-args.patients:]
    shutil.copy(args.source, args.out)
    with h5py.File(args.out, "r+") as f:
        if "test" not in f:
            f.create_group("test", track_order=True)
        for entry in train:
            if entry.patient in last:
                f.move(f"train/{entry.name}", f"test/{entry.name}")


class Segments(torch.nn.Module):
    """g as a segmentation network: what it believes to be the truth without having seen a mask. [B, C, *S] -> logits [B, K, *S]"""

    def __init__(self, g, classes):
        super().__init__()
        self.g, self.classes = g, classes

    def forward(self, image):
        return Blind(self.g).belief(image, torch.zeros(len(image), self.classes - 1, *image.shape[2:])).log()


def g_itself(argv):
    """Dice on test of g itself: how much of what it teaches f could have been had without f."""
    for data in argv:
        info, on = h5.read_info(file_of(data)), compute("cpu", "off", False)
        g, _ = evaluate.load_quality(f"runs/v/{data}/g/qp.pt", info, on, 64)
        K = len(info.classes)
        cases = evaluate.Cases(info, "test", 64, [e.name for e in info.entries("test")], keep=False)
        dice = evaluate.dice_table(Segments(g, K), cases, on, K)
        print(f"{data}: {100 * evaluate.mean_dice(dice)[0]:.1f}")


def main():
    if sys.argv[1:2] == ["split"]:
        return split(sys.argv[2:])
    if sys.argv[1:2] == ["g"]:
        return g_itself(sys.argv[2:])
    p = Parser(__doc__, prog="evidence.py")
    p.add_argument("data", choices=DATA)
    p.add_argument("--families", nargs="+", choices=FAMILIES, required=True)
    p.add_argument("--rows", nargs="+", choices=ROWS, required=True)
    p.add_argument("--lams", nargs="+", type=float, help="default: the one that was best on val for seed 0")
    p.add_argument("--like", choices=ROWS, help="take the lambda of this row")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run(p.parse_args())


if __name__ == "__main__":
    cli(main)
