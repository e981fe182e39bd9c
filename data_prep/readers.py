"""Input files to rows: blocks of about 1 MiB of a file, and the rows of a block.

`read_blocks` runs in one process and decodes no more than it must to cut a file; `block_rows` runs where the rows are
used. Where blocks begin depends on the file's content alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_prep.columns import arrow_batches, parquet_batches, row_values
from data_prep.json_array import element_blocks
from data_prep.json_rows import SPACE, ArrayError, BadRow, decode_elements, decode_lines
from data_prep.source_files import TextFile, file_digest, file_errors, kind_of, source_files
from sft.errors import UserError

__all__ = ["BadRow", "RawBlock", "block_rows", "file_digest", "read_blocks", "source_files"]

BLOCK_BYTES = 2**20
"""Decoded text, or columns in memory, of one block."""
MAX_ROW_BYTES = 2**26


@dataclass(frozen=True)
class RawBlock:
    """Consecutive rows of a file, not yet decoded."""

    source_id: int
    file: str
    """As named in messages."""
    first_row: int
    """Number of its first row in the file, from 1: the line in .jsonl, the position elsewhere."""
    payload: bytes | list[BadRow] | pa.RecordBatch
    """JSON text; or rows that were too long to keep; or columns."""
    input_bytes: int
    """Bytes on disk that were read for it, about: for progress."""
    layout: Literal["lines", "elements"] = "lines"
    """Of JSON text: one value per line, or what stands between the brackets of an array."""


def read_blocks(source_id: int, path: Path) -> Iterator[RawBlock]:
    """Cut a file into blocks, in order, never holding much more of it than its longest row.

    Raises:
        UserError: the file is missing, unreadable, of no known kind, damaged, or holds no rows; an array is not valid
            JSON or has an element above MAX_ROW_BYTES.
    """
    kind = kind_of(path)
    cut = _text_blocks if kind in ("array", "lines") else _column_blocks
    is_empty = True
    with file_errors(path):
        for block in cut(source_id, path):
            is_empty = False
            yield block
    if is_empty:
        raise UserError(f"source {path}: holds no rows; remove it from sources")


def block_rows(block: RawBlock) -> Iterator[tuple[int, Any | BadRow]]:
    """(row number in the file, decoded value or what is wrong with it) of each row of a block.

    Raises:
        UserError: a row of an array is nested too deeply for this process, though not for the one that cut the file.
    """
    values: Iterator[Any | BadRow]
    if isinstance(block.payload, list):
        values = iter(block.payload)
    elif isinstance(block.payload, pa.RecordBatch):
        values = row_values(block.payload)
    elif block.layout == "elements":
        values = decode_elements(block.payload)
    else:
        values = decode_lines(block.payload)
    try:
        yield from enumerate(values, block.first_row)
    except ArrayError as error:
        raise UserError(f"source {block.file}: rows from {block.first_row} on: not valid JSON: {error}") from None


def _text_blocks(source_id: int, path: Path) -> Iterator[RawBlock]:
    with TextFile(path) as file:
        if kind_of(path) == "array":
            for block in element_blocks(file.read, f"source {path}", BLOCK_BYTES, MAX_ROW_BYTES):
                yield RawBlock(source_id, str(path), block.first, block.text, file.newly_used_bytes(), "elements")
        else:
            for first, payload in line_blocks(file.read, f"source {path}", BLOCK_BYTES, MAX_ROW_BYTES):
                yield RawBlock(source_id, str(path), first, payload, file.newly_used_bytes())


def line_blocks(
    read: Callable[[int], bytes], where: str, block_bytes: int, max_row_bytes: int
) -> Iterator[tuple[int, bytes | list[BadRow]]]:
    """(number of the first line, whole lines) of JSON lines; blank lines at the end are left out.

    A line above `max_row_bytes` is skipped, never held as a whole, and leaves as a BadRow.

    Raises:
        UserError: the file is empty, or has more than `max_row_bytes` of blank lines in a row.
    """
    first = 1
    held = b""
    while chunk := read(block_bytes):
        held += chunk
        if _first_line_bytes(held, max_row_bytes) > max_row_bytes:
            yield first, [BadRow(f"longer than {max_row_bytes / 2**20:g} MiB; split it, or remove it")]
            held = _behind_line(held, read, block_bytes)
            first += 1
        cut = _end_of_lines(held)
        if cut:
            yield first, held[:cut]
            first += held.count(b"\n", 0, cut)
            held = held[cut:]
        elif len(held) > max_row_bytes and not held.strip(SPACE):
            raise UserError(f"{where}: nothing but blank lines from line {first} on; remove them")
    rest = held.rstrip(SPACE)
    if rest:
        yield first, rest
    elif first == 1 and not held:
        raise UserError(f"{where}: is empty; remove it from sources")


def _first_line_bytes(held: bytes, max_row_bytes: int) -> int:
    if len(held) <= max_row_bytes:
        return 0
    end = held.find(b"\n")
    return end if end >= 0 else len(held)


def _behind_line(held: bytes, read: Callable[[int], bytes], block_bytes: int) -> bytes:
    """What was read behind the first line, reading on to its end."""
    while b"\n" not in held and (chunk := read(block_bytes)):
        held = chunk
    return held.partition(b"\n")[2]


def _end_of_lines(held: bytes) -> int:
    """Bytes up to the end of the last whole line that is not blank; blank ones count where text follows them."""
    end = held.rfind(b"\n") + 1
    text_end = len(held.rstrip(SPACE))
    return end if text_end >= end else held.find(b"\n", text_end) + 1 if text_end else 0


def _column_blocks(source_id: int, path: Path) -> Iterator[RawBlock]:
    first = 1
    for batch, input_bytes in (parquet_batches if kind_of(path) == "parquet" else arrow_batches)(path, BLOCK_BYTES):
        yield RawBlock(source_id, str(path), first, batch, input_bytes)
        first += batch.num_rows
