"""Several processes that train one network, as torchrun starts them: who they are, sums and lists over all of them, one batch norm for all.

Alone, a process needs none of it: rank() is 0, world() is 1, and every function hands back what it was given.

The processes share the work of one process: of --batch samples each sees its share, gradients are averaged, and batch norm takes its
statistics over all shares, so that a step does not depend on the number of processes but for the random numbers of augmentation and dropout,
and for what a method takes from its own share alone: whom an image is mixed with, the pixels of contrastive, the images of QAR.
"""
import os
import sys

import torch
from torch import distributed, nn


def rank():
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(device):
    """Joins the processes that torchrun has started, if it has; all but the first fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def mean(x):
    """Mean of a tensor over all processes, without gradient."""
    if world() > 1:
        x = x.detach().clone()
        distributed.all_reduce(x)
        x /= world()
    return x


def largest(number):
    """The largest of all processes' whole numbers; it does not wait for a GPU."""
    if world() > 1:
        x = torch.tensor(number)
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
        number = int(x)
    return number


def gather(mine):
    """The list whose items [rank::world] each process holds."""
    if world() == 1:
        return mine
    parts = [None] * world()
    distributed.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        whole[r::world()] = part
    return whole


def wait():
    """Returns when all processes are here."""
    if world() > 1:
        distributed.barrier()


def average_gradients(parameters):
    """Each gradient becomes its mean over all processes, in one message."""
    if world() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = mean(torch.cat([g.flatten() for g in gradients]))
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view(g.shape))


class _Mean(torch.autograd.Function):
    """Mean over all processes; the gradient is the mean of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        return mean(x)

    @staticmethod
    def backward(ctx, gradient):
        return mean(gradient)


def differentiable_mean(x):
    """Mean of a tensor over all processes, with gradient."""
    return _Mean.apply(x) if world() > 1 else x


class SyncedNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, which are of one size. torch.nn.SyncBatchNorm does the same, but not on CPUs."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        v, axes, like = x.float(), [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        average = _Mean.apply(v.mean(axes))
        variance = _Mean.apply((v - average.view(like)).square().mean(axes))
        with torch.no_grad():
            count = world() * v.numel() / v.shape[1]
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return torch.addcmul(self.bias.view(like), v - average.view(like), (self.weight * (variance + self.eps).rsqrt()).view(like)).to(x.dtype)


def synced(net):
    """The network with every batch norm taken over all processes; weights and their names stay."""
    if world() > 1 and next(net.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for layer in net.modules():
        if world() > 1 and isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            layer.__class__ = SyncedNorm  # the same parts, another forward
    return net
