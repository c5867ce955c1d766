"""Geometry of masks in 2D and 3D, and every line of the catalog on volumes."""

import cv2
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import ConvexHull, Delaunay

import corrupt
from data import shapes

EVERY_LINE = corrupt.SINGLE + corrupt.HEAVY + corrupt.BLOB + corrupt.CATASTROPHIC
# these may leave a smooth body as it is, at the small sizes of a small grid
GENTLE = {
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
}
# these depend on few or no draws, and on none of the dimension
SAME_IN_ONE_SLICE = GENTLE | {
    line[0]
    for line in EVERY_LINE
    if line[2]
    in (
        corrupt.erode,
        corrupt.dilate,
        corrupt.polygon,
        corrupt.box,
        corrupt.jagged,
        corrupt.scale,
        corrupt.rotate,
        corrupt.gaussian_blob,
        corrupt.inverted,
        corrupt.empty,
        corrupt.full,
        corrupt.noise,
    )
}


def corrupted(line, label, K, rng):
    """A line of the catalog on a label map."""
    return corrupt.corrupt_classes(corrupt.corruption_of(line), label, K, rng)


def quadric(shape, center, radii):
    return (
        sum(
            ((g - c) / r) ** 2
            for g, c, r in zip(np.ogrid[tuple(slice(s) for s in shape)], center, radii)
        )
        <= 1
    )


def atrium(shape=(80, 112, 112)):
    """Two lobes and a vein, off the middle."""
    unit, half = np.array(shape), (shape[0] - 1) / 2
    m = quadric(shape, (half, *(0.5, 0.48) * unit[1:]), (0.28, 0.24, 0.18) * unit)
    m |= quadric(shape, (half, *(0.62, 0.6) * unit[1:]), (0.15, 0.13, 0.12) * unit)
    return (m | quadric(shape, (half, *(0.3, 0.5) * unit[1:]), (0.3, 0.05, 0.06) * unit)).astype(
        np.uint8
    )


def classes(m):
    """Splits a body into three touching classes."""
    middle, label = np.rint(shapes.center(m)).astype(int), m.copy()
    label[..., middle[-1] :][m[..., middle[-1] :] > 0] = 2
    label[..., middle[-2] :, :][m[..., middle[-2] :, :] > 0] = 3
    return label


def voxel(shape):
    m = np.zeros(shape, np.uint8)
    m[tuple(s // 2 for s in shape)] = 1
    return m


def bar(shape=(12, 40, 40)):
    """An L of some slices: neither convex nor round."""
    m = np.zeros(shape, np.uint8)
    m[2:9, 5:33, 6:14] = 1
    m[2:5, 25:33, 6:34] = 1
    return m


BODIES = {
    "atrium": atrium(),
    "flat": atrium((8, 64, 64)),
    "voxel": voxel((9, 20, 24)),
    "full": np.ones((6, 24, 20), np.uint8),
    "slice": atrium((1, 64, 64)),
    "tiny": atrium((4, 16, 16)),
    "one slice of many": atrium((9, 48, 48)) * (np.arange(9) == 4)[:, None, None].astype(np.uint8),
    "tall": atrium((48, 40, 20)),
    "two": np.maximum(bar((20, 40, 40)), bar((20, 40, 40))[::-1, ::-1, ::-1]),
    "borders": np.maximum(
        bar((12, 40, 40)), np.pad(np.zeros((10, 38, 38), np.uint8), 1, constant_values=1)
    ),
}


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum(dtype=int) + b.sum(dtype=int)) if a.any() or b.any() else 1.0


# -------------------------------------------------------------------------------------- morphology


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("width, flat", [(3, 1), (5, 1), (7, 0.5), (7, 1), (5, 0)])
def test_dilation_and_erosion_are_those_of_scipy(name, width, flat):
    m, ball = BODIES[name], shapes.ball(width, flat)
    assert ball.shape == (2 * round(width // 2 * flat) + 1, width, width)
    assert (shapes.dilate(m, ball) == ndimage.binary_dilation(m, ball)).all()
    assert (shapes.erode(m, ball) == ndimage.binary_erosion(m, ball)).all()
    opened, closed = shapes.opening(m, ball), shapes.closing(m, ball)
    assert (
        opened == ndimage.binary_dilation(ndimage.binary_erosion(m, ball, border_value=1), ball)
    ).all()
    assert (
        closed == ndimage.binary_erosion(ndimage.binary_dilation(m, ball), ball, border_value=1)
    ).all()
    assert (opened <= m).all() and (m <= closed).all()


def test_in_2d_they_are_those_of_opencv():
    m = cv2.circle(
        cv2.circle(np.zeros((90, 110), np.uint8), (8, 40), 30, 1, -1), (60, 50), 25, 1, -1
    )
    for width in (3, 5, 9):
        ball, disc = (
            shapes.ball(width),
            cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)),
        )
        assert (shapes.dilate(m, ball) == cv2.dilate(m, disc)).all()
        assert (
            shapes.erode(m, ball)
            == cv2.erode(m, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        ).all()
        assert (shapes.opening(m, ball) == cv2.morphologyEx(m, cv2.MORPH_OPEN, disc)).all()
        assert (shapes.closing(m, ball) == cv2.morphologyEx(m, cv2.MORPH_CLOSE, disc)).all()
        assert (
            shapes.smooth(m, width) == (cv2.GaussianBlur(m * 255, (width, width), 0) > 127)
        ).all()


def test_smooth_rounds_a_corner_in_all_three_axes_and_respects_flatness():
    m = np.zeros((30, 40, 40), np.uint8)
    m[10:20, 10:30, 10:30] = 1
    assert (
        not shapes.smooth(m, 9, 1)[10, 10, 10]
        and shapes.smooth(m, 9, 1)[10, 20, 20]
        and dice(shapes.smooth(m, 9, 1), m) > 0.95
    )
    alone = m * (np.arange(30) == 12)[:, None, None].astype(np.uint8)
    assert (
        dice(shapes.smooth(alone, 9, shapes.flatness(alone)), alone) > 0.95
        and not shapes.smooth(alone, 9, 1).any()
    )


# ------------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    "m", [bar(), bar().transpose(2, 0, 1).copy(), np.rot90(bar((30, 40, 40)), axes=(0, 2)).copy()]
)
def test_hull_is_that_of_half_spaces(m):
    hull, corners = shapes.hull(m), np.argwhere(m)
    solid = Delaunay(corners[ConvexHull(corners).vertices])
    inside = (solid.find_simplex(np.argwhere(np.ones_like(m)), tol=1e-6) >= 0).reshape(m.shape)
    assert (
        (hull >= m).all()
        and hull.sum() > 1.2 * m.sum()
        and dice(hull, inside.view(np.uint8)) > 0.97
    )
    assert (shapes.hull(hull) == hull).all()


@pytest.mark.parametrize("name", BODIES)
def test_hull_and_box_contain_the_mask(name):
    m = BODIES[name]
    assert (shapes.hull(m) >= m).all() and (shapes.box(m) >= shapes.hull(m)).all()
    first, sides = shapes.bounds(m)
    assert shapes.box(m).sum() == sides.prod() and (first == np.argwhere(m).min(0)).all()


def test_moments_and_the_ellipsoid_of_them():
    points = np.argwhere(atrium()).astype(float)
    for body in BODIES.values():
        assert np.allclose(shapes.center(body), np.argwhere(body).mean(0)) and shapes.mass_moments(
            body
        )[1].shape == (3, 3)
    center, covariance = shapes.mass_moments(atrium())
    assert np.allclose(center, points.mean(0)) and np.allclose(
        covariance, np.cov(points.T, bias=True), atol=1e-3
    )
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]
    grid = np.indices((70, 80, 90)).reshape(3, -1).T - [34, 41, 44]
    tilted = (((grid @ turn / [14, 20, 30]) ** 2).sum(1) <= 1).reshape(70, 80, 90).astype(np.uint8)
    for m in (tilted, quadric((40, 60, 60), (20, 30, 28), (5, 20, 14)).astype(np.uint8)):
        assert dice(corrupt.ellipse(m, None), m) > 0.97


def test_disc_is_a_ball_of_the_volume_as_flat_as_the_object():
    m = atrium()
    assert abs(corrupt.disc(m, None).sum() / m.sum() - 1) < 0.06
    flat = quadric((9, 60, 60), (4, 30, 30), (3.5, 24, 16)).astype(np.uint8)
    out = corrupt.disc(flat, None)
    assert (
        abs(out.sum() / flat.sum() - 1) < 0.1
        and shapes.bounds(out)[1][0] <= shapes.bounds(flat)[1][0]
    )


def test_components_touch_at_corners():
    m = np.zeros((6, 10, 10), np.uint8)
    m[1:3, 1:3, 1:3] = m[3, 3, 3] = m[5, 8, 8] = 1
    labels, sizes = shapes.components(m)
    assert (
        sorted(sizes[1:]) == [1, 9]
        and sizes[0] == m.size - 10
        and labels[3, 3, 3] == labels[1, 1, 1]
        and not labels[0].any()
    )
    assert corrupt.largest_component(m, None).sum() == 9
    assert {int(corrupt.drop_component(m, np.random.default_rng(i)).sum()) for i in range(9)} == {
        1,
        9,
    }
    for seed in range(9):
        assert (
            0.25
            < corrupt.drop_component(atrium(), np.random.default_rng(seed)).sum() / atrium().sum()
            < 0.75
        )


# ------------------------------------------------------------------------------------------- warps


def test_affine_map_moves_and_scales_as_it_says():
    m = quadric((80, 90, 100), (40, 45, 50), (16, 20, 18)).astype(np.uint8)
    moved = shapes.center(shapes.affine_map(m, np.eye(2), shift=(5, -7, 9))) - shapes.center(m)
    assert np.allclose(moved, (5, -7, 9), atol=0.01)
    for factor in (0.7, 1.3):
        scaled = shapes.affine_map(m, np.eye(2) * factor, factor)
        assert scaled.sum() / m.sum() == pytest.approx(factor**3, rel=0.05)
        assert np.allclose(shapes.center(scaled), shapes.center(m), atol=0.6)
    turned = corrupt.rotate(bar(), np.random.default_rng(0), 30)
    assert (
        np.abs(turned.sum((1, 2)).astype(int) - bar().sum((1, 2))) <= 0.06 * bar().sum((1, 2))
    ).all() and dice(turned, bar()) < 0.9


def test_shift_goes_anywhere_by_a_share_of_the_object():
    m, spans = atrium(), corrupt.object_sides(atrium())
    moved = [
        (shapes.center(corrupt.shift(m, np.random.default_rng(i), 0.2)) - shapes.center(m)) / spans
        for i in range(24)
    ]
    assert (
        np.allclose(np.linalg.norm(moved, axis=1), 0.2, atol=0.02)
        and (np.std(moved, 0) > 0.07).all()
    )


@pytest.mark.parametrize("shape", [(60, 70), (40, 60, 70)])
def test_elastic_moves_by_the_amplitude_that_it_states(shape):
    field = shapes.random_field(shape, np.random.default_rng(0), 6, 1.5, 0.5)
    assert field.shape == (*shape, len(shape)) and field.dtype == np.float32
    spread = field.reshape(-1, len(shape)).std(0) / ([1.5, 1.5, 0.75][: len(shape)])
    assert (spread > 0.75).all() and (spread < 1.3).all() and abs(field).max() < 6 * 1.5
    assert all(
        np.diff(field[..., 0], axis=axis).std() < 0.5 * field[..., 0].std() for axis in (-1, -2)
    )  # smooth


@pytest.mark.parametrize("label", [classes(atrium((40, 60, 60))), classes(atrium((1, 40, 40)))])
def test_displacing_by_a_constant_is_a_shift(label):
    field = np.zeros((*label.shape, 3), np.float32) + np.float32(
        [3, -2, 0]
    )  # (x, y, z): where to look
    expected = np.zeros_like(label)
    expected[:, 2:, :-3] = label[:, :-2, 3:]
    assert (shapes.displace(label, field) == expected).all()
    assert not shapes.displace(label, field + 100).any()


def test_take_at_looks_up():
    label, index = classes(atrium((8, 30, 30))), [np.arange(n)[::-1] for n in (8, 30, 30)]
    assert (shapes.take_at(label, index) == label[::-1, ::-1, ::-1]).all()
    index[0] = np.arange(8) - 3
    assert (shapes.take_at(label, index)[3:] == label[:5, ::-1, ::-1]).all() and not shapes.take_at(
        label, index
    )[:3].any()


# -------------------------------------------------------------------------- the catalog on volumes


@pytest.mark.parametrize("line", EVERY_LINE + corrupt.SEVERAL_CLASSES, ids=lambda line: line[0])
def test_every_line_on_volumes(line):
    """On any body; one that is no point and no plane it changes, mostly.

    tests/test_properties.py asks whether the seed fixes it, and whether it leaves its input alone.
    """
    for name, body in BODIES.items():
        for K, truth in ((2, body), (4, classes(body))):
            if K == 2 and line in corrupt.SEVERAL_CLASSES:
                continue
            made = [corrupted(line, truth, K, np.random.default_rng(seed)) for seed in range(3)]
            for out in made:
                assert out.shape == truth.shape and out.dtype == np.uint8, name
                assert out.flags.c_contiguous and out.max(initial=0) < K, name
            if name in ("atrium", "flat") and line[0] not in GENTLE:
                assert np.mean([(out != truth).any() for out in made]) >= 0.5, name


@pytest.mark.parametrize(
    "line", [line for line in EVERY_LINE if line[0] in SAME_IN_ONE_SLICE], ids=lambda line: line[0]
)
def test_a_volume_of_one_slice_is_that_slice(line):
    for m in (BODIES["slice"][0], bar()[3], BODIES["full"][0], voxel((20, 24))):
        if m.sum() == 1 and line[2] in (corrupt.ellipse, corrupt.gaussian_blob):
            continue  # of one pixel, OpenCV draws five
        flat, deep = (corrupted(line, x, 2, np.random.default_rng(1)) for x in (m, m[None]))
        assert dice(deep[0], m) == pytest.approx(dice(flat, m), abs=0.05)


def test_flat_objects_are_worked_on_slice_by_slice():
    """A few thick slices: corruptions that know lengths do not jump from slice to slice."""
    m = np.zeros((8, 120, 120), np.uint8)
    m[3:5, 20:90, 30:100] = 1
    for f in (corrupt.erode, corrupt.dilate, corrupt.smooth):
        out = f(m, np.random.default_rng(0), 9)
        assert (
            out == np.stack([f(s, np.random.default_rng(0), 9) if s.any() else s for s in m])
        ).all()
    assert not corrupt.elastic(m, np.random.default_rng(0), 60, 5)[[0, 1, 6, 7]].any()


def test_swap_and_merge_on_volumes():
    label = classes(atrium((20, 40, 40)))
    swapped = corrupt.swap(label, np.random.default_rng(0), 4)
    assert ((swapped > 0) == (label > 0)).all() and sorted(np.bincount(swapped.ravel())) == sorted(
        np.bincount(label.ravel())
    )
    apart = np.zeros((6, 12, 12), np.uint8)
    apart[1, 2:6, 2:6], apart[2, 2:6, 2:6], apart[5, 9:, 9:] = (
        1,
        2,
        3,
    )  # 1 and 2 touch along the depth only
    for seed in range(9):
        merged = corrupt.merge(apart, np.random.default_rng(seed), 4)
        assert len(np.unique(merged)) in (3, 4) and ((merged > 0) == (apart > 0)).all()
        if (merged[1] != apart[1]).any():
            assert (merged[1][apart[1] > 0] == 2).all()


def test_sample_on_volumes_follows_the_mix_and_scores_itself():
    label, names, scores = classes(atrium((16, 40, 40))), set(), []
    for seed in range(150):
        mask, name = corrupt.draw_mask(
            label, 4, [label[::-1].copy()], np.random.default_rng([0, seed])
        )
        assert mask.shape == label.shape and mask.dtype == np.uint8 and mask.max() < 4
        found = corrupt.dice_of(mask, label, 4)
        assert found == pytest.approx([dice(mask == k, label == k) for k in (1, 2, 3)], abs=1e-6)
        names.add(name)
        scores.append(found.mean())
    assert {"identity", "cross image"} < names and len(names) > 40 and 0.5 < np.mean(scores) < 0.9
    nothing = np.zeros((6, 24, 24), np.uint8)
    invented = [
        mask
        for mask, name in (
            corrupt.draw_mask(nothing, 3, [], np.random.default_rng(i)) for i in range(20)
        )
        if name == "invented"
    ]
    assert invented and all(len(np.unique(mask)) == 2 for mask in invented)
