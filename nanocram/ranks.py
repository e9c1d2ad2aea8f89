"""The processes that train one model together. If there is only one, every call here does nothing.

Each process has a number, its rank, and usually a GPU of its own. Whoever starts the processes sets
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in their environment: torchrun and
accelerate do, a script for Slurm exports them. All processes have the same weights at every step.
Each computes the gradient of its own rows, and DistributedDataParallel takes the mean of these
gradients while the backward pass is still at work on earlier layers.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanocram.faults import Fault, one_line

# how long a process waits for the others, which may evaluate or save; then it gives them up
PATIENCE = timedelta(minutes=10)
VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]


# --------------------------------------------------------------------------------------------------
# Begin and end


def start(device):
    """Join the other processes, if there are some. Return (rank, number of processes, is_ours).

    is_ours: this call has made the process group, and `finish` has to destroy it. A group that
    exists already, such as Ray Train's, is used as it is. Only rank 0 of ours prints from here on.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), False
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, False

    # what the environment says
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise Fault(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; "
            "torchrun sets all that is needed, or unset WORLD_SIZE"
        )
    # if an optimizer imports this after the group exists, it keeps the threads of gloo alive
    from torch import _dynamo  # noqa: F401

    # one GPU for each process of this machine
    if device == "cuda":
        gpu = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if gpu >= gpus:
            raise Fault(f"there are more processes than GPUs here; --nproc_per_node={gpus}")
        torch.cuda.set_device(gpu)

    # gloo also on a GPU: what `agree` shares is on the CPU
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun (2.13) restarts processes with the same store, which has the addresses of the
        # dead ones: each start has keys of its own
        n_starts = store.add(f"starts of {rank}", 1)
        store = dist.PrefixStore(f"start {n_starts}", store)
        options = {"store": store, "rank": rank, "world_size": world, "timeout": PATIENCE}
        dist.init_process_group(backend, **options)
    except (RuntimeError, ValueError) as e:
        what = "the processes of this job do not find each other"
        raise Fault(f"{what}, at MASTER_ADDR and MASTER_PORT: {one_line(e)}") from e
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), True


def finish(is_ours):
    """Wait for the other processes, then leave them. is_ours: as `start` has returned it."""
    if world_size() > 1:
        dist.barrier()
    if is_ours:
        dist.destroy_process_group()


def run(main, config):
    """Call main(config). Raise Fault if another process of the job has ended or hangs."""
    try:
        main(config)
    except RuntimeError as e:
        # of NCCL and of the store, or of gloo, which has no class
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        # gloo begins with a line of its source, and goes on after the first sentence
        reason = str(e).partition("] ")[2] or one_line(e)
        reason = reason.partition(". ")[0]
        why = f"another process of this job has ended, or hangs ({reason})"
        raise Fault(f"{why}; what was saved is intact, the same command continues") from e


# --------------------------------------------------------------------------------------------------
# Work together


def world_size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(forward, device):
    """Return the model, or what torch.compile made of it, so that gradients are means over all."""
    if world_size() == 1:
        return forward
    gpus = [torch.cuda.current_device()] if device == "cuda" else None
    # the buffers are fixed tables: once is enough
    options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(forward, device_ids=gpus, **options)


def share_gradient(forward, is_last):
    """Say whether the next backward pass shares the gradient that has added up: after the last one.

    Call it before the forward pass, in which DistributedDataParallel looks.
    """
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = is_last


def mean(tensor):
    """Return the mean of a tensor over all processes."""
    if world_size() == 1:
        return tensor
    dist.all_reduce(tensor)
    return tensor / world_size()


def agree(stop, log, save, elapsed, speed):
    """Return the five values that all processes go on with.

    Any process may ask to stop. The clock is rank 0's, and so is what it says about logging, saving
    and the speed.
    """
    if world_size() == 1:
        return stop, log, save, elapsed, speed

    # one maximum for all five: what others know less well than rank 0, they leave at zero
    mine = [float(stop), 0.0, 0.0, 0.0, 0.0]
    if dist.get_rank() == 0:
        mine[1:] = [float(log), float(save), elapsed, speed]
    shared = torch.tensor(mine, dtype=torch.float64, device=agreement_device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    stop, log, save, elapsed, speed = shared.tolist()
    return bool(stop), bool(log), bool(save), elapsed, speed


def require_same(numbers, what):
    """Raise Fault in all processes unless all have the same numbers, which are exact in float64."""
    if world_size() == 1:
        return
    mine = torch.tensor(numbers, dtype=torch.float64, device=agreement_device())
    limits = torch.cat([mine, -mine])
    dist.all_reduce(limits, dist.ReduceOp.MAX)
    largest, smallest = limits[: len(mine)], -limits[len(mine) :]
    if not torch.equal(largest, smallest):
        raise Fault(f"the processes of this job do not see the same {what}; they need one disk")


def agreement_device():
    """Return where a tensor is shared without a GPU, or on one if the group is of NCCL alone.

    A group that another library has made may be.
    """
    return "cpu" if "gloo" in dist.get_backend_config() else "cuda"


def copy_from_first(tensors):
    """Replace each tensor by the one of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
