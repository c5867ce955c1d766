"""Geometry of binary masks, the same calls for slices and for volumes: what the corruptions of corrupt.py are made of.

A slice is worked on whole, by OpenCV. A volume is worked on inside a window around its object, slice by slice by OpenCV, and along the
depth by NumPy, so that a call costs by the object's size. A volume is often coarser in depth: there, all lengths are multiplied by
flatness(m). Beyond the grid is background. No function writes to its input.

Legend: m a binary mask, uint8 [H, W] or [D, H, W], in places also a label map; n its dimensions, 2 or 3; points and vectors have
the order of the axes, (y, x) or (z, y, x).
"""
import functools

import cv2
import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError


# ---------------------------------------------------------------------------------------------------- where the object is

def layers(m):
    """The slices of a mask, a view [D, H, W]; a slice is one."""
    return m.reshape(-1, *m.shape[-2:])


def bounds(m):
    """Bounding box of the foreground: first index and side of each axis. -> two [n] int; zeros without foreground"""
    if m.ndim == 2:
        x, y, w, h = cv2.boundingRect(m)
        return np.array([y, x]), np.array([h, w])
    x, y, w, h = cv2.boundingRect(m.max(0))
    depth = np.flatnonzero(m.reshape(len(m), -1).max(1))
    return (np.array([depth[0], y, x]), np.array([depth[-1] - depth[0] + 1, h, w])) if w else (np.zeros(3, int), np.zeros(3, int))


def extent(m):
    """Geometric mean of the bounding box's sides in the plane of the last two axes, pixels."""
    return float(np.prod(bounds(m)[1][-2:])) ** 0.5


def flatness(m):
    """Depth of a volume's object over its extent, at most 1: lengths times this are lengths in depth. A slice has none: 0."""
    return 0.0 if m.ndim == 2 else float(min(1, bounds(m)[1][0] / max(1, extent(m))))


def window(m, reach):
    """A volume's bounding box, grown by reach [n] but not beyond the grid; all of a slice. -> slices to index m with"""
    if m.ndim == 2:
        return slice(None), slice(None)
    first, sides = bounds(m)
    return tuple(slice(max(0, a - r), a + s + r) for a, s, r in zip(first.tolist(), sides.tolist(), reach))


def within(m, reach, f):
    """f of the window of m; background around it."""
    at, out = window(m, reach), np.zeros_like(m)
    out[at] = f(m[at])
    return out


def plane_moments(image):
    """Centroid [2] and covariance [2, 2] of a mask or of weights float64 (OpenCV takes two columns of float32 for points)."""
    M = cv2.moments(image, binaryImage=image.dtype == np.uint8)
    return np.array([M["m01"], M["m10"]]) / M["m00"], np.array([[M["mu02"], M["mu11"]], [M["mu11"], M["mu20"]]]) / M["m00"]


def moments(m):
    """Centroid [n] and covariance [n, n] of the foreground."""
    if m.ndim == 2:
        return plane_moments(m)
    at, center, covariance = window(m, (0, 0, 0)), np.zeros(3), np.zeros((3, 3))
    inside = m[at] > 0
    for axis, plane in enumerate(([1, 2], [0, 2], [0, 1])):  # three projections hold all second moments
        center[plane], covariance[np.ix_(plane, plane)] = plane_moments(inside.sum(axis, dtype=np.float64))
    return center + [s.start for s in at], covariance


def center(m):
    """Centroid [n] of the foreground."""
    return moments(m)[0]


def components(m):
    """Label map of the components (corners touch), and their sizes, background first."""
    if m.ndim == 2:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(m)
        return labels, stats[:, cv2.CC_STAT_AREA]
    at, labels = window(m, (0, 0, 0)), np.zeros(m.shape, np.int32)
    labels[at], count = ndimage.label(m[at], np.ones((3, 3, 3)))
    sizes = np.bincount(labels[at].ravel(), minlength=count + 1)
    sizes[0] = m.size - sizes[1:].sum()
    return labels, sizes


def half_space(shape, point, normal):
    """Where (p - point) . normal < 0. -> bool"""
    terms = ((np.arange(side) - p) * v for side, p, v in zip(shape, point, normal))
    return functools.reduce(np.add, np.ix_(*(t.astype(np.float32) for t in terms))) < 0


# ---------------------------------------------------------------------------------------------------- morphology

@functools.lru_cache(64)
def ball(width, flat=0.0):
    """Round structuring element of an odd width; its depth is flat times that. -> uint8 [2 rz + 1, width, width]"""
    r, rz = width // 2, round(width // 2 * flat)
    out = np.zeros((2 * rz + 1, width, width), np.uint8)
    for dz in range(-rz, rz + 1):
        s = round(r * (1 - (dz / max(rz, 1)) ** 2) ** 0.5)
        out[rz + dz, r - s:r + s + 1, r - s:r + s + 1] = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * s + 1, 2 * s + 1))
    return out


def morph(operation, join, m, ball, outside):
    """Each slice with each disc of the ball by OpenCV, then the maximum or minimum over neighboring slices."""
    m, rz = layers(m), len(ball) // 2
    for dz in range(rz + 1):
        part = np.empty_like(m)
        for source, result in zip(m, part):
            operation(source, ball[rz + dz], dst=result, borderType=cv2.BORDER_CONSTANT, borderValue=outside)
        if dz == 0:
            out = part
            continue
        for here, there in ((slice(dz, None), slice(None, -dz)), (slice(None, -dz), slice(dz, None))):
            join(out[here], part[there], out=out[here])
        for beyond in (out[:dz], out[-dz:]):
            join(beyond, outside, out=beyond)
    return out


def dilate(m, ball):
    return within(m, np.array(ball.shape) // 2, lambda part: morph(cv2.dilate, np.maximum, part, ball, 0).reshape(part.shape))


def erode(m, ball):
    return within(m, np.array(ball.shape) // 2, lambda part: morph(cv2.erode, np.minimum, part, ball, 0).reshape(part.shape))


def opening(m, ball):
    """Erosion, then dilation; as in OpenCV, the grid's border does not erode."""
    return within(m, ball.shape, lambda part: morph(cv2.dilate, np.maximum, morph(cv2.erode, np.minimum, part, ball, 1), ball, 0)
                  .reshape(part.shape))


def closing(m, ball):
    """Dilation, then erosion; as in OpenCV, the grid's border does not erode."""
    return within(m, ball.shape, lambda part: morph(cv2.erode, np.minimum, morph(cv2.dilate, np.maximum, part, ball, 0), ball, 1)
                  .reshape(part.shape))


def smooth(m, width, flat=0.0):
    """Gaussian blur of an odd width (flat times that in depth), cut at one half."""
    depth = max(1, 2 * round((width * flat - 1) / 2) + 1)

    def blurred(part):
        out = np.stack([cv2.GaussianBlur(s * 255, (width, width), 0) for s in layers(part)])
        if depth > 1:
            out = cv2.GaussianBlur(out.reshape(len(out), -1), (1, depth), 0)
        return (out > 127).reshape(part.shape)
    return within(m, (depth, width, width), blurred)


# ---------------------------------------------------------------------------------------------------- bodies

def ellipsoid(shape, center, covariance):
    """The solid ellipse or ellipsoid with these moments: p' covariance^-1 p <= n + 2; n is 2 for a volume with one slice of object."""
    variance, axes = np.linalg.eigh(covariance)
    out = np.zeros(shape, np.uint8)
    if len(shape) == 2:
        minor, major = 4 * np.maximum(variance, 0.1) ** 0.5
        cv2.ellipse(out, (tuple(center[::-1]), (major, minor), np.degrees(np.arctan2(axes[0, 1], axes[1, 1]))), 1, -1)
        return out
    size, variance = (5 if covariance[0, 0] > 1e-6 else 4), np.maximum(variance, 1 / 12)
    form, reach = axes / variance @ axes.T, (size * (axes ** 2 @ variance)) ** 0.5
    at = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(center, reach))
    z, y, x = (np.arange(n, dtype=np.float32)[s] - np.float32(c) for n, s, c in zip(shape, at, center))
    z, y, f = z[:, None, None], y[:, None], form.astype(np.float32)
    plane, slope = f[1, 1] * y * y + 2 * f[1, 2] * y * x + f[2, 2] * x * x, 2 * (f[0, 1] * y + f[0, 2] * x)
    out[at] = plane + (z * slope + f[0, 0] * z * z) <= size
    return out


def paint_ball(out, at, radius, depth, value):
    """Sets, in place, a ball around voxel `at`, `depth` its radius along the depth; a disc in a slice."""
    *z, y, x = map(int, at)
    z, rows = z[0] if z else 0, layers(out)
    for k in range(max(0, z - int(depth)), min(len(rows), z + int(depth) + 1)):
        share = 1 - ((k - z) / depth) ** 2 if k != z else 1
        cv2.circle(rows[k], (x, y), round(radius * share ** 0.5), value, -1)


def ball_of(volume, depth):
    """Radius of a ball of so many voxels, and its radius in depth, which is at most `depth`."""
    rz = min(depth, (volume * 3 / (4 * np.pi)) ** (1 / 3))
    shares = 1 - (np.arange(-int(rz), int(rz) + 1) / max(rz, 1e-6)) ** 2  # its slices' areas
    return (volume / (np.pi * shares.sum())) ** 0.5, rz


def polygon(m, sides, start):
    """Each slice as an annotator clicks it: corners evenly spaced along its longest outline, from `start` in [0, 1)."""
    out = np.zeros_like(m)
    for a, b in zip(layers(m), layers(out)):
        found, _ = cv2.findContours(a, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if found:
            outline = max(found, key=len)[:, 0]
            corners = (start + np.arange(sides)) * len(outline) / sides
            cv2.fillPoly(b, [outline[corners.astype(int) % len(outline)]], 1)
    return out


def hull(m):
    """Convex hull; slice by slice for a volume whose object is flat."""
    return within(m, (0, 0, 0), slice_hulls if m.ndim == 2 else volume_hull)


def corners(m):
    """Corners (x, y) of a slice's convex hull. -> int [c, 2]"""
    found, _ = cv2.findContours(m, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.convexHull(np.concatenate(found))[:, 0] if found else np.zeros((0, 2), np.int32)


def slice_hulls(m):
    out = np.zeros_like(m)
    for a, b in zip(layers(m), layers(out)):
        if len(points := corners(a)):
            cv2.fillConvexPoly(b, points, 1)
    return out


def volume_hull(m):
    """By the facets' half spaces p . (nz, ny, nx) <= c: in each row (z, y), they bound x from both sides."""
    flat = [corners(s) for s in m]
    points = np.column_stack([np.repeat(np.arange(len(m)), [len(p) for p in flat]), np.concatenate(flat)[:, ::-1]])
    try:
        facets = ConvexHull(points).equations                               # [F, 4] (nz, ny, nx, -c)
    except QhullError:
        return slice_hulls(m)
    nx, rest = facets[:, 2, None], [0, 0, 1e-3] - facets[:, [0, 1, 3]]      # 1e-3: rounding
    right, left = nx[:, 0] > 1e-5, nx[:, 0] < -1e-5
    limits = [part.astype(np.float32).T for part in (rest[right] / nx[right], rest[left] / nx[left], rest[~right & ~left])]
    y, x, out = np.arange(m.shape[1], dtype=np.float32)[:, None], np.arange(m.shape[2], dtype=np.float32), m.copy()
    for z, layer in enumerate(out):                                         # one by one, they stay in the cache
        most, least, room = (y * by_y + (z * by_z + constant) for by_z, by_y, constant in limits)  # [H, facets of a side]
        layer |= (x <= most.min(1, keepdims=True)) & (x >= least.max(1, keepdims=True)) & (room >= 0).all(1, keepdims=True)
    return out


def box(m):
    """Bounding box."""
    out = np.zeros_like(m)
    out[tuple(slice(a, a + s) for a, s in zip(*bounds(m)))] = 1
    return out


# ---------------------------------------------------------------------------------------------------- warps
# They look each voxel's nearest source up, and also take a label map.

def resample(m, index):
    """index: for each axis, where its positions look up, [side] int; beyond the grid is background."""
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
    """Applies the matrix `plane` [2, 2] on (x, y) and the factor `depth` on z, about the foreground's centroid, then a shift [n]."""
    c, shift, out = center(m), np.asarray(shift[-m.ndim:], float), np.zeros_like(m)
    offset = (c + shift)[:-3:-1] - plane @ c[:-3:-1]
    rows, lines = layers(m), layers(out)
    if m.ndim == 2:
        source = [0]
    else:
        source = np.rint((np.arange(len(m)) - c[0] - shift[0]) / depth + c[0]).astype(int).tolist()
    matrix = np.hstack([plane, offset[:, None]])
    for z, k in enumerate(source):
        if 0 <= k < len(rows):
            cv2.warpAffine(rows[k], matrix, rows.shape[:0:-1], dst=lines[z], flags=cv2.INTER_NEAREST)
    return out


def random_field(shape, rng, step, amplitude, flat=0.0):
    """Smooth displacements (x, y[, z]) in pixels, of standard deviation `amplitude` (flat times that in depth): cubic interpolation of
    noise on a grid of this step. -> float32 [*shape, n]"""
    *depth, h, w = shape
    steps = [max(1, step * flat)] * len(depth) + [step, step]
    noise = rng.standard_normal((*(int(side / s) + 2 for side, s in zip(shape, steps)), len(shape)), dtype=np.float32) * (1.25 * amplitude)
    if not depth:
        return cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
    noise[..., 2] *= flat
    planes = np.stack([cv2.resize(n, (w, h), interpolation=cv2.INTER_CUBIC) for n in noise])
    return cv2.resize(planes.reshape(len(planes), -1), (h * w * 3, *depth), interpolation=cv2.INTER_CUBIC).reshape(*shape, 3)


def displace(m, field):
    """Each pixel takes the value at itself + field [*m.shape, n] (x, y[, z])."""
    if m.ndim == 2:
        return cv2.remap(m, field + pixel_grid(*m.shape), None, cv2.INTER_NEAREST)
    padded = np.pad(m, 1)                                           # the border: background
    place = np.zeros(m.shape, np.int32)                             # flat index
    for axis, side in enumerate(m.shape):
        at = field[..., 2 - axis] + np.arange(1, side + 1, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        place *= padded.shape[axis]
        place += np.rint(np.clip(at, 0, side + 1, out=at), out=at).astype(np.int32)
    return padded.ravel().take(place)


@functools.lru_cache(8)
def pixel_grid(h, w):
    return np.dstack(np.meshgrid(np.arange(w), np.arange(h))).astype(np.float32)


def elastic(m, rng, step, amplitude):
    """Moves each pixel by a random_field."""
    flat = flatness(m)
    reach = int(np.ceil(4 * amplitude))
    return within(m, (int(np.ceil(reach * flat)), reach, reach),
                  lambda part: displace(part, random_field(part.shape, rng, step, amplitude, flat)))
