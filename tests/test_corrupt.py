"""Masks of variable quality: every line of the catalog, several classes, harvest, balance, file."""

import os

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import python

import corrupt
from data import h5, loading, shapes, supervision

EVERY_LINE = corrupt.SINGLE + corrupt.HEAVY + corrupt.BLOB + corrupt.CATASTROPHIC


def heart(side=112):
    """A label map of three touching structures."""
    label = np.zeros((side, side), np.uint8)
    cv2.ellipse(label, (int(side * 0.35), side // 2), (side // 8, side // 5), 20, 0, 360, 1, -1)
    cv2.circle(label, (int(side * 0.6), side // 2), side // 6, 2, -1)
    cv2.circle(label, (int(side * 0.6), side // 2), side // 10, 3, -1)
    return label


def disc(side=112):
    return cv2.circle(
        np.zeros((side, side), np.uint8), (side // 2 + 4, side // 2), side // 4, 1, -1
    )


def corrupted(line, label, K, rng):
    """A line of the catalog on a label map."""
    return corrupt.corrupt_classes(corrupt.corruption_of(line), label, K, rng)


def plain_dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


@pytest.mark.parametrize("line", EVERY_LINE, ids=[line[0] for line in EVERY_LINE])
def test_every_line_changes_a_binary_mask_and_keeps_its_type(line):
    for truth in (disc(), disc(64), heart().clip(0, 1)):
        before, changed = truth.copy(), 0
        for seed in range(8):
            out = corrupted(line, truth, 2, np.random.default_rng(seed))
            assert (
                out.shape == truth.shape and out.dtype == np.uint8 and set(np.unique(out)) <= {0, 1}
            )
            changed += (out != truth).any()
        assert (truth == before).all(), "the truth was written to"
        if line[0] not in (
            "open 5",
            "close 5",
            "smooth 11",
            "smooth 15",
            "ellipse",
            "largest component",
            "convex hull",
            "hull",
            "disc",
            "gaussian 1.0",
        ):  # these may leave a smooth shape as it is
            assert changed >= 4


@pytest.mark.parametrize("K", [2, 4])
def test_a_new_corruption_may_give_any_mask(K):
    label = heart() if K == 4 else disc()
    made = {
        "bool": lambda m, rng: m[..., ::-1] > 0,
        "255": lambda m, rng: 255 * m[..., ::-1],
        "int64": lambda m, rng: m[..., ::-1].astype(np.int64),
        "float": lambda m, rng: m[..., ::-1] / 2,
        "uint8": lambda m, rng: m[..., ::-1],
    }
    found = [
        corrupted((name, 1, function), label, K, np.random.default_rng(0))
        for name, function in made.items()
    ]
    assert all(out.dtype == np.uint8 and (out == found[-1]).all() for out in found)
    assert (found[-1] != label).any() and corrupt.dice_of(found[0][None], label[None], K).min() < 1


def test_lines_do_what_they_say():
    rng, m = np.random.default_rng(0), disc(224)
    area = int(m.sum())
    assert corrupt.erode(m, rng, 5).sum() < area < corrupt.dilate(m, rng, 5).sum()
    assert (corrupt.dilate(m, rng, 7) >= m).all() and (corrupt.erode(m, rng, 7) <= m).all()
    assert corrupt.erode(m, rng, 9).sum() < corrupt.erode(m, rng, 5).sum()
    assert (
        abs(corrupt.disc(m, rng).sum() / area - 1) < 0.05
        and plain_dice(corrupt.ellipse(m, rng), m) > 0.97
    )
    tilted = cv2.ellipse(np.zeros((224, 224), np.uint8), (100, 120), (70, 25), 35, 0, 360, 1, -1)
    assert plain_dice(corrupt.ellipse(tilted, rng), tilted) > 0.97
    assert 0.75**2 - 0.05 < corrupt.scale(m, rng, 0.75, 0.9).sum() / area < 0.9**2 + 0.05
    moved = shapes.center(corrupt.shift(m, rng, 0.2)) - np.array(shapes.center(m))
    assert abs(np.linalg.norm(moved) - 0.2 * shapes.extent(m)) < 1.5
    assert (
        (corrupt.inverted(m, rng) == 1 - m).all()
        and not corrupt.empty(m, rng).any()
        and corrupt.full(m, rng).all()
    )
    assert abs(corrupt.noise(m, rng, 0.5).mean() - 0.5) < 0.02
    assert (corrupt.holes(m, rng, 3, 8, 15) <= m).all() and (
        corrupt.islands(m, rng, 2, 3, 8) >= m
    ).all()
    assert corrupt.hull(m, rng).sum() >= area and (corrupt.box(m, rng) >= m).all()
    two = m.copy()
    two[:10, :10] = 1
    assert (corrupt.largest_component(two, rng) == m).all() and corrupt.drop_component(
        two, rng
    ).sum() in (
        100,
        area,
    )
    assert 0.2 < corrupt.drop_component(m, rng).sum() / area < 0.8


def test_sizes_follow_the_grid():
    """The same corruption costs about the same Dice at any size."""
    for line in corrupt.SINGLE[:6]:
        dice = [
            plain_dice(corrupted(line, disc(s), 2, np.random.default_rng(0)), disc(s))
            for s in (112, 224, 448)
        ]
        assert max(dice) - min(dice) < 0.05, (line[0], dice)


def test_a_class_never_silently_overwrites_another():
    """Dilated classes take background; in about half of the draws, also their neighbors' pixels."""
    truth, lost = heart(), []
    for seed in range(60):
        line = ("dilate 7", 1, corrupt.dilate, 7)
        out = corrupted(line, truth, 4, np.random.default_rng(seed))
        assert not ((truth > 0) & (out == 0)).any()
        lost.append(((truth > 0) & (out != truth)).any())
    assert 0.2 < np.mean(lost) < 0.8


def test_absent_classes_can_only_be_invented():
    """A slice without foreground gets a disc of some class, and says so.

    A line of the catalog leaves it as it is.
    """
    nothing, names = np.zeros((64, 64), np.uint8), set()
    for line in EVERY_LINE + corrupt.SEVERAL_CLASSES:
        assert not corrupted(line, nothing, 4, np.random.default_rng(1)).any()
    for seed in range(60):
        mask, name = corrupt.draw_mask(nothing, 4, [], np.random.default_rng(seed))
        names.add(name)
        assert len(np.unique(mask)) == (2 if name == "invented" else 1)
    assert names == {"identity", "invented"}
    two = heart()
    two[two == 3] = 2
    found = [corrupt.draw_mask(two, 4, [], np.random.default_rng(seed)) for seed in range(400)]
    invented = [mask for mask, name in found if name == "invented"]
    assert 5 < len(invented) < 60 and all(((mask == two) | (mask == 3)).all() for mask in invented)


def test_shares_of_the_paper():
    assert sum(corrupt.MIX.values()) == pytest.approx(1)
    names = [
        corrupt.draw_mask(disc(), 2, [disc(112)[::-1]], np.random.default_rng([0, i]))[1]
        for i in range(3000)
    ]
    assert np.mean([n == "identity" for n in names]) == pytest.approx(0.20, abs=0.03)
    assert np.mean([n == "cross image" for n in names]) == pytest.approx(0.10, abs=0.02)
    assert np.mean([" + " in n for n in names]) == pytest.approx(0.18, abs=0.025)


def read(path):
    with h5py.File(path) as f:
        return {f"{s}/{n}": f[s][n][:] for s in f for n in f[s]}, dict(f.attrs)


def run(data, out, *more):
    corrupt.main(
        [
            data,
            "--out",
            str(out),
            *"--labeled 3 --size 40 --masks 10 --val-masks 3 --harvest-epochs 1".split(),
            *"--harvest-steps 1 --harvest-batch 4 --folds 1 --harvest-share 0.1".split(),
            *more,
        ]
    )
    return read(os.path.join(out, "vqm.h5"))


def test_file_is_the_same_for_a_seed_whatever_the_workers(gray, tmp_path):
    one, _ = run(gray, tmp_path / "a")
    two, _ = run(gray, tmp_path / "b", "--workers", "2")
    other, _ = run(gray, tmp_path / "c", "--seed", "1")
    assert (
        all((one[k] == two[k]).all() for k in one)
        and (one["train/mask"] != other["train/mask"]).any()
    )


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("kind", ["gray", "rgb"])
def test_file_holds_what_it_says(kind, request, tmp_path):
    data = request.getfixturevalue(kind)
    found, attrs = run(
        data,
        tmp_path,
        *"--harvest-share 0.3 --folds 3".split(),
        "--preview",
        str(tmp_path / "p.png"),
    )
    info, K = h5.read_info(data), len(attrs["classes"])
    labeled, others = supervision.choose_labeled(info, "3")
    assert (
        attrs["spec"] == "3" and "--labeled 3" in attrs["command"] and (tmp_path / "p.png").exists()
    )
    for split, source in (("train", "train"), ("val", "val"), ("real", "val")):
        names = {c.decode() for c in found[f"{split}/case"]}
        assert names == set(labeled if source == "train" else [e.name for e in info.entries("val")])
        slices = loading.load_slices(info, source, 40, sorted(names))
        where = {key: slices.label[i].numpy() for i, key in enumerate(zip(slices.case, slices.at))}
        assert len(found[f"{split}/mask"]) == len(slices) * dict(train=10, val=3, real=3)[split]
        for mask, dice, name, z in zip(
            *(found[f"{split}/{n}"] for n in ("mask", "dice", "case", "at"))
        ):
            truth = where[name.decode(), tuple(z)]
            assert dice == pytest.approx(
                [plain_dice(mask == k, truth == k) for k in range(1, K)], abs=1e-6
            )
    for split, share in (("train", 0.3), ("val", 0), ("real", 1)):
        harvested = found[f"{split}/prob_index"] >= 0
        assert harvested.mean() == pytest.approx(share)
        assert len(found[f"{split}/prob"]) == harvested.sum()
        probability = found[f"{split}/prob"][found[f"{split}/prob_index"][harvested]]
        mask = found[f"{split}/mask"][harvested]
        # The mask is the most probable class.
        assert (mask[:, None] == np.arange(1, K)[:, None, None])[probability > 128].all()


def test_harvest_predicts_the_fold_that_was_left_out():
    from types import SimpleNamespace

    weak = {(fold, epoch): None for fold in range(2) for epoch in (1, 5)}
    tasks = corrupt.train_tasks(["a", "a", "b", "c"], weak, 100, 3, SimpleNamespace(folds=2))
    rows = sorted(row for todo in tasks.values() for row, _, _ in todo)
    assert rows == list(range(100, 112))
    for (fold, _), todo in tasks.items():
        assert all({0: 0, 1: 0, 2: 1, 3: 0}[i] == fold for _, i, _ in todo)


def test_networks_of_a_fold_never_see_it(gray, tmp_path, monkeypatch):
    info, seen = h5.read_info(gray), {}
    labeled, _ = supervision.choose_labeled(info, "4")
    slices = loading.load_slices(info, "train", 32, labeled)
    original = loading.Samples.batch
    monkeypatch.setattr(
        loading.Samples,
        "batch",
        lambda self, index, *a: (
            seen.setdefault("all", set()).update(index.tolist()) or original(self, index, *a)
        ),
    )
    args = corrupt.parse_args(
        [
            gray,
            "--out",
            str(tmp_path),
            *"--harvest-epochs 3 --harvest-steps 4 --harvest-batch 16".split(),
        ]
    )
    index = corrupt.seen_by(1, slices.case, 2)
    corrupt.train_weak(corrupt.build_run(1, info, args), slices, index, info, args)
    assert {slices.case[i] for i in seen["all"]} == {labeled[0], labeled[2]}


def test_weak_networks_that_learned_nothing():
    """Only what is there counts: an empty output for an empty slice is right by chance."""
    label = torch.zeros(3, 8, 8, dtype=torch.uint8)
    label[0, :2], label[1, 4:] = 1, 2
    dice = np.ones((2, 3, 2), np.float32)  # of networks, slices and classes
    dice[:, 0, 0], dice[:, 1, 1] = (0, 0.01), (0, 0.01)
    assert corrupt.best_of_weak(dice.reshape(6, 2), label) == pytest.approx(0.01)
    dice[1, 1, 1] = 0.03
    assert corrupt.best_of_weak(dice.reshape(6, 2), label) == pytest.approx(0.02)
    assert corrupt.best_of_weak(dice.reshape(6, 2), label * 0) is None


@pytest.mark.parametrize("best, warns", [(0.01, True), (None, False)])
def test_they_are_reported(best, warns, gray, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corrupt, "best_of_weak", lambda *_: best)
    run(gray, tmp_path, "--flip", "W,H", "--masks", "2", "--val-masks", "1")
    out = capsys.readouterr().out
    assert ("warning: no weak network has a mean Dice above 0.01 on val" in out) == warns
    assert "--flip" not in out  # all axes need no word in the next command


def test_balance_flattens_the_histogram(rgb, tmp_path):
    def spread(*more):
        found, _ = run(rgb, tmp_path / more[0], "--masks", "60", "--harvest-share", "0", *more)
        assert abs(found["val/dice"].mean() - 0.8) < 0.2  # val keeps the paper's mix
        counts = np.histogram(found["train/dice"].mean(1), bins=5, range=(0, 1))[0]
        return counts.std() / counts.mean()

    assert spread("--balance") < 0.5 * spread("--no-balance")


def test_bad_input(gray, volumes, tmp_path, refused):
    out = ["--out", tmp_path / "x"]
    refused(corrupt.main, [gray, *out, "--labeled", "70"], "--labeled 70", "6 labeled")
    refused(corrupt.main, [gray, *out, "--labeled", "2", "--folds", "3"], "--folds 3")
    refused(corrupt.main, [gray, *out, "--masks", "0"], "--masks")
    refused(corrupt.main, [gray, *out, "--harvest-share", "2"], "--harvest-share")
    refused(
        corrupt.main,
        [volumes, *out, "--size", "31,17,31", "--harvest-batch", "1"],
        "--harvest-batch 1: a patch is a single voxel",
    )
    assert not (tmp_path / "x" / "vqm.h5").exists()


def test_runs_as_a_command(gray, tmp_path):
    done = python(
        "corrupt.py",
        gray,
        "--workers",
        2,
        "--out",
        tmp_path,
        *"--labeled 1 --folds 1 --size 32 --masks 2 --val-masks 1 --harvest-epochs 1".split(),
        *"--harvest-steps 1".split(),
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "next: python train_qp.py" in done.stdout and done.stderr == ""


FORKED = """
import numpy as np
import corrupt
from data import loading
labels = np.zeros((6, 384, 384), np.uint8)
labels[:, 90:200, 80:180] = 1
for _ in range(6):
    loading.resize_image(np.zeros((560, 760, 3), np.uint8), 384)
truths = corrupt.Truths("train", labels, list("abcdef"), 2, 3, False, 0)
print(len(list(corrupt.synthetic_masks(truths, 2))))
"""


def test_processes_draw_masks_after_large_pictures_were_resized():
    """Threads of OpenCV, which these start, would be missing in forked processes."""
    done = python("-c", FORKED, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "6", done.stderr
