"""The ranks of a run on this host: found by their command line, and how they ended, as they wrote it themselves.

No launcher hands a rank's exit code on: DeepSpeed's says that of the first rank it sees failing, or 0 where it was
killed itself; torchrun says 1. So each rank writes its own (`sft.errors.leave`).
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from sft.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, EXIT_PREEMPTED, EXIT_RANK_LOST
from sft.signals import SIGNALS

TRAINER = "sft.train"
DOCTOR = "sft.doctor"
MODULES = (TRAINER, DOCTOR)
"""What launchers start as ranks."""

MOST_TELLING = (EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, 1, EXIT_RANK_LOST, EXIT_PREEMPTED)
"""Where ranks ended differently: the cause before its consequences."""


def find_ranks(module: str, options: Sequence[str]) -> list[psutil.Process]:
    """This host's ranks of `module` that this user started in this folder with these options.

    By their command line, and not as descendants: those that ssh started are none, and those of a killed launcher are
    none any more.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
            if (
                is_rank(process.cmdline(), module, options)
                and process.uids().real == os.getuid()
                and process.cwd() == str(Path.cwd())
            ):
                found[process.pid] = process
    return [rank for rank in found.values() if _parent(rank) not in found]  # a fork shows the same command line


def is_rank(words: Sequence[str], module: str, options: Sequence[str]) -> bool:
    """Whether a command line is what launch.py or torchrun starts for a rank: `python -u -m MODULE ... OPTIONS`."""
    split = len(words) - len(options)
    if split < 3 or list(words[split:]) != list(options):
        return False
    own = [word for word in words[1:split] if word != "-u" and not word.startswith("--local_rank=")]
    return own == ["-m", module]


def listens(rank: psutil.Process) -> bool:
    """Whether a process has taken over all of SIGNALS, which would kill it before that."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
    return all(caught >> (number - 1) & 1 for number in SIGNALS)


def send(number: int, ranks: set[psutil.Process]) -> set[psutil.Process]:
    """Send a signal to ranks, some of which may be gone; returns them."""
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    return ranks


def read_exit_codes(folder: Path) -> dict[int, int]:
    """Exit codes by rank, of those that have left by themselves so far; a killed one has written none."""
    codes = {}
    for path in folder.glob("[0-9]*"):
        with contextlib.suppress(ValueError, OSError):  # being written
            codes[int(path.name)] = int(path.read_text(encoding="ascii"))
    return codes


def exit_code(launcher: int, codes: Mapping[int, int]) -> int:
    """How a run ended (table in sft.errors): by its ranks' own codes, or by the launcher's where they left none.

    Args:
        launcher: its exit code, negative for a signal, as subprocess has it.
        codes: of the ranks, by rank.
    """
    if told := next((code for code in MOST_TELLING if code in codes.values()), None):
        return told
    if launcher == 0:
        return 0 if codes else 1
    if launcher > 192:  # launch.py leaves with the negative signal number of its rank, modulo 256
        launcher -= 256
    return launcher if launcher > 0 else 128 - launcher


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None
