"""Every picture: cases with outlines, and figures of what was measured.

    python -m data.figures runs/*/log.csv --out curves.png

draws the training curves of several runs, also while they train. The colors can be told apart by
readers who cannot tell red from green.

Legend: N samples, K classes, D depth, H height, W width.
"""

import csv
import os
import warnings
from typing import NamedTuple

import cv2
import numpy as np

from data.files import InputError, absent, replacing
from data.metrics import SHOWN, TOGETHER, agreement, monotone
from data.options import Parser, cli, picture

# the palette of Okabe and Ito: distinguishable for color-blind readers
# fmt: off
COLORS = np.array([[0, 114, 178], [230, 159, 0], [0, 158, 115],
                   [204, 121, 167], [86, 180, 233], [213, 94, 0]]) / 255
# fmt: on
STYLES = ("-", "--", ":", "-.")  # of the first six lines, of the next six, ...
MARKERS = ("o", "s", "^", "D")  # of the first six kinds of dots, of the next six, ...


def color(k):
    """The color of the k-th thing of its kind, from 0: a foreground class, a run, an estimate."""
    return COLORS[k % len(COLORS)]


def style(k):
    """The color and line style of the k-th curve."""
    return dict(color=color(k), linestyle=STYLES[k // len(COLORS) % len(STYLES)])


def dots_of(k):
    """The color and marker of the k-th kind of dots."""
    return dict(color=color(k), marker=MARKERS[k // len(COLORS) % len(MARKERS)])


def pyplot():
    """matplotlib.pyplot without a display, imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may hold $
    import matplotlib.pyplot

    return matplotlib.pyplot


def handle(**look):
    """A line for a legend that stands for no data."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def save_figure(figure, path):
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be written in any script
        figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight")
    pyplot().close(figure)


def grid_of(count, columns, width, height, **options):
    """A figure of at least `count` axes in lines of at most `columns`. -> figure, axes [lines, ...]

    width, height: of a panel, (factor, summand) in inches: a figure of n columns is factor n +
    summand wide. The axes without a panel are off. options: of matplotlib's subplots().
    """
    columns = min(count, columns)
    lines = -(-count // columns)
    size = (width[0] * columns + width[1], height[0] * lines + height[1])
    figure, axes = pyplot().subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes


def legend_below(figure, handles, ncols):
    """A legend under the panels."""
    figure.legend(
        handles=handles, ncols=ncols, loc="outside lower center", fontsize=8, frameon=False
    )


# -------------------------------------------------------------------------------------------- cases


class Panel(NamedTuple):
    """A slice in a figure, with the outlines of a label."""

    title: str
    image: np.ndarray  # (H, W) or (H, W, 3)
    label: np.ndarray | None  # (H, W)
    aspect: float = 1.0  # height / width of a pixel


def draw(axis, panel):
    """Shows a Panel on a matplotlib axis, with the outline of each class of its label."""
    image, label = panel.image, panel.label
    axis.imshow(to_gray_levels(image), cmap="gray", vmin=0, vmax=255, aspect=panel.aspect)
    height, width = image.shape[:2]
    extent = (-1, width, -1, height)
    for k in () if label is None else np.unique(label[label > 0]):
        mask = np.pad(label == k, 1)
        axis.contour(mask, [0.5], colors=[color(k - 1)], linewidths=1.4, extent=extent)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axis.set_title(panel.title, fontsize=8)
    axis.axis("off")


def to_gray_levels(image):
    """Intensities of any range -> uint8, the darkest 0 and the brightest 255."""
    low, high = float(image.min()), float(image.max())
    scaled = (image.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return scaled.round().astype(np.uint8)


def legend(figure, classes):
    """A legend of the colors of the foreground classes under the figure."""
    handles = [handle(color=color(k), label=name) for k, name in enumerate(classes[1:])]
    legend_below(figure, handles, ncols=min(len(classes), 6))


def middle(label, depth):
    """The slice to show: the one with the most foreground, or the middle one. label (D, H, W)"""
    if label is None or not label.any():
        return depth // 2
    return int((label > 0).sum((1, 2)).argmax())


def planes(image, label, truth, spacing):
    """Three planes of a volume (D, H, W), across each axis where the truth is largest. -> [Panel]

    label and truth may be None. The titles are empty.
    """
    panels = []
    for axis in range(3):
        seen = None if truth is None else np.moveaxis(truth, axis, 0)
        at = middle(seen, image.shape[axis])
        outline = None if label is None else label.take(at, axis)
        height, width = np.delete(spacing, axis)  # of a pixel
        panels.append(Panel("", image.take(at, axis), outline, np.divide(height, width)))
    return panels


def cases(path, rows, classes, columns=8, side=2.1):
    """Panels in rows, lists of Panel. A row begins on a new line of at most `columns` panels.

    side: of a panel, in inches.
    """
    lines = [line for row in rows for line in evenly(row, columns)]
    heights = [line_height(line, side) for line in lines]
    longest = max(map(len, lines))
    figure, axes = pyplot().subplots(
        len(lines),
        longest,
        figsize=(side * longest, sum(heights) + 0.3),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, panels in zip(axes, lines):
        for axis, panel in zip(line, panels):
            draw(axis, panel)
    legend(figure, classes)
    save_figure(figure, path)


def line_height(panels, side):
    """The height of a line of panels with their titles, in inches. side: the width of a panel"""
    picture = max(side * p.image.shape[0] / p.image.shape[1] * p.aspect for p in panels)
    lines = max(p.title.count("\n") + 2 for p in panels)
    return picture + 0.15 * lines


def evenly(panels, columns):
    """A list, not empty, in as few lines of at most `columns` as there can be. -> lists

    All but the last are equally long.
    """
    lines = -(-len(panels) // columns)
    each = -(-len(panels) // lines)
    return [panels[i : i + each] for i in range(0, len(panels), each)]


def overlay(image, labels, side=192):
    """A slice next to itself with the outlines of each label. -> (side, n * side, 3) uint8

    image (H, W) or (H, W, 3); labels: (H, W) each; side: of a square, in pixels.
    For TensorBoard: it takes a thousandth of the time that matplotlib does.
    """
    size = (side, side)
    plain = cv2.resize(to_gray_levels(image), size, interpolation=cv2.INTER_LINEAR)
    if plain.ndim == 2:
        plain = np.repeat(plain[..., None], 3, 2)
    panels = [plain]
    for label in labels:
        panel = plain.copy()
        large = cv2.resize(label.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        for k in np.unique(large[large > 0]):
            mask = np.uint8(large == k)
            outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(panel, outlines, -1, (255 * color(k - 1)).tolist(), 1)
        panels.append(panel)
    return np.concatenate(panels, 1)


def dots(predicted, true, side=256):
    """Predicted (across) against true (up) quality, with the diagonal. -> (side, side, 3) uint8

    predicted, true [N, K-1]. For TensorBoard, see overlay().
    """
    canvas = np.full((side, side, 3), 255, np.uint8)
    cv2.line(canvas, (0, side - 1), (side - 1, 0), (150, 150, 150), 1, cv2.LINE_AA)

    def pixels(share):
        return (share.clip(0, 1) * (side - 1)).round().astype(int).tolist()

    for k in range(predicted.shape[1]):
        for x, y in zip(pixels(predicted[:, k]), pixels(1 - true[:, k])):
            cv2.circle(canvas, (x, y), 3, (255 * color(k)).tolist(), -1, cv2.LINE_AA)
    return canvas


# -------------------------------------------------------------------------------- what was measured


def comparison(path, values):
    """A box plot over cases, and a dot for each case, per run.

    values: {run: mean foreground Dice of each case}
    """
    size = (7.5, 1.3 + 0.5 * len(values))
    figure, axis = pyplot().subplots(figsize=size, layout="constrained")
    axis.boxplot(
        list(values.values()),
        orientation="horizontal",
        widths=0.6,
        showfliers=False,
        medianprops=dict(color="black", lw=1.6),
        showmeans=True,
        meanprops=dict(marker="D", markersize=5, markerfacecolor="white", markeredgecolor="black"),
    )
    for i, v in enumerate(values.values()):
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(v))
        axis.scatter(v, i + 1 + jitter, s=9, alpha=0.6, color=color(i), linewidths=0)
    names = [f"{run}\nmean {np.mean(v):.3f}" for run, v in values.items()]
    axis.set_yticks(range(1, len(values) + 1), names, fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", lw=0.4)
    axis.set_xlabel(
        "mean foreground Dice of a case    (box: quartiles and median; ◇ mean; dot: a case)",
        fontsize=9,
    )
    save_figure(figure, path)


def quality(path, panels, classes):
    """True against predicted quality, one panel each, with the calibration line.

    panels: {title: (predicted, true, present)}, each [N, K-1]; present: whether the truth holds the
    class
    """
    figure, axes = grid_of(len(panels), columns=4, width=(3.4, 0), height=(4.1, 0))
    for axis, (title, (predicted, true, present)) in zip(axes.flat, panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, zorder=0)
        for k in range(predicted.shape[1]):
            look = dict(s=6, alpha=0.35, linewidths=0, color=color(k))
            axis.scatter(predicted[:, k], true[:, k], **look)
        at = np.unique(predicted)
        line = monotone(predicted.ravel(), true.ravel())(at)
        axis.plot(at, line, color="black", lw=1.5, label="calibration: mean true Dice, monotone")
        said = [
            in_words("classes that are present", predicted[present], true[present]),
            in_words("present or absent (all dots)", predicted.ravel(), true.ravel()),
        ]
        axis.set_title("\n".join([title, *said]), fontsize=8)
        axis.set(xlabel="predicted Dice", ylabel="true Dice", aspect="equal")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    dot = dict(ls="", marker="o", markersize=4)
    handles = [handle(color=color(k), label=name, **dot) for k, name in enumerate(classes[1:])]
    handles += axes.flat[0].get_legend_handles_labels()[0]
    legend_below(figure, handles, ncols=min(axes.shape[1], 3))
    save_figure(figure, path)


def in_words(which, predicted, true):
    """How well predicted quality [n] agrees with the true one, a line of a title."""
    found = agreement(predicted, true)
    mae, r = ("-" if found[k] is None else f"{found[k]:.3f}" for k in ("mae", "pearson"))
    return f"{which}: MAE {mae}, r {r}"


def estimates(path, rows):
    """Pearson r and calibrated MAE of every estimate for every group of runs.

    Estimates are the lines of the figure, groups of runs its colors and markers.
    rows: of compare_rows()
    """
    names = list(dict.fromkeys(row["estimate"] for row in rows))
    runs = [run for run in dict.fromkeys(row["run"] for row in rows) if run != "pooled"]
    titles = {
        "Pearson": "Pearson r (right is better)",
        "MAE calibrated": "MAE after calibration (left is better)",
    }
    figure, axes = pyplot().subplots(
        1, 2, figsize=(9, 1.6 + 0.34 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (column, title) in zip(axes, titles.items()):
        for i, run in enumerate(runs):
            found = {row["estimate"]: row[column] for row in rows if row["run"] == run}
            values = np.array([found.get(name) for name in names], float)  # None is NaN
            look = dict(s=30, **dots_of(i))
            if run == "mean of all":
                look = dict(s=70, marker="|", color="black")
            axis.scatter(values, range(len(names)), label=run, zorder=3, **look)
        axis.grid(axis="x", lw=0.4)
        axis.set_xlabel(title)
        axis.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])  # few and short numbers
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    legend_below(figure, axes[0].get_legend_handles_labels()[0], ncols=2)
    save_figure(figure, path)


def triage(path, panels):
    """The share of the bad cases among those shown, by the share of cases shown, one panel each.

    panels: {title: {estimate: found at evenly spaced shares}}
    """
    size = dict(width=(3.6, 0.6), height=(3.6, 1))
    figure, axes = grid_of(len(panels), columns=3, **size, sharey=True)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for i, (name, found) in enumerate(curves.items()):
            look = dict(lw=1.2, zorder=2, **style(i))
            if name in ("g", TOGETHER):
                look |= dict(lw=2.6, zorder=3)
            if name == "at best":
                look = dict(lw=1, ls=":", color="black")
            axis.plot(np.linspace(0, 1, len(found)), found, label=name, **look)
        axis.plot([0, 1], [0, 1], color="0.5", lw=1, zorder=0, label="at random")
        shown = dict(color="black", lw=0.8, ls=(0, (6, 3)), zorder=0)
        axis.axvline(SHOWN, label=f"{SHOWN:.0%} of the cases", **shown)
        axis.grid(lw=0.4)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of cases shown, lowest estimate first")
        axis.set_title(title, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the bad cases among them")
    handles, _ = axes.flat[0].get_legend_handles_labels()
    legend_below(figure, handles, ncols=2 if len(panels) < 3 else 3)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------- training curves

CURVES = {  # columns of log.csv -> the panel's title
    ("sup",): "supervised loss",
    ("unsup",): "unlabeled loss, unweighted by λ",
    ("qar",): "QAR: 1 - g",
    ("loss",): "loss",
    ("weight",): "mean weight of a pseudo-label",
    ("ess",): "effective share of the samples",
    ("lam",): "λ",
    ("share", "share_y"): "foreground: pseudo-labels, labels (dashed)",
    ("val_dice",): "Dice on val",
    ("g_true", "g_predicted"): "Dice of val images: true, and by g (dashed)",
    ("error_synthetic", "error_real"): "g's error on val: synthetic, real (dashed)",
}


def read_log(path):
    """A log.csv. -> {column: values [rows]}, NaN where empty. InputError if it is none."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {absent(path, 'file')}; give the log.csv of a run")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.DictReader(f) if is_whole(row)]
        columns = rows[0] if rows else ()
        table = {
            name: np.array([float(row[name] or "nan") for row in rows])
            for name in columns
            if name != "note"
        }
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: not a log of a training ({error}); give the log.csv of a run"
        ) from None
    if "step" not in table:
        problem = "holds no column step" if table else "holds no row yet"
        raise InputError(f"{path}: {problem}; give the log.csv of a run that has validated")
    return table


def is_whole(row):
    """Whether a row of csv.DictReader has all its entries; the last row may be cut short."""
    return bool(row.get("step", "-")) and None not in row.values() and None not in row


def is_told(log, name):
    """Whether a column of a log has anything to draw."""

    def some(column):
        return column in log and np.isfinite(log[column]).any() and np.nanmax(log[column]) > 0

    if name in ("lam", "share_y") and not some("unsup"):  # a supervised run has no pseudo-label
        return False
    return some(name)


def curves(path, logs):
    """The training curves of several runs in one figure. InputError if there is nothing to draw.

    logs: {run: what read_log() gives}
    """
    of_parts = any("sup" in log for log in logs.values())
    panels = [
        names
        for names in CURVES
        if any(is_told(log, name) for log in logs.values() for name in names)
        and not (names == ("loss",) and of_parts)
    ]
    if not panels:
        raise InputError(
            f"{', '.join(logs)}: no log has a column to draw; "
            "give the log.csv of runs that have validated"
        )
    height = (2.7, 0.16 * len(logs))
    figure, axes = grid_of(len(panels), columns=3, width=(3.6, 0), height=height)
    for axis, names in zip(axes.flat, panels):
        for i, log in enumerate(logs.values()):
            markers = ".x" if len(log["step"]) < 12 else (None, None)
            for name, marker, dashed in zip(names, markers, ({}, {"linestyle": "--"})):
                if is_told(log, name):
                    look = style(i) | dict(lw=1.4, marker=marker) | dashed
                    axis.plot(log["step"], log[name], **look)
        axis.set_title(CURVES[names], fontsize=9)
        in_steps = any("sup" in log and is_told(log, names[0]) for log in logs.values())
        axis.set_xlabel("step" if in_steps else "epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(lw=0.4)
    handles = [handle(label=run, **style(i)) for i, run in enumerate(logs)]
    legend_below(figure, handles, ncols=2)
    save_figure(figure, path)


def run_names(paths):
    """Names that tell runs apart: their folders, without the parents that all of them share."""
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath(folders)
    if shared in folders:
        shared = os.path.dirname(shared)
    names = [os.path.relpath(folder, shared) for folder in folders]
    return [
        name if names.count(name) == 1 else os.path.join(name, os.path.basename(path))
        for name, path in zip(names, paths)
    ]


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.figures")
    p.add_argument(
        "logs",
        nargs="+",
        metavar="LOG.csv",
        help="log.csv of one or more runs, of train_ssl.py or of train_qp.py",
    )
    p.add_argument("--out", type=picture, required=True, metavar="FILE.png", help="the figure")
    args = p.parse_args(argv)
    curves(args.out, dict(zip(run_names(args.logs), map(read_log, args.logs))))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
