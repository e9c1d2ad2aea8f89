import itertools
import types

import pytest
import torch

from nanocram import device


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA GeForce RTX 2080 Ti", 53.8),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
    ],
)
def test_peaks_of_known_gpus(monkeypatch, name, tflops):
    """Names as the driver gives them; some are the beginnings of others."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device.peak_flops("cuda", torch.float16) == (tflops * 1e12, name)


@pytest.mark.parametrize("seconds, largest", [(1.0, 256), (0.04, 512), (0.001, 2048)])
def test_the_search_for_a_peak_spares_a_slow_device(monkeypatch, seconds, largest):
    """If each product takes the same time, the largest that was tried is the fastest."""
    clock, sizes = itertools.count(0, seconds), []
    monkeypatch.setattr(device, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(torch, "rand", lambda n, m, **_: sizes.append(n) or torch.zeros(n, m))
    peak, how = device.peak_flops("cpu", torch.float32)
    assert (
        peak == pytest.approx(2 * largest**3 / seconds)
        and how == "measured on this cpu"
        and sizes[0] == 256
    )
