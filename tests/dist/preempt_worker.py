"""Started by test_preemption.py: whole training runs on forked ranks, in which rank 1 sends itself a signal.

Arguments: FOLDER, ROUND, then the options of a run but its --out. The cases run at the same time, two ranks each, and
write to <folder>/<case>/<round>/ what they say (rank-0.err) and how they end (ends.jsonl). In the round `first` rank 1
signals itself, in the round `again` the same runs go on. Imports are paid for once.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sft.step
import sft.training
from sft import batch, checkpoint
from sft.errors import run_rank
from sft.ports import free_port
from sft.train import main as train
from tests.dist.watchdog_worker import append, become_rank

RANKS = 2
IN_FORWARD = 6
"""Forwards of rank 1 before the signal: the second forward of the second step, with 4 per step."""


def main(argv: list[str]) -> None:
    """Fork the ranks of every case and wait for them."""
    folder, turn, options = Path(argv[0]), argv[1], argv[2:]
    ranks = {}
    for case in CASES:
        said = folder / case / turn
        said.mkdir(parents=True)
        port = free_port()
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, RANKS, port, said)
                if turn == "first" and rank == 1:
                    prepare(case)
                run_rank(lambda _, case=case: train([*options, "--out", str(folder / case / "run")]))
            ranks[pid] = (case, rank)
    while ranks:
        pid, status = os.wait()
        case, rank = ranks.pop(pid)
        append(folder / case / turn / "ends.jsonl", rank=rank, code=os.waitstatus_to_exitcode(status))


def prepare(case: str) -> None:
    """Make this rank signal itself where the case says."""
    number, patch = CASES[case]
    patch(lambda: os.kill(os.getpid(), number))


def once(owner: Any, name: str, act: Callable[[], None], call: int = 1) -> None:
    """Let `act` happen before the given call of a function."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def patched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def in_start_up(act: Callable[[], None]) -> None:
    once(sft.training, "build_engine", act)


def in_step(act: Callable[[], None]) -> None:
    once(batch, "from_shards", act, IN_FORWARD)


def in_update(act: Callable[[], None]) -> None:
    once(sft.step, "reduce_step", act, 2)


def in_heldout(act: Callable[[], None]) -> None:
    once(sft.training, "heldout_loss", act)


def in_save(act: Callable[[], None]) -> None:
    once(checkpoint, "write_pieces", act)  # in the thread that writes


def nowhere(act: Callable[[], None]) -> None:
    del act


CASES: dict[str, tuple[signal.Signals, Callable[[Callable[[], None]], None]]] = {
    "start_up": (signal.SIGTERM, in_start_up),
    "step": (signal.SIGUSR1, in_step),
    "update": (signal.SIGTERM, in_update),
    "heldout": (signal.SIGUSR1, in_heldout),
    "save": (signal.SIGTERM, in_save),
    "killed": (signal.SIGKILL, in_step),
    "none": (signal.SIGTERM, nowhere),
}

if __name__ == "__main__":
    main(sys.argv[1:])
