"""The processes that train one model together. If there is only one, every call here does nothing.

torchrun starts one process per device and numbers them: the number is the rank.
"""

import os
import sys

import torch
import torch.distributed as dist

from nanocram.faults import Fault


def start(device):
    """Join the other processes if torchrun started this one. Return (rank, number of processes).

    Only rank 0 prints from here on.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    # if an optimizer imports this after the group exists, it keeps the threads of gloo alive
    from torch import _dynamo  # noqa: F401

    # one GPU for each process of this machine
    if device == "cuda":
        gpu = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if gpu >= gpus:
            raise Fault(
                f"torchrun starts more processes than there are GPUs here; --nproc_per_node={gpus}"
            )
        torch.cuda.set_device(gpu)

    # gloo also on a GPU: what `agree` shares is on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(stop, log, save, elapsed):
    """Return the four values that all processes go on with.

    Any process may ask to stop. The clock, and what it says about logging and saving, is rank 0's.
    """
    if not dist.is_initialized():
        return stop, log, save, elapsed

    # one maximum for all four: what others know less well than rank 0, they leave at zero
    first = dist.get_rank() == 0
    mine = [float(stop), 0.0, 0.0, 0.0]
    if first:
        mine[1:] = [float(log), float(save), elapsed]
    shared = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    stop, log, save, elapsed = shared.tolist()
    return bool(stop), bool(log), bool(save), elapsed


def add_up(tensors):
    """Replace each tensor by its sum over all processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_first(tensors):
    """Replace each tensor by the one of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def finish():
    """Wait for the other processes, then leave them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
