"""The ranks of a launch on this host: which processes they are, and how they ended, as they wrote it themselves.

No launcher hands a rank's exit code on: DeepSpeed's says that of the first rank it sees failing, or 0 where it was
killed itself; torchrun says 1. So each rank writes its own (`sft.errors.leave`).
"""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from sft.errors import (
    EXIT_BAD_INPUT,
    EXIT_CODES_FOLDER,
    EXIT_GATE_FAILED,
    EXIT_GUARD,
    EXIT_PREEMPTED,
    EXIT_RANK_LOST,
)
from sft.run_folder import VISIBLE_AFTER_S
from sft.signals import SIGNALS

TRAINER = "sft.train"
DOCTOR = "sft.doctor"
MODULES = (TRAINER, DOCTOR)
"""What launchers start as ranks."""

MOST_TELLING = (EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_GUARD, 1, EXIT_RANK_LOST, EXIT_PREEMPTED)
"""Where ranks ended differently: the cause before its consequences."""


def find_ranks(exit_codes: Path) -> dict[psutil.Process, int]:
    """This host's ranks of one launch, and their numbers.

    By the folder that the launch gave them for their exit codes, and not as descendants: those that ssh started are
    none, and those of a killed launcher are none any more. A second start of the same command, which the run's lock
    refuses, does not find the first one's.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
            if process.uids().real != os.getuid():
                continue
            environment = process.environ()
            if environment.get(EXIT_CODES_FOLDER) == str(exit_codes.absolute()) and "RANK" in environment:
                found[process] = int(environment["RANK"])
    pids = {process.pid for process in found}
    return {process: rank for process, rank in found.items() if _parent(process) not in pids}  # its own children


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


def await_exit_codes(folder: Path, num_ranks: int) -> dict[int, int]:
    """Those of all ranks, or one that is no 0; other hosts' may take a while to show on a network file system."""
    deadline_s = time.monotonic() + VISIBLE_AFTER_S
    while len(codes := read_exit_codes(folder)) < num_ranks and not any(codes.values()):
        if time.monotonic() > deadline_s:
            break
        (folder / "look").touch()  # a change of one's own makes such a system read the folder again
        (folder / "look").unlink()
        time.sleep(0.5)
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
    if launcher == 255:  # ssh's own failure
        return 1
    if launcher > 192:  # launch.py leaves with the negative signal number of its rank, modulo 256
        launcher -= 256
    return launcher if launcher > 0 else 128 - launcher


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None
