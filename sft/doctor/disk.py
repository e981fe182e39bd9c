"""Check of the run's folder: room, speed, and that it is one folder for all hosts."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.shards import read_manifest
from sft.config import RunConfig
from sft.doctor.differences import halves, place, same_host, show_bytes
from sft.doctor.finding import Finding, Report, one_per_host
from sft.doctor.group import Group
from sft.errors import UserError
from sft.order import steps_per_epoch
from sft.retention import bytes_per_parameter, check_disk, exported_bytes_per_parameter, num_parameters
from sft.run_folder import DOCTOR, run_folder

GIB = 2**30
WRITE_BYTES, CHUNK_BYTES = 256 * 2**20, 32 * 2**20
WRITE_S = 2.0
SLOW_S = 600.0
"""A checkpoint that takes longer than this holds many steps up."""
LEAST_INODES = 10_000
SEEN_AFTER_S = 30.0
"""Listing a folder makes a network file system look again, so that this is long."""


def collect(config: RunConfig) -> dict[str, Any]:
    """Room and write speed at `out`, as this host sees it. All ranks write at about the same time, as in training.

    Returns:
        folder: the nearest that exists; problems: what would refuse the run; room: of sft.retention.check_disk, None
        where it is not known; inodes: None where the file system has no number; checkpoint_bytes; write: bytes_per_s,
        or error.
    """
    out = Path(config.out)
    folder = nearest_folder(out)
    facts: dict[str, Any] = {"out": str(out), "folder": str(folder), "problems": [], "room": None}
    for check in (lambda: run_folder(config), lambda: facts.update(room=_room(config))):
        if problem := _problem(check):
            facts["problems"].append(problem)
    status = os.statvfs(folder)
    facts["inodes"] = status.f_favail if status.f_files else None
    facts["free"] = shutil.disk_usage(folder).free
    facts["checkpoint_bytes"] = _checkpoint_bytes(config)
    facts["write"] = write_speed(folder)
    return facts


def judge(reports: list[Report]) -> list[Finding]:
    """Room on every host, files that may still be made, and how long one checkpoint takes."""
    findings = []
    for host in one_per_host(reports):
        facts, where = host.facts, place(same_host(host, reports), reports)
        findings += [Finding("disk", "fail", where, found, remedy) for found, remedy in map(halves, facts["problems"])]
        errors = [report.facts["write"].get("error") for report in same_host(host, reports)]
        if error := next(filter(None, errors), None):
            found = f"cannot write in {facts['folder']}: {error}"
            remedy = _to_write(facts["folder"], host.host, error)
            findings.append(Finding("disk", "fail", where, found, remedy, facts))
        if facts["inodes"] is not None and facts["inodes"] < LEAST_INODES:
            found = f"{facts['inodes']:,} files may still be made at {facts['folder']}"
            findings.append(Finding("disk", "warn", where, found, "delete files there, or choose another --out", facts))
    return [*(findings or [_room_found(reports)]), *_judge_speed(reports)]


def see(group: Group, config: RunConfig) -> list[Finding]:
    """Whether `out` is one folder: each host's first rank writes a file there, and looks for those of the others.

    Collective; on all ranks the same findings.
    """
    folder = nearest_folder(Path(config.out))
    own = folder / f"{DOCTOR}{group.host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    hosts, is_first = group.meeting.hosts, group.local_rank == 0
    if len(hosts) == 1:
        return []
    try:
        error = _problem(lambda: own.write_bytes(b"")) if is_first else None
        told = group.gather("files at out", [group.host, own.name, str(folder), error] if is_first else None)
        made = [(host, name) for host, name, _, error in filter(None, told) if error is None]
        unseen = look_for(folder, made, min(SEEN_AFTER_S, group.limit_s / 2)) if is_first else None
        missed = group.gather("files seen at out", None if unseen is None else [group.host, str(folder), unseen])
    finally:
        _problem(lambda: own.unlink(missing_ok=True))
    return judge_seen(hosts, list(filter(None, missed)), [name for name in told if name and name[3]])


def judge_seen(hosts: list[str], missed: list[list[Any]], unwritten: list[list[Any]]) -> list[Finding]:
    """Findings of `see`.

    Args:
        hosts: all, in the order of their ranks.
        missed: [host, its folder, hosts whose files it did not see].
        unwritten: [host, name, its folder, why it could not write].
    """
    findings = [
        Finding(
            "shared folder",
            "fail",
            f"host {host}",
            f"cannot write in {folder}: {error}",
            _to_write(folder, host, error),
        )
        for host, _, folder, error in unwritten
    ]
    for host, folder, unseen in missed:
        if unseen:
            found = f"does not see in {folder} what {', '.join(unseen)} wrote there"
            remedy = f"mount one file system at {folder} on {', '.join(hosts)}, or choose an --out that all share"
            findings.append(Finding("shared folder", "fail", f"host {host}", found, remedy, {"unseen": unseen}))
    if findings:
        return findings
    return [Finding("shared folder", "pass", "all ranks", f"{missed[0][1]} is one folder for {len(hosts)} hosts")]


def look_for(folder: Path, made: list[tuple[str, str]], patience_s: float) -> list[str]:
    """Hosts whose file does not come to be seen in `folder` in this time.

    Args:
        made: (host, name of its file).
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        names = set(_listed(folder))
        unseen = [host for host, name in made if name not in names]
        if not unseen or time.monotonic() > deadline_s:
            return unseen
        time.sleep(0.2)


def nearest_folder(out: Path) -> Path:
    """`out`, or the nearest folder above it that exists."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.isdir(folder))


def write_speed(folder: Path) -> dict[str, Any]:
    """Write a file of WRITE_BYTES, or for about WRITE_S, and remove it.

    Every CHUNK_BYTES reach the disk before the next: a lower bound of what large files get, and no memory's speed.

    Returns:
        bytes, seconds, bytes_per_s; or error.
    """
    path = folder / f"{DOCTOR}{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    chunk = os.urandom(CHUNK_BYTES)  # file systems that compress would be too fast on anything else
    written, start_s = 0, time.monotonic()
    try:
        with open(path, "xb", buffering=0) as file:
            while written < WRITE_BYTES and time.monotonic() - start_s < WRITE_S:
                written += file.write(chunk)
                os.fsync(file.fileno())
        seconds = time.monotonic() - start_s
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        _problem(lambda: path.unlink(missing_ok=True))
    return {"bytes": written, "seconds": seconds, "bytes_per_s": written / seconds}


def _to_write(folder: str, host: str, error: str) -> str:
    """What to do so that a file can be written."""
    if any(os.strerror(number) in error for number in (errno.ENOSPC, errno.EDQUOT)):
        return f"free space at {folder} (see df -h, df -i and quota on {host}), or choose another --out"
    return f"make {folder} writable for this user on {host}, or choose another --out"


def _room(config: RunConfig) -> dict[str, Any] | None:
    try:
        packs = read_manifest(Path(config.data.train))["totals"]["packs"]
        num_parameters(Path(config.model.path))
    except (UserError, OSError):
        return None  # the check of the inputs tells
    total = config.train.max_steps or config.train.epochs * steps_per_epoch(packs, config.batch.rows_per_step)
    return check_disk(
        Path(config.out),
        Path(config.model.path),
        config.checkpoint,
        total,
        heldout=config.data.heldout is not None,
        saved_itemsize=bytes_per_parameter(config.optim, config.train.ema_decay),
        exported_itemsize=exported_bytes_per_parameter(config.model.precision, config.train.ema_decay),
    )


def _checkpoint_bytes(config: RunConfig) -> int | None:
    try:
        each = bytes_per_parameter(config.optim, config.train.ema_decay)
        return each * num_parameters(Path(config.model.path))
    except (UserError, OSError):
        return None


def _problem(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}"
    return None


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _room_found(reports: list[Report]) -> Finding:
    least = min(one_per_host(reports), key=lambda report: report.facts["free"]).facts
    if least["room"] is None:
        found = f"{show_bytes(least['free'])} free at {least['folder']}; model or shards do not tell what is needed"
        return Finding("disk", "skip", "all ranks", found)
    room = least["room"]
    need, free = (show_bytes(room[name] * GIB) for name in ("need_gib", "free_gib"))
    found = f"{need} needed, {free} free or in use by this run at {least['folder']}"
    return Finding("disk", "pass", "all ranks", found, figures=room)


def _judge_speed(reports: list[Report]) -> list[Finding]:
    """Each host writes the parts of its ranks, all at the same time, as they were measured."""
    speeds = {
        host.host: sum(report.facts["write"].get("bytes_per_s", 0) for report in same_host(host, reports))
        for host in one_per_host(reports)
    }
    hosts = [host for host in one_per_host(reports) if speeds[host.host]]
    if not hosts:
        return []
    slowest = min(hosts, key=lambda host: speeds[host.host] / len(same_host(host, reports)))
    here, speed, whole = same_host(slowest, reports), speeds[slowest.host], reports[0].facts["checkpoint_bytes"]
    figures: dict[str, Any] = {"bytes_per_s": speeds, "checkpoint_bytes": whole, "checkpoint_s": None}
    together = f" by {len(here)} ranks at a time" if len(here) > 1 else ""
    told = f"{speed / 2**20:,.0f} MiB/s from host {slowest.host}{together}, the slowest"
    if whole is None:
        return [Finding("write speed", "pass", "all ranks", told, figures=figures)]
    seconds = figures["checkpoint_s"] = whole * len(here) / len(reports) / speed
    found = f"{told}: a checkpoint of {show_bytes(whole)} takes about {seconds:,.0f} s"
    if seconds > SLOW_S:
        remedy = "put --out on a faster file system, or raise checkpoint.every; guard.hang_after_s must be longer too"
        return [Finding("write speed", "warn", place(here, reports), found, remedy, figures)]
    return [Finding("write speed", "pass", "all ranks", found, figures=figures)]
