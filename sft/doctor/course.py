"""The course of `sft doctor`: what is looked at, in which order, and what becomes of a check that itself fails.

No rank waits for another without an end. sft.watchdog watches from the start: a rank that dies, or fails where others
wait for it, is named on all ranks, which leave. Who is late is named by those who wait: before the process group exists
ranks exchange what they found through the store, in a bounded time (Group); after that the watchdog knows of hangs as
well. What was found before is shown in any case.
"""

import json
import math
import os
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from sft.doctor import clock, disk, inputs, machine, network, overlap, software
from sft.doctor.finding import Finding, Report
from sft.doctor.group import Group
from sft.doctor.options import DoctorConfig, DoctorSection
from sft.errors import EXIT_RANK_LOST, RankLost, UserError, leave
from sft.vitals import describe_error
from sft.watchdog import Watchdog, is_failed_collective

UNEXPECTED = (
    UserError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    subprocess.SubprocessError,
    psutil.Error,
    SafetensorError,
)
"""What libraries raise on broken inputs and broken hosts: a check that did not foresee it must not hide the others."""
FAILED = "the check failed"
"""Key of the facts of a rank on which it did."""
JOIN_S = 120.0
"""For the ranks to connect to each other: seconds, where they can."""
LOST_S = 60.0
"""A rank without a sign of life for this long is lost."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

Collect = Callable[[], dict[str, Any]]
Judge = Callable[[list[Report]], list[Finding]]
Begin = Callable[[str, float], None]
"""Tells the user and the other ranks which check begins, and how many seconds it may take."""


def examine(
    group: Group,
    config: DoctorConfig | None,
    options: DoctorSection,
    findings: list[Finding],
    say: Callable[[str], None],
    stop: Callable[[Finding], None],
) -> None:
    """Look at everything. Collective.

    Args:
        config: the run; None: only the hosts.
        findings: of rank 0, in the order of the checks; what other ranks find here is of no interest.
        say: tells what is being done.
        stop: shows what was found, with one finding more. Called from a thread, where the process must leave.

    Raises:
        RankLost: a rank did not come to a point that the others have reached.
    """
    check = "ranks"

    def begin(name: str, limit_s: float) -> None:
        nonlocal check
        check = name
        say(name)
        watched.mark(name, 0, limit_s)

    watched = Watchdog(
        group.rank,
        group.world_size,
        LOST_S,
        options.limit_s,
        record=lambda reason: stop(failure(check, "all ranks", reason)),
        stacks=Path(tempfile.gettempdir()) / f"sft-doctor-{os.getpid()}",
        store=group.meeting.store,
    )
    try:
        with watched, leaving_the_name_to_the_watchdog():
            look_alone(group, config, options, findings, begin)
            if group.world_size > 1:
                measure_together(group, config, options, findings, begin, stop)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UNEXPECTED as error:
        findings.append(broken_off(check, group, error))


def look_alone(
    group: Group, config: DoctorConfig | None, options: DoctorSection, findings: list[Finding], begin: Begin
) -> None:
    """What needs no process group."""
    findings.append(who_is_here(group))
    device = choose_device(group.local_rank)
    for check, collect, judge in local_checks(group, config, options, device):
        begin(check, math.inf)  # whoever waits for it has a limit of its own
        findings += look(group, check, collect, judge)
    begin("clock", math.inf)
    findings += clock.measure(group)
    if config is not None:
        findings += disk.see(group, config)
    else:
        findings.append(Finding("run", "skip", "all ranks", "only the hosts: --config run.yaml checks a run as well"))
    if group.world_size == 1:
        findings.append(Finding("network", "skip", "all ranks", "one rank: nobody to exchange anything with"))


def who_is_here(group: Group) -> Finding:
    """All of them, since they have met."""
    counts = [sum(place.host == host for place in group.meeting.places) for host in group.meeting.hosts]
    names = [f"{host} {count}" for host, count in zip(group.meeting.hosts, counts, strict=True)]
    more = f" and {len(names) - 8} hosts more" if len(names) > 8 else ""
    return Finding("ranks", "pass", "all ranks", f"{group.world_size} have met: {', '.join(names[:8])}{more}")


def choose_device(local_rank: int) -> torch.device:
    """As sft.engine.join will; before it, so that no GPU is touched that is not there."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def local_checks(
    group: Group, config: DoctorConfig | None, options: DoctorSection, device: torch.device
) -> Iterator[tuple[str, Collect, Judge]]:
    """What every rank looks at for itself."""
    yield "software", lambda: software.collect(config), software.judge
    yield "machine", lambda: machine.collect(config, device), machine.judge
    if config is not None:
        yield "disk", lambda: disk.collect(config), disk.judge
        yield "inputs", lambda: inputs.collect(config, options, group.local_rank), inputs.judge


def look(group: Group, check: str, collect: Collect, judge: Judge) -> list[Finding]:
    """Every rank's facts, judged; on rank 0. Collective."""
    try:
        facts = collect()
        json.dumps(facts)
    except UNEXPECTED as error:
        facts = {FAILED: describe_failure(error)}
    reports = group.reports(check, facts)
    if group.rank != 0:
        return []
    whole = [report for report in reports if FAILED not in report.facts]
    broken = [failure(check, report.who, report.facts[FAILED]) for report in reports if FAILED in report.facts]
    try:
        return [*broken, *(judge(whole) if whole else [])]
    except UNEXPECTED as error:
        return [*broken, failure(check, "all ranks", describe_failure(error))]


def measure_together(
    group: Group,
    config: DoctorConfig | None,
    options: DoctorSection,
    findings: list[Finding],
    begin: Begin,
    stop: Callable[[Finding], None],
) -> None:
    """What the ranks can only find out with each other. What fails here ends it: nobody knows who waits for whom."""
    from sft.engine import join

    begin("process group", math.inf)
    with leaving_after(min(JOIN_S, options.limit_s), group, stop):
        device = join(group.meeting)
    begin("network", options.limit_s)
    findings += network.measure(group, config, device, options)
    if config is not None and not options.overlap:
        findings.append(Finding("overlap_comm", "skip", "all ranks", "not asked for: doctor.overlap false"))
    elif config is not None:
        begin("overlap", options.limit_s)
        findings += overlap.measure(group, config, device, options)


@contextmanager
def leaving_the_name_to_the_watchdog() -> Iterator[None]:
    """A check whose collective broke tells that a rank is lost; the watchdog finds out which, from the cause."""
    try:
        yield
    except RankLost as lost:
        if lost.__cause__ is not None and is_failed_collective(lost.__cause__):
            raise lost.__cause__ from lost
        raise


@contextmanager
def leaving_after(limit_s: float, group: Group, stop: Callable[[Finding], None]) -> Iterator[None]:
    """End this process where ranks cannot connect to each other; nothing in Python interrupts such a wait."""

    def give_up() -> None:
        found = disconnected("process group", group, f"not connected with the other ranks in {limit_s:.0f} s")
        try:
            os.write(2, f"stopped: {found.where}: {found.found}\n".encode())
            stop(found)
        finally:
            leave(EXIT_RANK_LOST)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def broken_off(check: str, group: Group, error: BaseException) -> Finding:
    """An error that ended the course. One of a collective after which no rank is lost is the network's."""
    reason = describe_failure(error)
    if is_failed_collective(error):
        return disconnected(check, group, f"no rank is lost, but a collective failed: {reason}")
    return failure(check, group.name([group.rank]), reason)


def disconnected(check: str, group: Group, found: str) -> Finding:
    """Ranks that live and do not reach each other."""
    interfaces = [f"{name} {os.environ.get(name, 'not set')}" for name in INTERFACES]
    remedy = (
        f"name the interface that leads to the other hosts in {' and '.join(INTERFACES)}, and open all ports between "
        "them: collectives use ports of their own, beside MASTER_PORT; NCCL_DEBUG=INFO shows which way NCCL tries"
    )
    return Finding(check, "fail", group.name([group.rank]), f"{found} ({', '.join(interfaces)})", remedy)


def failure(check: str, where: str, reason: str) -> Finding:
    """A check that did not come to its end."""
    remedy = "correct what the message names; if it names nothing that you know, report it with this line"
    return Finding(check, "fail", where, f"this check could not be made: {reason}", remedy)


def describe_failure(error: BaseException) -> str:
    """One line; of an error that nobody foresaw, also where it was raised."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sft/" in frame.filename] or frames
    return f"{describe_error(error)} (at {Path(ours[-1].filename).name}:{ours[-1].lineno})"
