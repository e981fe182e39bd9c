"""A launcher under supervision: a signal reaches the ranks alone, and what comes back is how the ranks ended.

DeepSpeed's launchers lose both. On one node `deepspeed` dies of a signal and leaves the rest running; its child
launch.py kills the ranks 30 s after SIGTERM, in the middle of a long save, and then says 1; `deepspeed` says 0 where
launch.py was killed. So a signal is passed to the ranks, past both of them, and they wait for the ranks as ever.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from sft.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, EXIT_PREEMPTED, EXIT_RANK_LOST
from sft.signals import SIGNALS

TRAINER = "sft.train"
TWICE_ENDS = {signal.SIGTERM, signal.SIGINT}
BROADCAST = (signal.SIGUSR1, signal.SIGHUP)
"""What a scheduler may send to every process of a job, and the launchers would die of."""
BY_SSH = "--force_multi"
"""In the command of `deepspeed` where it starts the ranks of every host through ssh."""
APART_S = 2.0
"""One wish can arrive as two signals: Slurm may send SIGTERM to tasks and to the script, which passes it on to them."""
LOOK_S = 0.2
END_S = 20.0
"""For the launcher of several hosts to end their ranks over ssh."""
OTHER_HOSTS_WAIT_S = 10.0
"""srun ends all nodes as soon as one has failed; an ending that all share should come from each of them."""

EXIT_OF_EVENT = {
    "finish": 0,
    "stop": 0,
    "export": 0,
    "error": 1,
    "gate_failed": EXIT_GATE_FAILED,
    "guard_stop": EXIT_GUARD,
    "rank_lost": EXIT_RANK_LOST,
    "preempt": EXIT_PREEMPTED,
}
"""How the ranks ended, as they wrote it to events.jsonl."""
OF_THE_RANKS = {EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, EXIT_RANK_LOST, EXIT_PREEMPTED}
"""Exit codes that only a rank can have given to the launcher."""


def supervise(
    command: Sequence[str],
    options: Sequence[str],
    out: Path,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a launcher of `sft.train` to its end, and return the exit code of the ranks (table in sft.errors).

    On SIGTERM, SIGUSR1, SIGINT or SIGHUP to this process, the ranks on this host get it, and they agree with all others
    to save and leave with 75. A second SIGTERM or SIGINT, at least 2 s later, kills the run: 128 + its number.
    No process of the launcher's group outlives this call.

    Args:
        command: ends with `--module sft.train` and `options`.
        options: of sft.train, exactly as the ranks will show them: that is how they are recognized.
        out: the run's folder.
        say: shows one line to the user.
    """
    events = out / "events.jsonl"
    began = events.stat().st_size if events.is_file() else 0
    requests: list[tuple[int, float]] = []
    launched = _start(command, environment, requests)
    told: set[psutil.Process] | None = None

    def ranks_of_ours() -> list[psutil.Process]:
        """A second start of the same command, which the run's lock refuses, must not touch the first one's ranks."""
        found = find_ranks(options)
        if BY_SSH in command:  # where they are nobody's descendants
            return found
        return [rank for rank in found if _session(rank) == launched.pid]

    while launched.poll() is None or ranks_of_ours():
        if lost := launched.returncode is not None and not requests:
            _tell(say, "error: the launcher was killed and left its ranks")
            requests.append((signal.SIGTERM, time.monotonic()))
        if requests:
            ranks = ranks_of_ours()
            ready = {rank for rank in ranks if listens(rank)}
            if ranks and _insists(requests):
                _tell(say, "stopped at once, without saving")
                _end(launched, ranks)
                return 128 + requests[-1][0]
            if told is None and not ready and not events_since(events, began):
                _tell(say, "stopped: the ranks had not begun, and there is nothing to save")
                _end(launched, ranks)
                return 1 if lost else EXIT_PREEMPTED
            if told is None:
                _tell(say, _answer(requests[0][0], ranks))
            told = (told or set()) | _send(requests[0][0], ready - (told or set()))
        time.sleep(LOOK_S)
    _kill_group(launched)
    code = exit_code(launched.returncode, events_since(events, began), events_since(events, 0))
    if code == 1 and launched.returncode == 0:
        _tell(say, "error: the ranks ended before the last step; see their output above")
    if code in OF_THE_RANKS and int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        time.sleep(OTHER_HOSTS_WAIT_S)
    return code


def find_ranks(options: Sequence[str]) -> list[psutil.Process]:
    """This host's ranks that this user started in this folder with these options.

    By their command line, and not as descendants: those that ssh started are none, and those of a killed launcher are
    none any more.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
            if (
                is_rank(process.cmdline(), options)
                and process.uids().real == os.getuid()
                and process.cwd() == str(Path.cwd())
            ):
                found[process.pid] = process
    return [rank for rank in found.values() if _parent(rank) not in found]  # a fork shows the same command line


def is_rank(words: Sequence[str], options: Sequence[str]) -> bool:
    """Whether a command line is what launch.py starts for a rank."""
    split = len(words) - len(options)
    return (
        split >= 2
        and words[split - 2] == TRAINER
        and words[split - 1].startswith("--local_rank=")
        and list(words[split:]) == list(options)
    )


def listens(rank: psutil.Process) -> bool:
    """Whether a process has taken over all of SIGNALS, which would kill it before that."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
    return all(caught >> (number - 1) & 1 for number in SIGNALS)


def events_since(path: Path, offset: int) -> list[str]:
    """Kinds of the events that were written after `offset` bytes; a line that a crash cut short is passed over."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().splitlines()
    kinds = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kinds.append(str(json.loads(line)["event"]))
    return kinds


def exit_code(launcher: int, events: Sequence[str], all_events: Sequence[str]) -> int:
    """The ranks' exit code, from the launcher's where it can be a rank's, else from the events.

    Args:
        launcher: its exit code, negative for a signal, as subprocess has it.
        events: kinds of events since the launcher started.
        all_events: of the whole run; one that was finished before writes no more.
    """
    if launcher in OF_THE_RANKS:
        return launcher
    ending = next((EXIT_OF_EVENT[kind] for kind in reversed(events) if kind in EXIT_OF_EVENT), None)
    if launcher == 1:  # a crash; or launch.py got a signal itself
        return ending if ending in (EXIT_GATE_FAILED, EXIT_GUARD, EXIT_PREEMPTED) else 1
    if ending in OF_THE_RANKS:
        return ending
    if launcher == 0:
        return int(not all_events or EXIT_OF_EVENT.get(all_events[-1]) != 0)
    if launcher > 192:  # launch.py leaves with the negative signal number of its rank, modulo 256
        launcher -= 256
    return launcher if launcher > 0 else 128 - launcher


def _start(
    command: Sequence[str], environment: Mapping[str, str] | None, requests: list[tuple[int, float]]
) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that Ctrl-C reaches this process alone, and the whole group can be ended."""

    def receive(number: int, _frame: object) -> None:
        requests.append((number, time.monotonic()))

    for number in BROADCAST:  # children inherit what is ignored, until they take a signal over themselves
        signal.signal(number, signal.SIG_IGN)
    launched = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in SIGNALS:
        signal.signal(number, receive)
    return launched


def _insists(requests: Sequence[tuple[int, float]]) -> bool:
    times_s = [at_s for number, at_s in requests if number in TWICE_ENDS]
    return len(times_s) > 1 and times_s[-1] - times_s[0] >= APART_S


def _answer(number: int, ranks: Sequence[psutil.Process]) -> str:
    name = signal.Signals(number).name
    if not ranks:
        return f"{name}: no rank of this run on this host; send the signal to any one of its ranks"
    once_more = "; once more to stop at once without saving" if number in TWICE_ENDS else ""
    return f"{name}: saving, then stopping{once_more}"


def _tell(say: Callable[[str], None], line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and that may be why there is something to say
        say(line)


def _send(number: int, ranks: set[psutil.Process]) -> set[psutil.Process]:
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    return ranks


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _end(launched: "subprocess.Popen[bytes]", ranks: Sequence[psutil.Process]) -> None:
    """Kill everything, without leaving the ranks of other hosts behind where the launcher can reach them."""
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    launched.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        launched.wait(END_S)
    _kill_group(launched)
    launched.wait()


def _kill_group(launched: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launched.pid, signal.SIGKILL)
