"""Published weights for the encoders of networks: where they are, how their first layer fits other images; and that nothing is left out unsaid."""
import hashlib
import os
import sys

import torch

from models import distributed

IMAGENET = {  # torchvision's; a name ends with the first digits of the file's SHA-256
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth"}


def download(url):
    """The path of a file in torch's cache ($TORCH_HOME), where it is put first if it is missing; its checksum is compared each time.

    ValueError if it cannot be had, or is another file.
    """
    name = url.rsplit("/", 1)[1]
    path, digits = os.path.join(torch.hub.get_dir(), "checkpoints", name), name.rsplit("-", 1)[1].removesuffix(".pth")
    if distributed.rank() == 0 and not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=digits, progress=sys.stderr.isatty())
        except Exception as error:  # the net fails in many ways
            raise ValueError(f"cannot be downloaded ({error}); fetch {url} elsewhere and give the file") from None
    distributed.wait()
    with open(path, "rb") as f:
        if not hashlib.file_digest(f, "sha256").hexdigest().startswith(digits):
            raise ValueError(f"{path} is not the file that was published; remove it")
    return path


def read(source, encoder):
    """The state dict of a file, or the ImageNet weights ("imagenet") of an encoder by its name in IMAGENET. ValueError if there are none"""
    if source == "imagenet" and encoder not in IMAGENET:
        raise ValueError(f"none are known for this network, only for {', '.join(IMAGENET)}; give a file")
    if source != "imagenet" and not os.path.isfile(source):
        raise ValueError("no such file of weights; give one, or the word imagenet")
    path = download(IMAGENET[encoder]) if source == "imagenet" else source
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("a .safetensors file needs a package: pip install safetensors") from None
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # each kind of damage has its own
        raise ValueError("cannot be read as a state dict (torch.save or safetensors); it may be damaged") from None
    for wrapped in ("model", "state_dict"):  # Swin's files, and those of many training scripts
        state = state[wrapped] if isinstance(state, dict) and isinstance(state.get(wrapped), dict) else state
    usable = lambda value: torch.is_tensor(value) and value.layout == torch.strided and not value.is_complex()
    if not isinstance(state, dict) or not all(isinstance(name, str) and usable(value) for name, value in state.items()):
        raise ValueError("no state dict of a network")
    return {name.removeprefix("module."): value for name, value in state.items()}


def first_layer(weight, convolution, image_channels):
    """Filters [F, c, *k] of images of c channels for the inputs of another convolution, the first of which are the image's channels: as they are
    where the image has c channels too; every other channel takes their mean. (A gray image then answers with a third of what RGB would, until
    training has adapted the norm that follows.)"""
    if weight.dim() != convolution.weight.dim():
        return weight  # it fits no way: load_whole() will say so
    kept = weight if weight.shape[1] == image_channels else weight[:, :0]
    return torch.cat([kept, weight.mean(1, keepdim=True).expand(-1, convolution.in_channels - kept.shape[1], *weight.shape[2:])], 1)


def load_whole(net, weights):
    """Loads weights of which each must have its place and its shape. KeyError names those that are missing, left over, or of another shape"""
    own = net.state_dict()
    wrong = {"missing": own.keys() - weights.keys(), "left over": weights.keys() - own.keys(),
             "of another shape": {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape},
             "not finite": {name for name in own.keys() & weights.keys() if not weights[name].isfinite().all()}}
    texts = [f"{what}: {', '.join(sorted(names)[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "") for what, names in wrong.items() if names]
    if texts:
        raise KeyError("; ".join(texts))
    net.load_state_dict(weights)
