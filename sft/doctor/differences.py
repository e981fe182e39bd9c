"""Values that should be equal on all ranks: who has which, in words."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from sft.doctor.finding import Report
from sft.vitals import name_all


def by_value(reports: Sequence[Report], value: Callable[[Report], Any]) -> list[tuple[Any, list[Report]]]:
    """Reports by their JSON value; the most frequent value first, of equally frequent ones that of the first rank."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(json.dumps(value(report), sort_keys=True), []).append(report)
    return [(json.loads(text), having) for text, having in sorted(groups.items(), key=lambda item: -len(item[1]))]


def tell(groups: Sequence[tuple[Any, Sequence[Report]]], among: Sequence[Report]) -> str:
    """`2.13.0 on host n1, 2.12.0 on host n2`."""
    return ", ".join(f"{'none' if value is None else value} on {place(having, among)}" for value, having in groups)


def place(concerned: Sequence[Report], among: Sequence[Report]) -> str:
    """Whom a finding concerns: all ranks, whole hosts, or single ranks."""
    if len(concerned) == len(among):
        return "all ranks"
    names = []
    for host in dict.fromkeys(report.host for report in concerned):
        here = [report for report in concerned if report.host == host]
        whole = len(here) == sum(report.host == host for report in among)
        names += [f"host {host}"] if whole else [report.who for report in here]
    return name_all(names)


def odd_ones(groups: Sequence[tuple[Any, Sequence[Report]]]) -> list[Report]:
    """All that do not have the most frequent value."""
    return [report for _, having in groups[1:] for report in having]


def figures(groups: Sequence[tuple[Any, Sequence[Report]]]) -> list[dict[str, Any]]:
    """The same for --json: each value with its ranks and hosts."""
    return [
        {
            "value": value,
            "ranks": [report.rank for report in having],
            "hosts": list(dict.fromkeys(report.host for report in having)),
        }
        for value, having in groups
    ]


def show_bytes(count: float) -> str:
    """`3.0 MiB`, `12.5 GiB`."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def same_host(one: Report, reports: Sequence[Report]) -> list[Report]:
    """All ranks on the host of `one`."""
    return [report for report in reports if report.host == one.host]


def halves(line: str) -> tuple[str, str]:
    """What was found, and what to do, of a UserError's line; where it has one part only, it is both."""
    found, semicolon, remedy = line.partition("; ")
    return (found, remedy) if semicolon else (line, line)
