"""Views: image and mask move together, intensity leaves the mask alone.

The generator's seed fixes everything.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeG

import corrupt
import evaluate
import train_qp
import train_ssl
from data import augment, h5, loading, quality_masks
from data.files import InputError
from models.device import compute

PLAIN = SimpleNamespace(classes=list("abc"), color=False)  # what views() asks an Info
SHAPES = [(3, 1, 32, 40), (3, 3, 32, 32), (2, 5, 12, 20, 16)]


def shapes(shape, seed=0):
    """Labels with blobs of three values, and an image that shows them."""
    torch.manual_seed(seed)
    coarse = torch.randn(shape[0], 1, *(s // 4 for s in shape[2:]))
    smooth = torch.nn.functional.interpolate(
        coarse, shape[2:], mode="bilinear" if len(shape) == 4 else "trilinear"
    )
    label = (smooth > 0.2).long() + (smooth > 0.7).long()
    return label.expand(-1, shape[1], *shape[2:]).float().contiguous(), label[:, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_image_and_label_stay_aligned(shape):
    image, label = shapes(shape)
    moved, y = augment.weak(image, label)
    assert moved.shape == image.shape and y.shape == label.shape and y.dtype == label.dtype
    assert (y != label).float().mean() > 0.05  # it did move
    inside = (moved[:, 0] - moved[:, 0].round()).abs() < 1e-3  # away from interpolated edges
    assert (
        inside.float().mean() > 0.4
        and (moved[:, 0].round()[inside] == y[inside]).float().mean() > 0.995
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flips_are_exact_and_no_geometry_is_identity(shape):
    image, label = shapes(shape)
    still = augment.random_geometry(image, rotate=0, scale=0, shift=0, flip="none")
    assert (
        torch.allclose(augment.move(image, still), image, atol=1e-4)
        and (augment.move(label, still) == label).all()
    )
    torch.manual_seed(3)
    flipped = augment.move(image, augment.random_geometry(image, rotate=0, scale=0, shift=0))
    axes = [
        [a for i, a in enumerate(range(1, image.dim() - 1)) if bits >> i & 1]
        for bits in range(2 ** (image.dim() - 2))
    ]
    for before, after in zip(image, flipped):
        assert any(torch.allclose(before.flip(a) if a else before, after, atol=1e-4) for a in axes)


def test_geometry_multiplies_rotation_scale_and_shift():
    image = torch.randn(4, 1, 24, 24)
    label = torch.randint(3, (4, 24, 24))
    torch.manual_seed(0)
    moved, y = augment.weak(image, label, "none", geometry=2)
    torch.manual_seed(0)
    way = augment.random_geometry(image, rotate=40, scale=0.3, shift=0.16, flip="none")
    assert torch.equal(moved, augment.move(image, way))
    assert torch.equal(y, augment.move(label, way))
    still, same = augment.weak(image, label, "none", geometry=0)
    assert torch.allclose(still, image, atol=1e-4) and torch.equal(same, label)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strong_view_changes_intensity_only(shape):
    image, _ = shapes(shape)
    image = image * 2 - 1
    view = augment.strong(image)
    assert (
        view.shape == image.shape and view.isfinite().all() and (view - image).abs().mean() > 0.05
    )
    for a, b in zip(
        image.flatten(1), view.flatten(1)
    ):  # what is bright stays bright: nothing moved
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.7


def test_same_seed_same_views():
    image, label = shapes(SHAPES[0])

    def views():
        torch.manual_seed(5)
        return (*augment.weak(image, label), augment.strong(image))

    assert all((a == b).all() for a, b in zip(views(), views()))


def test_blur_keeps_constants_and_matches_scipy():
    from scipy.ndimage import gaussian_filter

    assert torch.allclose(
        augment.blur(torch.ones(2, 2, 20, 20), torch.full((2, 1, 1, 1), 2.0), 2.0),
        torch.ones(2, 2, 20, 20),
        atol=1e-5,
    )
    image = torch.randn(2, 1, 24, 30)
    ours = augment.blur(image, torch.tensor([0.7, 1.5])[:, None, None, None], 1.5)
    for i, sigma in enumerate(
        (0.7, 1.5)
    ):  # one sigma per sample; the kernel reaches 2 sigma of the largest, 3 pixels
        theirs = gaussian_filter(image[i, 0].numpy(), sigma, radius=3, mode="mirror")
        assert abs(ours[i, 0].numpy() - theirs).max() < 1e-4


@pytest.mark.parametrize("S", [(30, 45), (12, 20, 16)])
def test_random_box(S):
    """One axis-aligned box per sample, of the asked size, anywhere in the image, never outside."""
    torch.manual_seed(0)
    box = augment.random_box(torch.zeros(300, 2, *S), 2 / 3)
    assert box.shape == (300, 1, *S) and set(box.unique().tolist()) == {0.0, 1.0}
    want = [round(2 / 3 * s) for s in S]
    assert (box.flatten(1).sum(1) == math.prod(want)).all()
    starts = set()
    for one in box[:, 0]:
        where = one.nonzero()
        low, high = where.amin(0), where.amax(0)
        assert (high - low + 1).tolist() == want
        starts.add((low[0].item(), high[0].item() == S[0] - 1))
    assert {0} < {s for s, _ in starts} and any(
        end for _, end in starts
    )  # touches both borders, and lies in between
    share = torch.tensor([[0.0] * len(S), [0.5] * len(S), [1.7] * len(S)])
    sizes = augment.random_box(torch.zeros(3, 1, *S), share).flatten(1).sum(1)
    assert sizes.tolist() == [0, math.prod(round(s / 2) for s in S), math.prod(S)]


# ---------------------------------------------------------------------- which axes may be flipped


def pair(axis, dims=2, count=40):
    """Two bars that mirror each other along an axis, of classes 1 and 2. -> [N, *S] uint8"""
    label = torch.zeros(count, *(24,) * dims, dtype=torch.uint8)
    for k, start in ((1, 3), (2, 16)):
        label.narrow("DHW"[-dims:].index(axis) + 1, start, 5).fill_(k)
    return label


def swapped(label, axis):
    """Whether class 2 lies before class 1 along an axis. label [N, *S] -> [N]"""
    places = torch.arange(24.0)
    others = [a + 1 for a, name in enumerate("DHW"[-(label.dim() - 1) :]) if name != axis]
    first, second = ((label == k).sum(others) for k in (1, 2))
    return (first * places).sum(1) / first.sum(1) > (second * places).sum(1) / second.sum(1)


FLIPS = [
    (2, None, "HW"),
    (2, "none", ""),
    (2, "H", "H"),
    (2, "W", "W"),
    (3, None, "DHW"),
    (3, "none", ""),
    (3, "D,H", "DH"),
    (3, "W", "W"),
    (3, "D", "D"),
]


@pytest.mark.parametrize("dims, flip, allowed", FLIPS)
def test_sides_are_swapped_along_the_axes_that_may_be_flipped_and_no_other(dims, flip, allowed):
    torch.manual_seed(0)
    for axis in "DHW"[-dims:]:
        label = pair(axis, dims, 40 if dims == 2 else 16)
        _, moved = augment.weak(label[:, None].float(), label, flip)
        share = swapped(moved, axis).float().mean()
        assert 0.2 < share < 0.8 if axis in allowed else share == 0, axis


class Reached(Exception):
    """Carries the arguments of a call."""


def sides(axis):
    """The pair as images and labels, as loading.Samples. One sample is a case."""
    label = pair(axis)
    N = len(label)
    images = label[:, None].float()
    return loading.Samples(
        images, torch.zeros(N), torch.ones(N), label, [f"c{i}" for i in range(N)], [(0,)] * N
    )


@pytest.mark.parametrize("flip, swaps", [("H", False), ("none", False), (None, True)])
def test_the_views_of_f_obey(flip, swaps):
    torch.manual_seed(0)
    args = train_ssl.parse_args(["d.h5", "--out", "o", "--strength", "0"])
    args.flip = flip
    fetched = sides("W").fetch(torch.arange(40))
    item = (fetched, fetched, torch.ones(40))
    batch = train_ssl.views(item, PLAIN, args, torch.device("cpu"))
    assert swapped(batch.y.argmax(1), "W").any() == swaps
    assert swapped(batch.u[:, 0].round(), "W").any() == swaps


@pytest.mark.parametrize("flip, swaps", [("H", False), ("none", False), (None, True)])
def test_what_g_learns_from_obeys(flip, swaps):
    torch.manual_seed(0)
    args = train_qp.parse_args(["d.h5", "--vqm", "v", "--out", "o", "--soft", "0"])
    args.flip = flip
    samples, every = sides("W"), torch.arange(40)
    masks = quality_masks.Masks(
        samples.label, every, samples, [], torch.full((40,), -1), "all", None, None, (24, 24)
    )
    seen, truth = train_qp.augmented_batch(masks, every, PLAIN, torch.device("cpu"), args)
    mask = seen.mask
    for shown in (mask, truth):
        assert swapped(shown.argmax(1) + (shown.amax(1) > 0), "W").any() == swaps


def test_the_weak_networks_obey(tmp_path, monkeypatch):
    def weak(image, label, flip):
        raise Reached(flip)

    monkeypatch.setattr(augment, "weak", weak)
    args = corrupt.parse_args(["d.h5", "--out", str(tmp_path), "--flip", "h", "--device", "cpu"])
    args.harvest_batch = 2
    info = h5.Info("d.h5", "d", ["background", "left", "right"], 2, 1, {}, 0, ["image"])
    samples = sides("W")
    with pytest.raises(Reached) as found:
        run = corrupt.build_run(0, info, args)
        corrupt.train_weak(run, samples, range(len(samples)), info, args)
    assert found.value.args == ("H",)


@pytest.mark.parametrize("flip, agrees", [(None, False), ("W", False), ("H", True), ("none", True)])
def test_the_augmented_pass_flips_what_f_may_see_flipped(flip, agrees):
    """A network that says left, whatever it sees, agrees with itself unless left becomes right."""

    class Left(torch.nn.Module):
        def forward(self, x):
            p = torch.zeros_like(x)
            p[..., :12] = 1
            p = p.clamp(1e-6, 1 - 1e-6)
            return torch.cat([1 - p, p], 1).log()

    samples, net, on = sides("W"), Left(), compute("cpu", "off")
    samples.label = (samples.label == 1).byte()
    by = evaluate.Opinions(net, net, None, flip)
    g = FakeG(lambda seen: torch.zeros(len(seen), 1))
    found = evaluate.compare_estimates(g, by, samples, on, 40)
    says = found.estimates["agreement with an augmented pass"]
    assert says == pytest.approx(1.0 if agrees else 0.0, abs=1e-3)


@pytest.mark.parametrize(
    "text, dims, flip",
    [
        ("H,W", 2, None),
        ("w, h", 2, None),
        ("H", 2, "H"),
        ("none", 2, "none"),
        ("None", 3, "none"),
        ("W,D", 3, "D,W"),
        ("D,H,W", 3, None),
        ("H,W", 3, "H,W"),
    ],
)
def test_an_option_for_all_axes_is_the_default(text, dims, flip):
    args = train_ssl.parse_args(["d.h5", "--out", "o", "--flip", text])
    info = h5.Info("d.h5", "d", ["background", "a"], dims, 1, {}, 0, ["image"])
    assert h5.check_flip(info, args.flip) == flip


@pytest.mark.parametrize("flip", ["D", "D,H", "X", 3, ["H"]])
def test_axes_that_slices_do_not_have_are_refused(flip):
    info = h5.Info("d.h5", "d", ["background", "a"], 2, 1, {}, 0, ["image"])
    with pytest.raises(InputError, match="d.h5 is segmented in 2D, along the axes H, W; give some"):
        h5.check_flip(info, flip)


@pytest.mark.parametrize("text", ["", "H,H", "X", "H,none", "HW", "H,", "0"])
@pytest.mark.parametrize(
    "script, more", [(corrupt, []), (train_ssl, []), (train_qp, ["--vqm", "v"])]
)
def test_what_names_no_axes_is_refused(text, script, more, refused):
    refused(script.parse_args, ["d.h5", "--out", "o", *more, "--flip", text], "--flip", "as in H,W")
