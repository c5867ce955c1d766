"""The embedded default: short-axis heart phantoms, made in seconds, offline, the same for a seed.

    python -m data.phantom --out phantom.h5 [--unlabeled 60 --foreign 0.5]

Each patient is a volume of slices with a right ventricle, a myocardium (a ring) and a left
ventricle (its cavity) on a cluttered background. Three things are hard on purpose:

- Shape, position, contrast, bias field and noise vary between patients. A few labeled patients show
  little of this, and the images without labels show it all.
- Distractors have the intensities of the heart, and some have the shape of a ring. What is near an
  object decides whether it is a ventricle.
- --unlabeled adds an archive of patients without labels. A share of them, --foreign, is of another
  kind (FOREIGN), as in archives of hospitals, and pseudo-labels go wrong there.

--rare adds a small class, a bright scar of about .1% of the voxels, which most patients have.
--channels 2 gives each patient two images of another contrast (CONTRASTS). In neither can one see
all borders of the heart.

Legend: C channels, D depth, H height, W width.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data import h5
from data.options import SEED, Parser, cli, file, number

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]
RARE = "scar"  # the class that --rare adds
CONTRASTS = ("muscle as tissue", "muscle as blood")  # of the two channels: what looks alike in them
FOREIGN = ("contrast", "cut", "ghosts", "body")  # kinds of foreign patients, see patient()
DEPTH = 64.0  # mm: of a volume, however many slices it has
PIXEL = 1.5  # mm: the side of a slice's pixel, however many a slice has


def smooth_noise(shape, sigma, rng):
    """Gaussian noise of unit deviation, smoothed with sigma (per axis, in pixels)."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return noise / max(noise.std(), 1e-6)


def ellipse(grid, center, radii, angle):
    """Signed, radius-normalized distance to an ellipse, below 0 inside. grid: (y, x) [2, H, W]"""
    y, x = grid[0] - center[0], grid[1] - center[1]
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    return np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2) - 1


class Gray(NamedTuple):
    """The intensities of a patient's tissues, in [0, 1], one number or [C, 1, 1]."""

    blood: float
    muscle: float
    tissue: float
    lung: float
    scar: float = 1.2


def two_contrasts(gray):
    """Gray of one image -> of two, as CONTRASTS says."""
    first = gray._replace(muscle=gray.tissue)
    second = gray._replace(muscle=gray.blood)
    return Gray(*(np.reshape(both, (2, 1, 1)) for both in zip(first, second)))


class Heart(NamedTuple):
    """The shape of a patient's heart; lengths are shares of a slice's side."""

    center: np.ndarray  # (y, x) at the base
    cavity: float  # radius of the left ventricle at the base
    wall: float  # thickness of the myocardium
    squeeze: float  # of the left ventricle's axes: one is multiplied by it, the other divided
    turn: float  # angle of those axes
    right_size: float  # size of the right ventricle, relative to the cavity
    right_gap: float  # distance of the right ventricle, relative to that of the outer wall


class Distractor(NamedTuple):
    """A ring or a blob in the background; lengths are shares of a slice's side."""

    center: np.ndarray  # (y, x)
    radii: np.ndarray
    angle: float
    kind: float  # in [0, 1]: below .25 a ring


def draw_distractor(image, thing, gray, *, grid, height):
    """Draws a distractor on a slice [C, H, W], in place. height: of the slice, in units of 8 mm"""
    center = thing.center + 0.03 * np.sin(height / 3 + thing.kind * 6)
    distance = ellipse(grid, center, thing.radii, thing.angle)
    if thing.kind < 0.25:  # a ring with a bright cavity, as the heart has
        image[:] = np.where(distance < 0.5, gray.muscle, image)
        image[:] = np.where(distance < 0, gray.blood, image)
    else:  # a blob with the intensity of blood, muscle or lung
        intensities = (gray.blood, gray.muscle, gray.lung)
        image[:] = np.where(distance < 0, intensities[int(thing.kind * 30) % 3], image)


def draw_heart(image, label, heart, gray, *, grid, center, level, rng):
    """Draws a heart on a slice [C, H, W] and its label [H, W], in place. level: 0 base, 1 apex"""
    r = heart.cavity * np.sqrt(1 - 0.85 * level**2)
    wide, narrow = r * heart.squeeze, r / heart.squeeze
    left = ellipse(grid, center, (wide, narrow), heart.turn)
    outer = ellipse(grid, center, (wide + heart.wall, narrow + heart.wall), heart.turn)
    reach = (r + heart.wall) * heart.right_gap + 0.35 * r * heart.right_size
    angle = heart.turn + 0.4
    side_way = center + reach * np.array([np.sin(angle), np.cos(angle)])
    radii = (0.75 * r * heart.right_size, 1.25 * r * heart.right_size)
    right = ellipse(grid, side_way, radii, angle)
    if level < 0.85:
        label[right < 0] = 1
    label[outer < 0] = 2
    label[left < 0] = 3
    right_blood = gray.blood * rng.uniform(0.9, 1.1)
    image[:] = np.choose(label, [image, right_blood, gray.muscle, gray.blood])
    muscle_center = center + 0.45 * r * rng.uniform(-1, 1, 2)
    papillary = ellipse(grid, muscle_center, (0.2 * r, 0.3 * r), heart.turn)
    inside = (papillary < 0) & (label == 3)
    image[:] = np.where(inside, gray.muscle, image)  # dark, but the cavity by convention


def draw_scar(image, label, gray, rng):
    """Draws a scar in the myocardium of a volume [C, D, H, W] and its label, in place.

    It is a ball of a random size, as far as it lies in the myocardium. One patient of ten has none.
    """
    muscle = np.argwhere(label == 2)
    if not len(muscle) or rng.random() < 0.1:
        return
    radii = rng.uniform(0.8, 1.2) * np.array([0.11, 0.055, 0.055]) * label.shape
    center = rng.choice(muscle)
    near = (((muscle - center) / radii) ** 2).sum(1) < 1
    scar = tuple(muscle[near].T)
    image[:, *scar] = np.reshape(gray.scar, (-1, 1))
    label[scar] = 4


def patient(rng, depth, side, foreign=None, rare=False, channels=1):
    """One patient. -> image (D, H, W[, C]) float32 in [0, 1], label (D, H, W) uint8

    foreign: None or one of FOREIGN: "contrast", dark is bright, as of another scanner; "cut", a
    part of the heart is out of view; "ghosts", shifted copies of the body; "body", of another part
    of the body, without a heart.
    rare: whether there may be a scar. channels: 1 or 2.
    """
    grid = np.mgrid[:side, :side] / side - 0.5  # [2, H, W]
    slices = depth / 8  # in 8 mm
    heart = Heart(
        center=rng.uniform(-0.1, 0.1, 2),
        cavity=rng.uniform(0.11, 0.19),
        wall=rng.uniform(0.06, 0.09),
        squeeze=rng.uniform(0.8, 1.25),
        turn=rng.uniform(0, 2 * np.pi),
        right_size=rng.uniform(0.9, 1.3),
        right_gap=rng.uniform(0.75, 1.05),
    )
    gray = Gray(
        blood=rng.uniform(0.6, 0.9),
        muscle=rng.uniform(0.25, 0.45),
        tissue=rng.uniform(0.3, 0.55),
        lung=rng.uniform(0.05, 0.2),
    )
    if foreign == "contrast":
        gray = Gray(*(1 - value for value in gray))
    if channels == 2:
        gray = two_contrasts(gray)
    drift = rng.uniform(-0.06, 0.06, 2)  # of the heart's center from base to apex
    coarseness = (0, 1.5 * slices, side / 14, side / 14)
    wobble = smooth_noise((2, depth, side, side), coarseness, rng)
    clutter = [
        Distractor(
            center=rng.uniform(-0.45, 0.45, 2),
            radii=rng.uniform(0.03, 0.13, 2),
            angle=rng.uniform(0, np.pi),
            kind=rng.random(),
        )
        for _ in range(7 if foreign == "body" else 4)
    ]

    image = np.empty((channels, depth, side, side))
    label = np.zeros((depth, side, side), np.uint8)
    for z in range(depth):
        warped = grid + 0.012 * wobble[:, z]
        body = ellipse(warped, (0, 0), (0.48, 0.42), 0) < 0
        image[:, z] = np.where(body, gray.tissue, gray.lung)
        for thing in clutter:
            draw_distractor(image[:, z], thing, gray, grid=warped, height=z / slices)
        if foreign != "body":
            level = z / (depth - 1)
            center = heart.center + drift * level
            place = dict(grid=warped, center=center, level=level)
            draw_heart(image[:, z], label[z], heart, gray, **place, rng=rng)
    if rare:
        draw_scar(image, label, gray, rng)
    image = np.stack([scanned(channel, slices, rng) for channel in image])
    if foreign == "cut":
        image, label = cut_off(image, label, rng)
    if foreign == "ghosts":
        image = with_ghosts(image)
    return image[0] if channels == 1 else np.moveaxis(image, 0, -1), label


def cut_off(image, label, rng):
    """A patient off the center of the scanner: a side of the images [C, D, H, W] is black."""
    side = image.shape[-1]
    axis, shift = rng.integers(1, 3), int(rng.uniform(0.3, 0.45) * side)
    gone = [slice(None)] * 3
    gone[axis] = slice(0, shift)
    image, label = np.roll(image, shift, 1 + axis), np.roll(label, shift, axis)
    image[:, *gone], label[tuple(gone)] = 0, 0
    return image, label


def with_ghosts(image):
    """A patient who moved: four copies of the body, along an axis. image [C, D, H, W]"""
    fifth = image.shape[-1] / 5
    ghosts = sum(np.roll(image, round(k * fifth), 2) for k in (-2, -1, 1, 2)) / 4
    return np.clip(0.55 * image + 0.6 * ghosts, 0, 1)


def scanned(image, slices, rng):
    """An image (D, H, W) with blur, bias field, texture and noise. -> float32 in [0, 1]"""
    side = image.shape[-1]
    image = ndimage.gaussian_filter(image, (0, side / 160, side / 160))
    strength = rng.uniform(0.1, 0.35)
    field = smooth_noise(image.shape, (4 * slices, side / 3, side / 3), rng)
    bias = np.exp(strength * field)
    texture = rng.uniform(0.01, 0.04) * smooth_noise(image.shape, (0, 1, 1), rng)
    noise = rng.uniform(0.01, 0.04) * rng.standard_normal(image.shape)
    image = image * bias + texture + noise
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32)


def cases(args):
    """Yields the patients of all splits as h5.Case. The foreign ones of the archive come last."""
    counts = dict(train=args.train, val=args.val, test=args.test, unlabeled=args.unlabeled)
    splits = [split for split, count in counts.items() for _ in range(count)]
    foreign = [FOREIGN[i % len(FOREIGN)] for i in range(round(args.foreign * args.unlabeled))]
    kinds = [None] * (len(splits) - len(foreign)) + foreign
    for i, (split, kind) in enumerate(zip(splits, kinds)):
        rng = np.random.default_rng([args.seed, i])
        image, label = patient(rng, args.depth, args.size, kind, args.rare, args.channels)
        name = f"phantom{i:03d}"
        spacing = (DEPTH / args.depth, PIXEL, PIXEL)
        source = f"seed {args.seed}, patient {i}" + (f", foreign: {kind}" if kind else "")
        yield h5.Case(
            split=split,
            name=name,
            image=image,
            label=None if split == "unlabeled" else label,
            patient=name,
            spacing=spacing,
            source=source,
        )


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.phantom")
    p.add_argument("--out", type=file, required=True, help="dataset file to write")
    p.add_argument("--train", type=number(1), default=60, help="train patients")
    p.add_argument("--val", type=number(1), default=10, help="validation patients")
    p.add_argument("--test", type=number(0), default=10, help="test patients")
    p.add_argument("--unlabeled", type=number(0), default=0, help="patients of the archive")
    p.add_argument(
        "--foreign",
        type=number(0, 1, kind=float),
        default=0,
        help="share of the archive's patients that are of another kind",
    )
    p.add_argument("--rare", action="store_true", help=f"one more class, small: {RARE}")
    p.add_argument(
        "--channels",
        type=int,
        choices=(1, 2),
        default=1,
        help=f"2: images of two contrasts ({', '.join(CONTRASTS)})",
    )
    p.add_argument("--depth", type=number(4), default=8, help="slices of a volume")
    p.add_argument("--size", type=number(32), default=96, help="side of a slice, pixels")
    p.add_argument(
        "--dims",
        type=int,
        choices=(2, 3),
        default=2,
        help="2: segmented slice by slice; 3: as volumes",
    )
    p.add_argument("--seed", type=SEED, default=0, help="of the whole dataset")
    args = p.parse_args(argv)
    if args.foreign and not args.unlabeled:
        p.error("--foreign is a share of the archive; give --unlabeled, too")

    classes = [*CLASSES, RARE] if args.rare else CLASSES
    about = dict(name="phantom", classes=classes, dims=args.dims, channels=args.channels)
    if args.channels == 2:
        about["channel_names"] = CONTRASTS
    h5.report(h5.write(args.out, cases(args), **about))


if __name__ == "__main__":
    cli(main)
