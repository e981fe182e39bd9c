"""`sft prep verify`: a good folder passes, and each way to damage one is told by exactly the check that is made for it.

Digests and counts are put right after every damage, so that no other check can see it.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_prep import contracts, verify
from data_prep.contracts import Contract, check_batch
from sft.cli import dispatch
from sft.errors import run_command
from tests import tiny
from tests.prep_support import prepare, write_json
from tests.tiny import BOS, EOS, make_tokenizer

Rows = list[dict[str, Any]]
PLAIN = 70
"""An id of text."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one of them used twice, with held-out rows; a pack holds several documents."""
    base = tmp_path_factory.mktemp("verify")
    rows = [
        {
            "instruction": f"Task {number}",
            "input": "",
            "output": f"answer {number} " + "é🙂x"[number % 3] * number,
        }
        for number in range(40)
    ]
    first, second = write_json(base / "a.json", rows[:25]), write_json(base / "b.json", rows[25:])
    config = {
        "sources": [{"path": str(first), "weight": 2.0}, {"path": str(second)}],
        "tokenizer": str(make_tokenizer(base / "tokenizer")),
        "heldout": 8,
    }
    prepare(base / "out", config=write_json(base / "prep.yaml", config))
    return base / "out"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def read_rows(split: Path) -> Rows:
    with pa.memory_map(str(shard(split))) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all().to_pylist()


def write_rows(split: Path, rows: Rows, per_shard: int = 10**9) -> None:
    """Write the shards anew, `per_shard` packs in each, and put digests, totals and fill right."""
    schema = schema_of(split)
    for old in split.glob("*.arrow"):
        old.unlink()
    parts = [rows[first : first + per_shard] for first in range(0, len(rows), per_shard)]
    entries = []
    for number, part in enumerate(parts):
        path = split / f"data-{number:05d}-of-{len(parts):05d}.arrow"
        batch = pa.RecordBatch.from_pylist(part, schema=schema)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)
        entries.append({"file": path.name, "packs": len(part), **digest(path)})
    edit(split / "state.json", lambda state: state.update(_data_files=[{"filename": e["file"]} for e in entries]))
    edit(split / "manifest.json", lambda manifest: manifest.update(shards=entries))


def recount(folder: Path) -> None:
    """Put the manifest's and the report's totals right for what the training split holds now."""
    rows = read_rows(folder / "train")
    tokens = sum(len(row["input_ids"]) for row in rows)
    totals = {"packs": len(rows), "documents": sum(len(row["seq_lens"]) for row in rows), "tokens": tokens}
    totals["labels"] = sum(row["num_labels"] for row in rows)
    fill = tokens / (len(rows) * json.loads((folder / "train/manifest.json").read_text())["seq_len"])
    edit(folder / "train/manifest.json", lambda manifest: manifest.update(totals=totals, fill=fill))
    edit(folder / "report.json", lambda report: report["splits"]["train"].update(**totals, fill=fill))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_manifests(folder: Path, change: Callable[[Any], object]) -> None:
    for split in ("train", "heldout"):
        edit(folder / split / "manifest.json", change)


def edit_rows(folder: Path, change: Callable[[Rows], object], split: str = "train") -> None:
    rows = read_rows(folder / split)
    change(rows)
    write_rows(folder / split, rows)


def shard(split: Path) -> Path:
    (path,) = split.glob("*.arrow")
    return path


def schema_of(split: Path) -> pa.Schema:
    with pa.memory_map(str(sorted(split.glob("*.arrow"))[0])) as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def digest(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def problems(folder: Path) -> list[tuple[str, str]]:
    return [tuple(problem) for problem in verify.verify(folder, None)[0].problems]


def only(found: list[tuple[str, str]], check: str, part: str) -> None:
    assert {name for name, _ in found} == {check}, found
    assert part in found[0][1]
    assert all("\n" not in text for _, text in found)


def first_prompt(row: dict[str, Any]) -> int:
    """Position of an unsupervised token of text in the second document of a pack."""
    start = row["seq_lens"][0]
    assert row["labels"][start + 5] == -100
    return start + 5


# Arrays: damage to the rows of the training split


def set_id(value: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[1]["input_ids"][first_prompt(rows[1])] = value

    return change


def no_bos(rows: Rows) -> None:
    start = rows[1]["seq_lens"][0]
    assert rows[1]["input_ids"][start] == BOS
    rows[1]["input_ids"][start] = PLAIN


def no_stop(rows: Rows) -> None:
    end = rows[1]["seq_lens"][0] - 1
    assert rows[1]["input_ids"][end] == rows[1]["labels"][end] == EOS
    rows[1]["input_ids"][end] = rows[1]["labels"][end] = PLAIN


def unsupervised_stop(rows: Rows) -> None:
    """The model would never learn to stop."""
    rows[1]["labels"][rows[1]["seq_lens"][0] - 1] = -100
    rows[1]["num_labels"] -= 1


def hole_in_response(rows: Rows) -> None:
    """A second run of labels: the first one now ends without a stop token."""
    rows[1]["labels"][rows[1]["seq_lens"][0] - 4] = -100
    rows[1]["num_labels"] -= 1


def wrong_label(rows: Rows) -> None:
    position = rows[1]["seq_lens"][0] - 3
    assert rows[1]["labels"][position] != -100
    rows[1]["labels"][position] += 1


def no_target(rows: Rows) -> None:
    end = rows[1]["seq_lens"][0]
    rows[1]["num_labels"] -= sum(label != -100 for label in rows[1]["labels"][:end])
    rows[1]["labels"][:end] = [-100] * end


def shift(rows: Rows, name: str, by: int) -> None:
    rows[1][name][0] += by


def empty_document(rows: Rows) -> None:
    for name, value in (("seq_lens", 0), ("doc_ids", 0), ("source_ids", 0)):
        rows[1][name].insert(0, value)


def empty_pack(rows: Rows) -> None:
    rows.append({name: [] for name in rows[0]} | {"num_labels": 0})


def join_packs(rows: Rows) -> None:
    second = rows.pop(1)
    for name, value in second.items():
        rows[0][name] += value


def swap_sources(rows: Rows) -> None:
    """Two documents, so that the number of documents of each source stays."""
    for wanted in (0, 1):
        row = next(row for row in rows if wanted in row["source_ids"])
        row["source_ids"][row["source_ids"].index(wanted)] = 7 + wanted
    for row in rows:
        row["source_ids"] = [{7: 1, 8: 0}.get(source, source) for source in row["source_ids"]]


def places_of(rows: Rows, source_id: int) -> list[tuple[dict[str, Any], int]]:
    """(pack, number of the document in it) of every document of a source."""
    return [(row, number) for row in rows for number, source in enumerate(row["source_ids"]) if source == source_id]


def same_document(rows: Rows) -> None:
    """A document of source b, which is used once, takes the id of another one."""
    (first, at), (second, to) = places_of(rows, source_id=1)[:2]
    first["doc_ids"][at] = second["doc_ids"][to]


def drop_a_copy(rows: Rows) -> None:
    """Of a document of source a, which is used twice, one copy is given another id of that source: 1 and 3 copies."""
    ids = [doc for row in rows for doc, source in zip(row["doc_ids"], row["source_ids"], strict=True) if source == 0]
    row = next(row for row in rows if ids[0] in row["doc_ids"])
    row["doc_ids"][row["doc_ids"].index(ids[0])] = next(doc for doc in ids if doc != ids[0])


ARRAYS = [
    (set_id(PLAIN + 1), None, ""),
    (set_id(259), "vocabulary", "has an id outside the vocabulary of 259"),
    (set_id(-1), "vocabulary", "has an id outside the vocabulary of 259"),
    (set_id(BOS), "BOS", "holds BOS (id 1) more than once"),
    (no_bos, "BOS", "does not start with BOS (id 1)"),
    (no_stop, "stop tokens", "has a supervised run without a stop token at its end"),
    (unsupervised_stop, "stop tokens", "has a supervised run without a stop token at its end"),
    (hole_in_response, "stop tokens", "has a supervised run without a stop token at its end"),
    (wrong_label, "labels", "has a label that is neither -100 nor its input id"),
    (no_target, "labels", "has no target"),
    (lambda rows: shift(rows, "seq_lens", 1), "packs", "pack 1: seq_lens sum to"),
    (empty_document, "packs", "pack 1 has a document without tokens"),
    (empty_pack, "packs", "has no document"),
    (join_packs, "packs", "pack 0: "),
    (lambda rows: rows[1]["doc_ids"].pop(), "packs", "lists of doc_ids and seq_lens"),
    (lambda rows: rows[1]["labels"].pop(), "packs", "lists of labels and input_ids"),
    (lambda rows: rows[1]["labels"].__setitem__(0, None), "packs", "column labels holds null"),
    (lambda rows: rows[1].update(input_ids=None), "packs", "column input_ids holds null"),
    (lambda rows: rows[1]["source_ids"].__setitem__(0, 2), "sources", "source_ids hold 2, the manifest has 2 sources"),
    (lambda rows: rows[1]["source_ids"].__setitem__(0, -1), "sources", "source_ids hold -1"),
    (swap_sources, "sources", "is no row of source"),
    (lambda rows: rows[1]["doc_ids"].__setitem__(0, -5), "document ids", "doc_ids hold -5"),
    (same_document, "document ids", "of source b is there 2 times, not 1"),
    (drop_a_copy, "document ids", "of source a is there"),
]


@pytest.mark.parametrize("tokens_at_a_time", [1 << 18, 900])
@pytest.mark.parametrize(("damage", "check", "part"), ARRAYS)
def test_damage_to_arrays(
    folder: Path,
    damage: Callable[[Rows], None],
    check: str | None,
    part: str,
    tokens_at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contracts, "TOKENS_AT_A_TIME", tokens_at_a_time)
    edit_rows(folder, damage)
    if all(None not in row.values() for row in read_rows(folder / "train")):
        recount(folder)
    if check is None:
        assert problems(folder) == []
    else:
        only(problems(folder), check, part)


def test_num_labels_are_recomputed(folder: Path) -> None:
    edit_rows(folder, lambda rows: rows[1].update(num_labels=rows[1]["num_labels"] + 1))
    only(problems(folder), "labels", "pack 1: num_labels is")


def test_a_document_in_both_splits(folder: Path) -> None:
    heldout = read_rows(folder / "heldout")[0]
    source = heldout["source_ids"][0]
    rows = read_rows(folder / "train")
    taken = next(
        doc
        for row in rows
        for doc, its_source in zip(row["doc_ids"], row["source_ids"], strict=True)
        if its_source == source
    )
    edit_rows(folder, lambda rows: rows[0]["doc_ids"].__setitem__(0, taken), "heldout")
    only(problems(folder), "splits", f"doc {taken} is in train and in heldout")


def test_a_heldout_document_is_there_once(folder: Path) -> None:
    def twice(rows: Rows) -> None:
        (first, at), (second, to) = places_of(rows, source_id=0)[:2]
        first["doc_ids"][at] = second["doc_ids"][to]

    edit_rows(folder, twice, "heldout")
    only(problems(folder), "document ids", "of source a is there 2 times, not 1")


def test_replay_has_no_fixed_number_of_copies(folder: Path) -> None:
    edit_rows(folder, drop_a_copy)
    only(problems(folder), "document ids", "of source a is there")
    edit_manifests(folder, lambda manifest: manifest["sources"][0].update(role="replay"))
    assert problems(folder) == []


# Files, manifests, report, tokenizer


def change_byte(folder: Path) -> None:
    """An id of a prompt becomes another id: only the digest can tell."""
    before = (folder / "train/manifest.json").read_bytes()
    edit_rows(folder, set_id(PLAIN + 1))
    (folder / "train/manifest.json").write_bytes(before)


def append_bytes(folder: Path) -> None:
    with open(shard(folder / "train"), "ab") as file:
        file.write(b"more")


def cut_file(folder: Path) -> None:
    path = shard(folder / "train")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_column(folder: Path) -> None:
    path = shard(folder / "train")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all().drop_columns(["doc_ids"])
    with pa.OSFile(str(path) + "x", "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    Path(f"{path}x").replace(path)
    edit(folder / "train/manifest.json", lambda manifest: manifest["shards"][0].update(digest(path)))


def manifest_edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "train/manifest.json", change)


def report_edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "report.json", change)


def total_edit(name: str, by: float) -> Callable[[Path], None]:
    """In the manifest and in the report, so that only the arrays disagree."""

    def change(folder: Path) -> None:
        def add(holder: Any) -> None:
            holder[name] += by

        edit(folder / "train/manifest.json", lambda value: add(value if name == "fill" else value["totals"]))
        edit(folder / "report.json", lambda value: add(value["splits"]["train"]))

    return change


def move_rows(folder: Path, frm: str, to: str) -> None:
    """The sum over the fates of rows stays what it was."""

    def change(report: Any) -> None:
        report["sources"][1][frm] -= 1
        report["sources"][1][to] += 1

    edit(folder / "report.json", change)


def all_tokenizers(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit_manifests(folder, lambda manifest: change(manifest["tokenizer"]))


FILES = [
    (change_byte, "files", "its sha256 is not the manifest's"),
    (append_bytes, "files", "bytes, the manifest says"),
    (cut_file, "files", "not a readable Arrow file"),
    (drop_column, "files", "are not those of packed shards"),
    (lambda folder: shard(folder / "train").unlink(), "files", "missing, the manifest lists it"),
    (
        lambda folder: (folder / "train/data-9.arrow").write_bytes(b""),
        "files",
        "data-9.arrow: no shard of the manifest",
    ),
    (lambda folder: (folder / "train/state.json").unlink(), "files", "state.json: datasets cannot read it"),
    (
        lambda folder: edit(folder / "train/state.json", lambda state: state["_data_files"].append({"filename": "x"})),
        "files",
        "state.json: lists other files",
    ),
    (
        lambda folder: edit(folder / "train/dataset_info.json", lambda info: info["features"].pop("labels")),
        "files",
        "dataset_info.json: lists other columns",
    ),
    (
        lambda folder: (folder / "train/dataset_info.json").write_text("{"),
        "files",
        "dataset_info.json: datasets cannot",
    ),
    (manifest_edit(lambda manifest: manifest.update(schema_version=99)), "manifest", "schema_version 99"),
    (manifest_edit(lambda manifest: manifest.pop("special_ids")), "manifest", "'special_ids': field required"),
    (manifest_edit(lambda manifest: manifest["shards"][0].update(packs="x")), "manifest", "'shards.0.packs'"),
    (manifest_edit(lambda manifest: manifest["shards"][0].update(packs=99)), "totals", "the manifest says 99"),
    (total_edit("packs", 1), "totals", "packs, its shards hold"),
    (total_edit("documents", 1), "totals", "documents, its shards hold"),
    (total_edit("tokens", -1), "totals", "tokens, its shards hold"),
    (total_edit("labels", 1), "totals", "labels, its shards hold"),
    (total_edit("fill", 0.001), "totals", "fill"),
    (lambda folder: shutil.rmtree(folder / "heldout"), "manifest", "heldout: no such folder"),
    (lambda folder: shutil.rmtree(folder / "train"), "manifest", "train: no such folder"),
    (lambda folder: (folder / "report.json").unlink(), "report", "report.json: missing"),
    (lambda folder: (folder / "report.json").write_text("{}"), "report", "'content_key': field required"),
    (lambda folder: (folder / "report.json").write_text("{"), "report", "report.json: "),
    (report_edit(lambda report: report["splits"]["train"].update(labels=1)), "report", "says 1 labels of train"),
    (report_edit(lambda report: report["splits"].pop("heldout")), "report", "does not know the split heldout"),
    (report_edit(lambda report: report.update(content_key="0" * 64)), "report", "of another build"),
    (
        report_edit(lambda report: report["sources"][0]["dropped"].update(overlong={"count": 2, "first_rows": []})),
        "report",
        "source a: 25 rows in, but 27 out",
    ),
    (report_edit(lambda report: report["sources"].reverse()), "report", "lists other sources or rows"),
    (report_edit(lambda report: report["sources"][0].update(documents_train=3)), "report", "and 3 documents"),
    (lambda folder: move_rows(folder, "rows_train", "rows_heldout"), "report", "rows and"),
    (all_tokenizers(lambda made: made.update(digest="0" * 64)), "tokenizer", "another digest"),
    (all_tokenizers(lambda made: made["probe"][1]["ids"].append(5)), "tokenizer", "gives other ids than the shards"),
    (all_tokenizers(lambda made: made.update(vocab_size=260)), "tokenizer", "its vocab_size is 259"),
    (lambda folder: edit_manifests(folder, lambda made: made["special_ids"].append(9)), "tokenizer", "its special ids"),
]


@pytest.mark.parametrize(("damage", "check", "part"), FILES)
def test_damage_to_files(folder: Path, damage: Callable[[Path], None], check: str, part: str) -> None:
    damage(folder)
    only(problems(folder), check, part)


def test_splits_of_two_builds(folder: Path) -> None:
    edit(folder / "heldout/manifest.json", lambda manifest: manifest.update(content_key="0" * 64))
    found = problems(folder)
    assert {check for check, _ in found} == {"splits", "report"}  # the report cannot be of both
    assert "their content keys differ" in found[0][1]


def test_a_good_folder_of_several_shards(folder: Path) -> None:
    """Packs are numbered through all shards, and every problem of every shard is told."""
    rows = read_rows(folder / "train")
    write_rows(folder / "train", rows, per_shard=4)
    assert problems(folder) == []
    for index in (1, 6):
        set_id(259)(rows[index : index + 1] * 2)
        no_bos(rows[index : index + 1] * 2)
    write_rows(folder / "train", rows, per_shard=4)
    found = problems(folder)
    assert [check for check, _ in found] == ["vocabulary", "BOS"] * 2
    assert ["in pack 1 has" in found[0][1], "in pack 6 has" in found[2][1]] == [True, True]


def test_truncated_documents_may_end_without_a_stop_token(folder: Path) -> None:
    """As many of them as the report counts, and at their end only."""
    edit_rows(folder, no_stop)
    only(problems(folder), "stop tokens", "without a stop token")
    edit_manifests(folder, lambda manifest: manifest["settings"].update(overlong="truncate"))
    only(problems(folder), "stop tokens", "1 documents end without a stop token, but report.json counts 0")
    edit(folder / "report.json", lambda report: report["sources"][0].update(truncated={"count": 1, "first_rows": [1]}))
    assert problems(folder) == []
    edit_rows(folder, hole_in_response)
    recount(folder)
    only(problems(folder), "stop tokens", "has a supervised run without a stop token")


# The rules for conversations, on single batches


def batch_of(schema: pa.Schema, *documents: tuple[list[int], list[int]]) -> pa.RecordBatch:
    """One pack of (ids, 1 where supervised)."""
    labels = [[i if mark else -100 for i, mark in zip(ids, marks, strict=True)] for ids, marks in documents]
    row = {
        "input_ids": [i for ids, _ in documents for i in ids],
        "labels": [label for each in labels for label in each],
        "seq_lens": [len(ids) for ids, _ in documents],
        "num_labels": sum(label != -100 for each in labels for label in each[1:]),
        "doc_ids": list(range(len(documents))),
        "source_ids": [0] * len(documents),
    }
    return pa.RecordBatch.from_pylist([row], schema=schema)


@pytest.mark.parametrize(
    ("ids", "marks", "check"),
    [
        ([1, 50, 51, 2, 52, 53, 2], [0, 0, 1, 1, 0, 1, 1], None),
        ([1, 50, 51, 9, 52, 53, 2], [0, 0, 1, 1, 0, 1, 1], None),  # an end-of-turn token
        ([1, 50, 51, 2, 1, 53, 2], [0, 0, 1, 1, 0, 1, 1], None),  # BOS again before the next turn
        ([1, 1, 50, 51, 2], [0, 0, 0, 1, 1], "BOS"),
        ([1, 50, 1, 51, 2], [0, 0, 0, 1, 1], "BOS"),
        ([1, 50, 51, 60, 52, 53, 2], [0, 0, 1, 1, 0, 1, 1], "stop tokens"),
        ([1, 50, 51, 2, 52, 53, 1], [0, 0, 1, 1, 0, 1, 1], "BOS, stop tokens"),  # BOS stops nothing
        ([1, 50, 51, 2], [1, 1, 1, 1], None),
    ],
)
def test_conversations(folder: Path, ids: list[int], marks: list[int], check: str | None) -> None:
    contract = Contract(
        seq_len=32, vocab_size=100, bos_id=1, stop_ids=frozenset({2, 9}), special_ids=frozenset({1, 2, 9}),
        repeats_bos=True, truncates=False, rows_of_sources=(5,),
    )  # fmt: skip
    plain = ([1, 40, 41, 2], [0, 0, 1, 1])
    batch = batch_of(schema_of(folder / "train"), plain, (ids, marks), plain)
    counted, found = check_batch(batch, contract, 0, "here")
    assert ", ".join(sorted({problem.check for problem in found})) == (check or "")
    assert all("doc 1 in pack 0" in problem.text for problem in found)
    assert counted is not None
    assert counted.labels == 4 + sum(marks[1:])
    assert np.array_equal(counted.doc_ids, [0, 1, 2])


def test_a_build_of_conversations(tmp_path: Path) -> None:
    """As Llama-2's own template has it: BOS before every turn of the user, a stop token after every answer."""
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    turns = [("user", "ask"), ("assistant", "answer")] * 2
    rows = [{"messages": [{"role": role, "content": f"{word} {n}"} for role, word in turns]} for n in range(9)]
    config = {
        "sources": [{"path": str(write_json(tmp_path / "a.json", rows)), "format": "messages"}],
        "template": str(tmp_path / "chat.jinja"),
        "tokenizer": str(make_tokenizer(tmp_path / "tokenizer")),
    }
    prepare(tmp_path / "out", config=write_json(tmp_path / "prep.yaml", config))
    assert problems(tmp_path / "out") == []

    def no_first_stop(rows: Rows) -> None:
        at = rows[0]["labels"].index(EOS)
        assert rows[0]["input_ids"][at + 1] == BOS
        rows[0]["input_ids"][at] = rows[0]["labels"][at] = PLAIN

    edit_rows(tmp_path / "out", no_first_stop)
    found = problems(tmp_path / "out")
    assert [check for check, _ in found] == ["stop tokens", "BOS"]  # BOS may follow a stop token only
    assert "doc 0 in pack 0" in found[0][1]


def test_a_bos_that_is_also_the_stop_token_says_nothing(folder: Path) -> None:
    """As where a tokenizer uses one token for both; it must still start every document."""
    contract = Contract(
        seq_len=32, vocab_size=100, bos_id=2, stop_ids=frozenset({2}), special_ids=frozenset({2}),
        repeats_bos=False, truncates=False, rows_of_sources=(5,),
    )  # fmt: skip
    schema = schema_of(folder / "train")
    assert check_batch(batch_of(schema, ([2, 50, 51, 2], [0, 0, 1, 1])), contract, 0, "here")[1] == []
    (problem,) = check_batch(batch_of(schema, ([49, 50, 51, 2], [0, 0, 1, 1])), contract, 0, "here")[1]
    assert problem == ("BOS", "here: doc 0 in pack 0 does not start with BOS (id 2)")


# The command


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run_command(dispatch, ["prep", "verify", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, said = run(capsys, folder)
    assert (code, said) == (0, "")
    assert all(f"│ {check} " in shown for check in verify.CHECKS)
    assert "not checked" not in shown
    assert shown.endswith("holds what it promises\n")
    code, shown, _ = run(capsys, folder / "train")
    assert (code, shown.count("not checked: ")) == (0, 1)
    assert "not checked: splits: one split was given" in shown
    edit_rows(folder, set_id(259))
    code, shown, said = run(capsys, folder)
    assert code == 2
    assert "holds what it promises" not in shown
    assert "1 problem" in shown
    assert said.startswith(f"error: shards {folder}: 1 problem")
    assert len(said.splitlines()) == 2


def test_what_cannot_be_checked_is_said(folder: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifests(folder, lambda manifest: manifest["tokenizer"].update(path="nowhere"))
    code, shown, _ = run(capsys, folder)
    assert code == 0
    assert "not checked: tokenizer: nowhere is not here; give --tokenizer" in shown
    code, shown, _ = run(capsys, folder, "--tokenizer", good.parent / "tokenizer")
    assert (code, "not checked" in shown) == (0, False)
    other = make_tokenizer(folder / "other", merges=[("a", "b")])
    code, shown, said = run(capsys, folder, "--tokenizer", other)
    assert (code, "another digest" in said) == (2, True)
    code, shown, said = run(capsys, folder, "--tokenizer", folder / "none")
    assert (code, "no such folder" in said) == (2, True)
    shard(folder / "train").unlink()
    _, shown, _ = run(capsys, folder)
    assert "not checked: totals: not in full, because of what could not be read" in shown


def test_a_split_alone_needs_no_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = folder.parent / "elsewhere" / "train"
    shutil.copytree(folder / "train", moved)
    code, shown, _ = run(capsys, moved)
    assert (code, "not checked: report: there is no" in shown) == (0, True)
    report = json.loads((folder / "report.json").read_text())
    (moved.parent / "report.json").write_text(json.dumps({**report, "content_key": "0" * 64}))
    code, shown, _ = run(capsys, moved)
    assert (code, "is of another build" in shown) == (0, True)


def test_many_problems_are_capped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(50):
        (folder / f"train/old-{number}.arrow").write_bytes(b"")
    code, _, said = run(capsys, folder)
    assert code == 2
    assert len(said.splitlines()) == 1 + verify.MOST_LINES + 1
    assert said.endswith("and 10 problems more\n")


def test_bad_requests_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in run(capsys, folder / "none")[2]
    (folder / "empty").mkdir()
    assert "no manifest.json" in run(capsys, folder / "empty")[2]
    assert "did you mean --tokenizer?" in run(capsys, folder, "--tokeniser", "x")[2]


def test_the_module_form(folder: Path) -> None:
    done = tiny.run([sys.executable, "-m", "data_prep.verify", str(folder)])
    assert (done.returncode, done.stderr) == (0, "")
    append_bytes(folder)
    done = tiny.run([sys.executable, "-m", "data_prep.verify", str(folder)])
    assert done.returncode == 2
    assert "bytes, the manifest says" in done.stderr
