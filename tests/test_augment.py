"""Views: image and mask move together, intensity leaves the mask alone, the generator's seed fixes everything."""
import math

import pytest
import torch

from data import augment

SHAPES = [(3, 1, 32, 40), (3, 3, 32, 32), (2, 5, 12, 20, 16)]


def shapes(shape, seed=0):
    """Labels with blobs of three values, and an image that shows them."""
    torch.manual_seed(seed)
    coarse = torch.randn(shape[0], 1, *(s // 4 for s in shape[2:]))
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear" if len(shape) == 4 else "trilinear")
    label = (smooth > 0.2).long() + (smooth > 0.7).long()
    return label.expand(-1, shape[1], *shape[2:]).float().contiguous(), label[:, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_image_and_label_stay_aligned(shape):
    image, label = shapes(shape)
    moved, y = augment.weak(image, label)
    assert moved.shape == image.shape and y.shape == label.shape and y.dtype == label.dtype
    assert (y != label).float().mean() > 0.05                              # it did move
    inside = (moved[:, 0] - moved[:, 0].round()).abs() < 1e-3              # away from interpolated edges
    assert inside.float().mean() > 0.4 and (moved[:, 0].round()[inside] == y[inside]).float().mean() > 0.995


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flips_are_exact_and_no_geometry_is_identity(shape):
    image, label = shapes(shape)
    still = augment.random_geometry(image, rotate=0, scale=0, shift=0, flip="none")
    assert torch.allclose(augment.move(image, still), image, atol=1e-4) and (augment.move(label, still) == label).all()
    torch.manual_seed(3)
    flipped = augment.move(image, augment.random_geometry(image, rotate=0, scale=0, shift=0))
    axes = [[a for i, a in enumerate(range(1, image.dim() - 1)) if bits >> i & 1] for bits in range(2 ** (image.dim() - 2))]
    for before, after in zip(image, flipped):
        assert any(torch.allclose(before.flip(a) if a else before, after, atol=1e-4) for a in axes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strong_view_changes_intensity_only(shape):
    image, _ = shapes(shape)
    image = image * 2 - 1
    view = augment.strong(image)
    assert view.shape == image.shape and view.isfinite().all() and (view - image).abs().mean() > 0.05
    for a, b in zip(image.flatten(1), view.flatten(1)):  # what is bright stays bright: nothing moved
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.7


def test_same_seed_same_views():
    image, label = shapes(SHAPES[0])
    def views():
        torch.manual_seed(5)
        return (*augment.weak(image, label), augment.strong(image))
    assert all((a == b).all() for a, b in zip(views(), views()))


def test_blur_keeps_constants_and_matches_scipy():
    from scipy.ndimage import gaussian_filter
    assert torch.allclose(augment.blur(torch.ones(2, 2, 20, 20), torch.full((2, 1, 1, 1), 2.0), 2.0), torch.ones(2, 2, 20, 20), atol=1e-5)
    image = torch.randn(2, 1, 24, 30)
    ours = augment.blur(image, torch.tensor([0.7, 1.5])[:, None, None, None], 1.5)
    for i, sigma in enumerate((0.7, 1.5)):  # one sigma per sample; the kernel reaches 2 sigma of the largest, 3 pixels
        theirs = gaussian_filter(image[i, 0].numpy(), sigma, radius=3, mode="mirror")
        assert abs(ours[i, 0].numpy() - theirs).max() < 1e-4


@pytest.mark.parametrize("S", [(30, 45), (12, 20, 16)])
def test_random_box(S):
    """One axis-aligned box per sample, of the asked size, anywhere in the image, out of it never."""
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
    assert {0} < {s for s, _ in starts} and any(end for _, end in starts)   # touches both borders, and lies in between
    share = torch.tensor([[0.0] * len(S), [0.5] * len(S), [1.7] * len(S)])
    sizes = augment.random_box(torch.zeros(3, 1, *S), share).flatten(1).sum(1)
    assert sizes.tolist() == [0, math.prod(round(s / 2) for s in S), math.prod(S)]
