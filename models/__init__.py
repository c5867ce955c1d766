"""The registry of networks. Every segmentation network keeps one contract:

    encode(x [B, C, *S]) -> list of features, finest first
    decode(features)     -> logits [B, K, *S]
    forward(x)            = decode(encode(x))

To add a network, write one file here and one line in NETWORKS.
"""

import argparse
import fnmatch
import functools
import inspect
import math

import torch

from models.attention_unet import AttentionUNet
from models.pretrained import read
from models.quality import DenseQualityPredictor, QualityPredictor
from models.resnet import ResNetUNet
from models.smp import SMP
from models.swin_unet import SwinUNet
from models.unet import UNet
from models.unetpp import UNetPlusPlus
from models.vnet import VNet

NETWORKS = {
    "unet": UNet,
    "vnet": VNet,
    "resnet_unet": ResNetUNet,
    "unetpp": UNetPlusPlus,
    "attention_unet": AttentionUNet,
    "swin_unet": SwinUNet,
    "smp:*": SMP,
    "quality": QualityPredictor,
    "quality_dense": DenseQualityPredictor,
}


def segmentation_networks():
    """The names of the networks f. smp:* stands for those of another package; the rest are g."""
    return [name for name in NETWORKS if not name.startswith("quality")]


def one_of(name, names):
    """Whether the name of a network is in `names`; smp:* matches smp:ARCHITECTURE."""
    return any(fnmatch.fnmatchcase(name, known) for known in names)


def model_name(text):
    """The argparse type of --model: the name of a network f."""
    known = segmentation_networks()
    if not one_of(text, known):
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(known)}")
    return text


def network(name):
    """The class of a network, or of smp:ARCHITECTURE a partial; KeyError for an unknown name."""
    if one_of(name, ["smp:*"]):
        return functools.partial(SMP, name.removeprefix("smp:"))
    return NETWORKS[name]


def options(name):
    """The names of the options of a network: "width", "encoder", ..."""
    parameters = inspect.signature(network(name)).parameters
    return parameters.keys() - {"channels", "classes", "dims"}


def build(name, *, channels, classes, dims=2, **options):
    """A new network. ValueError if it cannot be built so.

    channels: of the image; classes: with the background; dims: 2 for slices, 3 for volumes.
    """
    net = network(name)(channels=channels, classes=classes, dims=dims, **options)
    net.config = dict(name=name, channels=channels, classes=classes, dims=dims, **options)
    return net


def _first_device(config):
    """The device to build a network on before its weights come.

    The meta device costs nothing. Some networks of smp:* compute while they are built.
    """
    return "cpu" if one_of(config["name"], ["smp:*"]) else "meta"


def check(config, shape, batch=2):
    """Tries whether a network can be built and takes batches of grids of `shape`.

    ValueError, or the error of the network's own code, if not. The check costs neither memory nor
    time. Only smp:* is run once, since its limits are not known here.
    """
    with torch.device(_first_device(config)):
        net = build(**config).eval()
    text = " x ".join(map(str, shape))
    multiple = getattr(net, "multiple", 1)
    if any(side % multiple for side in shape):
        raise ValueError(f"needs sides that are multiples of {multiple}, not {text}")
    if isinstance(net, SMP):
        with torch.no_grad():
            net(torch.zeros(1, config["channels"], *shape))
    if batch == 1 and max(shape) <= getattr(net, "coarsest", 0):
        raise ValueError(
            f"one image of {text} is a single pixel in its deepest level, where batch norm needs "
            "two; give a larger --size, --batch or --batch-unlabeled"
        )


def load_encoder(net, source):
    """Loads published weights into the encoder of a network. -> a line that says what was left out

    source: a file, or "imagenet" (models/pretrained.py); for smp:* a name that its package knows.
    ValueError or KeyError says what does not fit.
    """
    if isinstance(net, SMP):
        net.load_named(source)
        return f"encoder: weights {source} of segmentation_models_pytorch"
    encoder = getattr(net, "encoder", None) or getattr(net, "backbone", net)
    if not hasattr(encoder, "load_pretrained"):
        raise ValueError(f"{net.config['name']} has no encoder that they could be for")
    volumes = net.config["dims"] == 3
    if volumes and source == "imagenet":
        raise ValueError("they are for slices, not for volumes")
    weights = read(source, getattr(encoder, "name", None))
    if volumes and max(value.dim() for value in weights.values()) < 5:
        raise ValueError("they are for slices, not for volumes")
    unused = encoder.load_pretrained(weights, net.config["channels"])
    return f"encoder: weights of {source}, all but {', '.join(unused)}"


def rebuild(config, weights):
    """The network of a checkpoint: build(**config) with the weights of the checkpoint.

    ValueError, or the error of torch, unless every key, shape and type matches and every weight
    is finite. The network takes these very tensors, and nothing else is allocated, whatever the
    config claims.
    """
    limits = {"width": (1, math.inf), "members": (1, len(weights)), "mask_dropout": (0, 1)}
    for name, (low, high) in limits.items():
        value = config.get(name, 1)
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{name} is {value!a:.40}, not in {low} to {high}")
    with torch.device(_first_device(config)):
        net = build(**config)
    for name, expected in net.state_dict().items():
        _check_weight(name, expected, weights.get(name))
    net.load_state_dict(weights, assign=True)
    if any(t.is_meta for t in (*net.parameters(), *net.buffers())):
        raise ValueError("a part of the network is in no checkpoint")
    return net


def _check_weight(name, expected, found):
    """ValueError unless `found` is a finite tensor of the shape and type of `expected`."""
    needed = f"{expected.dtype} of {tuple(expected.shape)} is needed"
    if not torch.is_tensor(found):
        raise ValueError(f"{name} is missing, but {needed}")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(f"{name} is {found.dtype} of {tuple(found.shape)}, but {needed}")
    if not found.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values")


def parameters(net):
    """The number of trainable weights."""
    return sum(p.numel() for p in net.parameters())
