"""Check of each host and its GPUs: what they have, what they allow, and how fast they compute."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import torch

from sft.config import RunConfig
from sft.doctor import gpu_findings, gpus, ops
from sft.doctor.differences import place, same_host
from sft.doctor.finding import Finding, Report, Status, one_per_host
from sft.errors import UserError
from sft.host_memory import available_host_memory
from sft.retention import num_parameters

GIB = 2**30
LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "nproc": resource.RLIMIT_NPROC,
    "core": resource.RLIMIT_CORE,
}
SHM = "/dev/shm"
LEAST_SHM, SHM_OF_RANK = GIB, 10 * 2**20
"""Wanted, and needed by each rank: NCCL's shared memory of one connection has 9.2 MiB."""
STATE_BYTES = 16
"""Of one parameter in fp32: master weight, two moments, gradient."""


def collect(config: RunConfig | None, device: torch.device) -> dict[str, Any]:
    """GPU, rate of a matrix product, limits, memory and operators of this rank and its host."""
    strategy = _strategy(config)
    on_gpu = device.type == "cuda"
    exists = not on_gpu or (device.index or 0) < torch.cuda.device_count()
    gpu = gpus.look(device) if on_gpu and exists else None
    uuid = gpu["uuid"] if gpu else ""
    wants_cpu, listed = os.environ.get("DS_ACCELERATOR") == "cpu", len(gpus.query("uuid"))
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return {
        "device": device.type,
        "torch_cuda": torch.version.cuda,
        "wants_cpu": wants_cpu,
        "gpus_listed": listed,
        "cuda_error": None if on_gpu or wants_cpu or not listed else gpus.initialization_error(),
        "gpus_seen": torch.cuda.device_count(),
        "local_size": int(local_size) if local_size else None,
        "gpu": gpu,
        "product": _product(device, uuid) if exists else None,
        "limits": {name: _limit(which) for name, which in LIMITS.items()},
        "infiniband": _names(Path("/sys/class/infiniband")),
        "shm_free": shutil.disk_usage(SHM).free if Path(SHM).is_dir() else 0,
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory": available_host_memory(),
        "state_bytes": _state_bytes(config, strategy, on_gpu),
        "optimizer_on_host": on_gpu and _offloads(strategy, "offload_optimizer"),
        "ops": ops.collect(ops.needed(strategy, on_gpu) if strategy else []),
    }


def judge(reports: list[Report]) -> list[Finding]:
    """GPUs and their health, compute, limits, /dev/shm, memory, threads, operators."""
    return [
        *gpu_findings.judge(reports),
        *_judge_limits(reports),
        *_judge_shm(reports),
        *_judge_memory(reports),
        *_judge_threads(reports),
        *ops.judge(reports),
    ]


def _product(device: torch.device, uuid: str) -> dict[str, Any] | None:
    """Of sft.doctor.gpus.multiply; None where the GPU has no memory left for it."""
    try:
        return gpus.multiply(device, lambda: gpus.slow_downs(uuid))
    except torch.OutOfMemoryError:
        return None


def _strategy(config: RunConfig | None) -> dict[str, Any] | None:
    """The run's DeepSpeed file; None without one that can be read (which the check of the inputs tells)."""
    from sft.engine import read_strategy

    try:
        return read_strategy(config.deepspeed) if config else None
    except (UserError, OSError):
        return None


def _offloads(strategy: dict[str, Any] | None, part: str) -> bool:
    return strategy is not None and (strategy["zero_optimization"].get(part) or {}).get("device", "none") == "cpu"


def _state_bytes(config: RunConfig | None, strategy: dict[str, Any] | None, on_gpu: bool) -> int | None:
    """Bytes of the whole run that are kept in host memory; None where that is not known."""
    if config is None or strategy is None:
        return None
    try:
        elements = num_parameters(Path(config.model.path))
    except (UserError, OSError):
        return None
    states = STATE_BYTES if not on_gpu or _offloads(strategy, "offload_optimizer") else 0
    weights = 2 if not on_gpu or _offloads(strategy, "offload_param") else 0
    return elements * (states + weights)


def _limit(which: int) -> int | None:
    """The soft limit, which counts; None: unlimited. In the units of ulimit's manual: files, bytes, processes."""
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _judge_limits(reports: list[Report]) -> list[Finding]:
    """Files: each rank holds connections to the others, and NCCL several for each. Locked memory: for InfiniBand."""
    findings = []
    for host in one_per_host(reports):
        here = same_host(host, reports)
        facts, where = host.facts, place(here, reports)
        files = max(4096, 1024 + 16 * len(reports))
        needs = {"nofile": files, "nproc": len(here) * (facts["cores"] + 128)}
        limits = facts["limits"]
        for name, need in needs.items():
            if limits[name] is not None and limits[name] < need:
                option = {"nofile": "-n", "nproc": "-u"}[name]
                findings.append(
                    Finding(
                        "limits",
                        "warn",
                        where,
                        f"ulimit {option} ({name}) is {limits[name]:,}, wanted {need:,}",
                        f"ulimit {option} {max(need, 65536)} in the script that starts the ranks; if that is "
                        "refused: /etc/security/limits.conf for ssh, LimitNOFILE/LimitNPROC of slurmd or containerd",
                        {"limit": name, "value": limits[name], "wanted": need},
                    )
                )
        if facts["device"] == "cuda" and facts["infiniband"] and limits["memlock"] is not None:
            findings.append(
                Finding(
                    "limits",
                    "warn",
                    where,
                    f"ulimit -l (memlock) is {limits['memlock'] // 1024:,} KiB, and there is {facts['infiniband'][0]}: "
                    "NCCL must lock memory for it, or fails at the first collective",
                    "ulimit -l unlimited: limits.conf for ssh, LimitMEMLOCK=infinity of slurmd, IPC_LOCK for a pod",
                    {"limit": "memlock", "value": limits["memlock"]},
                )
            )
    if findings:
        return findings
    limits = reports[0].facts["limits"]
    found = ", ".join(f"{name} {'unlimited' if value is None else f'{value:,}'}" for name, value in limits.items())
    return [Finding("limits", "pass", "all ranks", found, figures=limits)]


def _judge_shm(reports: list[Report]) -> list[Finding]:
    """NCCL's ranks on a host talk through it. Docker gives 64 MiB."""
    findings = []
    for host in one_per_host(reports):
        here, size = same_host(host, reports), host.facts["shm_free"]
        if host.facts["device"] == "cuda" and len(here) > 1 and size < LEAST_SHM:
            status: Status = "fail" if size < SHM_OF_RANK * len(here) else "warn"
            findings.append(
                Finding(
                    "/dev/shm",
                    status,
                    place(here, reports),
                    f"{size / 2**20:,.0f} MiB free for {len(here)} ranks: NCCL may fail with 'unhandled system error'",
                    "docker run --ipc=host or --shm-size=16g; in Kubernetes an emptyDir with medium: Memory mounted "
                    "at /dev/shm; where it is large and full, ls -l /dev/shm shows what jobs of before have left",
                    {"bytes": size},
                )
            )
    if findings:
        return findings
    least = min(report.facts["shm_free"] for report in reports)
    return [Finding("/dev/shm", "pass", "all ranks", f"{least / GIB:,.1f} GiB free at least", figures={"bytes": least})]


def _judge_memory(reports: list[Report]) -> list[Finding]:
    """What the run keeps in host memory for good, spread evenly over the ranks; loading needs some more for a while."""
    findings = []
    for host in one_per_host(reports):
        here, whole = same_host(host, reports), host.facts["state_bytes"]
        if whole is None:
            continue
        need, available = whole * len(here) / len(reports), host.facts["memory"]
        if need > available:
            findings.append(
                Finding(
                    "host memory",
                    "fail",
                    place(here, reports),
                    f"{need / GIB:,.1f} GiB needed for weights and optimizer states, {available / GIB:,.1f} GiB free",
                    "use more hosts, a deepspeed file without offload, or raise the job's memory limit",
                    {"need": need, "available": available},
                )
            )
    if findings:
        return findings
    least = min(report.facts["memory"] for report in reports)
    return [
        Finding(
            "host memory",
            "pass",
            "all ranks",
            f"{least / GIB:,.1f} GiB available at least",
            figures={"available": least},
        )
    ]


def _judge_threads(reports: list[Report]) -> list[Finding]:
    """Left alone, every rank computes with as many threads as there are cores, and they take turns."""
    findings = []
    for host in one_per_host(reports):
        here, facts = same_host(host, reports), host.facts
        fair = max(1, facts["cores"] // len(here))
        threads = facts["threads"]
        remedy = f"OMP_NUM_THREADS={fair} in the environment of the ranks ({facts['cores']} cores / {len(here)} ranks)"
        figures = {"threads": threads, "cores": facts["cores"], "ranks": len(here)}
        where = place(here, reports)
        if threads is None and len(here) > 1 and facts["cores"] > 1:
            found = f"OMP_NUM_THREADS is not set: {len(here)} ranks would each start {facts['cores']} threads"
            findings.append(Finding("threads", "warn", where, found, remedy, figures))
        elif facts["optimizer_on_host"] and threads == "1" and fair >= 4:
            found = (
                "OMP_NUM_THREADS is 1 (torchrun sets it), and the optimizer runs on the host: its step would be slow"
            )
            findings.append(Finding("threads", "warn", where, found, remedy, figures))
    if findings:
        return findings
    facts = reports[0].facts
    found = f"{facts['cores']} cores for the ranks of a host, OMP_NUM_THREADS {facts['threads'] or 'not set'}"
    return [Finding("threads", "pass", "all ranks", found)]
