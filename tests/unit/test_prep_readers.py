"""Files to rows: every kind gives the same rows, every defect one line that says where, whatever the block size."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import readers
from data_prep.json_rows import decode_lines
from data_prep.readers import BadRow, block_rows, file_digest, read_blocks, source_files
from sft.errors import UserError

ROWS: list[Any] = [{"a": f"row {number} ", "b": {"a": number, "c": [{"a": None}]}} for number in range(300)]


def rows_of(path: Path) -> list[tuple[int, Any]]:
    return [row for block in read_blocks(0, path) for row in block_rows(block)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path)
    message = str(caught.value)
    assert message.startswith(f"source {path}: ")
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def problem(path: Path, number: int) -> str:
    """What is wrong with this row, and with no other."""
    bad = {row: value.problem for row, value in rows_of(path) if isinstance(value, BadRow)}
    assert list(bad) == [number]
    assert "\n" not in bad[number]
    return bad[number]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(params=[64, 1000, 2**20])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(readers, "BLOCK_BYTES", request.param)
    return int(request.param)


ARRAY = json.dumps(ROWS, indent=4).encode()
WRITTEN: dict[str, bytes] = {
    "a.json": ARRAY,
    "compact.json": json.dumps(ROWS, separators=(",", ":")).encode(),
    "crlf.JSON": b"\xef\xbb\xbf" + ARRAY.replace(b"\n", b"\r\n") + b"\r\n\r\n",
    "a.jsonl": lines(ROWS),
    "crlf.jsonl": b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n") + b"\r\n \n\t\n",
    "open.jsonl": lines(ROWS)[:-1],
    "a.json.gz": gzip.compress(ARRAY, mtime=0),
    "two.jsonl.gz": gzip.compress(lines(ROWS[:100]), mtime=0) + gzip.compress(lines(ROWS[100:]), mtime=0),
    "a.Json.Zst": pa.Codec("zstd").compress(ARRAY, asbytes=True),
    "a.jsonl.zst": pa.Codec("zstd").compress(lines(ROWS), asbytes=True),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_gives_the_rows(tmp_path: Path, block_bytes: int, name: str) -> None:
    path = write(tmp_path / name, WRITTEN[name])
    blocks = list(read_blocks(7, path))
    assert [row for block in blocks for row in block_rows(block)] == list(enumerate(ROWS, start=1))
    assert (len(blocks) > 10) == (block_bytes <= 1000)
    assert {(block.source_id, block.file) for block in blocks} == {(7, str(path))}
    size = path.stat().st_size
    assert size - 10 <= sum(block.input_bytes for block in blocks) <= size
    assert [row for block in blocks for row in block_rows(pickle.loads(pickle.dumps(block)))] == rows_of(path)


def test_columns_give_the_rows_in_small_blocks(tmp_path: Path, block_bytes: int) -> None:
    wide = [{**row, "text": "x" * 200} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(wide), tmp_path / "a.parquet", row_group_size=70, use_dictionary=False)
    datasets.Dataset.from_list(wide).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    saved = source_files(str(tmp_path / "saved"))
    assert [path.name for path in saved] == [f"data-0000{index}-of-00003.arrow" for index in range(3)]
    for files in ([tmp_path / "a.parquet"], saved):
        blocks = [block for path in files for block in read_blocks(0, path)]
        assert [value for block in blocks for _, value in block_rows(block)] == wide
        sent = [len(pickle.dumps(block)) for block in blocks]
        assert max(sent) < block_bytes + 4000, "a slice carries its whole batch along"
        disk_bytes = sum(path.stat().st_size for path in files)
        assert 0.8 * disk_bytes < sum(block.input_bytes for block in blocks) <= disk_bytes
    assert [number for number, _ in rows_of(saved[1])] == list(range(1, 101))


def test_a_parquet_block_has_at_most_4096_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(10_000))}), tmp_path / "a.parquet")
    assert [block.first_row for block in read_blocks(0, tmp_path / "a.parquet")] == [1, 4097, 8193]


def test_values_that_are_no_objects_pass(tmp_path: Path, block_bytes: int) -> None:
    values = [1, -2.5e3, 12345678901234567890, None, True, "é🙂\u2028", [], {}, [[1], {"x": []}], "a" * 70] * 20
    for name, content in (("a.jsonl", lines(values)), ("a.json", json.dumps(values, ensure_ascii=False).encode())):
        assert rows_of(write(tmp_path / name, content)) == list(enumerate(values, start=1))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_block_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = ["1234567", "-4.5e3", '"\\u00e9\\"x"', "true", '{"k" : [12, {"l": null}]}', '"é🙂"', "[]", "1234567"]
    content = f"\n[ {' , '.join(texts)} ]\n" if name == "a.json" else "\r\n".join(texts)
    path = write(tmp_path / name, content.encode())
    for block_bytes in range(1, path.stat().st_size + 5):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
        assert rows_of(path) == list(enumerate(map(json.loads, texts), start=1)), block_bytes


TRICKY = [
    '{"a\\":": "\\":", "b": ":x"}',
    '{"a\\\\": 1, "b": "\\\\", "c" : ": "}',
    '{"a": "}, {\\"a\\": 1}, {", "b": [{"a": 1}, {"a": 2}]}',
    '{"a": "\\ud83d\\ude42", "": {"": ""}, "x" \t : 1}',
    '{"a": "]", "b": "\\""}',
]


@pytest.mark.parametrize("text", TRICKY)
def test_quotes_colons_and_brackets_inside_of_strings_mislead_nobody(
    tmp_path: Path, block_bytes: int, text: str
) -> None:
    expected = list(enumerate([json.loads(text)] * 50, start=1))
    assert rows_of(write(tmp_path / "a.jsonl", f"{text}\n".encode() * 50)) == expected
    assert rows_of(write(tmp_path / "a.json", f"[{','.join([text] * 50)}]".encode())) == expected


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1, "a": 1}', "a"),
        ('{"a" : 1, "a": 2}', "a"),
        ('{"a" : 1, "a"\t\r: 2, "x": ":"}', "a"),
        ('{"a\\\\": 1, "b": 1, "b": 1}', "b"),
        ('{"x": "\\":", "b": 1, "b": 1}', "b"),
        ('{"x": [{"y": {"b": 1, "b": 2}}]}', "b"),
        ('{"\\u0061": 1, "a": 2}', "a"),
    ],
)
def test_a_key_that_stands_twice_is_a_bad_row(tmp_path: Path, block_bytes: int, text: str, key: str) -> None:
    good = '{"x": 1, "y": {"x": 1}}'
    for name, content in (("a.jsonl", f"{good}\n{text}\n{good}\n"), ("a.json", f"[{good},{text},{good}]")):
        assert problem(write(tmp_path / name, content.encode()), 2) == f'key "{key}" stands twice; keep one of them'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": "\xff"}', ["not UTF-8", "0xff", "byte 8"]),
        (b'{"a": NaN}', ["NaN", "null"]),
        (b'{"a": -Infinity}', ["-Infinity"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["not valid JSON", "999"]),
    ],
)
def test_a_row_that_is_wrong_by_itself_leaves_the_others(
    tmp_path: Path, block_bytes: int, text: bytes, words: list[str]
) -> None:
    for name, content in (("a.jsonl", b"1\n%b\n2\n" % text), ("a.json", b"[1, %b,\n2]" % text)):
        found = problem(write(tmp_path / name, content), 2)
        assert all(word in found for word in words), found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1, "b": }', ["Expecting value", "column 15", '{"a": 1, "b": }']),
        (b'{"a": "x\ty"}', ["Invalid control character", "column 9", "\\t"]),
        (b'{"a": 1} {"b": 2}', ["Extra data", "column 10"]),
        (b'{"a": "' + b"x" * 1000 + b'"y}', ["column 1009", "…"]),
        (b"", ["empty"]),
        (b" \t", ["empty"]),
        (b"[" * 5000, ["nested too deeply"]),
        (b'\x00{"a": 1}', ["Expecting value", "column 1:", "\\x00"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, block_bytes: int, line: bytes, words: list[str]) -> None:
    found = problem(write(tmp_path / "a.jsonl", b'{"a": 1}\n%b\r\n{"a": 2}\n' % line), 2)
    assert all(word in found for word in words), found
    assert len(found) < 250


def test_a_lone_surrogate_is_left_to_the_filters(tmp_path: Path, block_bytes: int) -> None:
    for name, content in (("a.jsonl", b'"x"\n"\\ud800"\n'), ("a.json", b'["x", "\\ud800"]')):
        assert rows_of(write(tmp_path / name, content)) == [(1, "x"), (2, "\ud800")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', ["line 3 column 7 (row 3)", "Expecting ':'", '{"a" 3}']),
        (b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', ["line 3 column 2 (row 2)", "Expecting ',' or ']'"]),
        (b'[{"a": 1},\n]', ["line 2 column 1 (row 2)", "Expecting value"]),
        (b"[,1]", ["line 1 column 2 (row 1)"]),
        (b"[1, 2", ["line 1 column 6", "not closed"]),
        (b"[1, 2,", ["line 1 column 7", "Expecting value"]),
        (b"[", ["line 1 column 2"]),
        (b'[{"a": "x', ["line 1 column 8 (row 1)", "Unterminated string"]),
        (b"[1, 2.]", ["line 1 column 6 (row 2)"]),
        (b"[1, tru]", ["line 1 column 5 (row 2)"]),
        (b"[1]\n\n [2]", ["line 3 column 2", "behind the end", "[2]"]),
        (b"[]]", ["line 1 column 3", "behind the end"]),
        (b"[1 \xff, 2]", ["line 1 column 4 (row 1)"]),
        ('["é", "é", x]'.encode(), ["line 1 column 12 (row 3)"]),
        (b'[{"a": "x\ny"}]', ["line 1 column 10 (row 1)", "Invalid control character"]),
        (b"[" + b"[" * 100_000, ["row 1", "nested too deeply"]),
        (b'{"a": 1}\n{"a": 2}\n', ["array", ".jsonl", '{"a": 1}']),
        (b"true", ["array", "true"]),
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf", ["is empty"]),
        (b" \n", ["is empty"]),
        (b"[\n]\n", ["no rows"]),
        ('["x"]'.encode("utf-16"), ["UTF-16"]),
    ],
)
def test_an_array_that_is_not_json_is_refused(
    tmp_path: Path, block_bytes: int, content: bytes, words: list[str]
) -> None:
    message = refusal(write(tmp_path / "a.json", content))
    assert all(word in message for word in words), message


def test_positions_hold_behind_many_blocks(tmp_path: Path, block_bytes: int) -> None:
    pretty = json.dumps(ROWS, indent=2, ensure_ascii=False)
    path = write(tmp_path / "a.json", (pretty[:-2] + ",\n  x]").encode())
    assert f"line {pretty.count(chr(10)) + 1} column 3 (row 301)" in refusal(path)
    compact = json.dumps(["é🙂" * 30] * 300, ensure_ascii=False)
    path = write(tmp_path / "b.json", f"{compact[:-1]}, x]".encode())
    assert f"line 1 column {len(compact) + 2} (row 301)" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["is empty"]),
        ("a.jsonl", b"\n \r\n", ["no rows"]),
        ("a.jsonl", "{}\n".encode("utf-16"), ["UTF-16"]),
        ("a.csv", b"a,b", [".jsonl", ".parquet"]),
        ("a.parquet.gz", b"", [".parquet"]),
        ("gz", b"", [".jsonl"]),
        ("a.jsonl.gz", b"", ["is empty"]),
        ("a.jsonl.gz", b'{"a": 1}\n' * 100, ["not a whole gzip file"]),
        ("a.jsonl.gz", WRITTEN["a.json.gz"][:-1], ["not a whole gzip file", "Truncated"]),
        ("a.json.gz", WRITTEN["a.json.gz"][:300], ["not a whole gzip file", "Truncated"]),
        ("a.jsonl.gz", gzip.compress(b"1\n", mtime=0) + b"garbage", ["not a whole gzip file"]),
        ("a.json.zst", WRITTEN["a.jsonl.zst"][:-1], ["not a whole zstd file", "Truncated"]),
        ("a.jsonl.zst", WRITTEN["a.jsonl.zst"] + b"garbage", ["not a whole zstd file"]),
        ("a.parquet", b"", ["not a whole parquet file"]),
        ("a.parquet", b"PAR1 something PAR1", ["not a whole parquet file"]),
        ("a.arrow", b"", ["not a whole Arrow stream"]),
        ("a.arrow", b"x" * 50, ["not a whole Arrow stream"]),
        ("a.arrow", b"x" * 50 + b"\xff" * 4 + b"\0" * 4, ["not a whole Arrow file"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    message = refusal(write(tmp_path / name, content))
    assert all(word in message for word in words), message


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'"text"\n'))
    whole[-6] ^= 1
    assert "not a whole gzip file" in refusal(write(tmp_path / "a.jsonl.gz", bytes(whole)))


def test_an_arrow_stream_that_ends_between_batches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"a": list(range(100))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    whole = path.read_bytes()
    assert len(rows_of(path)) == 100
    path.write_bytes(whole[:-8])
    assert "no end mark" in refusal(path)


def test_an_arrow_stream_that_points_outside_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"a": ["one", "two"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert rows_of(path) == [(1, {"a": "one"}), (2, {"a": "two"})]
    ends = struct.pack("<3i", 0, 3, 6)
    assert path.read_bytes().count(ends) == 1
    path.write_bytes(path.read_bytes().replace(ends, struct.pack("<3i", 0, 3, 10**6)))
    assert "not a whole Arrow file" in refusal(path)


def test_columns_of_one_name_and_values_without_a_python_one_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    assert 'column "a" stands twice' in refusal(tmp_path / "a.parquet")
    late = pa.array([0, 2**40, 1], pa.timestamp("s"))
    pq.write_table(pa.table({"a": late.cast(pa.timestamp("ms"))}), tmp_path / "b.parquet")
    assert "cannot hold" in problem(tmp_path / "b.parquet", 2)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert "no rows" in refusal(tmp_path / "c.parquet")


def test_rows_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2**10)
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**12)
    for size, fits in ((2**12 - 2, True), (2**12 - 1, False), (2**16, False)):
        content = [b"1", b'"%b"' % (b"x" * size), b"2"]
        path = write(tmp_path / "a.jsonl", b"\n".join(content))
        found = dict(rows_of(path))
        assert (found[1], found[3]) == (1, 2)
        assert found[2] == ("x" * size if fits else BadRow("longer than 0.00390625 MiB; split it, or remove it"))
        path = write(tmp_path / "a.json", b"[%b]" % b",\n".join(content))
        if fits:
            assert rows_of(path) == [(1, 1), (2, "x" * size), (3, 2)]
        else:
            assert "line 2 column 1 (row 2): a row longer than" in refusal(path)
    path = write(tmp_path / "b.jsonl", b"1\n" + b"\n" * 2**13 + b"2\n")
    assert "blank lines from line 2" in refusal(path)
    assert rows_of(write(tmp_path / "c.jsonl", b"1\n" + b"\n" * 2**11)) == [(1, 1)]
    assert problem(write(tmp_path / "d.jsonl", b"1\n" + b"x" * 2**16), 2).startswith("longer")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2**14)
    row = json.dumps({"text": "some words " * 30, "list": [{"text": 1}] * 3})
    content = f"{row}\n" * 20_000 if name == "a.jsonl" else f"[{', '.join([row] * 20_000)}]"
    path = write(tmp_path / name, gzip.compress(content.encode(), 1) if name.endswith("gz") else content.encode())

    def peak_bytes(use: Any) -> int:
        tracemalloc.start()
        use()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(lambda: sum(1 for block in read_blocks(0, path) for _ in block_rows(block))) < 2**20
    assert peak_bytes(lambda: [block.payload for block in read_blocks(0, path)]) > 2**22, "the measure sees memory"


def test_a_long_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**16)
    path = write(tmp_path / "a.jsonl", b'"' + b"x" * 2**24 + b'"\n1\n')
    tracemalloc.start()
    found = rows_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[1] == (2, 1)
    assert isinstance(found[0][1], BadRow)
    assert peak < 2**20


def test_folders_globs_and_files(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl.gz", "B/c.PARQUET", "B/a.jsonl", ".h/a.json", "_h/a.json", "_x.json", "note.txt"):
        write(tmp_path / name, b"")

    def found(path: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in source_files(str(tmp_path / path))]

    assert found("") == ["B/a.jsonl", "B/c.PARQUET", "a.jsonl.gz", "b.json"]
    assert found("*") == ["_x.json", "a.jsonl.gz", "b.json"]
    assert found("**/a.*") == ["B/a.jsonl", "_h/a.json", "a.jsonl.gz"]
    assert found("_h") == ["_h/a.json"]
    assert found("b.json") == ["b.json"]
    write(tmp_path / "[1].json", b"")
    assert found("[1].json") == ["[1].json"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.json", "no such file"),
        ("none/*.json", "matches no file"),
        ("*.txt", "no file in it is .json"),
        ("only_text", "no file in it is .json"),
        ("note.txt", "not a .json"),
        ("dangling.json", "no such file"),
        ("pipe.jsonl", "no regular file"),
        ("x" * 300 + ".json", "too long"),
        ("note.txt/a.json", "cannot be read: Not a directory"),
        ("splits", "several splits (test, train)"),
        ("cache", "belongs to a `datasets` folder"),
        ("broken", "does not list"),
        ("outside", "names no data files in this folder"),
        ("indexed", "selects rows by an index"),
        ("gone", "data.arrow is missing"),
    ],
)
def test_a_source_without_files_is_refused(tmp_path: Path, path: str, words: str) -> None:
    for name in ("note.txt", "only_text/a.txt", "splits/dataset_dict.json", "cache/a.arrow"):
        write(tmp_path / name, b"{}")
    for split in ("train", "test"):
        write(tmp_path / "splits" / split / "state.json", b"{}")
    files = [{"filename": "data.arrow"}]
    states: dict[str, Any] = {
        "broken": [],
        "outside": {"_data_files": [{"filename": "../data.arrow"}]},
        "indexed": {"_data_files": files, "_indices_data_files": files},
        "gone": {"_data_files": files},
    }
    for folder, state in states.items():
        write(tmp_path / folder / "state.json", json.dumps(state).encode())
    (tmp_path / "dangling.json").symlink_to("nowhere.json")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError) as caught:
        source_files(str(tmp_path / path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_saved_splits_of_datasets_are_told_apart(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS[:3])
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        source_files(str(tmp_path / "both"))
    (path,) = source_files(str(tmp_path / "both" / "train"))
    assert rows_of(path) == list(enumerate(ROWS[:3], start=1))


def test_reading_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    for use in (rows_of, file_digest):
        for name, words in (("a.jsonl", "is a folder"), ("b.jsonl", "no such file")):
            with pytest.raises(UserError, match=words):
                use(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        rows_of(tmp_path / "b.parquet")


def test_permissions_are_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    secret = write(tmp_path / "in" / "a.jsonl", b"1\n")
    secret.chmod(0)
    assert "Permission denied" in refusal(secret)
    (tmp_path / "in").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        source_files(str(tmp_path / "in"))
    (tmp_path / "in").chmod(0o700)


def test_the_digest_is_sha256sum(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", WRITTEN["a.json.gz"])
    assert file_digest(path) == subprocess.check_output(["sha256sum", path], text=True).split()[0]


def test_lines_are_decoded_in_order_whatever_is_between_them() -> None:
    assert list(decode_lines(b"1\n\n2")) == [1, BadRow("is empty; remove it, one JSON value per line"), 2]
