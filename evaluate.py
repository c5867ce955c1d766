"""Stage 4: scores checkpoints on a split, case by case.

    python evaluate.py DATA.h5 runs/*/best.pt --split val --out runs/table [--qp runs/qp/qp.pt [--second runs/other/best.pt]]
    python evaluate.py DATA.h5 runs/mt_qw/best.pt --split test --out runs/masks --predict

Reads  DATA.h5, checkpoints of train_ssl.py (best.pt, last.pt, step*.pt), optionally the qp.pt of train_qp.py.
Writes OUT/cases.csv (a row per run, case and class), OUT/summary.json, OUT/summary.md (the table on the screen), OUT/compare.png,
       OUT/cases/*.png (image, truth, each run's outlines); with --qp, which compares g and simpler estimates of the outputs' quality
       with the truth, also OUT/quality.csv (a row per run, sample and class), quality.md, .json, quality.png (g) and estimates.png (all).
       With --predict only OUT/masks/*, one for each case, labeled or not: .nii.gz on the grid of the source for a volume, .png for an image.

Runs that differ only in their seed form one row: mean and standard deviation. Every score is taken on the case's own grid; volumes
are scored as volumes, also those that were segmented slice by slice. The estimates of quality are compared on the network's grid, for
slices or for patches that cover the volumes.

Legend: N samples (slices or patches), B batch, K classes, D depth, H height, W width, *S the network's grid: S, S or D, H, W.
"""
import csv
import itertools
import json
import os
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import torch
from scipy import ndimage, optimize, spatial, stats
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from data import augment, h5
from data.files import InputError, Parser, cli, grid, load_checkpoint, number, replacing
from models import distributed, quality
from models.losses import one_hot


def parse_args(argv=None):
    p = Parser(__doc__, prog="evaluate.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("checkpoints", nargs="+", help="best.pt, last.pt or step*.pt of one or more runs")
    p.add_argument("--split", choices=(*h5.SPLITS, "held_out"), default="val",
                   help="cases to score, which need labels; held_out: train cases whose labels no run and no g has learned from")
    p.add_argument("--predict", action="store_true", help="write the masks of one checkpoint instead of scoring; needs no labels")
    p.add_argument("--out", required=True, help="folder for tables and pictures")
    p.add_argument("--weights", choices=("student", "teacher"), default="student", help="the trained network or its EMA")
    p.add_argument("--largest-component", action="store_true",
                   help="keep the largest connected component of each class (in the scores; --qp sees the outputs as they are)")
    p.add_argument("--qp", metavar="QP.pt", help="quality predictor: compare its and simpler estimates with each output's true quality")
    p.add_argument("--second", metavar="RUN.pt", help="with --qp: an independent run, whose opinion on the outputs is one more estimate")
    p.add_argument("--pictures", type=number(0), default=20, help="cases to draw, evenly spread; 0 draws nothing")
    p.add_argument("--batch", type=number(1), help="slices or windows of a volume in one pass (default: what is as large as 32 slices of 224 x 224)")
    add_window_options(p)
    p.add_argument("--device", type=models.device_name, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    args = p.parse_args(argv)
    if args.second and not args.qp:
        raise InputError("--second is compared with g: it needs --qp")
    if args.predict and (len(args.checkpoints) > 1 or args.qp):
        raise InputError("--predict writes the masks of one checkpoint, without --qp")
    return args


def add_window_options(p):
    """The options of evaluate.py and train_ssl.py that say how a network sees a volume."""
    p.add_argument("--window", choices=("sliding", "whole"), default="sliding",
                   help="volumes: overlapping windows of the size of the training patches, or all of a volume in one pass (faster, takes more memory)")
    p.add_argument("--stride", type=grid, metavar="D,H,W", help="volumes: between windows (default: half of the window)")
    p.add_argument("--blend", choices=("gaussian", "uniform"), default="gaussian",
                   help="volumes: weights of a window's voxels where windows overlap")


# ---------------------------------------------------------------------------------------------------- metrics

@dataclass
class Score:
    """One class of one case. hd95 and asd in mm where the spacing is known, else in pixels."""
    dice: float
    jaccard: float
    hd95: float
    asd: float
    one_empty: bool  # prediction or truth is empty, but not both


def plain_dice(shared, total):
    """2 |A and B| / (|A| + |B|) from numbers of pixels, arrays or not; 1 where both masks are empty."""
    return np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0)


def dice(mask, truth):
    """Dice of two boolean arrays; 1 if both are empty."""
    return float(plain_dice(np.count_nonzero(mask & truth), np.count_nonzero(mask) + np.count_nonzero(truth)))


def score(mask, truth, spacing):
    """Dice, Jaccard, HD95 and ASD of two boolean masks of one shape (2D or 3D). spacing: per axis.

    Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the diagonal of the grid, the worst that is possible.
    HD95 is medpy's (95th percentile of both directed surface distance sets, pooled); ASD is medpy's asd (mask to truth).
    """
    a, b = np.count_nonzero(mask), np.count_nonzero(truth)
    if a == 0 or b == 0:
        diagonal = float(np.linalg.norm(np.multiply(mask.shape, spacing)))
        return Score(1.0, 1.0, 0.0, 0.0, False) if a == b else Score(0.0, 0.0, diagonal, diagonal, True)
    both = np.count_nonzero(mask & truth)
    to_truth, to_mask = surface_distances(mask, truth, spacing)
    return Score(float(plain_dice(both, a + b)), float(both / (a + b - both)), float(np.percentile(np.concatenate([to_truth, to_mask]), 95)),
                 float(to_truth.mean()), False)


def surface_distances(a, b, spacing):
    """Distances of a's surface to b's and of b's to a's. Boolean arrays, neither empty -> two 1D arrays.

    The surface of a mask are its elements that have a face neighbor outside of it (or outside of the grid).
    """
    box = bounding_box(a | b)  # distances within are the same
    edge_a, edge_b = surface(a[box]), surface(b[box])
    if np.count_nonzero(edge_a) + np.count_nonzero(edge_b) < 0.2 * edge_a.size:  # a search tree of few points beats a map of all distances
        points_a, points_b = (np.argwhere(edge) * np.asarray(spacing, np.float64) for edge in (edge_a, edge_b))
        return spatial.cKDTree(points_b).query(points_a)[0], spatial.cKDTree(points_a).query(points_b)[0]
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return to_b, to_a


def bounding_box(mask):
    """The slices that hold all of a boolean array that is not empty."""
    hit = [np.flatnonzero(mask.any(tuple(i for i in range(mask.ndim) if i != axis))) for axis in range(mask.ndim)]
    return tuple(slice(at[0], at[-1] + 1) for at in hit)


def surface(mask):
    """The elements of a boolean array with a face neighbor outside of it; ndimage.binary_erosion takes six times as long."""
    inner, padded, middle = mask.copy(), np.pad(mask, 1), [slice(1, -1)] * mask.ndim
    for axis in range(mask.ndim):
        for side in (slice(-2), slice(2, None)):
            inner &= padded[(*middle[:axis], side, *middle[axis + 1:])]
    return mask & ~inner


def score_case(label, truth, entry, K):
    """The Score of each foreground class. label and truth (D, H, W) uint8; a plain image is scored in 2D."""
    if len(entry.grid) == 2:
        label, truth = label[0], truth[0]
    return [score(label == k, truth == k, entry.spacing) for k in range(1, K)]


def agreement(predicted, true):
    """How well estimates match: n, MAE, RMSE, Pearson, Spearman (None where one side is constant), and worst: the share of the worst 20%
    that are among the 20% of the lowest estimates (ties count in parts, as if broken at random)."""
    predicted, true = (np.asarray(v, np.float64) for v in (predicted, true))
    n, varied = len(true), len(true) > 1 and predicted.std() > 1e-9 and true.std() > 1e-9
    return dict(n=n, mae=float(np.abs(predicted - true).mean()) if n else None,
                rmse=float(np.sqrt(((predicted - true) ** 2).mean())) if n else None,
                pearson=float(stats.pearsonr(predicted, true)[0]) if varied else None,
                spearman=float(stats.spearmanr(predicted, true)[0]) if varied else None,
                worst=float((lowest(predicted) * lowest(true)).sum() / -(-n // 5)) if varied else None)


def lowest(values):
    """1 for each of the lowest 20%, 0 for the others, and in between for those that are tied at the limit."""
    count = -(-len(values) // 5)
    limit = np.sort(values)[count - 1]
    below, tied = values < limit, values == limit
    return below + tied * (count - below.sum()) / tied.sum()


# ---------------------------------------------------------------------------------------------------- prediction

def load_cases(info, split, size, names=None):
    """What scoring needs, read once: the network's view (Samples of all slices, or Volumes), and entry and label (D, H, W) of the named cases
    (default: of all)."""
    entries = [e for e in info.entries(split) if names is None or e.name in names]
    names, labels = [e.name for e in entries], all(e.labeled for e in entries)
    if info.dims == 3:
        images = h5.load_volumes(info, split, size, names, labels)
        return images, [(e, h5.cut_back(images.label[i].numpy(), e.grid) if labels else None) for i, e in enumerate(entries)]
    images = h5.load_slices(info, split, size, names, labels)
    with h5.open_file(info.path) as f:
        return images, [(e, h5.read_case(f, info, split, e.name)[1] if e.labeled else None) for e in entries]


@torch.no_grad()
def predict(net, samples, on, batch=32):
    """Probabilities of every sample, in batches. -> [N, K, *S] float32 on the CPU; restores the network's mode."""
    training = net.training
    net.eval()
    out = []
    for start in range(0, len(samples), batch):
        x, _ = samples.batch(slice(start, start + batch), on.device)
        with on.autocast():
            out.append(net(models.channels_last(x)).float().softmax(1).cpu())
    net.train(training)
    return torch.cat(out)


@dataclass
class Window:
    """How a network sees a volume."""
    size: tuple              # (D, H, W)
    stride: tuple            # (D, H, W)
    gaussian: bool = True    # weights of a window's voxels: a Gaussian of an eighth of each side, or all alike
    whole: bool = False      # one window of the volume's own size instead
    batch: int = 2           # windows in one pass

    def __str__(self):
        return "whole volumes" if self.whole else f"windows of {' x '.join(map(str, self.size))}, stride {' x '.join(map(str, self.stride))}"


def window(size, args, batch=None):
    """The Window of a network trained on patches of `size` and of the options --window, --stride and --blend; None for the side of slices. batch: windows in a pass"""
    if isinstance(size, int):
        if args.stride or args.window != "sliding" or args.blend != "gaussian":
            raise InputError("--window, --stride and --blend are for volumes (dims=3); these networks see slices")
        return None
    stride = tuple(args.stride or (max(1, s // 2) for s in size))
    stride = stride * 3 if len(stride) == 1 else stride
    if any(step > side for step, side in zip(stride, size)):
        raise InputError(f"--stride {','.join(map(str, stride))}: larger than the window, {','.join(map(str, size))}; it would leave gaps")
    return Window(tuple(size), stride, args.blend == "gaussian", args.window == "whole", batch or models.samples_in(32, size))


def blending(size, gaussian):
    """Weights of a window's voxels. -> [D, H, W]"""
    weight = torch.ones(())
    for side in size:
        at = (torch.arange(side) - (side - 1) / 2) / (side / 8)
        weight = weight[..., None] * (torch.exp(-at ** 2 / 2) if gaussian else torch.ones(side))
    return weight


def sliding_window(net, x, cut, on):
    """Yields the mean probabilities of overlapping windows of a volume x [D, H, W], as slabs [K, d, H, W] from front to back.

    A slab is ready when no window to come reaches it, so that the map of scores is never deeper than one window. cut: Window
    """
    depth, weight = cut.size[0], blending(cut.size, cut.gaussian).to(on.device)
    zs, *others = (h5.starts(n, s, step) for n, s, step in zip(x.shape, cut.size, cut.stride))
    places = [tuple(slice(c, c + s) for c, s in zip(corner, cut.size[1:])) for corner in itertools.product(*others)]
    total = None                                                             # [K + 1, depth, H, W]: weighted probabilities, and weights
    for z, following in zip(zs, [*zs[1:], None]):
        for start in range(0, len(places), cut.batch):
            here = places[start:start + cut.batch]
            windows = torch.stack([x[(slice(z, z + depth), *place)] for place in here])[:, None]    # [B, 1, *S]
            with on.autocast():
                logits = net(models.channels_last(windows))
            if total is None:
                total = torch.zeros(logits.shape[1] + 1, depth, *x.shape[1:], device=on.device)
            for p, place in zip(logits.float().softmax(1), here):
                total[(slice(-1), slice(None), *place)] += p * weight
                total[(-1, slice(None), *place)] += weight
        done = depth if following is None else following - z
        yield total[:-1, :done] / total[-1, :done]
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)


@torch.no_grad()
def labels_of_volumes(net, volumes, cases, on, cut):
    """Yields the label (D, H, W) of every case on its own grid. cut: Window"""
    net = models.fused(net)
    for image, mean, std, (entry, _) in zip(volumes.image, volumes.mean, volumes.std, cases):
        this = cut
        if cut.whole:  # networks halve the grid up to four times
            shape = tuple(-(-n // 16) * 16 for n in entry.grid)
            image, this = torch.from_numpy(h5.at_least(h5.cut_back(image.numpy(), entry.grid), shape)), Window(shape, shape, gaussian=False)
        x = (image.to(on.device, torch.float32) - mean) / std
        label = torch.cat([slab.argmax(0).to(torch.uint8).cpu() for slab in sliding_window(net, x, this, on)])
        yield h5.cut_back(label.numpy(), entry.grid)


def labels_of_slices(probability, cases):
    """Yields the label (D, H, W) of every case on its own grid, from the probabilities of all slices [N, K, S, S], in order."""
    start = 0
    for entry, _ in cases:
        count = entry.grid[0] if len(entry.grid) == 3 else 1
        back = F.interpolate(probability[start:start + count], size=entry.grid[-2:], mode="bilinear", align_corners=False)
        start += count
        yield back.argmax(1).to(torch.uint8).numpy()


def predict_cases(net, images, cases, on, cut=None, batch=32):
    """Yields the label (D, H, W) of every case on its own grid. images, cases: of load_cases(); cut: Window, for volumes"""
    return labels_of_volumes(net, images, cases, on, cut) if cut else labels_of_slices(predict(net, images, on, batch), cases)


def largest_component(label, K):
    """Keeps the largest face-connected component of each class. (D, H, W) -> (D, H, W)"""
    out = np.zeros_like(label)
    for k in range(1, K):
        parts, n = ndimage.label(label == k)
        if n:
            out[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = k
    return out


def evaluate(net, loaded, on, K, cut=None, batch=32):
    """Mean Dice over cases and then classes, and per class: what the table shows, and what training selects by.

    loaded: of load_cases(); cut: Window, for volumes
    """
    images, cases = loaded
    table = [[dice(label == k, truth == k) for k in range(1, K)]
             for label, (_, truth) in zip(predict_cases(net, images, cases, on, cut, batch), cases)]
    per_class = np.mean(table, 0)
    return float(per_class.mean()), per_class.tolist()


# ---------------------------------------------------------------------------------------------------- runs

def load_run(path, weights, on):
    """The network of a train_ssl.py checkpoint, ready to predict, and the checkpoint."""
    state = load_checkpoint(path, "ssl")
    net = models.rebuild(state["model"], state["nets"][0] if weights == "student" else state["teacher"])
    return on.place(net).eval(), state


def load_quality(path, info, on, size=None):
    """The frozen quality predictor of train_qp.py, and the names of the train cases whose labels it has learned from.

    InputError if it was trained for other classes or channels, or for patches of another size than `size`, those of f: it would see
    them at another scale.
    """
    state = load_checkpoint(path, "qp")
    theirs, ours = state["data"], dict(classes=info.classes, channels=info.channels, dims=info.dims)
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(f"{path}: trained for {key} {theirs[key]}, but {info.path} has {value}; train g on this data")
    if info.dims == 3 and size is not None and tuple(state["patch"]) != tuple(size):
        theirs, ours = (",".join(map(str, s)) for s in (state["patch"], size))
        raise InputError(f"{path}: has learned from patches of {theirs}, but f sees {ours}; give corrupt.py and f the same --size")
    g = models.fused(on.place(models.rebuild(state["model"], state["weights"])))
    return g.requires_grad_(False), state["labeled"]


def run_name(args):
    """What the row of a run is called: its method and hooks."""
    name = args["method"]
    if args["weight"] != "none" and args["method"] != "supervised":  # which has nothing to weight
        name += " + " + ("QW" if args["weight"] == "quality" else "confidence")
        name += "" if args["weight_level"] == "image" else f" ({args['weight_level']})"
    return name + (" + QAR" if args["qar"] else "")


def group_runs(states, paths):
    """Runs that differ only in their seed -> [(name, labeled, [index, ...])]; names are made unique by what differs.

    A checkpoint whose seed its group has already is no further seed: it stands alone, under its path.
    """
    groups, titles = {}, {}
    for i, (state, path) in enumerate(zip(states, paths)):
        config = {k: v for k, v in state["args"].items() if k not in {"seed", "out", "resume", "overwrite", "device", "keep", "window", "stride", "blend", "cache", "workers"}}
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


def summarize(info, groups, scores, unit):
    """One dict per group: name, labeled, and for every metric the list of its values over seeds. scores[run][case][class]"""
    rows = []
    for name, labeled, members in groups:
        table = {m: np.array([[[getattr(s, m) for s in case] for case in scores[i]] for i in members], np.float64)  # [runs, cases, K-1]
                 for m in ("dice", "jaccard", "hd95", "asd", "one_empty")}
        row = {"run": name, "labeled": labeled, "Dice %": 100 * table["dice"].mean((1, 2)), "Jaccard %": 100 * table["jaccard"].mean((1, 2)),
               f"HD95 {unit}": table["hd95"].mean((1, 2)), f"ASD {unit}": table["asd"].mean((1, 2)), "one empty": table["one_empty"].sum((1, 2))}
        if len(info.classes) > 2:
            row |= {f"Dice % {c}": 100 * table["dice"][:, :, k].mean(1) for k, c in enumerate(info.classes[1:])}
        rows.append({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()})
    return rows


def show(value):
    """A table's cell: values over seeds become 'mean ± deviation' (n - 1)."""
    if isinstance(value, list):
        return f"{np.mean(value):.2f}" + (f" ± {np.std(value, ddof=1):.2f}" if len(value) > 1 else "")
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(rows):
    """A list of dicts with the same keys -> a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(show, row.values())) + " |" for row in rows])


# ---------------------------------------------------------------------------------------------------- predicted against true quality

@torch.no_grad()
def estimate_quality(g, samples, index, mask, on, change=lambda x: x):
    """g's estimate and the true Dice of hard masks. -> two arrays [N, K-1], and whether the truth holds the class [N, K-1]

    index [N]: the sample of each mask [N, *S] in samples, which have labels; change: what to do to the images first.
    """
    predicted, true, present, K, batch = [], [], [], g.config["classes"], models.samples_in(64, mask.shape[1:])
    for rows, m in zip(index.split(batch), mask.split(batch)):
        x, y = samples.batch(rows, on.device)
        m, truth = (one_hot(v.to(on.device), K)[:, 1:] for v in (m, y))
        with on.autocast():
            predicted.append(g(change(x), m).cpu())
        true.append(quality.true_dice(m, truth).cpu()), present.append(truth.flatten(2).any(2).cpu())
    return torch.cat(predicted).numpy(), torch.cat(true).numpy(), torch.cat(present).numpy()


def estimate_masks(g, masks, on, most=None, **how):
    """estimate_quality on the masks of a split of vqm.h5, evenly thinned out to `most`, by all processes together; how: another index or change
    for it."""
    rows, index = thinned(len(masks.mask), most)[distributed.rank()::distributed.world()], how.pop("index", masks.index)
    found = estimate_quality(g, masks.samples, index[rows], masks.mask[rows], on, **how)
    return [np.stack(v) for v in zip(*distributed.gather(list(zip(*found))))]


def thinned(n, most=None):
    """Numbers below n, all or `most` that are evenly spread."""
    return torch.arange(n) if most is None else torch.linspace(0, n - 1, min(most, n)).long()


def quality_rows(title, predicted, true, present, classes):
    """Agreement over all classes; where some are absent from a slice's truth, present and absent ones apart; each class where present."""
    rows = [dict(run=title, entries="all", **agreement(predicted.ravel(), true.ravel()))]
    if not present.all():
        rows += [dict(run=title, entries="present", **agreement(predicted[present], true[present])),
                 dict(run=title, entries="absent", **agreement(predicted[~present], true[~present]))]
    if len(classes) > 2:
        rows += [dict(run=title, entries=c, **agreement(predicted[:, k][present[:, k]], true[:, k][present[:, k]]))
                 for k, c in enumerate(classes[1:])]
    return rows


@dataclass
class Outputs:
    """A run's outputs, sample by sample: what is true of them on the network's grid, and what each estimate says."""
    present: np.ndarray  # [N, K-1] whether the truth holds the class
    shared: np.ndarray   # [N, K-1] pixels of both output and truth
    area: np.ndarray     # [N, K-1] pixels of the output
    total: np.ndarray    # [N, K-1] pixels of output and truth, added
    estimates: dict      # name -> [N, K-1]


@dataclass
class Opinions:
    """Networks that answer for an image: the judged one, its teacher (of a teacher, its student), and an independent one or None."""
    net: torch.nn.Module
    other: torch.nn.Module
    second: torch.nn.Module | None = None


@torch.no_grad()
def compare_estimates(g, by, samples, on, batch):
    """What g, and every estimate of quality that needs no g, says of by.net's outputs for samples with labels. by: Opinions. -> Outputs"""
    def run(network, x):
        with on.autocast():
            return network(models.channels_last(x)).float().softmax(1)
    torch.manual_seed(0)  # of the augmented pass
    parts = []
    for rows in torch.arange(len(samples)).split(batch):
        x, y = samples.batch(rows, on.device)
        mine = run(by.net, x)                                                     # [B, K, *S]
        mask, truth = quality.foreground(mine), one_hot(y, mine.shape[1])[:, 1:]  # [B, K-1, *S]
        with on.autocast():
            says = {"g": g(x, mask)}
        says |= {"mean confidence": quality.confidence(mine), "mean certainty (entropy)": quality.certainty(mine),
                 "region confidence": quality.region_confidence(mine), "f's own expected Dice": quality.expected_dice(mine),
                 "agreement with an augmented pass": quality.overlap(mine, run(by.net, augment.strong(x.flip(-1), 0.5)).flip(-1)),
                 "agreement of student and teacher": quality.overlap(mine, run(by.other, x))}
        if by.second is not None:
            says["expected Dice under a second network"] = quality.expected_dice(mine, run(by.second, x))
        sums = [v.flatten(2).sum(2) for v in (truth, mask * truth, mask, mask + truth)]
        parts.append([v.cpu().numpy() for v in (sums[0] > 0, *sums[1:], *says.values())])
    present, shared, area, total, *estimates = (np.concatenate(v) for v in zip(*parts))
    return Outputs(present, shared, area, total, dict(zip(says, estimates)))


UNSCALED = {"mean confidence", "mean certainty (entropy)", "region confidence"}  # not estimates of a Dice
LEVELS = {"present": "of each {0} and class that is present", "absent": "of each {0} and class that is absent (Dice is 0 or 1)",
          "image": "of each {0}, mean over all classes, present or absent", "volume": "of each volume and class"}


def at_level(outputs, level, case, name=None):
    """The entries of a level, [n]: of the estimate of that name, or of the true Dice; and the case that each belongs to.

    A volume's true Dice is that of all pixels of its samples (where patches overlap, they count twice); its estimate is the mean of theirs,
    weighted with the output's area.
    """
    case, values = np.asarray(case), plain_dice(outputs.shared, outputs.total) if name is None else outputs.estimates[name]    # [N, K-1]
    if level == "image":
        return values.mean(1), case
    if level == "volume":
        names, volume = np.unique(case, return_inverse=True)
        add = lambda v: np.stack([np.bincount(volume, column) for column in v.T], 1)                                           # [volumes, K-1]
        weight = outputs.area + 1e-6
        found = plain_dice(add(outputs.shared), add(outputs.total)) if name is None else add(values * weight) / add(weight)
        return found.ravel(), np.repeat(names, found.shape[1])
    chosen = outputs.present if level == "present" else ~outputs.present
    return values[chosen], np.broadcast_to(case[:, None], values.shape)[chosen]


def monotone(x, y):
    """The increasing map from x to y of the least squared error, as a function; linear in between."""
    x, where, count = np.unique(x, return_inverse=True, return_counts=True)
    fitted = optimize.isotonic_regression(np.bincount(where, y) / count, weights=count).x
    return lambda v: np.interp(v, x, fitted)


def calibrated(estimate, true, patient, reference, folds=5):
    """Estimates after a monotone map to Dice that was fitted on other patients: on the reference, a pair (estimate, true) of val, or, where
    that is None since val itself is scored, on the patients of the other folds. None where there are no others."""
    if reference is not None:
        return monotone(*reference)(estimate) if len(reference[0]) else None
    out, fold = np.zeros(len(estimate)), np.unique(patient, return_inverse=True)[1] % folds
    if len(set(fold)) < 2:
        return None
    for k in set(fold):
        out[fold == k] = monotone(estimate[fold != k], true[fold != k])(estimate[fold == k])
    return out


def compare_rows(groups, outputs, reference, case, reference_case, patient):
    """Agreement of every estimate with the truth, for each level and each group of runs, the mean over all runs, and all outputs pooled.

    outputs: Outputs of each run; reference: those on val, for calibration, or None; patient: of each case. -> {level: rows}
    """
    tables = {}
    for level in LEVELS:
        true, owner = at_level(outputs[0], level, case)
        alone = (level == "volume" and len(set(case)) == len(case)) or (level == "image" and outputs[0].area.shape[1] == 1)
        if alone or not len(true):  # every volume is a slice, every slice a class: that table stands there already
            continue
        rows = []
        for name in outputs[0].estimates:
            pairs = [(at_level(o, level, case, name)[0], at_level(o, level, case)[0]) for o in outputs]
            # one map for all runs, since nobody knows how good a run is
            on_val = reference and [np.concatenate([at_level(o, level, reference_case, n)[0] for o in reference]) for n in (name, None)]
            estimate, truth = map(np.concatenate, zip(*pairs))
            mapped = calibrated(estimate, truth, np.tile([patient[c] for c in owner], len(outputs)), on_val)
            errors = [None] * len(outputs) if mapped is None else np.abs(mapped - truth).reshape(len(outputs), -1).mean(1)
            found = [agreement(*pair) | dict(dice=pair[1].mean(), calibrated=error) for pair, error in zip(pairs, errors)]
            found.append(agreement(estimate, truth) | dict(dice=truth.mean(), calibrated=None if mapped is None else np.mean(errors)))
            for run, members in [*((f"{n}, labeled {l}", m) for n, l, m in groups), ("mean of all", range(len(outputs))), ("pooled", [-1])]:
                known = {k: [found[i][k] for i in members if found[i][k] is not None] for k in found[0]}  # r is undefined for constants
                mean = {k: float(np.mean(v)) if v else None for k, v in known.items()}
                rows.append({"run": run, "estimate": name, "n": int(mean["n"]), "Dice": mean["dice"],
                             "MAE": None if name in UNSCALED else mean["mae"], "MAE calibrated": mean["calibrated"],
                             "Pearson": mean["pearson"], "Spearman": mean["spearman"], "worst 20% found": mean["worst"]})
        order = {run: i for i, run in enumerate(dict.fromkeys(r["run"] for r in rows))}
        tables[level] = sorted(rows, key=lambda r: order[r["run"]])
    return tables


def gigaflops(net, *inputs):
    """Multiplications and additions of one pass, in billions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops() / 1e9


def draw_quality(path, panels, classes):
    """Predicted against true quality, one panel each. panels: {title: (predicted, true)} [N, K-1]"""
    plt = h5.pyplot()
    columns, lines = min(len(panels), 4), -(-len(panels) // 4)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.8 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, (predicted, true)) in zip(axes.flat, panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, zorder=0)
        for k in range(predicted.shape[1]):
            axis.scatter(true[:, k], predicted[:, k], s=6, alpha=0.35, linewidths=0, color=h5.COLORS[k % len(h5.COLORS)])
        both = agreement(predicted.ravel(), true.ravel())
        axis.set_title(f"{title}\nMAE {both['mae']:.3f}, r {both['pearson'] or 0:.3f}", fontsize=9)
        axis.set(xlabel="true Dice", ylabel="predicted", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    h5.legend(figure, classes)
    h5.save_figure(figure, path)


def draw_estimates(path, rows):
    """Pearson r and calibrated MAE of every estimate (lines of the figure) for every group of runs (colors)."""
    plt = h5.pyplot()
    names = list(dict.fromkeys(r["estimate"] for r in rows))
    runs = [run for run in dict.fromkeys(r["run"] for r in rows) if run != "pooled"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.6 + 0.34 * len(names)), sharey=True, layout="constrained")
    for axis, column in zip(axes, ("Pearson", "MAE calibrated")):
        for i, run in enumerate(runs):
            last = run == "mean of all"
            values = {r["estimate"]: r[column] for r in rows if r["run"] == run}
            axis.scatter([np.nan if values.get(n) is None else values[n] for n in names], range(len(names)), label=run, zorder=3,
                         s=70 if last else 30, marker="|" if last else "o", color="black" if last else h5.COLORS[i % len(h5.COLORS)])
        axis.grid(axis="x", lw=0.4)
        axis.set_xlabel({"Pearson": "Pearson r (right is better)"}.get(column, "MAE after calibration (left is better)"))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    h5.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------- pictures and files

def draw_case(path, entry, image, truth, outputs, classes):
    """image | truth | each run's outlines, on the slice with most foreground. outputs: [(title, label (D, H, W))]"""
    z = h5.middle(truth, len(image))
    panels = [(entry.name if len(image) == 1 else f"{entry.name}, slice {z}", None), ("truth", truth), *outputs]
    columns = min(len(panels), 5)
    lines = -(-len(panels) // columns)
    figure, axes = h5.pyplot().subplots(lines, columns, figsize=(2.5 * columns, 2.9 * lines + 0.3), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, label) in zip(axes.flat, panels):
        h5.draw(axis, image[z], None if label is None else label[z], title)
    h5.legend(figure, classes)
    h5.save_figure(figure, path)


def draw_comparison(path, groups, scores):
    """Box plot of the cases' mean foreground Dice, a dot per case, for every group (seeds averaged)."""
    plt = h5.pyplot()
    values = [np.mean([[np.mean([s.dice for s in case]) for case in scores[i]] for i in members], 0) for _, _, members in groups]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.5 * len(groups)), layout="constrained")
    axis.boxplot(values, orientation="horizontal", widths=0.6, showfliers=False, medianprops=dict(color="black"))
    for i, v in enumerate(values):
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(v))
        axis.scatter(v, i + 1 + jitter, s=9, alpha=0.6, color=h5.COLORS[i % len(h5.COLORS)], linewidths=0)
    axis.set_yticks(range(1, len(groups) + 1), [f"{name}, labeled {labeled}" for name, labeled, _ in groups])
    axis.invert_yaxis()
    axis.set_xlabel("mean foreground Dice of a case")
    h5.save_figure(figure, path)


def write_text(path, text):
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)


def write_csv(path, rows):
    """A list of dicts with the same keys -> CSV."""
    with replacing(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------- main

def held_out(info, states):
    """Names of the train cases with labels from which no checkpoint has learned, neither itself nor through its g. states: path -> state"""
    used = set()
    for path, state in states.items():
        if state["data"]["checksum"] != info.checksum:
            raise InputError(f"{path}: was trained on another file than {info.path} is now, so nobody knows which of its cases it has seen")
        used |= set(state["labeled"])
    names = [e.name for e in info.entries("train") if e.labeled and e.name not in used]
    if not names:
        raise InputError(f"{info.path}: no train case has a label from which nobody has learned; score --split val")
    return names


def check_runs(args, info, states):
    """InputError if checkpoints of train_ssl.py do not fit the data, or cannot be compared by --qp. states: path -> state"""
    for path, state in states.items():
        for key in ("classes", "channels", "dims", "standardize"):
            if state["data"].get(key, True) != getattr(info, key):
                raise InputError(f"{path}: trained for {key} {state['data'].get(key, True)}, but {info.path} has {getattr(info, key)}")
    sizes = {state["args"]["size"]: path for path, state in states.items()}
    if args.qp and len(sizes) > 1:
        raise InputError("--qp compares outputs of one --size, but " + ", ".join(f"{path} has {size}" for size, path in sizes.items()))
    if args.second and any(os.path.samefile(args.second, path) for path in args.checkpoints):
        raise InputError(f"--second {args.second}: is among the runs that it should judge; give an independent one")


def write_quality(args, info, groups, states, outputs, reference, samples, reference_case, cost):
    """The tables, pictures and CSV of --qp. samples: those of the outputs; reference_case: cases of the reference, for each sample"""
    patient = {e.name: e.patient for split in info.splits for e in info.splits[split]}
    sample = "slice" if info.dims == 2 else "patch"
    levels = {level: text.format(sample) for level, text in LEVELS.items()}
    tables = compare_rows(groups, outputs, reference, samples.case, reference_case, patient)
    title = (f"Estimated against true quality, {info.name}, {args.split}, {len(set(samples.case))} cases: mean over seeds. MAE calibrated: after a "
             f"monotone map to Dice, fitted on {'the other patients' if reference is None else 'val'}; makes estimates of all scales comparable.\n"
             + ("The temperature of a dense g, and the best epoch of a scalar one, were chosen on val itself.\n" if args.split == "val" else "") + cost)
    write_text(os.path.join(args.out, "quality.md"), title + "\n" + "".join(
        f"\n{levels[level][0].upper() + levels[level][1:]}\n\n{markdown(rows)}\n" for level, rows in tables.items()))
    write_text(os.path.join(args.out, "quality.json"), json.dumps(dict(title=title, levels=tables, args=vars(args)), indent=1))
    first = next(iter(tables))  # "present", unless no class is
    print(f"\n{title}\n\nMean over all runs, {levels[first]} (quality.md has all)\n\n"
          + markdown([{k: v for k, v in r.items() if k != "run"} for r in tables[first] if r["run"] == "mean of all"]))
    true = [plain_dice(o.shared, o.total) for o in outputs]
    write_csv(os.path.join(args.out, "quality.csv"), [
        {"checkpoint": args.checkpoints[i], "run": name, "seed": states[i]["args"]["seed"], "case": samples.case[n], sample: " ".join(map(str, samples.at[n])), "class": c,
         "present": outputs[i].present[n, k], "true": true[i][n, k], **{e: v[n, k] for e, v in outputs[i].estimates.items()}}
        for name, labeled, members in groups for i in members for n in range(len(samples)) for k, c in enumerate(info.classes[1:])])
    draw_quality(os.path.join(args.out, "quality.png"),
                 {f"{name}, labeled {labeled}": (outputs[m[0]].estimates["g"], true[m[0]]) for name, labeled, m in groups}, info.classes)
    draw_estimates(os.path.join(args.out, "estimates.png"), tables[first])


def write_masks(args, info, entries, split, on):
    """--predict: the mask of every case, of a volume as NIfTI on its source's grid, of an image as PNG (0 and 255, or class numbers)."""
    from data import nifti  # brings SimpleITK, which nothing else here needs
    net, state = load_run(args.checkpoints[0], args.weights, on)
    size, K, folder = state["args"]["size"], len(info.classes), os.path.join(args.out, "masks")
    cut = window(size, args, args.batch)
    for entry in entries:  # one after the other: a large archive need not fit in memory
        images, cases = load_cases(info, split, size, [entry.name])
        label, = predict_cases(net, images, cases, on, cut, args.batch)
        label = largest_component(label, K) if args.largest_component else label
        if len(entry.grid) == 3:
            nifti.write_mask(os.path.join(folder, f"{entry.name}.nii.gz"), label, entry)
        else:
            with replacing(os.path.join(folder, f"{entry.name}.png")) as temporary, open(temporary, "wb") as f:
                f.write(cv2.imencode(".png", label[0] * (255 if K == 2 else 1))[1].tobytes())
    print(f"wrote {len(entries)} masks in {folder}")


def main(argv=None):
    args = parse_args(argv)
    on, info = models.compute(args.device, args.amp), h5.read_info(args.data)
    K = len(info.classes)
    heads = {path: {k: v for k, v in load_checkpoint(path, "ssl").items() if k in ("args", "data", "labeled")}
             for path in [*args.checkpoints, *([args.second] if args.second else [])]}
    check_runs(args, info, heads)
    states, size = [heads[path] for path in args.checkpoints], heads[args.checkpoints[0]]["args"]["size"]
    g = load_quality(args.qp, info, on, size)[0] if args.qp else None
    split, names = args.split, None
    if split == "held_out":
        split, names = "train", held_out(info, heads | ({args.qp: load_checkpoint(args.qp, "qp")} if args.qp else {}))
    entries = [e for e in info.entries(split) if names is None or e.name in names]
    args.batch = args.batch or models.samples_in(32, h5.shape_of(size))
    if args.predict:
        return write_masks(args, info, entries, split, on)
    if missing := [e.name for e in entries if not e.labeled]:
        raise InputError(f"{args.data}: /{split}/{missing[0]} has no label, so it cannot be scored; --predict writes masks without labels")
    second = load_run(args.second, args.weights, on)[0] if args.second else None
    val = None  # what --qp calibrates on
    if g and split != "val" and (labeled := [e.name for e in info.splits.get("val", []) if e.labeled]):
        val = h5.load_samples(info, "val", size, labeled)

    labels, scores, outputs, reference = [], [], [], []
    loaded = {}  # network grid -> samples, volumes, and cases
    for path, state in zip(args.checkpoints, states):
        net, size = load_run(path, args.weights, on)[0], state["args"]["size"]
        if size not in loaded:
            images, cases = load_cases(info, split, size, names)
            samples = h5.load_samples(info, split, size, [e.name for e in entries]) if g and info.dims == 3 else images
            loaded[size] = samples, images, cases
        samples, images, cases = loaded[size]
        cut = window(size, args, args.batch)
        found = predict_cases(net, images, cases, on, cut, args.batch)
        labels.append([largest_component(label, K) if args.largest_component else label for label in found])
        scores.append([score_case(label, truth, entry, K) for label, (entry, truth) in zip(labels[-1], cases)])
        if g:
            by = Opinions(net, load_run(path, "student" if args.weights == "teacher" else "teacher", on)[0], second)
            outputs.append(compare_estimates(g, by, samples, on, args.batch))
            if val:
                reference.append(compare_estimates(g, by, val, on, args.batch))

    groups = group_runs(states, args.checkpoints)
    known = all(e.spacing_known for e in entries)
    rows = summarize(info, groups, scores, "mm" if known else "px")
    write_csv(os.path.join(args.out, "cases.csv"), [
        {"checkpoint": path, "run": name, "labeled": labeled, "seed": states[i]["args"]["seed"], "case": e.name, "patient": e.patient,
         "class": info.classes[k + 1], "unit": "mm" if e.spacing_known else "px", **asdict(s)}
        for name, labeled, members in groups for i in members for path in [args.checkpoints[i]]
        for e, case in zip(entries, scores[i]) for k, s in enumerate(case)])
    title = f"{info.name}, {args.split}, {len(entries)} cases, mean over cases, then classes; ± over seeds" + (f"; {cut}" if cut else "")
    write_text(os.path.join(args.out, "summary.json"), json.dumps(dict(title=title, rows=rows, args=vars(args)), indent=1))
    write_text(os.path.join(args.out, "summary.md"), f"{title}\n\n{markdown(rows)}\n")
    print(f"{title}\n\n{markdown(rows)}")

    if g:
        x, mask = (torch.zeros(1, n, *h5.shape_of(size), device=on.device) for n in (info.channels, K - 1))
        cost = (f"Cost of {'an image' if info.dims == 2 else 'a patch'} of {' x '.join(map(str, h5.shape_of(size)))}: f {gigaflops(net, x):.2f} GFLOPs ({models.parameters(net) / 1e6:.1f} M parameters), "
                f"g {gigaflops(g, x, mask):.2f} GFLOPs ({models.parameters(g) / 1e6:.1f} M).")
        write_quality(args, info, groups, states, outputs, reference or None, samples, val and val.case, cost)

    if args.pictures > 0:
        draw_comparison(os.path.join(args.out, "compare.png"), groups, scores)
        with h5.open_file(info.path) as f:
            for c in np.unique(np.linspace(0, len(entries) - 1, min(args.pictures, len(entries))).astype(int)):
                image, truth = h5.read_case(f, info, split, entries[c].name)
                outlines = [(f"{name}\nlabeled {labeled}, Dice {np.mean([s.dice for s in scores[m[0]][c]]):.3f}", labels[m[0]][c])
                            for name, labeled, m in groups]
                draw_case(os.path.join(args.out, "cases", f"{entries[c].name}.png"), entries[c], image, truth, outlines, info.classes)
    print(f"\nwrote {args.out}/summary.md, summary.json, cases.csv" + (", quality.*, estimates.png" if g else "")
          + (", compare.png, cases/*.png" if args.pictures > 0 else ""))


if __name__ == "__main__":
    cli(main)
