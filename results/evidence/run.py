"""The experiments behind README.md: every family of methods with every kind of guidance, and the
controls that tell why.

    python -m results.evidence.run split FULL.h5 runs/ph2.h5 --patients 46
    python -m results.evidence.run ph2 --families ict --rows none qw_pixel --lams 0.3 1 --seeds 0
    python -m results.evidence.run g ph2 cvc acdc

The first makes the last train patients the test split. The last prints Dice on test of g itself.

Reads  runs/DATA.h5 (acdc.h5 of acdc_3), runs/v/DATA/g/qp.pt (run.sh makes it).
Writes runs/v/DATA/FAMILY-ROW-LAM-SEED/: a run of train_ssl.py and its scores on test. A run that is
       finished, or that another process is at, is passed over. Several processes may share a list.

Until lambda sets in, all runs of a seed are the same supervised training. It is done once (FAMILY
`start`), and each run goes on from its checkpoint: the weights are those of the whole command, to
the last bit. Validations before that step do not count for `best.pt`.
The controls are here, not in train_ssl.py: they need labels that training must not see.
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

import evaluate
import train_ssl
from data import augment, h5, loading, supervision
from data.files import InputError, checksum
from data.options import Parser, cli
from models import checkpoints, inference
from models.device import channels_last, compute
from models.losses import one_hot
from models.quality import Seen, quality_target, true_dice

PROG = "python -m results.evidence.run"
COMMON = "--size 64 --width 8 --batch 8 --batch-unlabeled 8 --ema 0.99".split()
DATA = {  # labeled patients; learning rate; steps, of which the first are supervised; validations
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
SURE = "--weight-threshold 0.5"
ROWS = {  # options of train_ssl.py, and the control that stands in for g
    "none": ("", None),
    "conf": ("--weight confidence", None),
    "conf_class": (f"--weight confidence --weight-level class {SURE}", None),
    "conf_pixel": (f"--weight confidence --weight-level pixel {SURE}", None),
    "qw": (f"{QUALITY} image", None),
    "qw_class": (f"{QUALITY} class", None),
    "qw_pixel": (f"{QUALITY} pixel", None),
    "oracle": (f"{QUALITY} image", "oracle"),
    "oracle_class": (f"{QUALITY} class", "oracle"),
    "oracle_pixel": (f"{QUALITY} pixel", "oracle"),
    "correct": ("--correct", None),
    "correct_conf": (f"--correct --weight confidence --weight-level pixel {SURE}", None),
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


# ------------------------------------------------------------------------------ controls


class Oracle(torch.nn.Module):
    """Stands in for g and answers by labels [U, *S] that training must not see: the true Dice of a
    mask, or where it is wrong."""

    def forward(self, seen):
        return true_dice(seen.mask, self.truth(len(seen))[:, 1:])

    def error(self, seen):
        return (seen.mask != self.truth(len(seen))[:, 1:]).any(1).float()

    def belief(self, seen):
        return self.truth(len(seen))

    def truth(self, count):
        return one_hot(self.label[:count], self.classes)


class Shuffled(torch.nn.Module):
    """g, whose answers go to the next image of the batch: the same values, without knowledge."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, seen):
        return self.g(seen).roll(1, 0)

    def error(self, seen):
        return self.g.error(seen).roll(1, 0)

    def belief(self, seen):
        return self.g.belief(seen).roll(1, 0)


class Blind(torch.nn.Module):
    """g, whose belief comes from the image alone, as if it were f's teacher."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def belief(self, seen):
        logits = self.g.logits(seen) / self.g.temperature  # [members, views, B, K, *S]
        withheld = logits[:, 0]  # the first view does not show the mask
        p = withheld.softmax(2).mean(0)
        return F.interpolate(p, seen.mask.shape[2:], mode="bilinear")


def hard_qar_loss(g, nets, image):
    """QAR on hard masks; the gradient passes straight through the argmax."""
    losses = []
    for net in nets:
        p = net(image).float().softmax(1)
        hard = train_ssl.harden(p) + p - p.detach()
        losses.append((1 - g(Seen.of_probabilities(image, hard, soft=True))).mean())
    return sum(losses)


def fresh_step(run, batch, args, step, train_step=train_ssl.train_step):
    """A step of training; once QAR has set in, g first learns from f's present outputs for the
    labeled images (smooth L1, AdamW 1e-4)."""
    _, lam_qar = train_ssl.lambdas(args, (step - 1) / args.steps)
    if lam_qar:
        run.g.requires_grad_(True)
        if not hasattr(run.g, "optimizer"):
            run.g.optimizer = torch.optim.AdamW(run.g.parameters(), 1e-4)
        run.nets[0].eval()
        p = train_ssl.probabilities(run.nets[0], batch.x)
        run.nets[0].train()
        seen = Seen.of_probabilities(batch.x, p, soft=True)
        target = quality_target(seen.mask, batch.y[:, 1:])
        run.g.optimizer.zero_grad()
        F.smooth_l1_loss(run.g(seen), target).backward()
        run.g.optimizer.step()
        run.g.requires_grad_(False)
    return train_step(run, batch, args, step)


PATCHED = [
    (train_ssl, "views"),
    (train_ssl, "look"),
    (train_ssl, "qar_loss"),
    (train_ssl, "train_step"),
    (checkpoints, "load_quality"),
    (loading, "load_slices"),
]


@contextlib.contextmanager
def controlled(control):
    """train_ssl.py with a control in the place of g, or of a part of QAR."""
    kept = [getattr(module, name) for module, name in PATCHED]
    if control in ("oracle", "shuffled", "blind"):
        train_ssl.look = lambda *_: {}
    if control == "oracle":
        show_labels(Oracle())
    if control == "shuffled":
        replace_quality(Shuffled)
    if control == "blind":
        replace_quality(Blind)
    if control == "hard":
        train_ssl.qar_loss = hard_qar_loss
    if control == "fresh":
        train_ssl.train_step = fresh_step
    try:
        yield
    finally:
        for (module, name), value in zip(PATCHED, kept):
            setattr(module, name, value)


def replace_quality(control):
    """Loads g in the shape of a control."""
    load_quality = checkpoints.load_quality
    checkpoints.load_quality = lambda *a: (control(load_quality(*a)[0]), [])


def show_labels(oracle):
    """Puts an oracle in the place of g; each batch tells it the labels of the unlabeled images."""
    load_slices = loading.load_slices

    def with_labels(info, split, size, names=None, labels=True):
        return load_slices(info, split, size, names)

    def views(fetched, info, args, device):
        """train_ssl.views() that tells the oracle the labels of the unlabeled images."""
        K = len(info.classes)
        labeled, unlabeled, _ = fetched
        x, y = augment.weak(*loading.standardized(labeled, device), args.flip)
        x = channels_last(augment.strong(x, args.strength, info.color))
        y = one_hot(y, K)
        if unlabeled is None:
            return train_ssl.Batch(x, y, x[:0], x[:0], x[:0])
        u, oracle.label = augment.weak(*loading.standardized(unlabeled, device), args.flip)
        oracle.classes = K
        u = channels_last(u)
        s1 = channels_last(augment.strong(u, color=info.color))
        s2 = channels_last(augment.strong(u, color=info.color))
        return train_ssl.Batch(x, y, u, s1, s2)

    train_ssl.views = views
    checkpoints.load_quality = lambda *_: (oracle, [])
    loading.load_slices = with_labels


# ------------------------------------------------------------------------------ runs


def file_of(data):
    """acdc_3 is a part of acdc."""
    return f"runs/{data.split('_')[0]}.h5"


def command(data, family, row, lam, seed, out):
    """What train_ssl.py is called with."""
    setting = DATA[data]
    guide = ROWS[row][0].split()
    qp = []
    if {"quality", "--qar", "--correct"} & set(guide):
        qp = ["--qp", f"runs/v/{data}/g/qp.pt"]
    warm = setting["start"] / setting["steps"]
    options = {
        "--out": out,
        "--labeled": setting["labeled"],
        "--steps": setting["steps"],
        "--eval-every": setting["every"],
        "--lr": setting["lr"],
        "--seed": seed,
        "--lam": lam,
        "--lam-warmup": warm,
        "--lam-ramp": 0.1,
        "--qar-warmup": warm,
        "--qar-ramp": 0.1,
    }
    pairs = [str(word) for option in options.items() for word in option]
    return [file_of(data), *pairs, *COMMON, *FAMILIES[family].split(), *guide, *qp]


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
    own_start = family in (*train_ssl.STUDENTS, *train_ssl.WARM_UP)
    kind = family if own_start else "supervised"
    out = f"runs/v/{data}/start-{kind}-{seed}"
    step = DATA[data]["start"]
    while not os.path.isfile(f"{out}/done"):
        with alone(out) as first:
            if first:
                argv = command(data, kind, "none", 0, seed, out)
                train_ssl.main([*argv, "--keep", str(step), "--resume"])
                open(f"{out}/done", "w").close()
            else:
                time.sleep(5)
    return f"{out}/step{step}.pt"


def train(data, family, row, lam, seed, out):
    """One run, from its seed's common start, and its scores on test."""
    argv = command(data, family, row, lam, seed, out)
    if not os.path.isfile(f"{out}/last.pt"):
        args = train_ssl.parse_args(argv)
        train_ssl.set_defaults(args, h5.read_info(args.data))
        state = torch.load(start(data, family, seed), weights_only=True)
        state["args"] = vars(args)
        state["inputs"] = dict(qp=checksum(args.qp), unlabeled=None)
        state["best"] = dict(dice=-1.0, step=0)
        state["seconds"] = 0.0
        torch.save(state, f"{out}/last.pt")
    control = ROWS[row][1]
    with controlled(control):
        train_ssl.main([*argv, "--resume"])
    scored = [f"{out}/best.pt", f"{out}/last.pt", "--split", "test"]
    evaluate.main([file_of(data), *scored, "--out", f"{out}/test", "--pictures", "0"])


def finished(folder):
    return os.path.isfile(f"{folder}/test/cases.csv")


def best_on_val(log, start):
    """The best Dice on val of a run after its common start."""
    with open(log, newline="") as f:
        rows = list(csv.DictReader(f))
    return max(float(row["val_dice"]) for row in rows if int(row["step"]) > start)


def tuned(data, family, row):
    """The lambda that was best on val for seed 0."""
    found = {}
    for folder in glob.glob(f"runs/v/{data}/{family}-{row}-*-0"):
        if not finished(folder):
            raise InputError(f"{folder} is not finished, so that lambda cannot be chosen yet")
        lam = float(folder.rsplit("-", 2)[1])
        found[lam] = best_on_val(f"{folder}/log.csv", DATA[data]["start"])
    if not found:
        what = f"{data}, {family}, {row}"
        raise InputError(
            f"{what}: no run of seed 0 that would say which lambda is best; give --lams"
        )
    return max(sorted(found), key=found.get)


def run_all(args):
    """All runs of the options, seed by seed; those that are finished are left."""
    for seed, family, row in itertools.product(args.seeds, args.families, args.rows):
        for lam in args.lams or [tuned(args.data, family, args.like or row)]:
            out = f"runs/v/{args.data}/{family}-{row}-{lam:g}-{seed}"
            if finished(out):
                continue
            with alone(out) as first:
                if first:
                    print(f"\n{out}", flush=True)
                    train(args.data, family, row, lam, seed, out)
                else:
                    print(
                        f"\n{out}: passed over; another process is at it, or was killed: "
                        f"then remove {out}/busy",
                        flush=True,
                    )


# ------------------------------------------------------------------------------ split, and g itself


def split(argv):
    """Copies a dataset file, with its last train patients as the test split."""
    p = Parser(__doc__, prog=f"{PROG} split")
    p.add_argument("source", metavar="FULL.h5")
    p.add_argument("out", metavar="DATA.h5")
    p.add_argument("--patients", type=int, required=True)
    args = p.parse_args(argv)
    train = h5.read_info(args.source).entries("train")
    patients = list(dict.fromkeys(e.patient for e in train))
    last = patients[-args.patients :]
    shutil.copy(args.source, args.out)
    with h5py.File(args.out, "r+") as f:
        if "test" not in f:
            f.create_group("test", track_order=True)
        for entry in train:
            if entry.patient in last:
                f.move(f"train/{entry.name}", f"test/{entry.name}")


class Segments(torch.nn.Module):
    """g as a segmentation network: what it believes to be the truth without having seen a mask.
    [B, C, *S] -> logits [B, K, *S]"""

    def __init__(self, g, classes):
        super().__init__()
        self.blind = Blind(g)
        self.classes = classes

    def forward(self, image):
        nothing = torch.zeros(len(image), self.classes, *image.shape[2:])
        return self.blind.belief(Seen.of_probabilities(image, nothing, soft=True)).log()


def g_itself(argv):
    """Prints Dice on test of g itself: how much of what it teaches f is to be had without f."""
    p = Parser(__doc__, prog=f"{PROG} g")
    p.add_argument("data", nargs="+", choices=DATA)
    for data in p.parse_args(argv).data:
        info = h5.read_info(file_of(data))
        on = compute("cpu", "off", False)
        g, _ = checkpoints.load_quality(f"runs/v/{data}/g/qp.pt", info, on, 64)
        K = len(info.classes)
        names = [e.name for e in info.entries("test")]
        cases = inference.Cases(info, "test", 64, names, keep=False)
        dice = inference.dice_table(Segments(g, K), cases, on, K)
        mean, _ = inference.mean_dice(dice, supervision.held_classes(info, "test"))
        print(f"{data}: {100 * mean:.1f}")


def main():
    if sys.argv[1:2] == ["split"]:
        return split(sys.argv[2:])
    if sys.argv[1:2] == ["g"]:
        return g_itself(sys.argv[2:])
    p = Parser(__doc__, prog=PROG)
    p.add_argument("data", choices=DATA)
    p.add_argument("--families", nargs="+", choices=FAMILIES, required=True)
    p.add_argument("--rows", nargs="+", choices=ROWS, required=True)
    p.add_argument(
        "--lams", nargs="+", type=float, help="default: the one that was best on val for seed 0"
    )
    p.add_argument("--like", choices=ROWS, help="take the lambda of this row")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run_all(p.parse_args())


if __name__ == "__main__":
    cli(main)
