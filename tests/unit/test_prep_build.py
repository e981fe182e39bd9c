"""The whole job in one process: exact rows, every row accounted for, the same bytes for any number of workers."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from data_prep import blocks, build
from data_prep.encode import Document, encode_examples
from data_prep.template import alpaca_prompt
from sft.config import PrepConfig
from sft.errors import UserError
from sft.tokenizer import load_tokenizer
from tests.prep_support import (
    alpaca_rows,
    byte_ids,
    documents,
    file_bytes,
    flags,
    prepare,
    refused,
    write_json,
    write_jsonl,
)
from tests.tiny import BOS, EOS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_json(tmp_path / "rows.json", alpaca_rows(700))


def report_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def test_rows_are_exact(tmp_path: Path, tokenizer: Path) -> None:
    rows = alpaca_rows(50)
    shards = prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", rows), tokenizer=tokenizer)
    found = {doc_id: (ids, labels) for doc_id, ids, labels in documents(shards)}
    assert sorted(found) == list(range(50))
    for doc_id, row in enumerate(rows):
        prompt = [BOS, *byte_ids(alpaca_prompt(row["instruction"], row["input"]))]
        response = [*byte_ids(row["output"]), EOS]
        assert found[doc_id] == (prompt + response, [-100] * len(prompt) + response)


def test_text_rows_are_supervised_whole(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "né"}, {"text": " "}, {"text": "b"}])
    sources = json.dumps([{"path": str(source), "format": "text"}])
    shards = prepare(tmp_path / "out", sources=sources, tokenizer=tokenizer)
    one, two = [*byte_ids("né"), EOS], [*byte_ids("b"), EOS]
    assert documents(shards) == [(0, [BOS, *one], [-100, *one]), (2, [BOS, *two], [-100, *two])]
    assert shards.pack(0).num_labels == len(one) + len(two)


def test_bytes_do_not_depend_on_workers(tmp_path: Path, tokenizer: Path, source: Path) -> None:
    contents = []
    for workers in (1, 2, 5):
        out = tmp_path / str(workers) / "out"
        prepare(out, sources=source, tokenizer=tokenizer, workers=workers, heldout=0.1)
        content = file_bytes(out)
        report = json.loads(content.pop("report.json"))
        report.pop("timings_s")
        contents.append((content, report))
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0][0]) == {
        f"{split}/{name}"
        for split in ("train", "heldout")
        for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json", "manifest.json")
    }


def mixed_rows() -> list[dict[str, str]]:
    rows = alpaca_rows(40)
    rows[3]["output"] = "  "
    rows[5]["output"] = "x" * 5000
    rows[7]["output"] = "stop</s>now"
    rows[8]["output"] = "\ud83d"
    rows[9] = rows[1]
    rows[30] = rows[1]
    return rows


def test_every_row_is_accounted_for(tmp_path: Path, tokenizer: Path) -> None:
    one = write_json(tmp_path / "one.json", mixed_rows())
    two = write_jsonl(tmp_path / "two.jsonl", alpaca_rows(80))
    sources = json.dumps([{"path": str(one), "weight": 2.0}, {"path": str(two), "name": "second", "weight": 0.5}])
    shards = prepare(tmp_path / "out", sources=sources, tokenizer=tokenizer, heldout=5)
    report = report_of(tmp_path / "out")
    first, second = report["sources"]
    counts = {reason: item["count"] for reason, item in first["dropped"].items()}
    assert counts == {
        "empty_output": 1,
        "overlong": 1,
        "special_token_in_text": 1,
        "invalid_unicode": 1,
        "duplicate": 2,
    }
    assert first["dropped"]["duplicate"]["first_rows"] == [10, 31]
    assert first["dropped"]["special_token_in_text"]["first_rows"] == [8]
    assert set(second["dropped"]) == {"not_sampled", "duplicate"}
    for item in (first, second):
        dropped = sum(reason["count"] for reason in item["dropped"].values())
        assert item["rows_in"] == item["rows_train"] + item["rows_heldout"] + dropped
    assert first["documents_train"] == 2 * first["rows_train"]
    assert second["documents_train"] == second["rows_train"]
    assert first["rows_heldout"] + second["rows_heldout"] == 5
    found = documents(shards)
    assert len(found) == first["documents_train"] + second["documents_train"] == report["splits"]["train"]["documents"]
    assert sum(doc_id < 40 for doc_id, _, _ in found) == first["documents_train"]


def test_control_rows_that_do_not_add_up_are_a_crash() -> None:
    fate = build.SourceFate("a", "a.json", "alpaca", 1.0, rows=3, train_rows=2, train_documents=2)
    with pytest.raises(RuntimeError, match="do not add up"):
        fate.describe()
    fate.dropped["duplicate"].append(2)
    fate.describe()
    fate.train_documents = 5
    with pytest.raises(RuntimeError, match="do not add up"):
        fate.describe()


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_equal_rows_never_straddle_the_split(tmp_path: Path, tokenizer: Path, dedup: str) -> None:
    rows = alpaca_rows(60)
    source = write_json(tmp_path / "a.json", [rows[i % 60] for i in range(180)])
    sources = json.dumps([{"path": str(source), "weight": 2.0}])
    out = tmp_path / "out"
    train = prepare(out, sources=sources, tokenizer=tokenizer, heldout=0.3, dedup=dedup)
    train_rows = {tuple(ids) for _, ids, _ in documents(train)}
    heldout_rows = {tuple(ids) for _, ids, _ in documents(build.open_shards(out / "heldout"))}
    assert len(train_rows) + len(heldout_rows) == 60
    assert not train_rows & heldout_rows


def test_truncation_supervises_no_stop_token_after_a_cut(tmp_path: Path, tokenizer: Path) -> None:
    rows = alpaca_rows(3)
    rows[0]["output"] = "é" * 500
    rows[1]["instruction"] = "long " * 500
    source = write_json(tmp_path / "a.json", rows)
    out = tmp_path / "out"
    shards = prepare(out, sources=source, tokenizer=tokenizer, overlong="truncate", seq_len=512)
    found = {doc_id: (ids, labels) for doc_id, ids, labels in documents(shards)}
    ids, labels = found[0]
    supervised = [label for label in labels if label != -100]
    assert 511 <= len(ids) <= 512
    assert supervised == byte_ids("é" * (len(supervised) // 2))
    assert found[2][1][-1] == EOS, "a row that fits keeps its stop token"
    assert int(shards.num_labels.sum()) == sum(label != -100 for _, labels in found.values() for label in labels)
    [item] = report_of(out)["sources"]
    assert item["truncated"] == {"count": 1, "first_rows": [1]}
    assert item["dropped"]["overlong_prompt"]["first_rows"] == [2]


def test_only_rows_that_are_written_count_as_truncated(tmp_path: Path, tokenizer: Path) -> None:
    rows = alpaca_rows(3)
    for number in (0, 2):
        rows[number] = {"instruction": "a", "output": "long " * 500}
    source = write_json(tmp_path / "a.json", rows)
    prepare(tmp_path / "out", sources=source, tokenizer=tokenizer, overlong="truncate", seq_len=512)
    [item] = report_of(tmp_path / "out")["sources"]
    assert item["truncated"] == {"count": 1, "first_rows": [1]}
    assert item["dropped"]["duplicate"]["first_rows"] == [3]
    assert item["rows_train"] == 2


def test_a_path_that_is_no_unicode(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    source = write_json(folder / "a.json", alpaca_rows(3))
    shards = prepare(folder / "out", sources=source, tokenizer=tokenizer)
    assert shards.manifest["sources"][0]["path"] == str(source)
    assert "\\udcff" in capsys.readouterr().out
    prepare(folder / "out", sources=source, tokenizer=tokenizer)
    assert "up to date" in capsys.readouterr().out


def test_control_a_broken_encoder_leaves_no_row(
    tmp_path: Path, tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(*arguments: Any) -> list[Document]:
        return [Document(document.ids, document.num_prefix - 1) for document in encode_examples(*arguments)]

    monkeypatch.setattr(blocks, "encode_examples", shifted)
    line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / "out", workers=1))
    assert "700 span_unproved" in line


def test_the_same_job_again_is_up_to_date(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(out, sources=source, tokenizer=tokenizer, heldout=5)
    before = file_bytes(out)
    capsys.readouterr()
    prepare(out, sources=source, tokenizer=tokenizer, heldout=5, workers=2)
    assert "up to date" in capsys.readouterr().out
    assert file_bytes(out) == before
    assert "other input or settings" in refused(
        capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=out, heldout=6, seq_len=1024)
    )
    assert file_bytes(out) == before
    for name in ("report.json", "heldout"):
        (out / name).rename(tmp_path / "aside")
        assert f"{name} is missing, so it is not the whole output" in refused(
            capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=out, heldout=5, seq_len=1024)
        )
        (tmp_path / "aside").rename(out / name)
    prepare(out, sources=source, tokenizer=tokenizer, heldout=5)
    next((out / "heldout").glob("*.arrow")).unlink()
    assert "missing" in refused(
        capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=out, heldout=5, seq_len=1024)
    )


def test_an_empty_folder_is_used_and_a_foreign_one_is_not(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    prepare(tmp_path / "empty", sources=source, tokenizer=tokenizer)
    for out in (tmp_path, source):
        assert "no output of sft prep" in refused(
            capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=out)
        )


OTHER_VALUES: dict[str, Any] = {
    "seq_len": 777,
    "overlong": "truncate",
    "heldout": 3,
    "dedup": "none",
    "seed": 1,
}
SAME_KEY = {"out": "elsewhere", "workers": 3}
ONE_VALUE_ONLY = {"template", "decontaminate", "engine"}
TESTED_APART = {"sources", "tokenizer"}


def key_of(**options: Any) -> str:
    config = PrepConfig.model_validate(options)
    return build.content_key(config, load_tokenizer(config.tokenizer))


def test_the_content_key_follows_every_option() -> None:
    assert set(PrepConfig.model_fields) == {*OTHER_VALUES, *SAME_KEY, *ONE_VALUE_ONLY, *TESTED_APART}


def test_the_content_key_changes_with_what_changes_bytes(
    tmp_path: Path, tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: dict[str, Any] = {"sources": str(source), "tokenizer": str(tokenizer), "out": "out"}
    key = key_of(**base)
    for name, value in SAME_KEY.items():
        assert key_of(**{**base, name: value}) == key, name
    moved = tmp_path / "moved" / "rows.json"
    moved.parent.mkdir()
    shutil.copy(source, moved)
    assert key_of(**{**base, "sources": str(moved)}) == key
    keys = [key_of(**{**base, name: value}) for name, value in OTHER_VALUES.items()]
    for change in ({"format": "text"}, {"weight": 2.0}, {"name": "other"}):
        keys.append(key_of(**{**base, "sources": [{"path": str(source), **change}]}))
    keys.append(key_of(**{**base, "sources": f"{source},{moved}"}))
    other = make_tokenizer(tmp_path / "other", merges=[("a", "b")])
    keys.append(key_of(**{**base, "tokenizer": str(other)}))
    moved.write_text(moved.read_text().replace("Task 1", "Task !"))
    keys.append(key_of(**{**base, "sources": str(moved)}))
    with monkeypatch.context() as patch:
        patch.setattr(build.template, "ALPACA_WITH_INPUT", "other")
        keys.append(key_of(**base))
    with monkeypatch.context() as patch:
        patch.setattr(build, "CODE_VERSION", 99)
        keys.append(key_of(**base))
    assert len({key, *keys}) == len(keys) + 1


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
    "bad option": ([GOOD], {"dedup": "never"}, ["dedup", "never"]),
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


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # pyarrow's errors have no strerror
    for error in (OSError(28, "No space left on device"), OSError("Error writing bytes.\nDetail: no space")):
        monkeypatch.setattr(build, "write_json", Mock(side_effect=error))
        line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / "out", workers=1))
        assert "space" in line.split("cannot be written: ")[1].split(";")[0]
        assert line.endswith(f"; check space and permissions of {tmp_path}, or choose another folder")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json"]


@pytest.mark.parametrize("name", ["loop", "a" * 300, "rows.json/x"])
def test_an_impossible_output_folder_is_refused(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / name, workers=1))
    assert str(tmp_path)[:40] in line


def test_a_killed_worker_is_told(tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.Encoder, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    encoder = blocks.Encoder(load_tokenizer(tokenizer), 512, "drop")
    with pytest.raises(UserError, match="worker process was killed"):
        list(blocks.encode_blocks(blocks.read_blocks(0, str(source), "alpaca"), encoder, workers=2))


def test_a_worker_killed_in_the_middle_of_its_answer_is_told(
    tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = blocks.Encoder.encode

    def answer_too_large_for_the_pipe(encoder: blocks.Encoder, block: blocks.RawBlock) -> Any:
        if block.rows[0][0] == 1:
            return encode(encoder, block)
        time.sleep(0.3)  # until the first block is taken
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(10**7)

    monkeypatch.setattr(blocks.Encoder, "encode", answer_too_large_for_the_pipe)
    encoder = blocks.Encoder(load_tokenizer(tokenizer), 512, "drop")
    encoded = blocks.encode_blocks(blocks.read_blocks(0, str(source), "alpaca"), encoder, workers=2)
    assert next(encoded).row_numbers[0] == 1
    time.sleep(1.5)
    with pytest.raises(UserError, match="worker process was killed"):
        next(encoded)


def test_a_crash_in_a_worker_is_a_crash(
    tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blocks.Encoder, "encode", lambda *_: 1 / 0)
    encoder = blocks.Encoder(load_tokenizer(tokenizer), 512, "drop")
    with pytest.raises(RuntimeError, match="its traceback is above"):
        list(blocks.encode_blocks(blocks.read_blocks(0, str(source), "alpaca"), encoder, workers=2))
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_blocks_come_in_order_from_unequal_workers(
    tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    encode = blocks.Encoder.encode

    def first_is_slow(encoder: blocks.Encoder, block: blocks.RawBlock) -> blocks.Block:
        time.sleep(0.5 if block.rows[0][0] == 1 else 0)
        return encode(encoder, block)

    monkeypatch.setattr(blocks, "BLOCK_ROWS", 20)
    monkeypatch.setattr(blocks.Encoder, "encode", first_is_slow)
    encoder = blocks.Encoder(load_tokenizer(tokenizer), 4096, "drop")
    encoded = blocks.encode_blocks(blocks.read_blocks(0, str(source), "alpaca"), encoder, workers)
    assert [number for block in encoded for number in block.row_numbers.tolist()] == list(range(1, 701))
    assert multiprocessing.active_children() == []


def test_the_manifest_describes_the_build(tmp_path: Path, tokenizer: Path, source: Path) -> None:
    manifest = prepare(tmp_path / "out", sources=source, tokenizer=tokenizer).manifest
    loaded = load_tokenizer(tokenizer)
    assert manifest["sources"] == [
        {"name": "rows", "path": str(source), "format": "alpaca", "weight": 1.0, "rows": 700}
    ]
    told = manifest["tokenizer"]
    assert (told["digest"], told["vocab_size"], told["bos_id"], told["eos_id"]) == (loaded.digest, 259, BOS, EOS)
    assert all(loaded.encode(item["text"]) == item["ids"] for item in told["probe"])
    assert manifest["special_ids"] == [0, 1, 2]
    assert np.isclose(manifest["fill"], report_of(tmp_path / "out")["splits"]["train"]["fill"])
