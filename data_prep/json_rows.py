"""JSON text to rows, exactly: what RFC 8259 allows, every key once, and a `BadRow` for each row that is not so.

orjson decodes; it keeps the last of equal keys without a word. So the keys it returned are compared with those that the
text has, by counting `":`, which is cheap; only where the counts differ, as when a text holds `":` itself, does the
slower `json` look at each object's keys.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import orjson

SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_SPACED_COLON = re.compile(rb'"[ \t\r\n]+:')
_EXTENT = json.JSONDecoder(parse_int=float)
"""Finds where elements end. Numbers become floats because Python refuses very long whole ones."""
_EXCERPT = 80
"""Characters of a bad row that its message shows."""


class BadRow(NamedTuple):
    """A row that cannot be read."""

    problem: str
    """What is wrong and what to do, on one line, without file and row."""


class ArrayError(Exception):
    """The text of an array is not JSON at `offset`, in characters."""

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(problem)
        self.offset = offset


def decode_lines(text: bytes) -> Iterator[Any | BadRow]:
    """The value of each line of JSON lines, in order."""
    somewhere_spaced = _SPACED_COLON.search(text) is not None
    lines = text.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield _decode_exactly(line)
            continue
        # A dict of n keys came from at least n `":`; from exactly n where no key repeats and none is nested.
        if type(value) is dict and line.count(b'":') == len(value):
            yield _checked(line, value) if somewhere_spaced and _SPACED_COLON.search(line) else value
        else:
            yield _checked(line, value)


def decode_elements(text: bytes) -> Iterator[Any | BadRow]:
    """The value of each element of an array, in order; `text` is what stands between its brackets.

    Raises:
        ArrayError: the text is no list of values.
    """
    try:
        values = orjson.loads(b"[%b]" % text)
    except orjson.JSONDecodeError:
        values = None
    if values is not None and _has_every_key_once(text, values):
        yield from values
        return
    decoded = text.decode("utf-8", "surrogateescape")
    for start, end in elements(decoded, at_end=True):
        element = decoded[start:end].encode("utf-8", "surrogateescape")
        try:
            value = orjson.loads(element)
        except orjson.JSONDecodeError:
            yield _decode_exactly(element)
        else:
            yield _checked(element, value)


def elements(text: str, at_end: bool) -> Iterator[tuple[int, int]]:
    """(start, end) of each element of an array, of which `text` begins with one, until the closing bracket.

    Where more may follow behind `text` (not `at_end`), stops before an element that may continue there.

    Raises:
        ArrayError: what follows is no element, or neither a comma nor a closing bracket stands behind it.
    """
    after = -1
    while after < 0 or text.startswith(",", after):
        start = _skip_spaces(text, after + 1)
        try:
            _, end = _EXTENT.raw_decode(text, start)
            after = _skip_spaces(text, end)
            if after < len(text) and text[after] not in ",]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except json.JSONDecodeError as error:
            if not at_end and _may_continue(error, len(text)):
                return
            raise ArrayError(_reason(error), error.pos) from None
        except RecursionError:
            raise ArrayError("nested too deeply", start) from None
        if after == len(text) and not at_end:
            return
        yield start, end


def excerpt(text: str, offset: int = 0) -> str:
    """A printable line of `text` around `offset`."""
    start = max(0, min(offset - _EXCERPT // 2, len(text) - _EXCERPT))
    cut = text[start : start + _EXCERPT]
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)
    return f"{'…' if start else ''}{shown}{'…' if start + _EXCERPT < len(text) else ''}"


def _may_continue(error: json.JSONDecodeError, size: int) -> bool:
    """Whether more text behind `size` characters could turn the error into a value: a string that was cut anywhere, or
    a literal, a number or an escape that was cut near the end."""
    return error.msg.startswith("Unterminated string") or error.pos >= size - 16


def _skip_spaces(text: str, start: int) -> int:
    match = _SPACES.match(text, start)
    return match.end() if match else start


def _has_every_key_once(text: bytes, value: Any) -> bool:
    """Whether no object in `value` lost a key of the `text` that it came from. May say no where none was lost.

    With no space before a colon, every key of the text ends in a `":` of its own. An escaped quote before a colon ends
    no key; but behind two backslashes a quote is not escaped, so a text with such is not corrected for escaped ones.
    So the count is at least that of the keys in the text, which is at least that of the keys in `value`.
    """
    if _SPACED_COLON.search(text):
        return False
    count = text.count(b'":')
    keys = _count_keys(value)
    if count != keys and b'\\\\":' not in text:
        count -= text.count(b'\\":')
    return count == keys


def _count_keys(value: Any) -> int:
    """Keys of all objects in a value. No recursion: a value may be nested deeper than Python's stack."""
    keys = 0
    pending = [value]
    while pending:
        current = pending.pop()
        if type(current) is dict:
            keys += len(current)
            pending.extend(inner for inner in current.values() if type(inner) is dict or type(inner) is list)
        elif type(current) is list:
            pending.extend(inner for inner in current if type(inner) is dict or type(inner) is list)
    return keys


def _checked(text: bytes, value: Any) -> Any | BadRow:
    if _has_every_key_once(text, value):
        return value
    found = _decode_exactly(text)
    return found if isinstance(found, BadRow) else value


def _decode_exactly(text: bytes) -> Any | BadRow:
    """The value of one row, by a decoder that sees every key and accepts the lone surrogates that orjson refuses."""
    if not text.strip(SPACE):
        return BadRow("is empty; remove it, one JSON value per line")
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        byte = text[error.start]
        return BadRow(f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}; convert the file to UTF-8")
    problems: list[str] = []
    try:
        value = _decoder(problems.append).decode(decoded)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {_reason(error)}: column {error.pos + 1}: {excerpt(decoded, error.pos)}")
    except RecursionError:
        return BadRow(f"not valid JSON: nested too deeply: {excerpt(decoded)}")
    except ValueError as error:  # a whole number with more digits than Python converts
        return BadRow(f"not valid JSON: {' '.join(str(error).split())[:80]}: {excerpt(decoded)}")
    return BadRow(problems[0]) if problems else value


def _decoder(report: Callable[[str], None]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=partial(_object, report),
        parse_constant=lambda name: report(f"{name} is no JSON value; use null, or put it in quotes"),
    )


def _object(report: Callable[[str], None], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        report(f'key "{excerpt(repeated)}" stands twice; keep one of them')
    return found


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at").removesuffix(" starting")
