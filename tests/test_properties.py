"""What holds for any mask, image and file, on examples that hypothesis draws.

They are the same in every run of the same code.
"""

import functools
import itertools
import math
import tempfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, configuration, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist

import corrupt
from data import augment, h5, loading, metrics, shapes

HOME = (
    tempfile.TemporaryDirectory()
)  # hypothesis keeps tables of characters and constants: not in the project's folder
configuration.set_hypothesis_home_dir(
    HOME.name
)  # now, since it fills them when tests are collected
EVERY_LINE = corrupt.SINGLE + corrupt.HEAVY + corrupt.BLOB + corrupt.CATASTROPHIC
SEEDS = st.integers(0, 2**32 - 1)
DIMS = pytest.mark.parametrize("dims", [2, 3])


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def grids(dims, low, high):
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def label_maps(draw, grid, K, least=0):
    """At least so many boxes and single pixels, also at the border; sometimes random pixels.

    -> uint8 [*grid], each below K
    """
    out = np.zeros(grid, np.uint8)
    for _ in range(draw(st.integers(least, 5))):
        k, ends = (
            draw(st.integers(1, K - 1)),
            [draw(st.tuples(st.integers(0, n - 1), st.integers(1, n))) for n in grid],
        )
        single = draw(st.booleans())
        out[tuple(slice(at, at + (1 if single else side)) for at, side in ends)] = k
    if draw(st.integers(0, 4)) == 4:
        rng = np.random.default_rng(draw(SEEDS))
        out = np.where(rng.random(grid) < 0.1, rng.integers(min(1, least), K, grid), out).astype(
            np.uint8
        )
    return out


@st.composite
def truths(draw, dims):
    """A label map on a grid as corrupt.py sees them, and K."""
    K = draw(st.integers(2, 5))
    return draw(label_maps(draw(grids(dims, 16, 45 if dims == 2 else 21)), K)), K


@st.composite
def pairs(draw, dims, low=1, high=14, least=0):
    """Two boolean masks of one grid, and a spacing."""
    grid = draw(grids(dims, low, high))
    return (
        draw(label_maps(grid, 2, least)) > 0,
        draw(label_maps(grid, 2, least)) > 0,
        draw(spacings(dims)),
    )


def spacings(dims):
    return st.tuples(*[st.floats(0.25, 4, width=16)] * dims)


def plain_dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


# -------------------------------------------------------------------------------------- corruptions


def corrupted(line, label, K, rng):
    """A line of the catalog on a label map."""
    return corrupt.corrupt_classes(corrupt.corruption_of(line), label, K, rng)


def is_mask(out, truth, K):
    return (
        isinstance(out, np.ndarray)
        and out.shape == truth.shape
        and out.dtype == np.uint8
        and out.max() < K
    )


@DIMS
@examples(14)
@given(data=st.data(), seed=SEEDS)
def test_every_line_makes_a_mask_of_any_mask(dims, data, seed):
    truth, K = data.draw(truths(dims))
    before = truth.copy()
    for line in EVERY_LINE + corrupt.SEVERAL_CLASSES * (K > 2):
        out = corrupted(line, truth, K, np.random.default_rng(seed))
        assert is_mask(out, truth, K), line[0]
        assert (truth == before).all(), f"{line[0]} wrote to its input"
        assert (out == corrupted(line, truth, K, np.random.default_rng(seed))).all(), (
            f"{line[0]} is not fixed by the seed"
        )
        assert truth.any() or not out.any(), f"{line[0]} made something of nothing"


@DIMS
@examples(16)
@given(data=st.data(), seeds=st.lists(SEEDS, min_size=8, max_size=8))
def test_samples_are_masks_that_the_seed_fixes(dims, data, seeds):
    """Also what is said of them: an identity is one, a cross image is another case's."""
    truth, K = data.draw(truths(dims))
    similar = data.draw(st.lists(label_maps(truth.shape, K), max_size=2))
    before = [m.copy() for m in (truth, *similar)]
    for seed in seeds:
        (out, name), (again, same_name) = (
            corrupt.draw_mask(truth, K, similar, np.random.default_rng(seed)) for _ in range(2)
        )
        assert is_mask(out, truth, K) and name == same_name and (out == again).all()
        assert name != "identity" or (out == truth).all()
        assert name != "cross image" or any((out == other).all() for other in similar)
    assert all((m == b).all() for m, b in zip((truth, *similar), before))


@DIMS
@examples(20)
@given(data=st.data(), seeds=st.lists(SEEDS, min_size=5, max_size=5))
def test_an_invented_class_was_absent_and_takes_background(dims, data, seeds):
    truth, K = data.draw(truths(dims))
    absent = set(range(1, K)) - set(np.unique(truth))
    assume(absent)
    for seed in seeds:
        out = corrupt.add_absent_class(truth, K, np.random.default_rng(seed))
        new = out != truth
        assert (
            is_mask(out, truth, K)
            and (truth[new] == 0).all()
            and len(np.unique(out[new])) <= 1
            and set(np.unique(out[new])) <= absent
        )


@DIMS
@examples(30)
@given(data=st.data())
def test_dice_as_numpy_counts_it(dims, data):
    truth, K = data.draw(truths(dims))
    mask = data.draw(label_maps(truth.shape, K))
    dice = corrupt.dice_of(mask, truth, K)
    assert dice.dtype == np.float32 and dice == pytest.approx(
        [plain_dice(mask == k, truth == k) for k in range(1, K)], abs=1e-6
    )
    assert (corrupt.dice_of(truth, mask, K) == dice).all() and (
        corrupt.dice_of(truth, truth, K) == 1
    ).all()


@DIMS
@examples(30)
@given(data=st.data(), width=st.sampled_from([3, 5, 7]), flat=st.sampled_from([0.0, 0.5, 1.0]))
def test_morphology(dims, data, width, flat):
    """What grows grows, what shrinks shrinks, and to open, close or box twice is to do it once.

    To close is to open the background.
    """
    m = data.draw(label_maps(data.draw(grids(dims, 8, 24 if dims == 2 else 13)), 2, least=1))
    ball = shapes.ball(width, flat if dims == 3 else 0.0)
    for larger in (shapes.dilate(m, ball), shapes.closing(m, ball), shapes.hull(m), shapes.box(m)):
        assert (larger >= m).all()
    for smaller in (shapes.erode(m, ball), shapes.opening(m, ball)):
        assert (smaller <= m).all()
    for f in (
        functools.partial(shapes.opening, ball=ball),
        functools.partial(shapes.closing, ball=ball),
        shapes.box,
    ):
        assert (f(f(m)) == f(m)).all()
    assert (shapes.closing(m, ball) == 1 - shapes.opening(1 - m, ball)).all()
    assert (shapes.hull(m) <= shapes.box(m)).all() and (
        shapes.bounds(shapes.hull(m))[1] == shapes.bounds(m)[1]
    ).all()


@examples(30)
@given(data=st.data())
def test_the_hull_of_a_volume_holds_what_lies_between_its_voxels(data):
    """Midpoints of any two foreground voxels, and no more than the hull of the hull."""
    m = data.draw(label_maps(data.draw(grids(3, 4, 12)), 2, least=1))
    hull, points = shapes.hull(m), np.argwhere(m)
    assume(np.linalg.matrix_rank(points - points[0]) == 3)  # a flat object has hulls slice by slice
    twice = (points[:, None] + points[None, ::7]).reshape(-1, 3)
    between = twice[(twice % 2 == 0).all(1)] // 2
    assert hull[tuple(between.T)].all() and (shapes.hull(hull) == hull).all()


@DIMS
@examples(30)
@given(data=st.data(), seed=SEEDS)
def test_parts_of_a_mask(dims, data, seed):
    """Lines that only take away or only add, on a mask of several components."""
    m, rng = (
        data.draw(label_maps(data.draw(grids(dims, 16, 24)), 2, least=1)),
        np.random.default_rng(seed),
    )
    parts, count = ndimage.label(m, np.ones([3] * dims))
    largest = corrupt.largest_component(m, rng)
    assert (
        largest.sum() == np.bincount(parts[m > 0]).max()
        and (largest <= m).all()
        and ndimage.label(largest, np.ones([3] * dims))[1] == 1
    )
    dropped = corrupt.drop_component(m, rng)
    assert (dropped <= m).all()
    if count > 1:  # exactly one is gone
        gone = np.unique(parts[dropped != m])
        assert len(gone) == 1 and (dropped == m * (parts != gone)).all()
    for line in ((corrupt.holes, 2, 3, 8), (corrupt.rectangle_dropout, 0.1, 0.3)):
        out = line[0](m, rng, *line[1:])
        assert (out <= m).all() and (out != m).any()
    assert (corrupt.islands(m, rng, 2, 3, 8) >= m).all()
    assert (corrupt.inverted(corrupt.inverted(m, rng), rng) == m).all()


@examples(40)
@given(
    K=st.integers(2, 5),
    bins=st.integers(1, 12),
    seed=SEEDS,
    size=st.integers(1, 80),
    share=st.floats(0, 1),
)
def test_balanced_keeps_count_and_serves_bins_in_turn(K, bins, seed, size, share):
    rng, count = np.random.default_rng(seed), max(1, round(share * size))
    drawn = [
        corrupt.Drawn(
            mask=object(),
            dice=rng.choice([0.0, 1.0, *rng.random(3)], K - 1).astype(np.float32),
            source="name",
            draw=draw,
        )
        for draw in range(size)
    ]
    kept = corrupt.balanced(drawn, count, bins)
    assert (
        len(kept) == count
        and len({k.draw for k in kept}) == count
        and all(any(k is d for d in drawn) for k in kept)
    )
    of = lambda entries: np.bincount(
        [min(int(d.dice.mean() * bins), bins - 1) for d in entries], minlength=bins
    )
    taken, left = of(kept), of(drawn) - of(kept)
    assert all(
        taken[b] >= taken.max() - 1 for b in range(bins) if left[b]
    )  # a bin gets fewer than others only where it has no more


@DIMS
@pytest.mark.parametrize("balance", [True, False])
@examples(8)
@given(data=st.data(), seed=st.integers(0, 1000), count=st.integers(1, 4))
def test_masks_of_a_sample_are_draws_that_can_be_made_again(dims, balance, data, seed, count):
    """As many as asked for, each with the Dice that it has."""
    truth, K = data.draw(truths(dims))
    others = data.draw(st.lists(label_maps(truth.shape, K), min_size=1, max_size=3))
    labels = np.stack([truth, *others])
    truths_of_split = corrupt.Truths(
        split="train",
        labels=labels,
        cases=["a", *"bcd"[: len(others)]],
        K=K,
        count=count,
        balance=balance,
        seed=seed,
    )
    chunks, dice, names, draws = corrupt.masks_of_sample(truths_of_split, 0)
    assert len(chunks) == len(dice) == len(names) == count and sorted(set(draws)) == sorted(draws)
    assert max(draws) < count * (corrupt.CANDIDATES if balance else 1)
    for chunk, one in zip(chunks, dice):
        mask = np.frombuffer(zlib.decompress(chunk), np.uint8).reshape(truth.shape)
        assert mask.max() < K and one == pytest.approx(
            [plain_dice(mask == k, truth == k) for k in range(1, K)], abs=1e-6
        )
    again = corrupt.masks_of_sample(truths_of_split, 0)
    assert again.chunks == chunks and again.draw == draws


# -------------------------------------------------------------------------------------------- views


@st.composite
def batches(draw, dims, low=1, high=14):
    """An image [B, C, *S] of random numbers, and a label [B, *S] below 4."""
    shape, grid = (
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        draw(grids(dims, low, high)),
    )
    label = torch.from_numpy(np.stack([draw(label_maps(grid, 4)) for _ in range(shape[0])])).long()
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(*shape, *grid) * draw(st.sampled_from([0.0, 1.0, 30.0])) + draw(
        st.sampled_from([0.0, -2.0, 5.0])
    ), label


@DIMS
@examples(30)
@given(data=st.data())
def test_flips_are_exact_and_their_own_inverse(dims, data):
    image, label = data.draw(batches(dims))
    for flip in ("none", None, "H", "W"):
        grid = augment.random_geometry(image, rotate=0, scale=0, shift=0, flip=flip)
        x, y = augment.move(image, grid), augment.move(label, grid)
        allowed = (
            [-3, -2, -1][-dims:]
            if flip is None
            else [{"H": -2, "W": -1}[flip]]
            if flip != "none"
            else []
        )
        axes = [a for n in range(len(allowed) + 1) for a in itertools.combinations(allowed, n)]
        for before, after, mask, moved in zip(image, x, label, y):
            assert any(
                torch.allclose(before.flip(a), after, atol=1e-3)
                and torch.equal(mask.flip(a), moved)
                for a in axes
            )
        assert torch.allclose(augment.move(x, grid), image, atol=1e-3) and torch.equal(
            augment.move(y, grid), label
        )


@DIMS
@examples(30)
@given(data=st.data())
def test_quarter_turns_are_exact(dims, data):
    """rotate=90 turns by up to 90 degrees.

    Held at its end, it is the turn that torch.rot90 makes of a square plane.
    """
    side, depth = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    grid = (side, side) if dims == 2 else (depth, side, side)
    label = torch.from_numpy(data.draw(label_maps(grid, 4)))[None].long()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            augment, "uniform", lambda low, high, like: torch.full((len(like), 1), float(high))
        )
        turn = augment.random_geometry(
            label[:, None].float(), rotate=90, scale=0, shift=0, flip="none"
        )
    turned = augment.move(label[:, None].float(), turn)[:, 0]
    assert any(torch.allclose(turned, label.rot90(n, (-2, -1)).float(), atol=1e-3) for n in (1, 3))


@DIMS
@examples(30)
@given(data=st.data())
def test_image_and_mask_move_together(dims, data):
    """Of an image that shows each class in a channel, a pixel's class is its nearest source's.

    That has a fourth of the weight or more, in 3D an eighth.
    """
    _, label = data.draw(batches(dims, 2))
    classes = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).float()
    moved, y = augment.weak(classes, label)
    weight = moved.gather(1, y[:, None])[:, 0]
    assert y.shape == label.shape and y.dtype == label.dtype and moved.shape == classes.shape
    assert (weight > 0.5**dims - 1e-3).all() and torch.allclose(
        moved.sum(1), torch.ones(y.shape), atol=1e-4
    )


@DIMS
@examples(30)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_views_are_finite_and_fixed_by_the_seed(dims, data, seed):
    """Constant images and sides of one pixel included.

    Geometry makes no new values: it interpolates.
    """
    image, label = data.draw(batches(dims))
    before = image.clone(), label.clone()

    def views():
        torch.manual_seed(seed)
        return (
            *augment.weak(image, label),
            augment.weak(image),
            augment.strong(image),
            augment.strong(image, 0.3),
        )

    for one, again in zip(views(), views(), strict=True):
        assert (
            torch.equal(one, again)
            and one.shape[-dims:] == image.shape[-dims:]
            and one.isfinite().all()
        )
    x, y, *_ = views()
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    for old, new in ((image, x), (label, y)):
        axes = tuple(range(old.dim() - dims, old.dim()))
        assert (new >= old.amin(axes, keepdim=True) - 1e-3).all() and (
            new <= old.amax(axes, keepdim=True) + 1e-3
        ).all()
    assert all(set(b.unique().tolist()) <= set(a.unique().tolist()) for a, b in zip(label, y))


@DIMS
@examples(30)
@given(data=st.data(), seed=st.integers(0, 2**31), strength=st.sampled_from([0.25, 0.5, 1.0]))
def test_a_strong_view_changes_near_what_changed(dims, data, seed, strength):
    """Nothing moves: a pixel of another intensity shows at its place and as far as blur reaches."""
    grid = data.draw(grids(dims, 2, 15 if dims == 2 else 10))
    at, image = tuple(data.draw(st.integers(0, n - 1)) for n in grid), torch.zeros(1, 1, *grid)
    image.view(-1)[0], image.view(-1)[-1] = -2, 2  # what gamma scales by stays
    assume(at != (0,) * dims and at != tuple(n - 1 for n in grid))
    other = image.clone()
    other[0, 0][at] = 1.5
    views = []
    for x in (image, other):
        torch.manual_seed(seed)
        views.append(augment.strong(x, strength))
    changed, reach = (views[1] - views[0])[0, 0], math.ceil(2 * (0.3 + 1.2 * strength))
    near = torch.zeros(grid, dtype=torch.bool)
    near[tuple(slice(max(0, a - reach), a + reach + 1) for a in at)] = True
    assert changed[at] > 1e-2 and (changed[~near].abs() < 1e-5).all()


@DIMS
@examples(30)
@given(data=st.data(), sigma=st.floats(0.3, 1.5), seed=st.integers(0, 2**31))
def test_blur_keeps_constants_mass_and_symmetry(dims, data, sigma, seed):
    grid, C = data.draw(grids(dims, 1, 10)), data.draw(st.integers(1, 3))
    torch.manual_seed(seed)
    blur = lambda x: augment.blur(x, torch.tensor([sigma, 0.5]).reshape(2, 1, *[1] * dims), 1.5)
    x = torch.randn(2, C, *grid)
    assert torch.allclose(blur(torch.full_like(x, 3.7)), torch.full_like(x, 3.7), atol=1e-4)
    assert (blur(x).amax() <= x.amax() + 1e-5) and (blur(x).amin() >= x.amin() - 1e-5)
    for axis in range(-dims, 0):
        assert torch.allclose(blur(x.flip(axis)), blur(x).flip(axis), atol=1e-5)
    if dims == 2:
        assert torch.allclose(blur(x.mT), blur(x).mT, atol=1e-5)
    inside = torch.nn.functional.pad(
        x, [6] * 2 * dims
    )  # farther from the border than the kernel reaches
    assert torch.allclose(blur(inside).flatten(2).sum(2), inside.flatten(2).sum(2), atol=1e-3)


@DIMS
@examples(30)
@given(data=st.data(), power=st.floats(0.5, 2))
def test_gamma_keeps_order_and_range(dims, data, power):
    image, _ = data.draw(batches(dims))
    out = augment.gamma(image, torch.full((len(image), 1, *[1] * dims), power))
    for a, b in zip(image.flatten(1), out.flatten(1)):
        width = (a.max() - a.min()).item()
        assert (b.min().item(), b.max().item()) == pytest.approx(
            (a.min().item(), a.max().item()), abs=2e-3 * width + 1e-4
        )
        assert (b[a.argsort()].diff() >= -1e-4).all()
    assert torch.allclose(augment.gamma(image, torch.ones(1)), image, atol=1e-3)


# ------------------------------------------------------------------------------------------ metrics


@DIMS
@examples(40)
@given(data=st.data())
def test_scores_are_symmetric_and_bounded(dims, data):
    a, b, spacing = data.draw(pairs(dims))
    one, other = metrics.score(a, b, spacing), metrics.score(b, a, spacing)
    assert (one.dice, one.jaccard, one.one_empty) == (
        other.dice,
        other.jaccard,
        other.one_empty,
    ) and one.hd95 == pytest.approx(other.hd95)
    assert 0 <= one.jaccard <= one.dice <= 1 and one.dice == pytest.approx(
        2 * one.jaccard / (1 + one.jaccard)
    )
    assert one.dice == metrics.dice(a, b) == pytest.approx(plain_dice(a, b))
    diagonal = np.linalg.norm(np.multiply(a.shape, spacing))
    assert 0 <= one.hd95 <= diagonal and 0 <= one.asd <= diagonal
    if a.any() and b.any():
        assert one.one_empty is False
        there, back = metrics.surface_distances(a, b, spacing)
        assert [v.tolist() for v in metrics.surface_distances(b, a, spacing)] == [
            back.tolist(),
            there.tolist(),
        ]
        assert one.asd == pytest.approx(there.mean()) and other.asd == pytest.approx(back.mean())


@DIMS
@examples(30)
@given(data=st.data())
def test_a_mask_agrees_with_itself_and_an_empty_one_by_the_rules(dims, data):
    a, _, spacing = data.draw(pairs(dims))
    assert metrics.score(a, a.copy(), spacing) == metrics.Score(1.0, 1.0, 0.0, 0.0, False)
    diagonal = float(np.linalg.norm(np.multiply(a.shape, spacing)))
    if a.any():
        for one in (metrics.score(a, a & False, spacing), metrics.score(a & False, a, spacing)):
            assert one == metrics.Score(0.0, 0.0, diagonal, diagonal, True)


@DIMS
@examples(30)
@given(data=st.data())
def test_distances_as_found_by_trying_all(dims, data):
    a, b, spacing = data.draw(pairs(dims, high=12 if dims == 2 else 7, least=1))
    edges = [np.argwhere(m & ~ndimage.binary_erosion(m)) * spacing for m in (a, b)]
    all_of_them = cdist(*edges)
    there, back = all_of_them.min(1), all_of_them.min(0)
    found = metrics.score(a, b, spacing)
    assert found.hd95 == pytest.approx(
        np.percentile(np.concatenate([there, back]), 95)
    ) and found.asd == pytest.approx(there.mean())


@DIMS
@examples(30)
@given(data=st.data(), factor=st.floats(0.125, 8, width=16))
def test_distances_follow_the_spacing(dims, data, factor):
    """In proportion to a common factor, and no shorter where an axis is stretched."""
    a, b, spacing = data.draw(pairs(dims, least=1))
    one, scaled = (
        metrics.score(a, b, spacing),
        metrics.score(a, b, tuple(factor * s for s in spacing)),
    )
    assert (scaled.hd95, scaled.asd) == pytest.approx(
        (factor * one.hd95, factor * one.asd)
    ) and scaled.dice == one.dice
    axis = data.draw(st.integers(0, dims - 1))
    stretched = metrics.score(a, b, tuple(s * 3 if i == axis else s for i, s in enumerate(spacing)))
    assert one.hd95 <= stretched.hd95 + 1e-9 and one.asd <= stretched.asd + 1e-9


@DIMS
@examples(30)
@given(data=st.data())
def test_two_pixels_are_as_far_apart_as_their_spacing_says(dims, data):
    grid, spacing = data.draw(grids(dims, 1, 12)), data.draw(spacings(dims))
    here, there = ([data.draw(st.integers(0, n - 1)) for n in grid] for _ in range(2))
    a, b = np.zeros((2, *grid), bool)
    a[tuple(here)] = b[tuple(there)] = True
    want = np.linalg.norm((np.array(here) - there) * spacing)
    found = metrics.score(a, b, spacing)
    assert (found.hd95, found.asd, found.dice) == pytest.approx((want, want, float(here == there)))


@DIMS
@examples(30)
@given(data=st.data())
def test_scores_do_not_depend_on_place_or_direction(dims, data):
    """Both masks elsewhere in a larger grid, mirrored, or with other axes, spacing and all."""
    a, b, spacing = data.draw(pairs(dims, least=1))
    want = metrics.score(a, b, spacing)
    around = [data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in a.shape]
    axes = data.draw(st.permutations(range(dims)))
    for move, along in (
        (lambda m: np.pad(m, around), spacing),
        (np.flip, spacing),
        (lambda m: m.transpose(axes), [spacing[i] for i in axes]),
    ):
        assert vars(metrics.score(move(a), move(b), along)) == pytest.approx(vars(want))


@examples(30)
@given(data=st.data(), K=st.integers(2, 5))
def test_largest_component(data, K):
    """A part of each class, one piece, none larger; to take it twice is to take it once."""
    label = data.draw(label_maps(data.draw(grids(3, 1, 12)), K))
    before, out = label.copy(), metrics.largest_component(label, K)
    assert (
        out.dtype == label.dtype
        and (label == before).all()
        and (metrics.largest_component(out, K) == out).all()
    )
    assert ((out == label) | (out == 0)).all()
    for k in range(1, K):
        parts, count = ndimage.label(label == k)
        assert ndimage.label(out == k)[1] == min(1, count) and (out == k).sum() == max(
            np.bincount(parts[parts > 0]), default=0
        )


@examples(30)
@given(data=st.data(), K=st.integers(2, 4), largest=st.booleans())
def test_a_case_is_scored_class_by_class(data, K, largest):
    grid = data.draw(grids(3, 1, 8))
    flat = data.draw(st.booleans())
    grid = (1, *grid[1:]) if flat else grid
    label, truth, spacing = (
        data.draw(label_maps(grid, K)),
        data.draw(label_maps(grid, K)),
        data.draw(spacings(2 if flat else 3)),
    )
    found = metrics.score_case(label, truth, spacing, K, largest)
    kept = metrics.largest_component(label, K) if largest else label
    assert len(found) == K - 1
    for k, one in enumerate(found, 1):
        a, b = (m[0] if flat else m for m in (kept == k, truth == k))
        assert one == metrics.score(a, b, spacing) and one.dice == pytest.approx(
            plain_dice(kept == k, truth == k)
        )


@st.composite
def runs(draw):
    """Values of two runs on the same cases, and each case's patient; two patients or more."""
    n = draw(st.integers(2, 20))
    values, base = (
        np.array(draw(st.lists(st.integers(0, 64), min_size=n, max_size=n))) / 64 for _ in range(2)
    )
    patient = draw(
        st.lists(st.sampled_from("abcdefgh"), min_size=n, max_size=n).filter(
            lambda p: len(set(p)) > 1
        )
    )
    return values, base, patient


@examples(10)
@given(both=runs(), shift=st.integers(-8, 8).map(lambda v: v / 4))
def test_a_comparison_shifts_with_the_values_and_turns_with_the_runs(both, shift):
    values, base, patient = both
    mean, (low, high), p = metrics.paired(values, base, patient)
    means = [
        np.mean([d for d, q in zip(values - base, patient) if q == one])
        for one in sorted(set(patient))
    ]
    assert (
        mean == pytest.approx(np.mean(means))
        and min(means) - 1e-9 <= low <= high <= max(means) + 1e-9
    )
    moved = metrics.paired(values + shift, base, patient)
    assert (moved[0], *moved[1]) == pytest.approx((mean + shift, low + shift, high + shift))
    turned = metrics.paired(base, values, patient)
    assert (
        (turned[0], *turned[1]) == pytest.approx((-mean, -high, -low))
        and turned[2] == p
        and (p is None or 0 < p <= 1)
    )
    order = np.argsort([*map(ord, patient)], kind="stable")[::-1]  # cases in another order
    assert metrics.paired(values[order], base[order], [patient[i] for i in order])[
        0
    ] == pytest.approx(mean)
    assert metrics.paired(values, values, patient) == (0.0, (0.0, 0.0), None)
    assert metrics.paired(values, base, ["a"] * len(values)) == (
        pytest.approx((values - base).mean()),
        None,
        None,
    )


@examples(40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), SEEDS)
def test_the_lowest_fifth_and_monotone_maps(values, seed):
    values, rng = np.array(values, float), np.random.default_rng(seed)
    share = metrics.lowest(values, -(-len(values) // 5))
    assert (
        share.sum() == pytest.approx(-(-len(values) // 5)) and ((share >= 0) & (share <= 1)).all()
    )
    assert (share[values > values[share > 0].max()] == 0).all() and (
        share[values < values[share > 0].max()] == 1
    ).all()
    true = rng.random(len(values))
    fitted = metrics.monotone(values, true)(np.sort(values))
    assert (np.diff(fitted) >= -1e-12).all() and fitted.mean() == pytest.approx(true.mean())
    assert metrics.monotone(values, values)(values) == pytest.approx(values)
    order = rng.permutation(len(values))
    assert metrics.agreement(values, true) == pytest.approx(
        metrics.agreement(values[order], true[order])
    )
    perfect = metrics.agreement(true, true)
    assert perfect["mae"] == perfect["rmse"] == 0 and (
        len(true) == 1 or (perfect["pearson"], perfect["spearman"]) == pytest.approx((1, 1))
    )


# -------------------------------------------------------------------------------------------- files

TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(
    str.isprintable
)
NAMES = TEXT.map(lambda t: t.replace("/", "_").replace("\\", "_")).filter(
    lambda t: not t.startswith(".")
)


@st.composite
def datasets(draw, dims=None, labeled=None):
    """Cases of several splits, and what h5.write() asks for besides.

    dims None: 2 or 3; labeled True: each has a label.
    """
    dims = dims or draw(st.sampled_from([2, 3]))
    channels, K, cases = (
        draw(st.sampled_from([1, 3])) if dims == 2 else 1,
        draw(st.integers(2, 4)),
        [],
    )
    for split in draw(st.permutations(h5.SPLITS))[: draw(st.integers(1, 3))]:
        patients = draw(st.lists(TEXT, min_size=1, max_size=3))
        for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
            grid = (
                *draw(grids(draw(st.integers(0, 1)) if dims == 2 else 1, 1, 9)),
                *draw(grids(2, h5.SMALLEST, 14)),
            )
            rng, shape = np.random.default_rng(draw(SEEDS)), (*grid, 3) if channels == 3 else grid
            image = (
                rng.integers(0, 256, shape, np.uint8)
                if draw(st.booleans())
                else (100 * rng.standard_normal(shape)).astype(np.float32)
            )
            cases.append(
                h5.Case(
                    split=split,
                    name=name,
                    image=image,
                    label=rng.integers(0, K, grid, np.uint8)
                    if labeled or draw(st.booleans())
                    else None,
                    patient=f"{split} {draw(st.sampled_from(patients))}",
                    spacing=draw(st.none() | spacings(len(grid))),
                    source=draw(TEXT),
                    affine=draw(st.none() | st.just(rng.standard_normal((4, 4)))),
                    source_grid=draw(st.none() | grids(len(grid), 1, 99)),
                )
            )
    what = dict(
        name=draw(TEXT),
        classes=draw(st.lists(TEXT, min_size=K, max_size=K, unique=True)),
        dims=dims,
        channels=channels,
        standardize=draw(st.booleans()),
        prepared=draw(
            st.none()
            | st.fixed_dictionaries(
                {"from": TEXT, "spacing": st.lists(st.floats(0.1, 9), min_size=3, max_size=3)}
            )
        ),
    )
    return cases, what


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tmp_path_factory.mktemp("properties") / "f.h5")


@examples(20)
@given(dataset=datasets())
def test_what_is_written_is_read(path, dataset):
    cases, what = dataset
    info = h5.write(path, cases, **what)
    again = h5.read_info(path)
    assert again.describe() == info.describe() and {k: info.describe()[k] for k in what} == what
    splits = list(dict.fromkeys(c.split for c in cases))
    assert set(info.splits) == set(splits)
    with h5.open_file(path) as f:
        for split in splits:
            mine = [c for c in cases if c.split == split]
            assert [e.name for e in info.entries(split)] == [c.name for c in mine]  # in order
            for case, e in zip(mine, info.entries(split)):
                image, label = h5.read_case(f, info, split, case.name)
                volume = len(e.grid) == 3
                assert (
                    image.dtype == case.image.dtype
                    and ((image if volume else image[0]) == case.image).all()
                    and image.size == case.image.size
                )
                assert (label is None) == (case.label is None) == (not e.labeled)
                assert label is None or (
                    label.dtype == np.uint8
                    and ((label if volume else label[0]) == case.label).all()
                )
                assert (e.patient, e.source, e.source_grid, e.itemsize) == (
                    case.patient,
                    case.source,
                    case.source_grid,
                    image.itemsize,
                )
                assert (e.spacing, e.spacing_known) == (
                    case.spacing or (1.0,) * len(e.grid),
                    case.spacing is not None,
                )
                assert (e.affine is None) == (case.affine is None) and (
                    e.affine is None or (e.affine == case.affine).all()
                )


@examples(10)
@given(dataset=datasets(labeled=True), data=st.data())
def test_a_checksum_tells_what_changed(path, dataset, data):
    cases, what = dataset
    before = h5.write(path, cases, **what).checksum
    assert h5.write(path, cases, **what).checksum == before
    case = data.draw(st.sampled_from(cases))
    at = tuple(data.draw(st.integers(0, n - 1)) for n in case.label.shape)
    case.label[at] = 1 - min(1, case.label[at])
    assert h5.write(path, cases, **what).checksum != before


def same(found, want):
    """Batches of the same values; of a file of mixed types, memory holds float32 throughout."""
    assert all(
        (u is None and v is None) or (u.shape == v.shape and torch.equal(u.float(), v.float()))
        for u, v in zip(found, want, strict=True)
    )


@DIMS
@examples(16)
@given(data=st.data(), labels=st.booleans(), seed=SEEDS)
def test_from_the_file_as_from_memory(path, dims, data, labels, seed):
    """Any index and place, all cases or some.

    Patches and slices are those of the cases as they were written.
    """
    cases, what = data.draw(datasets(dims, labels))
    info = h5.write(path, cases, **what)
    split, size = (
        cases[0].split,
        data.draw(st.integers(1, 12)) if dims == 2 else data.draw(grids(3, 1, 12)),
    )
    mine = [c for c in cases if c.split == split]
    names = data.draw(
        st.none()
        | st.lists(st.sampled_from([c.name for c in mine]), min_size=1, unique=True).map(
            lambda some: [c.name for c in mine if c.name in some]
        )
    )
    memory = (loading.load_slices if dims == 2 else loading.load_volumes)(
        info, split, size, names, labels
    )
    disk = loading.Stored(info, split, size, names, labels)
    assert len(disk) == len(memory) and disk.case == memory.case
    rng = np.random.default_rng(seed)
    index, place = (
        torch.from_numpy(rng.integers(0, len(disk), 5)),
        torch.from_numpy(rng.random((5, 3), np.float32)),
    )
    found = disk.fetch(index, place)
    assert (found[1] is not None) == labels and found[0].shape == (
        5,
        info.channels,
        *loading.shape_of(size),
    )
    same(found, memory.fetch(index, place))
    by_name = {c.name: c for c in mine}
    for i, mean, std in zip(index.tolist(), *found[2:]):
        image = by_name[disk.case[i]].image.astype(np.float64)
        want = (image.mean(), max(image.std(), 1e-6)) if what["standardize"] else (0, 1)
        assert (mean.item(), std.item()) == pytest.approx(want, rel=1e-4, abs=1e-4)
    if dims == 3:
        assert all(
            np.isin(patch, by_name[disk.case[i]].image).all()
            for i, patch in zip(index.tolist(), found[0].numpy())
        )
    else:
        depth = lambda c: len(c.image) if c.image.ndim - (what["channels"] == 3) == 3 else 1
        assert memory.at == [
            (z,) for c in mine if names is None or c.name in names for z in range(depth(c))
        ]


@examples(30)
@given(grid=grids(3, 1, 20), size=grids(3, 1, 20), seed=SEEDS)
def test_tiles_cover_a_volume_and_none_is_too_many(grid, size, seed):
    covered, corners = np.zeros(tuple(map(max, grid, size)), int), loading.tiles(grid, size)
    for corner in corners:
        assert covered[tuple(slice(c, c + s) for c, s in zip(corner, size))].shape == size
        covered[tuple(slice(c, c + s) for c, s in zip(corner, size))] += 1
    assert covered.min() >= 1 and len(set(corners)) == len(corners) == math.prod(
        -(-n // s) for n, s in zip(grid, size)
    )
    drawn = loading.random_corners(grid, size, 5, np.random.default_rng(seed))
    assert 1 <= len(set(drawn)) == len(drawn) <= 5 and all(
        0 <= c <= max(0, n - s) for corner in drawn for c, n, s in zip(corner, grid, size)
    )


@examples(40)
@given(grid=grids(3, 1, 12), size=grids(3, 1, 30), seed=SEEDS)
def test_cut_back_undoes_at_least(grid, size, seed):
    volume = np.random.default_rng(seed).integers(0, 256, grid, np.uint8)
    larger = loading.at_least(volume, size)
    assert larger.shape == tuple(map(max, grid, size)) and larger.dtype == volume.dtype
    assert (loading.cut_back(larger, grid) == volume).all() and (
        loading.cut_back(np.stack([larger, larger]), grid) == volume
    ).all()
    for axis, (n, s) in enumerate(zip(grid, size)):  # mirrored, by as much on both sides
        before = max(0, s - n) // 2
        want = ndimage.map_coordinates(
            np.arange(n, dtype=float),
            [np.arange(larger.shape[axis]) - before],
            order=0,
            mode="reflect",
        ).astype(int)
        assert (
            loading.at_least(volume, [m if a == axis else 1 for a, m in enumerate(size)])
            == volume.take(want, axis)
        ).all()


@DIMS
@examples(40)
@given(data=st.data(), kind=st.sampled_from([np.uint8, np.float32]), seed=SEEDS)
def test_resizing_keeps_constants_range_and_classes(dims, data, kind, seed):
    grid, rng = data.draw(grids(dims, 1, 14)), np.random.default_rng(seed)
    size = data.draw(st.integers(1, 14)) if dims == 2 else data.draw(grids(3, 1, 14))
    image, label = (rng.random(grid) * 255).astype(kind), data.draw(label_maps(grid, 4))
    out, y = loading.resize_image(image, size), loading.resize_label(label, size)
    assert (
        out.shape == y.shape == loading.shape_of(size) and out.dtype == kind and y.dtype == np.uint8
    )
    assert (
        image.min() - 1e-3 <= out.min()
        and out.max() <= image.max() + 1e-3
        and set(np.unique(y)) <= set(np.unique(label))
    )
    assert np.allclose(loading.resize_image(np.full(grid, 77, kind), size), 77)
    if grid == loading.shape_of(size):
        assert (out == image).all() and (y == label).all()
