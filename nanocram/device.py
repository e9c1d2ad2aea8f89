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
    if name == "cuda":
        require_kernels(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
    if name == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return name


def require_kernels(capability, architectures):
    """Raise Fault if this build of torch cannot run on a GPU of that compute capability.

    architectures: what it was built for, such as ["sm_80", "compute_90"]. Code for sm_80 runs on
    8.0 and 8.6, not on 9.0. Code for compute_90 is compiled for the GPU, from 9.0 on.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        built = (int(number[:-1]), int(number[-1])) if number.isdecimal() else (major, minor)
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return
        if kind == "compute" and built <= (major, minor):
            return
    gpu = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    built_for = ", ".join(architectures)
    raise Fault(
        f"torch {torch.__version__} has no kernels for this {gpu}, only for {built_for}; "
        "install a build that has, or --device=cpu"
    )


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
    """Return (FLOP/s, what it is): from the table if it has the GPU and dtype, else measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        tflops = known_peak(name)
        if tflops and dtype != torch.float32:
            return tflops * 1e12, name
        return measure_peak(device, dtype), f"{name}, measured in {str(dtype)[6:]}"
    return measure_peak(device, dtype), f"measured on this {device}"


def known_peak(name):
    """Return the TFLOP/s of a GPU by the driver's name for it, or None.

    Only the size of its memory and the form of the board may follow: "RTX 4090 Laptop GPU",
    "RTX 4090 D", "GRID A100-10C" and the slices of a GPU (MIG) are slower than the card.
    """
    model = re.sub(r"\b(NVIDIA|GeForce|RTX|Quadro|Tesla) ", "", f"{name} ").strip()
    form = r"([ -](SXM\d*|PCIe|PCIE|NVL|HBM\d\w*|\d+GB))*"
    for key, tflops in GPU_PEAKS.items():
        if re.fullmatch(key + form, model):
            return tflops
    return None


def measure_peak(device, dtype):
    """Return the FLOP/s of the fastest among some products of square matrices."""
    # large products are the fastest; a slow device, or an emulated dtype, does not reach them
    sizes, products = (256, 512, 1024, 2048), 1
    if device != "cpu":  # many at a time, since waiting for the device takes as long as one
        sizes, products = (512, 1024, 2048, 4096, 8192), 16

    # what a library does once, at its first product, is no part of a peak
    small = torch.ones(8, 8, device=device, dtype=dtype)
    (small @ small)[0, 0].item()

    best = 0.0
    seconds_left = 0.6
    for n in sizes:
        generator = torch.Generator().manual_seed(0)
        a = torch.rand(n, n, generator=generator).to(device, dtype)
        for _ in range(12):
            if seconds_left <= 0:
                break
            start = time.monotonic()
            for _ in range(products):
                product = a @ a
            product[0, 0].item()
            seconds = time.monotonic() - start
            best = max(best, products * 2 * n**3 / seconds)
            seconds_left -= seconds
    return best


# --------------------------------------------------------------------------------------------------
# The compiler


def compile_checked(model, *batch):
    """Return the compiled model, or with a warning the model itself if its compiler is not right.

    batch: what the model takes to return its loss. The gradients of both are compared, without
    dropout, since its noise differs. That is worth its seconds: torch 2.13 silently compiles one
    way to write rotary positions to wrong gradients.
    """
    names = [name for name, _ in model.named_parameters()]
    had_dropout = model.config.dropout > 0 and model.training
    model.train(not had_dropout)
    try:
        try:
            expected, scale = finite_gradients(model, model, batch)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            expected = None  # unchecked: eager needs more memory than compiled
        compiled = torch.compile(model, dynamic=False)  # shapes are fixed, and that is the fastest
        if expected is None:
            return compiled
        found = gradients_of(compiled, model, batch, scale)
    except Exception as e:
        if is_out_of_memory(e):
            raise
        print(f"warning: torch.compile does not work here, going on without: {one_line(e)}")
        return model
    finally:
        model.train()

    error, name = largest_error(found, expected, names)
    if error > 0.5:
        what = f"the gradient of {name} by {error:.0%}"
        print(f"warning: torch.compile changes {what}, going on without")
        return model
    return compiled


def gradients_of(forward, model, batch, scale):
    """Return the gradients of all parameters, scaled."""
    return torch.autograd.grad(forward(*batch) * scale, list(model.parameters()))


def finite_gradients(forward, model, batch):
    """Return (gradients, the factor that they are scaled by).

    In fp16 small gradients vanish unless the loss is scaled up, and large ones overflow if it is
    scaled too much. So the factor falls until all are finite.
    """
    scale = 2.0**16 if model.dtype == torch.float16 else 1.0
    while True:
        gradients = gradients_of(forward, model, batch, scale)
        is_finite = all(gradient.isfinite().all() for gradient in gradients)
        if is_finite or scale <= 1.0:
            return gradients, scale
        scale /= 4


def largest_error(found, expected, names):
    """Return (the largest relative error among gradients, the name of its parameter).

    The error is in the norm, and infinite if a gradient is not finite.
    """
    largest = (0.0, "")
    for name, gradient, correct in zip(names, found, expected):
        # in thirds, so that queries, keys and values count one by one
        for part, correct_part in zip(gradient.chunk(3), correct.chunk(3)):
            norm = correct_part.norm()
            if correct.ndim < 2:
                # sums over all tokens, of which some are zero but for rounding: a key's bias
                norm = torch.maximum(norm, 0.1 * correct.norm())
            error = (part - correct_part).norm() / norm.clamp(min=1e-30)
            error = error.nan_to_num(math.inf).item()
            largest = max(largest, (error, name))
    return largest
