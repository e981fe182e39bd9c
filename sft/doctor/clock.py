"""How far the hosts' clocks are apart, by messages through the store of the ranks' meeting."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from sft.doctor.finding import Finding, Status
from sft.doctor.group import Group
from sft.errors import RankLost

ROUNDS = 8
WARN_S = 1.0
"""Lines of metrics and events from several hosts are written second by second; beyond it they cannot be ordered."""
FAIL_S = 60.0
"""Credentials of munge (Slurm) live for 300 s and Kerberos tickets bear as much; a clock that is a minute off is not
synchronized, and will be there soon. Certificates, caches and whatever compares file times go wrong earlier."""
REMEDY = "synchronize the hosts' clocks: chronyc tracking (or timedatectl) on each shows which one is not"


@dataclass(frozen=True)
class Offset:
    """A host's clock against that of rank 0's host."""

    host: str
    ahead_s: float
    bound_s: float
    """The error is at most this: half of the round trip."""


def measure(group: Group, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Compare the clocks of all hosts. Collective; the first rank of each host takes part.

    As NTP does it (RFC 5905, section 8): a host sends at t0, rank 0 receives at t1 and answers at t2, the host receives
    at t3, each by its own clock. offset = ((t1 - t0) + (t2 - t3)) / 2, wrong by at most half the round trip
    ((t3 - t0) - (t2 - t1)) / 2. Of some rounds, the one with the shortest trip counts.

    Args:
        clock: seconds since the epoch on this host.

    Raises:
        RankLost: a rank did not answer in time.
    """
    leaders = [first for host in group.meeting.hosts if (first := _first_rank(group, host)) != 0]
    if group.rank == 0:
        for leader in leaders:
            _answer(group, leader, clock)
    own = _ask(group, clock) if group.rank in leaders else None
    gathered = group.gather("clock", own)
    zero = Offset(group.meeting.hosts[0], 0.0, 0.0)
    return judge([zero, *(Offset(group.meeting.places[rank].host, *gathered[rank]) for rank in leaders)])


def judge(offsets: list[Offset]) -> list[Finding]:
    """Findings about hosts whose clocks are off, or one for all. The host with the median clock is taken to be right.

    Args:
        offsets: of all hosts, that of rank 0's (zero) among them.
    """
    if len(offsets) == 1:
        return [Finding("clock", "skip", "all ranks", "one host: no other clock to compare with")]
    middle = statistics.median_low(offset.ahead_s for offset in offsets)
    right = next(offset for offset in offsets if offset.ahead_s == middle)
    figures = {offset.host: {"ahead_s": offset.ahead_s - middle, "bound_s": offset.bound_s} for offset in offsets}
    findings = []
    for offset in offsets:
        ahead_s, bound_s = offset.ahead_s - middle, offset.bound_s + right.bound_s
        if abs(ahead_s) <= max(WARN_S, bound_s):
            continue
        off = f"its clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} that of {right.host}"
        status: Status = "fail" if abs(ahead_s) > max(FAIL_S, bound_s) else "warn"
        findings.append(
            Finding("clock", status, f"host {offset.host}", f"{off} (± {bound_s:.3f} s)", REMEDY, figures[offset.host])
        )
    if findings:
        return findings
    largest = max(offset.ahead_s for offset in offsets) - min(offset.ahead_s for offset in offsets)
    bound_s = 2 * max(offset.bound_s for offset in offsets)
    found = f"{len(offsets)} hosts within {largest:.3f} s (± {bound_s:.3f} s)"
    return [Finding("clock", "pass", "all ranks", found, figures=figures)]


def _first_rank(group: Group, host: str) -> int:
    return next(rank for rank, place in enumerate(group.meeting.places) if place.host == host)


def _answer(group: Group, leader: int, clock: Callable[[], float]) -> None:
    """Rank 0, to one host."""
    store = group.meeting.store
    for turn in range(ROUNDS):
        _wait(group, _key(leader, turn, "ping"), leader, group.limit_s)
        received_s = clock()
        store.set(_key(leader, turn, "pong"), json.dumps([received_s, clock()]))


def _ask(group: Group, clock: Callable[[], float]) -> tuple[float, float]:
    """A host's first rank: (seconds that this clock is ahead of rank 0's, bound of the error)."""
    # rank 0 answers host after host, so that the first question may wait for all others
    store, limit_s = group.meeting.store, group.limit_s * len(group.meeting.hosts)
    rounds = []
    for turn in range(ROUNDS):
        sent_s = clock()
        store.set(_key(group.rank, turn, "ping"), "")
        _wait(group, _key(group.rank, turn, "pong"), 0, limit_s)
        back_s = clock()
        received_s, answered_s = json.loads(store.get(_key(group.rank, turn, "pong")))
        trip_s = (back_s - sent_s) - (answered_s - received_s)
        rounds.append((trip_s, ((received_s - sent_s) + (answered_s - back_s)) / 2))
    trip_s, offset_s = min(rounds)
    return -offset_s, trip_s / 2


def _wait(group: Group, key: str, awaited: int, limit_s: float) -> None:
    """In C++, which notices at once: a loop that polls would add its pause to every trip."""
    try:
        group.meeting.store.wait([key], timedelta(seconds=limit_s))
    except dist.DistStoreError:
        who = group.name([awaited])
        raise RankLost(f"clock: no answer from {who} within {limit_s:.0f} s; see that host's output") from None
    except dist.DistError as error:
        raise RankLost(f"rank {group.rank} on {group.host}: lost rank 0 while comparing clocks") from error


def _key(rank: int, turn: int, part: str) -> str:
    return f"doctor/clock/{rank}/{turn}/{part}"
