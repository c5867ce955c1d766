"""The exponential moving average (EMA) of a network's weights: the teacher, and g as it is kept."""

import torch


def update_average(average, net, count, decay):
    """Moves the average toward the network: average = d average + (1 - d) net.

    d = min(1 - 1 / (count + 1), decay), as in the code of Mean Teacher (Tarvainen and Valpola,
    2017). count: the steps that the average has seen; at 0 it becomes a copy.

    The statistics of batch norm are averaged like the weights. The present statistics of the
    network do not fit averaged weights: with them, pseudo-labels collapsed (results/baselines).
    Counts of batches are copied.
    """
    move_average(average, net, decay_at(count, decay))


def decay_at(count, decay):
    """d of update_average()."""
    return min(1 - 1 / (count + 1), decay)


@torch.no_grad()
def move_average(average, net, decay):
    """update_average() with d given: a number, or a tensor of one, which stays on its device."""
    if torch.is_tensor(decay):
        shares = [1 - decay] * len(averaged(net))
        torch._foreach_lerp_(averaged(average), averaged(net), shares)
    else:
        torch._foreach_lerp_(averaged(average), averaged(net), 1 - decay)
    if counts := [b for b in average.buffers() if not b.is_floating_point()]:
        torch._foreach_copy_(counts, [b for b in net.buffers() if not b.is_floating_point()])


def averaged(net):
    """The tensors that an average keeps: parameters, and buffers that are not counts."""
    return [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]
