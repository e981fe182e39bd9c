"""Columnar files to record batches of bounded size, and record batches to rows: .parquet, and the Arrow streams of
`datasets`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.json_rows import BadRow
from sft.errors import UserError

MAX_BATCH_ROWS = 4096
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_CONVERSION_ERRORS = (pa.ArrowException, ValueError, OverflowError, NotImplementedError)


def parquet_batches(path: Path, block_bytes: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The rows of a .parquet file in batches of at most 4096 rows and of about `block_bytes`,
    each with the bytes on disk that were used up for it (an estimate: its share of the rows).

    Raises:
        UserError: the file is damaged, or two columns have one name.
    """
    with _damage(path, "parquet"), pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        _check_names(path, file.schema_arrow)
        metadata = file.metadata
        total_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        mean_row_bytes = max(1, total_bytes // max(1, metadata.num_rows))
        disk_bytes = path.stat().st_size
        for batch in file.iter_batches(min(MAX_BATCH_ROWS, max(1, block_bytes // mean_row_bytes))):
            for part in _split(batch, block_bytes):
                yield part, disk_bytes * part.num_rows // metadata.num_rows


def arrow_batches(path: Path, block_bytes: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The rows of an Arrow stream file, in batches like those of `parquet_batches`.

    Raises:
        UserError: the file is damaged or not complete, or two columns have one name.
    """
    with _damage(path, "Arrow"), pa.OSFile(str(path)) as file:
        file.seek(max(0, file.size() - len(_STREAM_END)))
        if file.read() != _STREAM_END:
            raise UserError(f"source {path}: not a whole Arrow stream: it has no end mark; copy or save it again")
        file.seek(0)
        with pa.ipc.open_stream(file) as stream:
            _check_names(path, stream.schema)
            start = 0
            for batch in stream:
                batch.validate(full=True)
                used, start = file.tell() - start, file.tell()
                for part in _split(batch, block_bytes):
                    yield part, used * part.num_rows // batch.num_rows


def row_values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """Each row as a dict of Python values; a row that has none, as a date beyond year 9999, is a BadRow."""
    try:
        yield from batch.to_pylist()
    except _CONVERSION_ERRORS:
        # to_pylist gives nothing or all, so no row has left yet.
        yield from (_row_value(batch.slice(index, 1)) for index in range(batch.num_rows))


def _row_value(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        found: dict[str, Any] = row.to_pylist()[0]
    except _CONVERSION_ERRORS as error:
        return BadRow(f"has a value that Python cannot hold: {' '.join(str(error).split())[:120]}; correct it")
    return found


def _split(batch: pa.RecordBatch, block_bytes: int) -> Iterator[pa.RecordBatch]:
    if batch.num_rows <= MAX_BATCH_ROWS and batch.nbytes <= block_bytes:
        rows = batch.num_rows
    else:
        rows = min(MAX_BATCH_ROWS, max(1, batch.num_rows * block_bytes // batch.nbytes))
    if rows >= batch.num_rows:
        if rows:
            yield batch
        return
    for start in range(0, batch.num_rows, rows):
        yield _copy(batch.slice(start, rows))


def _copy(part: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows without the rest of their batch, which a slice would carry along to another process."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.schema) as writer:
        writer.write_batch(part)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def _check_names(path: Path, schema: pa.Schema) -> None:
    repeated = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f'source {path}: column "{repeated}" stands twice; keep one of them')


@contextmanager
def _damage(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"source {path}: not a whole {kind} file: {reason}; copy or save it again") from None
