"""Views of a batch, made on its device.

Geometry changes image and mask together, intensity the image alone. Images are [B, C, *S] with
*S = H, W or D, H, W and any number of channels, standardized to about zero mean and unit variance.
Random numbers come from torch's global generator, so that torch.manual_seed fixes them.
"""

import math

import torch
import torch.nn.functional as F


def uniform(low, high, like):
    """One number per sample, uniform in [low, high). like [B, ...] -> [B, 1, ...], to broadcast"""
    shape = (len(like),) + (1,) * (like.dim() - 1)
    return low + (high - low) * torch.rand(shape, device=like.device)


def may_flip(flip, dims):
    """Whether each axis of a grid, (D, H, W) or (H, W), may be flipped. flip: of --flip -> bools"""
    return [flip is None or axis in flip.split(",") for axis in "DHW"[-dims:]]


def random_geometry(image, *, rotate, scale, shift, flip=None):
    """A random affine map per sample, as a sampling grid [B, *S, 2 or 3] for `move`.

    rotate: degrees, in the plane of the last two axes (depth is often coarser).
    scale: +- share; shift: +- share of the side.
    flip: the axes that are flipped with p = .5, as --flip names them; None: all.
    """
    B = len(image)
    d = image.dim() - 2
    device = image.device
    angle = torch.deg2rad(uniform(-rotate, rotate, image[:, 0].flatten(1)))[:, 0]  # [B]
    stretch = image.shape[-2] / image.shape[-1]  # a unit of y, in units of x
    linear = torch.eye(d, device=device).repeat(B, 1, 1)  # acts on (x, y[, z]) in [-1, 1]
    linear[:, 0, 0] = angle.cos()
    linear[:, 0, 1] = -angle.sin() * stretch
    linear[:, 1, 0] = angle.sin() / stretch
    linear[:, 1, 1] = angle.cos()
    factor = 1 + scale * (2 * torch.rand(B, 1, 1, device=device) - 1)
    flipped = torch.randint(2, (B, d, 1), device=device)
    for axis, allowed in enumerate(reversed(may_flip(flip, d))):  # x, y[, z]
        if not allowed:
            flipped[:, axis].zero_()
    offset = 2 * shift * (2 * torch.rand(B, d, 1, device=device) - 1)
    affine = torch.cat([linear * (1 - 2 * flipped) / factor, offset], 2)  # [B, d, d + 1]
    return F.affine_grid(affine, (B, 1, *image.shape[2:]), align_corners=False)


def move(tensor, grid):
    """Applies a sampling grid to floats [B, C, *S] or to integer labels [B, *S].

    Floats are interpolated, labels take the nearest value. What lies outside is mirrored, in image
    and mask alike, so that they stay aligned.
    """
    how = dict(padding_mode="reflection", align_corners=False)
    if tensor.is_floating_point():
        return F.grid_sample(tensor, grid, mode="bilinear", **how)
    moved = F.grid_sample(tensor[:, None].float(), grid, mode="nearest", **how)
    return moved[:, 0].to(tensor.dtype)


def weak(image, label=None, flip=None, geometry=1.0):
    """Random geometry. -> image, and label moved with it if one is given

    flip: of --flip; geometry: of --geometry, multiplies rotation, scale and shift.
    """
    limits = dict(rotate=20 * geometry, scale=0.15 * geometry, shift=0.08 * geometry)
    grid = random_geometry(image, **limits, flip=flip)
    if label is None:
        return move(image, grid)
    return move(image, grid), move(label, grid)


def mirror(image, flip=None):
    """Images [B, C, *S] flipped along the last axis that may be flipped, if there is one."""
    axes = [i for i, allowed in enumerate(may_flip(flip, image.dim() - 2), 2) if allowed]
    return image.flip(axes[-1]) if axes else image


def strong(image, strength=1.0, color=False):
    """Random intensity on a weak view: contrast, brightness, color, gamma, blur, noise.

    The geometry stays. strength: 0 changes nothing. color: whether the channels are colors of one
    image, which change together but for a color cast; others change each for itself.
    """
    if not strength:
        return image
    if not color and image.shape[1] > 1:
        return strong(image.flatten(0, 1)[:, None], strength).reshape(image.shape)
    s = strength
    ones = (1,) * (image.dim() - 2)
    channel = torch.rand(*image.shape[:2], *ones, device=image.device)
    x = image * uniform(1 - 0.4 * s, 1 + 0.4 * s, image) + uniform(-0.4 * s, 0.4 * s, image)
    if color:  # a color cast
        x = x + 0.4 * s * (2 * channel - 1)
    x = gamma(x, torch.exp(uniform(-0.5 * s, 0.5 * s, image)))
    chosen = uniform(0, 1, x) < 0.5
    most = 0.3 + 1.2 * s  # pixels
    x = torch.where(chosen, blur(x, uniform(0.3, most, x), most), x)
    return x + uniform(0, 0.15 * s, x) * torch.randn_like(x)


def gamma(image, power):
    """Raises intensities, rescaled to 0..1 within each sample, to a power [B, 1, ...]."""
    axes = tuple(range(1, image.dim()))
    low = image.amin(axes, keepdim=True)
    high = image.amax(axes, keepdim=True)
    width = (high - low).clamp_min(1e-6)
    return ((image - low) / width).clamp(1e-6, 1) ** power * width + low


def blur(image, sigma, most):
    """Gaussian blur, separable, with one sigma (pixels) per sample, [B, 1, ...].

    most: the largest that sigma may be; the kernel reaches twice as far.
    """
    B, C, *S = image.shape
    radius = max(1, math.ceil(2 * most))
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offset / sigma.reshape(B, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # [BC, 2 radius + 1]
    x = image.reshape(1, B * C, *S)
    conv = F.conv2d if len(S) == 2 else F.conv3d
    for axis in range(len(S)):
        reach = min(radius, S[axis] - 1)
        weight = kernel[:, radius - reach : radius + reach + 1]  # [BC, 2 reach + 1]
        weight = weight / weight.sum(1, keepdim=True)
        shape = [1] * len(S)
        shape[axis] = weight.shape[1]
        pad = [0] * (2 * len(S))  # of both ends of each axis, the last axis first
        last = 2 * (len(S) - axis)
        pad[last - 2 : last] = reach, reach
        x = conv(F.pad(x, pad, mode="reflect"), weight.reshape(B * C, 1, *shape), groups=B * C)
    return x.reshape(image.shape)


def random_box(image, share):
    """1 inside a box at a random place of each sample, 0 outside. image [B, C, *S] -> [B, 1, *S]

    share: of each side, one number or [B, len(S)]; sides are rounded to whole pixels, and a share
    above 1 fills the side.
    """
    B, _, *S = image.shape
    share = (share * torch.ones(B, len(S), device=image.device)).clamp(max=1)
    box = torch.ones(B, 1, *S, device=image.device)
    for axis, side in enumerate(S):
        length = (share[:, axis, None] * side).round()  # [B, 1]
        start = (torch.rand(B, 1, device=image.device) * (side - length + 1)).floor()
        at = torch.arange(side, device=image.device)  # [side]
        shape = [B, 1, *(1 for _ in S)]
        shape[2 + axis] = side
        box = box * ((at >= start) & (at < start + length)).reshape(shape)
    return box
