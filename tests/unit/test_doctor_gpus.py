"""GPUs as nvidia-smi, a script here, and torch tell of them. Run: pytest tests/unit/test_doctor_gpus.py"""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from sft.doctor import gpus

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert gpus.peak(name) == peak


NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=uuid) printf 'GPU-aa\\nGPU-bb\\n' ;;
  --query-gpu=driver_version) printf '570.86.15\\n570.86.15\\n' ;;
  --query-gpu=uuid,ecc.errors.uncorrected.volatile.total) printf 'GPU-aa, 0\\nGPU-bb, 2\\n' ;;
  --query-gpu=uuid,retired_pages.pending) printf 'GPU-aa, [N/A]\\nGPU-bb, [N/A]\\n' ;;
  --query-remapped-rows=gpu_uuid,*) printf 'GPU-aa, 0, 0\\nGPU-bb, Yes, No\\n' ;;
  --query-gpu=uuid,clocks_event_reasons.*) echo "Field is not a valid field to query."; exit 2 ;;
  --query-gpu=uuid,clocks_throttle_reasons.*)
    printf 'GPU-aa, Not Active, Not Active, Not Active, Not Active\\n'
    printf 'GPU-bb, Active, Not Active, Not Active, Active\\n' ;;
  *) echo "unexpected $1" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(NVIDIA_SMI)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.fixture
def torch_sees(monkeypatch):
    """A GPU with 2 GiB in use, 0.5 GiB of it by this process."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid="bb")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB // 2)


@pytest.mark.usefixtures("nvidia_smi", "torch_sees")
def test_a_gpu_by_its_own_uuid():
    seen = gpus.look(torch.device("cuda", 0))
    assert seen["uuid"] == "GPU-bb"
    assert seen["health"] == {"uncorrected": 2, "pending": 1, "failed": 0}
    assert seen["used_by_others"] == 2 * GIB - GIB // 2 - gpus.CONTEXT_BYTES
    assert gpus.slow_downs("GPU-bb") == ["hw_slowdown", "sw_thermal_slowdown"]
    assert gpus.slow_downs("GPU-aa") == []
    assert gpus.slow_downs("MIG-cc") is None
    assert gpus.query("driver_version")[0] == {"driver_version": "570.86.15"}
    assert len(gpus.query("uuid")) == 2


@pytest.mark.usefixtures("torch_sees")
def test_without_nvidia_smi_nothing_is_readable(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.look(torch.device("cuda", 0))["health"] == {"uncorrected": None, "pending": None, "failed": None}
    assert gpus.slow_downs("GPU-bb") is None
    assert gpus.query("uuid") == []


def test_lines_of_nvidia_smi():
    text = "NVIDIA H100, 0, [N/A]\nNVIDIA H100, [Not Supported], N/A\n\nWarning: something\n"
    assert gpus.parse(text, ("name", "ecc", "rows")) == [
        {"name": "NVIDIA H100", "ecc": "0", "rows": None},
        {"name": "NVIDIA H100", "ecc": None, "rows": None},
    ]
    assert gpus.parse("No devices were found\n", ("uuid", "name")) == []


def test_the_product_is_counted_as_it_is_done(monkeypatch):
    """Every product takes 1 ms by a clock of our own: 2 x 64^3 operations in it."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(gpus, "CPU_SIZE", 64)
    monkeypatch.setattr(gpus, "WARM_UP_S", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
    rate = gpus.multiply(torch.device("cpu"))
    assert rate["median"] == pytest.approx(2 * 64**3 / 1e-3)
    assert (rate["dtype"], rate["size"], rate["meanwhile"]) == ("float32", 64, None)


def test_the_gpu_is_busy_until_the_answer_is_there():
    loads, asked = [], []

    def ask():
        asked.append(len(loads))
        time.sleep(0.3)
        return "slow"

    assert gpus.under(lambda: (loads.append(time.monotonic()), time.sleep(0.01)), ask) == "slow"
    assert loads[-1] - loads[0] > 0.2
    assert asked[0] < len(loads) / 2


def test_why_cuda_cannot_be_used_is_told_in_its_words(monkeypatch):
    def broken():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount().\n Error 802: system not yet initialized")

    monkeypatch.setattr(torch.cuda, "init", broken)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpus.initialization_error() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cudaGetDeviceCount(). Error 802: system not yet initialized" in gpus.initialization_error()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert gpus.initialization_error() is None
