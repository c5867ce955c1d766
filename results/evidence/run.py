"""All runs behind README.md and ../baselines/README.md, from one list, the most informative first.

    python -m results.evidence.run split runs/ph2_full.h5 runs/ph2.h5 --patients 46
    python -m results.evidence.run --minutes 120 --jobs 2
    python -m results.evidence.run --data ph2 --methods bcp --rows none qw --seeds 0
    python -m results.evidence.run g ph2 cvc acdc

The first makes the last train patients the test split (protocol.md says of which files). The second
works on the whole list; when the time is over, a run that is under way is kept, and goes on the
next time. The last prints Dice on test of g, and of its stand-ins, as segmentation networks, and of
supervised runs with g's correction.

Reads  runs/ph2.h5, cvc.h5, acdc.h5; the tier `full` also la.h5.
Writes runs/evidence/TIER/DATA/METHOD-ROW-SEED/: a run of train_ssl.py and its scores on test;
       runs/evidence/TIER/DATA/g/, the quality predictor (g_half/: at half of f's side), and
       large-none-0 to 2/, the ensemble. Of seed S > 0 they are g-S/ and large-none-3S to 3S+2.

A run that is finished, or that another process is at, is passed over. Until lambda sets in, all
runs of a seed are the same supervised training. It is done once, and each run goes on from there:
its weights are those of the whole command, to the last bit.
"""

import glob
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from typing import NamedTuple

import h5py
import torch

import corrupt
import evaluate
import train_qp
import train_ssl
from data import h5, supervision
from data.files import InputError, checksum, claim, replacing
from data.options import Parser, cli, number
from models import checkpoints, inference
from models.device import compute, fused
from models.quality import Corrected
from results.evidence.controls import Blind, Ensemble, Oracle, Segments, Shuffled, stand_in

PROG = "python -m results.evidence.run"
SEEDS = [0, 1, 2]
START = 0.3  # share of training before lambda sets in


class Data(NamedTuple):
    """A data set, its labels, and the settings of g that suit their number."""

    file: str
    labeled: int  # patients
    lr: str
    masks: str  # of corrupt.py
    g: str  # of train_qp.py
    archive: str = ""  # the images of this file are unlabeled ones, too
    full: bool = False  # of the tier `full` alone
    volumes: bool = False  # f sees them in 3D


PH2 = Data("ph2", 14, "1e-3", "--masks 200 --folds 3", "--batch 24 --per-image 200 --epochs 4")
CVC = Data("cvc", 4, "1e-3", "--masks 60 --folds 2", "--batch 24 --per-image 40 --epochs 4")
ACDC_G = "--batch 16 --per-image 30 --epochs 4 --lr 3e-3"
ACDC = Data("acdc", 7, "3e-3", "--masks 60 --folds 3", ACDC_G)
LA_G = "--size 40,56,56 --batch 8 --per-image 60 --epochs 6 --members 1"
LA = Data("la", 4, "1e-3", "--masks 60 --folds 2", LA_G, full=True, volumes=True)
DATA = {
    "ph2": PH2,
    "acdc": ACDC,
    "cvc": CVC,
    "ph2_foreign": PH2._replace(archive="cvc"),  # 268 colonoscopy frames among 80 lesions
    "acdc_3": ACDC._replace(labeled=3, full=True),
    "la_4": LA,
    "la_8": LA._replace(labeled=8),
}
TIERS = {
    "small": "--size 64 --width 8 --batch 8 --batch-unlabeled 8 --mc-passes 4 --steps 1000 "
    "--eval-every 100",
    "full": "--size 256 --batch 12 --batch-unlabeled 12 --steps 10000 --eval-every 500",
}
VOLUMES = "--size 80,112,112 --steps 6000 --eval-every 300"  # in 3D, instead of a tier's
SHARED = f"--patience 100 --lam-warmup {START} --lam-ramp 0.1 --qar-warmup {START} --qar-ramp 0.1"
QW = "--weight quality --weight-level"
ROWS = {  # options of train_ssl.py
    "none": "",
    "all": "",  # supervised training with the labels of all train cases
    "qw": f"{QW} image",  # the paper's
    "qw_half": f"{QW} image",  # by a g at half of f's side; in the tables it is of 1f55d4d
    "qw_pixel": f"{QW} pixel",
    "confidence": "--weight confidence --weight-threshold 0.5",
    "qar": "--qar 0.01",
    "qar_half": "--qar 0.01",
    "qw_qar": f"{QW} image --qar 0.01",
    "correct": "--correct --trust 1",
    "correct_qw": f"--correct --trust 1 {QW} image",
    "correct_qw_half": f"--correct --trust 1 {QW} image",
    "trust_qw": f"--correct {QW} image",  # the correction as far as it is good on val
    "distill_qw": f"--correct --trust 1 {QW} image",
    "distill_trust_qw": f"--correct {QW} image",
    "qw_by_ensemble": f"{QW} image",
    "blind": "--correct --trust 1",
    "shuffled": f"{QW} image",
    "oracle": f"{QW} image",
    "at_test": "",  # the run `none`, whose outputs g corrects
    "at_test_ensemble": "",  # the same by the ensemble
}
CONTROLS = {"blind": Blind, "shuffled": Shuffled}  # made from g
BY_ENSEMBLE = ("distill_qw", "distill_trust_qw", "qw_by_ensemble", "at_test_ensemble")
AT_TEST = ("at_test", "at_test_ensemble")
PARTS = [  # of the list: methods and rows; each for all seeds and data sets before the next
    ("supervised", "none"),
    ("mean_teacher", "none qw correct_qw distill_qw"),
    ("bcp", "none"),
    ("bcp", "qw correct_qw distill_qw"),
    ("supervised", "all"),
    ("fixmatch", "none qw correct_qw distill_qw"),
    ("mean_teacher bcp fixmatch", "trust_qw"),
    ("supervised mean_teacher bcp fixmatch", "at_test at_test_ensemble"),
    ("mean_teacher", "qw_by_ensemble shuffled blind oracle"),
    ("cps unimatch pseudo_label", "none"),
    ("cps unimatch pseudo_label", "qw correct_qw trust_qw"),
    ("cps unimatch pseudo_label", "at_test at_test_ensemble"),
    ("supervised", "qar"),
    ("mean_teacher bcp fixmatch", "qw_pixel correct qar qw_qar confidence"),
    ("mean_teacher bcp fixmatch", "distill_trust_qw"),
    ("mean_teacher bcp fixmatch cps pseudo_label", "qw_half correct_qw_half"),
    ("ua_mt ict contrastive", "none qw correct_qw trust_qw"),
]


class Job(NamedTuple):
    data: str
    method: str
    row: str
    seed: int


def sets_of(tier):
    """Names of the data sets of a tier."""
    return [data for data in DATA if tier == "full" or not DATA[data].full]


def check_sets(args):
    """InputError for data that the tier has not."""
    if others := sorted({*args.data} - {*sets_of(args.tier)}):
        raise InputError(f"{others[0]}: is of --tier full alone")


def jobs(tier):
    """The list, in its order."""
    for methods, rows in PARTS:
        for seed, data in itertools.product(SEEDS, sets_of(tier)):
            for method, row in itertools.product(methods.split(), rows.split()):
                if fits(data, method, row):
                    yield Job(data, method, row, seed)


def fits(data, method, row):
    """Supervised training sees no archive; some controls know slices alone."""
    if row in ("oracle", *AT_TEST) and DATA[data].volumes:
        return False
    return method != "supervised" or not DATA[data].archive


# ------------------------------------------------------------------------------ one run


def place(tier, job):
    """The folder of a run."""
    return f"runs/evidence/{tier}/{job.data}/{job.method}-{job.row}-{job.seed}"


def file_of(data):
    return f"runs/{DATA[data].file}.h5"


def without_archive(data):
    """The data set without the archive. It may be this one."""
    return next(name for name in DATA if DATA[name] == DATA[data]._replace(archive=""))


def quality_of(tier, data, row="", seed=0):
    """The folder of g of a row and a seed. An archive does not change it; g½ serves all seeds."""
    name = "g_half" if row.endswith("_half") else f"g-{seed}" if seed else "g"
    return f"runs/evidence/{tier}/{without_archive(data)}/{name}"


def settings(tier, data):
    """Options of train_ssl.py: how large and how long. In 3D they are VOLUMES in any tier."""
    return (VOLUMES if DATA[data].volumes else TIERS[tier]).split()


def size_of(tier, data):
    """--size of the images or patches that f sees."""
    words = settings(tier, data)
    return words[words.index("--size") + 1]


def options(tier, job, out):
    """What train_ssl.py is called with."""
    data = DATA[job.data]
    guide = ROWS[job.row].split()
    words = [file_of(job.data), "--out", out, "--seed", str(job.seed), "--lr", data.lr]
    words += settings(tier, job.data) + SHARED.split() + guide
    if job.row != "all":
        words += ["--labeled", str(data.labeled)]
    if data.archive and job.method != "supervised":
        words += ["--unlabeled", f"runs/{data.archive}.h5"]
    if {"quality", "--qar", "--correct"} & set(guide):
        words += ["--qp", f"{quality_of(tier, job.data, job.row, job.seed)}/qp.pt"]
    return [*words, "--method", job.method]


def start_of(job):
    """The run whose first part this one shares. It may be this one."""
    own = job.method in (*train_ssl.STUDENTS, *train_ssl.WARM_UP)
    if job.row == "all":
        return job
    return Job(without_archive(job.data), job.method if own else "supervised", "none", job.seed)


def finished(folder):
    return os.path.isfile(f"{folder}/test/summary.md")  # evaluate.py writes it last


def run(tier, job):
    """Trains one run and scores it on test, unless that is done.

    InputError if another process is at it, or at what it needs.
    """
    out = place(tier, job)
    if finished(out):
        return
    lock = claim(out)
    print(f"\n{out}", flush=True)
    with stand_in(control_of(tier, job)):
        if job.row in AT_TEST:
            score_corrected(tier, job, out)
        else:
            train(tier, job, out)
            score(job.data, out, out)
    lock.release(force=True)


def score(data, folder, out, *more):
    """evaluate.py on a run's best.pt and last.pt, on test, into OUT/test."""
    words = [file_of(data), f"{folder}/best.pt", f"{folder}/last.pt", "--split", "test", *more]
    evaluate.main([*words, "--out", f"{out}/test", "--pictures", "0"])


def score_corrected(tier, job, out):
    """Scores a run `none` with outputs that g corrects.

    g takes the share of the output with which best.pt has the best Dice on val.
    """
    origin = job._replace(row="none")
    run(tier, origin)
    folder = place(tier, origin)
    qp = f"{quality_of(tier, job.data, seed=job.seed)}/qp.pt"
    split = Split(tier, job.data, "val", job.seed)
    f = split.network(f"{folder}/best.pt")
    dice = {trust: split.dice(Corrected(f, split.g, trust)) for trust in train_ssl.TRUSTS}
    trust = max(dice, key=dice.get)
    score(job.data, folder, out, "--qp", qp, "--trust", str(trust))


def train(tier, job, out):
    """Trains a run from its start, or as a start of others."""
    words = options(tier, job, out)
    args = train_ssl.parse_args(words)
    step = round(START * args.steps)
    origin = start_of(job)
    if origin == job:
        return train_ssl.main([*words, "--keep", str(step), "--resume"])
    start = f"{place(tier, origin)}/step{step}.pt"
    if not os.path.isfile(start):
        run(tier, origin)
    if not os.path.isfile(f"{out}/last.pt"):
        torch.save(from_start(start, args), f"{out}/last.pt")
    train_ssl.main([*words, "--resume"])


def from_start(path, args):
    """The checkpoint that a run goes on from, made from that of its start."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: another process is at it; call again when it is there")
    train_ssl.set_defaults(args, h5.read_info(args.data))
    state = torch.load(path, weights_only=True)
    state["args"] = vars(args)
    state["inputs"] = {name: checksum(getattr(args, name)) for name in train_ssl.FILES}
    state["best"] = dict(dice=-1.0, step=0)
    state["parts"] = state["parts"][:0]
    state["seconds"] = 0.0
    return state


# ----------------------------------------------------------------------- g, and its stand-ins


def control_of(tier, job):
    """What stand_in() takes for a row, or None. Trains g and the ensemble if they are missing."""
    if job.row not in AT_TEST and "--qp" not in options(tier, job, "-"):
        return None
    train_quality(tier, job.data, job.row, job.seed)
    if job.row in BY_ENSEMBLE:
        return Ensemble(ensemble(tier, job.data, job.seed))
    return Oracle() if job.row == "oracle" else CONTROLS.get(job.row)


def train_quality(tier, data, row="", seed=0):
    """Stages 1 and 2 for a data set. g sees what f sees, or for rows with `_half` half of it.

    The masks are the same for every seed of g, and g½ is of seed 0 for all of f's.
    """
    out = quality_of(tier, data, row, seed)
    if is_trained(f"{out}/qp.pt"):
        return
    mine = DATA[data]
    size = size_of(tier, data)
    folder = f"{quality_of(tier, data)}/vqm"
    masks = f"--labeled {mine.labeled} --size {size} --val-masks 5 {mine.masks} --resume"
    corrupt.main([file_of(data), "--out", folder, *masks.split()])
    source = [file_of(data), "--vqm", f"{folder}/vqm.h5", "--out", out]
    if not mine.volumes:  # whose options of g have a size
        half = row.endswith("_half")
        source += ["--size", str(int(size) // 2) if half else size]
        seed = 0 if half else seed
    train_qp.main([*source, *mine.g.split(), "--seed", str(seed), "--resume"])


def is_trained(path):
    """Whether g is there, and of its last epoch: train_qp.py writes it after each."""
    if not os.path.isfile(path):
        return False
    state = checkpoints.load_checkpoint(path, "qp")
    return state["epoch"] == state["args"]["epochs"]


def ensemble(tier, data, seed=0):
    """Three supervised networks of width 16, as members of g have (in 3D 8); each at its best."""
    nets = []
    for member in range(3 * seed, 3 * seed + 3):
        out = f"{os.path.dirname(quality_of(tier, data))}/large-none-{member}"
        if not finished(out):
            words = options(tier, Job(without_archive(data), "supervised", "none", member), out)
            train_ssl.main([*words, "--width", "16", "--resume"])
            score(data, out, out)
        on = compute("auto", "off", False)
        nets.append(fused(checkpoints.load_run(f"{out}/best.pt", "student", on)[0]))
    return nets


class Split:
    """A split of slices, g of its data, and the Dice that networks have on it."""

    def __init__(self, tier, data, split, seed=0):
        info = h5.read_info(file_of(data))
        size = int(size_of(tier, data))
        self.on = compute("auto", "off", False)
        self.classes = len(info.classes)
        self.held = supervision.held_classes(info, split)
        self.cases = inference.Cases(info, split, size)
        qp = f"{quality_of(tier, data, seed=seed)}/qp.pt"
        self.g, _ = checkpoints.load_quality(qp, info, self.on, size)

    def network(self, path):
        """f of a checkpoint."""
        return fused(checkpoints.load_run(path, "student", self.on)[0])

    def dice(self, net):
        """Dice in %, mean over cases, then classes."""
        table = inference.dice_table(net, self.cases, self.on, self.classes)
        return 100 * inference.mean_dice(table, self.held)[0]


def supervised(tier, data):
    """The checkpoints of supervised runs, where lambda would set in and at their best on val."""
    runs = [place(tier, Job(without_archive(data), "supervised", "none", seed)) for seed in SEEDS]
    names = ["step[0-9]*.pt", "best.pt"]
    return [path for name in names for run in runs for path in sorted(glob.glob(f"{run}/{name}"))]


def as_networks(argv):
    """Prints Dice on test of g and of the ensemble, and of supervised f's that g corrects."""
    p = Parser(__doc__, prog=f"{PROG} g")
    p.add_argument("data", nargs="+", choices=[name for name in DATA if not DATA[name].volumes])
    p.add_argument("--tier", choices=TIERS, default="small")
    args = p.parse_args(argv)
    check_sets(args)
    for data in args.data:
        train_quality(args.tier, data)
        test = Split(args.tier, data, "test")
        g = test.g
        for name, one in (("g", Blind(g)), ("ensemble", Ensemble(ensemble(args.tier, data)))):
            print(f"{data}, {name}: {test.dice(Segments(one, test.classes)):.1f}", flush=True)
        for path in supervised(args.tier, data):
            f = test.network(path)
            half, whole = (test.dice(Corrected(f, g, trust)) for trust in (0.5, 1.0))
            made = f"{half:.1f} mixed with g's correction, {whole:.1f} corrected"
            print(f"{data}, {path}: {test.dice(f):.1f}, {made}", flush=True)


# ------------------------------------------------------------------------------ the command line


def split(argv):
    """Copies a dataset file, with its last train patients as the test split."""
    p = Parser(__doc__, prog=f"{PROG} split")
    p.add_argument("source", metavar="FULL.h5")
    p.add_argument("out", metavar="DATA.h5")
    p.add_argument("--patients", type=number(1), required=True)
    args = p.parse_args(argv)
    info = h5.read_info(args.source)
    train = info.entries("train")
    patients = list(dict.fromkeys(e.patient for e in train))
    if args.patients >= len(patients):
        raise InputError(f"--patients {args.patients}: {args.source} has {len(patients)} in train")
    if info.splits.get("test"):
        print(f"note: {len(info.splits['test'])} cases were in test already and stay there")
    last = patients[-args.patients :]
    with replacing(args.out) as temporary:
        shutil.copy(args.source, temporary)
        with h5py.File(temporary, "r+") as f:
            f.require_group("test")
            for entry in train:
                if entry.patient in last:
                    f.move(f"train/{entry.name}", f"test/{entry.name}")


def main():
    if sys.argv[1:2] == ["split"]:
        return split(sys.argv[2:])
    if sys.argv[1:2] == ["g"]:
        return as_networks(sys.argv[2:])
    methods = list(dict.fromkeys(job.method for job in jobs("full")))
    p = Parser(__doc__, prog=PROG)
    p.add_argument("--data", nargs="+", choices=DATA, help="(default: all of the tier)")
    p.add_argument("--methods", nargs="+", choices=methods, default=methods)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    p.add_argument("--tier", choices=TIERS, default="small", help="small: two CPU cores; full: GPU")
    p.add_argument("--minutes", type=number(0, kind=float), help="stop then (default: at the end)")
    p.add_argument("--jobs", type=number(1, 64), default=1, help="runs at once")
    p.add_argument("--list", action="store_true", help="only print what is left")
    args = p.parse_args()
    args.data = args.data or sets_of(args.tier)
    check_sets(args)
    if args.list:
        found = [place(args.tier, job) for job in left(args)]
        long = ", 2 to 4 minutes each on a CPU" if args.tier == "small" else ""
        return print(*found, f"{len(found)} runs are left{long}", sep="\n")
    names = {name for d in args.data for name in (DATA[d].file, DATA[d].archive) if name}
    files = {f"runs/{name}.h5" for name in names}
    if lost := sorted(path for path in files if not os.path.isfile(path)):
        raise InputError(f"{lost[0]}: no such file; protocol.md says how it is made")
    if args.jobs == 1:
        return work(args)
    apart = multiprocessing.get_context("spawn")
    processes = [apart.Process(target=work, args=(args,)) for _ in range(args.jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)


def work(args):
    """Goes through what is left, until a round finishes nothing or the time is over.

    Then a run that is under way writes its last.pt.
    """
    end = threading.Timer(60 * (args.minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    if args.minutes is not None:
        end.start()
    more = True
    while more:
        more = False
        for job in left(args):
            try:
                run(args.tier, job)
                more = True
            except InputError as error:
                print(f"passed over: {error}", flush=True)
            except SystemExit:
                if end.finished.is_set():
                    return
                raise


def left(args):
    """The jobs that are asked for and not finished."""
    return [
        job
        for job in jobs(args.tier)
        if job.data in args.data
        and job.method in args.methods
        and job.row in args.rows
        and job.seed in args.seeds
        and not finished(place(args.tier, job))
    ]


if __name__ == "__main__":
    cli(main)
