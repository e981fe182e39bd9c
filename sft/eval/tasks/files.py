"""Rows of .jsonl, .parquet and .csv files as dictionaries, with errors that name file and row."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from sft.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".csv")
CSV_COLUMNS = ("question", "A", "B", "C", "D", "answer")
CSV_FIELD_LIMIT = 10_000_000
"""Characters; csv's own default of 131,072 would refuse long passages."""


def read_rows(file: Path, head: int | None = None) -> list[dict[str, Any]]:
    """All rows of a file, or the first `head` ones. A CSV row becomes question, choices, answer.

    Raises:
        UserError: the file is unreadable or a row is malformed.
    """
    with _naming(file):
        if file.suffix == ".parquet":
            return _read_parquet(file, head)
        if file.suffix == ".jsonl":
            return [row for _, row in islice(iterate_jsonl(file), head)]
        return _read_csv(file, head)


def peek_fields(file: Path) -> set[str] | None:
    """Names of the first row's fields, none for a CSV of some other shape; None for a file without rows.

    Raises:
        UserError: the file is torn; passing over it would silently shorten the benchmark.
    """
    if file.suffix == ".csv":
        with _naming(file):
            first = next((cells for _, cells in _csv_lines(file, errors="replace", strict=False) if cells), None)
        if first is None:
            return None
        return {"question", "choices", "answer"} if len(first) == len(CSV_COLUMNS) else set()
    rows = read_rows(file, head=1)
    return set(rows[0]) if rows else None


def iterate_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; one object in memory at a time.

    Raises:
        UserError: the file cannot be read, or a line is torn or no JSON object.
    """
    with _naming(file), file.open("rb") as stream:  # bytes end lines at \n only; str.splitlines also cuts at U+2028
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, parse_object(line, f"{file} line {number}")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a whole file is.

    Raises:
        UserError: the file cannot be read, is torn, or holds something else.
    """
    with _naming(file):
        return parse_object(file.read_bytes(), str(file))


def parse_object(text: bytes, place: str) -> dict[str, Any]:
    """A JSON object; `place` says in messages where it stands.

    Raises:
        UserError: it is torn, no object, nested beyond reason, or gives a key twice.
    """
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deeply; correct it") from None
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: got {type(row).__name__}, need a JSON object")
    return row


def _no_constant(name: str) -> NoReturn:
    """JSON has no NaN and no infinity; Python's reader would take them."""
    raise ValueError(f"{name} is no number")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _read_parquet(file: Path, head: int | None) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        batch = next(table.iter_batches(batch_size=head), None) if head else table.read()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a whole parquet file: {' '.join(str(error).split())}") from None
    rows: list[dict[str, Any]] = batch.to_pylist() if batch is not None else []
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads alone would let the last of two equal keys win."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!a} is given twice")
    return row


def _read_csv(file: Path, head: int | None) -> list[dict[str, Any]]:
    """Six columns, with or without a header. csv and not pandas: pandas reads the choice "None" as a missing value."""
    rows: list[dict[str, Any]] = []
    for line, cells in _csv_lines(file, errors="strict", strict=True):
        if head is not None and len(rows) == head:
            break
        is_header = line == 1 and cells and cells[0].lower() == "question" and cells[-1].lower() == "answer"
        if not cells or is_header:
            continue
        if len(cells) != len(CSV_COLUMNS):
            raise UserError(
                f"{file} row {len(rows)} (ends at line {line}): {len(cells)} columns, "
                f"need {len(CSV_COLUMNS)}: {', '.join(CSV_COLUMNS)}"
            )
        rows.append({"question": cells[0], "choices": cells[1:5], "answer": cells[5]})
    return rows


def _csv_lines(file: Path, *, errors: str, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of every record."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with file.open(newline="", encoding="utf-8-sig", errors=errors) as stream:
        reader = csv.reader(stream, strict=strict)
        try:
            for cells in reader:
                yield reader.line_num, cells
        except csv.Error as error:
            raise UserError(f"{file} line {reader.line_num}: not valid CSV: {error}") from None
