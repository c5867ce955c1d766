"""ResNet-18, -34 and -50 in 2D and 3D, and a U-Net on top.

He et al., Deep Residual Learning, CVPR 2016. Parameters have the names of torchvision, so that its
public weights load.
"""

import torch
from torch import nn

from models.layers import CONV, NORM, POOL, conv_block, upsample
from models.pretrained import first_layer, load_whole


def convolution(dims, inputs, outputs, side, stride=1):
    """A convolution without bias and its batch norm; padding keeps the grid but for the stride."""
    conv = CONV[dims](inputs, outputs, side, stride, side // 2, bias=False)
    return conv, NORM[dims](outputs)


def shortcut(dims, inputs, outputs, stride):
    """What goes past a block: a convolution of side 1, or None where the input itself fits."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(*convolution(dims, inputs, outputs, 1, stride))


class BasicBlock(nn.Module):
    """Two convolutions of side 3 and a shortcut. [B, inputs, *s] -> [B, outputs, *s/stride]"""

    expansion = 1

    def __init__(self, dims, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = convolution(dims, inputs, outputs, 3, stride)
        self.conv2, self.bn2 = convolution(dims, outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(dims, inputs, outputs, stride)

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + skip)


class Bottleneck(nn.Module):
    """Convolutions of side 1, 3, 1 and a shortcut. [B, inputs, *s] -> [B, outputs, *s/stride]

    The stride lies in the second convolution, as in torchvision; its weights are made for that.
    In the paper, it lies in the first one.
    """

    expansion = 4

    def __init__(self, dims, inputs, outputs, stride):
        super().__init__()
        inner = outputs // self.expansion
        self.conv1, self.bn1 = convolution(dims, inputs, inner, 1)
        self.conv2, self.bn2 = convolution(dims, inner, inner, 3, stride)
        self.conv3, self.bn3 = convolution(dims, inner, outputs, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(dims, inputs, outputs, stride)

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + skip)


RESNETS = {  # block, and how many of it each stage has
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """The encoder: [B, C, *S] -> five features, of `widths` channels on S/2, S/4, ... S/32.

    The widths are w, e w, 2 e w, 4 e w, 8 e w: w = width, e = 4 in ResNet-50, else 1.
    """

    def __init__(self, inputs, name="resnet18", dims=2, width=64):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"there is no encoder {name!a:.40}, only {', '.join(RESNETS)}")
        if width < 8:  # at 4, torch 2.13 on CPUs writes out of bounds where it computes gradients
            raise ValueError(f"--width {width}: a ResNet needs at least 8 channels")
        Block, counts = RESNETS[name]
        self.name = name
        self.widths = [width] + [Block.expansion * width * 2**i for i in range(4)]
        self.conv1, self.bn1 = convolution(dims, inputs, width, 7, 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = POOL[dims](3, 2, 1)
        for i, count in enumerate(counts):
            before, after = self.widths[i : i + 2]
            stride = 1 if i == 0 else 2
            blocks = [Block(dims, before, after, stride)]
            blocks += [Block(dims, after, after, 1) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, x):
        features = [self.relu(self.bn1(self.conv1(x)))]  # [B, w, *S/2]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)  # [B, e w, *S/4], ... [B, 8 e w, *S/32]
        return features

    def load_pretrained(self, weights, image_channels):
        """Loads a ResNet state dict of torchvision or timm. -> what was left out: the classifier

        The first convolution adapts: each input channel that is not one of an RGB image takes the
        mean of the RGB filters. KeyError lists the keys that are missing or left over.
        """
        counts = {  # older files have none
            name: value
            for name, value in self.state_dict().items()
            if name.endswith("num_batches_tracked")
        }
        kept = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        if "conv1.weight" in kept:
            kept["conv1.weight"] = first_layer(kept["conv1.weight"], self.conv1, image_channels)
        load_whole(self, counts | kept)
        return ["fc"]


class ResNetUNet(nn.Module):
    """A U-Net decoder on a ResNet encoder. images [B, C, *S] -> logits [B, K, *S]

    The decoder has 256 to 32 channels, whatever the width.
    """

    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        deepest, *skips = self.encoder.widths[::-1]
        outputs = (256, 128, 64, 32)
        inputs = (deepest, *outputs[:-1])
        self.up = nn.ModuleList(
            conv_block(dims, before + skip, after)
            for before, skip, after in zip(inputs, skips, outputs)
        )
        self.head = CONV[dims](outputs[-1], classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        image, *skips, x = features
        for up, skip in zip(self.up, skips[::-1]):
            x = up(torch.cat([skip, upsample(x, skip)], 1))
        return upsample(self.head(x), image)

    def forward(self, x):
        return self.decode(self.encode(x))
