"""ResNet-18, -34 and -50 in 2D and 3D with torchvision's parameter names, so that its public weights load; and a U-Net on top.

He et al., Deep Residual Learning, CVPR 2016.
"""
import torch
from torch import nn

from models.pretrained import first_layer, load_whole
from models.unet import conv_block, upsample


def convolution(dims, inputs, outputs, side, stride=1):
    """A convolution without bias, whose padding keeps the grid but for the stride, and its batch norm."""
    Conv, Norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    return Conv(inputs, outputs, side, stride, side // 2, bias=False), Norm(outputs)


def shortcut(dims, inputs, outputs, stride):
    """What goes past a block: None where the input itself fits."""
    return nn.Sequential(*convolution(dims, inputs, outputs, 1, stride)) if stride > 1 or inputs != outputs else None


class BasicBlock(nn.Module):
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
    """The stride lies in the second convolution, as in torchvision, whose weights are made for it (the paper: in the first)."""
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


RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)), "resnet50": (Bottleneck, (3, 4, 6, 3))}


class ResNet(nn.Module):
    """The encoder: [B, C, *S] -> [[B, w, *S/2], [B, e w, *S/4], [B, 2 e w, *S/8], [B, 4 e w, *S/16], [B, 8 e w, *S/32]], w = width, e = 1,
    of ResNet-50 4."""

    def __init__(self, inputs, name="resnet18", dims=2, width=64):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"there is no encoder {name!a:.40}, only {', '.join(RESNETS)}")
        if width < 8:  # torch 2.13's CPU convolutions of the gradient write out of bounds at 4
            raise ValueError(f"--width {width}: a ResNet needs at least 8 channels")
        self.name, (Block, counts) = name, RESNETS[name]
        self.conv1, self.bn1 = convolution(dims, inputs, width, 7, 2)
        self.relu, self.maxpool = nn.ReLU(inplace=True), (nn.MaxPool2d, nn.MaxPool3d)[dims - 2](3, 2, 1)
        self.widths, before = [width] + [Block.expansion * width * 2 ** i for i in range(4)], width
        for i, (count, after) in enumerate(zip(counts, self.widths[1:])):
            blocks = [Block(dims, before if j == 0 else after, after, 2 if i and j == 0 else 1) for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            before = after
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, x):
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def load_pretrained(self, weights, image_channels):
        """Loads a ResNet state dict of torchvision or timm, but for its classifier fc. KeyError lists keys that are missing or left over.

        The first convolution adapts: every input channel that is not one of an RGB image takes the mean of the RGB filters. -> what was left out
        """
        counts = {name: value for name, value in self.state_dict().items() if name.endswith("num_batches_tracked")}  # older files have none
        weights = counts | {name: value for name, value in weights.items() if not name.startswith("fc.")}
        if "conv1.weight" in weights:
            weights["conv1.weight"] = first_layer(weights["conv1.weight"], self.conv1, image_channels)
        load_whole(self, weights)
        return ["fc"]


class ResNetUNet(nn.Module):
    """U-Net decoder (of 256 to 32 channels, whatever the width) on a ResNet encoder: [B, C, *S] -> logits [B, K, *S]."""
    coarsest = 32

    def __init__(self, channels, classes, dims=2, encoder="resnet34", width=64):
        super().__init__()
        self.encoder = ResNet(channels, encoder, dims, width)
        Conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        deep, fine = self.encoder.widths[:0:-1], self.encoder.widths[-2::-1]
        outputs = (256, 128, 64, 32)
        inputs = (deep[0], *outputs[:-1])
        self.up = nn.ModuleList(conv_block(dims, i + f, o) for i, f, o in zip(inputs, fine, outputs))
        self.head = Conv(outputs[-1], classes, 3, padding=1)

    def encode(self, x):
        return [x, *self.encoder.encode(x)]

    def decode(self, features):
        x = features[-1]
        for up, skip in zip(self.up, features[-2:0:-1]):
            x = up(torch.cat([skip, upsample(x, skip)], 1))
        return upsample(self.head(x), features[0])

    def forward(self, x):
        return self.decode(self.encode(x))
