"""What the facts of GPUs and of the matrix product mean."""

import statistics
from typing import Any

from sft.doctor import gpus
from sft.doctor.differences import by_value, odd_ones, place, same_host, tell
from sft.doctor.finding import Finding, Report, Status, one_per_host

GIB = 2**30
FAIL_BELOW_PEAK, WARN_BELOW_PEAK = 0.4, 0.6
"""Parts of the data sheet's bf16 rate: a healthy GPU reaches 0.65 to 0.85 of it on a large product."""
SLOW_GPU, SLOW_CPU = 0.85, 0.5
"""Parts of the median over all ranks. Ranks on CPUs share cores, and so vary."""
OTHERS_SHARE = 0.05
"""Of a GPU's memory."""


def judge(reports: list[Report]) -> list[Finding]:
    """One GPU for each rank, of one kind, healthy and fast."""
    return [*_judge_gpus(reports), *_judge_health(reports), *_judge_compute(reports)]


def _judge_gpus(reports: list[Report]) -> list[Finding]:
    findings = []
    for host in one_per_host(reports):
        here = same_host(host, reports)
        findings += _judge_count(host, here, reports) + _judge_shared_gpus(here)
    with_gpu = [report for report in reports if report.facts["gpu"]]
    kinds = by_value(reports, lambda report: report.facts["gpu"]["name"] if report.facts["gpu"] else "CPU")
    if len(kinds) > 1:
        findings.append(
            Finding(
                "GPUs",
                "fail",
                place(odd_ones(kinds), reports),
                f"devices differ: {tell(kinds, reports)}",
                "use hosts of one kind: every step waits for the slowest rank, and memory is the smallest one's",
                {"kinds": [[name, [report.rank for report in having]] for name, having in kinds]},
            )
        )
    if findings:
        return findings
    if not with_gpu:
        return [Finding("GPUs", "pass", "all ranks", "the ranks compute on CPUs")]
    gpu = with_gpu[0].facts["gpu"]
    found = f"{len(with_gpu)} ranks, each with a {gpu['name']} of {gpu['total'] / GIB:,.0f} GiB"
    return [Finding("GPUs", "pass", "all ranks", found, figures={"name": gpu["name"], "bytes": gpu["total"]})]


def _judge_count(host: Report, here: list[Report], reports: list[Report]) -> list[Finding]:
    facts, where = host.facts, place(here, reports)
    seen, listed, ranks = facts["gpus_seen"], facts["gpus_listed"], facts["local_size"]
    figures = {"seen": seen, "listed": listed, "ranks": ranks}
    if facts["device"] != "cuda":
        if not listed or facts["wants_cpu"]:
            return []
        return [_unused(facts, where, {**figures, "cuda_error": facts["cuda_error"]})]
    if ranks is not None and seen < ranks:
        return [
            Finding(
                "GPUs",
                "fail",
                where,
                f"{seen} GPUs for {ranks} ranks",
                f"start {seen} ranks there (slots in the hostfile, GPUs in the pod or sbatch file), or look with "
                "nvidia-smi why GPUs are missing",
                figures,
            )
        ]
    if ranks is not None and seen > ranks:
        return [
            Finding(
                "GPUs",
                "warn",
                where,
                f"{seen} GPUs for {ranks} ranks: {seen - ranks} would idle",
                f"start {seen} ranks there, or hide the others with CUDA_VISIBLE_DEVICES",
                figures,
            )
        ]
    return []


def _unused(facts: dict[str, Any], where: str, figures: dict[str, Any]) -> Finding:
    """GPUs that nvidia-smi lists and torch does not use."""
    install = "install torch for the CUDA version of this driver (the first lines of nvidia-smi name it)"
    if facts["torch_cuda"] is None:
        reason, remedy = "it is built without CUDA", install
    else:
        reason = facts["cuda_error"] or "it says no reason"
        reason += f" (it is built for CUDA {facts['torch_cuda']})"
        remedy = "look there at systemctl status nvidia-fabricmanager (which GPUs with NVLink switches need), dmesg | "
        remedy += f"grep Xid, and CUDA_VISIBLE_DEVICES; if the driver is too old for torch's CUDA, {install}"
    return Finding(
        "GPUs",
        "fail",
        where,
        f"nvidia-smi lists {facts['gpus_listed']} GPUs, torch uses none: {reason}",
        f"{remedy}; to compute on CPUs all the same: DS_ACCELERATOR=cpu",
        figures,
    )


def _judge_shared_gpus(here: list[Report]) -> list[Finding]:
    with_gpu = [report for report in here if report.facts["gpu"]]
    return [
        Finding(
            "GPUs",
            "fail",
            ", ".join(report.who for report in having),
            f"{len(having)} ranks compute on one GPU ({uuid})",
            "give each rank its own LOCAL_RANK, and the same CUDA_VISIBLE_DEVICES to all of a host",
            {"uuid": uuid},
        )
        for uuid, having in by_value(with_gpu, lambda report: report.facts["gpu"]["uuid"])
        if len(having) > 1
    ]


def _judge_health(reports: list[Report]) -> list[Finding]:
    """Memory in use by others, memory errors, clocks held down."""
    with_gpu = [report for report in reports if report.facts["gpu"]]
    if not with_gpu:
        return []
    findings = [finding for report in with_gpu for finding in _judge_one(report)]
    if findings:
        return findings
    unread = [report for report in with_gpu if None in report.facts["gpu"]["health"].values()]
    more = f" (memory errors not readable on {place(unread, reports)})" if unread else ""
    return [Finding("GPU health", "pass", "all ranks", f"memory free, no errors, clocks not held down{more}")]


def _judge_one(report: Report) -> list[Finding]:
    gpu, slow = report.facts["gpu"], (report.facts["product"] or {}).get("meanwhile")
    health = gpu["health"]
    findings = []

    def add(status: Status, found: str, remedy: str) -> None:
        findings.append(Finding("GPU health", status, report.who, found, remedy, {"gpu": gpu, "slow_downs": slow}))

    if gpu["used_by_others"] > OTHERS_SHARE * gpu["total"]:
        used, total = gpu["used_by_others"] / GIB, gpu["total"] / GIB
        add(
            "warn",
            f"{used:,.1f} of {total:,.0f} GiB of its GPU are in use by other processes",
            f"end what nvidia-smi lists on {gpu['uuid']}: a job of before may have left it",
        )
    if report.facts["product"] is None:
        add(
            "fail",
            f"its GPU {gpu['uuid']} has no memory left for a matrix product",
            "end the processes that nvidia-smi lists on it",
        )
    if health["failed"]:
        add(
            "fail",
            f"its GPU {gpu['uuid']} has no spare memory rows left",
            "take the GPU out of service and have it replaced",
        )
    if health["uncorrected"]:
        add(
            "fail",
            f"{health['uncorrected']} uncorrectable memory errors on its GPU {gpu['uuid']} since it was started",
            "drain the host, reset the GPU (nvidia-smi --gpu-reset) and look again; leave it out if they come back",
        )
    if health["pending"] and not health["failed"]:
        add(
            "warn",
            f"faulty memory of its GPU {gpu['uuid']} waits for a reset to be replaced",
            "drain the host and reset the GPU: nvidia-smi --gpu-reset",
        )
    if slow:
        add(
            "warn",
            f"the clocks of its GPU {gpu['uuid']} are held down: {', '.join(slow)}",
            "look at cooling and power of that host: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
        )
    return findings


def _judge_compute(reports: list[Report]) -> list[Finding]:
    """Each rank against the data sheet, and against the median of all."""
    reports = [report for report in reports if report.facts["product"]]
    if not reports:
        return []
    on_gpu = reports[0].facts["device"] == "cuda"
    median = statistics.median(report.facts["product"]["median"] for report in reports)
    findings = []
    for report in reports:
        gpu, rate = report.facts["gpu"], report.facts["product"]["median"]
        peak = gpus.peak(gpu["name"]) if gpu else None
        figures = {**report.facts["product"], "peak": peak, "median_of_all": median}
        if peak and rate < WARN_BELOW_PEAK * peak:
            status: Status = "fail" if rate < FAIL_BELOW_PEAK * peak else "warn"
            findings.append(
                Finding(
                    "compute",
                    status,
                    report.who,
                    f"{_rate(rate)} in bf16, {rate / peak:.0%} of the {_rate(peak)} of a {gpu['name']}",
                    "look with nvidia-smi -q -d CLOCK,POWER,PERFORMANCE for a power limit, heat or other processes; "
                    "leave the GPU out if it stays slow",
                    figures,
                )
            )
        elif rate < (SLOW_GPU if on_gpu else SLOW_CPU) * median:
            findings.append(
                Finding(
                    "compute",
                    "warn",
                    report.who,
                    f"{_rate(rate)}, {rate / median:.0%} of the median of all ranks: it slows down every step of all",
                    "look at clocks, heat and other processes on that host, or leave it out",
                    figures,
                )
            )
    if findings:
        return findings
    slowest = min(report.facts["product"]["median"] for report in reports)
    product = reports[0].facts["product"]
    what = f"product of {product['size']} x {product['size']} in {product['dtype']}"
    found = f"{what}: median {_rate(median)}, slowest {_rate(slowest)}"
    peak = gpus.peak(reports[0].facts["gpu"]["name"]) if on_gpu else None
    found += f" ({median / peak:.0%} of the data sheet's {_rate(peak)})" if peak else ""
    return [
        Finding("compute", "pass", "all ranks", found, figures={"median": median, "slowest": slowest, "peak": peak})
    ]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"
