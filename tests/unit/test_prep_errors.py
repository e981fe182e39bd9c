"""Bad input and bad output folders: one line that says where, and nothing left behind; or counted, where asked for."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from data_prep import build, filters
from tests.prep_jobs import reasons, report_of
from tests.prep_support import alpaca_rows, documents, flags, prepare, refused, write_json, write_jsonl
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_json(tmp_path / "rows.json", alpaca_rows(700))


GOOD = {"instruction": "a", "input": "", "output": "b"}
BAD_INPUT: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "not json": ("{", {}, ["rows.json", "not valid JSON"]),
    "wrong field": ([GOOD, {"prompt": "a", "output": "b"}], {}, ["rows.json", "row 2", "'instruction'"]),
    "wrong type": ([GOOD, {**GOOD, "output": 7}], {}, ["rows.json", "row 2", "'output'", "7"]),
    "no row left": ([{**GOOD, "output": ""}], {}, ["1 empty_output"]),
    "all held out": ([GOOD], {"heldout": 1}, ["1 held out"]),
    "none held out": ([GOOD], {"heldout": 0.000001}, ["heldout", "none of the 1"]),
    "overlong": ([GOOD], {"seq_len": 20, "overlong": "error"}, ["row 1", "tokens", "seq_len is 20"]),
    "overlong dropped": ([GOOD], {"seq_len": 20}, ["1 overlong"]),
    "no tokenizer": ([GOOD], {"tokenizer": "nowhere"}, ["nowhere", "no such folder"]),
    "no template": ([GOOD], {"template": "no.jinja"}, ["no.jinja", "cannot be read"]),
    "no chat template": ([GOOD], {"template": "chat"}, ["has no chat template"]),
    "no list of refusals": ([GOOD], {"filters.refusals": "no.txt"}, ["filters.refusals no.txt"]),
    "no evaluation items": ([GOOD], {"decontaminate": "no.jsonl"}, ["decontaminate no.jsonl"]),
    "bad option": ([GOOD], {"dedup": "never"}, ["dedup", "never"]),
    "bad column": (
        [GOOD],
        {"sources": '[{"path": "rows.json", "columns": {"answer": "b"}}]'},
        ["format alpaca has no field", "answer"],
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], name: str, workers: int
) -> None:
    content, options, words = BAD_INPUT[name]
    source = tmp_path / "rows.json"
    source.write_text(content if isinstance(content, str) else json.dumps(content))
    given = {"sources": source, "tokenizer": tokenizer, "workers": workers, **options, "out": tmp_path / "out"}
    line = refused(capsys, build.main, flags(**given))
    assert all(word in line for word in words), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json"]


MALFORMED: dict[str, tuple[str, int, str]] = {
    "not json": ('{"instruction": "a", "output": }', 1, "not valid JSON"),
    "cut short": ('{"instruction": "a", "out', 1, "not valid JSON"),
    "no object": ('["a", "b"]', 1, "expected an object"),
    "field is null": ('{"instruction": "a", "output": null}', 1, "'output' is null"),
    "field is missing": ('{"instruction": "a"}', 1, "'output' is missing"),
    "key twice": ('{"instruction": "a", "output": "b", "output": "c"}', 1, "stands twice"),
    "blank line": ("   ", 1, "is empty"),
    "not a number": ('{"instruction": "a", "output": "b", "score": NaN}', 1, "NaN"),
    "two of them": ('{"a": 1}\n[]', 2, "'instruction' is missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_named_or_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bad, count, words = MALFORMED[name]
    lines = [json.dumps(row) for row in alpaca_rows(6)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join([*lines[:4], bad, *lines[4:]]) + "\n")
    given = {"sources": source, "tokenizer": tokenizer, "seq_len": 1024, "workers": 1, "out": tmp_path / "out"}
    line = refused(capsys, build.main, flags(**given))
    assert line.startswith(f"error: source {source}: row 5: ")
    assert words in line
    shards = prepare(**given, on_error="drop")
    [item] = report_of(tmp_path / "out")["sources"]
    assert reasons(item) == {filters.MALFORMED: count}
    assert item["dropped"][filters.MALFORMED]["first_rows"] == [5, 6][:count]
    assert sorted(doc_id for doc_id, _, _ in documents(shards)) == [0, 1, 2, 3, *range(4 + count, 6 + count)]


def test_only_malformed_rows_leave_nothing(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{}, []])
    given = {"sources": source, "tokenizer": tokenizer, "on_error": "drop", "out": tmp_path / "out"}
    assert "none of the 2 rows is left for training (2 malformed)" in refused(capsys, build.main, flags(**given))


def test_damage_of_a_file_is_never_a_drop(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(alpaca_rows(5))[:-20])
    given = {"sources": source, "tokenizer": tokenizer, "on_error": "drop", "out": tmp_path / "out"}
    assert f"source {source}: " in refused(capsys, build.main, flags(**given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["append", "touch", "replace"])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path,
    tokenizer: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    read = build.read_blocks

    def changing(source_id: int, path: Path) -> Any:
        yield from read(source_id, path)
        if change == "append":
            path.write_text(path.read_text() + " ")
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        else:
            other = write_json(path.with_name("other"), alpaca_rows(700, seed=1))
            other.replace(path)

    given = flags(sources=source, tokenizer=tokenizer, seq_len=1024, workers=1, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(build, "read_blocks", changing)
        line = refused(capsys, build.main, given)
    assert line.startswith(f"error: source {source}: changed while it was read; run again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json"]
    build.main(given)
    assert (tmp_path / "out" / "train").is_dir(), "control: a file that is left alone"


def test_a_failure_while_writing_keeps_the_work_and_no_output(
    tmp_path: Path, tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(sources=source, tokenizer=tokenizer, seq_len=1024, workers=1, out=tmp_path / "out")
    # pyarrow's errors have no strerror
    for error in (OSError(28, "No space left on device"), OSError("Error writing bytes.\nDetail: no space")):
        with monkeypatch.context() as patch:
            patch.setattr(build, "write_json", Mock(side_effect=error))
            line = refused(capsys, build.main, given)
        assert "space" in line.split("cannot be written: ")[1].split(";")[0]
        assert f"; check space and permissions of {tmp_path}, or choose another folder" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work", "rows.json"]
    build.main(given)
    assert "finished blocks of an earlier run" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.json"]


@pytest.mark.parametrize("name", ["loop", "a" * 300, "rows.json/x"])
def test_an_impossible_output_folder_is_refused(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / name, workers=1))
    assert str(tmp_path)[:40] in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / "mine" / "out"))
    assert "Permission denied" in line
