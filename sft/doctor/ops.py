"""DeepSpeed operators that a run compiles when it starts, and what that needs; found out without loading DeepSpeed."""

import ast
import importlib.util
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from sft.doctor.differences import place, same_host
from sft.doctor.finding import Finding, Report, one_per_host

QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
NEEDS_NVCC = ("quantizer",)
STALE_AFTER_S = 600.0
"""Older than any of these builds takes, on a slow file system, too: another host may be the builder."""
COMPILERS = {"ninja", "nvcc", "cicc", "ptxas", "cc1plus", "c++", "g++", "clang++"}


def needed(strategy: dict[str, Any], on_gpu: bool) -> list[str]:
    """Names of the operators that a run with this DeepSpeed file loads.

    AdamW over states on the host is DeepSpeed's own (sft.optim); collectives of quantized values have kernels. The
    shared-memory operator of CPU runs is switched off (sft.engine).
    """
    if not on_gpu:
        return []
    zero = strategy["zero_optimization"]
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
    return ["cpu_adam"] * offloads + ["quantizer"] * any(zero.get(key) for key in QUANTIZED)


def collect(wanted: list[str]) -> dict[str, Any]:
    """Which operators are there already, the tools to build the others, and locks of builds, on this host."""
    folder = extensions_folder()
    built = [path.parent.name for path in folder.glob("*/*.so")]
    nvcc = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"]
    return {
        "needed": wanted,
        "installed": [name for name in wanted if name in _installed_ops()],
        "built": [name for name in wanted if name in built],
        "folder": str(folder),
        "tools": {
            "c++": shutil.which(os.environ.get("CXX", "c++")),
            "ninja": shutil.which("ninja"),
            "nvcc": shutil.which("nvcc") or next((str(path) for path in nvcc if path.is_file()), None),
        },
        "locks": locks(folder, time.time()),
        "compiling": _compiling(),
    }


def extensions_folder() -> Path:
    """Where torch builds extensions for this process, as torch.utils.cpp_extension decides it."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return cache / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{device}"


def locks(folder: Path, now_s: float) -> list[dict[str, Any]]:
    """path, op and age_s of every lock that a build has set; a build that is killed leaves it for ever."""
    found = []
    for path in sorted(folder.glob("*/lock")):
        try:
            found.append({"path": str(path), "op": path.parent.name, "age_s": now_s - path.stat().st_mtime})
        except OSError:  # released meanwhile
            continue
    return found


def judge(reports: list[Report]) -> list[Finding]:
    """Of the facts under "ops": operators to be compiled, missing tools, and stale locks, by host."""
    hosts = one_per_host(reports)
    findings = [finding for host in hosts for finding in [*_judge_tools(host, reports), *_judge_locks(host, reports)]]
    if findings:
        return findings
    wanted = reports[0].facts["ops"]["needed"]
    found = f"{', '.join(wanted)}: ready" if wanted else "none is compiled at the start of this run"
    return [Finding("DeepSpeed ops", "pass", "all ranks", found)]


def _judge_tools(host: Report, reports: list[Report]) -> list[Finding]:
    ops, where = host.facts["ops"], place(same_host(host, reports), reports)
    jit = [name for name in ops["needed"] if name not in ops["installed"]]
    findings = []
    for name in jit:
        is_built = name in ops["built"]
        tools = ["ninja", *([] if is_built else ["c++"]), *(["nvcc"] if name in NEEDS_NVCC else [])]
        if missing := [tool for tool in tools if not ops["tools"][tool]]:
            findings.append(
                Finding(
                    "DeepSpeed ops",
                    "fail",
                    where,
                    f"{name} is compiled at the start: {', '.join(missing)} missing",
                    f"install {' and '.join(missing)} there (packages ninja-build, g++; the CUDA toolkit has nvcc), "
                    "or choose a deepspeed file that does not need the operator",
                    {"op": name, "missing": missing},
                )
            )
        elif not is_built:
            findings.append(
                Finding(
                    "DeepSpeed ops",
                    "warn",
                    where,
                    f"{name} will be compiled at the start, one to two minutes, into {ops['folder']}",
                    "nothing, or start one rank on one host first: a job that is killed while it compiles leaves a "
                    "lock that hangs the next",
                    {"op": name, "folder": ops["folder"]},
                )
            )
    return findings


def _judge_locks(host: Report, reports: list[Report]) -> list[Finding]:
    ops, where = host.facts["ops"], place(same_host(host, reports), reports)
    findings = []
    for lock in ops["locks"]:
        if ops["compiling"] or lock["age_s"] < STALE_AFTER_S:
            continue
        concerned = lock["op"] in ops["needed"]
        findings.append(
            Finding(
                "DeepSpeed ops",
                "fail" if concerned else "warn",
                where,
                f"a build of {lock['op']} was killed {lock['age_s'] / 60:,.0f} minutes ago: its lock {lock['path']} "
                + ("hangs this run's start" if concerned else "hangs whatever loads that operator"),
                f"where no other host compiles it now: rm {lock['path']}",
                lock,
            )
        )
    return findings


def _installed_ops() -> set[str]:
    """Operators that DeepSpeed's installation has compiled for GPUs, from the file that its build wrote."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return set()
    try:
        text = (Path(spec.origin).parent / "git_version_info_installed.py").read_text(encoding="utf-8")
    except OSError:
        return set()
    return installed_ops(text)


def installed_ops(text: str) -> set[str]:
    """Names in `installed_ops={...}` that are true, where `accelerator_name='cuda'`; else none: they are not used."""
    entries = re.search(r"^installed_ops=(\{.*\})$", text, re.MULTILINE)
    if entries is None or re.search(r"^accelerator_name='cuda'$", text, re.MULTILINE) is None:
        return set()
    return {name for name, is_there in ast.literal_eval(entries[1]).items() if is_there}


def _compiling() -> bool:
    return any((process.info["name"] or "") in COMPILERS for process in psutil.process_iter(["name"]))
