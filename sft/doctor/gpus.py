"""GPUs as nvidia-smi tells of them, as torch sees them, and as fast as they multiply."""

import csv
import io
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from sft.errors import shorten
from sft.metrics import PEAK_BF16_FLOPS, gpu_model

GIB = 2**30
CONTEXT_BYTES = 3 * GIB // 4
"""What this process itself takes for its CUDA context."""
GPU_SIZE, CPU_SIZE = 8192, 512
"""Rows and columns of the matrices: large enough that a GPU is busy, small enough for a core in milliseconds."""
WARM_UP_S = 0.5
REPEATS = 20
LAUNCHED = 20
"""Products that wait for the GPU at a time, while nvidia-smi is asked what slows it down: some ten milliseconds."""
SLOW_DOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
"""Reasons for lower clocks that no healthy GPU has; the power limit, and idling, are none."""
NEAR_PEAK = {"A100", "A100 PCIE", "A800", "B100", "B200", "GB200", "GH200", "H100", "H20", "H200", "H800", "L40S"}
"""A healthy one multiplies at most of its data sheet's rate; the power limit of smaller cards does not let them."""

Answer = TypeVar("Answer")


def parse(text: str, fields: Sequence[str]) -> list[dict[str, str | None]]:
    """Rows of `nvidia-smi --query-...=fields --format=csv,noheader,nounits`; None: not readable on this GPU.

    Lines with another number of fields (messages) are left out.
    """
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    return [
        {field: _value(entry.strip()) for field, entry in zip(fields, row, strict=True)}
        for row in rows
        if len(row) == len(fields)
    ]


def query(*fields: str, of: str = "gpu") -> list[dict[str, str | None]]:
    """One row per GPU of this host; none where there is no nvidia-smi or its driver does not know a field."""
    command = ["nvidia-smi", f"--query-{of}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse(done.stdout, fields)


def look(device: torch.device) -> dict[str, Any]:
    """Facts of this rank's GPU: name, uuid, memory in bytes; what nvidia-smi knows of its health, None: unreadable."""
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    ecc = of_gpu(query("uuid", "ecc.errors.uncorrected.volatile.total"), "uuid", uuid)
    pages = of_gpu(query("uuid", "retired_pages.pending"), "uuid", uuid)
    fields = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
    rows = of_gpu(query(*fields, of="remapped-rows"), "gpu_uuid", uuid)
    return {
        "name": properties.name,
        "uuid": uuid,
        "total": total,
        "used_by_others": max(0, total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES),
        "health": health({**ecc, **pages, **rows}),
    }


def of_gpu(rows: Sequence[dict[str, str | None]], key: str, uuid: str) -> dict[str, str | None]:
    """The row of one GPU; empty where it is not listed, as parts of a GPU (MIG) are not."""
    return next((row for row in rows if row[key] == uuid), {})


def health(values: dict[str, str | None]) -> dict[str, int | None]:
    """Counts that are 0 on a healthy GPU; None: not readable.

    Returns:
        uncorrected: double-bit errors since the driver was loaded; pending: memory waits for a reset of the GPU to be
        replaced; failed: no spare memory is left.
    """
    pending = [_count(values.get(name)) for name in ("retired_pages.pending", "remapped_rows.pending")]
    known = [count for count in pending if count is not None]
    return {
        "uncorrected": _count(values.get("ecc.errors.uncorrected.volatile.total")),
        "pending": sum(known) if known else None,
        "failed": _count(values.get("remapped_rows.failure")),
    }


def slow_downs(uuid: str) -> list[str] | None:
    """Which of SLOW_DOWNS are active now; None: not readable."""
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):  # its name before driver 535
        fields = [f"{prefix}.{name}" for name in SLOW_DOWNS]
        row = of_gpu(query("uuid", *fields), "uuid", uuid)
        if any(row.get(field) is not None for field in fields):
            return [name for name, field in zip(SLOW_DOWNS, fields, strict=True) if row[field] == "Active"]
    return None


def peak(name: str) -> float | None:
    """Dense bf16 peak by the device's name; None where a healthy GPU may be far below it, or the table has none."""
    model = gpu_model(name)
    return PEAK_BF16_FLOPS[model] if model in NEAR_PEAK else None


def multiply(device: torch.device, meanwhile: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Rate of a square matrix product of random numbers, bf16 on a GPU and fp32 on a CPU, in FLOP/s.

    Each of REPEATS products is timed on its own (CUDA events, or the clock) after a warm-up that lets the clocks rise.
    Zeros would draw less power than any real data and be too fast.

    Args:
        meanwhile: on a GPU, called once while products are under way, for as long as it takes.

    Returns:
        best, median: FLOP/s; dtype; size; meanwhile: what that returned.
    """
    on_gpu = device.type == "cuda"
    size, dtype = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    warm_until_s = time.monotonic() + WARM_UP_S
    while time.monotonic() < warm_until_s:
        torch.mm(left, right, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
    times_s = [_time_product(left, right, out) for _ in range(REPEATS)]
    found = None
    if on_gpu:

        def load() -> None:
            for _ in range(LAUNCHED):
                torch.mm(left, right, out=out)
            torch.cuda.synchronize(device)

        found = under(load, meanwhile)
    flops = 2 * size**3
    return {
        "best": flops / min(times_s),
        "median": flops / statistics.median(times_s),
        "dtype": str(dtype).removeprefix("torch."),
        "size": size,
        "meanwhile": found,
    }


def under(load: Callable[[], None], ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns or raises, with `load` called again and again until then."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        answer = pool.submit(ask)
        while not answer.done():
            load()
    return answer.result()


def initialization_error() -> str | None:
    """Why CUDA cannot be used, in CUDA's words; None where torch has none, or where it can be used."""
    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return shorten(" ".join(str(error).split()), 300)
    return None


def _time_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    if left.device.type != "cuda":
        start_s = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - start_s
    with torch.cuda.device(left.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(left, right, out=out)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _value(entry: str) -> str | None:
    """nvidia-smi writes what it cannot tell in brackets, [N/A] or [Not Supported], and sometimes without."""
    return None if not entry or entry.startswith("[") or entry.upper() in ("N/A", "NOT SUPPORTED") else entry


def _count(entry: str | None) -> int | None:
    if entry is None:
        return None
    if entry.isdigit():
        return int(entry)
    return {"yes": 1, "no": 0}.get(entry.lower())
