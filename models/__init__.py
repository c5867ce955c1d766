"""Networks by name. Every segmentation network keeps one contract:

    encode(x [B, C, *S]) -> list of features, finest first;  decode(features) -> logits [B, K, *S];  forward = decode(encode(x))

Add a network: one file here, and one line in NETWORKS.
"""
import argparse
import contextlib
import copy
import fnmatch
import functools
import inspect
import math
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.attention_unet import AttentionUNet
from models.pretrained import read
from models.quality import DenseQualityPredictor, QualityPredictor
from models.resnet import RESNETS, ResNetUNet  # noqa: F401  (RESNETS: for others)
from models.smp import SMP
from models.swin_unet import SwinUNet
from models.unet import UNet
from models.unetpp import UNetPlusPlus
from models.vnet import VNet

NETWORKS = {"unet": UNet, "vnet": VNet, "resnet_unet": ResNetUNet, "unetpp": UNetPlusPlus, "attention_unet": AttentionUNet, "swin_unet": SwinUNet,
            "smp:*": SMP, "quality": QualityPredictor, "quality_dense": DenseQualityPredictor}


def segmentation_networks():
    """Names of the networks f, smp:* any of another package; the others are g."""
    return [name for name in NETWORKS if not name.startswith("quality")]


def one_of(name, names):
    """Whether a network's name is one of those in NETWORKS, or smp:ARCHITECTURE where smp:* is."""
    return any(fnmatch.fnmatchcase(name, known) for known in names)


def model_name(text):
    """argparse type of --model: the name of a network f."""
    if not one_of(text, segmentation_networks()):
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(segmentation_networks())}")
    return text


def network(name):
    """What makes a network, by its name; an unknown name is a KeyError."""
    return functools.partial(SMP, name.removeprefix("smp:")) if one_of(name, ["smp:*"]) else NETWORKS[name]


def options(name):
    """The options of a network: "width", "encoder", ..."""
    return inspect.signature(network(name)).parameters.keys() - {"channels", "classes", "dims"}


def build(name, *, channels, classes, dims=2, **options):
    """A network by its name. channels: of the image; classes: with background. ValueError if it cannot be built so."""
    net = network(name)(channels=channels, classes=classes, dims=dims, **options)
    net.config = dict(name=name, channels=channels, classes=classes, dims=dims, **options)
    return net


def _first_device(config):
    """Where a network is built before its weights come: nowhere, but for smp:*, some of which compute in between."""
    return "cpu" if one_of(config["name"], ["smp:*"]) else "meta"


def check(config, shape, batch=2):
    """ValueError, or what its code raises, if a network cannot be built or does not take a batch of grids of `shape`; costs neither memory nor time
    (but for smp:*, whose limits nobody here knows: that is tried)."""
    with torch.device(_first_device(config)):
        net = build(**config).eval()
    multiple, coarsest, text = getattr(net, "multiple", 1), getattr(net, "coarsest", 0), " x ".join(map(str, shape))
    if any(side % multiple for side in shape):
        raise ValueError(f"needs sides that are multiples of {multiple}, not {text}")
    if isinstance(net, SMP):
        with torch.no_grad():
            net(torch.zeros(1, config["channels"], *shape))
    if batch == 1 and max(shape) <= coarsest:
        raise ValueError(f"one image of {text} is a single pixel in its deepest level, where batch norm needs two; give a larger --size, --batch or "
                         "--batch-unlabeled")


def load_encoder(net, source):
    """Published weights for a network's encoder: a file, or "imagenet" (models/pretrained.py); of smp:* a name that its package knows.
    ValueError or KeyError says what does not fit. -> a line that says what was left out"""
    if isinstance(net, SMP):
        net.load_named(source)
        return f"encoder: weights {source} of segmentation_models_pytorch"
    encoder = getattr(net, "encoder", None) or getattr(net, "backbone", net)
    if not hasattr(encoder, "load_pretrained"):
        raise ValueError(f"{net.config['name']} has no encoder that they could be for")
    if source == "imagenet" and net.config["dims"] == 3:
        raise ValueError("they are for slices, not for volumes")
    weights = read(source, getattr(encoder, "name", None))
    if net.config["dims"] == 3 and max(value.dim() for value in weights.values()) < 5:
        raise ValueError("they are for slices, not for volumes")
    unused = encoder.load_pretrained(weights, net.config["channels"])
    return f"encoder: weights of {source}, all but {', '.join(unused)}"


def rebuild(config, weights):
    """The network that a checkpoint holds: build(**config) with its weights, every key, shape and type matched, all of them finite.

    ValueError or whatever torch says if it holds none. Nothing is allocated that is not in the weights, whatever the config claims: the network
    takes these very tensors.
    """
    for name, low, high in (("width", 1, math.inf), ("members", 1, len(weights)), ("mask_dropout", 0, 1)):
        if type(value := config.get(name, 1)) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{name} is {value!a:.40}, not in {low} to {high}")
    with torch.device(_first_device(config)):
        net = build(**config)
    for name, expected in net.state_dict().items():
        found = weights.get(name)
        if not torch.is_tensor(found) or found.shape != expected.shape or found.dtype != expected.dtype:
            shown = f"{found.dtype} of {tuple(found.shape)}" if torch.is_tensor(found) else "missing"
            raise ValueError(f"{name} is {shown}, but {expected.dtype} of {tuple(expected.shape)} is needed")
        if not found.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values")
    net.load_state_dict(weights, assign=True)
    if any(t.is_meta for t in (*net.parameters(), *net.buffers())):
        raise ValueError("a part of the network is in no checkpoint")
    return net


def parameters(net):
    """Number of trainable numbers."""
    return sum(p.numel() for p in net.parameters())


class InFloat32WhereTiny:
    """A convolution in float32 where an axis is not longer than the kernel: in bfloat16 on CPUs with AVX-512 BF16, torch 2.13's gradient of the weights is
    garbage there, often finite, or memory is corrupted (3 x 3 x 3 on a grid of depth 2, 3 x 3 with stride 2 on a single pixel, and more). Patches
    have at least 16 voxels a side, so that this concerns deep levels. Transposed convolutions and subclasses are left as they are; the only
    one here, V-Net's 2 x 2 x 2 with stride 2, is right."""

    def forward(self, x):
        if all(side > kernel for side, kernel in zip(x.shape[2:], self.kernel_size)):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class CPUConv2d(InFloat32WhereTiny, nn.Conv2d):
    pass


class CPUConv3d(InFloat32WhereTiny, nn.Conv3d):
    pass


@dataclass
class Compute:
    """Where networks run, and in which precision."""
    device: torch.device
    amp: torch.dtype | None  # autocast to this type; None computes in float32

    def autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()

    def scaler(self):
        """Gradients underflow in fp16 alone."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def place(self, net):
        """Moves a network to the device, in channels_last memory; on a CPU in mixed precision, its convolutions become InFloat32WhereTiny."""
        for module in net.modules() if self.device.type == "cpu" and self.amp else []:
            module.__class__ = {nn.Conv2d: CPUConv2d, nn.Conv3d: CPUConv3d}.get(type(module), type(module))
        return net.to(self.device, memory_format=torch.channels_last if net.config["dims"] == 2 else torch.channels_last_3d)

    def __str__(self):
        return f"{self.device}, {str(self.amp or torch.float32).removeprefix('torch.')}"


def compute(device="auto", amp="auto", deterministic=False):
    """The Compute of the options --device and --amp; auto takes CUDA if it is there (of a process of torchrun, its own GPU), and the type that
    the device is fast in. deterministic: the same numbers each time, also on a GPU; torch warns of an operation that cannot."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    device = torch.device("cpu" if device == "auto" else device)
    if amp != "auto":
        return Compute(device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp])
    if device.type == "cuda":
        return Compute(device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
    return Compute(device, torch.bfloat16 if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None)


def device_name(text):
    """argparse type of --device: "auto" or a device that is there."""
    try:
        torch.zeros((), device="cpu" if text == "auto" else text).item()
    except Exception:  # each backend fails in its own way
        raise argparse.ArgumentTypeError(f"{text} is not a device here; use auto, cpu, cuda or cuda:1") from None
    return text


def channels_last(x):
    """The memory layout that convolutions prefer on CPU and GPU. [B, C, *S], two or three axes"""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def fused(net):
    """A copy of a network in eval mode with each batch norm folded into the convolution before it: the same answers, a sixth sooner on a CPU."""
    net = copy.deepcopy(net).eval()
    for name in ("encode", "decode"):
        vars(net).pop(name, None)  # what compiled() made of the original
    for layers in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(layers) - 1):
            if isinstance(layers[i], (nn.Conv2d, nn.Conv3d)) and isinstance(layers[i + 1], nn.modules.batchnorm._BatchNorm):
                layers[i], layers[i + 1] = fuse_conv_bn_eval(layers[i], layers[i + 1]), nn.Identity()
    return net


def compiled(net):
    """The network with its two halves compiled (torch.compile), when they are first called; alone they serve methods that look in between."""
    for name in ("encode", "decode"):
        if hasattr(net, name):  # a ResNet has but the first
            setattr(net, name, torch.compile(getattr(net, name)))
    return net


def samples_in(images, shape):
    """How many samples of a grid `shape` (S, S or D, H, W) make a pass as large as that of `images` slices of 224 x 224; at least 1."""
    return max(1, round(images * 224 ** 2 / math.prod(shape)))


@torch.no_grad()
def update_average(average, net, count, decay):
    """Exponential moving average of weights, and of batch norm's statistics, with decay min(1 - 1 / (count + 1), decay).

    count: steps that the average has seen; at 0 it becomes a copy. The present network's statistics do not fit averaged weights:
    with them, pseudo-labels collapsed (results/baselines). Counts of batches are copied.
    """
    decay = min(1 - 1 / (count + 1), decay)
    torch._foreach_lerp_(averaged(average), averaged(net), 1 - decay)
    if counts := [b for b in average.buffers() if not b.is_floating_point()]:
        torch._foreach_copy_(counts, [b for b in net.buffers() if not b.is_floating_point()])


def averaged(net):
    """What a moving average keeps: parameters, and buffers that are not counts."""
    return [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]
