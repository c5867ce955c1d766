"""Stage 4: scores checkpoints on a split, case by case; or predicts masks, also for new images.

    python evaluate.py DATA.h5 runs/*/best.pt --split val --out runs/table
           [--baseline supervised] [--qp runs/qp/qp.pt [--second runs/other/best.pt]]
    python evaluate.py NEW runs/mt_qw/best.pt --predict --out runs/new [--qp runs/qp/qp.pt]

Reads  DATA.h5, checkpoints of train_ssl.py (best.pt, last.pt, step*.pt), the log.csv beside them,
       optionally the qp.pt of train_qp.py. NEW is a dataset file (labels are not needed), a folder
       of pictures or of NIfTI volumes, or one of these.
Writes OUT/cases.csv (a row per run, case and class or region), OUT/summary.json, OUT/summary.md
       (the table on the screen), OUT/compare.png, OUT/cases.png (best, median and worst case:
       image, truth, each run's outlines), OUT/cases/*.png (more), OUT/curves.png (training).
       With --qp, which compares g and simpler estimates of the outputs' quality with the truth,
       also OUT/quality.csv (a row per run, sample and class), quality.md, .json, quality.png (g),
       estimates.png (all) and triage.png (who finds the bad cases).
       With --predict OUT/masks/*, one for each case, on the grid of its source: .nii.gz for a
       volume, for an image .png with a palette, whose pixels are class numbers. With --qp also
       OUT/worst_first.csv, the Dice that g predicts, in the order of what g and f say together,
       and worst_first.png, the sixteen worst. With --trust, g corrects all outputs first.

A class that no label of the split holds counts in no mean, and its column says "-". Where a single
case lacks a class, its Dice is 1 if the output lacks the class, too, else 0. Runs that differ only
in their seed (and in g, if each seed has its own) form one row: mean and standard deviation. Cases
are read, predicted and scored one after the other, each on the grid that the dataset stores, or,
with --grid source, on the grid of its source, as masks are delivered. A volume is scored as a
whole, also where it was segmented slice by slice. The estimates of quality are compared on the
network's grid, for slices or for patches that cover the volumes.

Legend: N samples (slices or patches), B batch, K classes, D depth, H height, W width, *S the
network's grid: S, S or D, H, W.
"""

import collections
import contextlib
import glob
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, prepared, supervision, workers
from data.files import InputError, claim
from data.labels import regions_of, without
from data.metrics import (
    BAD,
    LEVELS,
    TOGETHER,
    TRIAGE,
    Outputs,
    area_mean,
    compare_rows,
    largest_component,
    of_classes,
    paired,
    plain_dice,
    score_case,
    triage,
)
from data.options import SHARE, Parser, cli, folder, note_idle, number
from data.tables import markdown, write_csv, write_text
from models import checkpoints, inference, quality
from models.checkpoints import load_checkpoint
from models.device import compute, device_name, samples_in

# ---------------------------------------------------------------------------------------- scoring

KEEP = 2**31  # bytes of images and labels that stay in memory from one checkpoint to the next
SMALL = 10**6  # voxels of a split that are scored sooner than a process has started


class Group(NamedTuple):
    """Runs that differ only in their seed: a row of the table."""

    name: str
    labeled: str  # of --labeled
    members: list  # numbers of the runs


@dataclass
class Scored:
    """Runs, and how they score on some cases."""

    info: h5.Info
    split: str  # the file's, in which the cases are
    entries: list  # [cases]
    states: list  # [runs] of their checkpoints: KEPT
    groups: list  # of Group
    held: np.ndarray  # [K-1] whether the labels hold a class of the foreground; no other is scored
    regions: dict = field(default_factory=dict)  # of --regions: {name: numbers of its classes}
    scores: list = field(default_factory=list)  # [runs][cases][classes] of Score
    of_regions: list = field(default_factory=list)  # [runs][cases][held_regions] of Score
    drawings: dict = field(default_factory=dict)  # {run: [cases] of pack()}: slices to show

    @property
    def classes(self):
        """Names of the classes that are scored."""
        return list(itertools.compress(self.info.classes[1:], self.held))

    @property
    def held_regions(self):
        """Those regions of which the labels hold a class; no other is scored."""
        held = {k for k, is_held in enumerate(self.held, 1) if is_held}
        return {name: ks for name, ks in self.regions.items() if held & set(ks)}

    @property
    def names(self):
        """Names of the cases."""
        return [entry.name for entry in self.entries]

    @property
    def unit(self):
        """The unit of all distances: pixels if the spacing of one case is unknown, else mm."""
        return "mm" if all(entry.spacing_known for entry in self.entries) else "px"


def scoring_pool(count, voxels):
    """A pool of processes that score cases, for a `with`; it gives None where this process scores.

    count: of processes; voxels: of all cases together.
    """
    if count == 0 or voxels <= SMALL:
        return contextlib.nullcontext()
    # Spawned processes start in a second. Forked ones would start at once, but with the locks of
    # torch's threads, held or not.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, workers.start_worker)


class Calls:
    """Calls of a function by a pool of processes, or, without one, here and now.

    At most `ahead` calls are under way, so that their arguments fit into memory.
    """

    def __init__(self, function, pool=None, ahead=0):
        self.function = function
        self.pool = pool
        self.ahead = ahead
        self.pending = collections.deque()
        self.done = []

    def add(self, *args):
        """One more call. InputError if a process has died."""
        if self.pool is None:
            self.done.append(self.function(*args))
            return
        with processes_live():
            self.pending.append(self.pool.submit(self.function, *args))
        self._finish(self.ahead)

    def results(self):
        """What the function has returned, in the order of the calls."""
        self._finish(0)
        return self.done

    def _finish(self, most):
        """Waits until at most so many calls are under way."""
        with processes_live():
            while len(self.pending) > most:
                self.done.append(self.pending.popleft().result())


@contextlib.contextmanager
def processes_live():
    """Turns the death of a process of the pool, where its block meets it, into an InputError."""
    try:
        yield
    except BrokenProcessPool:
        raise InputError(
            "a process that scores cases has died, perhaps for lack of memory; use fewer "
            "--workers, or 0 for none"
        ) from None


def score_run(args, cases, found, pool, draw, *, regions, unit):
    """Scores the outputs of a run. -> [cases][K-1+R] of Score, [cases] of pack()

    cases: inference.Cases; found: of inference.predict_cases(); pool: of scoring_pool().
    regions [R]: of score_case(). unit: of distances, "mm" or "px".
    draw: whether a slice of each output is to be shown; else the second list is empty.
    """
    K = len(cases.info.classes)
    calls = Calls(score_case, pool, 2 * args.workers)
    drawings = []
    for entry, label, truth in found:
        spacing = entry.spacing
        largest = args.largest_component
        moved = args.grid == "source" and entry.source_grid
        if largest and (moved or draw):
            label = largest_component(label, K)
            largest = False
        if draw:
            drawings.append(pack(label[figures.middle(truth, len(truth))]))
        if moved:
            label, truth, spacing = at_source(cases, entry, label)
        if unit == "px":
            spacing = (1.0,) * len(spacing)
        calls.add(label, truth, spacing, K, largest, regions)
    return calls.results(), drawings


def at_source(cases, entry, label):
    """An output, the truth and the spacing on the grid of a case's source."""
    from data import space  # brings nibabel, which only this needs

    truth = h5.read_source_label(cases.info, cases.split, entry)
    return space.to_source(label, entry), truth, entry.source_spacing


def on_source_grids(info):
    """The dataset, whose pictures have the grids of their sources, from which they were resized.

    Outputs are then brought to these grids, on which masks are delivered. -> Info
    """

    def moved(entry):
        if not entry.source_grid or len(entry.grid) > 2:
            return entry
        return replace(entry, grid=entry.source_grid, spacing=entry.source_spacing)

    splits = {split: [moved(e) for e in entries] for split, entries in info.splits.items()}
    return replace(info, splits=splits)


def bar(iterable, total, name):
    """A bar on a terminal; nothing where the output is not one."""
    return tqdm(iterable, name, total, leave=False, unit=" cases", disable=not sys.stderr.isatty())


# ---------------------------------------------------------------------------- what can be compared


def chosen_cases(info, split, states, qp):
    """The split of the file that --split means, and the entries of its cases.

    states: {path: state} of the runs; qp: path of g, or None. InputError of held_out().
    """
    if split != "held_out":
        return split, info.entries(split)
    if qp:
        states = states | {qp: load_checkpoint(qp, "qp")}
    names = set(held_out(info, states))
    return "train", [entry for entry in info.entries("train") if entry.name in names]


def held_out(info, states):
    """Names of the train cases with labels from which no checkpoint has learned.

    A run has learned from its own cases and from those of its g. states: {path: state}.
    InputError if there is no such case, or if a checkpoint was made from another file.
    """
    used = set()
    for path, state in states.items():
        if state["data"]["checksum"] != info.checksum:
            raise InputError(
                f"{path}: was trained on another file than {info.path} is now, so nobody knows "
                "which of its cases it has seen; leave it out"
            )
        used |= set(state["labeled"])
    names = [e.name for e in info.entries("train") if e.labeled and e.name not in used]
    if not names:
        raise InputError(
            f"{info.path}: no train case has a label from which nobody has learned; score "
            "--split val"
        )
    return names


# what stays in memory of a checkpoint: no weights
KEPT = ("args", "defaults", "data", "labeled", "inputs", "best", "step")


def load_states(args):
    """What the checkpoints of --second and of all runs say of them: {path: state}, KEPT alone."""
    states = {}
    for path in [*args.checkpoints, *filter(None, [args.second])]:
        state = load_checkpoint(path, "ssl")
        states[path] = {key: state[key] for key in KEPT if key in state}
    return states


def _dict(state, key):
    """A part of a checkpoint that it need not have; the file may come from anybody. -> dict"""
    found = state.get(key)
    return found if isinstance(found, dict) else {}


def check_runs(args, info, states):
    """InputError if runs do not fit the data, or cannot be compared by --qp. states: {path: state}

    The checkpoints are those of train_ssl.py.
    """
    for path, state in states.items():
        checkpoints.check_kind(path, state["data"], info, "train on this data")
        checkpoints.check_trained_size(path, info, state["args"]["size"])
        checkpoints.flip_of(path, info, state["args"])
    described = {path: state["data"] for path, state in states.items()}
    prepared.check({args.data: info.describe()} | described, described)
    sizes = {state["args"]["size"]: path for path, state in states.items()}
    if args.qp and len(sizes) > 1:
        found = ", ".join(f"{path} has {size}" for size, path in sizes.items())
        raise InputError(f"--qp compares outputs of one --size, but {found}")
    if args.second and any(os.path.samefile(args.second, path) for path in args.checkpoints):
        raise InputError(
            f"--second {args.second}: is among the runs that it should judge; give an independent "
            "one"
        )


def check_labels(args, info, split, entries):
    """InputError unless each case has the label that it is scored with."""
    for entry in entries:
        if not entry.labeled:
            raise InputError(
                f"{args.data}: /{split}/{entry.name} has no label, so it cannot be scored; "
                "--predict writes masks without labels"
            )
    if args.grid == "source":
        for entry in entries:
            if entry.source_grid and not entry.source_labeled:
                h5.read_source_label(info, split, entry)  # refuses


def note_taught(args, info, split, entries, states):
    """A line where a run, its g, or the g of --qp has learned from labels of these cases.

    In another file they are cases of the same names.
    """
    names = {entry.name for entry in entries}
    train = {entry.name for entry in info.splits.get("train", [])}
    if args.qp:
        states = states | {args.qp: load_checkpoint(args.qp, "qp")}
    for path, state in states.items():
        same = state["data"]["checksum"] == info.checksum
        taught = names & set(state["labeled"])
        if same and split == "train" and taught:
            print(
                f"note: {path} has learned from the labels of {len(taught)} of these {len(names)} "
                "cases; --split held_out leaves them out"
            )
            continue
        if same:
            taught -= train  # its own, of whose names other splits may have cases, too
        if taught:
            print(
                f"warning: {'the g of ' if same else ''}{path} was trained on another file than "
                f"{args.data} is now, with labels of {len(taught)} of these {len(names)} cases, by "
                f"name, such as {min(taught)}; if they are the same images, its scores are too good"
            )


# ------------------------------------------------------------------------------- rows of the table

# options in which the runs of a row may differ
FREE = {"seed", "out", "resume", "overwrite", "device", *checkpoints.MAY_CHANGE}


def run_name(args):
    """What the row of a run is called: its method and hooks. args: of its checkpoint"""
    name = args["method"]
    if args["weight"] != "none" and args["method"] != "supervised":  # which has nothing to weight
        name += " + QW" if args["weight"] == "quality" else " + confidence"
        if args["weight_level"] != "image":
            name += f" ({args['weight_level']})"
    if args.get("correct"):
        name += " + correction"
    if args["qar"]:
        name += " + QAR"
    return name


def trust_of(args):
    """--trust of a run, or where val chose it "val". Older runs had g alone."""
    if not args.get("correct"):
        return None
    trust = args.get("trust", 1.0)
    return "val" if trust is None else trust


def group_runs(states, paths):
    """Runs that differ only in their seed -> [Group]; names are made unique by what differs.

    Of an option that it is too old to know, a run has the default of its method; where no run tells
    that, the option tells no two runs apart. Files of --qp and --unlabeled are the same where their
    checksums are, whatever their paths. Each seed may have a g of its own, see split_by_g(). A
    second checkpoint of a seed is a row by itself, under its path.

    states [runs]: of their checkpoints; paths [runs].
    """
    qps, unlabeled = (list(file_names(option, states)) for option in ("qp", "unlabeled"))
    defaults = collections.defaultdict(dict)  # {method: {option: value}}
    for state in states:
        known = {name: v for name, v in _dict(state, "defaults").items() if v is not None}
        defaults[state["args"]["method"]] |= known
    alike = []  # (options, runs) that differ in seed and g alone
    for i, (state, path) in enumerate(zip(states, paths)):
        config = options_of(state, path, unlabeled[i], defaults[state["args"]["method"]])
        for known, members in alike:
            if not differing(known, config):
                known |= config  # the row knows what any of its runs knows
                members.append(i)
                break
        else:
            alike.append((config, [i]))

    seeds = [state["args"]["seed"] for state in states]
    rows = [row for config, members in alike for row in split_by_g(config, members, seeds, qps)]
    rows = [
        part for config, members in rows for part in split_by_seed(config, members, seeds, paths)
    ]
    rows.sort(key=lambda row: row[1][0])

    found = []
    for config, members in rows:
        name, labeled = config["run"], config["labeled"]
        others = [c for c, _ in rows if (c["run"], c["labeled"]) == (name, labeled)]
        extra = [k for k in config if any(k in differing(config, c) for c in others)]
        if extra:
            name += f" ({', '.join(f'{k}={config[k]}' for k in extra)})"
        found.append(Group(name, labeled, members))
    return found


def options_of(state, path, unlabeled, defaults):
    """The options in which runs of one row are alike, but for g.

    unlabeled: of file_names(); defaults: of options that the run may not know.
    """
    args = defaults | state["args"]
    own = dict(
        flip=args.get("flip"),
        foreground=args.get("foreground", 0.0),
        trust=trust_of(args),
        unlabeled=unlabeled,
        data=state["data"]["checksum"],
        checkpoint=os.path.basename(path),
        run=run_name(args),
        qp=None,
    )
    return {name: value for name, value in args.items() if name not in FREE} | own


def file_names(option, states):
    """Yields the name of the file that each run had as an option, or None. states [runs]

    A file's name is the first path under which a run had it. Checksums in the checkpoints tell
    files apart, or paths where an older checkpoint has no checksum.
    """
    names = {None: None}  # {checksum or path: name}
    for state in states:
        path = state["args"].get(option)
        mark = path and str(_dict(state, "inputs").get(option, path))
        if mark not in names:  # two files may have had one path, one after the other
            names[mark] = f"{path}, checksum {mark}" if path in names.values() else path
        yield names[mark]


def differing(a, b):
    """The options that two runs both know and that differ. a, b: {option: value} -> a set"""
    return {key for key in a.keys() & b.keys() if repr(a[key]) != repr(b[key])}


def split_by_g(config, members, seeds, qps):
    """The rows of runs that differ in seed and g alone. -> [(options, runs)]

    If each seed has a g of its own, they are one row; else each g has a row.
    seeds, qps [runs]: of all runs, not only of the members.
    """
    pairs = {(seeds[i], qps[i]) for i in members}
    its_seeds, its_gs = map(set, zip(*pairs))
    own = None not in its_gs and len(its_seeds) == len(its_gs) == len(pairs) > 1
    rows = {}
    for i in members:
        rows.setdefault("one for each seed" if own else qps[i], []).append(i)
    return [(config | {"qp": name}, mine) for name, mine in rows.items()]


def split_by_seed(config, members, seeds, paths):
    """A row with one run of each seed, and a row for every further run. -> [(options, runs)]"""
    first = {}  # {seed: run}
    for i in members:
        first.setdefault(seeds[i], i)
    again = [i for i in members if i not in first.values()]
    return [(config, list(first.values()))] + [
        (config | {"checkpoint": paths[i]}, [i]) for i in again
    ]


def summarize(runs):
    """The rows of the table: name and labeled of each group, and the values of every metric.

    runs: Scored -> dicts; the values are a list, one for each seed.
    """
    rows = []
    for group in runs.groups:
        table = {
            metric: values(runs.scores, group.members, metric)
            for metric in ("dice", "jaccard", "hd95", "asd", "one_empty")
        }
        row = {
            "run": group.name,
            "labeled": group.labeled,
            "Dice %": 100 * table["dice"].mean((1, 2)),
            "Jaccard %": 100 * table["jaccard"].mean((1, 2)),
            f"HD95 {runs.unit}": table["hd95"].mean((1, 2)),
            f"ASD {runs.unit}": table["asd"].mean((1, 2)),
            "one empty": table["one_empty"].sum((1, 2)).astype(int),
        }
        if len(runs.info.classes) > 2:
            per_class = dict(zip(runs.classes, 100 * table["dice"].mean(1).T))
            row |= {f"Dice % {c}": per_class.get(c) for c in runs.info.classes[1:]}
        dice = values(runs.of_regions, group.members, "dice")
        per_region = dict(zip(runs.held_regions, 100 * dice.mean(1).T))
        row |= {f"Dice % {name}": per_region.get(name) for name in runs.regions}
        rows.append({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()})
    return rows


def values(scores, members, metric):
    """A metric of the runs of a group. -> [runs, cases, classes]

    scores[run][case][class] of Score; members: numbers of the runs.
    """
    found = [[[getattr(s, metric) for s in case] for case in scores[i]] for i in members]
    return np.array(found, np.float64)


def case_dice(scores, members):
    """Mean foreground Dice of each case, mean over the runs of a group.

    scores[run][case][class] of Score; members: numbers of the runs -> [cases]
    """
    found = [[np.mean([s.dice for s in case]) for case in scores[i]] for i in members]
    return np.mean(found, 0)


def find_baselines(name, groups, paths):
    """The groups that --baseline names, by their row, or one of them by a checkpoint's path.

    paths [runs] -> {labeled: number of the group}. InputError if there is none.
    """
    here = os.path.abspath(name)
    found = [
        i
        for i, group in enumerate(groups)
        if here in [os.path.abspath(paths[m]) for m in group.members]
    ][:1]
    if not found:
        found = [i for i, group in enumerate(groups) if group.name == name]
    if not found:
        rows = ", ".join(dict.fromkeys(group.name for group in groups))
        raise InputError(
            f"--baseline {name}: neither a checkpoint nor a row of the table; its rows: {rows}"
        )
    return {groups[i].labeled: i for i in found}


def against(baselines, groups, scores, patient):
    """Columns that compare each group with the baseline of the same labels. -> a dict per group

    baselines: {labeled: number of the group}; patient [cases]: of each case.
    """
    rows = []
    for i, group in enumerate(groups):
        base = baselines.get(group.labeled, i)  # without another, none
        found = (None, None, None)
        if base != i:
            mine = 100 * case_dice(scores, group.members)
            theirs = 100 * case_dice(scores, groups[base].members)
            found = paired(mine, theirs, patient)
        rows.append(dict(zip(("Δ Dice", "95% interval", "p"), found)))
    return rows


# ------------------------------------------------------------------- estimated against true quality


@dataclass
class Judged:
    """The outputs of all runs for some samples."""

    samples: loading.Samples  # with labels
    outputs: list = field(default_factory=list)  # [runs] of Outputs

    @property
    def pair(self):
        """What data/metrics.py takes: the outputs, and the case of each sample."""
        return self.outputs, self.samples.case


@dataclass
class Judge:
    """What --qp compares."""

    g: torch.nn.Module
    second: torch.nn.Module | None  # of --second
    ours: Judged  # on the cases that are scored
    reference: Judged | None  # on val, where estimates are calibrated, unless val is scored


@dataclass
class Opinions:
    """Networks that answer for an image."""

    net: torch.nn.Module  # the judged one
    other: torch.nn.Module  # its teacher; of a teacher, its student
    second: torch.nn.Module | None = None  # an independent one
    flip: str | None = None  # --flip of net: how its augmented pass may be flipped
    color: bool = False  # whether images are colors


def load_judge(args, runs, states, on):
    """-> Judge. runs: Scored; states: {path: state}, of which all have one --size"""
    info = runs.info
    options = {path: state["args"] for path, state in states.items()}
    size = runs.states[0]["args"]["size"]
    g, _ = checkpoints.load_quality(args.qp, info, on, size, options)
    second = None
    if args.second:
        second, _ = checkpoints.load_run(args.second, args.weights, on)
    ours = Judged(loading.load_samples(info, runs.split, size, runs.names))
    reference = None
    labeled = [entry.name for entry in info.splits.get("val", []) if entry.labeled]
    if runs.split != "val" and labeled:
        reference = Judged(loading.load_samples(info, "val", size, labeled))
    return Judge(g, second, ours, reference)


def judge_run(args, judge, runs, path, net, on, *, batch):
    """Adds a run's outputs, with all estimates of their quality, to judge.ours and judge.reference.

    runs: Scored; path: of the run; net: its network, of --weights; batch: samples in a pass.
    """
    weights = "student" if args.weights == "teacher" else "teacher"
    other, state = checkpoints.load_run(path, weights, on)
    if args.trust:
        other = corrected_by(judge.g, other, args)
    flip = checkpoints.flip_of(path, runs.info, state["args"])
    by = Opinions(net, other, judge.second, flip, runs.info.color)
    for judged in (judge.ours, judge.reference):
        if judged is not None:
            outputs = compare_estimates(judge.g, by, judged.samples, on, batch)
            judged.outputs.append(of_classes(outputs, runs.held))


@torch.no_grad()
def compare_estimates(g, by, samples, on, batch):
    """Estimates the quality of by.net's outputs, by g and by all that needs no g. -> Outputs

    by: Opinions; samples: N with labels; batch: samples in a pass.
    """
    torch.manual_seed(0)  # of the augmented pass
    facts, estimates = [], []
    for seen, truth, mine in inference.judged_outputs(by.net, samples, on, batch):
        mask = seen.mask  # [B, K-1, *S]
        facts.append(
            dict(
                present=pixels(truth) > 0,
                shared=pixels(mask * truth),
                area=pixels(mask),
                total=pixels(mask + truth),
            )
        )
        estimates.append(estimates_of(g, by, seen, mine, on))
    return Outputs(**joined(facts), estimates=joined(estimates))


def pixels(v):
    """The number of pixels of masks. [B, K-1, *S] -> [B, K-1]"""
    return v.flatten(2).sum(2)


def joined(parts):
    """The parts of several batches, {name: [B, K-1]} each, as arrays. -> {name: [N, K-1]}"""
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def estimates_of(g, by, seen, mine, on):
    """All estimates of the quality of some outputs. -> {name: [B, K-1]}

    seen: images and the output of by.net; mine [B, K, *S]: its probabilities.
    """
    x = seen.image  # [B, C, *S]
    with on.autocast():
        by_g = g(seen)
    turned = augment.strong(augment.mirror(x, by.flip), 0.5, by.color)
    again = augment.mirror(inference.class_probabilities(by.net, turned, on), by.flip)
    other = inference.class_probabilities(by.other, x, on)
    says = {
        "g": by_g,
        TOGETHER: quality.together(by_g, seen.mask, mine),
        "mean confidence": quality.confidence(mine),
        "mean certainty (entropy)": quality.certainty(mine),
        "region confidence": quality.region_confidence(mine),
        "f's own expected Dice": quality.expected_dice(mine),
        "agreement with an augmented pass": quality.overlap(mine, again),
        "agreement of student and teacher": quality.overlap(mine, other),
    }
    if by.second is not None:
        second = inference.class_probabilities(by.second, x, on)
        says["expected Dice under a second network"] = quality.expected_dice(mine, second)
    return says


def corrected_by(g, net, args):
    """The network whose outputs g corrects by --trust. InputError if g has a scalar head."""
    checkpoints.check_dense(g, args.qp, "--trust")
    return quality.Corrected(net, g, args.trust)


def gigaflops(net, given):
    """Multiplications and additions of one pass, in billions. given: images, or Seen for g"""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(given)
    return counter.get_total_flops() / 1e9


class Cost(NamedTuple):
    """What a pass of f and of g costs, in words."""

    shape: str  # of what both see
    f: str
    g: str


def cost_of(net, g, info, size, on):
    """-> Cost. size: of slices or patches"""
    shape = loading.shape_of(size)
    x = torch.zeros(1, info.channels, *shape, device=on.device)
    seen = quality.Seen.of_probabilities(x, x.new_zeros(1, len(info.classes), *shape))

    def cost(net, given):
        return (
            f"{gigaflops(net, given):.2f} GFLOPs ({models.parameters(net) / 1e6:.1f} M parameters)"
        )

    return Cost(
        shape=f"{'an image' if info.dims == 2 else 'a patch'} of {' x '.join(map(str, shape))}",
        f=cost(net, x),
        g=cost(g, seen),
    )


def cost_line(costs):
    """What a pass costs, for each network that occurs. costs [runs] of Cost, all of one shape"""
    by_f = " or ".join(dict.fromkeys(cost.f for cost in costs))
    return f"Cost of {costs[0].shape}: f {by_f}, g {costs[0].g}."


# --------------------------------------------------------------------------------------- --predict


def predict(args):
    """--predict: a mask of every case of a split, labeled or not, or of every new image.

    With --qp also a list of them, worst first.
    """
    (path,) = args.checkpoints
    on = compute(args.device, args.amp)
    f, state = checkpoints.load_run(path, args.weights, on)
    size = state["args"]["size"]

    # what can be refused is refused before images are read
    check_out(args, state["data"])
    known = data_of(path, state)
    checkpoints.check_trained_size(path, known, size)
    window = inference.window_of(size, args, args.batch)
    g = None
    if args.qp:
        g, _ = checkpoints.load_quality(args.qp, known, on, size, {path: state["args"]})
    net = corrected_by(g, f, args) if args.trust else f
    masks = os.path.join(args.out, "masks")
    lock = claim(args.out)  # noqa: F841 (until this ends)
    check_masks(masks, args)

    with dataset(args, state["data"]) as info, new_masks(args.out) as made:
        check_runs(args, info, {path: state})
        h5.choose_shown(info, args.show)
        info = on_source_grids(info)
        split = args.split or ("unlabeled" if info.splits.get("unlabeled") else "val")
        split, entries = chosen_cases(info, split, {path: state}, args.qp)
        names = [entry.name for entry in entries]
        cases = inference.Cases(info, split, size, names, keep=False)
        batch = args.batch or samples_in(32, loading.shape_of(size))
        found = inference.answers(net, cases, on, window, batch)
        rows = []
        for answer in bar(found, len(cases), "predict"):
            entry, label = answer.case.entry, answer.label
            if args.largest_component:
                label = largest_component(label, len(info.classes))
            file = write_mask(made, label, entry)
            if g:
                answer = answer._replace(label=label)
                dice, score = predicted_quality(g, net, answer, size, on)
                z = figures.middle(label, len(label))
                rows.append(Predicted(dice, score, entry, file, z, pack(label[z])))
        put_masks(made, masks)
        print(f"wrote {len(cases)} masks in {masks}")
        if g:
            rows.sort(key=lambda row: row.score)
            write_worst_first(args, info, split, rows)
        else:
            print("next: look at them; with --qp QP.pt, a list says which first")


class Predicted(NamedTuple):
    """A mask that was written, and what g and f say of it."""

    dice: np.ndarray  # [K-1] that g predicts
    score: float  # what g and f say together, mean over classes: the lowest is shown first
    entry: h5.Entry
    file: str  # name of the mask's
    z: int  # slice to show
    drawing: np.ndarray  # pack() of this slice of the mask


def data_of(path, state):
    """The data that a run has learned from, as its checkpoint describes them. -> Info, no cases"""
    data = state["data"]
    return h5.Info(
        path=path,
        name=data["name"],
        classes=data["classes"],
        dims=data["dims"],
        channels=data["channels"],
        splits={},
        checksum=0,
        channel_names=h5.names_of(data),
        standardize=data.get("standardize", True),
        prepared=data.get("prepared"),
        spacing=data.get("spacing"),
    )


def check_out(args, data):
    """InputError if masks would go where images are, of which masks/ may hold the truth.

    data: of the checkpoint, which may have learned from a folder for each channel.
    """
    from data import new_images  # brings SimpleITK, which takes a second and only --predict needs

    folders = new_images.may_hold(args.data) if new_images.are_new(args.data) else []
    channels = new_images.folders_of(data.get("prepared"), h5.names_of(data), args.data)
    names = [*filter(None, new_images.FOLDERS), *channels]
    among = any(os.path.isdir(os.path.join(args.out, name)) for name in names)
    if among or os.path.realpath(args.out) in map(os.path.realpath, folders):
        raise InputError(
            f"--out {args.out}: is a folder of the images; choose another, since its masks/ may "
            "hold the truth, and the next run would take this run's pictures for images"
        )


@contextlib.contextmanager
def dataset(args, data):
    """The Info of a dataset file, or of new images. data: of the checkpoint that is to see them

    New images lie in a temporary dataset file until the block ends.
    """
    from data import new_images  # see check_out()

    if not new_images.are_new(args.data):
        yield h5.read_info(args.data)
        return
    if args.split:
        raise InputError(
            f"--split {args.split}: {args.data} holds images, not a dataset that has splits"
        )
    # claim() removes what has such names, should this process be killed
    temporary = os.path.join(args.out, f".images.{os.getpid()}.part")
    try:
        yield new_images.convert(args.data, temporary, data)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


MASKS = (".png", ".nii.gz")  # what write_mask() writes


def check_masks(masks, args):
    """InputError if a folder holds masks that may not be replaced, or anything but masks."""
    if os.path.lexists(masks) and not os.path.isdir(masks):
        raise InputError(f"{masks}: is no folder, so no mask can go there; choose another --out")
    found = sorted(glob.glob(os.path.join(glob.escape(masks), "*")))
    if found and not args.overwrite:
        raise InputError(
            f"{masks}: holds masks already, perhaps corrected ones; replace them with --overwrite, "
            "or choose another --out"
        )
    for path in found:
        if os.path.isdir(path) or not path.endswith(MASKS):
            kind = "a folder" if os.path.isdir(path) else "no mask, but"
            raise InputError(f"{path}: {kind} among the masks; move it, or choose another --out")


@contextlib.contextmanager
def new_masks(out):
    """Yields a folder in OUT for masks that are being made; at the end it is removed."""
    made = os.path.join(out, f".masks.{os.getpid()}.part")  # see dataset()
    try:
        os.makedirs(made)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def put_masks(made, masks):
    """Replaces the masks of an earlier --predict by those in `made`, and removes its list."""
    out = os.path.dirname(masks)
    lists = [os.path.join(out, f"worst_first.{ending}") for ending in ("csv", "png")]
    for path in glob.glob(os.path.join(glob.escape(masks), "*")) + lists:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    os.makedirs(masks, exist_ok=True)
    for name in os.listdir(made):
        shutil.move(os.path.join(made, name), os.path.join(masks, name))  # perhaps to another disk


@torch.no_grad()
def predicted_quality(g, net, answer, size, on):
    """What g, and g and f together, say of a case's mask. -> Dice [K-1], mean score over classes

    Both are means over all slices or patches. Each of them counts as much as the area of the mask
    in it. net: f, or f that g corrects, asked once more; answer: inference.Answer, its label of any
    grid in the plane; size: of the network's grid.
    """
    samples = inference.samples_of(answer.case, size)
    label = on_samples(answer.label, samples, size)  # [N, *S]
    parts = []
    for rows in torch.arange(len(samples)).split(samples_in(64, label.shape[1:])):
        x, _ = samples.batch(rows, on.device)
        seen = quality.Seen.of_label(x, label[rows].to(on.device), g.config["classes"])
        p = inference.class_probabilities(net, x, on)
        with on.autocast():
            by_g = g(seen).float()
        score = quality.together(by_g, seen.mask, p)
        area = seen.mask.flatten(2).sum(2)
        parts.append([v.cpu().numpy() for v in (by_g, score, area)])
    by_g, scores, area = map(np.concatenate, zip(*parts))
    dice = area_mean(by_g, area, samples.case)[0]  # of the one case
    score = area_mean(scores, area, samples.case)[0]
    return dice, float(score.mean())


def on_samples(label, samples, size):
    """The label of a case (D, H, W) on the grid of its N samples. -> [N, *S]"""
    if isinstance(size, int):
        parts = [loading.resize_label(one, size) for one in label]
    else:
        label = loading.at_least(label, size)
        places = [tuple(slice(c, c + s) for c, s in zip(corner, size)) for corner in samples.at]
        parts = [label[place] for place in places]
    return torch.from_numpy(np.stack(parts))


def write_mask(masks, label, entry):
    """The mask of a case as a file in a folder: of a volume NIfTI on its source's grid, else PNG.

    label: (D, H, W) uint8 -> the file's name
    """
    from data import nifti, pixels

    if len(entry.grid) == 3:
        name = f"{entry.name}.nii.gz"
        nifti.write_mask(os.path.join(masks, name), label, entry)
    else:
        name = f"{entry.name}.png"
        pixels.write_mask(os.path.join(masks, name), label[0])
    return name


def write_worst_first(args, info, split, rows):
    """What a person should look at, in this order. rows: of Predicted, worst first

    Writes a CSV of all cases, and a picture of the first sixteen.
    """
    table = []
    for rank, row in enumerate(rows, 1):
        by_class = {
            f"predicted Dice, {name}": round(float(dice), 4)
            for name, dice in zip(info.classes[1:], row.dice)
        }
        table.append(
            {
                "rank": rank,
                "case": row.entry.name,
                TOGETHER: round(row.score, 4),
                "predicted Dice": round(float(row.dice.mean()), 4),
                **by_class,
                "mask": f"masks/{row.file}",
                "source": row.entry.source,
            }
        )
    write_csv(os.path.join(args.out, "worst_first.csv"), table)
    panels = worst_panels(info, split, rows[:16]) if args.pictures else []
    written = f"{args.out}/worst_first.csv"
    if panels:
        written += ", worst_first.png"
        path = os.path.join(args.out, "worst_first.png")
        figures.cases(path, [panels], info.classes, columns=4, side=2.5)
    print(f"wrote {written}; the first of them, by what g and f say together:")
    for row in rows[:5]:
        print(f"  {row.score:.3f}  {row.entry.name} (predicted Dice {row.dice.mean():.3f})")
    print("next: look at these, from the top, and correct what is wrong")


def worst_panels(info, split, rows):
    """A panel of each case, worst first. -> list of figures.Panel"""
    panels = []
    with h5.open_file(info.path) as f:
        for rank, row in enumerate(rows, 1):
            image, _ = h5.read_shown(f, info, split, row.entry.name, label=False)
            place = f", slice {row.z}" if len(image) > 1 else ""
            title = f"{rank}. {row.entry.name[:24]}{place}"
            title += f"\npredicted {dice_name(image)} {row.dice.mean():.2f}"
            mask = unpack(row.drawing, image)
            panels.append(figures.Panel(title, image[row.z], mask, row.entry.aspect))
    return panels


def dice_name(image):
    """What the Dice of a case (D, H, W[, 3]) is called beside one of its slices."""
    return "volume Dice" if len(image) > 1 else "Dice"


def pack(label):
    """A slice of a mask (H, W) uint8 as the bytes of a PNG, which take little memory."""
    return cv2.imencode(".png", label)[1]


def unpack(packed, image):
    """The slice again, on the grid of an image (D, H, W[, 3]). -> (H, W) uint8

    The mask of a picture may have had its source's grid.
    """
    mask = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
    return cv2.resize(mask, image.shape[2:0:-1], interpolation=cv2.INTER_NEAREST)


# ------------------------------------------------------------------------------ tables and pictures


PICTURES = ("compare", "cases", "cases/*", "curves", "quality", "estimates", "triage")
SCORES = ("summary.json", "cases.csv", "summary.md")  # in the order in which they are written
OF_QP = ("quality.md", "quality.json", "quality.csv")


def check_scores(out):
    """InputError if a folder holds files of such names and no summary.json of an evaluation."""
    first = os.path.join(out, SCORES[0])
    try:
        with open(first, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and {"title", "rows", "args"} <= found.keys():
        return
    if found := files_of_scores(out):
        raise InputError(
            f"{found[0]}: would be replaced, but no summary.json beside it is of evaluate.py; "
            "move it, or choose another --out"
        )


def files_of_scores(out, without=()):
    """The files in a folder that have names of those which an evaluation writes."""
    names = [*SCORES, *OF_QP, *(f"{name}.png" for name in PICTURES)]
    names = [name for name in names if name not in without]
    return [path for name in names for path in glob.glob(os.path.join(glob.escape(out), name))]


def remove_scores(out):
    """Removes what an earlier evaluation has written and this one may not write again."""
    for path in files_of_scores(out, without=SCORES):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


COLUMNS = (  # below the table
    "HD95, ASD: distances between surfaces; 95th percentile of both directions, and mean from "
    "output to truth\n"
    "one empty: pairs of a case and a class in which either the output or the truth is empty; Dice "
    "is 0, a distance is the grid's diagonal"
)


def write_scores(args, runs, windows):
    """The table, on the screen too, and a CSV with a row per run, case and class or region.

    windows: the inference.Window of each run, None for slices.
    """
    rows = summarize(runs)
    title = scores_title(args, runs, windows)
    if args.baseline:
        patient = [entry.patient for entry in runs.entries]
        baselines = find_baselines(args.baseline, runs.groups, args.checkpoints)
        columns = against(baselines, runs.groups, runs.scores, patient)
        if all(column["Δ Dice"] is None for column in columns):
            print(f"note: --baseline {args.baseline}: no other row has the same --labeled")
        rows = [row | more for row, more in zip(rows, columns)]
        base = runs.groups[next(iter(baselines.values()))]
        title += (
            f"\nΔ Dice: points above {base.name} of the same labeled; mean and 95% interval "
            f"(bootstrap, percentiles) over {len(set(patient))} patients, in each the mean over "
            "cases, classes and seeds; p: Wilcoxon's signed-rank test, two-sided"
        )
    scored = {*runs.classes, *runs.held_regions}
    absent = [name for name in [*runs.info.classes[1:], *runs.regions] if name not in scored]
    found = dict(title=title, rows=rows, absent=absent, args=vars(args))
    write_text(os.path.join(args.out, "summary.json"), json.dumps(found, indent=1))
    write_csv(os.path.join(args.out, "cases.csv"), score_rows(args, runs))
    text = f"{title}\n\n{markdown(list(map(with_small_p, rows)))}\n\n{COLUMNS}"
    if runs.regions:
        unions = [
            f"{name} = {' + '.join(runs.info.classes[k] for k in ks)}"
            for name, ks in runs.regions.items()
        ]
        text += f"\nregions, which no mean over classes counts: {', '.join(unions)}"
    if absent:
        text += f"\n\n{without(absent, args.split)}: left out of every mean."
    write_text(os.path.join(args.out, "summary.md"), text + "\n")
    print(text)


def corrected_words(args):
    """What a title says of --trust."""
    return f"; outputs corrected by g (--trust {args.trust:g})" if args.trust else ""


def scores_title(args, runs, windows):
    """What stands above the table. windows: of write_scores()"""
    title = (
        f"{runs.info.name}, {args.split}, {len(runs.entries)} cases, mean over cases, then "
        "classes; ± over seeds"
    )
    if args.split == "val" and "best.pt" in map(os.path.basename, args.checkpoints):
        title += "; val chose these checkpoints (best.pt)"
    if any(windows):
        title += f"; {' or '.join(dict.fromkeys(map(str, windows)))}"
    title += corrected_words(args)
    resampled = sum(entry.source_grid is not None for entry in runs.entries)
    if resampled and args.grid == "source":
        title += "; scored on the sources' own grids"
    elif args.grid == "source":
        title += "; no source is known to have another grid (--grid source)"
    elif resampled:
        title += (
            f"; {resampled} of the cases are scored on the resampled grid of the dataset, not on "
            "their sources' (--grid source)"
        )
    return title


def with_small_p(row):
    """A row of the table, whose p is cut at what three digits can show."""
    small = row.get("p") is not None and 0 < row["p"] < 0.001
    return row | {"p": "< 0.001"} if small else row


def score_rows(args, runs):
    """The rows of cases.csv: one per run, case and class or region."""
    rows = []
    for group in runs.groups:
        for i in group.members:
            run = {
                "checkpoint": args.checkpoints[i],
                "run": group.name,
                "labeled": group.labeled,
                "seed": runs.states[i]["args"]["seed"],
            }
            for entry, *scores in zip(runs.entries, runs.scores[i], runs.of_regions[i]):
                case = {"case": entry.name, "patient": entry.patient}
                for name, score in zip([*runs.classes, *runs.held_regions], sum(scores, [])):
                    rows.append(run | case | {"class": name, "unit": runs.unit} | asdict(score))
    return rows


NO_TRIAGE = f"No run has cases with Dice both below and above {BAD:g}, so there is nothing to find."


def write_quality(args, runs, judge, costs):
    """The tables, pictures and CSV of --qp. -> the names of further files, in words

    runs: Scored; costs [runs] of Cost.
    """
    info = runs.info
    ours, reference = judge.ours, judge.reference
    sample = "slice" if info.dims == 2 else "patch"
    levels = {level: text.format(sample) for level, text in LEVELS.items()}
    patient = {entry.name: entry.patient for entry in runs.entries}
    tables = compare_rows(runs.groups, ours.pair, reference and reference.pair, patient)
    shown, curves = triage(*ours.pair)
    title = quality_title(args, runs, ours, reference) + cost_line(costs)
    true = [plain_dice(outputs.shared, outputs.total) for outputs in ours.outputs]  # [N, K-1] each
    first = next(iter(tables))  # "present", unless no class is

    page = f"{title}\n"
    for level, rows in tables.items():
        page += f"\n{levels[level][0].upper()}{levels[level][1:]}\n\n{markdown(rows)}\n"
    page += f"\n{TRIAGE}\n\n{markdown(shown)}\n" if shown else f"\n{NO_TRIAGE}\n"
    write_text(os.path.join(args.out, "quality.md"), page)
    ranks = dict(rows=shown, curves=curves)
    found = dict(title=title, levels=tables, triage=ranks, args=vars(args))
    write_text(os.path.join(args.out, "quality.json"), json.dumps(found, indent=1))
    write_csv(os.path.join(args.out, "quality.csv"), quality_csv(args, runs, ours, true, sample))

    means = [
        {key: value for key, value in row.items() if key != "run"}
        for row in tables[first]
        if row["run"] == "mean of all"
    ]
    text = f"Mean over all runs, {levels[first]} (quality.md has all)\n\n{markdown(means)}"
    if shown:
        text += f"\n\n{TRIAGE}\n\n{markdown(shown)}"
    print(f"\n{title}\n\n{text}")

    draw_quality(args, runs, ours, true, tables[first])
    if not curves:
        return ", quality.*, estimates.png"
    panel = {f"{info.name}, {args.split}: cases with Dice below {BAD:g}": curves}
    figures.triage(os.path.join(args.out, "triage.png"), panel)
    return ", quality.*, estimates.png, triage.png"


def quality_title(args, runs, ours, reference):
    """What stands above the tables of --qp."""
    cases = len(set(ours.samples.case))
    fitted = "val" if reference else "the other patients"
    title = (
        f"Estimated against true quality, {runs.info.name}, {args.split}, {cases} cases: mean over "
        f"seeds{corrected_words(args)}. MAE calibrated: after a monotone map to Dice, fitted on "
        f"{fitted}; makes estimates of all scales comparable.\n"
    )
    if args.split == "val":
        title += (
            "The temperature of a dense g, and the best epoch of a scalar one, were chosen on val "
            "itself.\n"
        )
    return title


def quality_csv(args, runs, ours, true, sample):
    """The rows of quality.csv: one per run, sample and class.

    true [runs] of [N, K-1]: Dice; sample: what one is called.
    """
    rows = []
    for group in runs.groups:
        for i in group.members:
            outputs = ours.outputs[i]
            run = {
                "checkpoint": args.checkpoints[i],
                "run": group.name,
                "seed": runs.states[i]["args"]["seed"],
            }
            for n, (case, at) in enumerate(zip(ours.samples.case, ours.samples.at)):
                place = {"case": case, sample: " ".join(map(str, at))}
                for k, name in enumerate(runs.classes):
                    says = {title: v[n, k] for title, v in outputs.estimates.items()}
                    truth = {"present": outputs.present[n, k], "true": true[i][n, k]}
                    rows.append(run | place | {"class": name} | truth | says)
    return rows


def draw_quality(args, runs, ours, true, rows):
    """quality.png, of the first run of each group, and estimates.png, of the rows of a table."""
    panels = {}
    for group in runs.groups:
        i = group.members[0]
        title = f"{group.name}, labeled {group.labeled}"
        if len(group.members) > 1:
            title += f", seed {runs.states[i]['args']['seed']}"
        outputs = ours.outputs[i]
        panels[title] = outputs.estimates["g"], true[i], outputs.present
    classes = [runs.info.classes[0], *runs.classes]
    figures.quality(os.path.join(args.out, "quality.png"), panels, classes)
    figures.estimates(os.path.join(args.out, "estimates.png"), rows)


def draw(args, runs):
    """All pictures of runs that were scored. -> the names of the files, in words"""
    names = [f"{group.name}, labeled {group.labeled}" for group in runs.groups]
    dice = [case_dice(runs.scores, group.members) for group in runs.groups]  # [groups][cases]
    figures.comparison(os.path.join(args.out, "compare.png"), dict(zip(names, dice)))
    order = np.argsort(-np.mean(dice, 0), kind="stable").tolist()  # best first
    marks = {order[len(order) // 2]: "median", order[-1]: "worst", order[0]: "best"}
    count = min(args.pictures, len(order))
    shown = {order[i] for i in np.linspace(0, len(order) - 1, count).astype(int)}
    rows = {}  # case -> its panels
    with h5.open_file(runs.info.path) as f:
        for c in sorted(shown | set(marks)):
            rows[c] = case_panels(runs, f, c, marks.get(c), names)
            if c in shown:
                path = os.path.join(args.out, "cases", f"{runs.entries[c].name}.png")
                figures.cases(path, [rows[c]], runs.info.classes, columns=5, side=2.5)
    marked = [rows[c] for c in order if c in marks]
    figures.cases(os.path.join(args.out, "cases.png"), marked, runs.info.classes)
    return ", compare.png, cases.png, cases/*.png" + draw_curves(args)


def case_panels(runs, f, c, mark, names):
    """The image, its truth and the output of the first run of each group. -> list of figures.Panel

    f: the open file; c: number of the case; mark: "best", ... or None; names: of the groups.
    """
    entry = runs.entries[c]
    image, truth = h5.read_shown(f, runs.info, runs.split, entry.name)
    z = figures.middle(truth, len(image))
    title = f"{mark}: {entry.name}" if mark else entry.name
    panels = [
        figures.Panel(title, image[z], None, entry.aspect),
        figures.Panel(
            "truth" if len(image) == 1 else f"truth, slice {z}", image[z], truth[z], entry.aspect
        ),
    ]
    for name, group in zip(names, runs.groups):
        i = group.members[0]
        dice = case_dice(runs.scores, [i])[c]
        title = "\n".join([*textwrap.wrap(name, 30), f"{dice_name(image)} {dice:.3f}"])
        mask = unpack(runs.drawings[i][c], image)
        panels.append(figures.Panel(title, image[z], mask, entry.aspect))
    return panels


def draw_curves(args):
    """The training curves of runs whose log.csv is there. -> the name of the file, in words"""
    folders = dict.fromkeys(os.path.dirname(path) for path in args.checkpoints)
    logs = [os.path.join(name, "log.csv") for name in folders]
    logs = [log for log in logs if os.path.isfile(log)]
    if not logs:
        return ""
    try:
        curves = dict(zip(figures.run_names(logs), map(figures.read_log, logs)))
        figures.curves(os.path.join(args.out, "curves.png"), curves)
    except InputError as error:  # the scores are what was asked for
        print(f"note: no training curves: {error}")
        return ""
    return ", curves.png"


def best_run(args, runs):
    """The number of the run that is best on val. Another split is for the report, not for choosing.

    A checkpoint tells the best val Dice of its run and the step that had it. Among checkpoints of
    one run, the one of that step is chosen. Where val itself is scored, or a checkpoint tells no
    Dice, the table decides.
    """
    best = [_dict(state, "best") for state in runs.states]
    numbers = range(len(best))
    if args.split == "val" or not all(isinstance(b.get("dice"), float) for b in best):
        return max(numbers, key=lambda i: case_dice(runs.scores, [i]).mean())
    return max(
        numbers, key=lambda i: (best[i]["dice"], best[i].get("step") == runs.states[i].get("step"))
    )


def next_command(args, runs):
    """What to do with the best run, as a command."""
    best = args.checkpoints[best_run(args, runs)]
    of_g = ["--qp", args.qp] if args.qp else []
    if args.trust:
        of_g += ["--trust", f"{args.trust:g}"]
    more = ["--weights", args.weights] if args.weights != "student" else []
    more += ["--largest-component"] if args.largest_component else []
    more += inference.window_words(args)
    command = ["python", "evaluate.py", "NEW", best, "--predict", *of_g, *more]
    return shlex.join([*command, "--out", "runs/new"]) + "    (NEW: images without labels)"


# ---------------------------------------------------------------------------------------- options


# fmt: off
def parse_args(argv=None):
    p = Parser(__doc__, prog="evaluate.py")
    p.add_argument("data",
                   help="dataset file; with --predict also a folder of pictures or of NIfTI "
                        "volumes, or one of these")
    p.add_argument("checkpoints", nargs="+",
                   help="best.pt, last.pt or step*.pt of one or more runs")
    p.add_argument("--out", type=folder, required=True,
                   help="folder for tables, pictures and masks")
    p.section("what to do")
    p.add_argument("--split", choices=(*h5.SPLITS, "held_out"),
                   help="cases to score, which need labels (default: val), or to --predict "
                        "(default: unlabeled, else val); held_out: train cases whose labels no "
                        "run and no g has learned from")
    p.add_argument("--grid", choices=("stored", "source"), default="stored",
                   help="score on the grids of the dataset, or on those that the sources had "
                        "before a converter resampled them, as masks of --predict have")
    p.add_argument("--regions", metavar="NAME=CLASSES;...",
                   help="score unions of classes, too, as in 'whole=1,2,3;core=1,3': numbers or "
                        "names of classes; the means stay those of classes")
    p.add_argument("--predict", action="store_true",
                   help="write the masks of one checkpoint instead of scoring; needs no labels; "
                        "with --qp also a list of them, worst first")
    p.add_argument("--weights", choices=("student", "teacher"), default="student",
                   help="the trained network, or its moving average")
    p.add_argument("--baseline", metavar="RUN",
                   help="compare the other rows of the same --labeled with this one, a row's name "
                        "or a checkpoint's path: difference in Dice, patient by patient, with its "
                        "interval and a test")
    p.add_argument("--largest-component", action="store_true",
                   help="keep the largest connected component of each class, in scores and masks "
                        "(where --qp compares estimates with the truth, it sees the outputs as "
                        "they are)")
    p.add_argument("--overwrite", action="store_true",
                   help="with --predict: replace the masks that OUT holds")
    p.section("quality of the outputs")
    p.add_argument("--qp", metavar="QP.pt",
                   help="quality predictor: compare its and simpler estimates with each output's "
                        "true quality; with --predict: list the masks, worst first, by what "
                        "g and the network say together")
    p.add_argument("--trust", type=SHARE, default=0.0,
                   help="with --qp: g corrects the outputs before they are scored or written: the "
                        "share of its prediction of the truth in an output; find the best one on "
                        "val (0: the network alone, 1: g alone)")
    p.add_argument("--second", metavar="RUN.pt",
                   help="with --qp: an independent run, whose opinion on the outputs is one more "
                        "estimate")
    p.section("pictures")
    p.add_argument("--pictures", type=number(0), default=20,
                   help="cases to draw, evenly spread from best to worst; 0 draws nothing at all")
    h5.add_show(p)
    p.section("running")
    p.add_argument("--batch", type=number(1, 65_536),
                   help="slices or windows of a volume in one pass (default: what is as large as "
                        "32 slices of 224 x 224)")
    p.add_argument("--workers", type=number(0, 1000), default=min(8, cores()),
                   help="processes that score the cases of large data sets while the next ones "
                        "are predicted; 0: none")
    p.add_argument("--device", type=device_name, default="auto",
                   help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                   help="mixed precision")
    inference.add_window_options(p)
    args = p.parse_args(argv)
    if args.second and not args.qp:
        raise InputError("--second is compared with g: it needs --qp")
    if args.trust and not args.qp:
        raise InputError(f"--trust {args.trust:g}: needs the g of --qp")
    if args.trust and args.window == "whole":
        raise InputError("--trust: g knows patches alone, so leave out --window whole")
    compares = len(args.checkpoints) > 1 or args.second or args.baseline
    if args.predict and (compares or args.regions is not None):
        raise InputError(
            "--predict writes the masks of one checkpoint, without --baseline, --second or "
            "--regions"
        )
    return args
# fmt: on


def print_idle(args):
    """A note on options that have no effect beside the others."""
    names = ["grid"] if args.predict else ["overwrite"]
    if args.predict and not args.qp:  # without a list, no pictures
        names += ["pictures", "show"]
    if args.window == "whole":
        names += ["stride", "blend"]
    note_idle(args, names, parse_args(["DATA", "RUN", f"--out={args.out}"]))


def cores():
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(argv=None):
    args = parse_args(argv)
    print_idle(args)
    if args.predict:
        return predict(args)
    args.split = args.split or "val"
    check_scores(args.out)
    on = compute(args.device, args.amp)
    info = h5.read_info(args.data)
    h5.choose_shown(info, args.show)
    if args.grid == "source":
        info = on_source_grids(info)
    regions = regions_of(args.regions, info.classes) if args.regions is not None else {}

    # the runs
    states = load_states(args)
    check_runs(args, info, states)
    chosen = [states[path] for path in args.checkpoints]
    groups = group_runs(chosen, args.checkpoints)
    if args.baseline:
        find_baselines(args.baseline, groups, args.checkpoints)  # fails before the work begins

    # the cases
    split, entries = chosen_cases(info, args.split, states, args.qp)
    check_labels(args, info, split, entries)
    note_taught(args, info, split, entries, states)
    names = [entry.name for entry in entries]
    held = supervision.held_classes(info, split, names, args.grid == "source")
    runs = Scored(info, split, entries, chosen, groups, held, regions)
    judge = load_judge(args, runs, states, on) if args.qp else None

    # scoring
    first = {group.members[0] for group in groups}  # pictures show the first run of each group
    voxels = sum(math.prod(entry.grid) for entry in entries)
    keep = voxels * info.channels * 5 < KEEP
    cases = None
    windows, costs = [], []  # [runs]
    scoring = dict(regions=[*runs.held_regions.values()], unit=runs.unit)
    with scoring_pool(args.workers, voxels) as pool:
        for i, path in enumerate(args.checkpoints):
            f, _ = checkpoints.load_run(path, args.weights, on)
            net = corrected_by(judge.g, f, args) if args.trust else f
            size = chosen[i]["args"]["size"]
            if cases is None or size != cases.size:
                cases = inference.Cases(info, split, size, runs.names, keep)
            batch = args.batch or samples_in(32, loading.shape_of(size))
            window = inference.window_of(size, args, batch)
            windows.append(window)
            found = inference.predict_cases(net, cases, on, window, batch)
            found = bar(found, len(cases), path)
            draws = args.pictures > 0 and i in first
            scores, runs.drawings[i] = score_run(args, cases, found, pool, draws, **scoring)
            runs.scores.append([list(itertools.compress(case, held)) for case in scores])
            runs.of_regions.append([case[len(held) :] for case in scores])
            if judge:
                judge_run(args, judge, runs, path, net, on, batch=batch)
                costs.append(cost_of(f, judge.g, info, size, on))

    # tables and pictures
    remove_scores(args.out)
    write_scores(args, runs, windows)
    written = "summary.md, summary.json, cases.csv"
    if judge:
        written += write_quality(args, runs, judge, costs)
    if args.pictures:
        written += draw(args, runs)
    print(f"\nwrote {args.out}/{written}\nnext: {next_command(args, runs)}")


if __name__ == "__main__":
    workers.forget_script()
    cli(main)
