"""Memory of this rank's device: GPU memory of the whole GPU, or, for ranks that compute on CPUs, of this process."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from sft.host_memory import available_host_memory

SELF = Path("/proc/self")


def in_use(device: torch.device) -> int:
    """Bytes that are taken now, after everything that was only kept for reuse has been given back."""
    if device.type == "cpu":
        return _status("VmRSS")
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def begin(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cpu":
        with suppress(OSError):  # where /proc cannot be written, the peak is that of all the time before: no less
            (SELF / "clear_refs").write_text("5")  # resets VmHWM, proc(5)
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes: the most that was taken at once since `begin`.

    On a GPU what torch's allocator had reserved, gaps and all, and what others hold: the CUDA context, NCCL's buffers,
    other processes.
    """
    if device.type == "cpu":
        return _status("VmHWM")
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return others + torch.cuda.max_memory_reserved(device)


def capacity(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank can take in all: the GPU's, or its share of what the host has left beside what it has."""
    if device.type == "cpu":
        return _status("VmRSS") + available_host_memory() // local_ranks
    return torch.cuda.mem_get_info(device)[1]


def describe(device: torch.device) -> str:
    """Name and size: what a measurement holds for."""
    if device.type == "cpu":
        return f"CPU, {psutil.virtual_memory().total / 2**30:.1f} GiB"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"


def _status(name: str) -> int:
    lines = (SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
