"""Blocks to worker processes of this host, and their results back in order."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from data_prep.blocks import Block, Encoder
from data_prep.readers import RawBlock
from sft.errors import UserError


class WorkerLost(UserError):
    """A worker process was killed or could not be started; what was finished before can be used again."""


def encode_blocks(raw_blocks: Iterable[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    """Encode each block, `workers` at a time, and yield the results in order.

    Raises:
        UserError: from `Encoder.encode`.
        WorkerLost: a worker process was killed.
        RuntimeError: a worker process failed; a defect of this program.
    """
    if workers == 1:
        yield from map(encoder.encode, raw_blocks)
        return
    with _serial_tokenizers(), _started_workers(encoder, workers) as processes:
        yield from _in_turn(enumerate(raw_blocks), processes)


def _in_turn(raw_blocks: Iterator[tuple[int, RawBlock]], processes: dict[Connection, BaseProcess]) -> Iterator[Block]:
    idle = list(processes)
    busy: dict[Connection, int] = {}
    finished: dict[int, Block | UserError] = {}
    turn = 0
    while True:
        while idle and len(busy) + len(finished) < 4 * len(processes) and (raw := next(raw_blocks, None)):
            busy[idle[-1]], block = raw
            with _death_told(processes, idle[-1]):
                idle.pop().send(block)
        if not busy:
            return
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            with _death_told(processes, connection):
                finished[busy.pop(connection)] = connection.recv()
            idle.append(connection)
        while turn in finished:
            outcome = finished.pop(turn)
            if isinstance(outcome, UserError):
                raise outcome
            yield outcome
            turn += 1


@contextmanager
def _started_workers(encoder: Encoder, workers: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by the connection to each.

    Not a ProcessPoolExecutor: its workers outlive a killed parent, and it waits for ever for the rest of a result
    where a worker is killed while it sends one. Here both sides see the end of their own connection.
    """
    # fork: the loaded tokenizer is shared with the workers instead of being loaded again by each.
    context = multiprocessing.get_context("fork")
    processes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(workers):
            try:
                ours, theirs = context.Pipe()
                processes[ours] = context.Process(target=_work, args=(encoder, theirs, [*processes, ours]), daemon=True)
                processes[ours].start()
            except OSError as error:
                started = sum(process.pid is not None for process in processes.values())
                raise WorkerLost(
                    f"workers {workers}: only {started} could be started: {error.strerror}; lower workers, or raise "
                    "the limits of this shell (ulimit)"
                ) from None
            theirs.close()
        yield processes
    finally:
        for connection, process in processes.items():
            if process.pid is not None:
                process.kill()
                process.join()
            connection.close()


def _work(encoder: Encoder, connection: Connection, parents_ends: list[Connection]) -> None:
    for end in parents_ends:  # inherited by fork; while a worker holds them open, no connection ends with the parent
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or a scheduler tells the whole group; the parent decides
    gc.disable()  # encoding makes no cycles, and a collection looks at every row of the block
    with suppress(EOFError, ConnectionError):
        while True:
            block = connection.recv()
            try:
                outcome: Block | UserError = encoder.encode(block)
            except UserError as error:
                outcome = error
            connection.send(outcome)


@contextmanager
def _death_told(processes: dict[Connection, BaseProcess], connection: Connection) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        process = processes[connection]
        process.join()
        if process.exitcode is not None and process.exitcode >= 0:
            raise RuntimeError("a worker process failed; its traceback is above") from None
        raise WorkerLost(
            f"a worker process was killed, perhaps out of memory; lower workers (now {len(processes)}) and run again: "
            "finished blocks are kept"
        ) from None


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """One thread per worker: `tokenizers` must not start its own in a forked process."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
