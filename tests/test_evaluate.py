"""evaluate.py: metrics against medpy, the rules for empty masks, cases, tables and pictures."""

import csv
import dataclasses
import json
import re
import shutil
import types

import cv2
import h5py
import nibabel
import numpy as np
import pytest
import torch
from conftest import FakeG, make_pictures, python, shared
from medpy.metric import binary
from PIL import Image
from scipy import stats

import evaluate
import models
import train_ssl
from data import figures, h5, images, loading, metrics, nifti, phantom, supervision, tables
from models import checkpoints, inference
from models.checkpoints import save_checkpoint
from models.device import compute
from models.quality import Seen


def blobs(rng, shape):
    """Two overlapping random masks, neither empty."""
    out = []
    for _ in range(2):
        center = [rng.uniform(0.3, 0.7) * s for s in shape]
        grid = np.ogrid[tuple(slice(s) for s in shape)]
        distance = sum(
            ((g - c) / (rng.uniform(0.1, 0.4) * s)) ** 2 for g, c, s in zip(grid, center, shape)
        )
        mask = (distance < 1) ^ (rng.random(shape) < rng.choice([0, 0.02]))
        mask[tuple(int(c) for c in center)] = True
        out.append(mask)
    return out


@pytest.mark.parametrize("dims", [2, 3])
def test_scores_equal_medpy_on_200_random_pairs(dims):
    rng = np.random.default_rng(dims)
    for _ in range(200):
        shape = tuple(rng.integers(5, 40 if dims == 2 else 18, dims))
        spacing = tuple(rng.uniform(0.3, 8, dims))
        a, b = blobs(rng, shape)
        ours = metrics.score(a, b, spacing)
        assert ours.hd95 == pytest.approx(binary.hd95(a, b, voxelspacing=spacing), abs=1e-9)
        assert ours.asd == pytest.approx(binary.asd(a, b, voxelspacing=spacing), abs=1e-9)
        assert ours.dice == pytest.approx(
            binary.dc(a, b), abs=1e-12
        ) and ours.jaccard == pytest.approx(binary.jc(a, b), abs=1e-12)
        assert not ours.one_empty


def test_masks_that_touch_the_border_equal_medpy():
    a, b = np.zeros((2, 9, 7), bool)
    a[:5, :], b[3:, :6] = True, True
    assert metrics.score(a, b, (2.0, 1.0)).hd95 == pytest.approx(
        binary.hd95(a, b, voxelspacing=(2.0, 1.0)), abs=1e-12
    )


def test_empty_masks():
    none, some = np.zeros((3, 4), bool), np.eye(3, 4, dtype=bool)
    assert metrics.score(none, none, (1, 1)) == metrics.Score(1.0, 1.0, 0.0, 0.0, False)
    for a, b in ((none, some), (some, none)):
        assert metrics.score(a, b, (2.0, 3.0)) == metrics.Score(
            0.0, 0.0, (6**2 + 12**2) ** 0.5, (6**2 + 12**2) ** 0.5, True
        )


def test_agreement_equals_scipy_and_survives_constants():
    rng = np.random.default_rng(0)
    p, t = rng.random(50), rng.random(50)
    found = metrics.agreement(p, t)
    assert found["pearson"] == pytest.approx(stats.pearsonr(p, t)[0]) and found[
        "spearman"
    ] == pytest.approx(stats.spearmanr(p, t)[0])
    assert found["mae"] == pytest.approx(abs(p - t).mean()) and found["rmse"] == pytest.approx(
        ((p - t) ** 2).mean() ** 0.5
    )
    assert (
        metrics.agreement(np.ones(4), t[:4])["pearson"] is None
        and metrics.agreement([], [])["mae"] is None
    )


def test_largest_component():
    label = np.zeros((1, 8, 8), np.uint8)
    label[0, :3, :3], label[0, 6, 6], label[0, 5:, 0], label[0, 4, 7] = 1, 1, 2, 2
    out = metrics.largest_component(label, 3)
    assert (out == 1).sum() == 9 and (out == 2).sum() == 3
    for spacing in ((2.0, 1.0), (5.0, 2.0, 1.0)):  # a picture, and a volume of one slice
        kept, all_of_it = (
            metrics.score_case(label, out, spacing, 3, largest=largest) for largest in (True, False)
        )
        assert [s.dice for s in kept] == [1, 1] and [round(s.dice, 3) for s in all_of_it] == [
            round(18 / 19, 3),
            round(6 / 7, 3),
        ]
    assert metrics.score_case(label * 0, out, (2.0, 1.0), 2)[0].hd95 == (16**2 + 8**2) ** 0.5


def test_scores_of_regions_in_closed_form():
    """Bars of 4 x 4 pixels, one below the other. In the output, classes 1 and 2 are exchanged."""
    truth, label = np.zeros((2, 1, 16, 4), np.uint8)
    for k, other in ((1, 2), (2, 1), (3, 0)):
        truth[:, 4 * k - 4 : 4 * k], label[:, 4 * k - 4 : 4 * k] = k, other
    regions = [[1, 2], [1, 2, 3], [2, 3], [3], [2, 2]]
    for spacing, depth in (((2.0, 1.0), 1), ((1.0, 2.0, 1.0), 3)):
        a, b = label.repeat(depth, 0), truth.repeat(depth, 0)
        classes, found = (metrics.score_case(a, b, spacing, 4, regions=r) for r in ([], regions))
        assert found[:3] == classes and len(found) == 8
        swapped, whole, apart, absent, again = found[3:]
        assert swapped == metrics.Score(1.0, 1.0, 0.0, 0.0, False)
        assert (whole.dice, whole.jaccard) == (
            pytest.approx(2 * 8 / (8 + 12)),
            pytest.approx(8 / 12),
        )
        assert (apart.dice, apart.asd > 2, apart.one_empty) == (0, True, False)
        assert absent == classes[2] and absent.one_empty and again == classes[1]
    label[:, 5, 0] = 3  # a lone pixel, right, beside the largest component, wrong
    label[:, 12:] = 3
    kept = metrics.score_case(label, truth, (1.0, 1.0), 4, True, [[2, 3]])[3]
    assert kept.dice == 0


class Bands(torch.nn.Module):
    """Tells 4 classes by the brightness of a pixel; with members, whether it is one of these."""

    def __init__(self, shift, members=None):
        super().__init__()
        self.shift, self.members = shift, members

    def forward(self, x):
        label = torch.bucketize(x[:, 0] + self.shift, torch.tensor([0.0, 0.5, 1.0]))
        if self.members:
            label = torch.isin(label, torch.tensor(self.members)).long()
        return 50 * torch.nn.functional.one_hot(label, 2 if self.members else 4).movedim(-1, 1)


def united(data, path, members):
    """A copy of a dataset, of which some classes are the only one. -> its Info"""
    shutil.copy(data, path)
    with h5py.File(path, "a") as f:
        f.attrs["classes"] = ["background", "region"]
        for case in (case for split in f.values() for case in split.values()):
            case["label"][...] = np.isin(case["label"][:], members)
            case.attrs["checksum"] = h5.checksum_of(case["image"][:], case["label"][:])
    return h5.read_info(str(path))


@pytest.mark.parametrize("kind, size", [("gray", 48), ("volumes", (16, 16, 16))])
def test_a_region_scores_as_a_dataset_of_this_class_alone(
    kind, size, request, tmp_path, monkeypatch
):
    """Slices and volumes, two seeds and a second row, with a baseline."""
    data, nets = request.getfixturevalue(kind), {}
    load_run = checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda p, *a: (nets[p], load_run(p, *a)[1]))

    def table(info, name, members, *options):
        runs = []
        for seed, method in ((0, "supervised"), (1, "supervised"), (0, "ict")):
            folder = tmp_path / name / f"{method}{seed}"
            runs.append(make_run(folder, info, size=size, seed=seed, method=method))
            nets[runs[-1]] = Bands(0.2 * len(runs), members)
        out = tmp_path / name / "out"
        argv = [info.path, *runs, "--out", str(out), "--pictures", "0", "--baseline", "supervised"]
        evaluate.main([*argv, *options])
        cases = list(csv.DictReader(open(out / "cases.csv")))
        return json.loads((out / "summary.json").read_text())["rows"], cases

    regions = {"whole": [1, 2, 3], "blood": [1, 3], "wall": [2]}
    text = "whole=1,2,3;blood=right ventricle,left ventricle;wall=2"
    rows, cases = table(h5.read_info(data), "all", None, "--regions", text)
    changes = []
    for name, members in regions.items():
        info = united(data, tmp_path / f"{name}.h5", members)
        alone, expected = table(info, name, members)
        same = (
            "run",
            "seed",
            "case",
            "patient",
            "unit",
            *vars(metrics.score(*np.ones((2, 1, 1), bool), (1, 1))),
        )
        mine = [[c[key] for key in same] for c in cases if c["class"] == name]
        assert mine == [[c[key] for key in same] for c in expected]
        assert [r[f"Dice % {name}"] for r in rows] == [r["Dice %"] for r in alone]
        changes.append(alone[1]["Δ Dice"])
    assert rows[1]["Δ Dice"] not in changes and len({c["dice"] for c in cases}) > 10
    for row in rows:
        each = [row[f"Dice % {c}"] for c in phantom.CLASSES[1:]]
        assert row["Dice %"] == pytest.approx(np.mean(each, 0))
        assert row["Dice % wall"] == row["Dice % myocardium"]


class Copycat(torch.nn.Module):
    """Answers with the labels of the slices, in order: the perfect network."""

    def __init__(self, label, K):
        super().__init__()
        self.label, self.K, self.at = label, K, 0

    def forward(self, x):
        y = self.label[self.at : self.at + len(x)]
        self.at += len(x)
        return 20 * torch.nn.functional.one_hot(y.long(), self.K).movedim(-1, 1).float()


@pytest.mark.parametrize("kind", ["gray", "rgb"])
@pytest.mark.parametrize("batch", [3, 32])
def test_a_perfect_network_scores_one_on_the_original_grid(kind, batch, request):
    info = h5.read_info(request.getfixturevalue(kind))
    net = Copycat(loading.load_slices(info, "val", 48).label, len(info.classes))
    table = inference.dice_table(
        net, inference.Cases(info, "val", 48), compute("cpu", "off"), len(info.classes), batch=batch
    )
    mean, per_class = inference.mean_dice(table, supervision.held_classes(info, "val"))
    assert (
        len(table) == len(info.entries("val"))
        and mean == pytest.approx(np.mean(table))
        and per_class == pytest.approx(np.mean(table, 0))
    )
    assert len(per_class) == len(info.classes) - 1
    assert (
        mean == 1.0 if kind == "gray" else mean > 0.93
    )  # the pictures' grid is another: resampled there and back


@pytest.fixture
def reads(monkeypatch):
    """Names of the cases that are read from a file, in order."""
    names, read = [], h5.read_case
    monkeypatch.setattr(
        h5,
        "read_case",
        lambda f, info, split, name, label=True: (
            names.append(name) or read(f, info, split, name, label)
        ),
    )
    return names


class Passes(torch.nn.Module):
    """A network that notes how many samples each of its passes has, also of a copy."""

    counts = []

    def __init__(self, channels, K):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, K, 5, padding=2)
        self.counts.clear()

    def forward(self, x):
        self.counts.append(len(x))
        return self.conv(x)


@pytest.mark.parametrize(
    "kind, batch, passes",
    [
        ("gray", 3, [3, 3, 2]),
        ("gray", 4, [4, 4]),
        ("gray", 32, [8]),
        ("rgb", 1, [1, 1, 1]),
        ("rgb", 2, [2, 1]),
    ],
)
def test_cases_in_full_batches_equal_a_plain_loop(kind, batch, passes, request):
    """Two volumes of 4 slices, and three pictures."""
    info, on = h5.read_info(request.getfixturevalue(kind)), compute("cpu", "off")
    net = Passes(info.channels, len(info.classes)).train()
    found = list(inference.predict_cases(net, inference.Cases(info, "val", 40), on, batch=batch))
    assert (
        net.counts == passes
        and net.training
        and [e.name for e, _, _ in found] == [e.name for e in info.entries("val")]
    )
    for entry, label, truth in found:
        slices = loading.load_slices(info, "val", 40, [entry.name])
        with torch.no_grad():
            p = torch.stack(
                [net(slices.batch(slice(z, z + 1))[0])[0].softmax(0) for z in range(len(slices))]
            )
        want = (
            torch.nn.functional.interpolate(
                p, size=entry.grid[-2:], mode="bilinear", align_corners=False
            )
            .argmax(1)
            .numpy()
        )
        assert (
            label.dtype == truth.dtype == np.uint8
            and label.shape == want.shape
            and (label == want).mean() > 0.999
        )
        with h5.open_file(info.path) as f:
            assert (truth == h5.read_case(f, info, "val", entry.name)[1]).all()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "kind, cut",
    [("gray", None), ("rgb", None), ("volumes", inference.Window((16, 16, 32), (16, 16, 32)))],
)
def test_cases_are_read_one_at_a_time(kind, cut, keep, request, reads):
    """The next one only when it is asked for; in a second pass again, unless they are kept.

    Whoever stops early loses nothing.
    """
    info, on = h5.read_info(request.getfixturevalue(kind)), compute("cpu", "off")
    names, size = [e.name for e in info.entries("val")], cut.size if cut else 32
    net = models.build(
        "unet", channels=info.channels, classes=len(info.classes), dims=info.dims, width=2
    ).eval()
    reads.clear()
    cases, first = inference.Cases(info, "val", size, keep=keep), []
    assert len(cases) == len(names) and reads == []
    for i, (entry, label, _) in enumerate(
        inference.predict_cases(net, cases, on, cut, batch=4 if kind == "gray" else 1)
    ):
        assert reads == names[: i + 1] and entry.name == names[i]
        first.append(label)
    again = [label for _, label, _ in inference.predict_cases(net, cases, on, cut, batch=2)]
    assert reads == names * (1 if keep else 2) and len(cases.kept) == (len(names) if keep else 0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    half = inference.Cases(info, "val", size, names[1:], keep)
    next(iter(half))
    assert [entry.name for entry, _, _ in half] == names[1:]


def test_no_case_has_an_empty_table(gray):
    cases = inference.Cases(h5.read_info(gray), "val", 32, [])
    assert (
        len(cases) == 0
        and inference.dice_table(torch.nn.Conv2d(1, 4, 1), cases, compute("cpu", "off"), 4) == []
    )


def make_run(folder, info, **args):
    """A checkpoint of train_ssl.py with an untrained network."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.get("seed", 0))
    shape = dict(channels=info.channels, classes=len(info.classes), dims=info.dims)
    net = models.build("unet", **shape, width=4)
    full = train_ssl.parse_args([info.path, "--out", str(folder), "--size", "32"])
    train_ssl.set_defaults(full, info)
    full = vars(full) | args
    save_checkpoint(
        str(folder / "best.pt"),
        "ssl",
        model=net.config,
        nets=[net.state_dict()],
        teacher=net.state_dict(),
        args=full,
        step=1,
        data=info.describe(),
        labeled=supervision.choose_labeled(info, full["labeled"])[0],
    )
    return str(folder / "best.pt")


@pytest.fixture(params=["gray", "rgb"])
def table(request, tmp_path_factory, capsys):
    """What evaluate.py writes, with g, of two seeds of supervised and one of mean_teacher."""
    kind = request.param
    data, (_, qp) = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_quality")
    info = h5.read_info(data)

    def make(folder):
        runs = [make_run(folder / f"a{s}", info, seed=s) for s in (0, 1)]
        runs.append(make_run(folder / "b", info, seed=2, method="mean_teacher"))
        options = ["--qp", qp, "--pictures", "2", "--baseline", "supervised"]
        evaluate.main([data, *runs, "--out", str(folder / "out"), *options])
        (folder / "said.txt").write_text(capsys.readouterr().out)

    folder = shared(tmp_path_factory, f"table_{kind}", make)
    out = folder / "out"
    return types.SimpleNamespace(
        out=out,
        said=(folder / "said.txt").read_text(),
        text=(out / "summary.md").read_text(),
        rows=json.loads((out / "summary.json").read_text())["rows"],
        cases=list(csv.DictReader(open(out / "cases.csv"))),
        quality=list(csv.DictReader(open(out / "quality.csv"))),
        tables=(out / "quality.md").read_text(),
        is_gray=kind == "gray",
        entries=info.entries("val"),
        foreground=len(info.classes) - 1,
    )


def those(rows, **columns):
    """The rows of a .csv file that have these values in these columns."""
    return [row for row in rows if columns.items() <= row.items()]


def mean_dice(cases, **columns):
    """Mean Dice, in %, of those rows of cases.csv."""
    return 100 * np.mean([float(row["dice"]) for row in those(cases, **columns)])


def test_a_row_holds_the_seeds_of_a_method(table):
    seeds = [(row["run"], len(row["Dice %"])) for row in table.rows]
    assert seeds == [("supervised", 2), ("mean_teacher", 1)]


def test_the_table_is_on_the_screen_and_in_a_file(table):
    assert "| supervised |" in table.said
    assert "| supervised |" in table.text


def test_each_run_case_and_class_is_a_row_of_cases_csv(table):
    assert len(table.cases) == 3 * len(table.entries) * table.foreground
    assert {row["unit"] for row in table.cases} == {"mm" if table.is_gray else "px"}


def test_dice_of_the_table_is_the_mean_of_each_seed(table):
    means = [mean_dice(table.cases, run="supervised", seed=s) for s in "01"]
    assert table.rows[0]["Dice %"] == pytest.approx(means)
    assert f"| {np.mean(means):.2f} ± {np.std(means, ddof=1):.2f} |" in table.text


def test_the_baseline_is_compared_with_nothing(table):
    assert [table.rows[0][k] for k in ("Δ Dice", "95% interval", "p")] == [None] * 3
    assert "| - | - | - |" in table.text
    assert "Δ Dice: points above supervised of the same labeled" in table.text


def test_a_baseline_of_other_labels_is_noted(gray, tmp_path, capsys):
    info = h5.read_info(gray)
    runs = [make_run(tmp_path / n, info, labeled=n) for n in ("2", "3")]
    more = ["--out", str(tmp_path / "o"), "--pictures", "0", "--baseline", runs[0]]
    for chosen, noted in (
        (runs, True),
        ([*runs, make_run(tmp_path / "m", info, labeled="2", method="ict")], False),
    ):
        evaluate.main([gray, *chosen, *more])
        assert ("no other row has the same --labeled" in capsys.readouterr().out) == noted


def test_the_difference_from_the_baseline_is_of_each_case(table):
    """Each case is a patient here."""
    assert len({e.patient for e in table.entries}) == len(table.entries)
    mine, theirs = (
        [mean_dice(table.cases, run=run, case=e.name) for e in table.entries]
        for run in ("mean_teacher", "supervised")
    )
    difference = np.subtract(mine, theirs)
    mean, low, high = difference.mean(), difference.min(), difference.max()
    row = table.rows[1]
    assert row["Δ Dice"] == pytest.approx(mean)
    assert row["95% interval"] == pytest.approx([low, high])
    assert row["p"] == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert f"| {mean:.3f} | {low:.3f} to {high:.3f} | {row['p']:.3f} |" in table.text


def test_quality_csv_has_a_row_for_each_sample_and_class(table):
    """A case is a volume of four slices, or a picture."""
    samples = len(table.entries) * (4 if table.is_gray else 1)
    assert len(table.quality) == 3 * samples * table.foreground


ESTIMATES = (
    "g",
    "g and f together",
    "mean confidence",
    "mean certainty (entropy)",
    "region confidence",
    "f's own expected Dice",
    "agreement with an augmented pass",
    "agreement of student and teacher",
)


def test_every_estimate_is_in_both_files_of_quality(table):
    for estimate in ESTIMATES:
        assert f"| mean of all | {estimate} |" in table.tables
        assert estimate in table.quality[0]


def test_quality_md_has_a_table_of_volumes_where_there_are_any_and_the_cost(table):
    assert ("Of each volume and class" in table.tables) == table.is_gray
    assert "GFLOPs" in table.tables


def test_correlation_of_g_is_of_the_pooled_runs(table):
    pooled = those(table.quality, present="True")
    g, true = ([float(row[k]) for row in pooled] for k in ("g", "true"))
    levels = json.loads((table.out / "quality.json").read_text())["levels"]
    row = those(levels["present"], run="pooled", estimate="g")[0]
    assert row["n"] == len(pooled)
    assert row["Pearson"] == pytest.approx(stats.pearsonr(g, true)[0], abs=1e-4)


def test_error_of_g_is_the_mean_of_both_seeds(table):
    seeds = [those(table.quality, run="supervised", seed=s, present="True") for s in "01"]
    errors = [np.mean([abs(float(r["g"]) - float(r["true"])) for r in rows]) for rows in seeds]
    assert f"| supervised, labeled all | g | {len(seeds[0])} |" in table.tables
    assert f"| {sum(errors) / 2:.3f} |" in table.tables


def test_pictures_of_a_table_are_not_blank(table):
    pictures = list((table.out / "cases").iterdir())
    assert len(pictures) == 2
    plots = [table.out / f"{name}.png" for name in ("compare", "quality", "estimates")]
    for path in pictures + plots:
        assert cv2.imread(str(path)).std() > 5, path


def mixed_labels(data, path, qp, trust):
    """What f and g say of each val case together, by hand. -> {case: [H, W]}"""
    on, info = compute("cpu", "off"), h5.read_info(data)
    f, _ = checkpoints.load_run(path, "student", on)
    g, _ = checkpoints.load_quality(qp, info, on)
    labels = {}
    for case in inference.Cases(info, "val", 32):
        x, _ = case.image.batch(slice(0, 1), on.device)
        with torch.no_grad():
            p = f(x).softmax(1)
            mask = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).movedim(-1, 1)[:, 1:]
            p = (1 - trust) * p + trust * g.belief(Seen(x, mask.float()))
        p = torch.nn.functional.interpolate(p, case.entry.grid[-2:], mode="bilinear")
        labels[case.entry.name] = p.argmax(1)[0].numpy()
    return labels


def test_outputs_that_g_corrects_are_scored_and_written(rgb, rgb_quality, tmp_path, capsys):
    info, qp = h5.read_info(rgb), rgb_quality[1]
    path = make_run(tmp_path / "run", info)
    truth = {case.entry.name: case.truth[0] for case in inference.Cases(info, "val", 32)}
    words = [rgb, path, "--qp", qp, "--split", "val", "--amp", "off"]
    labels = {}
    for trust in (0, 0.5, 1):
        out = tmp_path / str(trust)
        evaluate.main([*words, "--out", str(out), "--trust", str(trust), "--pictures", "0"])
        found = {c["case"]: float(c["dice"]) for c in csv.DictReader(open(out / "cases.csv"))}
        labels[trust] = mixed_labels(rgb, path, qp, trust)
        for case, label in labels[trust].items():
            assert found[case] == pytest.approx(metrics.dice(label == 1, truth[case] == 1))
        said = f"outputs corrected by g (--trust {trust})"
        assert (said in (out / "summary.md").read_text()) == (trust > 0)
        evaluate.main([*words, "--out", str(out), "--trust", str(trust), "--predict"])
        for case, label in labels[trust].items():
            assert (np.array(Image.open(out / "masks" / f"{case}.png")) == label).all()
    assert "--trust 1 --out runs/new" in capsys.readouterr().out
    assert any((labels[0][case] != labels[1][case]).any() for case in truth)


def test_who_corrects_is_asked(rgb, rgb_scalar, tmp_path, refused):
    path = make_run(tmp_path / "run", h5.read_info(rgb))
    words = [rgb, path, "--out", str(tmp_path / "out"), "--trust", "0.5"]
    refused(evaluate.main, words, "--trust 0.5: needs the g")
    whole = [*words, "--qp", rgb_scalar, "--window", "whole"]
    refused(evaluate.main, whole, "leave out --window whole")
    for more in ([], ["--predict"]):
        refused(evaluate.main, [*words, "--qp", rgb_scalar, *more], "--trust needs", "--head dense")


class Says(torch.nn.Module):
    """A network whose probability of the foreground is a function of the image [B, 1, H, W]."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        p = self.f(x).clamp(1e-6, 1 - 1e-6)
        return torch.cat([1 - p, p], 1).log()


def test_each_estimate_asks_whom_it_names():
    """On two images whose left half is the object.

    Networks that say left, right, all, each estimate by hand.
    """
    half = torch.zeros(2, 8, 8, dtype=torch.uint8)
    half[:, :, :4] = 1
    slices = loading.Samples(
        torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.ones(2), half, ["a", "b"], [(0,), (0,)]
    )
    at = lambda columns, p=1.0: (
        lambda x: torch.zeros_like(x).index_fill_(3, torch.tensor(columns), p)
    )
    left, right, everything = at([0, 1, 2, 3]), at([4, 5, 6, 7]), at(list(range(8)), 0.75)
    on, net = compute("cpu", "off"), Says(left)
    g = FakeG(lambda seen: torch.full((len(seen), 1), 0.25))
    found = evaluate.compare_estimates(
        g, evaluate.Opinions(net, Says(right), Says(everything)), slices, on, 1
    )
    asked = [seen.mask for seen in g.asked]
    assert [v.shape for v in asked] == [(1, 1, 8, 8)] * 2
    assert torch.equal(torch.cat(asked)[:, 0], half.float())
    assert (
        found.present.all()
        and (found.shared == 32).all()
        and (found.area == 32).all()
        and (found.total == 64).all()
    )
    says = {name: v.ravel().tolist() for name, v in found.estimates.items()}
    assert says["g"] == [0.25, 0.25] and says["mean confidence"] == pytest.approx([1, 1], abs=1e-5)
    assert says["f's own expected Dice"] == pytest.approx([1, 1], abs=1e-4) and says[
        "agreement of student and teacher"
    ] == pytest.approx([0, 0], abs=1e-3)
    both = says["g and f together"]  # f is certain
    assert both == pytest.approx([(0.25 + 1) / 2] * 2, abs=1e-4)
    assert says["agreement with an augmented pass"] == pytest.approx(
        [0, 0], abs=1e-3
    )  # it says left of the mirrored image, too
    assert says["expected Dice under a second network"] == pytest.approx(
        [2 * 24 / (32 + 48)] * 2, abs=1e-3
    )
    assert (
        "expected Dice under a second network"
        not in evaluate.compare_estimates(g, evaluate.Opinions(net, net), slices, on, 2).estimates
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes most of a small table's time."""
    for name in ("quality", "estimates", "triage"):
        monkeypatch.setattr(figures, name, lambda *_: None)


HELD_OUT = ["--split", "held_out", "--pictures", "0", "--regions", "whole=1,2,3"]


@pytest.fixture
def held_out(gray, gray_quality, tmp_path_factory, undrawn):
    """A run of 2 labeled cases, which g, of 4, and a second network, of 5, have judged.

    The cases are those of train whose labels nobody has used. -> the folder
    """

    def make(folder):
        info = h5.read_info(gray)
        run = make_run(folder / "run", info, labeled="2")
        second = make_run(folder / "second", info, labeled="5", seed=1)
        argv = [gray, run, *HELD_OUT, "--qp", gray_quality[1], "--second", second]
        evaluate.main([*argv, "--out", str(folder)])

    return shared(tmp_path_factory, "held_out", make)


def cases_of(folder):
    """Names of the cases in cases.csv, in order."""
    return list(dict.fromkeys(row["case"] for row in csv.DictReader(open(folder / "cases.csv"))))


def test_held_out_cases_are_those_from_which_nobody_has_learned(
    gray, gray_quality, held_out, tmp_path
):
    names = [e.name for e in h5.read_info(gray).entries("train")]
    argv = [gray, str(held_out / "run" / "best.pt"), *HELD_OUT, "--out", str(tmp_path)]
    evaluate.main(argv)
    assert cases_of(tmp_path) == names[2:]
    evaluate.main([*argv, "--qp", gray_quality[1]])
    assert cases_of(tmp_path) == names[4:]
    assert cases_of(held_out) == names[5:]


def test_quality_of_held_out_cases_is_of_classes_and_not_of_regions(gray, held_out):
    info = h5.read_info(gray)
    found = list(csv.DictReader(open(held_out / "quality.csv")))
    assert {row["case"] for row in found} == {e.name for e in info.entries("train")[5:]}
    assert {row["class"] for row in found} == set(info.classes[1:])
    assert "expected Dice under a second network" in found[0]


def test_the_calibrated_error_is_of_a_map_that_is_fitted_on_val(gray, gray_quality, held_out):
    """The error once more, by its parts."""
    info, on = h5.read_info(gray), compute()
    net, _ = checkpoints.load_run(str(held_out / "run" / "best.pt"), "student", on)
    g, _ = checkpoints.load_quality(gray_quality[1], info, on)
    val = loading.load_slices(info, "val", 32)
    on_val = evaluate.compare_estimates(g, evaluate.Opinions(net, net), val, on, 32)
    map_ = metrics.monotone(
        metrics.at_level(on_val, "present", val.case, "g")[0],
        metrics.at_level(on_val, "present", val.case)[0],
    )
    present = those(csv.DictReader(open(held_out / "quality.csv")), present="True")
    errors = [abs(map_(float(row["g"])) - float(row["true"])) for row in present]

    table = json.loads((held_out / "quality.json").read_text())
    assert "fitted on val" in table["title"]
    assert "other patients" not in table["title"]
    row = those(table["levels"]["present"], estimate="g")[0]
    assert row["MAE calibrated"] == pytest.approx(np.mean(errors), abs=1e-4)


TRAINED = {
    "RUN": dict(labeled="2"),
    "SECOND": dict(labeled="5", seed=1),
    "LARGER": dict(size=48),
    "ALL": dict(labeled="all"),
}


@pytest.mark.parametrize(
    "argv, words",
    [
        ("ALL --split held_out", ["no train case", "--split val"]),
        ("RUN --second SECOND", ["--qp"]),
        ("RUN --qp G --second RUN", ["among the runs"]),
        ("RUN LARGER --qp G", ["--size", "48", "32"]),
        ("RUN --qp G --second LARGER", ["--size", "48", "32"]),
    ],
)
def test_runs_that_cannot_be_judged_are_refused(argv, words, gray, gray_quality, tmp_path, refused):
    """One that saw all cases, one of another size; a second network without g or of the run."""
    names, info = argv.split(), h5.read_info(gray)
    files = {n: make_run(tmp_path / n, info, **TRAINED[n]) for n in names if n in TRAINED}
    files["G"] = gray_quality[1]
    argv = [gray, *(files.get(n, n) for n in names), "--out", tmp_path / "o"]
    refused(evaluate.main, argv, *words)
    assert not (tmp_path / "o").exists()


def test_held_out_cases_of_a_run_on_another_file_are_unknown(gray, tmp_path, refused):
    state = torch.load(make_run(tmp_path, h5.read_info(gray), labeled="2"), weights_only=True)
    state["data"]["checksum"] = "another"
    torch.save(state, tmp_path / "d.pt")
    argv = [gray, tmp_path / "d.pt", "--split", "held_out", "--out", tmp_path / "o"]
    refused(evaluate.main, argv, "d.pt", "another file")
    assert not (tmp_path / "o").exists()


def test_a_second_network_of_other_classes_is_refused(gray, rgb, gray_quality, tmp_path, refused):
    run, other = (
        make_run(tmp_path / "a", h5.read_info(gray)),
        make_run(tmp_path / "b", h5.read_info(rgb)),
    )
    refused(
        evaluate.main,
        [gray, run, "--out", tmp_path / "o", "--qp", gray_quality[1], "--second", other],
        "classes",
    )


def test_estimates_of_a_single_picture(rgb, rgb_quality, tmp_path, capsys, refused):
    """There is no other patient: nothing to correlate and nothing to calibrate on, but a table.

    Without foreground nothing is scored.
    """
    shutil.copy(rgb, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        names = list(f["val"])
        for name in names[1:]:
            del f[f"val/{name}"]
    argv = [
        str(tmp_path / "f.h5"),
        make_run(tmp_path / "a", h5.read_info(rgb)),
        "--out",
        str(tmp_path / "o"),
        "--qp",
        rgb_quality[1],
        "--pictures",
        "0",
    ]
    evaluate.main(argv)
    assert (
        "each slice and class that is present" in capsys.readouterr().out
        and (tmp_path / "o" / "estimates.png").exists()
    )
    row = json.loads((tmp_path / "o" / "quality.json").read_text())["levels"]["present"][0]
    assert (
        row["n"] == 1 and row["MAE calibrated"] is row["Pearson"] is None and 0 <= row["Dice"] < 1
    )
    with h5py.File(tmp_path / "f.h5", "a") as f:
        f[f"val/{names[0]}/label"][:] = 0
    refused(evaluate.main, argv, "f.h5: /val", "no class but the background")


def test_estimates_without_val(gray, gray_quality, tmp_path, undrawn):
    """A file with test alone: the map is fitted on the other patients of test."""
    phantom.main(
        [
            "--out",
            str(tmp_path / "f.h5"),
            "--train",
            "6",
            "--val",
            "2",
            "--test",
            "3",
            "--depth",
            "4",
            "--size",
            "48",
        ]
    )
    with h5py.File(tmp_path / "f.h5", "a") as f:
        del f["val"], f["train"]
    run = make_run(tmp_path / "a", h5.read_info(gray))
    evaluate.main(
        [
            str(tmp_path / "f.h5"),
            run,
            "--out",
            str(tmp_path / "o"),
            "--qp",
            gray_quality[1],
            "--split",
            "test",
            "--weights",
            "teacher",
            "--pictures",
            "0",
        ]
    )
    found = json.loads((tmp_path / "o" / "quality.json").read_text())
    assert (
        "other patients" in found["title"]
        and found["levels"]["present"][0]["MAE calibrated"] is not None
    )


def test_a_monotone_map_is_the_least_squares_one_and_never_sees_its_own_patient():
    step = metrics.monotone(np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.2, 0.1, 0.4, 0.9]))
    assert np.allclose(
        step(np.array([0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 9.0])), [0.1, 0.1, 0.3, 0.3, 0.3, 0.9, 0.9]
    )
    assert np.allclose(
        metrics.monotone(np.array([1.0, 1, 1, 2]), np.array([1.0, 1, 1, 0]))(np.array([1.0, 2])),
        0.75,
    )
    for y in ([0, 0, 1, 1], [1, 1, 0, 0]):  # ties have one answer, their mean
        assert metrics.monotone(np.ones(4), np.array(y, float))(1.0) == 0.5
    rng = np.random.default_rng(0)
    patient, x = np.repeat(np.arange(12), 5).astype(str), rng.random(60)
    y = (x**2).round(2)
    a = metrics.calibrated(x, y, patient, None)
    assert np.abs(a - y).mean() < 0.05 < np.abs(x - y).mean()
    other = np.where(patient == "3", rng.random(60), y)
    b = metrics.calibrated(x, other, patient, None)
    assert np.array_equal(a[patient == "3"], b[patient == "3"]) and not np.array_equal(a, b)
    assert np.array_equal(
        metrics.calibrated(x, y, patient, (x, x / 2)), metrics.monotone(x, x / 2)(x)
    )
    assert (
        metrics.calibrated(x, y, np.zeros(60), None) is None
        and metrics.calibrated(x, y, patient, (x[:0], y[:0])) is None
    )


def test_levels_by_hand():
    """Two volumes of two slices, two classes.

    The Dice of a volume is that of all its pixels, its estimate is weighted with the area.
    """
    a = lambda *rows: np.array(rows, float)
    outputs = metrics.Outputs(
        present=a((1, 0), (1, 1), (1, 0), (1, 0)) > 0,
        shared=a((0, 0), (10, 0), (3, 0), (2, 0)),
        area=a((0, 0), (20, 4), (10, 0), (5, 0)),
        total=a((8, 0), (40, 14), (30, 0), (10, 0)),
        estimates={"g": a((0.9, 0.8), (0.6, 0.1), (0.3, 0.7), (0.6, 0.9))},
    )
    case = ["v", "v", "w", "w"]
    for level, name, expected in [
        ("present", None, [0, 0.5, 0, 0.2, 0.4]),
        ("absent", None, [1, 1, 1]),
        ("absent", "g", [0.8, 0.7, 0.9]),
        ("image", "g", [0.85, 0.35, 0.5, 0.75]),
        ("image", None, [0.5, 0.25, 0.6, 0.7]),
        ("volume", None, [20 / 48, 0, 10 / 40, 1]),
        ("volume", "g", [0.6, 0.1, (0.3 * 10 + 0.6 * 5) / 15, 0.8]),
    ]:
        found, owner = metrics.at_level(outputs, level, case, name)
        assert np.allclose(found, expected, atol=1e-5) and len(owner) == len(expected)
    assert metrics.at_level(outputs, "absent", case, "g")[1].tolist() == ["v", "w", "w"]


def test_share_of_the_worst_that_is_found():
    true = np.arange(20) / 20
    assert (
        metrics.agreement(true, true)["worst"] == 1 and metrics.agreement(-true, true)["worst"] == 0
    )
    half = true.copy()
    half[[2, 3, 10, 11]] = half[[10, 11, 2, 3]]
    assert metrics.agreement(half, true)["worst"] == 0.5
    tied = np.where(np.arange(20) < 8, 0.0, true)  # 8 of 20 are worst alike: 4 count, each by half
    for order in (np.arange(20), np.arange(20)[::-1]):
        assert metrics.agreement(tied[order], tied[order])["worst"] == pytest.approx(8 * 0.25 / 4)
        assert metrics.agreement(true[order], tied[order])["worst"] == pytest.approx(0.5)


def test_cost_of_a_pass():
    assert evaluate.gigaflops(torch.nn.Conv2d(3, 8, 1), torch.zeros(2, 3, 10, 10)) == pytest.approx(
        2 * 2 * 3 * 8 * 100 / 1e9
    )


def test_metrics_of_a_volume_are_those_of_the_stacked_slices(gray, tmp_path, monkeypatch):
    """One number per volume, in mm: not a mean over slices.

    And a picture shows the slice of most foreground.
    """
    info, out, shown = h5.read_info(gray), tmp_path / "out", {}
    runs = [make_run(tmp_path / str(s), info, seed=s) for s in (0, 1)]
    net, load_run = Passes(1, 4).eval(), checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (net, load_run(*args)[1]))
    monkeypatch.setattr(figures, "cases", lambda path, rows, *_, **__: shown.update({path: rows}))
    monkeypatch.setattr(figures, "comparison", lambda *_: None)
    evaluate.main([gray, *runs, "--out", str(out), "--pictures", "1"])
    found = {
        (c["case"], c["class"]): c
        for c in csv.DictReader(open(out / "cases.csv"))
        if c["checkpoint"] == runs[0]
    }
    cases = list(inference.predict_cases(net, inference.Cases(info, "val", 32), compute()))
    for entry, label, truth in cases:
        for k in range(1, 4):
            a, b = label == k, truth == k
            row = found[entry.name, info.classes[k]]
            if a.any() and b.any():
                assert float(row["hd95"]) == pytest.approx(
                    binary.hd95(a, b, voxelspacing=entry.spacing), abs=1e-9
                )
                assert float(row["asd"]) == pytest.approx(
                    binary.asd(a, b, voxelspacing=entry.spacing), abs=1e-9
                )
                assert float(row["dice"]) == pytest.approx(binary.dc(a, b))
            else:
                assert row["one_empty"] == str(a.any() != b.any())
    mean = {
        e.name: np.mean([float(found[e.name, c]["dice"]) for c in info.classes[1:]])
        for e, _, _ in cases
    }
    best, worst = sorted(mean, key=mean.get, reverse=True)
    assert list(shown) == [str(out / "cases" / f"{best}.png"), str(out / "cases.png")]
    assert [
        [panel[0].split(":")[0] for panel in row[:1]] for row in shown[str(out / "cases.png")]
    ] == [["best"], ["worst"]]
    for name, row in zip((best, worst), shown[str(out / "cases.png")]):
        ((entry, label, truth),) = [c for c in cases if c[0].name == name]
        z = (truth > 0).sum((1, 2)).argmax()
        (_, image, none, _), (_, _, drawn, _), (title, _, outline, _) = row
        assert (
            none is None
            and (drawn == truth[z]).all()
            and title.endswith(f"volume Dice {mean[name]:.3f}")
        )
        assert (outline == label[z]).all() and (label != label[:1]).any()


# ---------------------------------------------------------------------------------------- processes


def test_processes_give_the_same_numbers_and_start_without_torch(tmp_path, monkeypatch):
    """evaluate.py as a command on a split that is large enough for processes, and without them."""
    rng = np.random.default_rng(0)

    def cases():
        for i in range(6):
            label = np.zeros((400, 500 + i), np.uint8)
            label[100 : 250 + 20 * i, 150:300], label[300:, :60] = 1, 1
            yield h5.Case(
                split="val",
                name=f"c{i}",
                image=(label * 80 + rng.integers(0, 100, label.shape)).astype(np.uint8),
                label=label,
                patient=f"p{i % 4}",
            )

    info = h5.write(
        str(tmp_path / "f.h5"),
        [
            *cases(),
            h5.Case(
                split="train",
                name="t",
                image=np.zeros((9, 9), np.uint8),
                label=np.zeros((9, 9), np.uint8),
                patient="t",
            ),
        ],
        name="f",
        classes=["background", "a"],
        dims=2,
        channels=1,
    )
    common = [
        info.path,
        make_run(tmp_path / "a", info),
        "--largest-component",
        "--regions",
        "region=1",
        "--pictures",
        "0",
        "--out",
    ]
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = python("evaluate.py", *common, tmp_path / "pool", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"\| +torch$", done.stderr, re.M)) == 1
        and len(re.findall(r"\| +data\.metrics$", done.stderr, re.M)) == 3
    )
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", None)
    evaluate.main([*common, str(tmp_path / "here"), "--workers", "0"])
    a, b = ((tmp_path / n / "cases.csv").read_text() for n in ("pool", "here"))
    rows = list(csv.DictReader(a.splitlines()))
    assert a == b and [r["case"] for r in rows[::2]] == [f"c{i}" for i in range(6)]
    assert [row | {"class": "region"} for row in rows[::2]] == rows[1::2]
    monkeypatch.setattr(evaluate, "SMALL", 10**9)  # and a small set starts none
    evaluate.main([*common, str(tmp_path / "small"), "--workers", "2"])


def test_a_process_that_dies_is_one_clear_error(gray, tmp_path, monkeypatch, refused):
    (tmp_path / "killer.py").write_text("import os\ndef score_case(*_):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import killer

    monkeypatch.setattr(evaluate, "score_case", killer.score_case)
    monkeypatch.setattr(evaluate, "SMALL", 0)
    refused(
        evaluate.main,
        [
            gray,
            make_run(tmp_path / "a", h5.read_info(gray)),
            "--out",
            tmp_path / "o",
            "--workers",
            "1",
        ],
        "has died",
        "--workers",
    )
    assert not (tmp_path / "o").exists()


def test_few_cases_are_under_way():
    under_way, most = [], []

    class Pool:
        """Whose work is done when it is asked for."""

        def submit(self, function, *task):
            under_way.append(task)
            return types.SimpleNamespace(result=lambda: under_way.remove(task) or function(*task))

    calls = evaluate.Calls(pow, Pool(), 3)
    for i in range(20):
        calls.add(i, 2)
        most.append(len(under_way))
    assert max(most) == 3
    assert calls.results() == [i**2 for i in range(20)] and under_way == []
    calls = evaluate.Calls(pow)  # without a pool
    calls.add(2, 3)
    calls.add(3, 2)
    assert calls.results() == [8, 9]


# ------------------------------------------------------------------------------- against a baseline


def test_a_paired_comparison_by_hand():
    """Patients, not cases: a has two cases.

    Differences 2, 1, -4: ranks 2 and 1 against 3; with all of one sign p is 2 / 2^n.
    """
    values, base, patient = (
        np.array([2.0, 4.0, 1.0, 0.0]),
        np.array([1.0, 1.0, 0.0, 4.0]),
        ["a", "a", "b", "c"],
    )
    assert metrics.patient_means(values, patient).tolist() == [3, 1, 0]
    mean, (low, high), p = metrics.paired(values, base, patient)
    assert mean == pytest.approx(-1 / 3) and (low, high) == (-4, 2) and p == 1.0
    assert metrics.paired(np.arange(1.0, 6), np.zeros(5), list("abcde"))[2] == pytest.approx(
        2 / 2**5
    )
    assert metrics.paired([1.0, 2.0], [0.0, 0.0], ["a", "a"]) == (1.5, None, None)
    assert metrics.paired([1.0, 2.0], [1.0, 2.0], ["a", "b"]) == (0.0, (0.0, 0.0), None)


def test_a_paired_comparison_equals_scipy_and_brackets_a_shift():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(60), 3).astype(str)
    base = rng.random(180)
    values = base + 0.5 + rng.normal(0, 1, 180)
    mean, (low, high), p = metrics.paired(values, base, patient)
    difference = (values - base)[np.argsort(patient, kind="stable")].reshape(60, 3).mean(1)
    assert mean == pytest.approx(difference.mean()) and p == pytest.approx(
        stats.wilcoxon(difference).pvalue, rel=1e-9
    )
    assert low < 0.5 < high and high - low == pytest.approx(
        2 * 1.96 * difference.std() / 60**0.5, rel=0.06
    )
    own = np.percentile([rng.choice(difference, 60).mean() for _ in range(4000)], [2.5, 97.5])
    assert (low, high) == pytest.approx(own, abs=0.02) and metrics.paired(values, base, patient)[
        1
    ] == (low, high)  # seeded
    assert metrics.paired(base, values, patient)[2] == pytest.approx(p)


def test_rows_are_compared_with_those_of_the_same_labels():
    dices = lambda *cases: [[metrics.Score(d, 0, 0, 0, False) for d in case] for case in cases]
    scores = [
        dices((0.2, 0.4), (0.5, 0.5)),
        dices((0.4, 0.4), (0.7, 0.7)),
        dices((0.4, 0.6), (0.5, 0.5)),
        dices((1, 1), (1, 1)),
    ]
    groups = [
        evaluate.Group("supervised", "6", [0, 1]),
        evaluate.Group("mean_teacher", "6", [2]),
        evaluate.Group("supervised", "all", [3]),
    ]
    found = evaluate.against({"6": 0}, groups, scores, ["a", "b"])
    assert found[0] == found[2] == {"Δ Dice": None, "95% interval": None, "p": None}
    assert found[1]["Δ Dice"] == pytest.approx(100 * ((0.5 - 0.35) + (0.5 - 0.6)) / 2) and found[1][
        "95% interval"
    ] == pytest.approx((-10, 15))
    paths = ["a/best.pt", "b/best.pt", "c/best.pt", "d/best.pt"]
    assert [
        evaluate.find_baselines(name, groups, paths)
        for name in ("mean_teacher", "b/best.pt", "./d/../d/best.pt", "supervised")
    ] == [{"6": 1}, {"6": 0}, {"all": 2}, {"6": 0, "all": 2}]
    more = [*groups, evaluate.Group("mean_teacher", "all", [0])]  # a name serves all labels
    found = evaluate.against({"6": 0, "all": 2}, more, scores, ["a", "b"])
    assert (
        found[1]["Δ Dice"] == pytest.approx(2.5)
        and found[3]["Δ Dice"] == pytest.approx(-60)
        and found[2]["Δ Dice"] is None
    )


def test_a_baseline_that_is_none_is_refused(gray, tmp_path, refused, monkeypatch):
    """Before any work."""
    monkeypatch.setattr(checkpoints, "load_run", None)
    info, out = h5.read_info(gray), ["--out", tmp_path / "o"]
    runs = [make_run(tmp_path / n, info, method=m) for n, m in (("a", "supervised"), ("b", "ict"))]
    refused(
        evaluate.main,
        [gray, *runs, *out, "--baseline", "fixmatch"],
        "--baseline fixmatch",
        "supervised, ict",
    )
    refused(
        evaluate.main,
        [gray, runs[0], *out, "--baseline", "supervised", "--predict"],
        "--predict",
        "--baseline",
    )
    assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------- rows


def rows_of(states):
    """Name and members of each row."""
    paths = [f"{i}/best.pt" for i in range(len(states))]
    return [(name, members) for name, _, members in evaluate.group_runs(states, paths)]


@pytest.mark.parametrize(
    "runs, rows",
    [  # (seed, path of g, its checksum) of each run
        ([(0, "qp.pt", 1), (1, "/a/qp.pt", 1)], {"": [0, 1]}),
        ([(0, "a.pt", 1), (1, "b.pt", 2), (2, "c.pt", 3)], {"": [0, 1, 2]}),
        ([(0, "a.pt", 1), (0, "b.pt", 2)], {" (qp=a.pt)": [0], " (qp=b.pt)": [1]}),
        ([(0, "a.pt", 1), (0, "a.pt", 2)], {" (qp=a.pt)": [0], " (qp=a.pt, checksum 2)": [1]}),
        (
            [(0, "a.pt", 1), (1, "./a.pt", 1), (0, "b.pt", 2), (1, "b.pt", 2)],
            {" (qp=a.pt)": [0, 1], " (qp=b.pt)": [2, 3]},
        ),
        (
            [(0, "a.pt", 1), (1, "a.pt", 1), (2, "b.pt", 2)],
            {" (qp=a.pt)": [0, 1], " (qp=b.pt)": [2]},
        ),
        ([(0, None, None), (1, None, None)], {"": [0, 1]}),
        ([(0, "a.pt", None), (1, "b.pt", None)], {"": [0, 1]}),  # older, without checksums
    ],
)
def test_a_g_is_known_by_its_file_and_not_by_its_path(runs, rows, gray, tmp_path):
    state = torch.load(make_run(tmp_path, h5.read_info(gray)), weights_only=True)
    states = []
    for seed, path, checksum in runs:
        states.append(dict(state, args=state["args"] | dict(seed=seed, qp=path)))
        if checksum:
            states[-1]["inputs"] = dict(qp=checksum, unlabeled=None)
    assert rows_of(states) == [(f"supervised{extra}", who) for extra, who in rows.items()]


def test_unlabeled_pictures_are_known_by_their_file(gray, tmp_path):
    state = torch.load(make_run(tmp_path, h5.read_info(gray)), weights_only=True)
    states = [
        dict(state, args=state["args"] | dict(seed=i, unlabeled=path), inputs=dict(unlabeled=crc))
        for i, (path, crc) in enumerate((("u.h5", 1), ("/a/u.h5", 1), ("v.h5", 2)))
    ]
    assert rows_of(states) == [
        ("supervised (unlabeled=u.h5)", [0, 1]),
        ("supervised (unlabeled=v.h5)", [2]),
    ]


def test_the_next_command_is_of_the_run_that_is_best_on_val():
    """A run is not chosen by its score on test; last.pt has the best Dice of its run, too."""
    dices = [[[metrics.Score(d, 0, 0, 0, False)]] for d in (0.9, 0.5, 0.6)]
    best = [dict(best=dict(dice=d, step=8), step=s) for d, s in ((0.4, 8), (0.7, 9), (0.7, 8))]
    choose = lambda split, states: evaluate.best_run(
        types.SimpleNamespace(split=split), types.SimpleNamespace(scores=dices, states=states)
    )
    assert choose("test", best) == choose("held_out", best) == 2
    assert choose("val", best) == 0
    assert choose("test", [*best[:2], {}]) == choose("test", [*best[:2], dict(best=3)]) == 0


def test_the_next_command_is_the_one_that_was_scored():
    usual = ["f.h5", "a/best.pt", "--out", "o"]
    more = "--weights teacher --largest-component --stride 4,8,8 --blend uniform".split()
    states = types.SimpleNamespace(states=[dict(best=dict(dice=0.5, step=1), step=1)])
    for given in ([], more, ["--window", "whole"]):
        args = evaluate.parse_args([*usual, "--split", "test", *given])
        words = evaluate.next_command(args, states).split("    ")[0].split()
        again = vars(evaluate.parse_args(words[2:])) | dict(data="f.h5", predict=False, out="o")
        assert again | dict(split="test") == vars(args)


def test_a_name_with_a_bar_keeps_the_columns_of_a_table():
    lines = tables.markdown([{"a|b": "c|d", "e": [1]}]).split("\n")
    assert lines == [r"| a\|b | e |", "|---|---|", r"| c\|d | 1 |"]


def test_counts_are_whole_numbers():
    assert [tables.show(v) for v in ([11], [11, 12], [0.5], [1.0, 2.0])] == [
        "11",
        "11.5 ± 0.7",
        "0.50",
        "1.50 ± 0.71",
    ]


def test_the_title_names_what_each_run_saw(volumes, tmp_path):
    """Windows of both sizes; with --qp the cost of both networks."""
    info, out = h5.read_info(volumes), tmp_path / "o"
    sizes = ((16, 16, 16), (16, 16, 32))
    runs = [make_run(tmp_path / str(i), info, size=size) for i, size in enumerate(sizes)]
    evaluate.main([volumes, *runs, "--out", str(out), "--pictures", "0"])
    text = (out / "summary.md").read_text()
    for words in (
        "16 x 16 x 16, stride 8 x 8 x 8 or",
        "16 x 16 x 32",
        "val chose these checkpoints",
    ):
        assert words in text
    table = [line.split(" | ") for line in text.split("\n") if line.startswith("|")]
    assert table[2][table[0].index("one empty")].isdigit() and "\none empty: " in text
    costs = [evaluate.Cost("a patch of 8", f, "1 GFLOPs") for f in ("2 GFLOPs", "3 GFLOPs")]
    assert (
        evaluate.cost_line(costs * 2) == "Cost of a patch of 8: f 2 GFLOPs or 3 GFLOPs, g 1 GFLOPs."
    )


def test_rows_of_different_settings_are_told_apart(gray, tmp_path):
    info = h5.read_info(gray)
    settings = [
        dict(lam=0.1),
        dict(lam=0.2),
        dict(lam=0.2, seed=1),
        dict(method="pseudo_label", weight="quality", weight_level="class", qar=0.01),
        dict(method="mean_teacher", qp="a/qp.pt"),
        dict(method="mean_teacher", qp="b/qp.pt"),
        dict(method="ict"),
        dict(method="ict"),
    ]
    states = [
        evaluate.load_checkpoint(
            make_run(
                tmp_path / str(i),
                info,
                **(a | dict(method="supervised") if a.get("method") == "ict" else a),
            ),
            "ssl",
        )
        for i, a in enumerate(settings)
    ]
    for state, a in zip(states, settings):
        state["args"] |= a
    states[7]["data"]["checksum"] = states[6]["data"]["checksum"]
    groups = evaluate.group_runs(states, [f"{i}/best.pt" for i in range(8)])
    assert [(name, members) for name, _, members in groups] == [
        ("supervised (lam=0.1)", [0]),
        ("supervised (lam=0.2)", [1, 2]),
        ("pseudo_label + QW (class) + QAR", [3]),
        ("mean_teacher (qp=a/qp.pt)", [4]),
        ("mean_teacher (qp=b/qp.pt)", [5]),
        ("ict (checkpoint=best.pt)", [6]),
        ("ict (checkpoint=7/best.pt)", [7]),
    ]  # the same seed twice is no second seed
    groups = evaluate.group_runs(
        states[1:3] * 2, ["0/step1.pt", "1/step1.pt", "0/best.pt", "1/best.pt"]
    )
    assert [(name, members) for name, _, members in groups] == [
        ("supervised (checkpoint=step1.pt)", [0, 1]),
        ("supervised (checkpoint=best.pt)", [2, 3]),
    ]


def test_files_of_others_are_not_replaced(gray, tmp_path, refused, undrawn):
    argv = [gray, make_run(tmp_path / "run", h5.read_info(gray)), "--out", tmp_path / "out"]
    (tmp_path / "out" / "cases").mkdir(parents=True)
    others = {
        "summary.json": '{"mean": 1}',
        "cases.csv": "a,b",
        "curves.png": "",
        "cases/1.png": "",
    }
    for name, text in others.items():
        (tmp_path / "out" / name).write_text(text)
        refused(evaluate.main, argv, f"{name}: would be replaced", "choose another --out")
        assert (tmp_path / "out" / name).read_text() == text
        (tmp_path / "out" / name).unlink()
    for _ in range(2):  # its own are
        evaluate.main([*map(str, argv), "--pictures", "0"])
    (tmp_path / "out" / "curves.png").touch()  # as if an earlier one had drawn
    evaluate.main([*map(str, argv), "--pictures", "0"])
    assert not (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ("", ""),
        ("--overwrite --stride 8,8,8", "--overwrite"),
        ("--window whole --blend uniform", "--blend"),
        ("--predict --grid source --pictures 3", "--grid, --pictures"),
        ("--predict --qp g --pictures 3 --overwrite", ""),
    ],
)
def test_options_that_are_not_read_are_noted(more, said, capsys):
    evaluate.print_idle(evaluate.parse_args(["data.h5", "best.pt", "--out=o", *more.split()]))
    found = capsys.readouterr().out
    assert found == (f"note: without effect in this run: {said}\n" if said else "")


SEEN = [  # split that is scored, of this file or another, labels that the run and g know, lines
    ("val", True, "train", "train", []),
    ("val", True, "train val", "", ["warning: the g of run was trained on another file"]),
    ("val", False, "val", "val", ["warning: run was trained", "warning: qp.pt was trained"]),
    ("val", False, "train", "train", []),
    ("train", True, "train", "", ["note: run has learned from the labels of 6 of these 6"]),
    ("train", False, "train", "val", ["warning: run was trained on another file"]),
]


@pytest.mark.parametrize("case", SEEN)
def test_scores_of_cases_whose_labels_a_run_or_g_has_seen(case, gray, capsys, monkeypatch):
    split, same, of_run, of_g, said = case
    info = h5.read_info(gray)

    def state(splits):
        names = [entry.name for name in splits.split() for entry in info.entries(name)]
        return dict(labeled=names, data=dict(checksum=info.checksum if same else 0))

    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, stage: state(of_g))
    args = types.SimpleNamespace(data=gray, qp="qp.pt")
    evaluate.note_taught(args, info, split, info.entries(split), {"run": state(of_run)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(map(str.startswith, lines, said))
    if not said:  # a case of val may have the name of one of train
        entries = [dataclasses.replace(info.entries("val")[0], name=info.entries("train")[0].name)]
        evaluate.note_taught(args, info, split, entries, {"run": state("train")})
        assert not same or not capsys.readouterr().out


def test_a_run_is_older_than_an_option(gray, tmp_path):
    info = h5.read_info(gray)
    old, new = (
        evaluate.load_checkpoint(make_run(tmp_path / str(seed), info, seed=seed), "ssl")
        for seed in (0, 1)
    )
    del old["args"]["correct"]
    assert rows_of([old, new]) == [("supervised", [0, 1])]
    new["args"]["correct"] = True
    assert rows_of([old, new]) == [("supervised", [0]), ("supervised + correction", [1])]
    old["args"]["correct"] = True  # by g alone; now val chooses
    del old["args"]["trust"]
    assert [name for name, _ in rows_of([old, new])] == [
        "supervised + correction (trust=1.0)",
        "supervised + correction (trust=val)",
    ]
    old["args"]["correct"] = new["args"]["correct"] = False
    new["args"]["younger"] = 0.5  # an option of tomorrow
    assert rows_of([old, new]) == [("supervised", [0, 1])]
    later = dict(old, args=new["args"] | dict(younger=0.7, seed=5))
    half, more = "supervised (younger=0.5)", "supervised (younger=0.7)"
    assert rows_of([old, new, later]) == [(half, [0, 1]), (more, [2])]
    later["defaults"] = dict(younger=0.5, older=None)  # so the old run has had
    assert rows_of([old, later]) == [(half, [0]), (more, [1])]
    other = dict(later, args=later["args"] | dict(method="ict"), defaults=dict(younger=0.7))
    assert rows_of([old, later, other]) == [(half, [0]), (more, [1]), ("ict", [2])]


def test_bad_input(gray, rgb, gray_quality, rgb_quality, tmp_path, refused):
    info = h5.read_info(gray)
    run, out = make_run(tmp_path / "a", info), ["--out", tmp_path / "out"]
    refused(evaluate.main, [rgb, run, *out], "classes")
    refused(evaluate.main, [gray, run, *out, "--qp", rgb_quality[1]], "qp.pt", "classes")
    refused(evaluate.main, [gray, gray_quality[1], *out], "stage 'qp'", "'ssl' is needed")
    refused(evaluate.main, [gray, gray, *out], "an HDF5 file, not a checkpoint; give the .pt")
    refused(evaluate.main, [run, gray, *out], "a checkpoint (or another zip archive), not an HDF5")
    refused(evaluate.main, [__file__, run, *out], "of another kind, not an HDF5 file; give the .h5")
    refused(
        evaluate.main,
        [rgb, make_run(tmp_path / "b", h5.read_info(rgb)), *out, "--split", "test"],
        "'test' is empty",
    )
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        del f["val/phantom006/label"]
    refused(evaluate.main, [tmp_path / "f.h5", run, *out], "phantom006", "no label")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the source's grid


class Threshold(torch.nn.Module):
    """Says that what is bright is the object."""

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], 1) * 50


@pytest.fixture
def shells(tmp_path):
    """Thin shells, 1 mm, of which a dataset of 3 mm keeps little. -> (folder, label, dataset)"""
    from test_nifti import ball, stored_along

    shape = (20, 24, 26)
    label = ball(shape, (10, 12, 13), 9.2) - ball(shape, (10, 12, 13), 7.7)
    bright = label | ball(shape, (1, 1, 1), 3)  # and a speck, which is no part of the shell
    for i, axes in enumerate(("SAR", "SAR", "SPL")):
        for part, values in (("images", np.float32(bright) * 400 - 200), ("labels", label)):
            stored_along(tmp_path / "src" / f"{part}Tr" / f"c{i}.nii", axes, values)
    (tmp_path / "src" / "val.txt").write_text("c0\nc2\n")
    (tmp_path / "src" / "train.txt").write_text("c1\n")
    nifti.main([str(tmp_path / "src"), "--out", str(tmp_path / "f.h5"), "--spacing", "1.5,1.5,1.5"])
    return tmp_path / "src", label, str(tmp_path / "f.h5")


def test_scores_on_the_sources_grid_are_those_of_masks(shells, tmp_path, capsys, monkeypatch):
    """Dice and HD95 in mm of the files that --predict writes, against the labels' own files."""
    src, label, data = shells
    run = make_run(tmp_path / "run", h5.read_info(data), size=(16, 16, 16))
    load_run = checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (Threshold(), load_run(*args)[1]))
    found, options = {}, ["--pictures", "0", "--largest-component", "--workers", "0"]
    for where in ("stored", "source"):
        out = tmp_path / where
        regions = ["--regions", "region=1"]
        evaluate.main([data, run, "--out", str(out), "--grid", where, *options, *regions])
        rows = list(csv.DictReader(open(out / "cases.csv")))
        assert [row | {"class": "region"} for row in rows[::2]] == rows[1::2]
        found[where] = {row["case"]: row for row in rows[::2]}
    title = [json.loads((tmp_path / n / "summary.json").read_text())["title"] for n in found]
    assert "2 of the cases are scored on the resampled grid" in title[0]
    assert "--grid source" in title[0]
    assert "on the sources' own grids" in title[1] and title[1] in capsys.readouterr().out
    argv = [data, run, "--predict", "--split", "val", "--out", str(tmp_path / "masks")]
    evaluate.main([*argv, *options])
    for name in ("c0", "c2"):
        mask = nibabel.load(tmp_path / "masks" / "masks" / f"{name}.nii.gz")
        truth = np.asarray(nibabel.load(src / "labelsTr" / f"{name}.nii").dataobj)
        want = metrics.score(np.asarray(mask.dataobj) > 0, truth > 0, (1, 1, 1))
        row = found["source"][name]
        assert float(row["dice"]) == pytest.approx(want.dice) and row["unit"] == "mm"
        assert float(row["hd95"]) == pytest.approx(want.hd95, abs=1e-5)
        assert float(row["dice"]) < float(found["stored"][name]["dice"]) - 0.05


def test_a_dataset_without_the_sources_labels_says_so(shells, tmp_path, refused):
    data = shells[2]
    run = make_run(tmp_path / "run", h5.read_info(data), size=(16, 16, 16))
    with h5py.File(data, "a") as f:
        del f["val/c2/source_label"]
    refused(
        evaluate.main,
        [data, run, "--grid", "source", "--out", tmp_path / "o"],
        "/val/c2/source_label",
        "convert the data again",
    )


@pytest.mark.usefixtures("unrendered")
def test_pictures_are_scored_on_their_own_grid(tmp_path, monkeypatch):
    """The map of probabilities is brought there, as for the masks of --predict."""
    src = make_pictures(tmp_path / "src", 6)
    images.main([str(src), "--out", str(tmp_path / "f.h5"), "--size", "32"])
    info = h5.read_info(str(tmp_path / "f.h5"))
    run, load_run = make_run(tmp_path / "run", info), checkpoints.load_run
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (Threshold(), load_run(*args)[1]))
    drawn, options = [], ["--grid", "source", "--pictures", "1"]
    monkeypatch.setattr(figures, "cases", lambda path, rows, *_, **__: drawn.extend(sum(rows, [])))
    evaluate.main([info.path, run, "--out", str(tmp_path / "o"), *options])
    evaluate.main([info.path, run, "--predict", "--split", "val", "--out", str(tmp_path / "p")])
    assert drawn and all(m is None or m.shape == i.shape[:2] for _, i, m, _ in drawn)
    (row,) = csv.DictReader(open(tmp_path / "o" / "cases.csv"))
    mask, truth = (
        images.read_mask(p / f"{row['case']}.png", info.classes) > 0
        for p in (tmp_path / "p" / "masks", tmp_path / "src" / "masks")
    )
    want = metrics.score(mask, truth, (1, 1))
    assert mask.shape == (40, 56) and row["unit"] == "px"
    assert (float(row["dice"]), float(row["hd95"])) == pytest.approx((want.dice, want.hd95))


def test_a_class_that_only_sources_labels_hold_is_scored_there(tmp_path):
    """Resampling has lost it: on the stored grid it counts in no mean."""
    image = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    fine = np.zeros((64, 64), np.uint8)
    fine[10:30, 10:30], fine[41, 5:50] = 1, 2
    coarse = fine[::2, ::2]
    assert set(np.unique(coarse)) == {0, 1}
    about = dict(source_grid=(64, 64), source_label=fine, spacing=(0.5, 0.5))
    cases = (
        h5.Case(split, f"{split}{i}", image + i, coarse, f"{split}{i}", **about)
        for i, split in enumerate(("train", "val"))
    )
    names = ["background", "a", "line"]
    info = h5.write(str(tmp_path / "f.h5"), cases, name="l", classes=names, dims=2, channels=1)
    run = make_run(tmp_path / "run", info)
    found = {}
    for grid in ("stored", "source"):
        out = tmp_path / grid
        evaluate.main([info.path, run, "--out", str(out), "--grid", grid, "--pictures", "0"])
        found[grid] = {row["class"]: row for row in csv.DictReader(open(out / "cases.csv"))}
    assert [*found["stored"]] == ["a"] and [*found["source"]] == ["a", "line"]


@pytest.mark.parametrize("grid", ["stored", "source"])
def test_distances_of_pictures_are_in_mm_of_either_grid(grid, tmp_path, monkeypatch):
    """An empty output is as far as the diagonal, of 32 pixels of 1 mm or of 64 of half a mm."""
    image, label = np.float32(np.eye(32)), np.uint8(np.eye(32))
    fine = np.kron(label, np.ones((2, 2), np.uint8))
    source = dict(source_grid=(64, 64), source_label=fine, spacing=(1.0, 1.0))
    cases = (
        h5.Case(split, split, image * (i + 1), label, split, **source)
        for i, split in enumerate(("train", "val"))
    )
    about = dict(name="l", classes=["background", "a"], dims=2, channels=1)
    info = h5.write(str(tmp_path / "f.h5"), cases, **about)
    run, load_run = make_run(tmp_path / "run", info), checkpoints.load_run
    empty = Says(lambda x: 0 * x)
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (empty, load_run(*args)[1]))
    argv = [info.path, run, "--grid", grid, "--out", str(tmp_path / "o"), "--pictures", "0"]
    evaluate.main(argv)
    (row,) = csv.DictReader(open(tmp_path / "o" / "cases.csv"))
    assert row["unit"] == "mm" and float(row["hd95"]) == pytest.approx(32 * 2**0.5)


def test_distances_have_one_unit(tmp_path, monkeypatch):
    """Pixels for all cases where one of them does not know its spacing."""
    label = np.uint8(np.eye(32))
    spacings = ((2.0, 2.0), (2.0, 2.0), None)
    cases = (
        h5.Case("val" if i else "train", f"c{i}", np.float32(label) * (i + 1), label, f"c{i}", s)
        for i, s in enumerate(spacings)
    )
    about = dict(name="l", classes=["background", "a"], dims=2, channels=1)
    info = h5.write(str(tmp_path / "f.h5"), cases, **about)
    run, load_run = make_run(tmp_path / "run", info), checkpoints.load_run
    empty = Says(lambda x: 0 * x)
    monkeypatch.setattr(checkpoints, "load_run", lambda *args: (empty, load_run(*args)[1]))
    evaluate.main([info.path, run, "--out", str(tmp_path / "o"), "--pictures", "0"])
    rows = list(csv.DictReader(open(tmp_path / "o" / "cases.csv")))
    assert [row["unit"] for row in rows] == ["px", "px"]
    assert [float(row["hd95"]) for row in rows] == pytest.approx([32 * 2**0.5] * 2)


def test_cases_whose_labels_a_run_knows_from_another_file_are_warned_of(gray, tmp_path, capsys):
    info = h5.read_info(gray)
    path, name = make_run(tmp_path / "run", info), info.entries("val")[0].name
    argv = [gray, path, "--pictures", "0", "--out", str(tmp_path / "o")]
    for checksum, labeled, warned in (
        (info.checksum, [name], True),  # through its g
        (1, [name], True),
        (1, ["another"], False),
    ):
        state = torch.load(path, weights_only=True)
        state["data"]["checksum"], state["labeled"] = checksum, labeled
        torch.save(state, path)
        evaluate.main(argv)
        said = capsys.readouterr().out
        assert (f"labels of 1 of these {len(info.entries('val'))} cases" in said) == warned


@pytest.mark.usefixtures("unrendered")
def test_nothing_of_a_former_evaluation_stays(rgb, rgb_quality, tmp_path):
    path = make_run(tmp_path / "run", h5.read_info(rgb))
    argv = [rgb, path, "--out", str(tmp_path / "o")]
    evaluate.main([*argv, "--qp", rgb_quality[1], "--split", "val"])
    (tmp_path / "o" / "notes.txt").touch()
    assert (tmp_path / "o" / "quality.json").is_file() and [*(tmp_path / "o" / "cases").iterdir()]
    evaluate.main([*argv, "--pictures", "0"])
    left = {p.name for p in (tmp_path / "o").iterdir()} - {"cases"}
    assert left == {"cases.csv", "summary.md", "summary.json", "notes.txt"}
    assert not [*(tmp_path / "o" / "cases").iterdir()]


@pytest.mark.usefixtures("unrendered")
def test_patients_are_those_of_the_split(gray, gray_quality, tmp_path, monkeypatch):
    """Cases of another split may have the same names."""
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        for mine, its in zip(list(f["val"]), list(f["test"])):
            f.move(f"test/{its}", f"test/{mine}")
    info, seen = h5.read_info(str(tmp_path / "f.h5")), []
    compare = evaluate.compare_rows
    spy = lambda *args: seen.append(args[-1]) or compare(*args)
    monkeypatch.setattr(evaluate, "compare_rows", spy)
    path = make_run(tmp_path / "run", h5.read_info(gray))
    argv = [info.path, path, "--split", "val", "--pictures", "0", "--out", str(tmp_path / "o")]
    evaluate.main([*argv, "--qp", gray_quality[1]])
    assert seen == [{e.name: e.patient for e in info.entries("val")}]


def test_a_pass_holds_as_much_of_each_run(gray, tmp_path, monkeypatch):
    """--batch is by the size of a run, whichever comes first."""
    info, seen, plain = h5.read_info(gray), [], evaluate.inference.predict_cases
    runs = [make_run(tmp_path / str(size), info, size=size) for size in (32, 64)]

    def spy(net, cases, on, window, batch):
        seen.append((cases.size, batch))
        return plain(net, cases, on, window, batch)

    monkeypatch.setattr(evaluate.inference, "predict_cases", spy)
    for order in (runs, runs[::-1]):
        evaluate.main([gray, *order, "--pictures", "0", "--out", str(tmp_path / "o")])
    assert len(seen) == 4 and len(set(seen)) == 2 and len({batch for _, batch in seen}) == 2
