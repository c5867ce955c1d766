"""Swin-UNet: a U-Net of Swin Transformer blocks, 27 million parameters, for any image whose sides are multiples of 32.

Cao et al., Swin-Unet, ECCVW 2022, in its published configuration (patch 4, window 7, two blocks per stage, stochastic depth .2); Liu et al., Swin
Transformer, ICCV 2021. Parameters have the names of the official code, so that Swin-T's public weights load. Deviations: where a map is no
multiple of 7 it is padded, and the padding masked; an axis of a single window is not shifted; gray images are not tripled.

Legend: B batch, h, w a map's height and width, F features, N windows of T = 49 tokens, R heads.
"""
import re

import torch
from torch import nn
from torch.nn import functional as F

from models.pretrained import first_layer, load_whole

PATCH, WINDOW, SHIFT, HEADS = 4, 7, 3, (3, 6, 12, 24)


# ---------------------------------------------------------------------------------------------------- windows

def shifts(h, w, shifted):
    """By how much windows are shifted along each axis: not where one window holds all."""
    return tuple(SHIFT if shifted and side > WINDOW else 0 for side in (h, w))


def cut(x, shifted):
    """A map [B, h, w, F], padded to whole windows and rolled by the shift -> its windows [B, N, T, F]."""
    B, h, w, features = x.shape
    rows, columns = -(-h // WINDOW), -(-w // WINDOW)
    x = F.pad(x, (0, 0, 0, columns * WINDOW - w, 0, rows * WINDOW - h))
    x = x.roll([-s for s in shifts(h, w, shifted)], (1, 2))
    return x.reshape(B, rows, WINDOW, columns, WINDOW, features).transpose(2, 3).reshape(B, rows * columns, WINDOW * WINDOW, features)


def joined(x, h, w, shifted):
    """The map [B, h, w, F] whose windows [B, N, T, F] these are: cut() undone."""
    rows, columns = -(-h // WINDOW), -(-w // WINDOW)
    x = x.reshape(len(x), rows, columns, WINDOW, WINDOW, -1).transpose(2, 3).reshape(len(x), rows * WINDOW, columns * WINDOW, -1)
    return x.roll(shifts(h, w, shifted), (1, 2))[:, :h, :w]


def may_attend(h, w, shifted, device):
    """Which tokens of a window see each other: not those that the roll brought together from opposite sides, and no padding. -> [N, 1, T, T] bool,
    or None where all do"""
    if h % WINDOW == w % WINDOW == 0 and not any(shifts(h, w, shifted)):
        return None
    kinds = []
    for side, shift in zip((h, w), shifts(h, w, shifted)):
        place = torch.arange(-(-side // WINDOW) * WINDOW, device=device)
        kinds.append((place < shift).long() + 2 * (place >= side))
    kind = cut((4 * kinds[0][:, None] + kinds[1])[None, ..., None], shifted)[0, :, :, 0]      # [N, T]
    return (kind[:, :, None] == kind[:, None, :])[:, None]


def relative_positions(device):
    """The row of the bias table for each pair of tokens of a window. -> [T, T]"""
    place = torch.arange(WINDOW, device=device)
    difference = place[:, None] - place + WINDOW - 1                                          # [7, 7] of 0 to 12
    rows, columns = difference[:, None, :, None], difference[None, :, None, :]
    return (rows * (2 * WINDOW - 1) + columns).reshape(WINDOW ** 2, WINDOW ** 2)


# ---------------------------------------------------------------------------------------------------- layers

class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of each window (Swin's Eq. 4). [B, N, T, F] -> [B, N, T, F]"""

    def __init__(self, features, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x, mask):
        B, N, T, features = x.shape
        q, k, v = self.qkv(x).reshape(B * N, T, 3, self.heads, features // self.heads).permute(2, 0, 3, 1, 4)    # [B N, R, T, d]
        bias = self.relative_position_bias_table[relative_positions(x.device)].permute(2, 0, 1)                  # [R, T, T]
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf).repeat(B, 1, 1, 1)                                        # [B N, R, T, T]
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))  # of four axes: fused kernels take no more
        return self.proj(x.transpose(1, 2).reshape(B, N, T, features))


class Block(nn.Module):
    """Attention within (shifted) windows, then a perceptron of each token, both with layer norm before and stochastic depth. [B, h, w, F]"""

    def __init__(self, features, heads, shifted, drop):
        super().__init__()
        self.shifted = shifted
        self.norm1, self.attn = nn.LayerNorm(features), WindowAttention(features, heads)
        self.norm2, self.mlp = nn.LayerNorm(features), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        self.drop_path = nn.Dropout(drop)  # of ones: whole samples skip the branch

    def kept(self, x):
        return self.drop_path(x.new_ones(len(x), 1, 1, 1))

    def forward(self, x):
        h, w = x.shape[1:3]
        windows = self.attn(cut(self.norm1(x), self.shifted), may_attend(h, w, self.shifted, x.device))
        x = x + self.kept(x) * joined(windows, h, w, self.shifted)
        return x + self.kept(x) * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Merge(nn.Module):
    """Four neighbors become one token of twice the features. [B, h, w, F] -> [B, h/2, w/2, 2 F]"""

    def __init__(self, features):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * features), nn.Linear(4 * features, 2 * features, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


class Expand(nn.Module):
    """A token becomes scale x scale tokens. [B, h, w, F] -> [B, scale h, scale w, outputs]"""

    def __init__(self, features, outputs, scale):
        super().__init__()
        self.scale, self.expand, self.norm = scale, nn.Linear(features, scale ** 2 * outputs, bias=False), nn.LayerNorm(outputs)

    def forward(self, x):
        B, h, w, _ = x.shape
        x = self.expand(x).reshape(B, h, w, self.scale, self.scale, -1).transpose(2, 3)
        return self.norm(x.reshape(B, h * self.scale, w * self.scale, -1))


class Stage(nn.Module):
    """Two blocks, the second one shifted, then a layer that changes the resolution, under its official name."""

    def __init__(self, features, heads, drops, **resize):
        super().__init__()
        self.blocks = nn.ModuleList(Block(features, heads, shifted=i == 1, drop=drop) for i, drop in enumerate(drops))
        self.resize = next(iter(resize), None)
        for name, layer in resize.items():
            self.add_module(name, layer)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.resize)(x) if self.resize else x


# ---------------------------------------------------------------------------------------------------- the network

class SwinUNet(nn.Module):
    """images [B, C, H, W] -> logits [B, K, H, W]. ValueError where H or W is no multiple of 32."""
    multiple = 32

    def __init__(self, channels, classes, dims=2, width=96, drop_path=0.2):
        super().__init__()
        if dims != 2 or width % HEADS[0]:
            raise ValueError("segments slices, not volumes" if dims != 2 else f"--width {width} is no multiple of its {HEADS[0]} heads")
        f = [width * 2 ** i for i in range(4)]
        drops = [(drop_path * 2 * i / 7, drop_path * (2 * i + 1) / 7) for i in range(4)]     # from 0 to drop_path
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.norm = nn.Conv2d(channels, width, PATCH, PATCH), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Stage(f[i], HEADS[i], drops[i], **({"downsample": Merge(f[i])} if i < 3 else {})) for i in range(4))
        self.norm = nn.LayerNorm(f[3])
        self.layers_up = nn.ModuleList([Expand(f[3], f[2], 2), *(
            Stage(f[i], HEADS[i], drops[i], **({"upsample": Expand(f[i], f[i - 1], 2)} if i else {})) for i in (2, 1, 0))])
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *(nn.Linear(2 * f[i], f[i]) for i in (2, 1, 0))])
        self.norm_up, self.up = nn.LayerNorm(width), Expand(width, width, PATCH)
        self.output = nn.Conv2d(width, classes, 1, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def encode(self, x):
        if any(side % self.multiple for side in x.shape[2:]):
            raise ValueError(f"swin_unet needs sides that are multiples of {self.multiple}, not {' x '.join(map(str, x.shape[2:]))}")
        x, skips = self.patch_embed.norm(self.patch_embed.proj(x).movedim(1, -1)), []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        return [v.movedim(-1, 1) for v in (*skips[:3], self.norm(x))]     # [B, F, H/4, W/4], [B, 2 F, H/8, W/8], ... [B, 8 F, H/32, W/32]

    def decode(self, features):
        *skips, x = [v.movedim(1, -1) for v in features]
        x = self.layers_up[0](x)
        for layer, join, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], skips[::-1]):
            x = layer(join(torch.cat([x, skip], -1)))
        return self.output(self.up(self.norm_up(x)).movedim(-1, 1))

    def forward(self, x):
        return self.decode(self.encode(x))

    def load_pretrained(self, weights, image_channels):
        """Loads the official Swin-T state dict into the encoder, and its first three stages' blocks into the decoder's too, as Swin-UNet does.

        KeyError lists keys that are missing or left over. Swin-T's third stage has six blocks, of which this has two. -> what was left out
        """
        unused = re.compile(r"head\.|layers\.2\.blocks\.[2-5]\.|.*\.(attn_mask|relative_position_index)$")
        weights = {name: value for name, value in weights.items() if not unused.match(name)}
        if (first := "patch_embed.proj.weight") in weights:
            weights[first] = first_layer(weights[first], self.patch_embed.proj, image_channels)
        mirrored = {f"layers_up.{3 - int(name[7])}{name[8:]}": value for name, value in weights.items() if re.match(r"layers\.[012]\.blocks", name)}
        new = {name: value for name, value in self.state_dict().items() if re.match(r"layers_up\.0|.*\.upsample|concat_back_dim|norm_up|up\.|output", name)}
        load_whole(self, new | mirrored | weights)
        return ["head", "layers.2.blocks.2 to 5"]
