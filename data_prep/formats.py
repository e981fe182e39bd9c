"""Input files to rows, and rows to examples. A malformed file or row is an error that says where it is.

Row numbers start at 1: the position in the array of a .json file, the line of a .jsonl file.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.template import alpaca_prompt
from sft.errors import UserError

Format = Literal["alpaca", "text"]


class _Repeating(dict[str, Any]):
    """A JSON object in which `key` stands more than once, so that one of its values is lost."""

    key: str


@dataclass(frozen=True)
class Example:
    """One row as text: the model sees `prompt` and learns `response`. Plain text has an empty prompt."""

    prompt: str
    response: str


def read_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number, decoded JSON value) of a .json array or of a .jsonl file.

    Raises:
        UserError: the file is missing, unreadable, of another kind, not JSON, or holds no rows; or a row has a key
            twice.
    """
    rows = 0
    with _file_errors(path):
        for rows, value in _read_array(path) if Path(path).suffix == ".json" else _read_lines(path):
            if isinstance(value, _Repeating):
                raise UserError(f"source {path}: row {rows}: key {shorten(value.key)} stands twice; keep one of them")
            yield rows, value
    if rows == 0:
        raise UserError(f"source {path}: holds no rows; remove it from sources")


def file_digest(path: str) -> str:
    """sha256 of the bytes of an input file.

    Raises:
        UserError: the file is missing, unreadable or of another kind.
    """
    digest = hashlib.sha256()
    with _file_errors(path), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def parse_row(value: Any, format: Format, where: str) -> Example:
    """Check one row and turn it into an example; `where` names the file and row in errors.

    Raises:
        UserError: the row is no object, a field is missing or is not text.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: got {shorten(value)}, expected an object with the fields of format {format}")
    if format == "text":
        return Example(prompt="", response=_text_field(value, "text", format, where))
    instruction = _text_field(value, "instruction", format, where)
    # Stanford's own reader takes a missing input for an empty one.
    context = _text_field(value, "input", format, where) if "input" in value else ""
    return Example(prompt=alpaca_prompt(instruction, context), response=_text_field(value, "output", format, where))


def shorten(value: Any) -> str:
    """A value as JSON, cut to one short line for an error message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def _file_errors(path: str) -> Iterator[None]:
    try:
        if Path(path).is_dir():
            raise UserError(f"source {path}: is a folder; give the file")
        if Path(path).suffix not in (".json", ".jsonl"):
            raise UserError(f"source {path}: not a .json or .jsonl file; convert it, or rename it if it is one")
        yield
    except FileNotFoundError:
        raise UserError(f"source {path}: no such file; check sources[].path") from None
    except OSError as error:
        raise UserError(f"source {path}: cannot be read: {error.strerror}") from None


def _text_field(row: dict[str, Any], field: str, format: Format, where: str) -> str:
    if field not in row:
        found = ", ".join(sorted(row)) or "none"
        raise UserError(
            f"{where}: field '{field}' is missing, found {shorten(found)}; "
            f"add it, or set the source's format (now {format})"
        )
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' is {shorten(value)}, expected text; quote it, or use \"\" for none")
    return value


def _read_array(path: str) -> Iterator[tuple[int, Any]]:
    content = Path(path).read_bytes()
    if not content.strip():
        raise UserError(f"source {path}: is empty; remove it from sources")
    try:
        values = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        hint = "; if it has one object per line, name it .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"source {path}: not valid JSON: {_reason(error)}{hint}") from None
    if not isinstance(values, list):
        raise UserError(f"source {path}: holds {shorten(values)}, expected one array of objects")
    yield from enumerate(values, start=1)


def _read_lines(path: str) -> Iterator[tuple[int, Any]]:
    blank = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise UserError(f"source {path}: line {blank} is empty; remove it, one object per line")
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                shown = shorten(line.decode("utf-8", "replace").rstrip("\r\n"))
                raise UserError(f"source {path}: line {number} is not valid JSON: {_reason(error)}: {shown}") from None
            yield number, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    repeating = _Repeating(found)
    repeating.key = next(key for key in keys if keys.count(key) > 1)
    return repeating


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
