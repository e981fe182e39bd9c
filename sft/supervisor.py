"""A launcher under supervision: a signal reaches the ranks alone, and what comes back is how the ranks ended.

DeepSpeed's launchers lose both. On one node `deepspeed` dies of a signal and leaves the rest running; its child
launch.py kills the ranks 30 s after SIGTERM, in the middle of a long save, and then says 1; `deepspeed` says 0 where
launch.py was killed; over ssh it kills every launch.py of this user, of other runs too. So a signal is passed to the
ranks, past all of them, and they wait for the ranks as ever; and where some have ended and the rest does not, as behind
a cut link, everything is ended here.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sft.errors import EXIT_BAD_INPUT, EXIT_CODES_FOLDER, EXIT_PREEMPTED
from sft.ranks import TRAINER, await_exit_codes, exit_code, find_ranks, listens, read_exit_codes, send
from sft.signals import SIGNALS
from sft.ssh import on_hosts
from sft.vitals import name_all

TWICE_ENDS = {signal.SIGTERM, signal.SIGINT}
BROADCAST = (signal.SIGUSR1, signal.SIGHUP)
"""What a scheduler may send to every process of a job, and the launchers would die of."""
APART_S = 2.0
"""One wish can arrive as two signals: Slurm may send SIGTERM to tasks and to the script, which passes it on to them."""
LOOK_S = 0.2
SURVEY_S = 1.0
"""Between two looks at who the ranks of this host are."""
REMOTE_S = 30.0
"""For a signal to reach the ranks of other hosts over ssh, and between two attempts."""
BAD_INPUT_WAIT_S = 15.0
"""After one rank has refused its input: the others say the same by then, or wait for it in vain."""
REST_WAIT_S = 45.0
"""After the first rank has left and lost_after_s more: by then the others' watchdogs have ended them, or never will."""


@dataclass(frozen=True)
class Job:
    """A launcher's command and what must be known of its ranks."""

    command: Sequence[str]
    """Starts ranks of `module`, sft.train or sft.doctor, and waits for them."""
    module: str
    environment: Mapping[str, str]
    exit_codes: Path
    """An empty folder, for this start alone, by which its ranks are recognized; where they run on several hosts, one
    that all of them see."""
    lost_after_s: float = 60.0
    """guard.lost_after_s of the run."""
    hosts: Mapping[str, int] = field(default_factory=dict)
    """Where ranks are started through ssh: how many on each host."""


def supervise(job: Job, say: Callable[[str], None]) -> int:
    """Run a launcher to its end, and return the exit code of the ranks (table in sft.errors).

    On SIGTERM, SIGUSR1, SIGINT or SIGHUP to this process, the ranks on this host get it, or one of another host where
    it has none, and they agree with all others to save and leave with 75. A second SIGTERM or SIGINT, at least 2 s
    later, kills the run: 128 + its number. No process of the launcher's group outlives this call.

    Args:
        job: what to run.
        say: shows one line to the user.
    """
    course = _Course(job, say)
    while course.launched.poll() is None or course.ranks():
        course.note_what_happened()
        if course.must_end():
            return exit_code(1, read_exit_codes(job.exit_codes))
        if course.requests and (code := course.answer()) is not None:
            return code
        time.sleep(LOOK_S)
    course.ask_those_left_behind()
    _kill_group(course.launched)
    code = exit_code(course.launched.returncode, read_exit_codes(job.exit_codes))
    if killed := course.killed():
        who = name_all([f"rank {rank}" for rank in killed])
        _tell(say, f"error: {who} on {os.uname().nodename} ended without a word: killed, out of memory perhaps")
    if code == 1 and course.launched.returncode == 0:
        _tell(say, "error: the ranks ended before the last step; see their output above")
    return code


class _Course:
    """One start of a launcher, from its first process to its last."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        self._job, self._say = job, say
        self.requests: list[tuple[int, float]] = []
        """Signals to this process: number, and time.monotonic()."""
        self.launched = _start(job, self.requests)
        self.ranks = functools.partial(find_ranks, job.exit_codes)
        self._told: set[psutil.Process] | None = None
        self._had_begun, self._lost = False, False
        self._codes: dict[int, int] = {}
        self._seen: set[int] = set()
        self._looked_s = time.monotonic()
        self._first_left_s: float | None = None
        self._asked_s, self._reached = float("-inf"), 0

    def note_what_happened(self) -> None:
        """Ranks that are here or have left; and a launcher that was killed: then its ranks are asked to save."""
        self._codes = read_exit_codes(self._job.exit_codes)
        if time.monotonic() > self._looked_s + SURVEY_S:
            self._seen |= set(self.ranks().values())
            self._looked_s = time.monotonic()
        if any(self._codes.values()) and self._first_left_s is None:
            self._first_left_s = time.monotonic()
        if self.launched.returncode is not None and not self.requests:
            self._lost = True
            _tell(self._say, "error: the launcher was killed and left its ranks")
            self.requests.append((signal.SIGTERM, time.monotonic()))

    def must_end(self) -> bool:
        """Whether a rank has left and the rest did not follow in time; then all of it is killed."""
        patience_s = _patience_s(self._job, self._codes)
        if self._first_left_s is None or time.monotonic() <= self._first_left_s + patience_s:
            return False
        who = _who_left(self._codes)
        _tell(
            self._say, f"error: {who}, but the launcher or other ranks did not end in {patience_s:.0f} s: killed them"
        )
        _end(self._job, self.launched, set(self.ranks()), self._say)
        return True

    def answer(self) -> int | None:
        """To the signals received so far; an exit code where everything has been ended at once."""
        job, first, ranks = self._job, self.requests[0][0], set(self.ranks())
        ready = {rank for rank in ranks if listens(rank)}
        self._had_begun = self._had_begun or bool(ready or self._codes)
        if _insists(self.requests) or job.module != TRAINER:
            _tell(self._say, "stopped at once, without saving" if job.module == TRAINER else "stopped")
            _end(job, self.launched, ranks, self._say)
            return 1 if self._lost else 128 + self.requests[-1][0]
        if self._told is None and not self._had_begun and not job.hosts:
            _tell(self._say, "stopped: the ranks had not begun, and there is nothing to save")
            _end(job, self.launched, ranks, self._say)
            return 1 if self._lost else EXIT_PREEMPTED
        if self._told is None:
            once_more = "; once more to stop at once without saving" if first in TWICE_ENDS else ""
            _tell(self._say, f"{signal.Signals(first).name}: saving, then stopping{once_more}")
        self._told = (self._told or set()) | send(first, ready - (self._told or set()))
        if job.hosts and not self._reached and not self._told and time.monotonic() > self._asked_s + REMOTE_S:
            self._asked_s = time.monotonic()
            self._reached = _signal_remotely(job, first, self._say)
        return None

    def killed(self) -> list[int]:
        """Ranks of this host that are gone and did not leave by themselves."""
        return sorted(self._seen - set(read_exit_codes(self._job.exit_codes)) - set(self.ranks().values()))

    def ask_those_left_behind(self) -> None:
        """Where the launcher of several hosts is gone (pdsh or its ssh was killed), and its ranks are perhaps not."""
        if not self._job.hosts or self.requests:
            return
        codes = await_exit_codes(self._job.exit_codes, sum(self._job.hosts.values()))
        if not any(codes.values()) and len(codes) < sum(self._job.hosts.values()):
            _tell(self._say, "error: the launcher has ended without its ranks; those that are left are asked to save")
            _signal_remotely(self._job, signal.SIGTERM, self._say)


def _start(job: Job, requests: list[tuple[int, float]]) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that Ctrl-C reaches this process alone, and the whole group can be ended."""

    def receive(number: int, _frame: object) -> None:
        requests.append((number, time.monotonic()))

    def ignore_broadcast() -> None:  # children inherit what is ignored, until they take a signal over themselves
        for number in BROADCAST:
            signal.signal(number, signal.SIG_IGN)

    for number in SIGNALS:
        signal.signal(number, receive)
    # Kubeflow gives a pod a RANK, which would make every process below it look like a rank
    environment = {name: value for name, value in job.environment.items() if name != "RANK"}
    environment[EXIT_CODES_FOLDER] = str(job.exit_codes.absolute())
    return subprocess.Popen(
        job.command,
        env=environment,
        start_new_session=True,
        preexec_fn=ignore_broadcast,  # noqa: PLW1509 - no threads
    )


def _patience_s(job: Job, codes: Mapping[int, int]) -> float:
    """After the first rank has left with an error."""
    if EXIT_BAD_INPUT in codes.values() and len(job.hosts) > 1:
        return BAD_INPUT_WAIT_S
    return job.lost_after_s + REST_WAIT_S


def _who_left(codes: Mapping[int, int]) -> str:
    rank = min(rank for rank, code in codes.items() if code)
    return f"rank {rank} has ended with exit code {codes[rank]}"


def _insists(requests: Sequence[tuple[int, float]]) -> bool:
    """Not under Slurm, which sends SIGTERM when a job is preempted, and again when its grace time is over."""
    if "SLURM_STEP_ID" in os.environ:
        return False
    times_s = [at_s for number, at_s in requests if number in TWICE_ENDS]
    return len(times_s) > 1 and times_s[-1] - times_s[0] >= APART_S


def _tell(say: Callable[[str], None], line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and that may be why there is something to say
        say(line)


def _signal_remotely(job: Job, number: int, say: Callable[[str], None]) -> int:
    """To the ranks of all hosts; returns how many were reached.

    One of them would do for a save, but any host may be the one that does not answer.
    """
    command = [sys.executable, "-m", "sft.signal_ranks", str(int(number)), str(job.exit_codes.absolute())]
    answers = on_hosts(list(job.hosts), command, REMOTE_S)
    for host, (code, text) in answers.items():
        if code != 0:
            name = signal.Signals(number).name
            _tell(say, f"error: {host}: could not pass {name} on: {' '.join(text.split())[:200] or code}")
    return sum(int(text.split()[-1]) for code, text in answers.values() if code == 0)


def _end(job: Job, launched: "subprocess.Popen[bytes]", ranks: set[psutil.Process], say: Callable[[str], None]) -> None:
    """Kill everything, here and on the other hosts; with the launcher first, which would start its own kind of end."""
    _kill_group(launched)
    send(signal.SIGKILL, ranks)
    if job.hosts:
        _signal_remotely(job, signal.SIGKILL, say)
    launched.wait()


def _kill_group(launched: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launched.pid, signal.SIGKILL)
