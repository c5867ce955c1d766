"""Networks by name. Every segmentation network keeps one contract:

    encode(x [B, C, *S]) -> list of features, finest first;  decode(features) -> logits [B, K, *S];  forward = decode(encode(x))

Add a network: one file here, and one line in NETWORKS.
"""
import argparse
import contextlib

import torch

from models.quality import QualityPredictor
from models.resnet import ResNetUNet
from models.unet import UNet

NETWORKS = {"unet": UNet, "resnet_unet": ResNetUNet, "quality": QualityPredictor}


def segmentation_networks():
    """Names of the networks f; "quality" is g."""
    return [name for name in NETWORKS if name != "quality"]


def build(name, *, channels, classes, dims=2, **options):
    """A network by its name in NETWORKS; an unknown name is a KeyError. channels: of the image; classes: with background."""
    net = NETWORKS[name](channels=channels, classes=classes, dims=dims, **options)
    net.config = dict(name=name, channels=channels, classes=classes, dims=dims, **options)
    return net


def rebuild(config, weights):
    """The network that a checkpoint holds: build(**config) with its weights, every key matched."""
    net = build(**config)
    net.load_state_dict(weights)
    return net


def parameters(net):
    """Number of trainable numbers."""
    return sum(p.numel() for p in net.parameters())


def fast_layout(net, device, dims=2):
    """Moves a network to the device in channels_last memory, which convolutions prefer on CPU and GPU."""
    return net.to(device, memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)


def device_name(text):
    """argparse type of --device: "auto" or a device that is there."""
    try:
        if text != "auto" and torch.device(text).type == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text}: no CUDA device here; use auto or cpu")
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: not a device; use auto, cpu, cuda or cuda:1") from None
    return text


def pick_device(name="auto"):
    """torch.device of "auto" (CUDA if there is one, else the CPU) or of a device's own name."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def pick_amp(name, device):
    """Autocast type of --amp auto|off|bf16|fp16: auto is what the device computes natively. -> torch.dtype or None"""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if native else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """The context in which networks run: autocast to dtype, or nothing if it is None."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
