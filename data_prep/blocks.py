"""Rows to encoded documents, in blocks of fixed size over worker processes; results come back in order.

Blocks do not depend on the number of workers, so neither does anything that is made of them.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
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
    """
    if workers == 1:
        yield from map(encoder.encode, raw_blocks)
        return
    pending: deque[Future[Block]] = deque()
    # fork: the loaded tokenizer is shared with the workers instead of being loaded again by each.
    context = multiprocessing.get_context("fork")
    with (
        _serial_tokenizers(),
        ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool,
    ):
        try:
            for raw in raw_blocks:
                pending.append(pool.submit(_encode_in_worker, raw))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps out of memory; lower workers (now {workers})"
            ) from None
        finally:
            for future in pending:
                future.cancel()


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


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder  # noqa: PLW0603 (the only way to hand a forked worker what cannot be pickled)
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this a killed parent leaves workers behind that wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: RawBlock) -> Block:
    return _worker_encoder.encode(block)
