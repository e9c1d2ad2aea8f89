"""What a machine can do: its device, the best dtype, the peak, and whether its compiler can be trusted."""

import ctypes
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from configurator import one_line

# Dense fp16/bf16 tensor peaks in TFLOP/s: the first three as the paper counts them, the others from NVIDIA's data sheets.
GPU_PEAKS = {
    "2080 Ti": 53.8, "A4000": 88.5, "A6000": 154.8, "V100": 125, "T4": 65, "A5000": 111, "3090 Ti": 80, "3090": 71,
    "4090": 165, "5090": 209, "A100": 312, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250,
}  # fmt: skip


def pick_device(device):
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device != "auto" and not found[device]:
        sys.exit(f"{Path(sys.argv[0]).name}: device = {device!r}, but torch sees none here; --device=auto takes what there is")
    where = next(d for d in found if found[d]) if device == "auto" else device
    if where == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return where


def keep_freed_memory():
    """Has glibc keep what it frees, not hand it back: fetching it anew, page by page, took a sixth to a third of a step."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large tensors
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def repeatable(where):
    """The same bytes in every run on this machine: on a GPU, sums by atomic additions come in any order."""
    if where == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def pick_dtype(where, dtype):
    """bf16 where the hardware multiplies in it, fp16 on older GPUs, else fp32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if where == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    bf16 = where == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if bf16 else torch.float32


def peak_flops(where, act_dtype):
    """(FLOP/s, what it is): of the table for known GPUs, else the best of some matmuls."""
    if where == "cuda":
        name = torch.cuda.get_device_name()
        for key, tflops in GPU_PEAKS.items():
            if re.search(rf"\b{key}\b", name) and "MIG" not in name:  # which is a slice of a GPU
                return tflops * 1e12, name
    warm = torch.ones(8, 8, device=where, dtype=act_dtype)
    (warm @ warm)[0, 0].item()  # what a library does once is no part of a peak
    best, left = 0.0, 0.6  # seconds: a slow device, or a dtype that it only emulates, gets no further than small ones
    for n in (256, 512, 1024, 2048):
        a = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).to(where, act_dtype)
        for _ in range(12):
            if left > 0:
                start = time.monotonic()
                (a @ a)[0, 0].item()
                seconds = time.monotonic() - start
                best, left = max(best, 2 * n**3 / seconds), left - seconds
    return best, f"measured on this {where}"


def no_memory(error):
    """Whether torch raised it for want of memory, which on a CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def compiled(model, scale, *batch):
    """The compiled model; or, with a warning, the model itself where no compiler works or the gradients differ.

    The check is worth its seconds: torch 2.13 silently compiles one way to write rotary positions to wrong gradients. With
    dropout the two passes differ, and it finds those that are not finite alone.
    """
    gradients, matrices = [], [p for p in model.parameters() if p.ndim > 1]  # that of a key's bias is 0 but for noise
    try:
        fast = torch.compile(model, dynamic=False)  # shapes are fixed; a static graph is the fastest
        for forward in (fast, model):
            gradients.append(torch.autograd.grad(scale(forward(*batch)), matrices))
    except Exception as e:
        if no_memory(e):
            if gradients:  # the eager pass needs more memory than the compiled one; go on unchecked
                return fast
            raise
        print(f"train.py: warning: torch.compile does not work here, going on without: {one_line(e)}")
        return model
    # in thirds, so that queries, keys and values count one by one; in fp16 the first scales overflow
    thirds = [(x, y) for a, b in zip(*gradients) if b.isfinite().all() for x, y in zip(a.chunk(3), b.chunk(3))]
    errors = [((x - y).norm() / y.norm().clamp(min=1e-30)).nan_to_num(math.inf).item() for x, y in thirds]
    error = max(errors, default=0.0)
    if error == math.inf or (error > 0.5 and not model.config.dropout):
        print(f"train.py: warning: torch.compile changes a gradient by {error:.0%}, going on without")
        return model
    return fast
