"""Check of the software: the same on every rank, and within the versions that this project works with."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

import sft
from data_prep import shards
from sft.config import RunConfig
from sft.doctor import gpus
from sft.doctor.differences import by_value, figures, odd_ones, place, tell
from sft.doctor.finding import Finding, Report, Status
from sft.launch_env import is_secret
from sft.settings import redact

DISTRIBUTION = "sft-pipeline"
LIBRARIES = (
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "flash-attn",
    "liger-kernel",
)
"""Distributions that a run's numbers or files go through."""

PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_")
NAMES = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_DEVICE_ORDER", "DS_ACCELERATOR")
OF_THE_HOST = ("NCCL_HOSTID", "NCCL_TOPO_FILE", "TORCH_EXTENSIONS_DIR", "TORCH_HOME")
"""Beside those that end in IFNAME: may rightly be another on every host."""

REINSTALL = "install the same environment on every host (pip install -c constraints.txt), or share one"


def collect(config: RunConfig | None) -> dict[str, Any]:
    """Versions, our own code, the system, and the environment variables that matter, of this rank.

    Returns:
        versions: by name, None where absent; code: commit, dirty, digest; system; environment; bounds: what lies
        outside the requirements of this project, None where these are not known.
    """
    return {
        "versions": _versions(),
        "code": _own_code(),
        "system": {"os": _os_name(), "kernel": platform.release(), "glibc": " ".join(platform.libc_ver()).strip()},
        "environment": shared_environment(os.environ),
        "bounds": _bounds(),
    }


def judge(reports: list[Report]) -> list[Finding]:
    """Equal versions, equal code, versions within bounds, equal environment."""
    return [
        *_judge_versions(reports),
        _judge_code(reports),
        _judge_system(reports),
        _judge_bounds(reports),
        *_judge_environment(reports),
    ]


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that must be equal on all ranks. Those whose name says that they hold a secret are left out."""
    return {
        name: redact(value)
        for name, value in sorted(environment.items())
        if (name.startswith(PREFIXES) or name in NAMES)
        and not name.endswith("IFNAME")
        and name not in OF_THE_HOST
        and not is_secret(name)
    }


def outside_bounds(requirements: Sequence[str], installed: Callable[[str], str | None]) -> list[str]:
    """`torch 2.9.1 (needs >=2.10)` for each of our requirements that is not met; extras only where installed.

    Args:
        requirements: lines of this project's metadata.
        installed: version of a distribution, or None.
    """
    problems = []
    for requirement in map(Requirement, requirements):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if optional and not (requirement.marker and requirement.marker.evaluate({"extra": "gpu"})):
            continue
        version = installed(requirement.name)
        if version is None:
            problems += [] if optional else [f"{requirement.name} is not installed (needs {requirement.specifier})"]
        elif not _within(requirement, version):
            problems.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return problems


def code_digest(files: Mapping[str, Path]) -> str:
    """16 hexadecimal digits over names and bytes: two copies of the code that are unequal differ in it."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str | None]:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "driver": next((row["driver_version"] for row in gpus.query("driver_version")), None),
        "NCCL": nccl,
        **{name: _installed(name) for name in LIBRARIES},
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _bounds() -> list[str] | None:
    try:
        return outside_bounds(metadata.requires(DISTRIBUTION) or [], _installed)
    except metadata.PackageNotFoundError:
        return None


def _own_code() -> dict[str, Any]:
    """Commit of the checkout that the code runs from, if it is one, and the digest of the code itself."""
    packages = [Path(sft.__file__).parent, Path(shards.__file__).parent]
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path
        for package in packages
        for path in package.rglob("*.py")
    }
    root = packages[0].parent
    for folder in (packages[0] / "ds_configs", root / "ds_configs"):  # installed, or run from the repository
        files |= {f"ds_configs/{path.name}": path for path in folder.glob("*.json")}
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = commit and _git(root, "status", "--porcelain", "--", "sft", "data_prep", "ds_configs")
    return {"commit": commit, "dirty": bool(changed), "digest": code_digest(files)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return sys.platform


def _judge_versions(reports: list[Report]) -> list[Finding]:
    findings = []
    names = list(dict.fromkeys(name for report in reports for name in report.facts["versions"]))
    for name in names:
        groups = by_value(reports, lambda report, name=name: report.facts["versions"].get(name))  # type: ignore[misc]
        if len(groups) == 1:
            continue
        minors = {".".join((value or "").split(".")[:2]) for value, _ in groups}
        status: Status = "warn" if name == "python" and len(minors) == 1 else "fail"
        driver = "install the same driver on every host, or leave this host out" if name == "driver" else REINSTALL
        findings.append(
            Finding(
                "versions",
                status,
                place(odd_ones(groups), reports),
                f"{name} differs: {tell(groups, reports)}",
                driver,
                {"name": name, "versions": figures(groups)},
            )
        )
    if findings:
        return findings
    versions = reports[0].facts["versions"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return [Finding("versions", "pass", "all ranks", found, figures=versions)]


def _judge_code(reports: list[Report]) -> Finding:
    groups = by_value(reports, lambda report: report.facts["code"]["digest"])
    if len(groups) == 1:
        return Finding(
            "code", "pass", "all ranks", _describe(reports[0].facts["code"]), figures=reports[0].facts["code"]
        )
    told = [(_describe(having[0].facts["code"]), having) for _, having in groups]
    return Finding(
        "code",
        "fail",
        place(odd_ones(groups), reports),
        f"sft and data_prep differ: {tell(told, reports)}",
        "check out the same commit without local changes on every host, or start all from one shared folder",
        {"digests": figures(groups)},
    )


def _describe(code: dict[str, Any]) -> str:
    changed = " with local changes" if code["dirty"] else ""
    return (
        f"commit {code['commit'][:12]}{changed}, digest {code['digest']}"
        if code["commit"]
        else f"digest {code['digest']}"
    )


def _judge_system(reports: list[Report]) -> Finding:
    """Kernels may differ; a C library that differs matters to compiled files that hosts share."""
    groups = by_value(reports, lambda report: report.facts["system"]["glibc"])
    if len(groups) > 1:
        return Finding(
            "system",
            "warn",
            place(odd_ones(groups), reports),
            f"C library differs: {tell(groups, reports)}",
            "give each host its own TORCH_EXTENSIONS_DIR: what the newer one compiles, the older one cannot load",
            {"glibc": figures(groups)},
        )
    system = reports[0].facts["system"]
    return Finding("system", "pass", "all ranks", f"{system['os']}, {system['glibc']}", figures=system)


def _judge_bounds(reports: list[Report]) -> Finding:
    groups = by_value(reports, lambda report: report.facts["bounds"])
    if concerned := [report for problems, having in groups if problems for report in having]:
        found = "; ".join(dict.fromkeys(line for report in concerned for line in report.facts["bounds"]))
        return Finding(
            "requirements",
            "warn",
            place(concerned, reports),
            f"not as tested: {found}",
            "pip install -e . -c constraints.txt",
            {"problems": found.split("; ")},
        )
    if unknown := [report for problems, having in groups if problems is None for report in having]:
        return Finding(
            "requirements",
            "skip",
            place(unknown, reports),
            f"{DISTRIBUTION} is not installed there, so what it needs is not known",
        )
    return Finding("requirements", "pass", "all ranks", "every version is within pyproject's bounds")


def _judge_environment(reports: list[Report]) -> list[Finding]:
    findings = []
    names = sorted({name for report in reports for name in report.facts["environment"]})
    for name in names:
        groups = by_value(reports, lambda report, name=name: report.facts["environment"].get(name))  # type: ignore[misc]
        if len(groups) > 1:
            told = [("not set" if value is None else repr(value), having) for value, having in groups]
            findings.append(
                Finding(
                    "environment",
                    "warn",
                    place(odd_ones(groups), reports),
                    f"{name} differs: {tell(told, reports)}",
                    f"set {name} alike on every host, through the launcher (.deepspeed_env, sbatch, pod spec) and "
                    "not through one host's profile",
                    {"name": name, "values": figures(groups)},
                )
            )
    if findings:
        return findings
    environment = reports[0].facts["environment"]
    found = ", ".join(f"{name}={value}" for name, value in environment.items()) or "no variable of NCCL or torch is set"
    return [Finding("environment", "pass", "all ranks", found, figures=environment)]
