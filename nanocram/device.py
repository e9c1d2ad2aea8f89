"""What a machine can do: its device, best dtype and peak, and whether its compiler is right."""

import ctypes
import math
import os
import re
import sys
import time

import torch

from nanocram.faults import Fault, is_out_of_memory, one_line

# Peaks in TFLOP/s of dense fp16 or bf16 products, by a part of the GPU's name.
GPU_PEAKS = {
    # as the paper counts them
    "2080 Ti": 53.8,
    "A4000": 88.5,
    "A6000": 154.8,
    # from NVIDIA's data sheets
    "V100": 125,
    "T4": 65,
    "A5000": 111,
    "3090 Ti": 80,
    "3090": 71,
    "4090": 165,
    "5090": 209,
    "A100": 312,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}
M_TRIM_THRESHOLD = -1  # options of mallopt, from glibc's malloc.h
M_MMAP_MAX = -4


def pick_device(name):
    """Return "cuda", "mps" or "cpu": the given one, or for "auto" the first that is there."""
    is_there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in is_there if is_there[device])
    elif not is_there[name]:
        hint = "--device=auto takes what there is"
        raise Fault(f"device = {name!r}, but torch sees none here; {hint}")
    if name == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return name


def keep_freed_memory():
    """Make glibc keep freed memory: asking the kernel for it took up to a third of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_MAX, 0)  # no mapping of its own for a large tensor
        mallopt(M_TRIM_THRESHOLD, -1)  # never trim the heap


def make_deterministic(device):
    """Make every run on this machine give the same bytes.

    Without it a GPU adds up in any order, by atomic additions. So does compiled code on a CPU with
    several threads, in the gradient of the embedding: two runs of one seed differed at step 1.
    """
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def pick_dtype(device, name):
    """Return the dtype of that name. "auto": bf16 if the hardware multiplies in it, else fp32.

    GPUs that are too old for bf16 get fp16.
    """
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


# --------------------------------------------------------------------------------------------------
# The peak


def peak_flops(device, dtype):
    """Return (FLOP/s, what it is): from the table if the GPU is known, else measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        is_slice = "MIG" in name  # of a GPU that is shared by several
        for key, tflops in GPU_PEAKS.items():
            if re.search(rf"\b{key}\b", name) and not is_slice:
                return tflops * 1e12, name
    return measure_peak(device, dtype), f"measured on this {device}"


def measure_peak(device, dtype):
    """Return the FLOP/s of the fastest among some products of square matrices."""
    # what a library does once, at its first product, is no part of a peak
    small = torch.ones(8, 8, device=device, dtype=dtype)
    (small @ small)[0, 0].item()

    # large products are the fastest; a slow device, or an emulated dtype, does not reach them
    best = 0.0
    seconds_left = 0.6
    for n in (256, 512, 1024, 2048):
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(n, n, generator=generator).to(device, dtype)
        for _ in range(12):
            if seconds_left <= 0:
                break
            start = time.monotonic()
            (a @ a)[0, 0].item()
            seconds = time.monotonic() - start
            best = max(best, 2 * n**3 / seconds)
            seconds_left -= seconds
    return best


# --------------------------------------------------------------------------------------------------
# The compiler


def compile_checked(model, scale, *batch):
    """Return the compiled model, or with a warning the model itself if its compiler is not right.

    scale: function of the loss, whose gradients are compared. batch: what the model takes.

    The comparison with eager gradients is worth its seconds: torch 2.13 silently compiles one way
    to write rotary positions to wrong gradients. With dropout the two differ anyway, and only
    values that are not finite are found.
    """
    # matrices only: the gradient of the bias of a key is zero, but for noise
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gradients = []
    try:
        compiled = torch.compile(model, dynamic=False)  # shapes are fixed, and that is the fastest
        for forward in (compiled, model):
            gradients.append(torch.autograd.grad(scale(forward(*batch)), matrices))
    except Exception as e:
        if not is_out_of_memory(e):
            print(f"warning: torch.compile does not work here, going on without: {one_line(e)}")
            return model
        if not gradients:
            raise
        return compiled  # unchecked: the eager pass needs more memory than the compiled one

    error = largest_error(*gradients)
    if error == math.inf or (error > 0.5 and not model.config.dropout):
        print(f"warning: torch.compile changes a gradient by {error:.0%}, going on without")
        return model
    return compiled


def largest_error(gradients, expected_gradients):
    """Return the largest relative error among gradients, in the norm; inf if one is not finite.

    Expected gradients that are not finite are left out: the first scales for fp16 overflow.
    """
    largest = 0.0
    for gradient, expected in zip(gradients, expected_gradients):
        if not expected.isfinite().all():
            continue
        # in thirds, so that queries, keys and values count one by one
        for part, expected_part in zip(gradient.chunk(3), expected.chunk(3)):
            norm = expected_part.norm().clamp(min=1e-30)
            error = (part - expected_part).norm() / norm
            largest = max(largest, error.nan_to_num(math.inf).item())
    return largest
