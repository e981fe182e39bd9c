"""What `sft doctor` shows: a table for people, one dictionary for machines. Nothing is printed here."""

import dataclasses
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table
from rich.text import Text

from sft import __version__
from sft.doctor.finding import Finding, Status
from sft.errors import EXIT_BAD_INPUT

SCHEMA = 1
"""Of the dictionary; changes when a key changes its meaning or goes away."""
PACKAGES = ("torch", "deepspeed", "transformers")
STYLES: dict[Status, str] = {"skip": "dim", "pass": "green", "warn": "yellow", "fail": "bold red"}
"""From the least to the most important."""
NARROW = 17
"""Columns for names; what is left of 80 holds the sentences."""


def exit_code(findings: Sequence[Finding]) -> int:
    """0, or 2 where something would fail: mostly it is the user's input, and always something to change first."""
    return EXIT_BAD_INPUT if any(finding.status == "fail" for finding in findings) else 0


def to_table(findings: Sequence[Finding]) -> Table:
    """One row per finding, in the given order; a remedy stands on a line of its own below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("check", max_width=NARROW, overflow="fold")
    table.add_column("where", max_width=NARROW, overflow="fold")
    table.add_column("found", ratio=1, overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", style="bold")
        check = Text(finding.check)
        table.add_row(Text(finding.status, style=STYLES[finding.status]), check, Text(finding.where), found)
    return table


def summarize(findings: Sequence[Finding], world_size: int, num_hosts: int) -> str:
    """`2 fail, 1 warn, 14 pass on 2 ranks of 2 hosts`; a status that nothing has is left out, but for a fail."""
    counts = Counter(finding.status for finding in findings)
    shown = [status for status in reversed(STYLES) if counts[status] or status == "fail"]
    ranks = f"{world_size} rank{'s' * (world_size > 1)} of {num_hosts} host{'s' * (num_hosts > 1)}"
    return f"{', '.join(f'{counts[status]} {status}' for status in shown)} on {ranks}"


def to_dict(
    findings: Sequence[Finding], *, world_size: int, hosts: Sequence[str], out: str | None, stopped: str | None
) -> dict[str, Any]:
    """What --json writes.

    Args:
        out: the run's folder; None without a run.
        stopped: why the checks did not come to their end; None if they did.
    """
    return {
        "schema": SCHEMA,
        "header": {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"sft": __version__, "python": platform.python_version(), **_installed()},
            "hosts": list(hosts),
            "world_size": world_size,
            "out": out,
        },
        "complete": stopped is None,
        "stopped": stopped,
        "exit_code": exit_code(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _installed() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
