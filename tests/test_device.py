import itertools
import re
import types

import pytest
import torch
from conftest import ROOT

from nanocram import device
from nanocram.faults import Fault

README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "GRID A100-10C",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 2080 Ti with Max-Q Design",
        "NVIDIA RTX 6000 Ada Generation",
    ],
)
def test_slower_relatives_of_known_gpus_are_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(device, "measure_peak", lambda *_: 7.0)
    assert device.peak_flops("cuda", torch.bfloat16) == (7.0, f"{name}, measured in bfloat16")


def test_the_peak_of_the_table_is_not_that_of_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    monkeypatch.setattr(device, "measure_peak", lambda *_: 7.0)
    assert device.peak_flops("cuda", torch.float32)[0] == 7.0


def test_the_table_of_the_readme_is_that_of_the_code():
    day_of_a6000 = device.GPU_PEAKS["A6000"] * 86400 / 1e6
    rows = re.findall(
        r"(?m)^\| (\w[^|]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README
    )
    assert len(rows) >= 10
    for name, *numbers in rows:
        key = name.partition(";")[0].removeprefix("RTX ").removesuffix(" SXM")
        tflops, exaflop, days, hours = map(float, numbers)
        assert device.GPU_PEAKS[key] == tflops
        assert exaflop == pytest.approx(tflops * 86400 / 1e6, abs=0.05)
        assert days == pytest.approx(exaflop / day_of_a6000, rel=0.05)
        assert hours == pytest.approx(24 * device.GPU_PEAKS["A6000"] / tflops, abs=0.06)


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], False),  # V100
        ((7, 5), ["sm_75", "sm_80"], True),  # 2080 Ti
        ((8, 6), ["sm_75", "sm_80"], True),
        ((9, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_gpu_without_kernels_is_one_line(monkeypatch, capability, architectures, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    if runs:
        assert device.pick_device("auto") == "cuda"
        return
    with pytest.raises(Fault, match="has no kernels for this Some GPU") as error:
        device.pick_device("auto")
    assert "\n" not in str(error.value)


class Scaled(torch.nn.Module):
    """Looks like a BERT to compile_checked; `wrong` changes the gradient of one parameter."""

    def __init__(self, size=1.0, dropout=0.0):
        super().__init__()
        self.config = types.SimpleNamespace(dropout=dropout)
        self.dtype = torch.float32
        self.weight = torch.nn.Parameter(torch.ones(6, 4))
        self.bias = torch.nn.Parameter(torch.ones(6))
        self.size = size

    def forward(self, x):
        noise = torch.rand(6) if self.training and self.config.dropout else 1.0
        return self.size * ((x @ self.weight.T + self.bias) * noise).square().sum()


class Wrong(torch.nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.model = [model]
        self.name = name

    def forward(self, x):
        parameter = dict(self.model[0].named_parameters())[self.name]
        return self.model[0](x) + 1e3 * (parameter - parameter.detach()).sum()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_wrong_gradient_is_found_in_matrices_and_vectors(monkeypatch, capsys, name, dropout):
    """With dropout, too: it is off while gradients are compared, and on again afterwards."""
    model = Scaled(dropout=dropout)
    monkeypatch.setattr(torch, "compile", lambda model, **_: Wrong(model, name))
    assert device.compile_checked(model, torch.ones(3, 4)) is model and model.training
    assert f"torch.compile changes the gradient of {name} by" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda model, **_: model.__call__)
    assert device.compile_checked(model, torch.ones(3, 4)) is not model
    assert capsys.readouterr().out == ""


def test_the_check_finds_a_scale_at_which_fp16_gradients_are_finite(monkeypatch, capsys):
    """So it compares numbers, where the first scale of the loss overflows."""
    model = Scaled(size=1e34)  # 1e34 * 2**16 is over the range of fp32
    model.dtype = torch.float16
    gradients, scale = device.finite_gradients(model, model, [torch.ones(3, 4)])
    assert 1.0 <= scale < 2**16 and all(gradient.isfinite().all() for gradient in gradients)
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: model(x) * 3)
    assert device.compile_checked(model, torch.ones(3, 4)) is model
    assert "changes the gradient" in capsys.readouterr().out


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
