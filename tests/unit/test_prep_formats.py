"""Rows from files: what is read, and the one line that each malformed file or row is refused with."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.formats import Example, parse_row, read_rows
from data_prep.template import alpaca_prompt
from sft.errors import UserError
from tests.prep_support import write_json, write_jsonl

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}


def test_prompt_with_input_is_stanfords() -> None:
    assert alpaca_prompt("Add {x}.", "1 {y}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 {y}\n\n### Response:\n"
    )


def test_prompt_without_input_is_stanfords() -> None:
    assert alpaca_prompt("Sing.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )


def test_json_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "output": "four\n5"}]
    array = list(read_rows(str(write_json(tmp_path / "a.json", rows))))
    lines = list(read_rows(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert array == lines == [(1, rows[0]), (2, rows[1])]


def test_byte_order_mark_crlf_and_trailing_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n\r\n\n')
    assert list(read_rows(str(path))) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_equal_keys_in_different_objects_are_no_repetition(tmp_path: Path) -> None:
    rows = [{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}, {"a": 1}]
    assert list(read_rows(str(write_json(tmp_path / "a.json", rows)))) == [(1, rows[0]), (2, rows[1])]


def test_rows_become_examples() -> None:
    assert parse_row(ROW, "alpaca", "") == Example(alpaca_prompt("Add.", "1 2"), "3")
    assert parse_row({"instruction": "Sing.", "output": "la", "extra": 1}, "alpaca", "") == Example(
        alpaca_prompt("Sing."), "la"
    )
    assert parse_row({"text": " a "}, "text", "") == Example("", " a ")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], ["[1]", "object"]),
        ({"instruction": "a", "input": ""}, ["'output'", "missing", "input, instruction"]),
        ({**ROW, "output": 3}, ["'output'", "3", "text"]),
        ({**ROW, "input": None}, ["'input'", "null"]),
        ({**ROW, "instruction": ["x" * 500]}, ["'instruction'", "..."]),
    ],
)
def test_a_malformed_row_names_place_field_and_value(value: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(value, "alpaca", "source a.json: row 7")
    message = str(caught.value)
    assert message.startswith("source a.json: row 7")
    assert all(word in message for word in words)
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"", ["is empty"]),
        ("a.json", b" \n", ["is empty"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.json", b'{"a": 1}', ["array", '{"a": 1}']),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ["not valid JSON", ".jsonl"]),
        ("a.json", b'[{"a": 1},', ["not valid JSON", "line 1"]),
        ("a.json", b'["\xff\xfe"]', ["not valid JSON"]),
        ("a.json", b"[" * 100_000, ["not valid JSON"]),
        ("a.json", b"[" + b"9" * 10_000 + b"]", ["not valid JSON"]),
        ("a.jsonl", b"", ["no rows"]),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ["line 2", "not valid JSON", '{\\"a\\": ']),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', ["line 2", "empty"]),
        ("a.csv", b"a,b", [".jsonl"]),
        ("a.json", b'[{"a": 1}, {"b": 1, "a": 1, "b": 2}]', ["row 2", '"b" stands twice']),
        ("a.jsonl", b'{"a": 1}\n{"a": "x", "a": "x"}\n', ["row 2", '"a" stands twice']),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(str(tmp_path / "none.json")))
    with pytest.raises(UserError, match="is a folder"):
        list(read_rows(str(tmp_path)))
