"""Networks, losses and the target of g, against closed forms and published sizes."""

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import models
from models.device import Compute, channels_last, restore_scaler
from models.losses import (
    harden,
    label_map,
    mse_loss,
    one_hot,
    pixel_contrast,
    seg_loss,
    soft_dice,
)
from models.quality import (
    SMOOTH_SHARE,
    Seen,
    certainty,
    confidence,
    expected_dice,
    foreground,
    overlap,
    quality_target,
    region_confidence,
    together,
    true_dice,
    with_background,
)

torch.manual_seed(0)


@pytest.mark.parametrize(
    "name, S",
    [
        (name, S)
        for name in models.segmentation_networks()
        if name != "smp:*"
        for S in ((40, 32), (64, 32), (32, 24, 24))
        if name != "swin_unet" or S == (64, 32)
    ],
)
def test_contract_of_segmentation_networks(name, S):
    width = {"unet": 16, "vnet": 16, "swin_unet": 12}.get(name, 8)
    net = models.build(name, channels=3, classes=4, dims=len(S), width=width).eval()
    x = torch.randn(2, 3, *S)
    features = net.encode(x)
    assert isinstance(features, list) and net(x).shape == (2, 4, *x.shape[2:])
    assert torch.equal(net(x), net.decode(features))
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    again = models.rebuild(net.config, net.state_dict()).eval()
    assert torch.equal(again(x), net.eval()(x))


def test_unet_has_the_size_of_the_acdc_baselines():
    net = models.build("unet", channels=1, classes=4)
    assert models.parameters(net) == pytest.approx(1.81e6, rel=0.01)
    assert [f.shape[1] for f in net.encode(torch.zeros(2, 1, 32, 32))] == [16, 32, 64, 128, 256]
    assert [m.p for m in net.down.modules() if isinstance(m, torch.nn.Dropout)] == [
        0.05,
        0.1,
        0.2,
        0.3,
        0.5,
    ]


@pytest.mark.parametrize(
    "grid", [(1, 1), (2, 2), (2, 6, 6), (1, 1, 1), (6, 2, 2), (4, 4, 1), (4, 6, 6)]
)
def test_gradients_of_small_grids_in_bfloat16(grid):
    """Ours are those of float32 but for the rounding of bfloat16, of a copied network, too.

    On CPUs with AVX-512 BF16 (on others this cannot fail) torch's own are garbage there, often
    finite. The first kernel of a ResNet (7) sees at least 16 pixels a side.
    """
    on = Compute(torch.device("cpu"), torch.bfloat16)
    net = copy.deepcopy(
        on.place(
            models.build(
                "resnet_unet", channels=2, classes=3, dims=len(grid), width=8, encoder="resnet18"
            )
        )
    )
    kinds = {
        (m.kernel_size[0], m.stride[0]): m
        for m in net.modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))
    }
    for conv in (kinds[3, 1], kinds[3, 2]):
        x = torch.randn(2, conv.in_channels, *grid, generator=torch.Generator().manual_seed(0))
        found = []
        for precision in (on, Compute(on.device, None)):
            conv.zero_grad()
            with precision.autocast():
                out = conv(channels_last(x)).float()
            (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
            found.append(conv.weight.grad)
        assert (found[0] - found[1]).norm() < 0.03 * found[1].norm(), (conv, grid)


def test_an_unknown_network_raises():
    with pytest.raises(KeyError):
        models.build("nonsense", channels=1, classes=2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["quality", "quality_dense"])
def test_g_answers_for_each_foreground_class_at_any_size(name, dims):
    sides = {2: (32, 48), 3: (16, 20)}[dims]
    g = models.build(name, channels=1, classes=4, dims=dims, size=sides[0], width=8).eval()
    for side in sides:
        mask = torch.rand(2, 3, *[side] * dims, requires_grad=True)
        q = g(Seen(torch.randn(2, 1, *[side] * dims), mask))
        assert q.shape == (2, 3) and q.dtype == torch.float32 and (0 < q).all() and (q < 1).all()
        q.sum().backward()
        assert mask.grad.abs().sum() > 0


def test_soft_dice_of_hard_masks_is_dice():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 3, 9, 11)) < 0.4, rng.random((2, 3, 9, 11)) < 0.5
        ours = soft_dice(torch.tensor(a), torch.tensor(b), smooth=0.0)
        plain = 2 * (a & b).sum((2, 3)) / (a.sum((2, 3)) + b.sum((2, 3)))
        assert np.allclose(ours, plain, atol=1e-6)


def test_target_of_g_for_absent_classes():
    """An absent class: 1 for an empty mask, falling with the invented area, without a jump.

    Close to Dice for a present one.
    """
    side, none = 100, torch.zeros(1, 1, 100, 100)
    s, last = SMOOTH_SHARE * side * side, 1.0
    assert quality_target(none, none) == 1
    for n in (1, 10, 100, 1000):
        mask = none.clone()
        mask.view(-1)[:n] = 1
        q = quality_target(mask, none).item()
        assert q == pytest.approx(s / (n + s), rel=1e-5) and q < last
        last = q
    a, b = none.clone(), none.clone()
    a[..., :40, :40], b[..., 10:50, :40] = 1, 1
    assert quality_target(a, b).item() == pytest.approx(0.75, abs=0.0002)
    assert (
        true_dice(a, b) == 0.75
        and true_dice(none, none) == 1
        and true_dice(a, none) == true_dice(none, a) == pytest.approx(0, abs=1e-8)
    )


def random_probabilities(*shape):
    return (4 * torch.randn(shape)).softmax(1)


def test_expected_dice_is_what_random_truths_have_on_average():
    """Truths drawn pixel by pixel from the probabilities have the expected Dice on average.

    They have it at any quality of the mask.
    """
    torch.manual_seed(0)
    p = random_probabilities(1, 2, 32, 32)
    truths = (torch.rand(2000, 1, 32, 32) < p[:, 1:]).float()
    for mask in ((p[:, 1:] > 0.5).float(), (p[:, 1:] > 0.9).float(), (p[:, 1:] < 0.5).float()):
        assert quality_target(mask, p[:, 1:]).item() == pytest.approx(
            true_dice(mask.expand_as(truths), truths).mean().item(), abs=2e-3
        )


def test_estimates_of_quality_by_hand():
    p = torch.tensor([[0.9, 0.2, 0.3, 0.5], [0.1, 0.7, 0.1, 0.3], [0.0, 0.1, 0.6, 0.2]])[
        None, :, None
    ]  # K = 3, 1 x 4 pixels: 0 1 2 0
    assert foreground(p).tolist() == [[[[0, 1, 0, 0]], [[0, 0, 1, 0]]]]
    assert torch.allclose(confidence(p), torch.full((1, 2), (0.9 + 0.7 + 0.6 + 0.5) / 4))
    assert torch.allclose(region_confidence(p), torch.tensor([[0.7, 0.6]]))
    s = 4e-4
    own = torch.tensor([[(1.4 + s) / (1 + 1.2 + s), (1.2 + s) / (1 + 0.9 + s)]])
    assert torch.allclose(expected_dice(p), own)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(1).mean().item()
    by_g = torch.tensor([[0.2, 0.6]])
    by_both = (by_g + own) / 2 * (1 - entropy / np.log(3))
    assert torch.allclose(together(by_g, foreground(p), p), by_both)
    sure, flat = one_hot(torch.zeros(1, 1, 4), 3), torch.full((1, 3, 1, 4), 1 / 3)
    assert torch.allclose(certainty(sure), torch.ones(1, 2)) and torch.allclose(
        certainty(flat), torch.zeros(1, 2), atol=1e-6
    )
    assert torch.allclose(region_confidence(sure), torch.ones(1, 2)) and torch.allclose(
        expected_dice(sure), torch.ones(1, 2)
    )  # agreed: absent
    assert torch.allclose(overlap(p, sure), torch.zeros(1, 2), atol=1e-3) and torch.allclose(
        overlap(p, p), torch.ones(1, 2)
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_dense_head(dims):
    """Expected Dice under the members' mean; a withheld mask is not an empty one.

    Gradient reaches the mask; the error map is 1 - p.
    """
    torch.manual_seed(0)
    S = {2: (32, 32), 3: (20, 20, 20)}[dims]
    g = models.build("quality_dense", channels=1, classes=3, dims=dims, width=4, members=2).eval()
    image, mask = torch.randn(2, 1, *S), one_hot(torch.randint(3, (2, *S)), 3)[:, 1:]
    seen = Seen(image, mask)
    p = g.truth(seen)
    assert p.shape == (2, 3, *S) and torch.allclose(p.sum(1), torch.ones(2, *S), atol=1e-5)
    views = [torch.cat([image, v], 1) for v in (with_background(mask), torch.zeros(2, 3, *S))]
    assert g.temperature == 1
    g.temperature.fill_(1.5)
    p, by_hand = (
        g.truth(seen),
        sum((m(v) / 1.5).softmax(1) for m in g.members for v in views) / 4,
    )
    assert torch.allclose(p, by_hand, atol=1e-5) and torch.allclose(
        g(seen), quality_target(mask, by_hand[:, 1:]), atol=1e-5
    )
    assert not torch.allclose(
        g.members[0](views[1]),
        g.members[0](torch.cat([image, with_background(0 * mask)], 1)),
        atol=1e-3,
    )
    label = torch.cat([1 - mask.sum(1, keepdim=True), mask], 1).argmax(1, keepdim=True)
    assert torch.allclose(g.error(seen), 1 - p.gather(1, label)[:, 0], atol=1e-5)
    assert torch.allclose(
        g.belief(seen), sum((m(views[0]) / 1.5).softmax(1) for m in g.members) / 2, atol=1e-5
    )  # having seen the mask
    soft = mask.clone().requires_grad_()
    g(Seen(image, soft)).sum().backward()
    assert soft.grad.abs().sum() > 0
    g.size = 16  # its own grid: the error map comes back to the mask's
    error = g.error(seen)
    assert error.shape == (2, *S) and (error > -1e-5).all() and (error < 1 + 1e-5).all()


@pytest.mark.parametrize("dropout, depends", [(1.0, False), (0.5, True), (0.0, True)])
def test_a_dense_head_that_never_saw_masks_does_not_look_at_them(dropout, depends):
    torch.manual_seed(0)
    g = models.build(
        "quality_dense", channels=3, classes=2, width=4, members=1, mask_dropout=dropout
    ).eval()
    image = torch.randn(1, 3, 32, 32)
    a = Seen(image, torch.zeros(1, 1, 32, 32))
    b = Seen(image, torch.ones(1, 1, 32, 32))
    assert (
        torch.allclose(g.truth(a), g.truth(b)) != depends
        and torch.allclose(g.belief(a), g.belief(b)) != depends
    )


@pytest.mark.parametrize("soft", [False, True])
def test_what_g_sees_of_an_output_of_f(soft):
    """The mask is p, or hard; its background joins it only where it may be withheld."""
    image, p = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 8, 8).softmax(1)
    seen = Seen.of_probabilities(image, p, soft=soft)
    assert torch.equal(seen.mask, p[:, 1:] if soft else one_hot(p.argmax(1), 3)[:, 1:])
    assert soft or torch.equal(seen.mask, Seen.of_label(image, p.argmax(1), 3).mask)
    assert torch.equal(seen.joined(), torch.cat([image, seen.mask], 1))
    of_both = seen.joined(torch.tensor([1.0, 0.0]))
    assert torch.equal(of_both[:, :1], image) and of_both[1, 1:].abs().sum() == 0
    assert torch.allclose(of_both[0, 1:].sum(0), torch.ones(8, 8))


@dataclass(eq=False)
class Doubted(Seen):
    """What g sees if it has a third input."""

    doubt: torch.Tensor  # [B, 1, *S]

    def joined(self, shown=None):
        return torch.cat([super().joined(shown), self.doubt], 1)


@pytest.mark.parametrize("name", ["quality", "quality_dense"])
@pytest.mark.parametrize("S, size", [((32, 32), 16), ((16, 32, 32), (16, 16, 16))])
def test_a_field_that_joins_what_g_sees_reaches_both_heads(name, S, size, monkeypatch):
    """At the width that channels() counts, and on g's own grid."""
    channels = Seen.channels
    monkeypatch.setattr(Seen, "channels", lambda *counts: channels(*counts) + 1)
    torch.manual_seed(0)
    g = models.build(name, channels=1, classes=3, dims=len(S), size=size, width=8).eval()
    mask = one_hot(torch.randint(3, (2, *S)), 3)[:, 1:]
    seen = Doubted(torch.randn(2, 1, *S), mask, torch.rand(2, 1, *S))
    other = g(replace(seen, doubt=torch.rand(2, 1, *S)))
    assert g(seen).shape == (2, 2) and not torch.equal(g(seen), other)


def test_the_default_g_is_small():
    for classes, channels in ((2, 3), (4, 1)):
        assert models.parameters(
            models.build("quality_dense", channels=channels, classes=classes)
        ) == pytest.approx(5.44e6, rel=0.01)


def test_seg_loss_equals_an_independent_formula():
    """Cross-entropy of all pixels and the Dice of each class, pooled over the batch.

    Weights stand inside the sums.
    """
    logits, label, w = torch.randn(3, 4, 8, 9), torch.randint(4, (3, 8, 9)), torch.rand(3, 8, 9)
    p = logits.softmax(1)
    for weight in (torch.ones(3, 8, 9), w):
        ce = (
            torch.nn.functional.cross_entropy(logits, label, reduction="none") * weight
        ).sum() / weight.sum()
        dice = [
            2
            * (weight * p[:, k])[label == k].sum()
            / ((weight * p[:, k] ** 2).sum() + weight[label == k].sum())
            for k in range(4)
        ]
        assert seg_loss(logits, one_hot(label, 4), weight).item() == pytest.approx(
            ((ce + 1 - sum(dice) / 4) / 2).item(), rel=1e-5
        )
    assert torch.equal(
        seg_loss(logits, one_hot(label, 4)),
        seg_loss(logits, one_hot(label, 4), torch.ones(3, 8, 9)),
    )


@pytest.mark.parametrize("loss", [seg_loss, mse_loss])
def test_pixel_weights(loss):
    """Constant weights change nothing, zero weight is zero loss.

    A pixel of no weight has no influence and no gradient.
    """
    logits, target = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8).softmax(1)
    ones = torch.ones(2, 8, 8)
    for c in (1e-3, 0.49, 1.0):
        assert torch.allclose(loss(logits, target), loss(logits, target, c * ones), atol=1e-6)
    assert loss(logits, target, 0 * ones) == 0
    weight = ones.clone()
    weight[:, :4] = 0
    value = loss(logits, target, weight)
    changed = logits.detach().clone()
    changed[:, :, :4] += 3
    assert torch.allclose(value, loss(changed, target, weight), atol=1e-6)
    assert (torch.autograd.grad(value, logits)[0][:, :, :4] == 0).all()


def test_losses_are_float32_whatever_comes_in():
    logits = torch.randn(2, 3, 8, 8).bfloat16()
    target = one_hot(torch.randint(3, (2, 8, 8)), 3)
    assert seg_loss(logits, target).dtype == mse_loss(logits, target).dtype == torch.float32


@pytest.mark.parametrize("S", [(4, 5), (2, 3, 4)])
def test_pixel_contrast_equals_a_double_loop(S):
    torch.manual_seed(0)
    anchors, keys = (
        torch.randn(3, 6, *S, requires_grad=True),
        torch.randn(3, 6, *S, requires_grad=True),
    )
    label, clear = torch.randint(3, (3, *S)), torch.rand(3, *S) < 0.7
    got = pixel_contrast(anchors, keys, label, clear, negatives=10_000, temperature=0.1)
    unit = [x.detach().movedim(1, -1).reshape(-1, 6) for x in (anchors, keys)]
    a, k = ([v / v.norm() for v in x] for x in unit)
    flat, sure = label.flatten().tolist(), clear.flatten().tolist()
    for i, value in enumerate(got.flatten().tolist()):
        want = 0.0
        if sure[i]:
            mine = [k[j] for j in range(len(k)) if sure[j] and flat[j] == flat[i]]
            mean = sum(mine) / len(mine)
            up = math.exp(float(a[i] @ mean / mean.norm()) / 0.1)
            down = sum(
                math.exp(float(a[i] @ k[j]) / 0.1)
                for j in range(len(k))
                if sure[j] and flat[j] != flat[i]
            )
            want = -math.log(up / (up + down))
        assert value == pytest.approx(want, abs=1e-4)
    got.sum().backward()
    assert anchors.grad.abs().sum() > 0 and keys.grad is None


def test_pixel_contrast_draws_negatives_and_needs_two_classes():
    torch.manual_seed(0)
    anchors, label = torch.randn(2, 4, 9, 9), torch.randint(2, (2, 9, 9))
    clear = torch.ones(2, 9, 9, dtype=torch.bool)
    some, all_ = (
        pixel_contrast(anchors, anchors, label, clear, negatives=n, temperature=0.5)
        for n in (5, 1000)
    )
    assert (some < all_).all() and (some > 0).all()  # fewer terms in the denominator
    one = pixel_contrast(
        anchors, anchors, torch.zeros_like(label), clear, negatives=5, temperature=0.5
    )
    none = pixel_contrast(anchors, anchors, label, ~clear, negatives=5, temperature=0.5)
    assert (one == 0).all() and (none == 0).all()


def test_a_scaler_starts_anew_where_the_run_had_none():
    """As where --amp auto was bfloat16 on one GPU, and is fp16 on the next."""
    on = Compute(torch.device("cpu"), torch.float16)
    scaler = on.scaler()
    before = scaler.state_dict()
    restore_scaler(scaler, dict(scaler=Compute(on.device, None).scaler().state_dict()))
    assert scaler.state_dict() == before
    restore_scaler(scaler, dict(scaler=before | {"scale": 8.0}))
    assert scaler.get_scale() == 8.0


def test_of_equal_classes_a_label_map_has_the_first():
    p = torch.randint(3, (2, 4, 5, 6)).float()
    for layout in (torch.contiguous_format, torch.channels_last):
        found = label_map(p.to(memory_format=layout))
        assert (found.numpy() == p.numpy().argmax(1)).all()
    assert (label_map(p[0], 0).numpy() == p[0].numpy().argmax(0)).all()
    assert (harden(p).numpy().argmax(1) == p.numpy().argmax(1)).all()
