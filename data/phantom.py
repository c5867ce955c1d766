"""The embedded default: short-axis heart phantoms, made in seconds, offline, the same for a seed.

    python -m data.phantom --out phantom.h5

Each patient is a volume of slices with a right ventricle, a myocardium (a ring) and a left ventricle (its cavity) on a cluttered
background. Shape, position, contrast, bias field and noise vary between patients; distractors have the same intensity as
the cavities, and some the shape of a ring. So a handful of labels trails full supervision clearly.
"""
import numpy as np
from scipy import ndimage

from data import h5
from data.files import SEED, Parser, cli, number

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]
DEPTH, PIXEL = 64.0, 1.5  # mm: of a volume, however many slices it has, and of a slice's pixels


def smooth_noise(shape, sigma, rng):
    """Gaussian noise of unit deviation, smoothed with sigma (per axis, in pixels)."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return noise / max(noise.std(), 1e-6)


def ellipse(grid, center, radii, angle):
    """Signed, radius-normalized distance to an ellipse: below 0 inside. grid: (y, x), each [H, W]."""
    y, x = grid[0] - center[0], grid[1] - center[1]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2) - 1


def patient(rng, depth, side):
    """One patient. -> image (D, H, W) float32 in [0, 1], label (D, H, W) uint8."""
    grid, slices = np.mgrid[:side, :side] / side - 0.5, depth / 8  # slices: of 8 mm
    center = rng.uniform(-0.12, 0.12, 2)
    cavity, wall = rng.uniform(0.07, 0.14), rng.uniform(0.025, 0.06)
    squeeze, turn = rng.uniform(0.8, 1.25), rng.uniform(0, 2 * np.pi)
    right_size, right_gap = rng.uniform(0.8, 1.5), rng.uniform(0.75, 1.05)
    blood, muscle, tissue, lung = rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.45), rng.uniform(0.3, 0.55), rng.uniform(0.05, 0.2)
    first, last = rng.integers(0, 2), depth - rng.integers(0, 3)  # slices beyond base and apex hold no heart
    drift, wobble = rng.uniform(-0.06, 0.06, 2), smooth_noise((2, depth, side, side), (0, 1.5 * slices, side / 14, side / 14), rng)
    clutter = [(rng.uniform(-0.45, 0.45, 2), rng.uniform(0.03, 0.13, 2), rng.uniform(0, np.pi), rng.random()) for _ in range(5)]

    image, label = np.empty((depth, side, side)), np.zeros((depth, side, side), np.uint8)
    for z in range(depth):
        warped = grid + 0.012 * wobble[:, z]
        image[z] = np.where(ellipse(warped, (0, 0), (0.46, 0.38), 0) < 0, tissue, lung)
        for place, radii, angle, kind in clutter:
            distance = ellipse(warped, place + 0.03 * np.sin(z / slices / 3 + kind * 6), radii, angle)
            if kind < 0.25:    # a ring with a bright cavity, as the heart has
                image[z][distance < 0.5], image[z][distance < 0] = muscle, blood
            else:              # a blob with the intensity of blood, muscle or lung
                image[z][distance < 0] = (blood, muscle, lung)[int(kind * 30) % 3]
        if first <= z < last:
            level = (z - first) / max(last - first - 1, 1)      # 0 base, 1 apex
            r = cavity * np.sqrt(1 - 0.85 * level ** 2)
            middle = center + drift * level
            left = ellipse(warped, middle, (r * squeeze, r / squeeze), turn)
            outer = ellipse(warped, middle, (r * squeeze + wall, r / squeeze + wall), turn)
            reach = (r + wall) * right_gap + 0.35 * r * right_size
            side_way = middle + reach * np.array([np.sin(turn + 0.4), np.cos(turn + 0.4)])
            right = ellipse(warped, side_way, (0.75 * r * right_size, 1.25 * r * right_size), turn + 0.4)
            if level < 0.85:
                label[z][right < 0] = 1
            label[z][outer < 0] = 2
            label[z][left < 0] = 3
            image[z] = np.choose(label[z], [image[z], blood * rng.uniform(0.9, 1.1), muscle, blood])
            papillary = ellipse(warped, middle + 0.45 * r * rng.uniform(-1, 1, 2), (0.2 * r, 0.3 * r), turn)
            image[z][(papillary < 0) & (label[z] == 3)] = muscle  # dark, but the cavity by convention
    image = ndimage.gaussian_filter(image, (0, side / 160, side / 160))
    bias = np.exp(rng.uniform(0.1, 0.35) * smooth_noise((depth, side, side), (4 * slices, side / 3, side / 3), rng))
    texture = rng.uniform(0.02, 0.06) * smooth_noise(image.shape, (0, 1, 1), rng)
    image = image * bias + texture + rng.uniform(0.02, 0.06) * rng.standard_normal(image.shape)
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32), label


def main(argv=None):
    p = Parser(__doc__, prog="python -m data.phantom")
    p.add_argument("--out", required=True, help="dataset file to write")
    p.add_argument("--train", type=number(1), default=60, help="train patients")
    p.add_argument("--val", type=number(1), default=10, help="validation patients")
    p.add_argument("--test", type=number(0), default=10, help="test patients")
    p.add_argument("--depth", type=number(4), default=8, help="slices of a volume")
    p.add_argument("--size", type=number(32), default=96, help="side of a slice, pixels")
    p.add_argument("--dims", type=int, choices=(2, 3), default=2, help="2: segmented slice by slice; 3: as volumes")
    p.add_argument("--seed", type=SEED, default=0, help="of the whole dataset")
    args = p.parse_args(argv)

    splits = ["train"] * args.train + ["val"] * args.val + ["test"] * args.test
    def cases():
        for i, split in enumerate(splits):
            image, label = patient(np.random.default_rng([args.seed, i]), args.depth, args.size)
            yield h5.Case(split, f"phantom{i:03d}", image, label, f"phantom{i:03d}",
                          (DEPTH / args.depth, PIXEL, PIXEL), f"seed {args.seed}, patient {i}")
    info = h5.write(args.out, cases(), name="phantom", classes=CLASSES, dims=args.dims, channels=1)
    h5.report(info)


if __name__ == "__main__":
    cli(main)
