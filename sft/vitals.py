"""What a rank shows of itself to the others, and what follows from it: no threads, no communication."""

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from sft.errors import EXIT_CODES, shorten

ADVICE = "this run stops on every rank; start it again to resume"
EXITING = 0x4
"""PF_EXITING in the flags of /proc/<pid>/stat: dying; freeing a large memory takes a while."""
NAMED = 4
"""Ranks that one message names; of more, it gives the number."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One rank's process."""

    rank: int
    host: str
    place: str
    """A host's boot and pid name space: within one, a pid means the same."""
    pid: int
    started: int
    """Start time in clock ticks: with the pid it is unique."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the main thread is."""

    marks: int
    """Marks set so far: ranks with the same number are equally far."""
    phase: str
    step: int
    marked_s: float
    """Monotonic time of the last mark."""
    limit_s: float
    """The phase may take so long."""

    @property
    def place(self) -> str:
        """Where training is."""
        return f"step {self.step}, {self.phase}"


@dataclasses.dataclass(frozen=True)
class Beat:
    """A sign of life."""

    number: int
    marks: int
    phase: str
    step: int
    stuck_s: float
    """Since the last mark."""
    limit_s: float
    where: str
    """What the main thread executes: file, line, function."""
    in_collective: bool
    ended: bool = False

    @property
    def place(self) -> str:
        """Where training was."""
        return f"step {self.step}, {self.phase}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why every rank must leave."""

    kind: Literal["gone", "silent", "hangs", "ended"]
    """ended: by an error that it told."""
    culprits: tuple[int, ...]
    reason: str

    def survivors(self, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks` that can still speak; a rank that hangs can."""
        return sorted(rank for rank in ranks if self.kind == "hangs" or rank not in self.culprits)


def this_member(rank: int) -> Member:
    """This process. Host names alone would mix up containers that share one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    fields = _stat(os.getpid())
    assert fields is not None, "no /proc"
    return Member(rank, os.uname().nodename, f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid(), int(fields[19]))


def is_gone(member: Member) -> bool:
    """Whether a process of this host and pid name space has ended or is ending (a zombie has)."""
    fields = _stat(member.pid)
    if fields is None or int(fields[19]) != member.started:
        return True
    return fields[0] in "ZX" or bool(int(fields[6]) & EXITING)


def is_stopped(member: Member) -> bool:
    """Whether a process of this host was stopped by a signal or a debugger."""
    fields = _stat(member.pid)
    return fields is not None and fields[0] in "Tt"


def take_beat(number: int, progress: Progress, woke_s: float, thread: int, ended: bool) -> Beat:
    """This process's sign of life.

    Args:
        woke_s: monotonic time at which the process last went on after it had been stopped; it is not stuck since then.
        thread: identifier of the one that trains.
    """
    frames = sys._current_frames()
    innermost = frames.get(thread)
    where = "an ended thread"
    if innermost is not None:
        code = innermost.f_code
        where = f"{Path(code.co_filename).name}:{innermost.f_lineno} ({code.co_name})"
    return Beat(
        number,
        progress.marks,
        progress.phase,
        progress.step,
        stuck_s=time.monotonic() - max(progress.marked_s, woke_s),
        limit_s=progress.limit_s,
        where=where,
        in_collective=any(_is_in_collective(frame) for frame in frames.values()),
        ended=ended,
    )


def judge_progress(beats: Mapping[int, Beat], members: Mapping[int, Member]) -> Verdict | None:
    """Who keeps the run from getting on: the ranks with the fewest marks, once they are beyond their limit.

    Of these, the ones that do not wait in a collective; where that tells nothing, nobody is named: on GPUs the main
    thread waits for a collective in any call that needs its result.
    """
    beats = {rank: beat for rank, beat in beats.items() if not beat.ended}
    fewest = min((beat.marks for beat in beats.values()), default=0)
    last = {rank: beat for rank, beat in beats.items() if beat.marks == fewest}
    stuck_s = max((beat.stuck_s for beat in last.values() if beat.stuck_s > beat.limit_s), default=None)
    if stuck_s is None:
        return None
    outside = [rank for rank, beat in last.items() if not beat.in_collective]
    culprits = list(last)
    if len(last) == len(beats) > 1:
        culprits = outside if len(outside) <= len(last) / 2 else []
    elif outside:
        culprits = outside
    beat = last[culprits[0] if culprits else min(last)]
    if culprits:
        who = name_all([str(members[rank]) for rank in culprits])
        hang = f"{who} {'hangs' if len(culprits) == 1 else 'hang'} for {stuck_s:.0f} s in {beat.place}, at {beat.where}"
    else:
        hang = f"no rank is behind: all wait for {stuck_s:.0f} s in {beat.place}: a collective hangs (network?)"
    return Verdict("hangs", tuple(culprits), f"{hang}; {ADVICE}")


def describe_error(error: BaseException) -> str:
    """One line: `error: what the user must change`, or the exception's name and first line."""
    for kind, (_, word) in EXIT_CODES.items():
        if isinstance(error, kind):
            return shorten(f"{word}: {error}", 400)
    first = str(error).partition("\n")[0]
    return shorten(f"{type(error).__name__}: {first}" if first else type(error).__name__, 400)


def name_all(names: Sequence[str]) -> str:
    """The first few, and the number of the rest."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third on (state first), None where there is no such process; proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
