"""Baselines stay healthy: pseudo-labels do not collapse, and an alarm says where they do."""

import csv

import numpy as np
import pytest
import torch

import train_ssl
from data import augment, h5
from models.losses import dice_loss, one_hot


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """Small bright disks in noise, beside a bar as bright.

    Every other image has none, so that empty pseudo-labels are tempting.
    """
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]

    def cases():
        for part, count in (("train", 36), ("val", 12)):
            for i in range(count):
                y, x, radius = rng.uniform(8, 24), rng.uniform(8, 24), rng.uniform(3, 5)
                image, bar = rng.normal(0, 1, (32, 32)), rng.integers(4, 28)
                image[bar : bar + 2] += 2
                disk = ((row - y) ** 2 + (column - x) ** 2 < radius**2) & (i % 2 == 0)
                yield h5.Case(
                    split=part,
                    name=f"{part}{i}",
                    image=(image + 2 * disk).astype(np.float32),
                    label=disk.astype(np.uint8),
                    patient=f"{part}{i}",
                    source="made",
                )

    path = tmp_path_factory.mktemp("disks") / "disks.h5"
    h5.write(path, cases(), name="disks", classes=["background", "disk"], dims=2, channels=1)
    return str(path)


SMALL = "--labeled 2 --size 32 --width 4 --batch 3 --batch-unlabeled 3"


def log_of(data, out, *more):
    size = "--size 32 --width 8 --batch 6 --batch-unlabeled 6 --labeled 8 --strength 0"
    time = "--steps 120 --eval-every 40 --lr 3e-3 --lam-warmup 0.4 --lam-ramp 0"
    train_ssl.main([data, "--out", str(out), *size.split(), *time.split(), *more])
    with open(out / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize(
    "method",
    ["--method bcp --no-largest-component", "--method pseudo_label --lam 1 --conf-threshold 0"],
)
def test_pseudo_labels_do_not_collapse(method, disks, tmp_path):
    """They reach more than .8.

    With the student's batch-norm statistics in the teacher and Dice smoothed by 1, these runs end
    at .50 (nothing is found) and .74.
    """
    last = log_of(disks, tmp_path, *method.split())[-1]
    assert (
        float(last["val_dice"]) > 0.8
        and 0.5 < float(last["share"]) / float(last["share_y"]) < 2
        and not last["note"]
    )


def test_an_image_without_a_class_does_not_pull_toward_empty_predictions():
    """Beside an image with the class, a little soft foreground costs one without it nearly nothing.

    However large its share is there.
    """
    label = torch.zeros(2, 8, 8)
    label[0, 2:6, 2:6] = 1
    logits = 8 * one_hot(label, 2) - 4
    logits[1, 1] = -2.0
    logits.requires_grad_()
    (pull,) = torch.autograd.grad(dice_loss(logits, one_hot(label, 2)), logits)
    alone = logits[1:].detach().requires_grad_()
    p = alone.softmax(1)[:, 1]
    (former,) = torch.autograd.grad(
        1 - 1 / (p.sum() + 1), alone
    )  # Dice of that image by itself, smoothed by 1
    assert pull[1].abs().sum() < former.abs().sum() / 5


ALARMS = [
    (
        {"share": 0.01, "share_y": 0.04},
        0.5,
        0.5,
        "1% of the pseudo-labels' pixels each, 4% of the labels'",
    ),
    ({"share": 0.13, "share_y": 0.04}, 0.5, 0.5, "take 13% of the pseudo-labels' pixels"),
    ({"share": 0.04, "share_y": 0.04}, 0.3, 0.5, "val Dice fell from 0.500 to 0.300"),
    ({"share_y": 0.04}, 0.3, 0.5, "val Dice fell"),
    ({"share": 0.02, "share_y": 0.04}, 0.4, 0.5, ""),
    ({"share": 0.1, "share_y": 0.04}, 0.6, 0.5, ""),
    ({"share_y": 0.04}, 0.0, -1.0, ""),
    ({"share": 0.02, "share_y": 0.0}, 0.5, 0.5, ""),
]


@pytest.mark.parametrize("parts, dice, best, says", ALARMS)
def test_the_alarm(parts, dice, best, says):
    args = train_ssl.parse_args(["d", "--out", "o", "--method", "bcp"])
    line = train_ssl.alarm(parts, dice, best, args)
    assert says in line and bool(line) == bool(says) and "\n" not in line
    assert not line or all(
        remedy in line for remedy in ("a lower --lam,", "a later --lam-warmup", "--weight quality")
    )


def test_the_alarm_names_what_a_run_can_change():
    fell = lambda *more: train_ssl.alarm(
        {"share_y": 0.1}, 0.1, 0.9, train_ssl.parse_args(["d", "--out", "o", *more])
    )
    assert fell().endswith("try a lower --lr") and fell("--qar", "1", "--qp", "g").endswith(
        "try a lower --qar"
    )
    assert "guidance" not in fell("--method", "ict", "--weight", "quality", "--qp", "g")


@pytest.mark.parametrize(
    "weight, says",
    [
        ("quality", "g, or --weight-threshold, rejects (nearly) all pseudo-labels; see qp.md"),
        ("confidence", "--weight-threshold rejects (nearly) all pseudo-labels"),
    ],
)
def test_the_alarm_says_first_that_all_pseudo_labels_are_rejected(weight, says):
    """Then lambda changes nothing, and no advice is about it."""
    guided = ["--method", "ict", "--weight", weight, "--qp", "g"]
    args = train_ssl.parse_args(["d", "--out", "o", *guided])
    fallen = {"share": 0.0, "share_y": 0.04}
    assert train_ssl.alarm(fallen | {"weight": 0.0}, 0.1, 0.9, args) == f"warning: {says}"
    assert "--lam" in train_ssl.alarm(fallen | {"weight": 0.02}, 0.1, 0.9, args)
    assert "share" not in train_ssl.alarm({"share_y": 0.04}, 0.1, 0.9, args)  # lambda is 0
    args = train_ssl.parse_args(["d", "--out", "o", "--method", "bcp", "--paste", "1"])
    assert "rejects" not in train_ssl.alarm(fallen | {"weight": 0.0}, 0.1, 0.9, args)


@pytest.mark.parametrize("method", train_ssl.METHODS)
def test_the_alarm_says_that_no_pixel_is_sure(method):
    """Where a method leaves out unsure pixels, and all are."""
    args = train_ssl.parse_args(["d", "--out", "o", "--method", method])
    parts = dict(share=0.04, share_y=0.04, weight=1.0, unsup=0.0)
    line = train_ssl.alarm(parts, 0.9, 0.9, args)
    leaves_out = ("pseudo_label", "contrastive", "fixmatch", "unimatch", "ua_mt")
    assert ("no pixel of the pseudo-labels is sure enough; " in line) == (method in leaves_out)
    assert ("--conf-threshold" in line) == (method in leaves_out[:4])
    assert train_ssl.alarm(parts | dict(unsup=1e-9), 0.9, 0.9, args) == ""
    before = {name: v for name, v in parts.items() if name not in train_ssl.OF_TERMS}
    assert train_ssl.alarm(before, 0.9, 0.9, args) == ""  # lambda is 0


def test_a_threshold_that_no_pixel_reaches_is_told(gray, tmp_path, capsys):
    run = f"--method fixmatch {SMALL} --steps 2 --eval-every 2 --lam-warmup 0 --lam-ramp 0"
    train_ssl.main([gray, "--out", str(tmp_path), *run.split(), "--conf-threshold", "1"])
    assert "no pixel of the pseudo-labels is sure" in capsys.readouterr().out


def test_a_g_that_rejects_everything_is_told(gray, gray_quality, tmp_path, capsys):
    run = f"--method ict {SMALL} --steps 2 --eval-every 2 --lam-warmup 0 --lam-ramp 0"
    reject = ["--weight", "quality", "--weight-threshold", "1", "--qp", gray_quality[1]]
    train_ssl.main([gray, "--out", str(tmp_path), *run.split(), *reject])
    with open(tmp_path / "log.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["note"].startswith("warning: g, or --weight-threshold, rejects")
    assert row["note"] in capsys.readouterr().out


def test_collapsed_pseudo_labels_are_told_once_and_logged(gray, tmp_path, monkeypatch, capsys):
    """A teacher finds nothing: the line stands once on the screen and in each row of the log.

    The log can still be drawn.
    """
    from data import figures

    nothing = lambda net, image: one_hot(torch.zeros(len(image), *image.shape[2:]), 4)
    monkeypatch.setattr(train_ssl, "probabilities", nothing)
    run = f"--method mean_teacher {SMALL} --steps 6 --eval-every 2 --lam-warmup 0.4 --lam-ramp 0"
    train_ssl.main([gray, "--out", str(tmp_path), *run.split()])
    with open(tmp_path / "log.csv", newline="") as f:
        notes = [row["note"] for row in csv.DictReader(f)]
    told = [
        line
        for line in capsys.readouterr().out.split("\n")
        if line.startswith("warning: foreground classes take 0% of the pseudo-labels' pixels")
    ]
    assert not notes[0] and all(notes[1:]) and told == [notes[1]]
    assert figures.read_log(str(tmp_path / "log.csv"))["share"][1:].tolist() == [0, 0]


def test_the_best_checkpoint_is_of_the_semi_supervised_part(gray, tmp_path, monkeypatch):
    """A validation before lambda sets in belongs to another training, however good it was.

    With a ramp, the first lambda is that of step 4.
    """
    values, told = iter([0.9, 0.8, 0.7, 0.3, 0.4, 0.35]), []
    monkeypatch.setattr(train_ssl, "alarm", lambda parts, dice, peak, args: told.append(peak) or "")
    monkeypatch.setattr(
        train_ssl.inference, "mean_dice", lambda table, held: (next(values), [0.0] * 3)
    )
    run = f"--method ict {SMALL} --steps 6 --eval-every 1 --lam-warmup 0.34 --patience 1"
    train_ssl.main([gray, "--out", str(tmp_path), *run.split()])
    best = torch.load(tmp_path / "best.pt", weights_only=True)["best"]
    assert best == dict(
        dice=0.4, step=5
    )  # patience ended nothing before lambda set in, and the run one validation after its best
    assert told == [-1.0, 0.9, 0.9, 0.9, 0.9, 0.9]  # the alarm compares with the best of all


def test_onset_counts_the_steps_without_lambda():
    def counted(*more):
        args = train_ssl.parse_args(["d", "--out", "o", *map(str, more)])
        return train_ssl.onset(args), sum(
            not train_ssl.step_uses_unlabeled(args, step) for step in range(1, args.steps + 1)
        )

    for warmup in (0, 0.1, 0.25, 0.3, 0.333, 0.99):
        for ramp in (0, 0.1):
            found, steps = counted(
                "--method", "ict", "--steps", 1000, "--lam-warmup", warmup, "--lam-ramp", ramp
            )
            assert found == steps <= 1000 * warmup + 1
    assert counted(
        "--qar", 1, "--qp", "g", "--steps", 100, "--qar-warmup", 0.2, "--qar-ramp", 0
    ) == (20, 20)
    assert (
        counted()[0] == counted("--method", "ict", "--lam", 0)[0] == 0
    )  # there are no unlabeled images


@pytest.mark.parametrize("more", [("--method", "ict"), ("--qar", "0.01", "--qp", "g.pt")])
def test_one_unlabeled_image_of_one_pixel_is_refused(more, gray):
    """QAR sends unlabeled images through f, too, in a supervised run as well."""
    deep = "--model resnet_unet --width 8 --size 32 --batch 2 --batch-unlabeled 1"
    args = train_ssl.parse_args([gray, "--out", "o", *deep.split(), *more])
    with pytest.raises(h5.InputError, match="one image of 32 x 32 is a single pixel"):
        train_ssl.set_defaults(args, info := h5.read_info(gray))
        train_ssl.network_of(args, info)


def test_a_strong_view_of_one_pixel_is_refused(rgb, tmp_path, refused):
    """A batch of one unlabeled image is too small for a network that ends in one pixel.

    Strong views have a pass of their own.
    """
    run = "--method mean_teacher --model resnet_unet --size 32 --batch 2 --batch-unlabeled 1"
    refused(train_ssl.main, [rgb, "--out", tmp_path, *run.split()], "--batch-unlabeled")


def test_strength_0_leaves_images_as_they_are():
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(augment.strong(image, 0), image) and not torch.allclose(
        augment.strong(image, 0.1), image, atol=1e-3
    )


def test_a_run_of_other_losses_is_not_resumed(gray, tmp_path, refused):
    more = f"{SMALL} --steps 4 --eval-every 2".split()
    train_ssl.main([gray, "--out", str(tmp_path), *more])
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["training"]
    torch.save(state | dict(finished=False), tmp_path / "last.pt")
    refused(
        train_ssl.main,
        [gray, "--out", tmp_path, *more, "--resume"],
        "another version",
        "--overwrite",
    )
