"""Published weights for the encoders of networks, and how the first layer fits other images.

No weight is left out unsaid: each must have its place and its shape.
"""

import hashlib
import os
import sys

import torch

from models import distributed

IMAGENET = {  # torchvision's; a name ends with the first digits of the file's SHA-256
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
}


def download(url):
    """The path of a file in the cache of torch ($TORCH_HOME), downloaded first if it is missing.

    ValueError if the download fails or the checksum is wrong, which is compared each time.
    """
    name = url.rsplit("/", 1)[1]
    digits = name.rsplit("-", 1)[1].removesuffix(".pth")
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if distributed.rank() == 0 and not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shown = sys.stderr.isatty()
            torch.hub.download_url_to_file(url, path, hash_prefix=digits, progress=shown)
        except Exception as error:  # the net fails in many ways
            raise ValueError(
                f"cannot be downloaded ({error}); fetch {url} elsewhere and give the file"
            ) from None
    distributed.wait()
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if not found.startswith(digits):
        raise ValueError(f"{path} is not the file that was published; remove it")
    return path


def read(source, encoder):
    """The state dict of a file, or of "imagenet": that of the encoder of this name in IMAGENET.

    ValueError if there is none.
    """
    if source == "imagenet":
        if encoder not in IMAGENET:
            known = ", ".join(IMAGENET)
            raise ValueError(f"none are known for this network, only for {known}; give a file")
        source = download(IMAGENET[encoder])
    elif not os.path.isfile(source):
        raise ValueError("no such file of weights; give one, or the word imagenet")
    state = load_file(source)
    for wrapper in ("model", "state_dict"):  # in Swin's files, and those of many training scripts
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not is_state_dict(state):
        raise ValueError("no state dict of a network")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_file(path):
    """What a file of torch.save or safetensors holds. ValueError if it cannot be read."""
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file as load
        except ImportError:
            raise ValueError(
                "a .safetensors file needs a package: pip install safetensors"
            ) from None
    else:
        load = load_pickle
    try:
        return load(path)
    except Exception:  # each kind of damage has its own
        raise ValueError(
            "cannot be read as a state dict (torch.save or safetensors); it may be damaged"
        ) from None


def load_pickle(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def is_state_dict(state):
    """Whether an object is a dict of names and dense real tensors."""
    return isinstance(state, dict) and all(
        isinstance(name, str)
        and torch.is_tensor(value)
        and value.layout == torch.strided
        and not value.is_complex()
        for name, value in state.items()
    )


def first_layer(weight, convolution, image_channels):
    """Filters of a first layer, made to fit another convolution. -> [F, inputs, *k]

    weight [F, c, *k]: filters for images of c channels. Of the inputs of the convolution, the first
    image_channels are those of the image. They take the filters as they are if there are c of them.
    Every other input takes the mean filter. (A gray image then answers with a third of what RGB
    would, until training has adapted the norm that follows.)
    """
    if weight.dim() != convolution.weight.dim():
        return weight  # it fits in no way: load_whole() will say so
    kept = weight if weight.shape[1] == image_channels else weight[:, :0]
    others = convolution.in_channels - kept.shape[1]
    mean = weight.mean(1, keepdim=True).expand(-1, others, *weight.shape[2:])
    return torch.cat([kept, mean], 1)


def load_whole(net, weights):
    """Loads weights, of which each must have its place and its shape.

    KeyError names those that are missing, left over, of another shape, or not finite.
    """
    own = net.state_dict()
    shared = own.keys() & weights.keys()
    wrong = {
        "missing": own.keys() - weights.keys(),
        "left over": weights.keys() - own.keys(),
        "of another shape": {n for n in shared if own[n].shape != weights[n].shape},
        "not finite": {n for n in shared if not weights[n].isfinite().all()},
    }
    texts = [f"{what}: {some_of(names)}" for what, names in wrong.items() if names]
    if texts:
        raise KeyError("; ".join(texts))
    net.load_state_dict(weights)


def some_of(names, most=6):
    """The first of some names in alphabetical order, and how many more there are."""
    text = ", ".join(sorted(names)[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
