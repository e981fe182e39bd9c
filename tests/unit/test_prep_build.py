"""The whole job in one process: exact rows, every row accounted for, a dry run that tells what a real one does."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import blocks, build, filters
from data_prep.report import SourceFate
from data_prep.shards import open_shards
from data_prep.template import alpaca_prompt
from sft.prep_options import PrepConfig, Source
from tests.prep_jobs import reasons, report_of, tree
from tests.prep_support import alpaca_rows, byte_ids, documents, flags, prepare, refused, write_json, write_jsonl
from tests.tiny import BOS, EOS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_json(tmp_path / "rows.json", alpaca_rows(700))


def test_rows_are_exact(tmp_path: Path, tokenizer: Path) -> None:
    rows = alpaca_rows(50)
    shards = prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", rows), tokenizer=tokenizer)
    found = {doc_id: (ids, labels) for doc_id, ids, labels in documents(shards)}
    assert sorted(found) == list(range(50))
    for doc_id, row in enumerate(rows):
        prompt = [BOS, *byte_ids(alpaca_prompt(row["instruction"], row["input"]))]
        response = [*byte_ids(row["output"]), EOS]
        assert found[doc_id] == (prompt + response, [-100] * len(prompt) + response)


# Accounting


LEAKED = "which of these seven rivers of the old north runs through the quiet town of amber"
LONG = " ".join(f"word{number}" for number in range(60))
ODD_ROWS: dict[str, list[dict[str, Any]]] = {
    filters.MALFORMED: [{"instruction": "a"}, {"instruction": "a", "output": 7}, []],
    filters.EMPTY_OUTPUT: [{"instruction": "a", "output": " \n"}],
    filters.INVALID_UNICODE: [{"instruction": "a", "output": "\ud83d"}],
    filters.GARBLED: [{"instruction": "a", "output": "naÃ¯ve cafÃ© rÃ©sumÃ© dÃ©jÃ "}],
    filters.REFUSAL: [{"instruction": "a", "output": "I am sorry, no."}],
    filters.REPETITIVE: [{"instruction": "a", "output": "again and again and " * 20}],
    filters.SPECIAL_TOKEN_IN_TEXT: [{"instruction": "a", "output": "stop</s>now"}],
    filters.TOO_SHORT: [{"instruction": "a", "output": "ok"}],
    filters.TOO_LONG: [{"instruction": "a", "output": "".join(map(chr, range(0x4E00, 0x4E00 + 250)))}],
    filters.OVERLONG_PROMPT: [
        {"instruction": "".join(map(chr, range(0x4E00, 0x4E00 + 500))), "output": "fine, thanks"}
    ],
    filters.DUPLICATE: [{"instruction": "Task  0", "input": "", "output": "the very first answer of all"}],
    filters.NEAR_DUPLICATE: [{"instruction": LONG, "output": "It counts from nought to fifty-nine."}],
    filters.CONTAMINATED: [{"instruction": f"Say {LEAKED}, please", "output": "The Amber, of course."}],
    filters.TEMPLATE_REFUSES_ROW: [],
    filters.NOTHING_SUPERVISED: [],
}
"""By reason: rows of format alpaca that leave for it."""


def plain_row(name: str) -> dict[str, str]:
    return {"instruction": f"Ask {name}", "output": f"{name} is my answer"}


def test_every_row_of_every_fate_is_accounted_for(tmp_path: Path, tokenizer: Path) -> None:
    rows: list[Any] = [{"instruction": "Task 0", "output": "the very first answer of all"}]
    rows += [{"instruction": LONG, "output": "It counts from nought to sixty."}]
    expected: dict[str, list[int]] = {}
    for reason, odd in ODD_ROWS.items():
        for row in odd:
            rows += [plain_row(f"good {len(rows)}"), row]
            expected.setdefault(reason, []).append(len(rows))
    conversations = [
        [{"role": "assistant", "content": "I begin."}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "excluded", "weight": 0}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "An answer that stays."}],
    ]
    talks = [{"messages": turns, "kind": "rare"} for turns in conversations]
    talks += [
        {
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"{n} is my answer"}],
            "kind": "often",
        }
        for n in range(40)
    ]
    sources = [
        {"path": str(write_json(tmp_path / "odd.json", rows))},
        {"path": str(write_jsonl(tmp_path / "talk.jsonl", talks)), "format": "messages", "balance_by": "kind"},
        {
            "path": str(write_json(tmp_path / "half.json", [plain_row(f"half {n}") for n in range(80)])),
            "name": "half",
            "weight": 0.5,
        },
        {
            "path": str(write_json(tmp_path / "old.json", [plain_row(f"old {n}") for n in range(90)])),
            "role": "replay",
            "ratio": 0.1,
        },
    ]
    item = {"question": LEAKED, "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "rivers"}
    (tmp_path / "refusals.txt").write_text("i am sorry\n")
    options = {
        "sources": json.dumps(sources),
        "tokenizer": tokenizer,
        "on_error": "drop",
        "dedup": "near",
        "near.threshold": 0.7,
        "overlong": "truncate",
        "heldout": 4,
        "filters.refusals": tmp_path / "refusals.txt",
        "filters.max_repetition": 0.5,
        "filters.min_response_tokens": 5,
        "filters.max_response_tokens": 700,
        "decontaminate": write_jsonl(tmp_path / "items.jsonl", [item]),
    }
    shards = prepare(tmp_path / "out", **options)
    report = report_of(tmp_path / "out")
    odd, talk, half, old = report["sources"]
    assert {reason: item["first_rows"] for reason, item in odd["dropped"].items()} == expected
    assert reasons(odd) == {reason: len(odd) for reason, odd in ODD_ROWS.items() if odd}
    assert reasons(talk)[filters.TEMPLATE_REFUSES_ROW] == reasons(talk)[filters.NOTHING_SUPERVISED] == 1
    assert talk["dropped"][filters.TEMPLATE_REFUSES_ROW]["first_rows"] == [1]
    assert talk["dropped"][filters.NOTHING_SUPERVISED]["first_rows"] == [2]
    assert reasons(talk)[filters.NOT_BALANCED] >= 35
    assert 20 < reasons(half)[filters.NOT_SAMPLED] < 60
    assert reasons(old)[filters.REPLAY_NOT_NEEDED] > 0
    provoked = {reason for source in report["sources"] for reason in source["dropped"]}
    out_of_reach = {
        filters.SPAN_UNPROVED,  # see the doctored encoder below
        filters.OVERLONG,  # see the rows that are dropped for it below
        filters.TEMPLATE_CHANGES_HISTORY,  # of chat templates: test_prep_chat.py
        filters.TEMPLATE_CHANGES_TEXT,
    }
    assert provoked == set(filters.MEANING) - out_of_reach
    for item in report["sources"]:
        assert item["rows_in"] == item["rows_train"] + item["rows_heldout"] + sum(reasons(item).values())
    assert [item["rows_in"] for item in report["sources"]] == [len(rows), len(talks), 80, 90]
    assert sum(item["rows_heldout"] for item in report["sources"]) == 4
    found = documents(shards)
    assert len(found) == sum(item["documents_train"] for item in report["sources"])
    ends = np.cumsum([item["rows_in"] for item in report["sources"]])
    by_source = np.searchsorted(ends, [doc_id for doc_id, _, _ in found], side="right").tolist()
    assert [by_source.count(n) for n in range(4)] == [item["documents_train"] for item in report["sources"]]
    assert sum(len(ids) for _, ids, _ in found) == sum(item["tokens_train"] for item in report["sources"])


def test_control_rows_that_do_not_add_up_are_a_crash() -> None:
    fate = SourceFate("a", Source(path="a.json"), rows=3, train_rows=2, train_documents=2)
    with pytest.raises(RuntimeError, match="do not add up"):
        fate.describe(10)
    fate.drop(filters.DUPLICATE, np.array([2]))
    fate.describe(10)
    fate.train_documents = 5
    with pytest.raises(RuntimeError, match="do not add up"):
        fate.describe(10)


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_equal_rows_never_straddle_the_split(tmp_path: Path, tokenizer: Path, dedup: str) -> None:
    rows = alpaca_rows(60)
    source = write_json(tmp_path / "a.json", [rows[i % 60] for i in range(180)])
    sources = json.dumps([{"path": str(source), "weight": 2.0}])
    out = tmp_path / "out"
    train = prepare(out, sources=sources, tokenizer=tokenizer, heldout=0.3, dedup=dedup)
    train_rows = {tuple(ids) for _, ids, _ in documents(train)}
    heldout_rows = {tuple(ids) for _, ids, _ in documents(open_shards(out / "heldout"))}
    assert len(train_rows) + len(heldout_rows) == 60
    assert not train_rows & heldout_rows


def test_rows_longer_than_seq_len_are_dropped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = alpaca_rows(5)
    rows[1]["output"] = rows[4]["output"] = "x" * 2000
    prepare(tmp_path / "out", sources=write_json(tmp_path / "a.json", rows), tokenizer=tokenizer)
    [item] = report_of(tmp_path / "out")["sources"]
    assert item["dropped"][filters.OVERLONG]["first_rows"] == [2, 5]
    assert reasons(item) == {filters.OVERLONG: 2}


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


def test_control_a_broken_encoder_leaves_no_row(
    tmp_path: Path, tokenizer: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = blocks.encode_examples

    def doctored(*arguments: Any) -> Any:
        encoded, unproved = encode(*arguments)
        return encoded, {**unproved, **dict.fromkeys(range(len(encoded.lengths)), filters.SPAN_UNPROVED)}

    monkeypatch.setattr(blocks, "encode_examples", doctored)
    line = refused(capsys, build.main, flags(sources=source, tokenizer=tokenizer, out=tmp_path / "out", workers=1))
    assert "700 span_unproved" in line


# Dry run


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dry_run_tells_what_a_real_run_does_and_writes_nothing(
    tmp_path: Path,
    tokenizer: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    rows = alpaca_rows(700)
    rows[3]["output"] = " "
    rows[9] = rows[8]
    write_json(source, rows)
    options = {
        "sources": source,
        "tokenizer": tokenizer,
        "seq_len": 700,
        "heldout": 0.1,
        "workers": workers,
        "out": "out",
    }
    reports = []
    described = build.describe_job
    monkeypatch.setattr(build, "describe_job", lambda *a: reports.append(described(*a)) or reports[-1])
    before = tree(tmp_path)
    build.main(flags(**options, dry_run="true"))
    told = capsys.readouterr().out
    assert tree(tmp_path) == before
    build.main(flags(**options))
    assert tree(tmp_path).keys() > before.keys(), "control: a real run writes"
    planned, done = reports
    del planned["timings_s"], done["timings_s"]
    assert planned == done
    written = report_of(tmp_path / "out")
    del written["timings_s"]
    assert written == json.loads(json.dumps(planned))
    [item] = written["sources"]
    train = written["splits"]["train"]
    for value in (
        f"{train['tokens']:,}",
        f"{train['packs']:,}",
        f"{train['fill']:.2%}",
        f"{train['labels']:,}",
        *(str(train["document_tokens"][point]) for point in ("p50", "p90", "p99", "max")),
        f"{item['rows_train']:,}",
        "1 empty_output",
        "1 duplicate",
        f"p50 {train['document_tokens']['p50']}",
        f"a real run needs {written['disk_bytes']['output'] / 2**20:,.1f} MiB for the output",
        f"{written['disk_bytes']['while_running'] / 2**20:,.1f} MiB while it runs, and about ",
        "dry run: nothing written in ",
        written["content_key"],
    ):
        assert value in told, value
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert 0.8 < size / written["disk_bytes"]["output"] < 1.1


def test_a_dry_run_looks_at_no_output_folder(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    options = {"sources": source, "tokenizer": tokenizer, "seq_len": 700, "out": foreign}
    build.main(flags(**options, dry_run="true"))
    assert tree(tmp_path) == before
    assert "no output of sft prep" in refused(capsys, build.main, flags(**options))


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


def test_every_reason_has_a_meaning() -> None:
    named = {value for name, value in vars(filters).items() if name.isupper() and isinstance(value, str)}
    assert named == set(filters.MEANING)
    assert PrepConfig.model_fields["on_error"].default == "raise"
