"""Stage 4: scores checkpoints on a split, case by case; or predicts masks, also for new images, and says which of them to look at.

    python evaluate.py DATA.h5 runs/*/best.pt --split val --out runs/table [--baseline supervised] [--qp runs/qp/qp.pt [--second runs/other/best.pt]]
    python evaluate.py NEW runs/mt_qw/best.pt --predict --out runs/new [--qp runs/qp/qp.pt]

Reads  DATA.h5, checkpoints of train_ssl.py (best.pt, last.pt, step*.pt), the log.csv beside them, optionally the qp.pt of train_qp.py.
       NEW is a dataset file (labels are not needed), a folder of pictures or of NIfTI volumes, or one of these.
Writes OUT/cases.csv (a row per run, case and class), OUT/summary.json, OUT/summary.md (the table on the screen), OUT/compare.png,
       OUT/cases.png (best, median and worst case: image, truth, each run's outlines), OUT/cases/*.png (more of them), OUT/curves.png (training);
       with --qp, which compares g and simpler estimates of the outputs' quality with the truth, also OUT/quality.csv (a row per run, sample
       and class), quality.md, .json, quality.png (g), estimates.png (all) and triage.png (who finds the bad cases).
       With --predict OUT/masks/*, one for each case, on the grid of its source: .nii.gz for a volume, for an image .png with a palette, whose
       pixels are class numbers; with --qp also OUT/worst_first.csv, the Dice that g predicts, and worst_first.png, the sixteen worst.

A class that no label of the split holds counts in no mean, and its column says "-". One that a case
lacks, but not the split, has Dice 1 in this case where the output lacks it too, else 0.
Runs that differ only in their seed form one row: mean and standard deviation. Cases are read, predicted and scored one after the other,
each on its own grid, as the dataset stores it, or, with --grid source, on that of its source, on
which masks are delivered; volumes are scored as volumes, also those that were segmented slice by
slice. The estimates of quality are compared on the network's grid, for slices or for patches that
cover the volumes.

Legend: N samples (slices or patches), B batch, K classes, D depth, H height, W width, *S the network's grid: S, S or D, H, W.
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
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, workers
from data.files import InputError, claim
from data.metrics import (
    BAD,
    LEVELS,
    TRIAGE,
    Outputs,
    at_level,
    compare_rows,  # noqa: F401
    largest_component,
    of_classes,
    paired,
    plain_dice,
    score_case,
    triage,
)
from data.options import Parser, cli, folder, number
from data.tables import markdown, write_csv, write_text
from models import checkpoints, inference, quality
from models.checkpoints import load_checkpoint
from models.device import compute, device_name, samples_in
from models.losses import one_hot


def parse_args(argv=None):
    p = Parser(__doc__, prog="evaluate.py")
    p.add_argument(
        "data",
        help="dataset file; with --predict also a folder of pictures or of NIfTI volumes, or one of these",
    )
    p.add_argument(
        "checkpoints", nargs="+", help="best.pt, last.pt or step*.pt of one or more runs"
    )
    p.add_argument(
        "--out", type=folder, required=True, help="folder for tables, pictures and masks"
    )
    p.section("what to do")
    p.add_argument(
        "--split",
        choices=(*h5.SPLITS, "held_out"),
        help="cases to score, which need labels (default: val), or to --predict (default: unlabeled, "
        "else val); held_out: train cases whose labels no run and no g has learned from",
    )
    p.add_argument(
        "--grid",
        choices=("stored", "source"),
        default="stored",
        help="score on the grids of the dataset, or on those that the sources had "
        "before a converter resampled them, as masks of --predict have",
    )
    p.add_argument(
        "--predict",
        action="store_true",
        help="write the masks of one checkpoint instead of scoring; needs no labels; with --qp also a list of them, worst first",
    )
    p.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="the trained network or its EMA",
    )
    p.add_argument(
        "--baseline",
        metavar="RUN",
        help="compare the other rows of the same --labeled with this one, a row's name or a checkpoint's path: "
        "difference in Dice, patient by patient, with its interval and a test",
    )
    p.add_argument(
        "--largest-component",
        action="store_true",
        help="keep the largest connected component of each class, in scores and masks (where --qp compares estimates with the truth, it sees "
        "the outputs as they are)",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="with --predict: replace the masks that OUT holds"
    )
    p.section("quality of the outputs")
    p.add_argument(
        "--qp",
        metavar="QP.pt",
        help="quality predictor: compare its and simpler estimates with each output's true quality; "
        "with --predict: list the masks by the Dice that it predicts, worst first",
    )
    p.add_argument(
        "--second",
        metavar="RUN.pt",
        help="with --qp: an independent run, whose opinion on the outputs is one more estimate",
    )
    p.section("pictures")
    p.add_argument(
        "--pictures",
        type=number(0),
        default=20,
        help="cases to draw, evenly spread from best to worst; 0 draws nothing at all",
    )
    p.section("running")
    p.add_argument(
        "--batch",
        type=number(1, 65_536),
        help="slices or windows of a volume in one pass (default: what is as large as 32 slices of 224 x 224)",
    )
    p.add_argument(
        "--workers",
        type=number(0, 1000),
        default=min(8, cores()),
        help="processes that score the cases of large data sets while the next ones "
        "are predicted; 0: none",
    )
    p.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1, ..."
    )
    p.add_argument(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision"
    )
    inference.add_window_options(p)
    args = p.parse_args(argv)
    if args.second and not args.qp:
        raise InputError("--second is compared with g: it needs --qp")
    if args.predict and (len(args.checkpoints) > 1 or args.second or args.baseline):
        raise InputError(
            "--predict writes the masks of one checkpoint, without --baseline or --second"
        )
    return args


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------------------------- prediction


# ---------------------------------------------------------------------------------------------------- scores

KEEP = 2**31  # bytes of images and labels that stay in memory from one checkpoint to the next
SMALL = 10**6  # voxels of a split that are scored sooner than a process has started


def scoring_pool(count, voxels):
    """A pool of processes that score cases, for a `with`, which gives None where this process is to do it. voxels: of all cases"""
    if count == 0 or voxels <= SMALL:
        return contextlib.nullcontext()
    # Spawned processes start in a second; forked ones at once, but with the locks of torch's threads, held or not.
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), workers.start_worker)


def in_order(pool, function, tasks, ahead):
    """Yields function(*task) of each task, in order, computed by a pool while up to `ahead` further tasks come; without a pool here, one by one."""
    if pool is None:
        yield from itertools.starmap(function, tasks)
        return
    pending = collections.deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, *task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a process that scores cases has died, perhaps for lack of memory; use fewer --workers, or 0 for none"
        ) from None


def at_source(entries):
    """Lets pictures that were resized for the dataset be predicted on the grid of their source."""
    for entry in entries:
        if len(entry.grid) == 2 and entry.source_grid:
            entry.grid = entry.source_grid


# ---------------------------------------------------------------------------------------------------- runs


def run_name(args):
    """What the row of a run is called: its method and hooks."""
    name = args["method"]
    if args["weight"] != "none" and args["method"] != "supervised":  # which has nothing to weight
        name += " + " + ("QW" if args["weight"] == "quality" else "confidence")
        name += "" if args["weight_level"] == "image" else f" ({args['weight_level']})"
    return (
        name + (" + correction" if args.get("correct") else "") + (" + QAR" if args["qar"] else "")
    )


def group_runs(states, paths):
    """Runs that differ only in their seed -> [(name, labeled, [index, ...])]; names are made unique by what differs.

    A checkpoint whose seed its group has already is no further seed: it stands alone, under its path.
    """
    groups, titles = {}, {}
    for i, (state, path) in enumerate(zip(states, paths)):
        free = {
            "seed",
            "out",
            "resume",
            "overwrite",
            "device",
            "keep",
            "window",
            "stride",
            "blend",
            "cache",
            "workers",
        }
        config = {k: v for k, v in state["args"].items() if k not in free}
        config = {"correct": False, "flip": None} | config  # which older ones do not know
        config |= {"data": state["data"]["checksum"], "checkpoint": os.path.basename(path)}
        key = json.dumps(config, sort_keys=True)
        if state["args"]["seed"] in [states[j]["args"]["seed"] for j in groups.get(key, [])]:
            key, config = path, config | {"checkpoint": path}
        groups.setdefault(key, []).append(i)
        titles[key] = (run_name(config), config["labeled"], config)
    out = []
    for key, (name, labeled, config) in titles.items():
        alike = [c for n, l, c in titles.values() if (n, l) == (name, labeled)]
        extra = [f"{k}={v}" for k, v in config.items() if any(c.get(k) != v for c in alike)]
        out.append((f"{name} ({', '.join(extra)})" if extra else name, labeled, groups[key]))
    return out


def summarize(runs, unit):
    """One dict per group of runs, Scored: name, labeled, and for every metric the list of its
    values over seeds."""
    rows = []
    for name, labeled, members in runs.groups:
        scored = [runs.scores[i] for i in members]
        table = {
            m: np.array(
                [[[getattr(s, m) for s in case] for case in cases] for cases in scored], np.float64
            )  # [runs, cases, classes]
            for m in ("dice", "jaccard", "hd95", "asd", "one_empty")
        }
        row = {
            "run": name,
            "labeled": labeled,
            "Dice %": 100 * table["dice"].mean((1, 2)),
            "Jaccard %": 100 * table["jaccard"].mean((1, 2)),
            f"HD95 {unit}": table["hd95"].mean((1, 2)),
            f"ASD {unit}": table["asd"].mean((1, 2)),
            "one empty": table["one_empty"].sum((1, 2)),
        }
        if len(runs.info.classes) > 2:
            per_class = dict(zip(runs.classes, 100 * table["dice"].mean(1).T))
            row |= {f"Dice % {c}": per_class.get(c) for c in runs.info.classes[1:]}
        rows.append({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()})
    return rows


def case_dice(scores, members):
    """Mean foreground Dice of each case, mean over the runs of a group. scores[run][case][class] -> [n]"""
    return np.mean([[np.mean([s.dice for s in case]) for case in scores[i]] for i in members], 0)


def find_baselines(name, groups, paths):
    """The groups that --baseline names, by their row, or one of them by a checkpoint's path. -> {labeled: index}. InputError if there is none."""
    found = [
        i
        for i, (_, _, members) in enumerate(groups)
        if os.path.abspath(name) in [os.path.abspath(paths[m]) for m in members]
    ][:1]
    found = found or [i for i, (row, _, _) in enumerate(groups) if row == name]
    if not found:
        raise InputError(
            f"--baseline {name}: neither a checkpoint nor a row of the table; its rows: {', '.join(dict.fromkeys(row for row, _, _ in groups))}"
        )
    return {groups[i][1]: i for i in found}


def against(baselines, groups, scores, patient):
    """Columns that compare each group with the baseline of the same labels. baselines: {labeled: index}; patient: of each case -> a dict per group"""
    columns, rows = ("Δ Dice", "95% interval", "p"), []
    for i, (_, labeled, members) in enumerate(groups):
        base = baselines.get(labeled, i)  # without another, none
        found = (
            (None,) * 3
            if base == i
            else paired(
                100 * case_dice(scores, members), 100 * case_dice(scores, groups[base][2]), patient
            )
        )
        rows.append(dict(zip(columns, found)))
    return rows


# ---------------------------------------------------------------------------------------------------- predicted against true quality


@dataclass
class Opinions:
    """Networks that answer for an image: the judged one, its teacher (of a teacher, its student), and an independent one or None."""

    net: torch.nn.Module
    other: torch.nn.Module
    second: torch.nn.Module | None = None
    flip: str | None = None  # --flip of net: how its augmented pass may be flipped


@torch.no_grad()
def compare_estimates(g, by, samples, on, batch):
    """What g, and every estimate of quality that needs no g, says of by.net's outputs for samples with labels. by: Opinions. -> Outputs"""
    torch.manual_seed(0)  # of the augmented pass
    parts = []
    for rows in torch.arange(len(samples)).split(batch):
        x, y = samples.batch(rows, on.device)
        mine = inference.class_probabilities(by.net, x, on)  # [B, K, *S]
        mask, truth = quality.foreground(mine), one_hot(y, mine.shape[1])[:, 1:]  # [B, K-1, *S]
        with on.autocast():
            says = {"g": g(x, mask)}
        turned = augment.strong(augment.mirror(x, by.flip), 0.5)
        again = augment.mirror(inference.class_probabilities(by.net, turned, on), by.flip)
        says |= {
            "mean confidence": quality.confidence(mine),
            "mean certainty (entropy)": quality.certainty(mine),
            "region confidence": quality.region_confidence(mine),
            "f's own expected Dice": quality.expected_dice(mine),
            "agreement with an augmented pass": quality.overlap(mine, again),
            "agreement of student and teacher": quality.overlap(
                mine, inference.class_probabilities(by.other, x, on)
            ),
        }
        if by.second is not None:
            says["expected Dice under a second network"] = quality.expected_dice(
                mine, inference.class_probabilities(by.second, x, on)
            )
        sums = [v.flatten(2).sum(2) for v in (truth, mask * truth, mask, mask + truth)]
        parts.append([v.cpu().numpy() for v in (sums[0] > 0, *sums[1:], *says.values())])
    present, shared, area, total, *estimates = (np.concatenate(v) for v in zip(*parts))
    return Outputs(present, shared, area, total, dict(zip(says, estimates)))


def gigaflops(net, *inputs):
    """Multiplications and additions of one pass, in billions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops() / 1e9


# ---------------------------------------------------------------------------------------------------- files


# ---------------------------------------------------------------------------------------------------- what is compared


def held_out(info, states):
    """Names of the train cases with labels from which no checkpoint has learned, neither itself nor through its g. states: path -> state"""
    used = set()
    for path, state in states.items():
        if state["data"]["checksum"] != info.checksum:
            raise InputError(
                f"{path}: was trained on another file than {info.path} is now, so nobody knows which of its cases it has seen; leave it out"
            )
        used |= set(state["labeled"])
    names = [e.name for e in info.entries("train") if e.labeled and e.name not in used]
    if not names:
        raise InputError(
            f"{info.path}: no train case has a label from which nobody has learned; score --split val"
        )
    return names


def check_runs(args, info, states):
    """InputError if checkpoints of train_ssl.py do not fit the data, or cannot be compared by --qp. states: path -> state"""
    for path, state in states.items():
        for key in ("classes", "channels", "dims"):
            if state["data"][key] != getattr(info, key):
                raise InputError(
                    f"{path}: trained for {key} {state['data'][key]}, but {info.path} "
                    f"has {getattr(info, key)}; train on this data"
                )
        checkpoints.check_size(path, info, state["args"]["size"])
        state["args"]["flip"] = checkpoints.flip_of(path, info, state["args"])
    described = {path: state["data"] for path, state in states.items()}
    h5.check_prepared({info.path: info.describe()} | described, described)
    sizes = {state["args"]["size"]: path for path, state in states.items()}
    if args.qp and len(sizes) > 1:
        raise InputError(
            "--qp compares outputs of one --size, but "
            + ", ".join(f"{path} has {size}" for size, path in sizes.items())
        )
    if args.second and any(os.path.samefile(args.second, path) for path in args.checkpoints):
        raise InputError(
            f"--second {args.second}: is among the runs that it should judge; give an independent one"
        )


@dataclass
class Scored:
    """Runs, and how they scored on some cases."""

    info: h5.Info
    split: str  # the file's, in which the cases are
    entries: list  # [cases]
    states: list  # [runs] of their checkpoints: args, data, labeled
    groups: list  # runs that differ only in their seed: (name, labeled, [run, ...])
    scores: list  # [runs][cases][classes] of Score
    classes: list  # names of those of the foreground that the labels hold; no other is scored


def write_scores(args, runs, cut):
    """The table, on the screen too, and a CSV with a row per run, case and class. cut: Window or None"""
    info, entries, groups, scores = runs.info, runs.entries, runs.groups, runs.scores
    rows = summarize(runs, "mm" if all(e.spacing_known for e in entries) else "px")
    title = (
        f"{info.name}, {args.split}, {len(entries)} cases, mean over cases, then classes; ± over seeds"
        + (f"; {cut}" if cut else "")
    )
    if resampled := sum(e.source_grid is not None for e in entries):
        title += (
            "; scored on the sources' own grids"
            if args.grid == "source"
            else (
                f"; {resampled} of the cases are scored on the resampled grid of the dataset, "
                "not on their sources' (--grid source)"
            )
        )
    if args.baseline:
        baselines, patient = (
            find_baselines(args.baseline, groups, args.checkpoints),
            [e.patient for e in entries],
        )
        rows = [
            row | columns for row, columns in zip(rows, against(baselines, groups, scores, patient))
        ]
        title += (
            f"\nΔ Dice: points above {groups[next(iter(baselines.values()))][0]} of the same labeled; mean and 95% interval (bootstrap, "
            f"percentiles) over {len(set(patient))} patients, in each the mean over cases, classes and seeds; p: Wilcoxon's signed-rank test, two-sided"
        )
    write_csv(
        os.path.join(args.out, "cases.csv"),
        [
            {
                "checkpoint": args.checkpoints[i],
                "run": name,
                "labeled": labeled,
                "seed": runs.states[i]["args"]["seed"],
                "case": e.name,
                "patient": e.patient,
                "class": runs.classes[k],
                "unit": "mm" if e.spacing_known else "px",
                **asdict(s),
            }
            for name, labeled, members in groups
            for i in members
            for e, case in zip(entries, scores[i])
            for k, s in enumerate(case)
        ],
    )
    absent = [c for c in info.classes[1:] if c not in runs.classes]
    found = dict(title=title, rows=rows, absent=absent, args=vars(args))
    write_text(os.path.join(args.out, "summary.json"), json.dumps(found, indent=1))
    text = f"{title}\n\n" + markdown(
        [row | {"p": "< 0.001"} if (row.get("p") or 1) < 0.001 else row for row in rows]
    )
    if absent:
        text += f"\n\n{h5.without(absent, args.split)}: left out of every mean."
    write_text(os.path.join(args.out, "summary.md"), text + "\n")
    print(text)


def write_quality(args, runs, ours, reference, cost):
    """The tables, pictures and CSV of --qp. ours: Outputs of each run, and their samples; reference: the same on val, or None -> what was written,
    in words"""
    info, groups, (outputs, samples) = runs.info, runs.groups, ours
    patient = {e.name: e.patient for split in info.splits for e in info.splits[split]}
    sample, (shown, curves) = "slice" if info.dims == 2 else "patch", triage(outputs, samples.case)
    levels = {level: text.format(sample) for level, text in LEVELS.items()}
    tables = compare_rows(
        groups, (outputs, samples.case), reference and (reference[0], reference[1].case), patient
    )
    title = (
        f"Estimated against true quality, {info.name}, {args.split}, {len(set(samples.case))} cases: mean over seeds. MAE calibrated: after a "
        f"monotone map to Dice, fitted on {'the other patients' if reference is None else 'val'}; makes estimates of all scales comparable.\n"
        + (
            "The temperature of a dense g, and the best epoch of a scalar one, were chosen on val itself.\n"
            if args.split == "val"
            else ""
        )
        + cost
    )
    write_text(
        os.path.join(args.out, "quality.md"),
        title
        + "\n"
        + "".join(
            f"\n{levels[level][0].upper() + levels[level][1:]}\n\n{markdown(rows)}\n"
            for level, rows in tables.items()
        )
        + (
            f"\n{TRIAGE}\n\n{markdown(shown)}\n"
            if shown
            else f"\nNo run has cases with Dice both below and above {BAD:g}, so there is nothing to find.\n"
        ),
    )
    found = dict(
        title=title, levels=tables, triage=dict(rows=shown, curves=curves), args=vars(args)
    )
    write_text(os.path.join(args.out, "quality.json"), json.dumps(found, indent=1))
    first = next(iter(tables))  # "present", unless no class is
    print(
        f"\n{title}\n\nMean over all runs, {levels[first]} (quality.md has all)\n\n"
        + markdown(
            [
                {k: v for k, v in r.items() if k != "run"}
                for r in tables[first]
                if r["run"] == "mean of all"
            ]
        )
        + (f"\n\n{TRIAGE}\n\n{markdown(shown)}" if shown else "")
    )
    true = [plain_dice(o.shared, o.total) for o in outputs]
    write_csv(
        os.path.join(args.out, "quality.csv"),
        [
            {
                "checkpoint": args.checkpoints[i],
                "run": name,
                "seed": runs.states[i]["args"]["seed"],
                "case": samples.case[n],
                sample: " ".join(map(str, samples.at[n])),
                "class": c,
                "present": outputs[i].present[n, k],
                "true": true[i][n, k],
                **{e: v[n, k] for e, v in outputs[i].estimates.items()},
            }
            for name, labeled, members in groups
            for i in members
            for n in range(len(samples))
            for k, c in enumerate(runs.classes)
        ],
    )
    figures.quality(
        os.path.join(args.out, "quality.png"),
        {
            f"{name}, labeled {labeled}": (outputs[m[0]].estimates["g"], true[m[0]])
            for name, labeled, m in groups
        },
        [info.classes[0], *runs.classes],
    )
    figures.estimates(os.path.join(args.out, "estimates.png"), tables[first])
    if curves:
        figures.triage(
            os.path.join(args.out, "triage.png"),
            {f"{info.name}, {args.split}: cases with Dice below {BAD:g}": curves},
        )
    return ", quality.*, estimates.png" + (", triage.png" if curves else "")


# ---------------------------------------------------------------------------------------------------- --predict


@contextlib.contextmanager
def dataset(args, data):
    """The Info of a dataset file, or of new images, which lie in a temporary one until the block ends. data: of the checkpoint that is to see them"""
    from data import new_images  # brings SimpleITK, which takes a second and only this needs

    if not new_images.are_new(args.data):
        yield h5.read_info(args.data)
        return
    if args.split:
        raise InputError(
            f"--split {args.split}: {args.data} holds images, not a dataset that has splits"
        )
    temporary = os.path.join(
        args.out, f".images.{os.getpid()}.part"
    )  # a name that claim() removes should this process be killed
    try:
        yield new_images.convert(args.data, temporary, data)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@torch.no_grad()
def predicted_quality(g, label, samples, size, on):
    """What g says of a case's mask: of all its slices, or patches, each weighted with the mask's area in it. -> [K-1]

    label: (D, H, W) uint8 of any grid in the plane; samples: of the case, on the network's grid.
    """
    if isinstance(size, int):
        masks = np.stack([loading.resize_label(one, size) for one in label])
    else:
        label = loading.at_least(label, size)
        masks = np.stack(
            [label[tuple(slice(c, c + s) for c, s in zip(corner, size))] for corner in samples.at]
        )
    says, areas, masks = [], [], torch.from_numpy(masks).long()  # [N, *S]
    for rows in torch.arange(len(samples)).split(samples_in(64, masks.shape[1:])):
        x, _ = samples.batch(rows, on.device)
        m = one_hot(masks[rows].to(on.device), g.config["classes"])[:, 1:]
        with on.autocast():
            says.append(g(x, m).float().cpu().numpy())
        areas.append(m.flatten(2).sum(2).cpu().numpy())
    return at_level(
        Outputs(None, None, np.concatenate(areas), None, {"g": np.concatenate(says)}),
        "volume",
        samples.case,
        "g",
    )[0]


def predict(args):
    """--predict: a mask of every case of a split, labeled or not, or of every new image; with --qp the Dice that g predicts of it, worst first."""
    on, (path,) = compute(args.device, args.amp), args.checkpoints
    net, state = checkpoints.load_run(path, args.weights, on)
    size, data, folder = state["args"]["size"], state["data"], os.path.join(args.out, "masks")
    needed = h5.Info(
        path,
        data["name"],
        data["classes"],
        data["dims"],
        data["channels"],
        {},
        0,
        data.get("standardize", True),
        data.get("prepared"),
    )
    checkpoints.check_size(path, needed, size)
    cut = inference.window_of(
        size, args, args.batch
    )  # fails before images are read, as does the next line
    g = (
        checkpoints.load_quality(args.qp, needed, on, size, {path: state["args"]})[0]
        if args.qp
        else None
    )
    held = claim(args.out)  # noqa: F841  (until this ends)
    if os.path.isdir(folder) and os.listdir(folder) and not args.overwrite:
        raise InputError(
            f"{folder}: holds masks already, perhaps corrected ones; replace them with --overwrite, or choose another --out"
        )
    with dataset(args, data) as info:
        check_runs(args, info, {path: state})
        K, names = len(info.classes), None
        split = args.split or ("unlabeled" if info.splits.get("unlabeled") else "val")
        if split == "held_out":
            split, names = (
                "train",
                held_out(
                    info,
                    {path: state} | ({args.qp: load_checkpoint(args.qp, "qp")} if args.qp else {}),
                ),
            )
        cases, rows = inference.Cases(info, split, size, names, keep=False), []
        at_source(cases.entries)
        found = inference.predict_cases(
            net, cases, on, cut, args.batch or samples_in(32, loading.shape_of(size))
        )
        for former in [
            *glob.glob(os.path.join(glob.escape(folder), "*")),
            *(os.path.join(args.out, f"worst_first.{ending}") for ending in ("csv", "png")),
        ]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(former)
        for entry, label, _ in progress(found, len(cases), "predict"):
            label = largest_component(label, K) if args.largest_component else label
            mask = write_mask(folder, label, entry)
            if g:
                q = predicted_quality(
                    g,
                    label,
                    loading.load_samples(info, split, size, [entry.name], labels=False),
                    size,
                    on,
                )
                z = figures.middle(label, len(label))
                rows.append((q, entry, mask, z, pack(label[z])))
        print(f"wrote {len(cases)} masks in {folder}")
        if g:
            write_worst_first(args, info, split, sorted(rows, key=lambda row: row[0].mean()))
        else:
            print("next: look at them; with --qp QP.pt, a list says which first")


def write_mask(folder, label, entry):
    """The mask of a case as a file, of a volume NIfTI on its source's grid, of an image PNG. label: (D, H, W) uint8 -> the file's name"""
    from data import nifti, pixels

    name = f"{entry.name}.nii.gz" if len(entry.grid) == 3 else f"{entry.name}.png"
    if len(entry.grid) == 3:
        nifti.write_mask(os.path.join(folder, name), label, entry)
    else:
        pixels.write_mask(os.path.join(folder, name), label[0])
    return name


def write_worst_first(args, info, split, rows):
    """What a person should look at, in this order: a CSV of all cases, and a picture of the first sixteen. rows: (g's answers [K-1], Entry, file of the
    mask, slice to show, its mask packed), worst first"""
    write_csv(
        os.path.join(args.out, "worst_first.csv"),
        [
            {
                "rank": i,
                "case": entry.name,
                "predicted Dice": round(float(q.mean()), 4),
                **{f"predicted Dice, {c}": round(float(v), 4) for c, v in zip(info.classes[1:], q)},
                "mask": f"masks/{mask}",
                "source": entry.source,
            }
            for i, (q, entry, mask, _, _) in enumerate(rows, 1)
        ],
    )
    panels = []
    with h5.open_file(info.path) as f:
        for i, (q, entry, _, z, packed) in enumerate(rows[:16] if args.pictures else [], 1):
            image, _ = h5.read_case(f, info, split, entry.name, label=False)
            mask = unpack(packed, image)
            title = (
                f"{i}. {entry.name[:24]}"
                + (f", slice {z}" if len(image) > 1 else "")
                + f"\npredicted Dice {q.mean():.2f}"
            )
            panels.append((title, image[z], mask, entry.aspect))
    if panels:
        figures.cases(
            os.path.join(args.out, "worst_first.png"), [panels], info.classes, columns=4, side=2.5
        )
    print(
        f"wrote {args.out}/worst_first.csv"
        + (", worst_first.png" if panels else "")
        + "; the first of them, by the Dice that g predicts:"
    )
    for q, entry, *_ in rows[:5]:
        print(f"  {q.mean():.3f}  {entry.name}")
    print("next: look at these, from the top, and correct what is wrong")


def pack(label):
    """A slice of a mask (H, W) uint8 as the bytes of a PNG, which take little memory."""
    return cv2.imencode(".png", label)[1]


def unpack(packed, image):
    """The slice again, on the grid of an image (D, H, W[, 3]); a picture's mask may have had its
    source's."""
    mask = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
    return cv2.resize(mask, image.shape[2:0:-1], interpolation=cv2.INTER_NEAREST)


# ---------------------------------------------------------------------------------------------------- main


def progress(iterable, total, name):
    """A bar on a terminal; nothing where the output is not one."""
    return tqdm(iterable, name, total, leave=False, unit=" cases", disable=not sys.stderr.isatty())


def draw(args, runs, packed):
    """All pictures of runs that were scored. packed: (run, case) -> its mask of the slice to show -> what was written, in words"""
    info, entries, groups, scores = runs.info, runs.entries, runs.groups, runs.scores
    names = [f"{name}, labeled {labeled}" for name, labeled, _ in groups]
    dice = [case_dice(scores, members) for _, _, members in groups]  # [groups][cases]
    figures.comparison(os.path.join(args.out, "compare.png"), dict(zip(names, dice)))
    order = np.argsort(-np.mean(dice, 0), kind="stable").tolist()  # best first
    marks = {order[len(order) // 2]: "median", order[-1]: "worst", order[0]: "best"}
    shown, rows = (
        {
            order[i]
            for i in np.linspace(0, len(order) - 1, min(args.pictures, len(order))).astype(int)
        },
        {},
    )
    with h5.open_file(info.path) as f:
        for c in sorted(shown | set(marks)):
            image, truth = h5.read_case(f, info, runs.split, entries[c].name)
            z, title, pixel = figures.middle(truth, len(image)), entries[c].name, entries[c].aspect
            rows[c] = [
                (f"{marks[c]}: {title}" if c in marks else title, image[z], None, pixel),
                ("truth" if len(image) == 1 else f"truth, slice {z}", image[z], truth[z], pixel),
            ]
            for name, (_, _, members) in zip(names, groups):
                title = f"{wrapped(name)}\nDice {case_dice(scores, members[:1])[c]:.3f}"
                rows[c].append((title, image[z], unpack(packed[members[0], c], image), pixel))
            if c in shown:
                figures.cases(
                    os.path.join(args.out, "cases", f"{entries[c].name}.png"),
                    [rows[c]],
                    info.classes,
                    columns=5,
                    side=2.5,
                )
    figures.cases(
        os.path.join(args.out, "cases.png"),
        [rows[c] for c in dict.fromkeys(order) if c in marks],
        info.classes,
    )
    logs = dict.fromkeys(
        os.path.join(os.path.dirname(path), "log.csv") for path in args.checkpoints
    )
    logs = [log for log in logs if os.path.isfile(log)]
    try:
        if logs:
            figures.curves(
                os.path.join(args.out, "curves.png"),
                dict(zip(figures.run_names(logs), map(figures.read_log, logs))),
            )
    except InputError as error:  # the scores are what was asked for
        print(f"note: no training curves: {error}")
        logs = []
    return ", compare.png, cases.png, cases/*.png" + (", curves.png" if logs else "")


def wrapped(name):
    """A run's name over lines that fit above a panel."""
    return "\n".join(textwrap.wrap(name, 30))


def main(argv=None):
    args = parse_args(argv)
    if args.predict:
        return predict(args)
    args.split = args.split or "val"
    on, info = compute(args.device, args.amp), h5.read_info(args.data)
    K = len(info.classes)
    heads = {
        path: {
            k: v
            for k, v in load_checkpoint(path, "ssl").items()
            if k in ("args", "data", "labeled")
        }
        for path in [*args.checkpoints, *([args.second] if args.second else [])]
    }
    check_runs(args, info, heads)
    states, size = (
        [heads[path] for path in args.checkpoints],
        heads[args.checkpoints[0]]["args"]["size"],
    )
    groups = group_runs(states, args.checkpoints)
    if args.baseline:
        find_baselines(args.baseline, groups, args.checkpoints)  # fails before the work begins
    fs = {path: state["args"] for path, state in heads.items()}
    g = checkpoints.load_quality(args.qp, info, on, size, fs)[0] if args.qp else None
    split, names = args.split, None
    if split == "held_out":
        split, names = (
            "train",
            held_out(info, heads | ({args.qp: load_checkpoint(args.qp, "qp")} if args.qp else {})),
        )
    entries = [e for e in info.entries(split) if names is None or e.name in names]
    args.batch = args.batch or samples_in(32, loading.shape_of(size))
    if missing := [e.name for e in entries if not e.labeled]:
        raise InputError(
            f"{args.data}: /{split}/{missing[0]} has no label, so it cannot be scored; --predict writes masks without labels"
        )
    held = h5.held_classes(info, split, names)
    second = checkpoints.load_run(args.second, args.weights, on)[0] if args.second else None
    samples = loading.load_samples(info, split, size, [e.name for e in entries]) if g else None
    val = None  # what --qp calibrates on
    if (
        g
        and split != "val"
        and (labeled := [e.name for e in info.splits.get("val", []) if e.labeled])
    ):
        val = loading.load_samples(info, "val", size, labeled)

    if args.grid == "source":
        from data import space  # brings nibabel, which only this needs

        at_source(entries)
        if lost := [e for e in entries if e.source_grid and not e.source_labeled]:
            h5.read_source_label(info, split, lost[0])  # refuses, before the work begins
    voxels = sum(math.prod(e.grid) for e in entries)
    scores, outputs, reference, cases = [], [], [], None
    packed, first = (
        {},
        {members[0] for _, _, members in groups},
    )  # pictures show the first run of each group

    def predicted(i, found):
        """What score_case() needs of each case that run i predicts; what may be drawn of it is put aside."""
        for c, (entry, label, truth) in enumerate(found):
            moved = args.grid == "source" and entry.source_grid
            drawn = args.pictures and i in first
            largest, spacing = args.largest_component, entry.spacing
            if largest and (moved or drawn):
                label, largest = largest_component(label, K), False
            if drawn:
                packed[i, c] = pack(label[figures.middle(truth, len(truth))])
            if moved:
                label, spacing = space.to_source(label, entry), entry.source_spacing
                truth = h5.read_source_label(info, split, entry)
            yield label, truth, spacing, K, largest

    with scoring_pool(args.workers, voxels) as pool:
        for i, path in enumerate(args.checkpoints):
            net, size = checkpoints.load_run(path, args.weights, on)[0], states[i]["args"]["size"]
            if cases is None or size != cases.size:
                cases = inference.Cases(
                    info, split, size, names, keep=voxels * info.channels * 5 < KEEP
                )
            cut = inference.window_of(size, args, args.batch)
            found = progress(
                inference.predict_cases(net, cases, on, cut, args.batch), len(cases), path
            )
            every = in_order(pool, score_case, predicted(i, found), 2 * args.workers)
            scores.append([list(itertools.compress(case, held)) for case in every])
            if g:
                other = checkpoints.load_run(
                    path, "student" if args.weights == "teacher" else "teacher", on
                )[0]
                by = Opinions(net, other, second, states[i]["args"]["flip"])
                judged = compare_estimates(g, by, samples, on, args.batch)
                outputs.append(of_classes(judged, held))
                if val:
                    judged = compare_estimates(g, by, val, on, args.batch)
                    reference.append(of_classes(judged, held))

    classes = list(itertools.compress(info.classes[1:], held))
    runs = Scored(info, split, entries, states, groups, scores, classes)
    write_scores(args, runs, cut)
    if g:
        x, mask = (
            torch.zeros(1, n, *loading.shape_of(size), device=on.device)
            for n in (info.channels, K - 1)
        )
        cost = (
            f"Cost of {'an image' if info.dims == 2 else 'a patch'} of {' x '.join(map(str, loading.shape_of(size)))}: "
            f"f {gigaflops(net, x):.2f} GFLOPs ({models.parameters(net) / 1e6:.1f} M parameters), "
            f"g {gigaflops(g, x, mask):.2f} GFLOPs ({models.parameters(g) / 1e6:.1f} M)."
        )
        quality_files = write_quality(
            args, runs, (outputs, samples), (reference, val) if val else None, cost
        )
    drawn = draw(args, runs, packed) if args.pictures > 0 else ""
    best = args.checkpoints[
        int(np.argmax([case_dice(scores, [i]).mean() for i in range(len(scores))]))
    ]
    print(
        f"\nwrote {args.out}/summary.md, summary.json, cases.csv"
        + (quality_files if g else "")
        + drawn
        + "\nnext: "
        + shlex.join(
            [
                "python",
                "evaluate.py",
                "NEW",
                best,
                "--predict",
                *(["--qp", args.qp] if g else []),
                "--out",
                "runs/new",
            ]
        )
        + "    (NEW: images without labels)"
    )


if __name__ == "__main__":
    del __file__  # worker processes import their parent's script where they know it, and so torch: 4.3 s and 316 MB each, not 1.0 s and 64 MB
    cli(main)
