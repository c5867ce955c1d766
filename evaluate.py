"""Stage 4: scores checkpoints on a split, case by case.

    python evaluate.py DATA.h5 runs/*/best.pt --split val --out runs/table [--qp runs/qp/qp.pt]

Reads  DATA.h5, the best.pt or last.pt of train_ssl.py, optionally the qp.pt of train_qp.py.
Writes OUT/cases.csv (a row per run, case and class), OUT/summary.json, OUT/summary.md (the table on the screen), OUT/compare.png,
       OUT/cases/*.png (image, truth, each run's outlines); with --qp also OUT/quality.csv, quality.md and quality.png.

Runs that differ only in their seed form one row: mean and standard deviation. Every score is taken on the case's own grid; volumes
that were segmented slice by slice are scored as volumes.

Legend: N slices, B batch, K classes, D depth, H height, W width, S side of the network's grid.
"""
import csv
import json
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import ndimage, stats
from torch.nn import functional as F

import models
from data import h5
from data.files import InputError, Parser, cli, load_checkpoint, number, replacing
from models.losses import one_hot
from models.quality import quality_target


def parse_args(argv=None):
    p = Parser(__doc__, prog="evaluate.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("checkpoints", nargs="+", help="best.pt or last.pt of one or more runs")
    p.add_argument("--split", choices=("train", "val", "test"), default="val", help="cases to score; all need labels")
    p.add_argument("--out", required=True, help="folder for tables and pictures")
    p.add_argument("--weights", choices=("student", "teacher"), default="student", help="the trained network or its EMA")
    p.add_argument("--largest-component", action="store_true", help="keep the largest connected component of each class")
    p.add_argument("--qp", metavar="QP.pt", help="quality predictor: compare its estimate with the true quality of each output")
    p.add_argument("--pictures", type=number(0), default=20, help="cases to draw, evenly spread; 0 draws nothing")
    p.add_argument("--batch", type=number(1), default=32, help="slices in one pass")
    p.add_argument("--device", type=models.device_name, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- metrics

@dataclass
class Score:
    """One class of one case. hd95 and asd in mm where the spacing is known, else in pixels."""
    dice: float
    jaccard: float
    hd95: float
    asd: float
    one_empty: bool  # prediction or truth is empty, but not both


def dice(mask, truth):
    """2 |A and B| / (|A| + |B|) of two boolean arrays; 1 if both are empty."""
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else 1.0


def score(mask, truth, spacing):
    """Dice, Jaccard, HD95 and ASD of two boolean masks of one shape (2D or 3D). spacing: per axis.

    Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the diagonal of the grid, the worst that is possible.
    HD95 is medpy's (95th percentile of both directed surface distance sets, pooled); ASD is medpy's asd (mask to truth).
    """
    a, b = int(mask.sum()), int(truth.sum())
    if a == 0 or b == 0:
        diagonal = float(np.linalg.norm(np.multiply(mask.shape, spacing)))
        return Score(1.0, 1.0, 0.0, 0.0, False) if a == b else Score(0.0, 0.0, diagonal, diagonal, True)
    both = int((mask & truth).sum())
    to_truth, to_mask = surface_distances(mask, truth, spacing)
    return Score(dice(mask, truth), both / (a + b - both), float(np.percentile(np.concatenate([to_truth, to_mask]), 95)),
                 float(to_truth.mean()), False)


def surface_distances(a, b, spacing):
    """Distances of a's surface to b's and of b's to a's. Boolean arrays, neither empty -> two 1D arrays.

    The surface of a mask are its elements that have a face neighbor outside of it (or outside of the grid).
    """
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]  # both masks lie inside, so that distances stay the same
    a, b = (np.pad(m[box], 1) for m in (a, b))
    edge_a, edge_b = (m & ~ndimage.binary_erosion(m) for m in (a, b))
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return to_b, to_a


def score_case(label, truth, entry, K):
    """The Score of each foreground class. label and truth (D, H, W) uint8; a plain image is scored in 2D."""
    if len(entry.grid) == 2:
        label, truth = label[0], truth[0]
    return [score(label == k, truth == k, entry.spacing) for k in range(1, K)]


def agreement(predicted, true):
    """How well estimates match: n, MAE, RMSE, Pearson, Spearman (None where one side is constant)."""
    predicted, true = (np.asarray(v, np.float64) for v in (predicted, true))
    n, varied = len(true), len(true) > 1 and predicted.std() > 1e-9 and true.std() > 1e-9
    return dict(n=n, mae=float(np.abs(predicted - true).mean()) if n else None,
                rmse=float(np.sqrt(((predicted - true) ** 2).mean())) if n else None,
                pearson=float(stats.pearsonr(predicted, true)[0]) if varied else None,
                spearman=float(stats.spearmanr(predicted, true)[0]) if varied else None)


# ---------------------------------------------------------------------------------------------------- prediction

def load_cases(info, split, size):
    """What scoring needs, read once: Slices on the network's grid, and entry and label (D, H, W) of every case."""
    slices = h5.load_slices(info, split, size)
    with h5.open_file(info.path) as f:
        return slices, [(e, h5.read_case(f, info, split, e.name)[1]) for e in info.entries(split)]


@torch.no_grad()
def predict(net, slices, on, batch=32):
    """Probabilities of every slice, in batches. -> [N, K, S, S] float32 on the CPU; restores the network's mode."""
    training = net.training
    net.eval()
    out = []
    for start in range(0, len(slices), batch):
        x, _ = slices.batch(slice(start, start + batch), on.device)
        with on.autocast():
            out.append(net(models.channels_last(x)).float().softmax(1).cpu())
    net.train(training)
    return torch.cat(out)


def to_grid(probability, grid):
    """Probabilities of a case's slices [D, K, S, S] -> labels (D, H, W) uint8 on the case's own grid."""
    back = F.interpolate(probability, size=grid[-2:], mode="bilinear", align_corners=False)
    return back.argmax(1).to(torch.uint8).numpy()


def largest_component(label, K):
    """Keeps the largest face-connected component of each class. (D, H, W) -> (D, H, W)"""
    out = np.zeros_like(label)
    for k in range(1, K):
        parts, n = ndimage.label(label == k)
        if n:
            out[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = k
    return out


def predict_cases(probability, cases, K, largest=False):
    """Labels of every case on its own grid, from the slices' probabilities [N, K, S, S], in order."""
    start = 0
    for entry, truth in cases:
        label = to_grid(probability[start:start + len(truth)], entry.grid)
        start += len(truth)
        yield largest_component(label, K) if largest else label


def evaluate(net, slices, cases, on, batch=32):
    """Mean Dice over cases and then classes, and per class: what the table shows, and what training selects by."""
    probability = predict(net, slices, on, batch)
    K = probability.shape[1]
    table = [[dice(label == k, truth == k) for k in range(1, K)]
             for label, (_, truth) in zip(predict_cases(probability, cases, K), cases)]
    per_class = np.mean(table, 0)
    return float(per_class.mean()), per_class.tolist()


# ---------------------------------------------------------------------------------------------------- runs

def load_run(path, weights, on):
    """The network of a train_ssl.py checkpoint, ready to predict, and the checkpoint."""
    state = load_checkpoint(path, "ssl")
    net = models.rebuild(state["model"], state["nets"][0] if weights == "student" else state["teacher"])
    return on.place(net).eval(), state


def load_quality(path, info, on):
    """The frozen quality predictor of train_qp.py, and the names of the train cases whose labels it has learned from.

    InputError if it was trained for other classes or channels.
    """
    state = load_checkpoint(path, "qp")
    theirs, ours = state["data"], dict(classes=info.classes, channels=info.channels, dims=info.dims)
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(f"{path}: trained for {key} {theirs[key]}, but {info.path} has {value}; train g on this data")
    g = models.rebuild(state["model"], state["weights"])
    return on.place(g).eval().requires_grad_(False), state["labeled"]


def run_name(args):
    """What the row of a run is called: its method and hooks."""
    name = args["method"]
    if args["weight"] != "none" and args["method"] != "supervised":  # which has nothing to weight
        name += " + " + ("QW" if args["weight"] == "quality" else "confidence")
        name += " (class)" if args["weight_level"] == "class" else ""
    return name + (" + QAR" if args["qar"] else "")


def group_runs(states, paths):
    """Runs that differ only in their seed -> [(name, labeled, [index, ...])]; names are made unique by what differs.

    A checkpoint whose seed its group has already is no further seed: it stands alone, under its path.
    """
    groups, titles = {}, {}
    for i, (state, path) in enumerate(zip(states, paths)):
        config = {k: v for k, v in state["args"].items() if k not in {"seed", "out", "resume", "overwrite", "device", "keep"}}
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
def estimate_quality(g, slices, index, mask, on, change=lambda x: x):
    """g's estimate and the true quality of hard masks. -> two arrays [N, K-1], and whether the truth holds the class [N, K-1]

    index [N]: the slice of each mask [N, S, S] in slices, which have labels; change: what to do to the images first.
    Both numbers are the smoothed Dice per slice (models.quality.quality_target).
    """
    predicted, true, present, K = [], [], [], g.config["classes"]
    for rows, m in zip(index.split(64), mask.split(64)):
        x, y = slices.batch(rows, on.device)
        m, truth = (one_hot(v.to(on.device), K)[:, 1:] for v in (m, y))
        with on.autocast():
            predicted.append(g(change(x), m).cpu())
        true.append(quality_target(m, truth).cpu()), present.append(truth.flatten(2).any(2).cpu())
    return torch.cat(predicted).numpy(), torch.cat(true).numpy(), torch.cat(present).numpy()


def estimate_masks(g, masks, on, most=None, **how):
    """estimate_quality on the masks of a split of vqm.h5, evenly thinned out to `most`; how: another index or change for it."""
    rows = torch.arange(len(masks.mask)) if most is None else torch.linspace(0, len(masks.mask) - 1, min(most, len(masks.mask))).long()
    index = how.pop("index", masks.index)
    return estimate_quality(g, masks.slices, index[rows], masks.mask[rows], on, **how)


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
        axis.set(xlabel="true smoothed Dice", ylabel="predicted", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    h5.legend(figure, classes)
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

def main(argv=None):
    args = parse_args(argv)
    on, info = models.compute(args.device, args.amp), h5.read_info(args.data)
    K, entries = len(info.classes), info.entries(args.split)
    if missing := [e.name for e in entries if not e.labeled]:
        raise InputError(f"{args.data}: /{args.split}/{missing[0]} has no label, so it cannot be scored")
    g = load_quality(args.qp, info, on)[0] if args.qp else None

    states, labels, scores, quality = [], [], [], []
    loaded = {}  # network grid -> slices and cases
    for path in args.checkpoints:
        net, state = load_run(path, args.weights, on)
        for key in ("classes", "channels"):
            if state["data"][key] != getattr(info, key):
                raise InputError(f"{path}: trained for {key} {state['data'][key]}, but {args.data} has {getattr(info, key)}")
        size = state["args"]["size"]
        if size not in loaded:
            loaded[size] = load_cases(info, args.split, size)
        slices, cases = loaded[size]
        probability = predict(net, slices, on, args.batch)
        labels.append(list(predict_cases(probability, cases, K, args.largest_component)))
        scores.append([score_case(label, truth, entry, K) for label, (entry, truth) in zip(labels[-1], cases)])
        if g:
            quality.append(estimate_quality(g, slices, torch.arange(len(slices)), probability.argmax(1), on))
        states.append({k: state[k] for k in ("args", "data")})

    groups = group_runs(states, args.checkpoints)
    known = all(e.spacing_known for e in entries)
    rows = summarize(info, groups, scores, "mm" if known else "px")
    write_csv(os.path.join(args.out, "cases.csv"), [
        {"checkpoint": path, "run": name, "labeled": labeled, "seed": states[i]["args"]["seed"], "case": e.name, "patient": e.patient,
         "class": info.classes[k + 1], "unit": "mm" if e.spacing_known else "px", **asdict(s)}
        for name, labeled, members in groups for i in members for path in [args.checkpoints[i]]
        for e, case in zip(entries, scores[i]) for k, s in enumerate(case)])
    title = f"{info.name}, {args.split}, {len(entries)} cases, mean over cases, then classes; ± over seeds"
    write_text(os.path.join(args.out, "summary.json"), json.dumps(dict(title=title, rows=rows, args=vars(args)), indent=1))
    write_text(os.path.join(args.out, "summary.md"), f"{title}\n\n{markdown(rows)}\n")
    print(f"{title}\n\n{markdown(rows)}")

    if g:
        named = [(f"{name}, labeled {labeled}", i) for name, labeled, members in groups for i in members]
        table = sum((quality_rows(f"{name}, seed {states[i]['args']['seed']}", *quality[i], info.classes) for name, i in named), [])
        text = f"Predicted against true quality of the outputs' slices ({args.qp})\n\n{markdown(table)}\n"
        write_text(os.path.join(args.out, "quality.md"), text)
        print(f"\n{text}", end="")
        write_csv(os.path.join(args.out, "quality.csv"), [
            {"run": name, "seed": states[i]["args"]["seed"], "case": slices.case[n], "slice": slices.z[n], "class": c,
             "predicted": quality[i][0][n, k], "true": quality[i][1][n, k], "present": quality[i][2][n, k]}
            for name, i in named for n in range(len(slices)) for k, c in enumerate(info.classes[1:])])
        draw_quality(os.path.join(args.out, "quality.png"), 
                     {f"{name}, labeled {labeled}": quality[m[0]][:2] for name, labeled, m in groups}, info.classes)

    if args.pictures > 0:
        draw_comparison(os.path.join(args.out, "compare.png"), groups, scores)
        with h5.open_file(info.path) as f:
            for c in np.unique(np.linspace(0, len(entries) - 1, min(args.pictures, len(entries))).astype(int)):
                image, truth = h5.read_case(f, info, args.split, entries[c].name)
                outputs = [(f"{name}\nlabeled {labeled}, Dice {np.mean([s.dice for s in scores[m[0]][c]]):.3f}", labels[m[0]][c])
                           for name, labeled, m in groups]
                draw_case(os.path.join(args.out, "cases", f"{entries[c].name}.png"), entries[c], image, truth, outputs, info.classes)
    print(f"\nwrote {args.out}/summary.md, summary.json, cases.csv" + (", quality.*" if g else "")
          + (", compare.png, cases/*.png" if args.pictures > 0 else ""))


if __name__ == "__main__":
    cli(main)
