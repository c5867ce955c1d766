"""Several processes that train one network, as torchrun starts them.

They need their rank, sums and lists over all of them, and one batch norm for all. A process that is
alone needs none of it: rank() is 0, world() is 1, and every function returns what it was given.

The processes share the work of one process. Each sees its share of the --batch samples, gradients
are averaged, and batch norm takes its statistics over all shares. So a step depends on the number
of processes in two ways only: by the random numbers of augmentation and dropout, and by what a
method takes from its own share: the image that another one is mixed with, the pixels of
contrastive, the images of QAR.
"""

import os
import sys

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.files import InputError


def rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(device):
    """Joins the processes of torchrun, if it has started any; all but the first fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def check_share(option, count):
    """InputError unless the processes can share a batch evenly. count: its images"""
    if count % world():
        raise InputError(f"{option} {count}: cannot be shared evenly by {world()} processes")


def mean(x):
    """The mean of a tensor over all processes. No gradient flows if there are several."""
    if world() > 1:
        x = x.detach().clone()
        distributed.all_reduce(x)
        x /= world()
    return x


def largest(number):
    """The largest whole number of all processes; it does not wait for a GPU."""
    if world() > 1:
        x = torch.tensor(number)
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
        number = int(x)
    return number


def gather(mine):
    """The list of which each process holds the items [rank::world]."""
    if world() == 1:
        return mine
    parts = [None] * world()
    distributed.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        whole[r :: world()] = part
    return whole


def wait():
    """Returns when all processes are here."""
    if world() > 1:
        distributed.barrier()


def average_gradients(parameters):
    """Sets each gradient to its mean over all processes, in one message."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean(torch.cat([g.flatten() for g in gradients]))
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view(g.shape))


class _Mean(torch.autograd.Function):
    """Mean over all processes; the gradient is the mean of the gradients of all processes."""

    @staticmethod
    def forward(ctx, x):
        return mean(x)

    @staticmethod
    def backward(ctx, gradient):
        return mean(gradient)


def differentiable_mean(x):
    """The mean of a tensor over all processes, with gradient."""
    return _Mean.apply(x) if world() > 1 else x


class SyncedNorm(_BatchNorm):
    """Batch norm over the batches of all processes, which have one size, on CPUs.

    torch.nn.SyncBatchNorm does the same on GPUs and refuses tensors on CPUs (torch 2.13).
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        like = (-1, *[1] * (x.dim() - 2))  # [C] -> [C, 1, 1]
        v = x.float()
        average = _Mean.apply(v.mean(axes))  # [C]
        variance = _Mean.apply((v - average.view(like)).square().mean(axes))  # [C]
        with torch.no_grad():
            count = world() * v.numel() / v.shape[1]
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (self.weight * (variance + self.eps).rsqrt()).view(like)
        return torch.addcmul(self.bias.view(like), v - average.view(like), scale).to(x.dtype)


def synced(net):
    """The network with every batch norm taken over all processes; weights and their names stay."""
    if world() == 1:
        return net
    if next(net.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            layer.__class__ = SyncedNorm  # the same parts, another forward
    return net
