"""ResNet-18 and -34 in 2D and 3D with torchvision's parameter names, so that its public weights load; and a U-Net on top.

He et al., Deep Residual Learning, CVPR 2016.
"""
import torch
from torch import nn

from models.unet import conv_block, upsample

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    def __init__(self, dims, inputs, outputs, stride):
        super().__init__()
        Conv, Norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
        self.conv1, self.bn1 = Conv(inputs, outputs, 3, stride, 1, bias=False), Norm(outputs)
        self.conv2, self.bn2 = Conv(outputs, outputs, 3, 1, 1, bias=False), Norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(Conv(inputs, outputs, 1, stride, bias=False), Norm(outputs))

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + skip)


class ResNet(nn.Module):
    """The encoder: [B, C, *S] -> [[B, w, *S/2], [B, w, *S/4], [B, 2w, *S/8], [B, 4w, *S/16], [B, 8w, *S/32]], w = width."""

    def __init__(self, inputs, depth=18, dims=2, width=64):
        super().__init__()
        Conv, Norm, Pool = ((nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d), (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d))[dims - 2]
        self.conv1, self.bn1 = Conv(inputs, width, 7, 2, 3, bias=False), Norm(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), Pool(3, 2, 1)
        self.widths, before = [width] + [width * 2 ** i for i in range(4)], width
        for i, count in enumerate(BLOCKS[depth]):
            after = width * 2 ** i
            blocks = [BasicBlock(dims, before if j == 0 else after, after, 2 if i and j == 0 else 1) for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            before = after
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, x):
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def load_pretrained(self, weights, image_channels):
        """Loads a torchvision ResNet state dict (its fc is left out). KeyError lists keys that are missing or left over.

        The first convolution adapts: every input channel that is not one of an RGB image takes the mean of the RGB filters.
        """
        weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
        first = weights.get("conv1.weight")
        if first is not None and (first.shape[1] != self.conv1.in_channels or image_channels != 3):
            n = self.conv1.in_channels
            mean = first.mean(1, keepdim=True).expand(-1, n, *first.shape[2:])
            weights["conv1.weight"] = torch.cat([first, mean[:, 3:]], 1) if image_channels == 3 else mean.clone()
        own = self.state_dict()
        if wrong := sorted(set(own) ^ set(weights)) + [k for k in own if k in weights and own[k].shape != weights[k].shape]:
            raise KeyError(f"{len(wrong)} parameters do not match, among them {', '.join(wrong[:4])}")
        self.load_state_dict(weights)


class ResNetUNet(nn.Module):
    """U-Net decoder on a ResNet encoder: [B, C, *S] -> logits [B, K, *S]."""

    def __init__(self, channels, classes, dims=2, depth=34, width=64):
        super().__init__()
        self.encoder = ResNet(channels, depth, dims, width)
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
