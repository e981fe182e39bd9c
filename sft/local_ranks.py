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
"""Between asking the other ranks to end, after one has failed, and killing them."""


def run_ranks(module: str, options: Sequence[str], ranks: int) -> int:
    """Run `python -m module options` as `ranks` processes of one group; returns 0 or the first failure's exit code.

    A signal to this process ends them all; its number + 128 is then the code.
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
        )
        for rank in range(ranks)
    ]
    with _noting_signals() as received:
        while not received and any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(POLL_S)
    if received:
        for process in processes:
            process.send_signal(received[0])
    _end(processes)
    codes = [process.returncode for process in processes if process.returncode]
    if received:
        return 128 + received[0]
    return (codes[0] if codes[0] > 0 else 128 - codes[0]) if codes else 0


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
