"""Swin-UNet: a U-Net of Swin Transformer blocks, 27 million parameters.

Cao et al., Swin-Unet, ECCVW 2022, in its published configuration (patch 4, window 7, two blocks per
stage, stochastic depth .2); Liu et al., Swin Transformer, ICCV 2021. Parameters have the names of
the official code, so that the public weights of Swin-T load. It takes any image whose sides are
multiples of 32. Deviations: a map whose sides are no multiples of 7 is padded, and the padding
masked; an axis of a single window is not shifted; gray images are not tripled.

Legend: B batch, h, w height and width of a map, F features, N windows of T = 49 tokens, R heads of
d features.
"""

import re

import torch
from torch import nn
from torch.nn import functional as F

from models.pretrained import first_layer, load_whole

PATCH = 4  # side of a token of the finest map, in pixels
WINDOW = 7  # side of a window, in tokens
SHIFT = 3  # of the windows of every second block, in tokens
HEADS = (3, 6, 12, 24)  # of each stage


# ------------------------------------------------------------------------------------------ windows


def shifts(h, w, shifted):
    """The shift of the windows along each axis: 0 where one window holds all. -> (int, int)"""
    return tuple(SHIFT if shifted and side > WINDOW else 0 for side in (h, w))


def windows_along(side):
    """The number of windows that cover a side."""
    return -(-side // WINDOW)


def cut(x, shifted):
    """A map [B, h, w, F], padded to whole windows and rolled by the shift, as [B, N, T, F]."""
    B, h, w, features = x.shape
    rows, columns = windows_along(h), windows_along(w)
    x = F.pad(x, (0, 0, 0, columns * WINDOW - w, 0, rows * WINDOW - h))
    x = x.roll([-shift for shift in shifts(h, w, shifted)], (1, 2))
    x = x.reshape(B, rows, WINDOW, columns, WINDOW, features).transpose(2, 3)
    return x.reshape(B, rows * columns, WINDOW * WINDOW, features)


def joined(x, h, w, shifted):
    """The map [B, h, w, F] of windows [B, N, T, F]: cut() undone."""
    B = len(x)
    rows, columns = windows_along(h), windows_along(w)
    x = x.reshape(B, rows, columns, WINDOW, WINDOW, -1).transpose(2, 3)
    x = x.reshape(B, rows * WINDOW, columns * WINDOW, -1)
    return x.roll(shifts(h, w, shifted), (1, 2))[:, :h, :w]


def may_attend(h, w, shifted, device):
    """Which tokens of a window see each other. -> [N, 1, T, T] bool, or None where all do

    Tokens that the roll brought together from opposite sides do not, nor does padding.
    """
    offsets = shifts(h, w, shifted)
    if h % WINDOW == w % WINDOW == 0 and not any(offsets):
        return None
    kinds = []  # of each axis: 1 what was rolled to the other side, 2 padding
    for side, offset in zip((h, w), offsets):
        place = torch.arange(windows_along(side) * WINDOW, device=device)
        kinds.append((place < offset).long() + 2 * (place >= side))
    kind = 4 * kinds[0][:, None] + kinds[1]  # [h, w], padded
    kind = cut(kind[None, ..., None], shifted)[0, :, :, 0]  # [N, T]
    return (kind[:, :, None] == kind[:, None, :])[:, None]


def relative_positions(device):
    """The row of the bias table for each pair of tokens of a window. -> [T, T]"""
    place = torch.arange(WINDOW, device=device)
    difference = place[:, None] - place + WINDOW - 1  # [7, 7] of 0 to 12
    rows = difference[:, None, :, None]
    columns = difference[None, :, None, :]
    return (rows * (2 * WINDOW - 1) + columns).reshape(WINDOW**2, WINDOW**2)


# ------------------------------------------------------------------------------------------- layers


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of each window (Swin's Eq. 4).

    [B, N, T, F] -> [B, N, T, F]
    """

    def __init__(self, features, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x, mask):
        B, N, T, features = x.shape
        qkv = self.qkv(x).reshape(B * N, T, 3, self.heads, features // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B N, R, T, d]
        bias = self.relative_position_bias_table[relative_positions(x.device)]
        bias = bias.permute(2, 0, 1)  # [R, T, T]
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf).repeat(B, 1, 1, 1)  # [B N, R, T, T]
        bias = bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, bias)  # fused kernels take four axes only
        return self.proj(x.transpose(1, 2).reshape(B, N, T, features))


class Perceptron(nn.Module):
    """Two linear layers with a GELU in between. [..., F] -> [..., F]"""

    def __init__(self, features):
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention within windows, then a perceptron of each token. [B, h, w, F] -> [B, h, w, F]

    Both have layer norm before them and stochastic depth.
    """

    def __init__(self, features, heads, shifted, drop):
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(features)
        self.attn = WindowAttention(features, heads)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = Perceptron(features)
        self.drop_path = nn.Dropout(drop)  # of ones: whole samples skip the branch

    def kept(self, x):
        """The factor of a branch for each sample: 0 where it is skipped. -> [B, 1, 1, 1]"""
        return self.drop_path(x.new_ones(len(x), 1, 1, 1))

    def forward(self, x):
        h, w = x.shape[1:3]
        windows = cut(self.norm1(x), self.shifted)  # [B, N, T, F]
        windows = self.attn(windows, may_attend(h, w, self.shifted, x.device))
        x = x + self.kept(x) * joined(windows, h, w, self.shifted)
        return x + self.kept(x) * self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbors become one token of twice the features. [B, h, w, F] -> [B, h/2, w/2, 2 F]"""

    def __init__(self, features):
        super().__init__()
        self.norm = nn.LayerNorm(4 * features)
        self.reduction = nn.Linear(4 * features, 2 * features, bias=False)

    def forward(self, x):
        neighbors = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbors, -1)))


class Expand(nn.Module):
    """A token becomes scale x scale tokens. [B, h, w, F] -> [B, scale h, scale w, outputs]"""

    def __init__(self, features, outputs, scale):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(features, scale**2 * outputs, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x):
        B, h, w, _ = x.shape
        x = self.expand(x).reshape(B, h, w, self.scale, self.scale, -1).transpose(2, 3)
        return self.norm(x.reshape(B, h * self.scale, w * self.scale, -1))


class Stage(nn.Module):
    """Two blocks, the second one shifted, then a layer that changes the resolution, if any.

    resize: that layer under its official name, downsample or upsample.
    """

    def __init__(self, features, heads, drops, **resize):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(features, heads, shifted=i == 1, drop=drop) for i, drop in enumerate(drops)
        )
        self.resize = next(iter(resize), None)
        for name, layer in resize.items():
            self.add_module(name, layer)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.resize)(x) if self.resize else x


# -------------------------------------------------------------------------------------- the network


class SwinUNet(nn.Module):
    """images [B, C, H, W] -> logits [B, K, H, W]. ValueError where H or W is no multiple of 32."""

    multiple = 32

    def __init__(self, channels, classes, dims=2, width=96, drop_path=0.2):
        super().__init__()
        if dims != 2:
            raise ValueError("segments slices, not volumes")
        if width % HEADS[0]:
            raise ValueError(f"--width {width} is no multiple of its {HEADS[0]} heads")
        f = [width * 2**i for i in range(4)]  # features of each stage
        drops = [(drop_path * 2 * i / 7, drop_path * (2 * i + 1) / 7) for i in range(4)]  # grow
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, width, PATCH, PATCH)
        self.patch_embed.norm = nn.LayerNorm(width)

        self.layers = nn.ModuleList()
        for i in range(4):
            resize = {"downsample": Merge(f[i])} if i < 3 else {}
            self.layers.append(Stage(f[i], HEADS[i], drops[i], **resize))
        self.norm = nn.LayerNorm(f[3])

        self.layers_up = nn.ModuleList([Expand(f[3], f[2], 2)])
        self.concat_back_dim = nn.ModuleList([nn.Identity()])
        for i in (2, 1, 0):
            resize = {"upsample": Expand(f[i], f[i - 1], 2)} if i > 0 else {}
            self.layers_up.append(Stage(f[i], HEADS[i], drops[i], **resize))
        for i in (2, 1, 0):
            self.concat_back_dim.append(nn.Linear(2 * f[i], f[i]))
        self.norm_up = nn.LayerNorm(width)
        self.up = Expand(width, width, PATCH)
        self.output = nn.Conv2d(width, classes, 1, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def encode(self, x):
        """[B, C, H, W] -> features of four levels, the finest first.

        ValueError for sides that are no multiples of `multiple`.
        """
        sides = x.shape[2:]
        if any(side % self.multiple for side in sides):
            text = " x ".join(map(str, sides))
            raise ValueError(
                f"swin_unet needs sides that are multiples of {self.multiple}, not {text}"
            )
        x = self.patch_embed.norm(self.patch_embed.proj(x).movedim(1, -1))
        maps = []  # [B, H/4, W/4, F], [B, H/8, W/8, 2 F], ... [B, H/32, W/32, 8 F]
        for layer in self.layers:
            maps.append(x)
            x = layer(x)
        maps[-1] = self.norm(x)  # the last stage does not change the resolution
        return [one.movedim(-1, 1) for one in maps]

    def decode(self, features):
        *skips, x = [one.movedim(1, -1) for one in features]
        x = self.layers_up[0](x)
        for layer, join, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], skips[::-1]):
            x = layer(join(torch.cat([x, skip], -1)))
        return self.output(self.up(self.norm_up(x)).movedim(-1, 1))

    def forward(self, x):
        return self.decode(self.encode(x))

    def load_pretrained(self, weights, image_channels):
        """Loads the official Swin-T state dict. -> what was left out

        It goes into the encoder. The blocks of its first three stages go into the decoder, too, as
        in Swin-UNet. The third stage of Swin-T has six blocks, of which this network has two.
        KeyError lists the keys that are missing or left over.
        """
        unused = re.compile(
            r"head\.|layers\.2\.blocks\.[2-5]\.|.*\.(attn_mask|relative_position_index)$"
        )
        weights = {name: value for name, value in weights.items() if not unused.match(name)}
        first = "patch_embed.proj.weight"
        if first in weights:
            weights[first] = first_layer(weights[first], self.patch_embed.proj, image_channels)
        mirrored = {}
        for name, value in weights.items():
            if found := re.match(r"layers\.([012])(\.blocks.*)", name):
                stage, rest = found.groups()
                mirrored[f"layers_up.{3 - int(stage)}{rest}"] = value
        new = re.compile(r"layers_up\.0|.*\.upsample|concat_back_dim|norm_up|up\.|output")
        kept = {name: value for name, value in self.state_dict().items() if new.match(name)}
        load_whole(self, kept | mirrored | weights)
        return ["head", "layers.2.blocks.2 to 5"]
