"""Every method with every guidance: gradients, invariants, seeds, resuming, schedules, refusals."""

import contextlib
import copy
import csv
import functools
import itertools
import re
import shutil
import types
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, FakeG, python
from torch import nn

import models
import train_ssl
from data import h5, loading, phantom
from models import checkpoints, inference
from models.device import Compute, compute
from models.ema import averaged, update_average
from models.losses import mse_loss, one_hot, seg_loss, weighted_mean
from models.quality import Corrected, with_background

UNLABELED = [m for m in train_ssl.METHODS if m != "supervised"]
KINDS = {
    "binary RGB": (3, 2, (32, 32)),
    "4-class gray": (1, 4, (32, 32)),
    "3-class volumes": (1, 3, (16, 17, 18)),
}  # channels, classes, grid
CPU = torch.device("cpu")
LEVELS = ("image", "class", "pixel")


def options(*more, weight="none", level="image", qar=0.0, method="supervised"):
    common = f"--method {method} --weight {weight} --weight-level {level} --qar {qar}"
    at_once = "--lam 1 --lam-warmup 0 --lam-ramp 0 --qar-warmup 0 --qar-ramp 0 --mc-passes 2"
    qp = ["--qp", "qp.pt"] if weight == "quality" or qar else []
    argv = ["data.h5", "--out", "out", *common.split(), *at_once.split(), *qp, *more]
    return train_ssl.parse_args(argv)


def plain_options(*more):
    return train_ssl.parse_args(["data.h5", "--out", "out", *more])


def halfway(args):
    """Now at the middle of training."""
    trust = 1.0 if args.trust is None else args.trust
    return train_ssl.now_at(args, args.steps // 2 + 1, trust)


def setting(kind, seed=1, count=3, students=1):
    """Students, teacher and a batch."""
    C, K, S = KINDS[kind]
    torch.manual_seed(seed)
    network = dict(name="unet", width=8) if len(S) == 2 else dict(name="vnet", width=2, dropout=0.1)
    nets = [models.build(channels=C, classes=K, dims=len(S), **network) for _ in range(students)]
    teacher = copy.deepcopy(nets[0]).eval().requires_grad_(False)
    with torch.no_grad():  # a teacher of its own mind, on whose answers something depends
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        teacher.head.weight.mul_(
            20 if len(S) == 2 else 200
        )  # and a decided one: UA-MT asks for entropy below ln 2
    x, u, s1, s2 = (torch.randn(count, C, *S) for _ in range(4))
    return nets, teacher, train_ssl.Batch(x, one_hot(torch.randint(K, (count, *S)), K), u, s1, s2)


def constant(value, K):
    """A g that always answers the same."""
    return FakeG(
        dice=lambda seen: torch.full((len(seen), K - 1), value) + 0 * seen.mask.mean(),
        error=lambda seen: torch.full_like(seen.mask[:, 0], 1 - value),
    )


cached_setting = functools.cache(setting)  # of tests that ask nothing of running statistics


def loss_of(kind, g, args):
    """total_loss() halfway. -> scalar, {name: value} of PARTS"""
    nets, teacher, batch = cached_setting(kind, students=train_ssl.STUDENTS.get(args.method, 1))
    torch.manual_seed(7)
    with torch.no_grad():
        loss, parts = train_ssl.total_loss(nets, teacher, g, batch, args, halfway(args))
    return loss, dict(zip(train_ssl.PARTS, parts.tolist(), strict=True))


@functools.cache
def judge(kind):
    """A g that has learned nothing."""
    C, K, S = KINDS[kind]
    shape = dict(channels=C, classes=K, dims=len(S), size=S, width=2, members=1)
    return models.build("quality_dense", **shape).eval().requires_grad_(False)


GUIDANCE = [  # weight, level, lambda of QAR
    ("none", "image", 0.0),
    ("none", "image", 0.1),
    *(("confidence", level, 0.0) for level in LEVELS),
    *(("quality", level, 0.1) for level in LEVELS),
]


@pytest.mark.parametrize(
    "kind, method, weight, level, qar",
    [
        (kind, method, *guidance)
        for i, method in enumerate(train_ssl.METHODS)  # all of them, but of three levels one
        for kind, some in (
            ("4-class gray", (0, 1, 2 + i % 3, 5 + i % 3)),
            ("3-class volumes", (1, 4, 7)),
        )
        for guidance in (GUIDANCE[n] for n in some)
    ],
)
def test_gradient_reaches_every_student_and_nobody_else(kind, method, weight, level, qar):
    nets, teacher, batch = setting(kind, students=train_ssl.STUDENTS.get(method, 1))
    g, at_all = judge(kind), "--weight-threshold 0 --conf-threshold 0".split()
    args = options(*at_all, method=method, weight=weight, level=level, qar=qar)
    loss, parts = train_ssl.total_loss(nets, teacher, g, batch, args, halfway(args))
    loss.backward()
    assert loss.isfinite() and parts.shape == (len(train_ssl.PARTS),) and not parts.requires_grad
    assert all(
        p.grad is not None and p.grad.isfinite().all() for net in nets for p in net.parameters()
    )
    assert all(p.grad is None for frozen in (teacher, g) for p in frozen.parameters())


@pytest.mark.parametrize("kind", ["4-class gray", "3-class volumes"])
@pytest.mark.parametrize("method", train_ssl.METHODS)
def test_gradient_under_mixed_precision(kind, method):
    """In bf16 losses stay float32.

    A pass without gradient before the student's own leaves the casts of autocast usable.
    """
    nets, teacher, batch = setting(kind, students=train_ssl.STUDENTS.get(method, 1))
    on = Compute(torch.device("cpu"), torch.bfloat16)
    for net in (*nets, teacher):
        on.place(net)
    with on.autocast():
        args = options("--conf-threshold", "0", method=method)
        loss, parts = train_ssl.total_loss(nets, teacher, None, batch, args, halfway(args))
    loss.backward()
    assert loss.dtype == parts.dtype == torch.float32 and loss.isfinite()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for net in nets for p in net.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", UNLABELED)
def test_the_unlabeled_loss_alone_reaches_every_student(kind, method):
    nets, teacher, batch = setting(kind, students=train_ssl.STUDENTS.get(method, 1))
    args = options("--conf-threshold", "0", method=method)
    _, terms = train_ssl.METHODS[method](nets, teacher, batch, args, 0.5)
    ones = torch.ones(3, *KINDS[kind][2])
    for term in terms:
        loss = term.loss(ones)
        assert loss.shape == () and loss.requires_grad and not term.label.p.requires_grad
        assert torch.allclose(term.label.p.sum(1), ones, atol=1e-5)
    train_ssl.unlabeled_loss(None, terms, args, CPU)[0].backward()
    assert all(net.head.weight.grad.abs().sum() > 0 for net in nets)


@pytest.mark.parametrize(
    "kind, level",
    [
        *(("4-class gray", level) for level in LEVELS),
        ("binary RGB", "class"),
        ("3-class volumes", "pixel"),
    ],
)
@pytest.mark.parametrize("method", UNLABELED)
def test_a_constant_g_changes_nothing_and_g_of_zero_leaves_the_supervised_loss(kind, method, level):
    K, keep, common = KINDS[kind][1], ("--conf-threshold", "0"), dict(method=method, level=level)
    plain, parts = loss_of(kind, None, options(*keep, method=method))
    weighted, _ = loss_of(kind, constant(0.5, K), options(*keep, weight="quality", **common))
    assert weighted.item() == pytest.approx(plain.item(), abs=2e-6)
    zero, zero_parts = loss_of(kind, constant(0.0, K), options(*keep, weight="quality", **common))
    assert zero.item() == pytest.approx(parts["sup"], abs=1e-7)
    assert zero_parts["unsup"] == zero_parts["weight"] == zero_parts["ess"] == 0
    nan, _ = loss_of(kind, constant(float("nan"), K), options(*keep, weight="quality", **common))
    assert nan.item() == zero.item()  # a g that fails weighs nothing
    assert plain.item() != pytest.approx(parts["sup"], abs=1e-4)


def believing(own):
    """A g that has an opinion of its own, whatever mask it sees."""
    return FakeG(belief=lambda seen: own)


def agreeing():
    """A g that believes in every mask that it sees."""
    return FakeG(belief=lambda seen: with_background(seen.mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", UNLABELED)
def test_what_g_believes_takes_the_place_of_the_pseudo_label(kind, method, monkeypatch):
    C, K, S = KINDS[kind]
    students = train_ssl.STUDENTS.get(method, 1)
    args = options(
        "--conf-threshold",
        "0",
        "--correct",
        "--qp",
        "qp.pt",
        "--no-largest-component",
        method=method,
    )
    nets, teacher, batch = setting(kind, students=students)
    own = torch.rand(3, K, *S).softmax(1)
    g = believing(own)
    made = []
    plain = train_ssl.METHODS[method]
    monkeypatch.setitem(train_ssl.METHODS, method, lambda *a: made.append(plain(*a)) or made[-1])
    train_ssl.total_loss(nets, teacher, g, batch, args, halfway(args))[0].backward()
    ((_, terms),) = made
    assert terms and all(torch.equal(term.label.p, own) for term in terms)
    assert len(g.asked) == students
    for seen in g.asked:
        assert torch.equal(seen.image, batch.u)
        assert set(seen.mask.unique().tolist()) <= {0, 1} and seen.mask.shape == (3, K - 1, *S)
    if method in ("pseudo_label", "mean_teacher", "ua_mt", "ict", "contrastive", "bcp"):
        own_statistics = train_ssl.batch_statistics if method == "bcp" else contextlib.nullcontext
        with own_statistics(teacher):
            label = train_ssl.probabilities(teacher, batch.u).argmax(1)
        assert torch.equal(g.asked[0].mask, one_hot(label, K)[:, 1:])


@pytest.mark.parametrize("method", ["pseudo_label", "cps", "fixmatch", "unimatch", "bcp"])
def test_a_g_that_agrees_changes_no_hard_label(method):
    plain, _ = loss_of("4-class gray", None, options("--conf-threshold", "0", method=method))
    args = options("--conf-threshold", "0", "--correct", "--qp", "qp.pt", method=method)
    agreed, _ = loss_of("4-class gray", agreeing(), args)
    other, _ = loss_of("4-class gray", believing(torch.rand(3, 4, 32, 32).softmax(1)), args)
    assert agreed.item() == pytest.approx(plain.item(), abs=2e-6)
    assert other.item() != pytest.approx(plain.item(), abs=1e-3)


def test_trust_is_the_share_of_what_g_believes():
    _, _, batch = cached_setting("4-class gray")
    p, own = (torch.rand(3, 4, 32, 32).softmax(1) for _ in range(2))
    for trust in (0.25, torch.tensor(0.25)):
        label = replace(batch, g=believing(own), trust=trust).pseudo_label(p)
        assert torch.allclose(label.p, 0.75 * p + 0.25 * own)
        assert torch.equal(label.belief, label.p)


@pytest.mark.parametrize("method", UNLABELED)
def test_without_trust_g_corrects_nothing(method):
    """It is not even asked what it believes; for QW it is asked about the label as it is."""
    plain, _ = loss_of("4-class gray", None, options(method=method))
    g = believing(torch.rand(3, 4, 32, 32).softmax(1))
    args = options("--correct", "--qp", "qp.pt", "--trust", "0", method=method)
    assert loss_of("4-class gray", g, args)[0] == plain and not g.asked
    judge = constant(0.7, 4)
    args = options("--correct", "--trust", "0", method=method, weight="quality")
    assert loss_of("4-class gray", judge, args)[0].item() == pytest.approx(plain.item(), abs=2e-6)
    assert judge.asked


def test_a_corrected_network_says_what_g_makes_of_its_output():
    nets, _, batch = cached_setting("4-class gray")
    own = torch.rand(3, 4, 32, 32).softmax(1)
    g = believing(own)
    net = nets[0].eval()
    p = train_ssl.probabilities(net, batch.u)
    found = Corrected(net, g, 0.5)(batch.u).softmax(1)
    assert torch.allclose(found, (p + own) / 2, atol=1e-6)
    assert torch.equal(g.asked[0].mask, one_hot(p.argmax(1), 4)[:, 1:])


@pytest.mark.parametrize(
    "alone, half, whole, trust",
    [
        (0.6, 0.7, 0.8, 1.0),
        (0.6, 0.8, 0.7, 0.5),
        (0.8, 0.7, 0.6, 0.0),
        (0.8, 0.8, 0.8, 0.0),
        (0.7, 0.8, 0.8, 0.5),
    ],
)
def test_g_is_trusted_as_far_as_val_gains(alone, half, whole, trust, monkeypatch):
    dice = {0.5: half, 1.0: whole}
    monkeypatch.setattr(train_ssl, "val_dice", lambda net, run, val, window: (dice[net.trust], []))
    nets, teacher, _ = cached_setting("4-class gray")
    run = train_ssl.Run(nets, teacher, agreeing(), None, None, None)
    val = train_ssl.Val(None, None, None, None)
    assert train_ssl.best_trust(run, val, alone) == trust


def test_f_and_its_correction_are_compared_in_the_same_windows(monkeypatch):
    """By passes over whole volumes f has .6, by patches .7, as what g corrects there."""
    asked = []

    def val_dice(net, run, val, window):
        asked.append(window.whole)
        return 0.7, []

    monkeypatch.setattr(train_ssl, "val_dice", val_dice)
    nets, teacher, _ = cached_setting("4-class gray")
    run = train_ssl.Run(nets, teacher, agreeing(), None, None, None)
    window = inference.window_of((16, 16, 16), options("--window", "whole"))
    assert train_ssl.best_trust(run, train_ssl.Val(None, None, window, None), 0.6) == 0
    assert asked == [False] * 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["pseudo_label", "cps", "unimatch"])
def test_a_corrected_label_weighs_what_the_same_belief_says_of_it(method, level, monkeypatch):
    """The expected Dice of its classes, or its largest probability.

    g is asked for nothing but its belief, which is all that this one knows.
    """
    own = torch.rand(3, 4, 32, 32).mul(6).softmax(1)
    found = []
    plain = train_ssl.quality_of
    monkeypatch.setattr(train_ssl, "quality_of", lambda *a: found.append(plain(*a)) or found[-1])
    keep = ("--conf-threshold", "0", "--weight-threshold", "0", "--correct")
    args = options(*keep, weight="quality", level=level, method=method)
    loss, parts = loss_of("4-class gray", believing(own), args)
    label, smooth = one_hot(own.argmax(1), 4), 32 * 32 * 1e-4
    q = (2 * (label * own).sum((2, 3)) + smooth) / (label.sum((2, 3)) + own.sum((2, 3)) + smooth)
    whole = q[:, 1:].mean(1, keepdim=True)
    expected = {"image": whole, "class": torch.cat([whole, q[:, 1:]], 1), "pixel": own.amax(1)}
    assert found
    assert all(torch.allclose(answer, expected[level], atol=1e-6) for answer in found)
    assert loss.isfinite() and 0 < parts["weight"] < 1


def test_bcp_tells_what_g_believes_before_the_largest_component():
    nets, teacher, batch = setting("4-class gray")
    own = torch.rand(3, 4, 32, 32).softmax(1)
    batch.g = believing(own)
    args = options("--largest-component", "--correct", "--qp", "qp.pt", method="bcp")
    _, (term,) = train_ssl.bcp(nets, teacher, batch, args, 0.5)
    assert torch.equal(term.label.belief, own)
    assert torch.equal(term.label.p, train_ssl.keep_largest(own))
    assert not torch.equal(term.label.p, own)


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_largest_component_removes_weighs_what_g_believes_of_it(level):
    """BCP removes a blob that g believes in at .9.

    As background it is right with .1, and the label misses a third of the class.
    """
    belief = torch.full((1, 2, 16, 16), 0.01)
    belief[:, 1, 2:6, 2:6], belief[:, 1, 10:12, 10:14] = 0.99, 0.9
    belief[:, 0] = 1 - belief[:, 1]
    kept = train_ssl.keep_largest(belief)
    q = train_ssl.quality_of(None, train_ssl.PseudoLabel(belief, kept, belief), level)
    expected = 2 * 16 * 0.99 / (16 + belief[:, 1].sum())
    if level == "pixel":
        assert q[0, 11, 11] == pytest.approx(0.1) and q[0, 3, 3] == pytest.approx(0.99)
    else:
        assert q[0, 0].item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_qar_is_one_minus_g_and_moves_f_toward_quality(kind):
    C, K, S = KINDS[kind]
    value, _ = loss_of(kind, constant(0.7, K), options(qar=0.1))
    plain, _ = loss_of(kind, None, options())
    assert value.item() - plain.item() == pytest.approx(0.1 * 0.3, abs=1e-6)

    likes_foreground = FakeG(dice=lambda seen: seen.mask.flatten(2).mean(2))
    nets, _, batch = setting(kind)
    background = lambda: nets[0](batch.u).softmax(1)[:, 0].mean().item()
    before = background()
    optimizer = torch.optim.SGD(nets[0].parameters(), 2.0)
    for _ in range(5):
        optimizer.zero_grad()
        train_ssl.qar_loss(likes_foreground, nets, batch.u).backward()
        optimizer.step()
    assert background() < 0.7 * before


def table(answers):
    """A g with given answers: [U, K-1], or [U, *S] of pixels."""

    def dice(seen):
        assert set(seen.mask.unique().tolist()) <= {0.0, 1.0}, "QW shows g the hard label"
        return answers

    return FakeG(dice=dice, error=lambda seen: 1 - answers)


def given_to_loss(g, label, mix):
    """The weights of pixels that a loss is given, whose images were mixed. -> [U, *S]"""
    given = []
    term = train_ssl.Term(label, lambda w: given.append(w) or w.sum(), mix)
    train_ssl.unlabeled_loss(g, [term], options(weight="quality"), CPU)
    return given[0]


def test_weights_by_hand():
    """w = q^2 [q >= .5]: per image by the mean over classes, per class by the pixel's pseudo-class.

    Background pixels have the weight of the image.
    """
    q = torch.tensor([[0.9, 0.3, 0.6], [0.2, 0.4, 0.6]])
    p = one_hot(torch.arange(4).repeat(2, 4, 1), 4) * 0.7 + 0.075  # columns of class 0 1 2 3
    label = train_ssl.PseudoLabel(torch.zeros(2, 1, 4, 4), p)
    weights = lambda g, *more, **how: train_ssl.qw_weights(g, label, options(*more, **how))
    image = weights(table(q), weight="quality")
    assert torch.allclose(image, torch.tensor([0.36, 0.0])[:, None, None].expand(2, 4, 4))
    per_class = weights(table(q), weight="quality", level="class")
    expected = torch.tensor([[0.36, 0.81, 0.0, 0.36], [0.0, 0.0, 0.0, 0.36]])
    assert torch.allclose(per_class[:, 0], expected)
    right = torch.rand(2, 4, 4)
    per_pixel = weights(table(right), weight="quality", level="pixel")
    assert torch.allclose(per_pixel, right**2 * (right >= 0.5), atol=1e-6)
    for level in ("pixel", "image"):
        confident = weights(None, "--weight-threshold", "0.5", weight="confidence", level=level)
        assert torch.allclose(confident, torch.full((2, 4, 4), 0.775**2))
    assert (weights(None, weight="confidence") == 0).all()  # PL-C cuts at .9

    order = torch.tensor([1, 0])
    mix = train_ssl.Mix(order, torch.tensor([0.25, 0.5])[:, None, None])
    w = given_to_loss(table(q), label, mix)
    assert torch.allclose(w[:, 0, 0], torch.tensor([0.75 * 0.36, 0.5 * 0.36]))
    box = torch.zeros(2, 4, 4)
    box[0, :2] = 1  # CutMix: the upper half of the first image shows the second, whose weight is 0
    w = given_to_loss(table(q), label, train_ssl.Mix(order, box))
    assert torch.allclose(w[0], torch.cat([torch.zeros(2, 4), torch.full((2, 4), 0.36)]))
    assert (w[1] == 0).all()


@pytest.mark.parametrize(
    "method, times", [("unimatch", 1), ("fixmatch", 1), ("cps", 2), ("bcp", 1)]
)
def test_g_is_asked_once_for_each_pseudo_label(method, times):
    g = constant(0.8, 2)
    loss_of("binary RGB", g, options("--conf-threshold", "0", weight="quality", method=method))
    assert [len(seen) for seen in g.asked] == [3] * times


def test_the_loss_is_the_weighted_mean_over_samples():
    q, values = torch.tensor([[0.6], [0.8], [0.1]]), torch.tensor([1.0, 2.0, 50.0])
    label = train_ssl.PseudoLabel(torch.zeros(3, 1, 4, 4), torch.full((3, 2, 4, 4), 0.5))
    loss = lambda w: weighted_mean(values[:, None, None].expand(3, 4, 4), w)
    term = train_ssl.Term(label, loss)
    loss, weight, share = train_ssl.unlabeled_loss(table(q), [term], options(weight="quality"), CPU)
    assert loss.item() == pytest.approx((0.36 * 1 + 0.64 * 2) / (0.36 + 0.64))
    assert weight.item() == pytest.approx((0.36 + 0.64) / 3)
    assert share.item() == pytest.approx((0.36 + 0.64) ** 2 / (3 * (0.36**2 + 0.64**2)))
    guided = options(weight="quality")
    alike = table(torch.full((3, 1), 0.7))
    _, weight, share = train_ssl.unlabeled_loss(alike, [term], guided, CPU)
    assert weight.item() == pytest.approx(0.49) and share.item() == pytest.approx(1)
    _, *nothing = train_ssl.unlabeled_loss(table(torch.zeros(3, 1)), [term], guided, CPU)
    assert nothing == [0, 0]


@pytest.mark.parametrize("method", [m for m in UNLABELED if m != "bcp"])
def test_labeled_images_have_passes_of_their_own(method):
    """Batch norm sees no unlabeled image beside a labeled one, nor a strong view beside a weak one.

    (BCP pastes them into each other.)
    """
    nets, teacher, batch = setting("4-class gray", students=train_ssl.STUDENTS.get(method, 1))
    batch.x, batch.u, batch.s1, batch.s2 = (
        torch.full_like(batch.x, kind) for kind in (1.0, 2.0, 3.0, 3.0)
    )  # mixed or cut, a kind stays itself
    seen, encode = [], nets[0].encode
    nets[0].encode = lambda x: seen.append(x) or encode(x)
    train_ssl.METHODS[method](nets, teacher, batch, options(method=method), 0.5)
    assert len(seen) >= 2 and all(len(x.unique()) == 1 for x in seen)


def test_formulas_of_the_methods():
    nets, teacher, batch = setting("4-class gray")
    nets[0].eval()  # no dropout, so that the passes can be repeated
    target, ones = teacher(batch.u).softmax(1), torch.ones(3, 32, 32)
    sup, [term] = train_ssl.mean_teacher(nets, teacher, batch, options(), 0.5)
    assert torch.allclose(sup, seg_loss(nets[0](batch.x), batch.y), atol=1e-5)
    assert torch.allclose(
        term.loss(ones), (nets[0](batch.s1).softmax(1) - target).square().mean(), atol=1e-6
    )
    assert torch.allclose(term.loss(ones), mse_loss(nets[0](batch.s1), target), atol=1e-6)
    limit = target.amax(1).median().item()
    _, [term] = train_ssl.pseudo_label(
        nets, teacher, batch, options("--conf-threshold", str(limit)), 0.5
    )
    sure = (target.amax(1) >= limit).float()
    assert 0.3 < sure.mean() < 0.7
    assert torch.allclose(
        term.loss(ones), seg_loss(nets[0](batch.u), one_hot(target.argmax(1), 4), sure), atol=1e-5
    )


class Echo(nn.Module):
    """A network whose logits are given, [B, K, S, S] or broadcast; it keeps the images it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = nn.Parameter(logits), []

    def encode(self, x):
        self.seen.append(x)
        return [x]

    def decode(self, features):
        return self.logits.expand(len(features[-1]), -1, *features[-1].shape[2:])

    def forward(self, x):
        return self.decode(self.encode(x))


def step_of(method, nets, teacher, batch, *more, t=0.5):
    torch.manual_seed(7)
    return train_ssl.METHODS[method](nets, teacher, batch, options(*more, method=method), t)


def test_ua_mt_trusts_by_entropy():
    """Columns of p = .78, .8, .5, 1 have entropies of .527, .500, ln 2, 0.

    The limit is .521 at t = 0 and ln 2 at t = 1.
    """
    p = torch.tensor([0.78, 0.8, 0.5, 1 - 1e-7])
    teacher = Echo(torch.stack([p.log(), (1 - p).log()])[None, :, None])  # [1, 2, 1, 4]
    image = torch.zeros(2, 1, 4, 4)
    h = train_ssl.uncertainty(teacher, image, 8)
    assert torch.allclose(h[0, 0], torch.tensor([0.5269, 0.5004, 0.6931, 0.0]), atol=1e-4)
    assert len(teacher.seen) == 8 and all(
        0 < x.abs().max() <= 0.2 for x in teacher.seen
    )  # eight times other noise
    assert not torch.equal(teacher.seen[0], teacher.seen[1])
    batch = train_ssl.Batch(image, one_hot(torch.zeros(2, 4, 4), 2), image, image, image)
    student = Echo(torch.zeros(1, 2, 1, 4))
    error = (p - 0.5) ** 2
    for t, sure in ((0.0, [1, 3]), (1.0, [0, 1, 3])):
        _, [term] = step_of("ua_mt", [student], teacher, batch, t=t)
        assert torch.allclose(term.loss(torch.ones(2, 4, 4)), error[sure].mean(), atol=1e-5), t


def test_uncertainty_draws_dropout_and_leaves_the_teacher_as_it_was():
    _, teacher, batch = setting("4-class gray")
    before = copy.deepcopy(teacher.state_dict())
    drops = [m for m in teacher.modules() if isinstance(m, nn.Dropout)]
    hooks, modes = [], []
    hooks = [m.register_forward_hook(lambda m, *_: modes.append(m.training)) for m in drops]
    train_ssl.uncertainty(teacher, batch.u, 2)
    assert (
        all(modes)
        and len(modes) == 2 * len(drops)
        and not any(m.training for m in teacher.modules())
    )
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    for hook in hooks:
        hook.remove()


def test_ict_blends_images_answers_and_weights_alike():
    nets, teacher, batch = setting("4-class gray", count=4)
    echo = Echo(torch.zeros(1, 4, 1, 1))
    _, [term] = step_of("ict", [echo], teacher, batch)
    perm, share = term.mix
    p = teacher(batch.u).softmax(1)
    for i, (j, s) in enumerate(zip(perm.tolist(), share.flatten().tolist())):
        assert torch.allclose(echo.seen[1][i], (1 - s) * batch.u[i] + s * batch.u[j], atol=1e-6)
        error, only = ((1 - s) * p[i] + s * p[j] - 0.25).square().mean(), torch.zeros(4, 32, 32)
        only[i] = 1
        assert term.loss(only).item() == pytest.approx(error.item(), abs=1e-6)
    assert share.std() > 0.05
    assert torch.allclose(term.label.p, p) and term.label.image is batch.u


def test_cps_is_symmetric_and_each_learns_from_the_other():
    nets, teacher, batch = setting("4-class gray", students=2)
    assert not torch.equal(nets[0].head.weight, nets[1].head.weight)
    [net.eval() for net in nets]
    sup, (a, b) = step_of("cps", nets, teacher, batch)
    swapped, (c, d) = step_of("cps", nets[::-1], teacher, batch)
    ones = torch.ones(3, 32, 32)
    assert (
        torch.equal(sup, swapped)
        and torch.equal(a.loss(ones), d.loss(ones))
        and torch.equal(b.loss(ones), c.loss(ones))
    )
    logits = [net(batch.u) for net in nets]
    for term, taught_by in ((a, logits[1]), (b, logits[0])):
        assert torch.allclose(term.label.p, taught_by.softmax(1), atol=1e-5)
    assert torch.allclose(
        a.loss(ones), seg_loss(logits[0], one_hot(logits[1].argmax(1), 4)), atol=1e-5
    )
    assert torch.allclose(
        sup, seg_loss(nets[0](batch.x), batch.y) + seg_loss(nets[1](batch.x), batch.y), atol=1e-5
    )
    a.loss(ones).backward()
    assert nets[0].head.weight.grad.abs().sum() > 0 and nets[1].head.weight.grad is None


def test_contrastive_adds_a_tenth_of_the_contrast():
    nets, teacher, batch = setting("4-class gray")
    nets[0].eval()
    answer = 5 * one_hot(
        (torch.arange(32) // 8).repeat(3, 32, 1), 4
    )  # four classes side by side, p = .98
    teacher.decode = lambda features: answer
    ones = torch.ones(3, 32, 32)
    _, [plain] = step_of("pseudo_label", nets, teacher, batch, "--conf-threshold", "0.5")
    _, [without] = step_of(
        "contrastive", nets, teacher, batch, "--conf-threshold", "0.5", "--contrast-weight", "0"
    )
    _, [tenth] = step_of("contrastive", nets, teacher, batch, "--conf-threshold", "0.5")
    _, [whole] = step_of(
        "contrastive", nets, teacher, batch, "--conf-threshold", "0.5", "--contrast-weight", "1"
    )
    base, contrast = without.loss(ones), whole.loss(ones) - without.loss(ones)
    assert torch.allclose(base, plain.loss(ones), atol=1e-5) and contrast > 0.1
    assert torch.allclose(tenth.loss(ones) - base, 0.1 * contrast, atol=1e-5)
    half = ones.clone()
    half[:, :, 16:] = (
        0  # pixels of no weight have no contrast either: two classes remain, and fewer negatives
    )
    assert whole.loss(half) - without.loss(half) < contrast
    half[:, :, 8:] = 0  # one class remains: none
    assert torch.allclose(whole.loss(half), without.loss(half), atol=1e-6)
    answer[..., 8:] *= 0.1  # the other classes are not confident: one class remains again
    _, [without] = step_of(
        "contrastive", nets, teacher, batch, "--conf-threshold", "0.5", "--contrast-weight", "0"
    )
    _, [whole] = step_of(
        "contrastive", nets, teacher, batch, "--conf-threshold", "0.5", "--contrast-weight", "1"
    )
    assert torch.allclose(whole.loss(ones), without.loss(ones), atol=1e-6)


def test_cutmix_shows_another_sample_in_the_box_and_nowhere_else():
    torch.manual_seed(0)
    u = torch.arange(400.0)[:, None, None, None].expand(400, 2, 20, 20)
    mix = train_ssl.cutmix(u)
    perm, box = mix
    mixed = mix.blend(u)
    target = mix.blend(u[:, 0])
    assert torch.equal(mixed[:, 0], target) and torch.equal(mixed[:, 1], target)
    assert sorted(perm.tolist()) == list(range(400))
    assert torch.equal(target, torch.where(box > 0, perm[:, None, None].float(), u[:, 0]))
    area = box.mean((1, 2))
    assert (
        0.42 < (area > 0).float().mean() < 0.58
        and area[area > 0].min() < 0.1
        and 0.3 < area.max() < 0.48
    )
    assert set(box.unique().tolist()) == {0.0, 1.0}


def test_fixmatch_learns_its_own_label_of_the_weak_view_on_the_strong_one():
    nets, teacher, batch = setting("4-class gray")
    with torch.no_grad():
        torch.manual_seed(7)
        p = copy.deepcopy(nets[0])(batch.u).softmax(1)  # in train mode
    _, [term] = step_of("fixmatch", nets, teacher, batch, "--conf-threshold", "0.5")
    assert torch.allclose(term.label.p, p, atol=1e-5) and not term.label.p.requires_grad
    echo = Echo(torch.randn(1, 4, 1, 1))
    hard = one_hot(echo.logits.argmax(1), 4).expand(3, 4, 32, 32)
    _, [term] = step_of("fixmatch", [echo], teacher, batch, "--conf-threshold", "0")
    perm, box = term.mix
    weak, labeled, shown = echo.seen
    assert (
        torch.equal(weak, batch.u)
        and torch.equal(labeled, batch.x)
        and torch.equal(shown, torch.where(box[:, None] > 0, batch.s1[perm], batch.s1))
    )
    assert torch.allclose(
        term.loss(torch.ones(3, 32, 32)),
        seg_loss(echo.logits.expand(3, 4, 32, 32), hard),
        atol=1e-5,
    )
    certain = echo.logits.softmax(1).max().item() + 0.01  # nothing is confident: nothing is learned
    _, [term] = step_of("fixmatch", [echo], teacher, batch, "--conf-threshold", str(certain))
    assert term.loss(torch.ones(3, 32, 32)) == 0


class Threshold(nn.Module):
    """A network that answers pixel by pixel: logits (0, 3 x)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def encode(self, x):
        return [x]

    def decode(self, features):
        x = features[0][:, :1]
        return torch.cat([0 * x, self.scale * x], 1)

    def forward(self, x):
        return self.decode(self.encode(x))


@pytest.mark.parametrize("method", ["fixmatch", "unimatch"])
def test_labels_and_confidence_are_cut_like_the_image(method):
    """Where strong views are the weak one, a net without context finds its own answers again."""
    _, teacher, batch = setting("binary RGB", count=8)
    batch.s1 = batch.s2 = batch.u
    net = Threshold()
    _, terms = step_of(method, [net], teacher, batch, "--conf-threshold", "0.8")
    for term, weight in zip(terms, {"fixmatch": (1,), "unimatch": (0.25, 0.25)}[method]):
        perm, box = term.mix
        assert box.sum() > 0
        logits = net(torch.where(box[:, None] > 0, batch.u[perm], batch.u))
        p = logits.softmax(1)
        want = weight * seg_loss(logits, one_hot(p.argmax(1), 2), (p.amax(1) >= 0.8).float())
        assert torch.allclose(term.loss(torch.ones(8, 32, 32)), want, atol=1e-6)


def test_unimatch_weighs_its_three_streams_a_quarter_twice_and_a_half():
    _, teacher, batch = setting("4-class gray")
    echo = Echo(torch.randn(1, 4, 1, 1))
    _, terms = step_of("unimatch", [echo], teacher, batch, "--conf-threshold", "0")
    loss = seg_loss(
        echo.logits.expand(3, 4, 32, 32), one_hot(echo.logits.argmax(1), 4).expand(3, 4, 32, 32)
    )
    for term, weight in zip(terms, (0.25, 0.25, 0.5), strict=True):
        assert torch.allclose(term.loss(torch.ones(3, 32, 32)), weight * loss, atol=1e-6)
    assert torch.equal(echo.seen[0], batch.u) and torch.equal(echo.seen[1], batch.x)
    shown = echo.seen[2].split(3)
    for strong, image, term in ((batch.s1, shown[0], terms[0]), (batch.s2, shown[1], terms[1])):
        perm, box = term.mix
        assert torch.equal(image, torch.where(box[:, None] > 0, strong[perm], strong))
    assert terms[2].mix is None


def test_unimatch_drops_half_of_the_channels_of_the_weak_view_only():
    nets, teacher, batch = setting("4-class gray")
    seen = []
    decode = nets[0].decode
    nets[0].decode = lambda features: seen.append(features) or decode(features)
    step_of("unimatch", nets, teacher, batch)
    for weak, labeled, strong in zip(*seen):  # u twice; x; s1, s2
        dropped, *others = (
            (f.flatten(2).abs().sum(2) == 0).float() for f in (weak, labeled, strong)
        )
        assert (
            dropped[:3].mean() < 0.05
            and 0.3 < dropped[3:].mean() < 0.75
            and all(f.mean() < 0.05 for f in others)
        )


@pytest.mark.parametrize("B, U", [(4, 4), (2, 5), (5, 2), (3, 1)])
def test_bcp_pastes_in_both_directions_and_splits_the_loss(B, U):
    torch.manual_seed(3)
    x, u = torch.full((B, 1, 30, 30), 1.0), torch.full((U, 1, 30, 30), -1.0)
    y = one_hot(torch.ones(B, 30, 30), 2)
    echo, teacher = (
        Echo(torch.randn(1, 2, 30, 30)),
        Echo(torch.tensor([2.0, 0.0])[None, :, None, None]),
    )
    sup, [term] = step_of(
        "bcp", [echo], teacher, train_ssl.Batch(x, y, u, u, u), "--no-largest-component"
    )
    n = max(B, U)
    labeled = (echo.seen[0][:, 0] == 1).float()  # [n, 30, 30]
    assert labeled.shape == (n, 30, 30) and set(echo.seen[0].unique().tolist()) == {-1.0, 1.0}
    for i, one in enumerate(
        labeled
    ):  # a box of 20 x 20, of the labeled image or of the unlabeled one
        box = one if i % 2 == 0 else 1 - one
        rows, columns = box.nonzero(as_tuple=True)
        assert box.sum() == 400 and rows.max() - rows.min() == columns.max() - columns.min() == 19
    logits = echo.logits.expand(n, -1, -1, -1)
    assert torch.allclose(sup, seg_loss(logits, y[:1].expand(n, -1, -1, -1), labeled))
    assert term.label.image.shape == (n, 1, 30, 30) and term.label.p.shape == (n, 2, 30, 30)
    for weights in (torch.ones(n, 30, 30), torch.rand(n, 30, 30)):
        assert torch.allclose(
            term.loss(weights),
            seg_loss(logits, one_hot(torch.zeros(n, 30, 30), 2), weights * (1 - labeled)),
            atol=1e-6,
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_bcp_pastes_in_both_directions_also_where_each_process_has_one_image(rank, monkeypatch):
    monkeypatch.setattr(train_ssl.distributed, "rank", lambda: rank)
    monkeypatch.setattr(train_ssl.distributed, "world", lambda: 2)
    monkeypatch.setattr(train_ssl.distributed, "mean", lambda x: x)
    given = []
    monkeypatch.setattr(train_ssl, "seg_loss", lambda logits, y, w: given.append(w))
    nets, teacher, batch = setting("4-class gray", count=1)
    _, [term] = step_of("bcp", nets, teacher, batch, "--no-largest-component")
    term.loss(torch.ones(1, 32, 32))
    labeled, unlabeled = (w.mean().item() for w in given)
    box = (21 / 32) ** 2  # of 2/3 of each side
    assert unlabeled == pytest.approx(box if rank else 1 - box)
    assert labeled == pytest.approx(1 - unlabeled)


@pytest.mark.parametrize("kind", KINDS)
def test_bcps_teacher_takes_the_statistics_of_the_batch(kind):
    """Running statistics, which come from pasted images, do not matter to it, and stay."""
    nets, teacher, batch = setting(kind)
    torch.manual_seed(7)
    _, [term] = step_of("bcp", nets, teacher, batch, "--no-largest-component")
    floats = [b for b in teacher.buffers() if b.is_floating_point()]
    before = [b.clone() for b in floats]
    assert not any(m.training for m in teacher.modules())
    for b in floats:
        b.add_(torch.rand_like(b))
    _, [other] = step_of("bcp", nets, teacher, batch, "--no-largest-component")
    assert torch.equal(term.label.p, other.label.p)
    one, _ = step_of("bcp", nets, copy.deepcopy(teacher), batch)
    assert not torch.allclose(train_ssl.probabilities(teacher, batch.u), term.label.p)
    assert all(not torch.equal(a, b) for a, b in zip(before, floats)) and one.requires_grad
    kept = copy.deepcopy(teacher.state_dict())
    batch.u[0, 0, 0] = torch.inf  # as fp16 may give
    with train_ssl.batch_statistics(teacher):
        train_ssl.probabilities(teacher, batch.u)
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


def test_bcp_warms_up_by_copy_paste_of_labeled_images_and_the_others_supervised():
    _, teacher, batch = setting("4-class gray", count=5)
    echo = Echo(torch.randn(1, 4, 32, 32))
    before = ["--lam-warmup", "0.6"]
    torch.manual_seed(0)
    args = options(*before, method="bcp")
    _, parts = train_ssl.total_loss([echo], teacher, None, batch, args, halfway(args))
    shown = echo.seen[0]
    pasted = (shown != batch.x).any(1)
    assert (
        parts[train_ssl.PARTS.index("unsup")] == 0
        and 0 < pasted.float().mean() < 0.45
        and (pasted.flatten(1).sum(1) <= 21 * 21).all()
    )
    torch.manual_seed(5)
    loss, _ = train_ssl.copy_paste([echo], teacher, batch, options(method="bcp"), 0.5)
    shown, y = echo.seen[-1], torch.zeros_like(batch.y)
    for i, image in enumerate(shown):  # every pixel's label comes from the image that it comes from
        for j in range(5):
            here = (image == batch.x[j]).all(0)
            y[i][:, here] = batch.y[j][:, here]
    assert torch.allclose(loss, seg_loss(echo.logits.expand(5, -1, -1, -1), y), atol=1e-6)
    nets, teacher, batch = setting("4-class gray", students=2)
    args = options(*before, method="cps")
    sup, _ = train_ssl.total_loss(nets, teacher, None, batch, args, halfway(args))
    sup.backward()
    assert all(net.head.weight.grad.abs().sum() > 0 for net in nets)  # both students of CPS warm up


def test_largest_component_of_a_pseudo_label():
    label = torch.zeros(2, 12, 12, dtype=torch.long)
    label[0, 1:5, 1:5], label[0, 8:10, 8:10], label[0, 6, 1:3] = 1, 1, 2
    label[1, 3, 3] = 2
    p = 0.7 * one_hot(label, 3) + 0.1
    kept = train_ssl.keep_largest(p)
    want = label.clone()
    want[0, 8:10, 8:10] = 0
    assert torch.equal(kept.argmax(1), want) and torch.allclose(kept.sum(1), torch.ones(2, 12, 12))
    same = want == label
    assert torch.equal(kept.movedim(1, -1)[same], p.movedim(1, -1)[same])
    assert torch.allclose(
        kept.amax(1), p.amax(1)
    )  # what was removed is trusted as much as it was before
    _, teacher, batch = setting("binary RGB")
    _, [plain] = step_of("bcp", [teacher], teacher, batch, "--no-largest-component")
    _, [largest] = step_of("bcp", [teacher], teacher, batch)
    assert not torch.equal(plain.label.p, largest.label.p)
    assert torch.equal(largest.label.p, train_ssl.keep_largest(plain.label.p))


def test_every_student_is_clipped_by_itself():
    """CPS with a huge gradient in one student leaves the other's step alone."""
    nets, teacher, batch = setting("binary RGB", students=2)
    args = options("--clip", "0.01", method="cps")
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], 0.0)
    on = compute("cpu", "off")
    train_ssl.train_step(
        train_ssl.Run(nets, teacher, None, optimizer, on.scaler(), on), batch, args, 3
    )
    norms = [torch.stack([p.grad.norm() for p in net.parameters()]).norm().item() for net in nets]
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_every_option_is_read():
    files = ("train_ssl.py", "models/checkpoints.py", "models/inference.py")
    source = "".join((ROOT / name).read_text() for name in files)
    unread = [name for name in vars(options()) if not re.search(rf"\bargs\.{name}\b", source)]
    assert not unread


def test_schedules():
    ramp = train_ssl.ramp
    assert [ramp(t, 0.25, 0.5) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.5, 1, 1]
    assert ramp(0.2, 0.25, 0) == 0 and ramp(0.3, 0.25, 0) == 1 and ramp(0, 0, 0) == 1
    args = train_ssl.parse_args(
        ["d", "--out", "o"]
    )  # the paper's 200 epochs: warm-up 15, ramp 30; QAR 30, 40
    assert [200 * v for v in (args.lam_warmup, args.lam_ramp, args.qar_warmup, args.qar_ramp)] == [
        15,
        30,
        30,
        40,
    ]
    before, _ = loss_of(
        "binary RGB",
        None,
        train_ssl.parse_args(
            ["d", "--out", "o", "--method", "mean_teacher", "--lam-warmup", "0.6"]
        ),
    )
    plain, _ = loss_of("binary RGB", None, options())
    assert (
        before.item() == plain.item()
    )  # before its warm-up has passed, every method is the supervised one


def test_the_teacher_averages_weights_and_statistics_and_starts_from_the_student():
    nets, teacher, batch = setting("binary RGB")
    nets[0].down[0][1].running_mean.fill_(3.0)
    before, now = ([v.clone() for v in averaged(net)] for net in (teacher, nets[0]))
    update_average(teacher, nets[0], 10_000, 0.99)
    assert all(
        torch.allclose(new, 0.99 * old + 0.01 * p, atol=1e-6)
        for old, new, p in zip(before, averaged(teacher), now)
    )
    assert torch.allclose(teacher.down[0][1].running_mean, torch.tensor(0.03))
    update_average(teacher, nets[0], 1, 0.99)  # early on the average is short: 1 - 1 / (count + 1)
    again = [0.5 * (0.99 * o + 0.01 * p) + 0.5 * p for o, p in zip(before, now)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again, averaged(teacher)))
    args, on = (
        train_ssl.parse_args(
            ["d", "--out", "o", "--method", "mean_teacher", "--steps", "10", "--lam-warmup", "0.3"]
        ),
        compute("cpu", "off"),
    )
    run = train_ssl.Run(
        nets, teacher, None, torch.optim.SGD(nets[0].parameters(), 0.1), on.scaler(), on
    )
    equal = lambda: [torch.equal(a, b) for a, b in zip(averaged(teacher), averaged(nets[0]))]
    for step in range(1, 6):
        train_ssl.train_step(run, batch, args, step)
        assert all(equal()) == (step <= 4), step  # the first step with lambda is the fifth


# --------------------------------------------------------------------------------------- whole runs


def arguments(data, out, *more):
    flat = h5.read_info(data).dims == 2
    size = ("--size 32 --width 4" if flat else "--size 16,16,32 --width 2 --window whole").split()
    usual = "--labeled 2 --batch 2 --batch-unlabeled 2 --steps 5 --eval-every 2 --lr 1e-3"
    argv = [data, "--out", str(out), *size, *usual.split(), "--lam-warmup", "0", "--mc-passes", "2"]
    return [*argv, *map(str, more)]


def train(data, out, *more):
    train_ssl.main(arguments(data, out, *more))
    return torch.load(out / "last.pt", weights_only=True)


@functools.cache
def guide(data, qp):
    return checkpoints.load_quality(qp, h5.read_info(data), compute("cpu", "off"))[0]


def by_hand(data, qp, *more):
    """The steps of train() alone, without its files. -> args, Run, PARTS of each step"""
    args = train_ssl.parse_args(arguments(data, "out", "--qp", qp, *more))
    info, g, on = h5.read_info(data), guide(data, qp), compute("cpu", "off")
    train_ssl.set_defaults(args, info)
    network = train_ssl.network_of(args, info)
    args.weight_level = args.weight_level or train_ssl.finest_level(g, args)
    images = train_ssl.load_data(info, args, on)
    torch.manual_seed(args.seed)
    run = train_ssl.build_run(network, g, args, on, fresh=True)
    steps = train_ssl.read_steps(*images, args, 0, on)
    parts = [train_ssl.whole_step(run, fetched, info, args, step) for step, fetched in steps]
    return args, run, torch.stack(parts)


def same(a, b):
    return all(
        torch.equal(x[k], y[k])
        for x, y in zip([*a["nets"], a["teacher"]], [*b["nets"], b["teacher"]])
        for k in x
    )


ANY = ("--weight-threshold", 0)  # an f of two steps reaches no other
HOOKS = [
    (),
    ("--weight", "confidence", *ANY),
    ("--weight", "quality", *ANY, "--correct"),
    ("--weight", "quality", *ANY, "--weight-level", "class", "--qar", 0.01),
]
AT_ONCE = "--steps 2 --conf-threshold 0 --lam-ramp 0 --qar-warmup 0 --qar-ramp 0".split()


def check_parts(parts, method, hooks):
    mean = dict(zip(train_ssl.PARTS, parts.mean(0).tolist()))
    assert len(parts) == 2 and parts.isfinite().all()
    assert (mean["qar"] > 0) == ("--qar" in hooks)
    if method != "ua_mt":  # which is certain of no pixel yet
        assert (mean["unsup"] > 0) == (method != "supervised")
    if method != "supervised":
        weight = mean["weight"]
        assert 0 < weight < 1 if "--weight" in hooks else weight == 1


@pytest.mark.parametrize(
    "kind, method, hooks",
    [
        (kind, method, hooks)
        for kind, some in (("gray", HOOKS[:-1]), ("volumes", HOOKS[1:]))
        for method, hooks in itertools.product(train_ssl.METHODS, some)
        if method != "supervised" or "--correct" not in hooks
    ],
)
def test_two_steps_of_everything(kind, method, hooks, request):
    """Every method, weighting and dimension; the last weighting of slices in the runs below."""
    data, (_, qp) = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_quality")
    _, _, parts = by_hand(data, qp, "--method", method, *hooks, *AT_ONCE)
    check_parts(parts, method, hooks)


@pytest.mark.parametrize("method", train_ssl.METHODS)
def test_a_run_of_every_method(method, gray, gray_quality, tmp_path):
    """Its files; and its weights are those of its steps, as the seed fixes what they draw."""
    more = ["--method", method, "--amp", "off", *HOOKS[-1], *AT_ONCE]
    state = train(gray, tmp_path, *more, "--qp", gray_quality[1])
    (row,) = csv.DictReader(open(tmp_path / "log.csv"))
    assert state["step"] == 2 and row["step"] == "2" and (tmp_path / "best.pt").exists()
    assert 0 <= float(row["val_dice"]) <= 1 and list(tmp_path.glob("events.*"))
    assert float(row["val_dice"]) == pytest.approx(state["best"]["dice"], abs=1e-4)
    args, run, parts = by_hand(gray, gray_quality[1], *more)
    check_parts(parts, method, HOOKS[-1])
    weights = [net.state_dict() for net in (*run.nets, run.teacher)]
    assert same(state, dict(nets=weights[:-1], teacher=weights[-1]))
    assert float(row["lam"]) == (0 if method == "supervised" else args.lam)
    logged = [float(row[name] or 0) for name in train_ssl.PARTS]
    assert logged == pytest.approx(parts.mean(0).tolist(), rel=1e-3, abs=1e-4)


def test_kept_checkpoints_are_those_of_their_steps(gray, tmp_path):
    last = train(gray, tmp_path / "a", "--keep", "5,1,3")
    assert sorted(p.name for p in (tmp_path / "a").glob("step*.pt")) == [
        "step1.pt",
        "step3.pt",
        "step5.pt",
    ]
    assert same(torch.load(tmp_path / "a" / "step5.pt", weights_only=True), last)
    third = torch.load(tmp_path / "a" / "step3.pt", weights_only=True)
    assert third["step"] == 3 and not same(third, last)
    train(gray, tmp_path / "a", "--overwrite")
    assert not list((tmp_path / "a").glob("step*.pt"))


def test_the_level_of_a_weight_is_the_finest_that_g_knows_unless_it_is_given(
    rgb, rgb_quality, rgb_scalar, tmp_path
):
    dense, scalar = (
        ("--weight", "quality", "--qp", rgb_quality[1]),
        ("--weight", "quality", "--qp", rgb_scalar),
    )
    for name, hooks, level in (
        ("a", dense, "pixel"),
        ("b", (*dense, "--weight-level", "image"), "image"),
        ("c", scalar, "image"),
        ("d", ("--weight", "confidence"), "image"),
        ("e", (*dense, "--correct"), "image"),
    ):
        state = train(rgb, tmp_path / name, "--method", "mean_teacher", "--steps", 1, *hooks)
        assert state["args"]["weight_level"] == level


def test_a_run_knows_whose_labels_it_has_seen(gray, gray_quality, tmp_path):
    """Its own 2 patients' labels, and through g those of 4."""
    alone = train(gray, tmp_path / "a", "--labeled", 2)["labeled"]
    guided = train(gray, tmp_path / "b", "--labeled", 2, "--qar", 0.01, "--qp", gray_quality[1])[
        "labeled"
    ]
    assert len(alone) == 2 and len(guided) == 4 and set(alone) < set(guided)


def test_trust_is_logged_and_asked_for_after_lambda_sets_in(
    gray, gray_quality, tmp_path, monkeypatch
):
    """Each row has the trust of its steps. --trust stays; at 1 it is --correct up to the first."""
    answers = iter([0.5, 0.0])
    monkeypatch.setattr(train_ssl, "best_trust", lambda *_: next(answers))
    more = ("--method", "fixmatch", "--qp", gray_quality[1], "--eval-every", 1, "--lam-ramp", 0)
    more = (*more, "--steps", 4, "--lam-warmup", 0.5)  # of steps 3 and 4
    state = train(gray, tmp_path / "val", *more, "--correct")
    log = list(csv.DictReader(open(tmp_path / "val" / "log.csv")))
    assert [row["trust"] for row in log] == ["", "", "1", "0.5"]
    assert state["trust"] == 0 and next(answers, "none") == "none"
    fixed = {t: train(gray, tmp_path / t, *more, "--correct", "--trust", t) for t in ("0", "1")}
    plain = train(gray, tmp_path / "plain", *more)
    assert "trust" in log[0] and fixed["1"]["trust"] == 1
    assert same(plain, fixed["0"]) and not same(plain, fixed["1"])
    assert not same(state, fixed["1"]) and not same(state, plain)


@pytest.mark.parametrize("kind", ["gray", "volumes"])
def test_the_trust_of_a_run_is_the_best_on_val(kind, request, tmp_path):
    """Of f as it is in last.pt, asked whole case by whole case."""
    data, (_, qp) = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_quality")
    more = ("--method", "mean_teacher", "--correct", "--qp", qp, "--lam-warmup", 0, "--steps", 2)
    trust = train(data, tmp_path, *more)["trust"]
    on, info = compute("cpu", "off"), h5.read_info(data)
    f, meta = checkpoints.load_run(str(tmp_path / "last.pt"), "student", on)
    args = train_ssl.parse_args(arguments(data, "out"))
    train_ssl.set_defaults(args, info)
    network = train_ssl.network_of(args, info)
    window = inference.window_of(args.size, args)
    cases = inference.Cases(info, "val", args.size)
    dice = {}
    for share in (0.0, 0.5, 1.0):
        net = Corrected(f, guide(data, qp), share) if share else f
        if window:
            window = replace(window, whole=False)  # g knows patches alone
        table = inference.dice_table(net, cases, on, network["classes"], window)
        dice[share] = inference.mean_dice(table, train_ssl.check_val(info))[0]
    assert dice[trust] == pytest.approx(max(dice.values()), abs=1e-3), dice


def test_a_run_of_before_val_chose_the_trust_says_that_it_does_now(
    gray, gray_quality, tmp_path, capsys
):
    more = ("--method", "ict", "--correct", "--qp", gray_quality[1], "--steps", 2)
    state = train(gray, tmp_path, *more)
    assert "so far g alone" not in capsys.readouterr().out
    del state["trust"]
    torch.save(state | dict(finished=False), tmp_path / "last.pt")
    train(gray, tmp_path, *more, "--resume")
    assert "so far g alone corrected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--method mean_teacher",
        "--method cps --optimizer sgd",
        "--method ict",
        "--method fixmatch --correct",
    ],
)
def test_resumed_equals_uninterrupted(words, gray, gray_quality, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl, "best_trust", lambda *_: 0.5)
    guided = ("--weight", "quality", *ANY, "--qp", gray_quality[1])
    more = (*words.split(), *guided, "--steps", 4)
    whole = train(gray, tmp_path / "whole", *more)
    step, calls = train_ssl.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2, in the middle of the next interval
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_ssl, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(gray, tmp_path / "parts", *more)
    monkeypatch.setattr(train_ssl, "train_step", step)
    parts = train(gray, tmp_path / "parts", *more, "--resume")
    assert same(whole, parts) and whole["best"] == parts["best"]
    rows = [
        [
            {k: v for k, v in r.items() if k != "ms"}
            for r in csv.DictReader(open(tmp_path / n / "log.csv"))
        ]
        for n in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


def test_a_run_goes_on_past_an_option_that_it_does_not_know_unless_that_is_on(
    gray, gray_quality, tmp_path, refused
):
    more = ("--method", "ict", "--qp", gray_quality[1])
    state = train(gray, tmp_path, *more, "--steps", 2)
    del state["args"]["correct"], state["args"]["flip"]
    torch.save(state, tmp_path / "last.pt")
    train(gray, tmp_path, *more, "--steps", 2, "--resume")
    train(gray, tmp_path, *more, "--steps", 2, "--resume", "--flip", "H,W")  # the default in words
    flip = lambda argv: train(gray, tmp_path, *more, "--steps", 2, "--flip", "H", *argv)
    refused(flip, ["--resume"], "without --flip, not with --flip H")
    refused(
        lambda argv: train(gray, tmp_path, *more, "--steps", 2, *argv),
        ["--resume", "--correct"],
        "--correct",
    )


@pytest.mark.parametrize(
    "method, sizes, world, said",
    [
        ("bcp", "--batch 1 --batch-unlabeled 4", 1, "--batch leaves one in a step"),
        ("bcp", "--batch 2 --batch-unlabeled 1", 1, ""),
        ("fixmatch", "--batch 4 --batch-unlabeled 1", 1, "--batch-unlabeled leaves one in a step"),
        ("fixmatch", "--batch-unlabeled 2", 2, "--batch-unlabeled leaves one in each process"),
        ("fixmatch", "--batch 1 --batch-unlabeled 2", 1, ""),
        ("mean_teacher", "--batch 1 --batch-unlabeled 1", 1, ""),
    ],
)
def test_a_lone_image_is_noted(method, sizes, world, said, capsys, monkeypatch):
    monkeypatch.setattr(train_ssl.distributed, "world", lambda: world)
    train_ssl.print_ignored(plain_options(*sizes.split(), "--method", method), 0)
    found = capsys.readouterr().out
    assert said in found if said else not found


def test_a_g_that_knows_labels_which_it_must_not_know_is_noted(gray, capsys):
    info = h5.read_info(gray)
    names = {split: [e.name for e in info.entries(split)] for split in ("train", "val", "test")}
    labeled = types.SimpleNamespace(case=names["train"][:2])
    train_ssl.print_taught(info, [*names["train"][:2], "of another file"], labeled)
    assert not capsys.readouterr().out
    train_ssl.print_taught(info, names["train"][1:4], labeled)
    assert capsys.readouterr().out.startswith("note: g has learned from the labels of 2 train")
    train_ssl.print_taught(info, [*names["train"][:2], *names["val"], *names["test"]], labeled)
    said = capsys.readouterr().out
    assert said.startswith("warning: g has learned from the labels of 3 cases of val or test")
    assert said.count("\n") == 1


@pytest.mark.parametrize("weight", ["quality", "confidence"])
def test_a_weight_of_no_pseudo_label_is_noted(weight, capsys):
    for method, noted in (("supervised", True), ("mean_teacher", False)):
        train_ssl.print_ignored(options(weight=weight, method=method), 0)
        assert (f"--weight {weight} weighs nothing" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    "more, noted",
    [
        ("--method mean_teacher --lam-warmup 1", ["pseudo-labels take"]),
        ("--method mean_teacher --lam 0", ["pseudo-labels take"]),
        ("--method mean_teacher --lam-warmup 0.8", []),
        ("--method mean_teacher --lam 0 --qp g --qar 0.1", ["pseudo-labels take"]),
        ("--method mean_teacher --qp g --qar 0.1 --qar-warmup 1", ["QAR takes"]),
        ("--qp g --qar 0.1 --qar-warmup 0.95", ["QAR takes"]),
        ("--lam-warmup 1", []),
    ],
)
def test_losses_that_never_come_in_are_noted(more, noted, capsys):
    train_ssl.print_ignored(options(*more.split(), "--steps", "9"), 0)
    said = capsys.readouterr().out
    assert said.count("no part in 9 steps") == len(noted)
    assert all(f"{words} no part in 9 steps" in said for words in noted)


@pytest.mark.parametrize(
    "more, said",
    [
        ("--method mean_teacher --paste 0.5 --mc-passes 8 --lam 1", "--paste"),
        ("--method mean_teacher --conf-threshold 0.5 --qar-ramp 1", "--conf-threshold, --qar-ramp"),
        ("--method bcp --paste 0.5 --no-largest-component --weight-power 1", "--weight-power"),
        ("--method fixmatch --conf-threshold 0.9 --weight-level class", "--weight-level"),
        ("--lam 0.3", "--lam"),
        ("--labeled-seed 1 --window whole --stride 8,8,8", "--labeled-seed, --stride"),
        ("--labeled 4 --labeled-seed 1 --stride 8,8,8 --blend uniform", ""),
        ("--method unimatch --conf-threshold 0 --lam-ramp 0.5", ""),
    ],
)
def test_options_that_a_run_does_not_read_are_noted(more, said, capsys):
    train_ssl.print_ignored(plain_options(*more.split()), 0)
    found = capsys.readouterr().out
    assert found == (f"note: without effect in this run: {said}\n" if said else "")


def test_a_g_that_nobody_asks_is_noted(capsys):
    for more, noted in (("", True), ("--qar 0.01", False), ("--weight quality", False)):
        train_ssl.print_ignored(plain_options("--qp", "g", "--method", "ict", *more.split()), 0)
        assert ("note: g guides nothing" in capsys.readouterr().out) == noted


def test_a_method_may_have_any_default_of_its_own(monkeypatch, capsys):
    own = dict(lam=0.5, ema=0.9, optimizer="sgd", batch=5, flip="W", largest_component=False)
    monkeypatch.setitem(train_ssl.DEFAULTS, "ict", own)
    found = vars(plain_options("--method", "ict"))
    assert {name: found[name] for name in own} == own
    given = plain_options("--ema", "0.8", "--largest-component", "--method", "ict")
    assert given.ema == 0.8 and given.largest_component and given.optimizer == "sgd"
    assert plain_options("--method", "mean_teacher").ema == 0.99
    own = dict(weight="quality", correct=True, qar=0.01, weight_power=1.0)
    monkeypatch.setitem(train_ssl.DEFAULTS, "ict", own)
    given = plain_options("--qp", "g", "--method", "ict", "--weight", "confidence")
    train_ssl.print_ignored(given, 0)
    assert "without effect" not in capsys.readouterr().out and given.correct
    monkeypatch.setitem(train_ssl.DEFAULTS, "ict", dict(emma=0.9))
    with pytest.raises(KeyError, match="DEFAULTS of ict: emma is no option"):
        plain_options("--method", "ict")


def test_methods_of_which_read_by_tells_are_there():
    known = vars(plain_options())
    for name, methods in train_ssl.READ_BY.items():
        assert name in known and set(methods) <= set(train_ssl.METHODS)


def test_a_step_that_never_comes_is_noted(tmp_path, capsys):
    args = plain_options("--keep", "3,50", "--steps", "9", "--out", str(tmp_path))
    for step in (3, 50):  # 50 is of a run that was replaced
        (tmp_path / f"step{step}.pt").touch()
    for keep, first, said in (([3, 50], 0, "50 is not among 1 to 9"), ([3], 5, ""), ([4], 5, "4 ")):
        args.keep = keep
        train_ssl.print_ignored(args, first)
        found = capsys.readouterr().out
        assert f"step {said}" in found if said else not found


def test_a_finished_run_says_so_and_stays_as_it_is(gray, tmp_path, capsys, monkeypatch, refused):
    train(gray, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for again in ([], ["--resume"]):
        capsys.readouterr()
        train(gray, tmp_path, *again)
        assert "this run is finished (step 5, best val Dice" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    early = tmp_path / "early"
    train(
        gray, early, "--steps", 40, "--lr", 1e-12, "--eval-every", 1, "--patience", 2
    )  # stopped before its last step: finished, too
    capsys.readouterr()
    train(gray, early, "--steps", 40, "--lr", 1e-12, "--eval-every", 1, "--patience", 2, "--resume")
    assert "this run is finished" in capsys.readouterr().out
    step, calls = train_ssl.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_ssl, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(gray, tmp_path, "--overwrite")
    refused(lambda argv: train(gray, tmp_path), [], "unfinished run", "--resume", "--overwrite")
    (tmp_path / "last.pt").rename(
        tmp_path / "step2.pt"
    )  # killed before its first last.pt: with --resume it begins again
    refused(lambda argv: train(gray, tmp_path), [], "no last.pt", "--resume", "--overwrite")
    monkeypatch.setattr(train_ssl, "train_step", step)
    assert train(gray, tmp_path, "--resume")["finished"] and not (tmp_path / "step2.pt").exists()


@pytest.mark.parametrize("share, count", [(1, 5), (1 / 2, 3), (0.4, 2), (0.01, 2)])
def test_qar_is_taken_on_a_share_of_the_images(share, count):
    nets, teacher, batch = setting("4-class gray", count=5)
    g = constant(0.3, 4)
    args = options("--qar-share", str(share), qar=0.1)
    train_ssl.total_loss(nets, teacher, g, batch, args, halfway(args))
    (seen,) = g.asked
    assert torch.equal(seen.image, batch.u[:count])


def test_compiled_networks_train_alike(gray, tmp_path, monkeypatch):
    """With a compiler that only traces; the weights are those of the plain network."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="eager"))
    common = ("--method", "contrastive", "--steps", 2)  # encodes and decodes, also the teacher's
    a, b = (train(gray, tmp_path / str(len(more)), *common, *more) for more in ((), ("--compile",)))
    assert all(
        torch.allclose(u[k].float(), v[k].float(), atol=1e-5)
        for u, v in zip(a["nets"], b["nets"])
        for k in u
    )


def test_geometry_0_moves_no_view(gray):
    """Neither labeled images and their labels, nor weak views, if flips are off, too."""
    info = h5.read_info(gray)
    words = "--out o --size 32 --strength 0 --flip none --geometry".split()
    slices = loading.load_slices(info, "train", 32, None)
    item = slices.fetch(torch.arange(6), torch.rand(6, 3))
    image, label = loading.standardized(item, torch.device("cpu"))
    for geometry, still in (("0", True), ("1", False)):
        args = train_ssl.parse_args([gray, *words, geometry])
        batch = train_ssl.views((item, item, torch.ones(6)), info, args, torch.device("cpu"))
        assert torch.allclose(batch.x, image, atol=1e-4) is still
        assert torch.allclose(batch.u, image, atol=1e-4) is still
        assert torch.equal(batch.y, one_hot(label, 4)) is still


def test_labels_of_unlabeled_cases_have_no_influence(gray, tmp_path):
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        del f["test"]  # nor is the test split opened
        for name in list(f["train"])[2:4]:
            f[f"train/{name}/label"][...] = 1
        for name in list(f["train"])[4:]:
            del f["train"][name]["label"]
    a, b = (
        train(data, tmp_path / n, "--method", "pseudo_label", "--conf-threshold", 0)
        for data, n in ((gray, "a"), (str(tmp_path / "f.h5"), "b"))
    )
    assert same(a, b)


def test_no_unlabeled_case_and_a_second_file(gray, tmp_path, capsys):
    train(gray, tmp_path / "a", "--labeled", "all", "--method", "mean_teacher")
    assert "no unlabeled image" in capsys.readouterr().out
    other = str(tmp_path / "other.h5")
    phantom.main(["--out", other, *"--train 5 --val 1 --depth 4 --size 48 --seed 1".split()])
    copied = str(shutil.copy(gray, tmp_path / "copy.h5"))
    for path, count in ((other, 20), (copied, 24)):
        out = tmp_path / f"of {count}"
        train(gray, out, "--labeled", "all", "--method", "mean_teacher", "--unlabeled", path)
        said = capsys.readouterr().out
        assert f"24 labeled and {count} unlabeled slices" in said
        assert ("unlabeled ones come twice" in said) == (path == copied)


def test_patients_of_val_and_test_in_the_second_file_are_noted(tmp_path, capsys):
    image = lambda seed: np.random.default_rng(seed).random((32, 32), np.float32)

    def write(path, *cases, name="a"):
        path = str(tmp_path / path)
        made = [
            h5.Case(split, f"c{i}", image(seed), np.eye(32, dtype=np.uint8), patient, source=source)
            for i, (split, seed, patient, source) in enumerate(cases)
        ]
        h5.write(path, made, name=name, classes=["background", "x"], dims=2, channels=1)
        return path

    held_out = ("val", 1, "p1", ""), ("test", 2, "p2", ""), ("test", 3, "c3", "s3")
    one = write("a.h5", ("train", 0, "p0", ""), *held_out)
    with h5py.File(one, "a") as f:
        for case in f["test"].values():
            del case["label"]  # nobody looks at labels or pixels
            case["image"][...] = 7
    told = lambda other: (
        train_ssl.second_file(other, h5.read_info(one)),
        capsys.readouterr().out,
    )[1]
    for cases, words in (
        ([("unlabeled", 9, "p2", "")], "such as p2 (unlabeled/c0 beside test/c2; 1 in all)"),
        ([("train", 1, "c0", "")], "such as c0 (train/c0 beside val/c1; 1 in all)"),  # its image
        ([("train", 9, "c0", "s3")], "such as c0 (train/c0 beside test/c3; 1 in all)"),
        (
            [("train", 2, "p2", ""), ("unlabeled", 1, "c1", "")],
            "such as p2 (train/c0 beside test/c2; 2 in all)",
        ),
    ):
        other = write("b.h5", *cases)
        assert f"note: {other}: holds patients of val or test of {one}, {words}: " in told(other)
    fine = [("train", 0, "p0", ""), ("unlabeled", 9, "c1", ""), ("val", 1, "p1", "")]
    assert "holds patients" not in (said := told(write("b.h5", *fine))) and "names" not in said
    alike = [("train", 8, "c0", ""), ("train", 7, "c1", ""), ("train", 9, "c2", "")]
    alike += [("unlabeled", 6, "c3", "s3")]  # another dataset, whose cases are numbered, too
    said = told(write("b.h5", *alike, name="b"))
    assert "holds patients" not in said
    assert f"with names of val or test of {one}, such as c1 (3 in all): if they are the" in said


@pytest.mark.parametrize("cache", ["ram", "off"])
def test_a_supervised_run_reads_no_unlabeled_image(cache, gray, tmp_path, capsys):
    """Their numbers may be damaged, and no lambda is logged. QAR does look at them."""
    shutil.copy(gray, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as f:
        for name in list(f["train"])[2:]:
            f[f"train/{name}/image"][...] = float("nan")
    broken = str(tmp_path / "f.h5")
    a, b = (
        train(data, tmp_path / n, "--labeled", 2, "--cache", cache, "--workers", 0)
        for data, n in ((gray, "a"), (broken, "b"))
    )
    assert same(a, b)
    told = capsys.readouterr().out
    assert "16 unlabeled slices, not used" in told and "8 labeled slices (" in told
    with open(tmp_path / "a" / "log.csv", newline="") as f:
        assert {float(row["lam"]) for row in csv.DictReader(f)} == {0}
    qp = tmp_path / "g.pt"
    args = train_ssl.parse_args(
        [broken, "--out", "o", "--size", "32", "--labeled", "2", "--qar", "1", "--qp", str(qp)]
    )
    args.cache = "ram"
    info = h5.read_info(broken)
    train_ssl.set_defaults(args, info)
    with pytest.raises(h5.InputError, match="NaN"):
        train_ssl.load_data(info, args, compute("cpu", "off"))


def test_samples_are_counted_without_reading_them(gray, volumes, rgb):
    counted = [
        train_ssl.count_samples([(h5.read_info(data), "train", None)])
        for data in (gray, volumes, rgb)
    ]
    assert counted == [24, 6, 9]
    info = h5.read_info(gray)
    names = [info.entries("train")[0].name]
    assert train_ssl.count_samples([(info, "train", names), (info, "val", None)]) == 4 + 8


def test_fewer_labeled_slices_than_the_batch(gray, tmp_path):
    assert (
        train(gray, tmp_path, "--labeled", 1, "--batch", 11, "--method", "pseudo_label")["step"]
        == 5
    )


@pytest.mark.parametrize("dice, warns", [(0.0, True), (0.01, True), (0.02, False)])
def test_a_run_that_learned_nothing_says_what_to_look_at(
    dice, warns, gray, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(inference, "dice", lambda *_: dice)
    train(gray, tmp_path, "--steps", 1)
    *_, before, last = capsys.readouterr().out.strip().split("\n")
    assert last.startswith("next: ")
    assert before.startswith("warning: val Dice was never above 0.01") == warns
    assert not warns or f"look at the labels (python -m data.h5 {gray} --preview" in before


def test_patience_stops_early(gray, tmp_path):
    state = train(gray, tmp_path, "--steps", 40, "--lr", 1e-12, "--eval-every", 1, "--patience", 2)
    assert state["step"] < 40


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    gray, tmp_path, monkeypatch, refused
):
    calls, good = [], []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            good.append((tmp_path / "last.pt").read_bytes())
        return seg_loss(*args) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(train_ssl, "seg_loss", breaks)
    refused(lambda argv: train(gray, tmp_path, *argv), [], "not finite", "--lr")
    assert (tmp_path / "last.pt").read_bytes() == good[0]


def test_refusals(gray, rgb, rgb_quality, rgb_scalar, tmp_path, refused):
    out = ["--out", tmp_path / "o", "--size", "32"]
    refused(train_ssl.main, [gray, *out, "--weight", "quality"], "--qp")
    refused(train_ssl.main, [gray, *out, "--qar", "0.1"], "--qp")
    refused(
        train_ssl.main, [gray, *out, "--method", "ict", "--correct"], "--correct needs the qp.pt"
    )
    refused(train_ssl.main, [rgb, *out, "--correct", "--qp", rgb_quality[1]], "no pseudo-label")
    refused(train_ssl.main, [rgb, *out, "--method", "ict", "--trust", "1"], "--trust needs")
    refused(
        train_ssl.main,
        [rgb, *out, "--method", "ict", "--correct", "--qp", rgb_scalar],
        "--correct needs train_qp.py --head dense",
    )
    refused(
        train_ssl.main,
        [gray, *out, "--weight", "quality", "--qp", rgb_quality[1]],
        "qp.pt",
        "classes",
    )
    refused(train_ssl.main, [rgb, *out, "--weight", "quality", "--qp", rgb_quality[0]], "vqm.h5")
    refused(
        train_ssl.main,
        [rgb, *out, "--weight", "quality", "--weight-level", "pixel", "--qp", rgb_scalar],
        "scalar head",
        "--head dense",
    )
    refused(train_ssl.main, [gray, *out, "--method", "nonsense"], "nonsense")
    refused(train_ssl.main, [gray, *out, "--unlabeled", rgb], "channel", "; convert both")
    refused(train_ssl.main, [gray, *out, "--ema", "1"], "--ema")
    shutil.copy(gray, tmp_path / "no_val.h5")
    with h5py.File(tmp_path / "no_val.h5", "a") as f:
        del f["val"]
    refused(train_ssl.main, [tmp_path / "no_val.h5", *out], "'val' is empty")
    shutil.copy(gray, tmp_path / "no_train.h5")
    with h5py.File(tmp_path / "no_train.h5", "a") as f:
        del f["train"]
    argv = [gray, *out, "--method", "ict", "--unlabeled", tmp_path / "no_train.h5"]
    refused(train_ssl.main, argv, "has no image in train or unlabeled; leave it out")
    shutil.copy(gray, tmp_path / "dice.h5")
    with h5py.File(tmp_path / "dice.h5", "a") as f:
        f.attrs["classes"] = ["background", "dice", "b", "c"]
    refused(train_ssl.main, [tmp_path / "dice.h5", *out], "has a class 'dice'", "another name")
    assert not (tmp_path / "o").exists()


def test_another_run_is_not_gone_on_with(gray, tmp_path, refused):
    other = str(tmp_path / "other.h5")
    phantom.main(["--out", other, *"--train 6 --val 2 --depth 4 --size 48 --seed 1".split()])
    train(gray, tmp_path / "o")
    again = lambda argv: train(gray, tmp_path / "o", *argv)
    refused(again, ["--steps", "6"], "was started with --", "--overwrite", "another --out")
    refused(again, ["--resume", "--lr", "0.5"], "with --lr 0.001, not with --lr 0.5")
    refused(again, ["--resume", "--overwrite"], "choose one")
    refused(lambda argv: train(other, tmp_path / "o", *argv), ["--resume"], "other data")


def test_an_option_that_was_not_given_is_called_so(gray, tmp_path, refused):
    train(gray, tmp_path / "o", "--flip", "none")
    again = lambda argv: train(gray, tmp_path / "o", "--resume", *argv)
    refused(again, [], "with --flip none, not without --flip; give the same, or replace it")
    train(gray, tmp_path / "o", "--overwrite")
    refused(again, ["--flip", "H"], "was started without --flip, not with --flip H")
    refused(again, ["--compile"], "was started without --compile, not with --compile;")
    state = torch.load(tmp_path / "o" / "last.pt", weights_only=True)
    del state["data"]["spacing"]  # an older run
    for name in ("geometry", "compile", "lam"):  # options that it did not know
        del state["args"][name]
    torch.save(state, tmp_path / "o" / "last.pt")
    again([])
    refused(again, ["--geometry", "2"], "was started without --geometry, not with --geometry 2")
    refused(again, ["--compile"], "was started without --compile, not with --compile;")


def test_overwrite_leaves_nothing_of_the_former_run(gray, tmp_path, monkeypatch):
    train(gray, tmp_path)

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ssl, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(gray, tmp_path, "--overwrite")
    assert not list(tmp_path.glob("*.pt")) and len(list(tmp_path.glob("events.*"))) == 1


def test_a_command_that_is_refused(gray, tmp_path):
    """Without a traceback; tests/test_interrupted.py has one that works."""
    done = python("train_ssl.py", gray, "--out", tmp_path / "o", "--size", "31")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--size" in done.stderr
