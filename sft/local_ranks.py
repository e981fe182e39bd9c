"""Ranks of one command on this host: started together, ended together, one exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from sft.ports import free_port

POLL_S = 0.1
GRACE_S = 10.0
"""After one rank has crashed: for the others to say why, or to end; then they are killed."""


def run_ranks(module: str, options: Sequence[str], ranks: int) -> int:
    """Run `python -m module options` as `ranks` processes of one group; returns 0, or the exit code of what went wrong.

    A rank that says what is wrong (a code above 1) is believed, and the others end at once: they would say the same, or
    wait for it. A crash may be that another rank has left; it is the code where no rank says more. A signal to this
    process ends them all; its number + 128 is then the code.
    """
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = free_port()
    if not torch.cuda.is_available():
        place["DS_ACCELERATOR"] = "cpu"
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *options],
            env={"OMP_NUM_THREADS": threads, **os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # the terminal's Ctrl-C is for this process, which ends them without a word
        )
        for rank in range(ranks)
    ]
    with _noting_signals() as received:
        while not received and None in [process.poll() for process in processes]:  # a list: every rank is looked at
            if any(process.returncode for process in processes):
                break
            time.sleep(POLL_S)
    failed = [process.returncode for process in processes if process.returncode]
    if received or max(failed, default=0) > 1:
        for process in processes:
            process.send_signal(signal.SIGTERM)
    _end(processes)
    if received:
        return 128 + received[0]
    told = [process.returncode for process in processes if process.returncode and process.returncode > 1]
    code = next(iter([*told, *failed]), 0)
    return code if code >= 0 else 128 - code


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all of them, then kill those that do not end: they may hang in a collective whose others are gone."""
    deadline_s = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Numbers of the signals that asked this process to end meanwhile."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
