"""What a check of `sft doctor` found. The one type that all checks share."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    """Stable name, for machines: "versions", "shards", "bandwidth between hosts"."""
    status: Status
    """fail: the run would not work, or not rightly; warn: it would, worse than it should; skip: not looked at here, and
    `found` says why."""
    where: str
    """Whom it concerns: "all ranks", "host n2", "rank 8 on n2"."""
    found: str
    """What was seen, in one line, with units."""
    remedy: str = ""
    """What to do; empty on a pass."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same in numbers, for --json."""


@dataclass(frozen=True)
class Report:
    """What one rank collected: JSON values by check."""

    rank: int
    host: str
    local_rank: int
    facts: dict[str, Any]

    @property
    def who(self) -> str:
        """Name of the rank in messages."""
        return f"rank {self.rank} on {self.host}"


def one_per_host(reports: list[Report]) -> list[Report]:
    """The first rank's of every host: for what is the host's and not the rank's."""
    return list({report.host: report for report in reversed(reports)}.values())[::-1]
