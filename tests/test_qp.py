"""The quality predictor: its batches, that it learns, its report, resuming, and refusals."""

import csv
import json
import os
import shutil

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import FakeG, make_pictures, shared

import corrupt
import evaluate
import models
import train_qp
from data import figures, h5, images, loading, phantom, quality_masks
from data.quality_masks import load
from models import checkpoints, distributed, inference
from models.device import compute
from models.losses import one_hot
from models.quality import (
    DenseQualityPredictor,
    QualityPredictor,
    Seen,
    quality_target,
    resample,
    true_dice,
)


@pytest.fixture
def given(rgb, rgb_quality):
    """What stage 2 reads: pictures and their masks, as words of its command line."""
    return [rgb, "--vqm", rgb_quality[0]]


def options_of(argv, dims=2):
    args = train_qp.parse_args(argv)
    train_qp.set_defaults(args, dims)
    return args


def test_options_that_a_head_does_not_read_are_noted(capsys):
    for more, said in (
        ("--members 2 --mask-dropout 0.2 --patience 3", "--patience"),
        ("--head scalar --members 2 --patience 3 --dropout 0.3", "--members"),
        ("--select best --patience 3 --dropout 0.3", "--dropout"),
    ):
        train_qp.print_idle(options_of(["d.h5", "--vqm", "v.h5", "--out", "o", *more.split()]))
        assert capsys.readouterr().out == f"note: without effect in this run: {said}\n"


@pytest.mark.parametrize("kind", ["gray", "rgb"])
def test_batches_show_what_they_should(kind, request):
    data, (path, _) = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_quality")
    info = h5.read_info(data)
    masks = load(path, "train", info, 32, probabilities=True)
    torch.manual_seed(0)
    order = train_qp.epoch_rows(masks, 4)
    counts = np.bincount(masks.index[order], minlength=len(masks.samples))
    assert (counts == 4).all() and len(set(order.tolist())) == len(order)
    rows = torch.arange(len(masks.mask))
    options = lambda *more: options_of([data, "--vqm", path, "--out", "o", *more])
    seen, truth = train_qp.augmented_batch(
        masks, rows, info, torch.device("cpu"), options("--soft", "0")
    )
    x, mask = seen.image, seen.mask
    assert x.shape[1] == info.channels and mask.shape == truth.shape == (
        len(rows),
        len(info.classes) - 1,
        32,
        32,
    )
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    identical = (masks.mask == masks.samples.label[masks.index]).flatten(1).all(1)
    assert (
        identical.any() and (quality_target(mask, truth)[identical] == 1).all()
    )  # moved together, an identity stays perfect
    seen, _ = train_qp.augmented_batch(
        masks, rows, info, torch.device("cpu"), options("--soft", "1")
    )
    soft = seen.mask
    between = ((soft > 0.01) & (soft < 0.99)).flatten(1).any(1)
    assert between.float().mean() > 0.6 and soft.min() >= 0 and soft.max() <= 1.0001


def test_real_outputs_keep_the_probabilities_that_made_them(gray, gray_quality, tmp_path):
    """Those of a file from before that are read as none."""
    info = h5.read_info(gray)
    real = load(gray_quality[0], "real", info, 32, probabilities=True)
    assert real.prob_index.tolist() == list(range(len(real.mask))) and len(real.prob) > 0
    probable = torch.stack(real.prob) > 128  # [N, K-1, *S]
    classes = torch.arange(1, 4).reshape(1, 3, 1, 1)
    assert (real.mask[:, None] == classes)[probable].all()

    old = str(shutil.copy(gray_quality[0], tmp_path / "old.h5"))
    with h5py.File(old, "a") as f:
        f["real/prob"].resize(0, axis=0)
        f["real/prob_index"][:] = -1
    assert load(old, "real", info, 32, probabilities=True).prob == []


@pytest.fixture(scope="session")
def discs(tmp_path_factory):
    """30 + 10 bright discs, and masks of them. -> dataset, vqm.h5"""

    def make(folder):
        images.main(
            [str(make_pictures(folder / "src", 40)), "--out", str(folder / "f.h5"), "--val", "0.25"]
        )
        corrupt.main(
            [
                str(folder / "f.h5"),
                "--out",
                str(folder),
                *"--size 32 --masks 30 --val-masks 20 --harvest-epochs 1 --harvest-steps 2".split(),
                *"--harvest-batch 4".split(),
            ]
        )

    folder = shared(tmp_path_factory, "discs", make)
    return str(folder / "f.h5"), str(folder / "vqm.h5")


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "head, more",
    [
        ("dense", ("--width", "4", "--per-image", "15", "--lr", "5e-3")),
        ("scalar", ("--width", "16", "--per-image", "30", "--lr", "3e-3", "--seed", "1")),
    ],
)
def test_it_learns_to_tell_good_from_bad(head, more, discs, tmp_path):
    """On 30 bright discs, a tiny g learns to grade synthetic masks of 10 others by the image."""
    train_qp.main(
        [
            discs[0],
            "--vqm",
            discs[1],
            "--out",
            str(tmp_path),
            *"--epochs 3 --batch 16 --members 1".split(),
            "--head",
            head,
            *more,
        ]
    )
    report = json.loads((tmp_path / "qp.json").read_text())
    synthetic = next(
        r for r in report["rows"] if r["masks"] == "synthetic masks" and r["entries"] == "all"
    )
    assert synthetic["pearson"] > 0.8
    assert report["image_dependence"]["blank image"] < 0.7
    log = [float(r["loss"]) for r in csv.DictReader(open(tmp_path / "log.csv"))]
    assert log[-1] < 0.5 * log[0]


@pytest.mark.parametrize("kind", ["gray", "rgb"])
def test_report(kind, request):
    _, qp = request.getfixturevalue(f"{kind}_quality")
    folder, K = os.path.dirname(qp), 4 if kind == "gray" else 2
    report = json.load(open(os.path.join(folder, "qp.json")))
    titles = {(r["masks"], r["entries"]) for r in report["rows"]}
    for run in ("synthetic masks", "real outputs"):
        assert (run, "all") in titles and ((run, "present") in titles) == (K > 2)
        assert K == 2 or {(run, "myocardium"), (run, "absent")} <= titles
    assert set(report["image_dependence"]) == {"blank image", "another case's image"}
    assert (
        cv2.imread(os.path.join(folder, "qp.png")).std() > 5
        and "real outputs" in open(os.path.join(folder, "qp.md")).read()
    )


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("select, kept, run", [("last", 5, 5), ("best", 2, 4)])
def test_which_epoch_is_kept(select, kept, run, given, tmp_path, monkeypatch):
    """The last epoch; or the best, after which come no more than `patience` worse ones.

    Errors on val are made up.
    """
    errors = iter([e for e in (0.3, 0.1, 0.2, 0.4, 0.3) for _ in ("synthetic", "real")])
    estimate = inference.estimate_masks

    def made_up(*args, most):
        if most == 300:
            return np.full((4, 1), next(errors)), np.zeros((4, 1)), None
        return estimate(*args, most=most)

    monkeypatch.setattr(inference, "estimate_masks", made_up)
    options = f"--size 32 --width 4 --members 1 --epochs 5 --batch 16 --select {select}"
    train_qp.main([*given, "--out", str(tmp_path), *options.split(), "--patience", "2"])
    assert torch.load(tmp_path / "qp.pt", weights_only=True)["epoch"] == kept
    assert len(list(csv.DictReader(open(tmp_path / "log.csv")))) == run


def test_heads(rgb, rgb_quality, rgb_scalar):
    """Both heads come back from their file as they were, frozen, and answer in the same shape."""
    info, on = h5.read_info(rgb), evaluate.compute()
    for path, kind in ((rgb_quality[1], DenseQualityPredictor), (rgb_scalar, QualityPredictor)):
        g, labeled = checkpoints.load_quality(path, info, on)
        state, x, m = (
            torch.load(path, weights_only=True),
            torch.randn(2, 3, 32, 32),
            (torch.rand(2, 1, 32, 32) > 0.5).float(),
        )
        assert torch.allclose(
            g(Seen(x, m)),
            evaluate.models.rebuild(state["model"], state["weights"]).eval()(Seen(x, m)),
            atol=1e-5,
        )
        assert (
            isinstance(g, kind)
            and not g.training
            and not any(p.requires_grad for p in g.parameters())
            and len(labeled) == 4
        )
        larger = Seen(torch.randn(2, 3, 40, 40), torch.rand(2, 1, 40, 40))
        assert g(larger).shape == (2, 1)


def test_losses_of_the_heads_fall_when_they_are_right():
    """A perfect prediction of the truth has the least dense loss.

    The quality loss adds what the Dice that is read off is wrong by, of classes that are there.
    """

    class Knows(torch.nn.Module):
        def __init__(self, truth, certainty):
            super().__init__()
            self.members = [lambda x: certainty * (2 * train_qp.with_background(truth) - 1)]

        show = DenseQualityPredictor.show

    truth = torch.zeros(2, 2, 16, 16)
    truth[:, 0, 4:12, 4:12] = 1
    truth[1, 1, 12:] = 1  # the first image lacks this class
    mask, x = truth.roll(3, -1), torch.zeros(2, 1, 16, 16)
    mask[0, 1, :4] = 1
    options = lambda weight: options_of(
        ["d", "--vqm", "v", "--out", "o", "--quality-loss", str(weight)]
    )
    loss = lambda certainty, weight: train_qp.dense_loss(
        Knows(truth, certainty), [(Seen(x, mask), truth)], options(weight)
    ).item()
    assert loss(20, 1) == pytest.approx(0, abs=1e-4) and loss(0, 1) > loss(0.5, 1) > loss(20, 1)
    p = torch.full((2, 1, 16, 16), 1 / 3)
    every = [quality_target(mask, one).flatten() for one in (p.expand(2, 2, 16, 16), truth)]
    held = torch.tensor([True, False, True, True])
    wrong = torch.nn.functional.smooth_l1_loss(*(q[held] for q in every), beta=0.1).item()
    assert loss(0, 1) - loss(0, 0) == pytest.approx(wrong, rel=1e-4) and wrong > 0.05


@pytest.mark.parametrize("held", [[True] * 3, [False, False, True]])
def test_temperature_is_that_of_the_least_error(gray, gray_quality, held):
    """Over the classes alone that val holds, which here have another one than all together."""
    info, on = h5.read_info(gray), evaluate.compute("cpu", "off")
    g, _ = checkpoints.load_quality(gray_quality[1], info, on)
    masks = load(gray_quality[0], "real", info, 32)
    train_qp.fit_temperature(g, masks, on, np.array(held))
    saved = torch.load(gray_quality[1], weights_only=True)["weights"]["temperature"]
    assert saved == g.temperature or not all(held)  # what train_qp.py keeps
    torch.manual_seed(1)
    for member in g.members:
        member.head.weight.normal_(0, 3)
    train_qp.fit_temperature(g, masks, on, np.array(held))

    def error(t):
        g.temperature.fill_(t)
        predicted, true, _ = inference.estimate_masks(g, masks, on)
        return np.abs(predicted - true)[:, held].mean()

    best, errors = g.temperature.item(), {t: error(t) for t in train_qp.TEMPERATURES.tolist()}
    assert errors[best] == min(errors.values()) < max(errors.values())


@pytest.mark.parametrize(
    "answer, blind",
    [
        (lambda true: true, False),
        (lambda true: 0.5 + 0.2 * true, False),
        (lambda true: 1 - true, True),
        (lambda true: true * 0 + 0.7, True),
        (lambda true: true[::-1, ::-1] * 0 + [[0.1, 0.9]], True),
    ],
)
def test_a_g_that_learned_nothing(answer, blind):
    true = np.linspace(0, 1, 20).repeat(2).reshape(20, 2)
    assert train_qp.is_blind(answer(true), true) == blind
    assert not train_qp.is_blind(answer(true), true * 0)  # which nobody can follow


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("blind", [True, False])
def test_a_blind_g_is_told_wherever_it_is_used(
    blind, rgb, rgb_quality, tmp_path, monkeypatch, capsys
):
    """A file of an earlier version, which does not say, works without a note."""
    monkeypatch.setattr(train_qp, "is_blind", lambda *_: blind)
    options = "--head scalar --size 32 --width 8 --epochs 1 --batch 16".split()
    train_qp.main([rgb, "--vqm", rgb_quality[0], "--out", str(tmp_path), *options])
    path = str(tmp_path / "qp.pt")
    info, on = h5.read_info(rgb), evaluate.compute("cpu", "off")

    def told():
        capsys.readouterr()
        checkpoints.load_quality(path, info, on)
        return "hardly tells good from bad masks" in capsys.readouterr().out

    assert ("warning: g hardly tells" in capsys.readouterr().out) == blind and told() == blind
    state = torch.load(path, weights_only=True)
    assert state.pop("blind") is blind
    torch.save(state, path)
    assert not told()


def test_image_of_another_case(gray, gray_quality):
    masks = load(gray_quality[0], "val", h5.read_info(gray), 32)
    other = train_qp.of_another_case(masks)
    case = masks.samples.case
    assert len(other) == len(masks.index) and all(
        case[i] != case[j] for i, j in zip(masks.index, other)
    )


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("head, width", [("dense", "4"), ("scalar", "8")])
def test_resumed_equals_uninterrupted(head, width, given, tmp_path, monkeypatch, capsys):
    """Also where it dies in the report, after its last epoch; a finished run says so."""
    options = f"--size 32 --batch 16 --epochs 3 --members 2 --head {head} --width {width}"
    common = [*given, *options.split()]
    train_qp.main([*common, "--out", str(tmp_path / "whole")])
    told = capsys.readouterr().out
    step, calls = train_qp.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) > 5:  # in the third epoch
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_qp, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_qp.main([*common, "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(train_qp, "train_step", step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_qp, "make_report", dies)
        train_qp.main([*common, "--out", str(tmp_path / "parts"), "--resume"])
    assert not (tmp_path / "parts" / "qp.md").exists()
    train_qp.main([*common, "--out", str(tmp_path / "parts"), "--resume"])
    assert "is finished" not in capsys.readouterr().out and (tmp_path / "parts" / "qp.md").exists()
    train_qp.main([*common, "--out", str(tmp_path / "parts")])
    assert "this run is finished (g of epoch" in capsys.readouterr().out
    last = {n: str(tmp_path / n / "last.pt") for n in ("whole", "parts")}
    info = h5.read_info(given[0])
    with pytest.raises(h5.InputError, match="give the qp.pt beside it"):
        checkpoints.load_quality(last["parts"], info, evaluate.compute())
    whole, parts = (torch.load(path, weights_only=True) for path in last.values())
    assert all(torch.equal(whole[w][k], parts[w][k]) for w in ("net", "weights") for k in whole[w])
    assert not all(
        torch.equal(whole["net"][k], whole["weights"][k]) for k in whole["net"]
    )  # g is the moving average
    rows = [
        [
            (r["step"], r["loss"], r["lr"], r["error_real"])
            for r in csv.DictReader(open(tmp_path / n / "log.csv"))
        ]
        for n in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    rates = [float(lr) for _, _, lr, _ in rows[0]]  # a cosine, at the end of each epoch
    first = {"dense": 1e-3, "scalar": 3e-4}[head]
    assert rates == pytest.approx([0.75 * first, 0.25 * first, 0])
    shown = [line.split() for line in told.splitlines() if line.split()[:2] == ["epoch", "loss"]]
    assert shown and figures.read_log(str(tmp_path / "whole" / "log.csv"))["step"].tolist() == [
        1,
        2,
        3,
    ]


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("head", ["dense", "scalar"])
def test_compiled_g_trains_alike(head, rgb, rgb_quality, tmp_path, monkeypatch):
    """With a compiler that only traces."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="eager"))
    for name, more in (("a", []), ("b", ["--compile"])):
        train_qp.main(
            [
                rgb,
                "--vqm",
                rgb_quality[0],
                "--out",
                str(tmp_path / name),
                "--head",
                head,
                *"--width 8 --members 1 --epochs 1 --batch 16".split(),
                *more,
            ]
        )
    a, b = (
        torch.load(tmp_path / name / "qp.pt", weights_only=True)["weights"] for name in ("a", "b")
    )
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)


@pytest.mark.usefixtures("unrendered")
def test_g_sees_slices_at_half_of_the_masks_side(rgb, tmp_path):
    """With the dense head, unless --size says otherwise; but at 64 pixels at least."""
    corrupt.main(
        [
            rgb,
            "--out",
            str(tmp_path),
            *"--labeled 4 --size 144 --masks 2 --val-masks 1 --harvest-epochs 1".split(),
            *"--harvest-steps 1 --harvest-batch 4".split(),
        ]
    )
    for head, side in (("dense", 72), ("scalar", 144)):
        train_qp.main(
            [
                rgb,
                "--vqm",
                str(tmp_path / "vqm.h5"),
                "--out",
                str(tmp_path / head),
                "--head",
                head,
                *"--width 8 --epochs 1 --members 1".split(),
            ]
        )
        assert torch.load(tmp_path / head / "qp.pt", weights_only=True)["model"]["size"] == side
    found = load(str(tmp_path / "vqm.h5"), "val", h5.read_info(rgb), None, shrink=4)
    assert found.mask.shape[1:] == (64, 64)
    assert found.own == (144, 144)


def vqm_of_truths(info, size, path):
    """A vqm.h5 of an identity mask of each val slice, or of a patch of each val volume."""
    if info.dims == 2:
        truths = loading.load_slices(info, "val", size)
    else:
        corners = {e.name: [(1, 2, 3)] for e in info.entries("val")}
        truths = loading.load_patches(info, "val", size, corners)
    with h5py.File(path, "w") as f:
        quality_masks.write_attributes(f, info, spec="all")
        split = quality_masks.create(f, "val", len(truths), len(info.classes), size)
        split["mask"][:], split["dice"][:] = truths.label, 1
        split["case"][:], split["at"][:] = truths.case, truths.at
    return str(path), truths


GRIDS = {  # of masks; of g, and by what the first is divided
    2: (69, [(None, 1), (None, 2), (33, 1), (50, 1), (81, 2)]),
    3: ((17, 33, 31), [(None, 2), ((16, 17, 16), 1), ((17, 20, 31), 1), ((9, 40, 30), 1)]),
}


@pytest.mark.parametrize("kind", ["gray", "rgb", "volumes"])
def test_a_perfect_mask_is_perfect_on_any_grid(kind, request, tmp_path):
    """Truth and masks take the same way to the grid of g, and so do masks that g is asked about."""
    info = h5.read_info(request.getfixturevalue(kind))
    K = len(info.classes)
    own, grids = GRIDS[info.dims]
    path, truths = vqm_of_truths(info, own, tmp_path / "vqm.h5")
    asked = Seen.of_label(truths.batch(torch.arange(len(truths)))[0], truths.label, K)
    for size, shrink in grids:
        found = load(path, "val", info, size, shrink=shrink)
        mask = one_hot(found.mask, K)[:, 1:]
        truth = one_hot(found.samples.label[found.index], K)[:, 1:]
        assert (true_dice(mask, truth) == 1).all() and (quality_target(mask, truth) == 1).all()
        there = asked.on_grid(found.mask.shape[1:])
        assert torch.equal(there.mask, mask) and found.index.tolist() == [*range(len(mask))]
        assert there.image.shape[2:] == found.samples.image.shape[2:] == mask.shape[2:]


@pytest.mark.parametrize("size", [(10, 8, 8), (24, 48, 48), (24, 8, 8)])
def test_a_patch_that_g_is_asked_about_is_resized_like_one_that_it_learned_from(size):
    patch = torch.rand(1, 1, 20, 32, 32)
    learned = quality_masks.resized_image(patch[0].numpy(), size)
    assert torch.allclose(resample(patch, size)[0], learned, atol=1e-6)


@pytest.mark.parametrize("head", ["quality", "quality_dense"])
def test_a_head_sees_hard_masks_hard_and_soft_ones_averaged(head):
    g = models.build(head, channels=1, classes=3, dims=2, size=32, width=8).eval()
    first = next(layer for layer in g.modules() if isinstance(layer, torch.nn.Conv2d))
    shown = []
    first.register_forward_pre_hook(lambda _, x: shown.append(x[0][-2:, -2:]))
    hard = (torch.rand(1, 2, 64, 64) > 0.5).float()
    g(Seen(torch.randn(2, 1, 64, 64), torch.cat([hard, 0.9 * hard])))
    assert set(shown[0][0].unique().tolist()) == {0, 1}
    assert torch.equal(shown[0][0], hard[0, :, 1::2, 1::2])
    assert ((shown[0][1] > 0.1) & (shown[0][1] < 0.8)).float().mean() > 0.8


def test_pretrained_weights(given, tmp_path, refused):
    from models.resnet import ResNet

    torch.manual_seed(9)
    source = ResNet(3)
    torch.save(source.state_dict(), tmp_path / "resnet18.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    common = [*given, "--out", tmp_path / "o", *"--size 32 --epochs 1 --head scalar".split()]
    refused(
        train_qp.main,
        [*common, "--encoder-weights", tmp_path / "other.pt"],
        "other.pt",
        "missing: ",
        "left over: a",
    )
    refused(train_qp.main, [*common, "--pretrained", tmp_path / "none.pt"], "none.pt")
    refused(
        train_qp.main,
        [*common[:-1], "dense", "--encoder-weights", tmp_path / "resnet18.pt"],
        "--head scalar",
    )
    g = evaluate.models.build("quality", channels=3, classes=2)
    checkpoints.load_encoder(g, str(tmp_path / "resnet18.pt"))
    assert torch.equal(g.backbone.layer4[0].conv1.weight, source.layer4[0].conv1.weight)


def test_masks_of_networks_of_other_flips_are_noted(
    gray, gray_quality, tmp_path, capsys, refused, monkeypatch
):
    shutil.copy(gray_quality[0], vqm := str(tmp_path / "vqm.h5"))

    def ends(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_qp, "build_run", ends)  # once the masks are read

    def told(stored, *flip):
        with h5py.File(vqm, "a") as f:
            assert f.attrs.pop("flip") == "H,W"
            f.attrs.update(stored)
        with pytest.raises(KeyboardInterrupt):
            train_qp.main([gray, "--vqm", vqm, "--out", str(tmp_path / "o"), *flip])
        with h5py.File(vqm, "a") as f:
            f.attrs["flip"] = "H,W"
        return capsys.readouterr().out

    none = ["--flip", "none"]
    words = "its networks have seen flips along"
    assert f"note: {vqm}: {words} all axes, but g along no axis; " in told({"flip": "H,W"}, *none)
    assert f"{words} W, but g along all axes; " in told({"flip": "W"})
    assert f"{words} no axis, but g along H; " in told({"flip": "none"}, "--flip", "H")
    assert words not in told({"flip": "none"}, *none) + told({"flip": "H,W"}) + told({}, *none)
    refused(lambda _: told({"flip": "D"}), [], "vqm.h5: --flip D")


def test_bad_input(gray, rgb, rgb_quality, gray_quality, tmp_path, refused):
    out = ["--out", tmp_path / "o", "--size", "32"]
    refused(train_qp.main, [gray, *out], "--vqm")
    refused(train_qp.main, [gray, "--vqm", "none.h5", *out], "none.h5")
    refused(train_qp.main, [gray, "--vqm", gray, *out], "not a file of masks")
    refused(train_qp.main, [gray, "--vqm", rgb_quality[0], *out], "classes")
    refused(train_qp.main, [gray, "--vqm", gray_quality[0], *out, "--batch", "0"], "--batch")
    refused(train_qp.main, [gray, "--vqm", gray_quality[0], *out, "--soft", "1.5"], "--soft")
    refused(
        train_qp.main,
        [gray, "--vqm", gray_quality[0], "--out", os.path.dirname(gray_quality[1]), "--size", "32"],
        "last.pt: was started without --size, not with --size 32;",
        "--overwrite",
    )
    refused(
        train_qp.main,
        [gray, "--vqm", gray_quality[0], "--out", "o", "--head", "scalar", "--width", "4"],
        "--width 4",
        "at least 8",
    )
    phantom.main(
        [
            "--out",
            str(tmp_path / "other.h5"),
            *"--train 6 --val 2 --test 1 --depth 4 --size 48 --seed 1".split(),
        ]
    )
    refused(train_qp.main, [tmp_path / "other.h5", "--vqm", gray_quality[0], *out], "another file")
    shutil.copy(gray_quality[0], tmp_path / "damaged.h5")
    with h5py.File(tmp_path / "damaged.h5", "a") as f:
        del f["real/mask"]
    refused(train_qp.main, [gray, "--vqm", tmp_path / "damaged.h5", *out], "damaged.h5", "/real")
    assert not (tmp_path / "o").exists()


def test_an_epoch_of_one_mask_is_refused(tmp_path, refused):
    """Batch norm needs two. One mask of val is enough for the report, whoever has no share."""
    rng = np.random.default_rng(0)
    label = np.zeros((40, 40), np.uint8)
    label[9:22, 8:20] = 1
    image = (rng.integers(0, 60, (40, 40)) + label * 100).astype(np.uint8)
    splits = ("train", "train", "val")
    cases = [h5.Case(s, f"c{i}", image, label, f"p{i}") for i, s in enumerate(splits)]
    data = str(tmp_path / "d.h5")
    h5.write(data, cases, name="x", classes=["background", "a"], dims=2, channels=1)
    masks = "--labeled 1 --folds 1 --size 32 --masks 4 --val-masks 1"
    harvest = "--harvest-epochs 1 --harvest-steps 2"
    corrupt.main([data, "--out", str(tmp_path), *masks.split(), *harvest.split()])
    files = [data, "--vqm", str(tmp_path / "vqm.h5"), "--out", str(tmp_path / "g")]
    options = "--epochs 1 --members 1 --width 4".split()
    refused(
        train_qp.main, [*files, *options, "--per-image", 1], "1 mask(s), too few", "--per-image"
    )
    train_qp.main([*files, *options])
    assert (tmp_path / "g" / "qp.pt").exists()


def test_a_process_without_a_share_of_the_masks(gray, gray_quality, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "world", lambda: 4)
    masks = load(gray_quality[0], "val", h5.read_info(gray), None)
    g = FakeG(lambda seen: torch.zeros(len(seen), 3), classes=4)
    on = compute("cpu", "off")
    found = inference.estimate_quality(g, inference.judged_masks(masks, 4, on, most=3), on)
    assert [len(v) for v in found] == [0, 0, 0]
