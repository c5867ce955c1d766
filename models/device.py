"""Where networks run and in which precision, and forms of a network that run faster."""

import argparse
import contextlib
import copy
import math
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_flatten, tree_unflatten

PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp


@dataclass
class Compute:
    """Where networks run, and in which precision."""

    device: torch.device
    amp: torch.dtype | None  # autocast to this type; None: float32

    def autocast(self):
        """The context in which networks run."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp)

    def scaler(self):
        """The scaler of the loss. It acts in fp16 alone, where gradients underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def place(self, net):
        """The network, moved to the device, in channels_last memory.

        On a CPU in mixed precision, its convolutions become InFloat32WhereTiny.
        """
        if self.device.type == "cpu" and self.amp:
            replacement = {nn.Conv2d: CPUConv2d, nn.Conv3d: CPUConv3d}
            for module in net.modules():
                module.__class__ = replacement.get(type(module), type(module))
        flat = net.config["dims"] == 2
        layout = torch.channels_last if flat else torch.channels_last_3d
        return net.to(self.device, memory_format=layout)

    def __str__(self):
        return f"{self.device}, {str(self.amp or torch.float32).removeprefix('torch.')}"


def restore_scaler(scaler, state):
    """Sets a scaler to that of a checkpoint, or leaves it as new where that run was without fp16.

    --amp auto may choose another type on another device.
    """
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def compute(device="auto", amp="auto", deterministic=False):
    """The Compute of the options --device and --amp.

    device: auto takes CUDA if it is there. A process of torchrun takes its own GPU.
    amp: auto takes the type that the device is fast in.
    deterministic: the same numbers each time, also on a GPU. torch warns where it cannot.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        device = f"cuda:{number}"
    device = torch.device(device)
    return Compute(device, fast_type(device) if amp == "auto" else PRECISIONS[amp])


def fast_type(device):
    """The type that a device is fast in; None: float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return None


def device_name(text):
    """The argparse type of --device: "auto", or a device that is there."""
    try:
        torch.zeros((), device="cpu" if text == "auto" else text).item()
    except Exception:  # each backend fails in its own way
        raise argparse.ArgumentTypeError(
            f"{text} is not a device here; use auto, cpu, cuda or cuda:1"
        ) from None
    return text


class InFloat32WhereTiny:
    """A convolution that computes in float32 where an axis is not longer than the kernel.

    On CPUs with AVX-512 BF16, torch 2.13 computes garbage there in bfloat16: the gradient of the
    weights is wrong, often finite, or memory is corrupted (3 x 3 x 3 on a grid of depth 2, 3 x 3
    with stride 2 on a single pixel, and more). Patches have at least 16 voxels a side, so only deep
    levels are concerned. Transposed convolutions and subclasses stay as they are. The only
    transposed one here, 2 x 2 x 2 with stride 2 in V-Net, is right.
    """

    def forward(self, x):
        if all(side > kernel for side, kernel in zip(x.shape[2:], self.kernel_size)):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class CPUConv2d(InFloat32WhereTiny, nn.Conv2d):
    pass


class CPUConv3d(InFloat32WhereTiny, nn.Conv3d):
    pass


def channels_last(x):
    """x [B, C, *S], two or three axes, in the memory layout that convolutions prefer."""
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=layout)


def fused(net):
    """A copy of a network in eval mode, batch norms folded into the convolutions before them.

    This takes an nn.Sequential that holds both, so the blocks of a ResNet keep theirs. The copy
    gives the same answers but for rounding; a U-Net's come a sixth sooner on a CPU.
    """
    net = copy.deepcopy(net).eval()
    for name in ("encode", "decode"):
        vars(net).pop(name, None)  # compiled() set them on the original
    for layers in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(layers) - 1):
            first, second = layers[i], layers[i + 1]
            if isinstance(first, (nn.Conv2d, nn.Conv3d)) and isinstance(second, _BatchNorm):
                layers[i] = fuse_conv_bn_eval(first, second)
                layers[i + 1] = nn.Identity()
    return net


def compiled(net):
    """The network with encode and decode compiled by torch.compile at their first call.

    Each is compiled alone, for the methods that look at the features in between.
    """
    for name in ("encode", "decode"):
        if hasattr(net, name):  # a ResNet has only the first
            setattr(net, name, torch.compile(getattr(net, name)))
    return net


class Graph:
    """A function on the device that is replayed as a CUDA graph: the same kernels without Python.

    A replay repeats, on the same memory, what one call did. So the function must read nothing back,
    and what changes from call to call must be a tensor of one shape, or a number other than 0,
    which becomes a tensor. All else (shapes, zeros, None) is the kind of a call. At each new kind,
    the first three calls run as they are, since libraries set themselves up in them; the next one
    is captured. The random numbers are those of torch's seed, as in a plain call.
    """

    def __init__(self, function, device):
        self.function = function
        self.device = device
        self.kind = None

    def __call__(self, *inputs):
        """-> a copy of the tensor that the function gives"""
        values, form = tree_flatten(inputs)
        kind = [form, *map(kind_of, values)]
        if kind != self.kind:
            self.kind = kind
            self.plain = 3  # calls that still run as they are
            self.replay = None
            self.held = [self.place_for(value) for value in values]
        for place, value in zip(self.held, values):
            if torch.is_tensor(value):
                place.copy_(value, non_blocking=True)
            elif torch.is_tensor(place):
                place.fill_(value)
        inputs = tree_unflatten(self.held, form)
        if self.plain:
            self.plain -= 1
            return self.warm_up(inputs)
        if not self.replay:
            self.replay = self.capture(inputs)
        self.replay()
        return self.output.clone()

    def place_for(self, value):
        """Where an input of each call is put: a tensor on the device; itself if it never changes"""
        if torch.is_tensor(value):
            return torch.empty_like(value, device=self.device)
        return torch.empty((), device=self.device) if is_number(value) else value

    def warm_up(self, inputs):
        """A plain call, on a stream of its own, as torch asks for before a capture."""
        here = torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            output = self.function(*inputs)
        here.wait_stream(aside)
        return output

    def capture(self, inputs):
        """Records a call without making it. -> a function that makes it"""
        graph = torch.cuda.CUDAGraph()
        others = dict(capture_error_mode="thread_local")  # another thread may pin memory
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **others):
            self.output = self.function(*inputs)
        return graph.replay


def is_number(value):
    """Whether an input of a Graph is a number that changes from call to call."""
    return isinstance(value, float) and value != 0


def kind_of(value):
    """What is the same in all calls that one CUDA graph can make."""
    if torch.is_tensor(value):
        return value.shape, value.dtype
    return float if is_number(value) else value


def capturable(optimizer, device):
    """Lets a CUDA graph hold an optimizer's step: its learning rate becomes a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)
        if "capturable" in group:  # SGD always is
            group["capturable"] = True


def samples_in(images, shape):
    """The number of samples of a grid `shape` that fill as large a pass as slices of 224 x 224 do.

    images: how many such slices; shape: (S, S) or (D, H, W). At least 1.
    """
    return max(1, round(images * 224**2 / math.prod(shape)))
