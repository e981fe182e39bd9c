"""A JSON array of any size to blocks of its elements, in memory bounded by the longest element."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import orjson

from data_prep.json_rows import SPACE, ArrayError, elements, excerpt
from sft.errors import UserError


class ElementBlock(NamedTuple):
    """Consecutive elements of an array."""

    first: int
    """Position of its first element, from 1."""
    text: bytes
    """What stands between the brackets of an array that holds just these."""
    num_rows: int
    """How many they are."""


class _Window:
    """The part of the file in memory, and where in the file it begins: line and column from 1, in characters."""

    def __init__(self, read: Callable[[int], bytes], where: str) -> None:
        self.read = read
        self.where = where
        self.text = b""
        self.line = 1
        self.column = 1
        self.at_end = False
        self.separator = b""
        """What stood between two elements, with the beginning of the second: a likely place to cut."""

    def fill(self, size: int) -> None:
        """Hold at least `size` bytes, or all that is left of the file."""
        while len(self.text) < size and not self.at_end:
            chunk = self.read(size - len(self.text))
            self.at_end = not chunk
            self.text += chunk

    def drop(self, size: int) -> None:
        """Forget the first `size` bytes."""
        self.line, self.column = self._position(self.text[:size])
        self.text = self.text[size:]

    def skip_spaces(self, size: int) -> None:
        """Begin at the next character that is no white space, or at the end of the file; reads `size` at a time."""
        while True:
            self.fill(size)
            self.drop(len(self.text) - len(self.text.lstrip(SPACE)))
            if self.text or self.at_end:
                return

    def take(self, byte: bytes) -> bool:
        """Drop the first byte if it is this one."""
        found = self.text.startswith(byte)
        self.drop(int(found))
        return found

    def fail(self, row: int, problem: str, offset: int = 0) -> NoReturn:
        """Refuse the file for what stands `offset` bytes behind the beginning of the window."""
        line, column = self._position(self.text[:offset])
        start = max(0, offset - 400)
        before, behind = (
            part.decode("utf-8", "replace") for part in (self.text[start:offset], self.text[offset : offset + 400])
        )
        near = f": {excerpt(before + behind, len(before))}" if self.text else ""
        raise UserError(f"{self.where}: not valid JSON: line {line} column {column} (row {row}): {problem}{near}")

    def _position(self, before: bytes) -> tuple[int, int]:
        lines = before.count(b"\n")
        tail = before[before.rfind(b"\n") + 1 :]
        return self.line + lines, (1 if lines else self.column) + len(tail.decode("utf-8", "replace"))


def element_blocks(
    read: Callable[[int], bytes], where: str, block_bytes: int, max_row_bytes: int
) -> Iterator[ElementBlock]:
    """Cut the array that `read` gives (at most as many bytes as asked, b"" at the end) into blocks of `block_bytes`.

    Raises:
        UserError: no array, not JSON outside or between its elements, or an element above `max_row_bytes`.
    """
    window = _Window(read, where)
    window.skip_spaces(block_bytes)
    _open_array(window)
    row = 1
    while row == 1 or window.take(b","):
        window.skip_spaces(block_bytes)
        if row == 1 and window.text.startswith(b"]"):
            break
        window.fill(block_bytes)
        block = _quick_cut(window, row, block_bytes) or _careful_cut(window, row, block_bytes, max_row_bytes)
        yield block
        row += block.num_rows
        window.drop(len(block.text))
        window.skip_spaces(block_bytes)
    if not window.take(b"]"):
        window.fail(row, "the array is not closed; the file was cut off, get it again")
    window.skip_spaces(block_bytes)
    if window.text:
        window.fail(row, "text behind the end of the array; remove it")


def _open_array(window: _Window) -> None:
    if not window.text:
        raise UserError(f"{window.where}: is empty; remove it from sources")
    if not window.take(b"["):
        shown = excerpt(window.text[:400].decode("utf-8", "replace"))
        hint = "; if it holds one object per line, name it .jsonl" if window.text.startswith(b"{") else ""
        raise UserError(f"{window.where}: not valid JSON: holds {shown}, expected one array of objects{hint}")


def _quick_cut(window: _Window, row: int, block_bytes: int) -> ElementBlock | None:
    """Guess where an element ends, and let orjson tell whether it was right.

    The guess is safe: the window begins with an element, so text that makes a whole array between brackets ends outside
    of every string and object.
    """
    if window.at_end and len(window.text) <= block_bytes:
        end = window.text.rfind(b"]")
    else:
        end = window.text.rfind(window.separator, 1, block_bytes) if window.separator else -1
    text = window.text[: max(end, 0)]
    try:
        count = len(orjson.loads(b"[%b]" % text))
    except orjson.JSONDecodeError:
        return None
    return ElementBlock(row, text, count) if count else None


def _careful_cut(window: _Window, row: int, block_bytes: int, max_row_bytes: int) -> ElementBlock:
    """Follow the elements from the first on until the block is full, reading on where not even one is complete."""
    limit = max_row_bytes + 64  # room to see what stands behind a row
    while True:
        text = window.text.decode("utf-8", "surrogateescape")
        failure: ArrayError | None = None
        found: list[tuple[int, int]] = []
        size = 0
        try:
            for start, end in elements(text, window.at_end):
                row_size = len(_encode(text[start:end]))
                if row_size > max_row_bytes:
                    failure = ArrayError(_too_long(max_row_bytes), start)
                    break
                found.append((start, end))
                size += row_size
                if size >= block_bytes:
                    break
        except ArrayError as error:
            failure = error
        if found:
            window.separator = _separator(text, found) or window.separator
            return ElementBlock(row, _encode(text[: found[-1][1]]), len(found))
        if failure:
            window.fail(row, str(failure), len(_encode(text[: failure.offset])))
        if len(window.text) >= limit:
            window.fail(row, _too_long(max_row_bytes))
        window.fill(min(2 * len(window.text), limit))


def _separator(text: str, found: list[tuple[int, int]]) -> bytes:
    """What stands between the last two elements, with the beginning of the second up to its first key.

    A key tells objects of the outer array from those nested in them.
    """
    if len(found) == 1:
        return b""
    (_, end), (start, _) = found[-2:]
    key_end = text.find('":', start, start + 100)
    return _encode(text[end : key_end + 2 if key_end > 0 else start + 1])


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _too_long(max_row_bytes: int) -> str:
    return f"a row longer than {max_row_bytes / 2**20:g} MiB; split it, or remove it"
