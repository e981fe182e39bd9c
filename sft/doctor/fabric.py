"""What a host has for its ranks to exchange data by, and whether NCCL's settings let it be used."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sft.doctor.differences import place
from sft.doctor.finding import Finding, Report

PORTS = Path("/sys/class/infiniband")
GIB_PER_GBIT = 1e9 / 8 / 2**30
WITH_NVLINK = ("A100", "A800", "H100", "H800", "H200", "B200", "B300")
WITHOUT_NVLINK = ("PCIE", "NVL", "MIG ")
"""Variants of them: PCIe cards have bridges between pairs at most, parts of a GPU not even those."""


def collect(device: torch.device) -> dict[str, Any]:
    """This rank's facts.

    Returns:
        gpu: its name, None on a CPU; ports_gbit_s: rates of the host's active ports; disabled: settings that are on.
    """
    settings = ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE")
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "ports_gbit_s": port_rates(PORTS),
        "disabled": [name for name in settings if os.environ.get(name, "0") != "0"],
    }


def port_rates(folder: Path) -> list[float]:
    """Gb/s of every active InfiniBand or RoCE port, the fastest first, as the kernel tells in sysfs."""
    rates = []
    for port in folder.glob("*/ports/*"):
        try:
            state, rate = ((port / name).read_text() for name in ("state", "rate"))
        except OSError:  # a driver without it
            continue
        number = re.match(r"[\d.]+", rate)
        if "ACTIVE" in state and number:
            rates.append(float(number[0]))
    return sorted(rates, reverse=True)


def port_gib_s(ranks: Sequence[Report]) -> float:
    """What the ports of a host carry together, one per rank of it at most; of the host that has least; 0: none."""
    counts = {report.host: 0 for report in ranks}
    for report in ranks:
        counts[report.host] += 1
    return min(sum(report.facts["ports_gbit_s"][: counts[report.host]]) for report in ranks) * GIB_PER_GBIT


def has_nvlink(gpu: str | None) -> bool:
    """Whether all GPUs of this name are connected with each other by NVLink in the hosts that are built of them."""
    name = (gpu or "").upper()
    return any(model in name for model in WITH_NVLINK) and not any(variant in name for variant in WITHOUT_NVLINK)


def judge_settings(ranks: Sequence[Report]) -> list[Finding]:
    """Warnings of settings that keep NCCL from the fastest way there is."""
    hosts = [report.host for report in ranks]
    without_ports = [
        report
        for report in ranks
        if "NCCL_IB_DISABLE" in report.facts["disabled"] and report.facts["ports_gbit_s"] and len(set(hosts)) > 1
    ]
    without_peers = [
        report for report in ranks if "NCCL_P2P_DISABLE" in report.facts["disabled"] and hosts.count(report.host) > 1
    ]
    told = (
        ("NCCL_IB_DISABLE", "hosts talk over TCP beside active InfiniBand or RoCE ports", without_ports),
        ("NCCL_P2P_DISABLE", "GPUs of a host exchange all data through its memory and not directly", without_peers),
    )
    return [
        Finding(
            "NCCL settings",
            "warn",
            place(concerned, ranks),
            f"{name} is set: {what}",
            f"unset {name}, in the job's script and in .deepspeed_env too, unless NCCL fails without it",
        )
        for name, what, concerned in told
        if concerned and concerned[0].facts["gpu"] is not None
    ]
