"""Views of a batch, made on its device: geometry for image and mask together, intensity for the image alone.

Everything takes images [B, C, *S] with S = (H, W) or (D, H, W), standardized to about zero mean and unit variance, with any
number of channels, and draws from torch's global generator, so that torch.manual_seed fixes it.
"""

import math

import torch
import torch.nn.functional as F


def uniform(low, high, like):
    """One number per sample, uniform in [low, high), shaped [B, 1, ...] to broadcast over `like` [B, ...]."""
    shape = (len(like),) + (1,) * (like.dim() - 1)
    return low + (high - low) * torch.rand(shape, device=like.device)


def may_flip(flip, dims):
    """Whether each axis of a grid may be flipped, (D, H, W) or (H, W). flip: of --flip -> bools"""
    return [flip is None or axis in flip.split(",") for axis in "DHW"[-dims:]]


def random_geometry(image, rotate=20, scale=0.15, shift=0.08, flip=None):
    """A random affine map per sample, as a sampling grid [B, *S, 2 or 3] for `move`.

    rotate: degrees, in the plane of the last two axes (depth is often coarser).
    scale: +- share; shift: +- share of the side.
    flip: the axes that are flipped with p = .5, as --flip names them; None: all.
    """
    B, d = len(image), image.dim() - 2
    angle = torch.deg2rad(uniform(-rotate, rotate, image[:, 0].flatten(1)))[:, 0]
    linear = torch.eye(d, device=image.device).repeat(B, 1, 1)  # acts on (x, y[, z]) in [-1, 1]
    stretch = image.shape[-2] / image.shape[-1]  # a unit of y, in units of x
    linear[:, 0, 0], linear[:, 0, 1] = angle.cos(), -angle.sin() * stretch
    linear[:, 1, 0], linear[:, 1, 1] = angle.sin() / stretch, angle.cos()
    factor = 1 + scale * (2 * torch.rand(B, 1, 1, device=image.device) - 1)
    allowed = torch.tensor(may_flip(flip, d)[::-1], device=image.device)  # of x, y[, z]
    sign = 1 - 2 * torch.randint(2, (B, d, 1), device=image.device) * allowed[:, None]
    offset = 2 * shift * (2 * torch.rand(B, d, 1, device=image.device) - 1)
    return F.affine_grid(
        torch.cat([linear * sign / factor, offset], 2),
        (B, 1, *image.shape[2:]),
        align_corners=False,
    )


def move(tensor, grid):
    """Applies a sampling grid: floats [B, C, *S] are interpolated, integer labels [B, *S] take the nearest value.

    What lies outside is mirrored, in image and mask alike, so that they stay aligned.
    """
    if tensor.is_floating_point():
        return F.grid_sample(
            tensor, grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
    moved = F.grid_sample(
        tensor[:, None].float(),
        grid,
        mode="nearest",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved[:, 0].to(tensor.dtype)


def weak(image, label=None, flip=None):
    """Random geometry. -> image, and label moved with it if one is given. flip: of --flip"""
    grid = random_geometry(image, flip=flip)
    return move(image, grid) if label is None else (move(image, grid), move(label, grid))


def mirror(image, flip=None):
    """Images [B, C, *S] flipped along the last axis that may be flipped, if there is one."""
    axes = [i for i, allowed in enumerate(may_flip(flip, image.dim() - 2), 2) if allowed]
    return image.flip(axes[-1]) if axes else image


def strong(image, strength=1.0):
    """Random intensity on a weak view: contrast, brightness, color, gamma, blur, noise; the geometry stays. Strength 0 changes nothing."""
    if not strength:
        return image
    s, B = strength, len(image)
    channel = torch.rand(B, image.shape[1], *(1,) * (image.dim() - 2), device=image.device)
    x = image * uniform(1 - 0.4 * s, 1 + 0.4 * s, image) + uniform(-0.4 * s, 0.4 * s, image)
    if image.shape[1] > 1:  # a color cast
        x = x + 0.4 * s * (2 * channel - 1)
    x = gamma(x, torch.exp(uniform(-0.5 * s, 0.5 * s, image)))
    x = torch.where(
        uniform(0, 1, x) < 0.5, blur(x, uniform(0.3, 0.3 + 1.2 * s, x), 0.3 + 1.2 * s), x
    )
    return x + uniform(0, 0.15 * s, x) * torch.randn_like(x)


def gamma(image, power):
    """Raises intensities, rescaled to 0..1 within each sample, to a power [B, 1, ...]."""
    axes = tuple(range(1, image.dim()))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    width = (high - low).clamp_min(1e-6)
    return ((image - low) / width).clamp(1e-6, 1) ** power * width + low


def blur(image, sigma, most):
    """Gaussian blur, separable, with one sigma (pixels) per sample, [B, 1, ...], that is at most `most`, twice which the kernel reaches."""
    B, C, *S = image.shape
    radius = max(1, math.ceil(2 * most))
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offset / sigma.reshape(B, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # [BC, 2 radius + 1]
    x = image.reshape(1, B * C, *S)
    conv = F.conv2d if len(S) == 2 else F.conv3d
    for axis in range(len(S)):
        shape, pad = [1] * len(S), [0] * len(S)
        shape[axis], pad[axis] = len(offset), min(radius, S[axis] - 1)
        weight = kernel[:, radius - pad[axis] : radius + pad[axis] + 1]
        shape[axis] = weight.shape[1]
        weight = weight / weight.sum(1, keepdim=True)
        mode_pad = [p for q in reversed(pad) for p in (q, q)]
        x = conv(F.pad(x, mode_pad, mode="reflect"), weight.reshape(B * C, 1, *shape), groups=B * C)
    return x.reshape(image.shape)


def random_box(image, share):
    """1 inside a box at a random place of each sample, 0 outside. image [B, C, *S]; share of each side, one or [B, len(S)] -> [B, 1, *S]

    Sides are rounded to whole pixels; shares above 1 fill the side.
    """
    B, _, *S = image.shape
    share = torch.as_tensor(share, device=image.device).expand(B, len(S)).clamp(max=1)
    box = torch.ones(B, 1, *S, device=image.device)
    for axis, side in enumerate(S):
        length = (share[:, axis, None] * side).round()  # [B, 1]
        start = (torch.rand(B, 1, device=image.device) * (side - length + 1)).floor()
        at = torch.arange(side, device=image.device)  # [side]
        shape = [B, 1, *(1 for _ in S)]
        shape[2 + axis] = side
        box = box * ((at >= start) & (at < start + length)).reshape(shape)
    return box
