"""Pictures: colors for color-blind readers, outlines where the mask is, curves of runs.

The log on the screen, TensorBoard, bars and --help.
"""

import argparse
import csv
import itertools
import re
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import python, shared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ssl import train

import corrupt
import evaluate
import train_qp
import train_ssl
from data import figures, h5, loading, metrics, options
from data.log import Log
from models import checkpoints, inference
from models.quality import Seen

MACHADO = {  # Machado et al. 2009: linear RGB as seen without one kind of cone
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize(
    "count, columns, lengths",
    [(8, 8, [8]), (9, 8, [5, 4]), (10, 4, [4, 4, 2]), (1, 5, [1]), (17, 8, [6, 6, 5])],
)
def test_lines_of_panels_are_about_equally_long(count, columns, lengths):
    lines = figures.evenly(list(range(count)), columns)
    assert [len(line) for line in lines] == lengths and sum(lines, []) == list(range(count))


@pytest.mark.parametrize("kind", MACHADO)
def test_colors_differ_for_color_blind_readers(kind):
    """Any two are further apart than red and green of the usual palettes are then.

    In CIELAB, where 2.3 is just noticed.
    """
    linear = np.where(
        figures.COLORS <= 0.04045, figures.COLORS / 12.92, ((figures.COLORS + 0.055) / 1.055) ** 2.4
    )
    seen = (linear @ np.array(MACHADO[kind]).T).clip(0, 1).astype(np.float32)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055).astype(
        np.float32
    )
    lab = cv2.cvtColor(seen[None], cv2.COLOR_RGB2LAB)[0]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 8


@pytest.fixture
def drawn(monkeypatch):
    """What would be written: a list of (path, figure)."""
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append((path, figure)))
    yield found
    for _, figure in found:
        figures.pyplot().close(figure)


def test_an_outline_lies_half_a_pixel_around_its_mask(drawn):
    """Also of one that ends with the image; in image coordinates, x across and y down."""
    label = np.zeros((9, 12), np.uint8)
    label[2:5, 3:8], label[8, 11] = 1, 2
    panel = figures.Panel("title", np.arange(108.0).reshape(9, 12), label)
    figures.cases("f.png", [[panel]], ["background", "a", "b"])
    ((_, figure),) = drawn
    axis = figure.axes[0]
    outlines = [np.concatenate([path.vertices for path in c.get_paths()]) for c in axis.collections]
    assert [o.min(0).tolist() for o in outlines] == [[2.5, 1.5], [10.5, 7.5]] and [
        o.max(0).tolist() for o in outlines
    ] == [[7.5, 4.5], [11.5, 8.5]]
    assert axis.get_xlim() == (-0.5, 11.5) and axis.get_ylim() == (8.5, -0.5)
    assert [
        np.allclose(c.get_edgecolor()[0][:3], figures.color(k))
        for k, c in enumerate(axis.collections)
    ] == [True, True]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]


def test_pictures_of_tensorboard():
    """Image, then each label's outlines in its classes' colors.

    Quality as dots, of which the right ones lie on the diagonal.
    """
    label = np.zeros((32, 32), np.uint8)
    label[8:24, 8:16], label[8:24, 16:24] = 1, 2
    found = figures.overlay(np.full((32, 32), 7.0), (label, 0 * label), side=64)
    assert found.shape == (64, 192, 3) and found.dtype == np.uint8
    first, second, third = np.split(found, 3, 1)
    assert (
        (first == third).all()
        and (second[32, 16] == (255 * figures.color(0)).astype(int)).all()
        and (second[32, 47] == (255 * figures.color(1)).astype(int)).all()
    )
    assert (second[:15] == first[:15]).all() and (second[20:44, 20:28] == first[20:44, 20:28]).all()
    assert figures.overlay(np.zeros((8, 9, 3), np.uint8), ()).shape == (192, 192, 3)
    dots = figures.dots(np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]]))
    assert (dots[0, 0] < 200).any() and (dots[0, -1] < 200).any() and (dots[-1, -1] == 255).all()


def log_of(path, rows):
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return str(path)


def test_curves_of_several_runs(tmp_path, drawn, refused):
    """A panel for each column that says something, a curve for each run.

    A row that was cut short is left out.
    """
    columns = ["step", "sup", "unsup", "weight", "lam", "val_dice", "g_true", "g_predicted"]
    a = log_of(
        tmp_path / "runs" / "sup" / "log.csv",
        [columns, [10, 0.5, 0, 0, 0.25, 0.4, "", ""], [20, 0.3, 0, 0, 0.25, 0.6, "", ""]],
    )
    b = log_of(
        tmp_path / "runs" / "mt" / "log.csv",
        [
            columns,
            [10, 0.5, 0.1, 0.7, 0.1, 0.5, 0.4, 0.5],
            [20, 0.2, 0.2, 0.8, 0.25, 0.7, 0.6, 0.6],
            [30, 0.1],
        ],
    )
    figures.main([a, b, "--out", str(tmp_path / "c.png")])
    ((path, figure),) = drawn
    panels = {axis.get_title(): axis for axis in figure.axes if axis.lines}
    assert [figures.CURVES[k] for k in figures.CURVES if figures.CURVES[k] in panels] == list(
        panels
    ) and len(panels) == 6
    assert {title: len(axis.lines) for title, axis in panels.items()} == {
        "supervised loss": 2,
        "unlabeled loss, unweighted by λ": 1,
        "mean weight of a pseudo-label": 1,
        "λ": 1,
        "Dice on val": 2,
        "Dice of val images: true, and by g (dashed)": 2,
    }
    assert panels["Dice on val"].lines[1].get_xydata().tolist() == [[10, 0.5], [20, 0.7]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["sup", "mt"]
    (
        (tmp_path / "empty.csv").write_text("step,sup\n"),
        (tmp_path / "other.csv").write_text("a,b\n1,2\n"),
        (tmp_path / "text.csv").write_text("step,b\n1,x\n"),
    )
    (
        (tmp_path / "nothing.csv").write_text("step,sup,val_dice\n10,,\n20,0,0\n"),
        (tmp_path / "bom.csv").write_text("\ufeffstep,sup\n10,1\n,2\n"),
    )
    assert figures.read_log(str(tmp_path / "bom.csv"))["step"].tolist() == [10]
    refused(
        figures.main,
        [tmp_path / "nothing.csv", "--out", tmp_path / "d.png"],
        "no log has a column to draw",
    )
    with pytest.raises(SystemExit):
        figures.main([a, "--out", a])
    for name, word in (
        ("empty.csv", "no row"),
        ("other.csv", "no column step"),
        ("text.csv", "x"),
        ("none.csv", "no such file"),
    ):
        refused(figures.main, [tmp_path / name, "--out", tmp_path / "d.png"], name, word)
    assert figures.run_names(["a/x/log.csv", "a/y/log.csv"]) == ["x", "y"] and figures.run_names(
        ["a/log.csv"]
    ) == ["a"]
    assert figures.run_names(["a/x/log.csv", "a/x/old.csv"]) == ["x/log.csv", "x/old.csv"]


def test_the_calibration_line_is_the_monotone_map(drawn):
    rng = np.random.default_rng(0)
    predicted, true = rng.random((40, 2)), rng.random((40, 2))
    present = np.arange(80).reshape(40, 2) % 3 > 0
    figures.quality("q.png", {"run": (predicted, true, present)}, ["background", "a", "b"])
    axis = drawn[0][1].axes[0]
    x, y = axis.lines[1].get_xydata().T
    assert (
        np.allclose(y, metrics.monotone(predicted.ravel(), true.ravel())(x))
        and (np.diff(y) >= 0).all()
    )
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted Dice", "true Dice")
    points = axis.collections[0].get_offsets()
    assert np.allclose(points, np.stack([predicted[:, 0], true[:, 0]], 1))
    r = [np.corrcoef(predicted[at], true[at])[0, 1] for at in (present, np.ones_like(present))]
    title, *said = axis.get_title().split("\n")
    assert title == "run" and [line.split(":")[0] for line in said] == [
        "classes that are present",
        "present or absent (all dots)",
    ]
    assert [line.split(", r ")[1] for line in said] == [f"{value:.3f}" for value in r]


def test_quality_without_a_present_class(drawn):
    """Nothing can be correlated."""
    zero = np.zeros((3, 1))
    figures.quality("q.png", {"run": (zero, zero + 1, zero > 0)}, ["background", "a"])
    assert "present: MAE -, r -\n" in drawn[0][1].axes[0].get_title()


def test_no_two_runs_have_the_same_dots():
    """The demo has seven runs, and six colors."""
    looks = [figures.dots_of(k) for k in range(24)]
    assert len({(tuple(look["color"]), look["marker"]) for look in looks}) == 24


def test_numbers_below_the_estimates_do_not_touch(drawn):
    rng = np.random.default_rng(0)
    names = ("g", "mean confidence", "agreement of student and teacher")
    for low, high in ((0, 1), (-0.1, 0.9), (0.11, 0.19), (0.5, 0.5001)):
        found = [{"Pearson": v, "MAE calibrated": v / 4} for v in rng.uniform(low, high, 3)]
        figures.estimates("e.png", [{"run": "a", "estimate": n} | f for n, f in zip(names, found)])
        figure = drawn[-1][1]
        figure.draw_without_rendering()
        for axis in figure.axes:
            boxes = [
                label.get_window_extent()
                for label in axis.get_xticklabels()
                if axis.get_xlim()[0] <= label.get_position()[0] <= axis.get_xlim()[1]
            ]
            assert 2 <= len(boxes) <= 5
            assert all(a.x1 + 4 < b.x0 for a, b in zip(boxes, boxes[1:]))


# ---------------------------------------------------------------------------------- while it trains


@pytest.fixture
def watched(gray, gray_quality, tmp_path_factory, capfd):
    """A run that g guides from its first step, and what it says. -> the folder"""

    def make(folder):
        always = "--lam-warmup 0 --lam-ramp 0 --weight-threshold 0".split()
        hooks = ["--method", "mean_teacher", "--weight", "quality", "--qp", gray_quality[1]]
        train(gray, folder, *hooks, *always)
        said = capfd.readouterr()
        (folder / "out.txt").write_text(said.out)
        (folder / "err.txt").write_text(said.err)

    return shared(tmp_path_factory, "watched", make)


def read_log(folder):
    return list(csv.DictReader(open(folder / "log.csv")))


def table_of(folder):
    """The first three lines of the table on the screen, its head and two steps."""
    lines = (folder / "out.txt").read_text().split("\n")
    lines = [line for line in lines if not line.startswith("warning: ")]
    head = next(i for i, line in enumerate(lines) if line.strip().startswith("step"))
    return lines[head : head + 3]


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_nothing_is_on_standard_error_where_it_is_no_terminal(watched):
    assert (watched / "err.txt").read_text() == ""


def test_the_table_on_the_screen_has_columns_and_at_most_80_characters(watched):
    table = table_of(watched)
    assert all(len(line) <= 80 for line in table)
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == "step loss sup unsup qar weight ess lam val_dice".split()


def test_the_table_on_the_screen_equals_the_log(watched):
    head, *lines = table_of(watched)
    rows = read_log(watched)
    assert [line.split()[0] for line in lines] == [row["step"] for row in rows][:2]
    expected = [float(rows[0][column]) for column in head.split()]
    assert [float(v) for v in lines[0].split()] == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_tensorboard_shows_losses_weights_and_the_quality_of_val(watched):
    """Also lambda, the effective share and what g says of val."""
    losses, weights = "loss sup unsup qar lam lr", "weight ess share share_y"
    of_val = "val_dice g_true g_predicted g_mae"
    names = f"{losses} {weights} {of_val}".split()
    assert set(names) <= set(events_of(watched).Tags()["scalars"])


def test_tensorboard_equals_the_log(watched):
    events, rows = events_of(watched), read_log(watched)
    for name in ("ess", "g_predicted"):
        found = [event.value for event in events.Scalars(name)]
        assert found == pytest.approx([float(row[name]) for row in rows], rel=1e-4)


def test_tensorboard_shows_sample_images(watched):
    """Image, truth and output of two cases of val."""
    events = events_of(watched)
    assert len(events.Tags()["images"]) == 2
    last = events.Images("val: image, truth, output")[-1].encoded_image_string
    picture = cv2.imdecode(np.frombuffer(last, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (2 * 192, 3 * 192, 3)
    assert picture.std() > 5


def test_weights_are_averaged_over_steps_that_have_some():
    """Lambda sets in after half of the ten steps; of the supervised method nothing is weighed."""
    none, some = (
        [1.0, 1, 0, 0, 0, 0, 0, 0.1],
        [[3.0, 1, 2, 0, 0.5, 0.25, 0.2, 0.1], [3.0, 1, 2, 0, 0.3, 0.75, 0.4, 0.1]],
    )
    table = torch.tensor([none, none, *some])
    args = train_ssl.parse_args(
        [
            "f.h5",
            "--out",
            "runs/x",
            "--method",
            "mean_teacher",
            "--steps",
            "10",
            "--lam-warmup",
            "0.55",
            "--lam-ramp",
            "0.05",
        ]
    )
    assert train_ssl.mean_parts(table, 8, args) == pytest.approx(
        dict(loss=2, sup=1, unsup=1, qar=0, weight=0.4, ess=0.5, share=0.3, share_y=0.1)
    )
    assert set(train_ssl.mean_parts(table, 4, args)) == {"loss", "sup", "unsup", "qar", "share_y"}
    args.method = "supervised"
    assert set(train_ssl.mean_parts(table, 8, args)) == {"loss", "sup", "unsup", "qar", "share_y"}


@pytest.mark.parametrize("kind", ["gray", "volumes"])
def test_what_g_says_of_val_is_what_it_says(kind, request):
    """The columns g_true and g_predicted, once more by hand.

    Of each case the slice, or patch, with the most foreground.
    """
    size = {"gray": 32, "volumes": (16, 16, 32)}[kind]
    info, on = h5.read_info(request.getfixturevalue(kind)), evaluate.compute("cpu", "off")
    g, _ = checkpoints.load_quality(request.getfixturevalue(f"{kind}_quality")[1], info, on, size)
    samples = loading.showcase(info, "val", size)
    assert samples.case == [e.name for e in info.entries("val")]
    for i, name in enumerate(samples.case):
        every = loading.load_samples(info, "val", size, [name])
        assert (samples.label[i] > 0).sum() == max((y > 0).sum() for y in every.label)
    net = lambda x: torch.nn.functional.one_hot((x[:, 0] > 0.5).long() * 2, 4).movedim(-1, 1) * 50.0
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(train_ssl, "fused", lambda net: net)
        cases = inference.Cases(info, "val", size)
        val = train_ssl.Val(cases, np.ones(3, bool), None, samples)
        found = train_ssl.look(SimpleNamespace(nets=[net], g=g, on=on), val)
    mask = (
        torch.nn.functional.one_hot(
            (samples.batch(torch.arange(len(samples)))[0][:, 0] > 0.5).long() * 2, 4
        )
        .movedim(-1, 1)[:, 1:]
        .float()
    )
    with torch.no_grad():
        image, _ = samples.batch(torch.arange(len(samples)))
        says = g(Seen(image, mask))
    assert (
        found["g_predicted"] == pytest.approx(says.mean().item(), abs=1e-5)
        and len(found["pictures"]) == 2
    )
    truth = torch.nn.functional.one_hot(samples.label.long(), 4).movedim(-1, 1)[:, 1:].float()
    dice = [
        [metrics.dice(m.numpy() > 0, t.numpy() > 0) for m, t in zip(*pair)]
        for pair in zip(mask, truth)
    ]
    assert found["g_true"] == pytest.approx(np.mean(dice), abs=0.02)  # smoothed by a ten thousandth


def test_the_table_repeats_its_header_and_survives_a_bar(tmp_path, capsys):
    log = Log(str(tmp_path), ["step", "a_long_name", "b"], shown=["step", "a_long_name"])
    for step in range(1, 28):
        log.write(step, a_long_name=step / 3, b=0.0)
    lines = capsys.readouterr().out.strip("\n").split("\n")
    assert [i for i, line in enumerate(lines) if "a_long_name" in line] == [0, 26] and {
        len(line) for line in lines
    } == {8 + 13}


def test_bars_on_a_terminal(gray, tmp_path, capsys, monkeypatch):
    """Steps a second and the time that is left; of evaluate.py cases."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(gray, tmp_path)
    bar = capsys.readouterr().err
    assert re.search(r"supervised: +\d+%.*\d+/\d+ \[\d+:\d+<", bar) and "steps/s" in bar
    evaluate.main(
        [gray, str(tmp_path / "best.pt"), "--out", str(tmp_path / "t"), "--pictures", "0"]
    )
    assert " cases/s" in capsys.readouterr().err


def test_a_figure_replaces_figures_alone(tmp_path):
    own, mine = str(tmp_path / "own.png"), str(tmp_path / "mine.png")
    figures.comparison(own, {"a": np.ones(3)})
    assert options.picture(own) == own and options.picture(mine) == mine
    cv2.imwrite(mine, np.zeros((8, 8), np.uint8))
    with pytest.raises(argparse.ArgumentTypeError, match="mine.png: is there already, and no fig"):
        options.picture(mine)


@pytest.mark.parametrize(
    "script, groups",
    [
        (corrupt, ["harvest", "running"]),
        (train_qp, ["network", "training", "running"]),
        (
            train_ssl,
            [
                "what is labeled",
                "method",
                "quality guidance",
                "network and training",
                "volumes",
                "running",
            ],
        ),
        (evaluate, ["what to do", "quality of the outputs", "pictures", "running", "volumes"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_help_is_grouped_and_shows_defaults(script, groups, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    places = [text.index(f"\n{group}") for group in groups]
    assert places == sorted(places) and text.count("(default: ") > 3
    assert not re.search(r"\(default: [^)]*\)\s*\(default", text)  # not twice
    assert text.rindex("--device") > text.index("\nrunning:")
    assert script is evaluate or re.search(
        r"--seed SEED.*\(default: 0\)", " ".join(text.split())
    )  # also a default of 0
    if script is train_ssl:
        assert (
            text.index("\nnetwork and training")
            < text.rindex("--keep")
            < text.index("\nvolumes:")
            < text.rindex("--stride")
            < text.index("\nrunning:")
        )
        assert "(default: 0.667)" in text and "[]" not in text


def test_scripts_are_silent_but_for_their_words_when_piped(tmp_path):
    done = python(
        "-m",
        "data.phantom",
        "--out",
        tmp_path / "p.h5",
        "--train",
        2,
        "--val",
        1,
        "--test",
        1,
        "--depth",
        4,
        "--size",
        32,
    )
    assert done.stderr == "" and "next: python corrupt.py" in done.stdout


def test_names_may_hold_dollars(tmp_path):
    """matplotlib would take what stands between two of them for mathematics."""
    label = np.zeros((24, 24), np.uint8)
    label[6:14, 6:14] = 1
    image = (label * 100 + np.arange(24)).astype(np.uint8)
    splits = enumerate(("train", "val"))
    cases = [h5.Case(split, f"US${i}_$x", image, label, f"p{i}") for i, split in splits]
    about = dict(name="x", classes=["background", "a$_$b"], dims=2, channels=1)
    h5.write(str(tmp_path / "d.h5"), cases, **about)
    h5.main([str(tmp_path / "d.h5"), "--preview", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 1000
