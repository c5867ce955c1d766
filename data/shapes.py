"""Geometry of binary masks, the same calls for slices and for volumes: the parts of corruptions.

OpenCV works on the whole of a slice. A volume is worked on inside a window around its object, slice
by slice by OpenCV and along the depth by NumPy, so that a call costs by the size of the object. A
volume is often coarser in depth: there, all lengths are multiplied by flatness(m). Beyond the grid
is background. No function writes to its input.

Legend: m a binary mask, uint8 [H, W] or [D, H, W], in places also a label map; n its dimensions, 2
or 3; points and vectors have the order of the axes, (y, x) or (z, y, x).
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

# ------------------------------------------------------------------------------ where the object is


class Box(NamedTuple):
    """A bounding box: the first index and the side of each axis."""

    first: np.ndarray  # [n] int
    sides: np.ndarray  # [n] int


class Moments(NamedTuple):
    """The centroid and the covariance of the foreground."""

    center: np.ndarray  # [n]
    covariance: np.ndarray  # [n, n]


def layers(m):
    """The slices of a mask, a view [D, H, W]; a slice is one."""
    return m.reshape(-1, *m.shape[-2:])


def bounds(m):
    """The bounding Box of the foreground; zeros without foreground."""
    if m.ndim == 2:
        x, y, w, h = cv2.boundingRect(m)
        return Box(np.array([y, x]), np.array([h, w]))
    x, y, w, h = cv2.boundingRect(m.max(0))
    if w == 0:
        return Box(np.zeros(3, int), np.zeros(3, int))
    depth = np.flatnonzero(m.reshape(len(m), -1).max(1))
    return Box(np.array([depth[0], y, x]), np.array([depth[-1] - depth[0] + 1, h, w]))


def extent(m):
    """The geometric mean of the sides of the bounding box in the plane of a slice, in pixels."""
    return float(np.prod(bounds(m).sides[-2:])) ** 0.5


def flatness(m):
    """The depth of a volume's object over its extent, at most 1; 0 for a slice.

    Lengths in the plane times this are lengths in depth.
    """
    if m.ndim == 2:
        return 0.0
    return float(min(1, bounds(m).sides[0] / max(1, extent(m))))


def object_window(m, reach):
    """The bounding box of a volume, grown by reach [n] but not beyond the grid; all of a slice.

    -> slices to index m with
    """
    if m.ndim == 2:
        return slice(None), slice(None)
    first, sides = (v.tolist() for v in bounds(m))
    return tuple(slice(max(0, a - r), a + s + r) for a, s, r in zip(first, sides, reach))


def within(m, reach, f):
    """f of the window around the object of m, in the grid of m; background around it."""
    at = object_window(m, reach)
    out = np.zeros_like(m)
    out[at] = f(m[at])
    return out


def plane_moments(image):
    """The Moments of a mask, or of weights float64 [H, W]."""
    # OpenCV would take weights of float32 with two columns for points
    M = cv2.moments(image, binaryImage=image.dtype == np.uint8)
    center = np.array([M["m01"], M["m10"]]) / M["m00"]
    covariance = np.array([[M["mu02"], M["mu11"]], [M["mu11"], M["mu20"]]]) / M["m00"]
    return Moments(center, covariance)


def mass_moments(m):
    """The Moments of the foreground."""
    if m.ndim == 2:
        return plane_moments(m)
    at = object_window(m, (0, 0, 0))
    inside = m[at] > 0
    center, covariance = np.zeros(3), np.zeros((3, 3))
    for axis, plane in enumerate(([1, 2], [0, 2], [0, 1])):  # projections hold all second moments
        projected = plane_moments(inside.sum(axis, dtype=np.float64))
        center[plane] = projected.center
        covariance[np.ix_(plane, plane)] = projected.covariance
    return Moments(center + [s.start for s in at], covariance)


def center(m):
    """The centroid [n] of the foreground."""
    return mass_moments(m).center


def components(m):
    """The components of the foreground (corners touch). -> label map, sizes; background first"""
    if m.ndim == 2:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(m)
        return labels, stats[:, cv2.CC_STAT_AREA]
    at = object_window(m, (0, 0, 0))
    labels = np.zeros(m.shape, np.int32)
    labels[at], count = ndimage.label(m[at], np.ones((3, 3, 3)))
    sizes = np.bincount(labels[at].ravel(), minlength=count + 1)
    sizes[0] = m.size - sizes[1:].sum()
    return labels, sizes


def half_space(shape, point, normal):
    """Where (p - point) . normal < 0. -> bool [*shape]"""
    terms = ((np.arange(side) - p) * v for side, p, v in zip(shape, point, normal))
    open_grid = np.ix_(*(term.astype(np.float32) for term in terms))
    return functools.reduce(np.add, open_grid) < 0


# --------------------------------------------------------------------------------------- morphology


@functools.lru_cache(64)
def ball(width, flat=0.0):
    """A round structuring element of an odd width; its depth is flat times the width.

    -> uint8 [2 rz + 1, width, width]
    """
    r = width // 2
    rz = round(r * flat)
    out = np.zeros((2 * rz + 1, width, width), np.uint8)
    for dz in range(-rz, rz + 1):
        s = round(r * (1 - (dz / max(rz, 1)) ** 2) ** 0.5)  # radius of this disc
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * s + 1, 2 * s + 1))
        out[rz + dz, r - s : r + s + 1, r - s : r + s + 1] = disc
    return out


def morph(operation, join, m, ball, outside):
    """Morphology of a slice or volume. -> [*m.shape]

    operation: cv2.dilate or cv2.erode, applied to each slice with each disc of the ball.
    join: np.maximum or np.minimum, which joins neighboring slices.
    outside: the value beyond the grid.
    """
    slices, rz = layers(m), len(ball) // 2
    border = dict(borderType=cv2.BORDER_CONSTANT, borderValue=outside)
    for dz in range(rz + 1):
        part = np.empty_like(slices)
        for source, result in zip(slices, part):
            operation(source, ball[rz + dz], dst=result, **border)
        if dz == 0:
            out = part
            continue
        join(out[dz:], part[:-dz], out=out[dz:])
        join(out[:-dz], part[dz:], out=out[:-dz])
        for beyond in (out[:dz], out[-dz:]):
            join(beyond, outside, out=beyond)
    return out.reshape(m.shape)


def dilated(m, ball, outside=0):
    return morph(cv2.dilate, np.maximum, m, ball, outside)


def eroded(m, ball, outside=0):
    return morph(cv2.erode, np.minimum, m, ball, outside)


def dilate(m, ball):
    """Dilation by a ball."""
    return within(m, np.array(ball.shape) // 2, lambda part: dilated(part, ball))


def erode(m, ball):
    """Erosion by a ball; beyond the grid is background."""
    return within(m, np.array(ball.shape) // 2, lambda part: eroded(part, ball))


def opening(m, ball):
    """Erosion, then dilation; as in OpenCV, the border of the grid does not erode."""
    return within(m, ball.shape, lambda part: dilated(eroded(part, ball, outside=1), ball))


def closing(m, ball):
    """Dilation, then erosion; as in OpenCV, the border of the grid does not erode."""
    return within(m, ball.shape, lambda part: eroded(dilated(part, ball), ball, outside=1))


def smooth(m, width, flat=0.0):
    """A Gaussian blur of an odd width (flat times that in depth), cut at one half."""
    depth = max(1, 2 * round((width * flat - 1) / 2) + 1)

    def blurred(part):
        out = np.stack([cv2.GaussianBlur(s * 255, (width, width), 0) for s in layers(part)])
        if depth > 1:
            out = cv2.GaussianBlur(out.reshape(len(out), -1), (1, depth), 0)
        return (out > 127).reshape(part.shape)

    return within(m, (depth, width, width), blurred)


# ------------------------------------------------------------------------------------------- bodies


def ellipsoid(shape, center, covariance):
    """The solid ellipse or ellipsoid with these moments: p' covariance^-1 p <= n + 2.

    n is 2 for a volume whose object has one slice. -> uint8 [*shape]
    """
    if len(shape) == 2:
        return ellipse(shape, center, covariance)
    out = np.zeros(shape, np.uint8)
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance, 1 / 12)
    size = 5 if covariance[0, 0] > 1e-6 else 4
    form = (axes / variance @ axes.T).astype(np.float32)  # covariance^-1, in the order z, y, x
    reach = (size * (axes**2 @ variance)) ** 0.5
    at = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(center, reach))
    z, y, x = (
        np.arange(side, dtype=np.float32)[s] - np.float32(c)
        for side, s, c in zip(shape, at, center)
    )
    z, y = z[:, None, None], y[:, None]
    plane = form[1, 1] * y * y + 2 * form[1, 2] * y * x + form[2, 2] * x * x  # [h, w]
    slope = 2 * (form[0, 1] * y + form[0, 2] * x)  # [h, w]
    out[at] = plane + (z * slope + form[0, 0] * z * z) <= size
    return out


def ellipse(shape, center, covariance):
    """The solid ellipse with these moments. -> uint8 [H, W]"""
    out = np.zeros(shape, np.uint8)
    variance, axes = np.linalg.eigh(covariance)
    minor, major = 4 * np.maximum(variance, 0.1) ** 0.5  # diameters
    angle = np.degrees(np.arctan2(axes[0, 1], axes[1, 1]))
    cv2.ellipse(out, (tuple(center[::-1]), (major, minor), angle), 1, -1)
    return out


def paint_ball(out, at, radius, depth, value):
    """Sets, in place, a ball around voxel `at`, a disc in a slice; depth: its radius along z."""
    *z, y, x = map(int, at)
    z = z[0] if z else 0
    rows = layers(out)
    for k in range(max(0, z - int(depth)), min(len(rows), z + int(depth) + 1)):
        share = 1 - ((k - z) / depth) ** 2 if k != z else 1  # of the area of the largest disc
        cv2.circle(rows[k], (x, y), round(radius * share**0.5), value, -1)


def ball_of(volume, depth):
    """The radius of a ball of so many voxels, and its radius in depth, which is at most `depth`."""
    rz = min(depth, (volume * 3 / (4 * np.pi)) ** (1 / 3))
    z = np.arange(-int(rz), int(rz) + 1)
    shares = 1 - (z / max(rz, 1e-6)) ** 2  # of the area of the largest disc
    return (volume / (np.pi * shares.sum())) ** 0.5, rz


def polygon(m, sides, start):
    """Each slice as an annotator clicks it: corners evenly spaced along its longest outline.

    start: where the first corner lies on the outline, in [0, 1) of the way to the second one.
    """
    out = np.zeros_like(m)
    for source, result in zip(layers(m), layers(out)):
        found, _ = cv2.findContours(source, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if found:
            outline = max(found, key=len)[:, 0]
            corners = (start + np.arange(sides)) * len(outline) / sides
            cv2.fillPoly(result, [outline[corners.astype(int) % len(outline)]], 1)
    return out


def hull(m):
    """The convex hull; slice by slice for a volume whose object is flat."""
    return within(m, (0, 0, 0), slice_hulls if m.ndim == 2 else volume_hull)


def corners(m):
    """The corners (x, y) of the convex hull of a slice. -> int [c, 2]"""
    found, _ = cv2.findContours(m, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not found:
        return np.zeros((0, 2), np.int32)
    return cv2.convexHull(np.concatenate(found))[:, 0]


def slice_hulls(m):
    """The convex hull of each slice."""
    out = np.zeros_like(m)
    for source, result in zip(layers(m), layers(out)):
        if len(points := corners(source)):
            cv2.fillConvexPoly(result, points, 1)
    return out


def volume_hull(m):
    """The convex hull of a volume, by the half spaces p . (nz, ny, nx) <= c of its facets.

    In each row (z, y), they bound x from both sides.
    """
    flat = [corners(s) for s in m]
    depth = np.repeat(np.arange(len(m)), [len(points) for points in flat])
    try:
        facets = ConvexHull(np.column_stack([depth, np.concatenate(flat)[:, ::-1]])).equations
    except QhullError:
        return slice_hulls(m)
    nx = facets[:, 2, None]  # facets [F, 4] (nz, ny, nx, -c)
    rest = [0, 0, 1e-3] - facets[:, [0, 1, 3]]  # (-nz, -ny, c); 1e-3: rounding
    right, left = nx[:, 0] > 1e-5, nx[:, 0] < -1e-5
    across = ~right & ~left
    limits = (rest[right] / nx[right], rest[left] / nx[left], rest[across])
    limits = [limit.astype(np.float32).T for limit in limits]
    y = np.arange(m.shape[1], dtype=np.float32)[:, None]
    x = np.arange(m.shape[2], dtype=np.float32)
    out = m.copy()
    for z, layer in enumerate(out):  # one by one, they stay in the cache
        most, least, room = (  # [H, facets of a side]
            y * by_y + (z * by_z + constant) for by_z, by_y, constant in limits
        )
        inside = (x <= most.min(1, keepdims=True)) & (x >= least.max(1, keepdims=True))
        layer |= inside & (room >= 0).all(1, keepdims=True)
    return out


def box(m):
    """The bounding box, filled."""
    out = np.zeros_like(m)
    out[tuple(slice(a, a + s) for a, s in zip(*bounds(m)))] = 1
    return out


# -------------------------------------------------------------------------------------------- warps
# A warp takes the nearest source of each voxel, and so also takes a label map.


def take_at(m, index):
    """m at other positions. index: for each axis, the source of each position, int [side].

    A source beyond the grid is background.
    """
    first, sides = bounds(m)
    out = np.zeros_like(m)
    hit = [np.flatnonzero((i >= a) & (i < a + s)) for i, a, s in zip(index, first, sides)]
    if not all(map(len, hit)):
        return out
    for axis, (i, h) in enumerate(zip(index, hit)):
        m = m.take(i[h], axis)
    out[np.ix_(*hit)] = m
    return out


def affine_map(m, plane, depth=1.0, shift=(0, 0, 0)):
    """Applies the matrix `plane` [2, 2] on (x, y) and the factor `depth` on z, then a shift [n].

    Both are about the centroid of the foreground.
    """
    middle = center(m)
    shift = np.asarray(shift[-m.ndim :], float)
    offset = (middle + shift)[:-3:-1] - plane @ middle[:-3:-1]
    matrix = np.hstack([plane, offset[:, None]])
    if m.ndim == 2:
        source = [0]
    else:
        z = (np.arange(len(m)) - middle[0] - shift[0]) / depth + middle[0]
        source = np.rint(z).astype(int).tolist()
    out = np.zeros_like(m)
    rows, results = layers(m), layers(out)
    for result, k in zip(results, source):
        if 0 <= k < len(rows):
            size = rows.shape[:0:-1]
            cv2.warpAffine(rows[k], matrix, size, dst=result, flags=cv2.INTER_NEAREST)
    return out


def random_field(shape, rng, step, amplitude, flat=0.0):
    """Smooth random displacements (x, y[, z]) in pixels. -> float32 [*shape, n]

    amplitude: their standard deviation (flat times that in depth). They are a cubic interpolation
    of noise on a grid of this step.
    """
    *depth, h, w = shape
    steps = [max(1, step * flat)] * len(depth) + [step, step]
    grid = [int(side / s) + 2 for side, s in zip(shape, steps)]
    noise = rng.standard_normal((*grid, len(shape)), dtype=np.float32) * (1.25 * amplitude)
    if not depth:
        return cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
    noise[..., 2] *= flat
    planes = [cv2.resize(n, (w, h), interpolation=cv2.INTER_CUBIC) for n in noise]
    planes = np.stack(planes).reshape(len(planes), -1)  # [d, h w 3]
    field = cv2.resize(planes, (h * w * 3, *depth), interpolation=cv2.INTER_CUBIC)
    return field.reshape(*shape, 3)


def displace(m, field):
    """Each pixel takes the value at itself + field [*m.shape, n] (x, y[, z])."""
    if m.ndim == 2:
        return cv2.remap(m, field + pixel_grid(*m.shape), None, cv2.INTER_NEAREST)
    padded = np.pad(m, 1)  # the border: background
    place = np.zeros(m.shape, np.int32)  # flat index
    for axis, side in enumerate(m.shape):
        along = [1, 1, 1]
        along[axis] = -1
        at = field[..., 2 - axis] + np.arange(1, side + 1, dtype=np.float32).reshape(along)
        place *= padded.shape[axis]
        place += np.rint(np.clip(at, 0, side + 1, out=at), out=at).astype(np.int32)
    return padded.ravel().take(place)


@functools.lru_cache(8)
def pixel_grid(h, w):
    """The position (x, y) of each pixel. -> float32 [h, w, 2]"""
    return np.dstack(np.meshgrid(np.arange(w), np.arange(h))).astype(np.float32)


def elastic(m, rng, step, amplitude):
    """Moves each pixel by a random_field."""
    flat = flatness(m)
    reach = int(np.ceil(4 * amplitude))

    def moved(part):
        return displace(part, random_field(part.shape, rng, step, amplitude, flat))

    return within(m, (int(np.ceil(reach * flat)), reach, reach), moved)
