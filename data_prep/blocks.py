"""Rows to encoded documents, in blocks of fixed size over worker processes; results come back in order.

Blocks do not depend on the number of workers, so neither does anything that is made of them.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep import filters
from data_prep.encode import Document, encode_examples, span_is_proved, text_forbidden_ids, truncate
from data_prep.formats import Example, Format, parse_row, read_rows
from data_prep.mixture import keys_to_array, text_key
from sft.errors import UserError
from sft.tokenizer import Tokenizer

BLOCK_ROWS = 256


@dataclass(frozen=True)
class RawBlock:
    source_id: int
    path: str
    format: Format
    rows: list[tuple[int, Any]]
    """(row number from 1, decoded JSON)."""


@dataclass(frozen=True, eq=False)
class Block:
    """The documents of one raw block, and the fate of the rows that gave none."""

    source_id: int
    num_rows: int
    row_numbers: NDArray[np.int64]
    keys: NDArray[np.uint64]
    """[documents, 2]: equal where prompt and response are equal."""
    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    num_prefix: NDArray[np.int32]
    dropped: list[tuple[int, str]]
    """(row number, reason)."""
    truncated: list[int]


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to turn rows into documents."""

    tokenizer: Tokenizer
    seq_len: int
    overlong: Literal["drop", "truncate", "error"]

    def encode(self, block: RawBlock) -> Block:
        """Parse, filter, encode and prove the rows of one block.

        Raises:
            UserError: a row is malformed, or too long where overlong is `error`.
        """
        examples: list[tuple[int, Example]] = []
        dropped: list[tuple[int, str]] = []
        for number, value in block.rows:
            example = parse_row(value, block.format, f"source {block.path}: row {number}")
            reason = filters.text_reason(example)
            dropped += [(number, reason)] if reason else []
            examples += [] if reason else [(number, example)]
        kept: list[tuple[int, Example, Document]] = []
        forbidden = text_forbidden_ids(self.tokenizer)
        documents = encode_examples(self.tokenizer, [example for _, example in examples])
        for (number, example), document in zip(examples, documents, strict=True):
            outcome = self._judge(example, document, forbidden, f"source {block.path}: row {number}")
            if isinstance(outcome, str):
                dropped.append((number, outcome))
            else:
                kept.append((number, example, outcome))
        return Block(
            source_id=block.source_id,
            num_rows=len(block.rows),
            row_numbers=np.array([number for number, _, _ in kept], dtype=np.int64),
            keys=keys_to_array([text_key(example) for _, example, _ in kept]),
            ids=np.fromiter(chain.from_iterable(document.ids for _, _, document in kept), dtype=np.int32),
            lengths=np.array([len(document.ids) for _, _, document in kept], dtype=np.int32),
            num_prefix=np.array([document.num_prefix for _, _, document in kept], dtype=np.int32),
            dropped=sorted(dropped),
            truncated=[number for number, _, document in kept if document.truncated],
        )

    def _judge(self, example: Example, document: Document, forbidden: frozenset[int], where: str) -> Document | str:
        text_ids = document.ids[len(self.tokenizer.bos) : -1]
        if reason := filters.special_token_reason(text_ids, forbidden):
            return reason
        if not span_is_proved(self.tokenizer, example, document):
            return filters.SPAN_UNPROVED
        if len(document.ids) <= self.seq_len:
            return document
        if self.overlong == "error":
            raise UserError(
                f"{where}: {len(document.ids)} tokens, seq_len is {self.seq_len}; "
                "raise seq_len, or set overlong to drop or truncate"
            )
        if self.overlong == "drop":
            return filters.OVERLONG
        return truncate(self.tokenizer, example, document, self.seq_len) or filters.OVERLONG_PROMPT


def read_blocks(source_id: int, path: str, format: Format) -> Iterator[RawBlock]:
    """Cut the rows of one file into blocks.

    Raises:
        UserError: see `data_prep.formats.read_rows`.
    """
    rows = read_rows(path)
    while block := list(islice(rows, BLOCK_ROWS)):
        yield RawBlock(source_id, path, format, block)


def encode_blocks(raw_blocks: Iterable[RawBlock], encoder: Encoder, workers: int) -> Iterator[Block]:
    """Encode each block, `workers` at a time, and yield the results in order.

    Raises:
        UserError: from `Encoder.encode`, or a worker process was killed.
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
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(encoder, theirs, [*processes, ours]), daemon=True)
            processes[ours].start()
            theirs.close()
        yield processes
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _work(encoder: Encoder, connection: Connection, parents_ends: list[Connection]) -> None:
    for end in parents_ends:  # inherited by fork; while a worker holds them open, no connection ends with the parent
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or a scheduler tells the whole group; the parent decides
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
        raise UserError(
            f"a worker process was killed, perhaps out of memory; lower workers (now {len(processes)})"
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
