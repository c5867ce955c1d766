"""Every picture: cases with outlines, and figures of what was measured; for readers who may not tell red from green, too.

    python -m data.figures runs/*/log.csv --out curves.png    # training curves of several runs, also while they train

Legend: N samples, K classes, D depth, H height, W width.
"""
import csv
import itertools
import os
import warnings

import cv2
import numpy as np

from data.files import InputError, Parser, cli, picture, replacing
from data.metrics import SHOWN, agreement, monotone

COLORS = np.array([[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0]]) / 255
#        Okabe and Ito's palette: distinguishable for color-blind readers
STYLES = ("-", "--", ":", "-.")  # of the first six lines, of the next six, ...


def color(k):
    """Of the k-th thing of its kind, from 0 on: a class of the foreground, a run, an estimate."""
    return COLORS[k % len(COLORS)]


def style(k):
    """Color and line of the k-th curve."""
    return dict(color=color(k), linestyle=STYLES[k // len(COLORS) % len(STYLES)])


def pyplot():
    """matplotlib.pyplot without a display, imported only where something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, path):
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be written in any script
        figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight")
    pyplot().close(figure)


# ---------------------------------------------------------------------------------------------------- cases

def draw(axis, image, label=None, title="", aspect=1.0):
    """Shows a slice (H, W) or (H, W, 3) on a matplotlib axis with the outline of each class of label (H, W). aspect: pixel height / width"""
    axis.imshow(to_gray_levels(image), cmap="gray", vmin=0, vmax=255, aspect=aspect)
    for k in range(1, 0 if label is None else int(label.max()) + 1):
        if 0 < (label == k).sum():
            axis.contour(np.pad(label == k, 1), [0.5], colors=[color(k - 1)], linewidths=1.4, extent=(-1, label.shape[1], -1, label.shape[0]))
    axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def to_gray_levels(image):
    """Intensities of any range -> uint8, the darkest 0 and the brightest 255."""
    low, high = float(image.min()), float(image.max())
    return ((image.astype(np.float32) - low) * (255 / max(high - low, 1e-6))).round().astype(np.uint8)


def legend(figure, classes):
    """A legend of the foreground classes' colors under the figure."""
    from matplotlib.lines import Line2D
    figure.legend(handles=[Line2D([], [], color=color(k - 1), label=c) for k, c in enumerate(classes) if k],
                  loc="outside lower center", ncols=min(len(classes), 6), fontsize=8, frameon=False)


def middle(label, depth):
    """The slice to show: the one with the most foreground, or the middle one."""
    return depth // 2 if label is None or not label.any() else int((label > 0).sum((1, 2)).argmax())


def planes(image, label, truth, spacing):
    """Three planes of a volume (D, H, W), across each axis where the truth is largest; label and truth may be None.
    -> [(image, label, aspect of its pixels), ...]"""
    at = [middle(None if truth is None else np.moveaxis(truth, axis, 0), image.shape[axis]) for axis in range(3)]
    return [(image.take(i, axis), None if label is None else label.take(i, axis), np.divide(*np.delete(spacing, axis))) for axis, i in enumerate(at)]


def cases(path, rows, classes, columns=8, side=2.1):
    """Panels in rows, each begun on a new line of at most `columns`; of a side in inches. rows: lists of (title, image, label or None[, aspect])"""
    lines = [line for row in rows for line in evenly(row, columns)]
    heights = [max(side * image.shape[0] / image.shape[1] * (aspect or [1.0])[0] for _, image, _, *aspect in line)
               + 0.15 * max(title.count("\n") + 2 for title, *_ in line) for line in lines]
    figure, axes = pyplot().subplots(len(lines), max(map(len, lines)), figsize=(side * max(map(len, lines)), sum(heights) + 0.3),
                                     height_ratios=heights, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for line, panels in zip(axes, lines):
        for axis, (title, image, label, *aspect) in zip(line, panels):
            draw(axis, image, label, title, *aspect)
    legend(figure, classes)
    save_figure(figure, path)


def evenly(panels, columns):
    """A list, not empty, in as few lines of at most `columns` as there can be, all but the last equally long. -> lists"""
    lines = -(-len(panels) // columns)
    each = -(-len(panels) // lines)
    return [panels[i:i + each] for i in range(0, len(panels), each)]


def overlay(image, labels, side=192):
    """A slice (H, W) or (H, W, 3) in a square of `side` pixels, next to itself with the outlines of each of some labels (H, W). -> (side, n * side, 3) uint8

    For TensorBoard: a thousandth of the time that matplotlib takes.
    """
    plain = cv2.resize(to_gray_levels(image), (side, side), interpolation=cv2.INTER_LINEAR)
    plain = np.repeat(plain[..., None], 3, 2) if plain.ndim == 2 else plain
    panels = [plain]
    for label in labels:
        panel, large = plain.copy(), cv2.resize(label.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
        for k in range(1, int(large.max()) + 1):
            outlines, _ = cv2.findContours((large == k).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(panel, outlines, -1, (255 * color(k - 1)).tolist(), 1)
        panels.append(panel)
    return np.concatenate(panels, 1)


def dots(predicted, true, side=256):
    """Predicted (across) against true (up) quality, with the diagonal; for TensorBoard, see overlay(). [N, K-1] twice -> (side, side, 3) uint8"""
    canvas = np.full((side, side, 3), 255, np.uint8)
    cv2.line(canvas, (0, side - 1), (side - 1, 0), (150, 150, 150), 1, cv2.LINE_AA)
    at = lambda v: (v.clip(0, 1) * (side - 1)).round().astype(int)
    for k in range(predicted.shape[1]):
        for x, y in zip(at(predicted[:, k]).tolist(), at(1 - true[:, k]).tolist()):
            cv2.circle(canvas, (x, y), 3, (255 * color(k)).tolist(), -1, cv2.LINE_AA)
    return canvas


# ---------------------------------------------------------------------------------------------------- what was measured

def comparison(path, values):
    """Box plot over cases, and a dot for each case, per run. values: {run: mean foreground Dice of each case}"""
    figure, axis = pyplot().subplots(figsize=(7.5, 1.3 + 0.5 * len(values)), layout="constrained")
    axis.boxplot(list(values.values()), orientation="horizontal", widths=0.6, showfliers=False, medianprops=dict(color="black", lw=1.6), showmeans=True,
                 meanprops=dict(marker="D", markersize=5, markerfacecolor="white", markeredgecolor="black"))
    for i, v in enumerate(values.values()):
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(v))
        axis.scatter(v, i + 1 + jitter, s=9, alpha=0.6, color=color(i), linewidths=0)
    axis.set_yticks(range(1, len(values) + 1), [f"{run}\nmean {np.mean(v):.3f}" for run, v in values.items()], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", lw=0.4)
    axis.set_xlabel("mean foreground Dice of a case    (box: quartiles and median; ◇ mean; dot: a case)", fontsize=9)
    save_figure(figure, path)


def quality(path, panels, classes):
    """True against predicted quality, one panel each, with the calibration line. panels: {title: (predicted, true)} [N, K-1]"""
    columns, lines = min(len(panels), 4), -(-len(panels) // 4)
    figure, axes = pyplot().subplots(lines, columns, figsize=(3.4 * columns, 3.9 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, (predicted, true)) in zip(axes.flat, panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, zorder=0)
        for k in range(predicted.shape[1]):
            axis.scatter(predicted[:, k], true[:, k], s=6, alpha=0.35, linewidths=0, color=color(k))
        predicted, true = predicted.ravel(), true.ravel()
        at = np.unique(predicted)
        axis.plot(at, monotone(predicted, true)(at), color="black", lw=1.5, label="calibration: mean true Dice, monotone")
        both = agreement(predicted, true)
        axis.set_title(f"{title}\nMAE {both['mae']:.3f}, r {both['pearson'] or 0:.3f}", fontsize=9)
        axis.set(xlabel="predicted Dice", ylabel="true Dice", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    from matplotlib.lines import Line2D
    dots = [Line2D([], [], color=color(k - 1), ls="", marker="o", markersize=4, label=c) for k, c in enumerate(classes) if k]
    figure.legend(handles=[*dots, *axes.flat[0].get_legend_handles_labels()[0]], loc="outside lower center", ncols=min(columns, 3), fontsize=8, frameon=False)
    save_figure(figure, path)


def estimates(path, rows):
    """Pearson r and calibrated MAE of every estimate (lines of the figure) for every group of runs (colors)."""
    names = list(dict.fromkeys(r["estimate"] for r in rows))
    runs = [run for run in dict.fromkeys(r["run"] for r in rows) if run != "pooled"]
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 1.6 + 0.34 * len(names)), sharey=True, layout="constrained")
    for axis, column in zip(axes, ("Pearson", "MAE calibrated")):
        for i, run in enumerate(runs):
            last = run == "mean of all"
            values = {r["estimate"]: r[column] for r in rows if r["run"] == run}
            axis.scatter([np.nan if values.get(n) is None else values[n] for n in names], range(len(names)), label=run, zorder=3,
                         s=70 if last else 30, marker="|" if last else "o", color="black" if last else color(i))
        axis.grid(axis="x", lw=0.4)
        axis.set_xlabel({"Pearson": "Pearson r (right is better)"}.get(column, "MAE after calibration (left is better)"))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def triage(path, panels):
    """Share of the bad cases among those shown, by the share of cases shown, one panel each. panels: {title: {estimate: found at evenly spaced shares}}"""
    columns, lines = min(len(panels), 3), -(-len(panels) // 3)
    figure, axes = pyplot().subplots(lines, columns, figsize=(3.6 * columns + 0.6, 3.6 * lines + 1), squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for i, (name, found) in enumerate(curves.items()):
            look = dict(color="black", lw=1, ls=":") if name == "at best" else dict(lw=2.6 if i == 0 else 1.2, zorder=3 if i == 0 else 2, **style(i))
            axis.plot(np.linspace(0, 1, len(found)), found, label=name, **look)
        axis.plot([0, 1], [0, 1], color="0.5", lw=1, zorder=0, label="at random")
        axis.axvline(SHOWN, color="black", lw=0.8, ls=(0, (6, 3)), zorder=0, label=f"{SHOWN:.0%} of the cases")
        axis.grid(lw=0.4)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of cases shown, lowest estimate first")
        axis.set_title(title, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the bad cases among them")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 if len(panels) < 3 else 3, fontsize=8, frameon=False)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------- training curves

CURVES = {  # columns of log.csv -> the panel's title
    ("sup",): "supervised loss", ("unsup",): "unlabeled loss, unweighted by λ", ("qar",): "QAR: 1 - g", ("loss",): "loss",
    ("weight",): "mean weight of a pseudo-label", ("ess",): "effective share of the samples", ("lam",): "λ",
    ("share", "share_y"): "foreground: pseudo-labels, labels (dashed)", ("val_dice",): "Dice on val",
    ("g_true", "g_predicted"): "Dice of val images: true, and by g (dashed)", ("error_synthetic", "error_real"): "g's error on val: synthetic, real (dashed)"}


def read_log(path):
    """A log.csv -> {column: values [rows]}, NaN where empty. InputError if it is none."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'a folder' if os.path.isdir(path) else 'no such file'}; give the log.csv of a run")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.DictReader(f) if row.get("step", "-") and None not in row.values() and None not in row]  # the last may be cut short
        table = {name: np.array([float(row[name] or "nan") for row in rows]) for name in (rows[0] if rows else ()) if name != "note"}
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a log of a training ({error}); give the log.csv of a run") from None
    if "step" not in table:
        raise InputError(f"{path}: {'holds no column step' if table else 'holds no row yet'}; give the log.csv of a run that has validated")
    return table


def curves(path, logs):
    """Training curves of several runs in one figure. logs: {run: what read_log() gives}. InputError if they hold nothing to draw."""
    some = lambda log, name: name in log and np.isfinite(log[name]).any() and np.nanmax(log[name]) > 0
    told = lambda log, name: some(log, name) and (name not in ("lam", "share_y") or some(log, "unsup"))   # a supervised run has no pseudo-label
    panels = [names for names in CURVES if any(told(log, name) for log in logs.values() for name in names)
              and not (names == ("loss",) and any("sup" in log for log in logs.values()))]
    if not panels:
        raise InputError(f"{', '.join(logs)}: no log has a column to draw; give the log.csv of runs that have validated")
    columns = min(3, len(panels))
    figure, axes = pyplot().subplots(-(-len(panels) // columns), columns, figsize=(3.6 * columns, 2.7 * -(-len(panels) // columns) + 0.16 * len(logs)),
                                     squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, names in zip(axes.flat, panels):
        for (i, log), (j, name) in itertools.product(enumerate(logs.values()), enumerate(names)):
            if told(log, name):
                few, second = len(log["step"]) < 12, dict(linestyle="--") if j else {}
                axis.plot(log["step"], log[name], lw=1.4, marker=".x"[j] if few else None, **style(i) | second)
        axis.set_title(CURVES[names], fontsize=9)
        axis.set_xlabel("step" if any("sup" in log for log in logs.values() if told(log, names[0])) else "epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(lw=0.4)
    from matplotlib.lines import Line2D
    figure.legend(handles=[Line2D([], [], label=run, **style(i)) for i, run in enumerate(logs)], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def run_names(paths):
    """What tells runs apart: their folders, without what all of them share."""
    folders = [os.path.dirname(os.path.abspath(p)).split(os.sep) for p in paths]
    shared = len(os.path.commonprefix(folders)) if len(folders) > 1 else len(folders[0]) - 1
    names = [os.sep.join(f[min(shared, len(f) - 1):]) for f in folders]
    return [name if names.count(name) == 1 else os.path.join(name, os.path.basename(path)) for name, path in zip(names, paths)]


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.figures")
    p.add_argument("logs", nargs="+", metavar="LOG.csv", help="log.csv of one or more runs, of train_ssl.py or of train_qp.py")
    p.add_argument("--out", type=picture, required=True, metavar="FILE.png", help="the figure")
    args = p.parse_args(argv)
    curves(args.out, dict(zip(run_names(args.logs), map(read_log, args.logs))))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
