"""Readers under random rows, layouts, block sizes and damage: rows come back, or a UserError or BadRow says why not."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import readers
from data_prep.readers import BadRow, block_rows, read_blocks
from sft.errors import UserError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
# Text that looks like JSON is what could mislead the search for a place to cut.
TEXT = st.one_of(
    st.text(max_size=12),
    st.text('"\\{}[],: \n\u2028é🙂a', max_size=12),
    st.sampled_from(['"a":', '\\":', '},{"a":', "]", "\\\\"]),
    st.integers(20, 300).map("x".__mul__),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4) | VALUES, min_size=1, max_size=12)
TABLE_ROWS = st.lists(
    st.fixed_dictionaries({"a": st.none() | TEXT, "b": st.lists(st.fixed_dictionaries({"c": TEXT}), max_size=3)}),
    min_size=1,
    max_size=12,
)
BLOCK_BYTES = st.sampled_from([1, 7, 64, 300, 4096])
LAYOUTS = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 3, "\t"]),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : "), (",\t", "\t:")]),
        "ensure_ascii": st.booleans(),
    }
)
ENDINGS = st.sampled_from(["", "\n", "\r\n", " \n\n \t\r\n"])
COMPRESSIONS = st.sampled_from(["", ".gz", ".zst"])
DAMAGE = st.tuples(st.sampled_from(["flip", "cut", "insert", "remove"]), st.floats(0, 1), st.integers(1, 255))


def read(name: str, content: bytes, block_bytes: int) -> tuple[list[tuple[int, Any]], str | None]:
    """The rows that were read, and the message that ended the reading."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            for block in read_blocks(0, path):
                rows.extend(block_rows(block))
        except UserError as error:
            return rows, str(error)
    return rows, None


def compress(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    return pa.Codec("zstd").compress(content, asbytes=True) if ending else content


def as_lines(rows: list[Any], layout: dict[str, Any], newline: str) -> bytes:
    flat = {**layout, "indent": None}
    return "".join(json.dumps(row, **flat) + newline for row in rows).encode("utf-8", "replace")


def as_array(rows: list[Any], layout: dict[str, Any], newline: str) -> bytes:
    return json.dumps(rows, **layout).replace("\n", newline).encode("utf-8", "replace")


def as_parquet(rows: list[Any]) -> bytes:
    schema = pa.schema({"a": pa.string(), "b": pa.list_(pa.struct({"c": pa.string()}))})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, row_group_size=5)
    return bytes(sink.getvalue())


def damaged(content: bytes, damage: tuple[str, float, int]) -> tuple[bytes, int]:
    kind, place, byte = damage
    at = min(int(place * len(content)), len(content) - 1)
    changed = {
        "flip": content[:at] + bytes([content[at] ^ byte]) + content[at + 1 :],
        "cut": content[:at],
        "insert": content[:at] + bytes([byte]) * 3 + content[at:],
        "remove": content[:at] + content[at + 1 + byte % 8 :],
    }
    return changed[kind], at


@FUZZ
@given(ROWS, LAYOUTS, ENDINGS, st.sampled_from(["\n", "\r\n"]), st.booleans(), COMPRESSIONS, BLOCK_BYTES)
def test_json_comes_back(
    rows: list[Any],
    layout: dict[str, Any],
    ending: str,
    newline: str,
    with_mark: bool,
    compression: str,
    block_bytes: int,
) -> None:
    expected = list(enumerate(rows, start=1))
    mark = b"\xef\xbb\xbf" if with_mark else b""
    written = {"a.jsonl": as_lines(rows, layout, newline), "a.json": as_array(rows, layout, newline)}
    for name, text in written.items():
        content = compress(mark + text + ending.encode(), compression)
        found, message = read(name + compression, content, block_bytes)
        assert message is None
        assert found == expected
        assert repr(found) == repr(expected), "True is no 1, and keys keep their order"


@FUZZ
@given(TABLE_ROWS, BLOCK_BYTES)
def test_parquet_comes_back(rows: list[Any], block_bytes: int) -> None:
    assert read("a.parquet", as_parquet(rows), block_bytes) == (list(enumerate(rows, start=1)), None)


@FUZZ
@given(ROWS, LAYOUTS, st.sampled_from(["a.json", "a.jsonl"]), COMPRESSIONS, BLOCK_BYTES, DAMAGE)
def test_damaged_json_gives_rows_or_says_why_not(
    rows: list[Any],
    layout: dict[str, Any],
    name: str,
    compression: str,
    block_bytes: int,
    damage: tuple[str, float, int],
) -> None:
    whole = as_lines(rows, layout, "\n") if name == "a.jsonl" else as_array(rows, layout, "\n")
    content, at = damaged(compress(whole, compression), damage)
    found, message = read(name + compression, content, block_bytes)
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert message is None or "\n" not in message
    if damage[0] == "cut":
        assert_prefix(found, rows)
        assert compression == "" or message is not None, "a cut archive is never whole"
        assert name == "a.jsonl" or message is not None, "a cut array is never whole"
    elif not compression and name == "a.jsonl":
        assert_prefix(found[: whole.count(b"\n", 0, at)], rows)


def assert_prefix(found: list[tuple[int, Any]], rows: list[Any]) -> None:
    """Each row is the one that was written, but for the last, which may be cut: a BadRow, or a shorter number."""
    for (number, value), row in zip(found, rows, strict=False):
        is_cut = number == len(found) and (isinstance(value, BadRow) or isinstance(row, int | float))
        assert is_cut or value == row


@FUZZ
@given(TABLE_ROWS, BLOCK_BYTES, DAMAGE)
def test_damaged_parquet_gives_rows_or_says_why_not(
    rows: list[Any], block_bytes: int, damage: tuple[str, float, int]
) -> None:
    content, _ = damaged(as_parquet(rows), damage)
    found, message = read("a.parquet", content, block_bytes)
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert damage[0] != "cut" or (message is not None and found == [])


@FUZZ
@given(st.binary(max_size=200), BLOCK_BYTES)
def test_any_bytes_give_rows_or_say_why_not(content: bytes, block_bytes: int) -> None:
    for name in ("a.json", "a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow"):
        found, message = read(name, content, block_bytes)
        assert found or message


@FUZZ
@given(ROWS, LAYOUTS, BLOCK_BYTES, st.integers(0, 11), TEXT, VALUES)
def test_a_repeated_key_is_never_lost(
    rows: list[Any], layout: dict[str, Any], block_bytes: int, place: int, key: str, value: Any
) -> None:
    """One row gets the same key twice, with equal values, so that only the count of its keys tells."""
    place %= len(rows)
    colon = layout["separators"][1]
    entry = f"{json.dumps(key)}{colon}{json.dumps(value)}"
    texts = [json.dumps(row, **{**layout, "indent": None}) for row in rows]
    for repeated in (f"{{{entry},{entry}}}", f'[{{"":[{{{entry},"":{{}},{entry}}}]}}]'):
        changed = [*texts[:place], repeated, *texts[place + 1 :]]
        for name, text in (("a.jsonl", "\n".join(changed)), ("a.json", f"[{','.join(changed)}]")):
            found, message = read(name, text.encode("utf-8", "replace"), block_bytes)
            assert message is None
            assert [number for number, row in found if isinstance(row, BadRow)] == [place + 1]
