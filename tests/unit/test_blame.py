"""`sft blame`: the rows it names in the source files are the ones that the step's tokens were made of."""

import gzip
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import readers
from data_prep.shards import Shards, open_shards
from data_prep.template import alpaca_prompt
from sft import blame, blame_texts, checkpoint
from sft.blame_report import Document
from sft.config import RunConfig
from sft.order import FILLER, step_rows
from sft.settings import to_yaml
from tests.prep_support import alpaca_rows, byte_ids, documents, prepare, refused, write_json, write_jsonl
from tests.tiny import BOS, EOS, REPO, make_tokenizer
from tests.tiny import run as run_command

ROWS_PER_STEP = 4
DOCUMENT = re.compile(r"^([! ]) doc (\d+) · (\S+) · (.+) (row|line) (\d+) · (\d+) tokens · (\d+) labels(.*)$")


class Shown(NamedTuple):
    """A document as it was printed."""

    pack: int
    marked: bool
    doc_id: int
    source: str
    file: str
    number: int
    tokens: int
    labels: int
    by: str
    text: str


def make_run(folder: Path, train: Path, **options: Any) -> Path:
    """A run folder as training begins it: the resolved options, and a start event with the identity."""
    config = {
        "model": {"path": str(folder.parent / "tokenizer")},
        "data": {"train": str(train), "seed": 3},
        "batch": {"rows_per_step": ROWS_PER_STEP},
        "train": {"epochs": 2},
        "out": str(folder),
        **options,
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(RunConfig.model_validate(config)))
    key = json.loads((train / "manifest.json").read_text())["content_key"]
    write_jsonl(folder / "events.jsonl", [{"event": "start", "step": 0, "identity": {"data_key": key}}])
    return folder


def blamed(capsys: pytest.CaptureFixture[str], run: Path, step: int) -> str:
    capsys.readouterr()
    blame.main([str(run), "--step", str(step)])
    return capsys.readouterr().out


def shown_documents(output: str) -> list[Shown]:
    lines = output.splitlines()
    found, pack = [], -1
    for line, text in zip(lines, [*lines[1:], ""], strict=True):
        if header := re.match(r"^row \d+ · pack (\d+)$", line):
            pack = int(header[1])
        if match := DOCUMENT.match(line):
            mark, doc_id, source, file, _, number, tokens, labels, by = match.groups()
            numbers = (int(number), int(tokens), int(labels))
            found.append(Shown(pack, mark == "!", int(doc_id), source, file, *numbers, by, text.strip()))
    return found


def read_row(file: str, number: int) -> Any:
    """Row `number` of a file, from 1, read without the code under test."""
    if file.endswith(".parquet"):
        return pq.read_table(file).to_pylist()[number - 1]
    data = Path(file).read_bytes()
    text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
    return json.loads(text.split("\n")[number - 1]) if ".jsonl" in file else json.loads(text)[number - 1]


def trained_ids(row: Any) -> list[int]:
    """The tokens of a row, from the definition of the formats."""
    if "text" in row:
        return [BOS, *byte_ids(row["text"]), EOS]
    if "messages" in row:
        _, asked, answered = (turn["content"] for turn in row["messages"])
        return [BOS, *byte_ids(f"Be brief.\n\n### Instruction:\n{asked}\n\n### Response:\n{answered}"), EOS]
    output = row["answer"] if "answer" in row else row["output"]
    return [BOS, *byte_ids(alpaca_prompt(row["instruction"], row.get("input", "")) + output), EOS]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sources, of which each loses some rows: one used twice, one sampled, one held out in part, all filtered."""
    base = tmp_path_factory.mktemp("blame")
    make_tokenizer(base / "tokenizer")
    rows = alpaca_rows(30, seed=1)
    rows[4]["output"] = "spoilt \ufffd"
    write_jsonl(base / "twice.jsonl", [*rows[:9], {"instruction": "no output"}, *rows[9:], rows[3]])
    chats = [
        [("system", "Be brief."), ("user", f"Question {number}"), ("assistant", f"Answer {number} " + "y" * number)]
        for number in range(24)
    ]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (base / "chats").mkdir()
    write_json(base / "chats" / "a.json", chats[:10])
    with gzip.open(base / "chats" / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(chat) + "\n" for chat in chats[10:]))
    texts = [{"text": f"Plain text number {number}. " * (1 + number % 4)} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(texts), base / "texts.parquet", row_group_size=6)
    other = [{"instruction": f"Name {number}", "answer": f"It is {number}."} for number in range(40)]
    write_json(base / "other.json", other)
    config = {
        "sources": [
            {"path": str(base / "twice.jsonl"), "weight": 2.0},
            {"path": str(base / "chats"), "format": "messages"},
            {"path": str(base / "texts.parquet"), "format": "text"},
            {"path": str(base / "other.json"), "weight": 0.5, "columns": {"output": "answer"}},
        ],
        "tokenizer": str(base / "tokenizer"),
        "heldout": 6,
        "on_error": "drop",
    }
    prepare(base / "out", config=write_json(base / "prep.yaml", config))
    return base


@pytest.fixture
def run(job: Path, tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer")
    return make_run(tmp_path / "run", job / "out" / "train")


def ids_of_pack(shards: Shards, pack: int) -> list[tuple[int, list[int]]]:
    """(doc_id, tokens) of each document of a pack."""
    found = shards.pack(pack)
    ends = found.seq_lens.cumsum()
    cuts = zip(found.doc_ids.tolist(), (ends - found.seq_lens).tolist(), ends.tolist(), strict=True)
    return [(doc_id, found.input_ids[start:end].tolist()) for doc_id, start, end in cuts]


def test_every_row_named_is_the_row_trained_on(job: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_shards(job / "out" / "train")
    epoch_steps = -(-len(shards) // ROWS_PER_STEP)
    assert len(shards) % ROWS_PER_STEP, "the last step of an epoch must have filler rows"
    sources: set[str] = set()
    neighbours = checked = 0
    orders = []
    for step in range(1, 2 * epoch_steps + 1):
        output = blamed(capsys, run, step)
        assert "NOTE" not in output
        assert "WARNING" not in output
        found = shown_documents(output)
        packs = [int(pack) for pack in step_rows(3, step - 1, len(shards), ROWS_PER_STEP) if pack != FILLER]
        assert (f"{ROWS_PER_STEP - len(packs)} filler rows" in output) == (len(packs) < ROWS_PER_STEP)
        expected = [(pack, *document) for pack in packs for document in ids_of_pack(shards, pack)]
        assert [(one.pack, one.doc_id) for one in found] == [entry[:2] for entry in expected]
        for one, (_, _, ids) in zip(found, expected, strict=True):
            row = read_row(one.file, one.number)
            assert trained_ids(row) == ids
            assert one.tokens == len(ids)
            response = row["messages"][2]["content"] if "messages" in row else list(row.values())[-1]
            assert one.text.split(" → ")[-1].rstrip("…") == " ".join(response.split())[:70]
            checked += 1
            neighbours += one.number > 1 and trained_ids_or_none(one.file, one.number - 1) == ids
        assert sum(one.labels for one in found) == sum(int(shards.num_labels[pack]) for pack in packs)
        sources |= {one.source for one in found}
        orders.append(packs)
    assert sorted(sum(orders[:epoch_steps], [])) == sorted(sum(orders[epoch_steps:], [])) == list(range(len(shards)))
    assert orders[:epoch_steps] != orders[epoch_steps:]
    assert sources == {"twice", "chats", "texts", "other"}
    assert checked == 2 * len(documents(shards))
    assert neighbours == 0, "the comparison would not notice a number that is off by one"


def trained_ids_or_none(file: str, number: int) -> list[int] | None:
    try:
        return trained_ids(read_row(file, number))
    except KeyError:
        return None


def test_the_step_is_placed_and_its_sources_are_summed(
    job: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = open_shards(job / "out" / "train")
    epoch_steps = -(-len(shards) // ROWS_PER_STEP)
    output = blamed(capsys, run, epoch_steps + 1)
    assert f"step {epoch_steps + 1} of {2 * epoch_steps}: epoch 2, step 1 of {epoch_steps} in it" in output
    found = shown_documents(output)
    for name in {one.source for one in found}:
        mine = [one for one in found if one.source == name]
        row = next(line for line in output.splitlines() if line.startswith("│ ") and f" {name} " in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:4] == [f"{n:,}" for n in (len(mine), sum(m.tokens for m in mine), sum(m.labels for m in mine))]


def own_copy(job: Path, tmp_path: Path, rows: list[dict[str, str]], **source: Any) -> tuple[Path, Path]:
    """(source file, run) of one step over `rows`, which a test may spoil."""
    file = write_json(tmp_path / "rows.json", rows)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    entry = {"path": str(file), **source}
    config = {"sources": [entry], "tokenizer": str(tokenizer), "filters": {"garbled": False}}
    prepare(tmp_path / "out", config=write_json(tmp_path / "prep.yaml", config))
    return file, make_run(tmp_path / "run", tmp_path / "out" / "train", batch={"rows_per_step": 1000})


SHORT = [{"instruction": f"Say {number}", "input": "", "output": f"word{number} word"} for number in range(8)]


def test_rows_that_changed_are_shown_from_their_tokens(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = own_copy(job, tmp_path, SHORT)
    control = blamed(capsys, run, 1)
    assert "NOTE" not in control
    assert "(tokens)" not in control
    write_json(file, [{**row, "output": "word3"} if row["instruction"] == "Say 3" else row for row in SHORT])
    output = blamed(capsys, run, 1)
    assert f"NOTE: 1 documents are not what their files have now (first: doc 3, {file} row 4)" in output
    by_id = {one.doc_id: one.text for one in shown_documents(output)}
    assert by_id[3].startswith("(tokens) …")
    assert by_id[3].endswith("### Instruction: Say 3 ### Response: → word3 word")
    assert by_id[2] == "Say 2 → word2 word"
    write_json(file, [{"instruction": "new", "input": "", "output": "first"}, *SHORT])
    assert "NOTE: 8 documents are not what their files have now" in blamed(capsys, run, 1)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda file: file.unlink(), "rows: source {file}: no such file"),
        (lambda file: file.write_text("[{]"), "rows: source {file}: not valid JSON"),
        (lambda file: write_json(file, SHORT[:5]), "rows: {file} has become shorter: 3 of 8 rows are not in it"),
    ],
)
def test_a_source_that_cannot_be_read_is_told_and_its_tokens_are_shown(
    spoil: Any, told: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = own_copy(job, tmp_path, SHORT)
    spoil(file)
    output = blamed(capsys, run, 1)
    (note,) = [line for line in output.splitlines() if line.startswith("NOTE")]
    assert note.startswith(f"NOTE: {told.format(file=file)}")
    assert "row 7 of the source" in output
    assert "### Instruction: Say 6 ### Response: → word6 word" in output


def test_a_relative_path_counts_from_where_prep_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(Path("rows.json"), SHORT)
    prepare(Path("out"), sources="rows.json", tokenizer=make_tokenizer(Path("tokenizer")))
    run = make_run(Path("run"), Path("out/train"), model={"path": "tokenizer"})
    assert "NOTE" not in blamed(capsys, run, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    line = refused(capsys, blame.main, [str(tmp_path / "run"), "--step", "1"])
    assert f"its shards out/train are not there from {elsewhere}; start this where the training was started" in line
    (elsewhere / "out").symlink_to(tmp_path / "out")
    output = blamed(capsys, tmp_path / "run", 1)
    assert "NOTE: rows: source rows.json: no such file" in output
    assert "(a path from where sft prep was started)" in output
    assert "NOTE: no tokenizer here is tokenizer: rows are not compared with tokens" in output
    assert "(tokens) ids 1 " in output
    (tmp_path / "run" / "export").symlink_to(tmp_path / "tokenizer")
    assert "→ word6 word" in blamed(capsys, tmp_path / "run", 1)


def test_logs_are_shown_compared_and_mark_documents(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = own_copy(job, tmp_path, SHORT)
    assert "metrics.jsonl has no line of this step" in blamed(capsys, run, 1)
    shards = open_shards(tmp_path / "out" / "train")
    counts = {"tokens": int(shards.num_tokens.sum()), "label_tokens": int(shards.num_labels.sum())}
    line = {"step": 1, "loss": None, "grad_norm": 7.25, **counts, "loss_by_source": {"rows": 1.23456}, "mfu": None}
    metrics = [json.dumps(line), json.dumps({**line, "step": 11, "grad_norm": 99.5}), '{"step": 1, "lo']
    (run / "metrics.jsonl").write_text("\n".join(metrics))
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "skip", "step": 1, "reason": "loss is not finite", "doc_ids": [2, 5]}) + "\n")
        events.write(json.dumps({"event": "save", "step": 2}) + "\n")
    output = blamed(capsys, run, 1)
    assert "WARNING" not in output
    assert f"metrics: loss null · grad_norm 7.25 · tokens {counts['tokens']}" in output
    assert "99.5" not in output
    assert "event skip: reason loss is not finite · 2 documents named" in output
    assert "event save" not in output
    assert {one.doc_id for one in shown_documents(output) if one.marked} == {2, 5}
    assert all(one.by == " · skip" for one in shown_documents(output) if one.marked)
    assert next(text for text in output.splitlines() if text.startswith("│ rows")).endswith("1.2346 │")
    (run / "metrics.jsonl").write_text(json.dumps({**line, "label_tokens": 1}))
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "spike", "step": 1, "doc_ids": [3, 800]}) + "\n")
    output = blamed(capsys, run, 1)
    assert "WARNING: metrics.jsonl counted 1 label_tokens" in output
    assert "WARNING: events.jsonl names 1 documents that are not in this step: 800" in output


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: object) -> str:
        return refused(capsys, blame.main, [str(word) for word in argv])

    total = int(re.match(r"step 1 of (\d+)", blamed(capsys, run, 1))[1])
    assert f"--step {total + 1}: {run} has {total} steps; give one of 1 to {total}" in error(run, "--step", total + 1)
    blamed(capsys, run, total)
    assert "is no run folder (no config.yaml)" in error(tmp_path, "--step", 1)
    assert "--step is missing" in error(run)
    assert "--step" in error(run, "--step", 0)
    config = (run / "config.yaml").read_text()
    train = re.search(r"train: (/\S+)", config)[1]
    (run / "config.yaml").write_text(config.replace(train, str(tmp_path / "gone")))
    assert f"its shards {tmp_path / 'gone'} are not there; put them back" in error(run, "--step", 1)


def test_other_shards_than_those_of_the_run_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"event": "start", "step": 0, "identity": {"data_key": "f00" * 20}}
    write_jsonl(run / "events.jsonl", [other])
    line = refused(capsys, blame.main, [str(run), "--step", "1"])
    assert "was trained on shards of content key f00f00f00f00" in line
    (run / "events.jsonl").unlink()
    saved = run / "checkpoints" / "step-00000002"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "newest_complete", lambda folder: saved if folder == saved.parent else None)
        patched.setattr(
            checkpoint, "read_meta", lambda folder: {"identity": other["identity"]} if folder == saved else {}
        )
        assert "content key f00f00f00f00" in refused(capsys, blame.main, [str(run), "--step", "1"])
    assert f"NOTE: {run} has not recorded its data" in blamed(capsys, run, 1)


@pytest.mark.parametrize("format", ["json", "jsonl.zst", "parquet", "datasets", "glob"])
def test_rows_of_any_kind_of_source(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = alpaca_rows(60)
    if format == "json":
        path = write_json(tmp_path / "a.json", rows)
    elif format == "jsonl.zst":
        path = tmp_path / "a.jsonl.zst"
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    elif format == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif format == "datasets":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=3)
    else:
        write_jsonl(tmp_path / "b.jsonl", rows[20:])
        write_json(tmp_path / "a.json", rows[:20])
        path = tmp_path / "?.json*"
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1500)
    decoded: list[int] = []
    decode = blame.block_rows
    monkeypatch.setattr(blame, "block_rows", lambda block: decoded.append(block.first_row) or decode(block))
    everything = blame.fetch_rows(str(path), set(range(60)))
    assert [everything[row].value for row in range(60)] == rows
    blocks = len(decoded)
    decoded.clear()
    wanted = {0, 19, 20, 59}
    found = blame.fetch_rows(str(path), wanted)
    assert {row: found[row].value for row in wanted} == {row: rows[row] for row in wanted}
    assert 0 < len(decoded) < blocks, "blocks without a row of the step need not be decoded"
    assert set(blame.fetch_rows(str(path), {59, 60})) == {59}


@pytest.mark.parametrize(
    ("texts", "document", "learned", "is_cut", "response"),
    [
        (["ask", "reply"], "Below: ask Then: reply", "reply", False, 1),
        (["ask", "reply"], "Below: ask Then: reply more", "reply more", False, None),
        (["ask", "reply"], "Below: other Then: reply", "reply", False, None),
        (["ask", "reply long"], "Below: ask Then: reply", "reply", False, None),
        (["ask", "reply long"], "Below: ask Then: reply", "reply", True, 1),
        (["reply", "ask"], "Below: ask Then: reply end", "reply", False, None),
        (["a", "b", "c", "d"], "x a y b", "b", False, 1),
        (["a", "b", "c", "d"], "x a y b z e f d", "d", False, None),
        (["a  e\u0301", " r\n"], "a \u00e9 r", "r", False, 1),
        ([], "a r", "r", False, None),
    ],
)
def test_a_row_is_compared_with_its_document(
    texts: list[str], document: str, learned: str, is_cut: bool, response: int | None
) -> None:
    assert blame_texts.find_response(texts, document, learned, is_cut) == response


def test_the_first_token_of_a_document_is_no_label() -> None:
    labels = np.array([5, 5, -100, 5], dtype=np.int32)
    assert Document(1, 0, 0, 0, 0, ids=labels, labels=labels).num_labels == 2


def test_cut_documents_and_chat_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] | trim }}"
        "{{ '</s>' if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    chats = [
        [
            ("system", "Shared."),
            ("user", f"One {n}"),
            ("assistant", f" Two {n} "),
            ("user", "Three"),
            ("assistant", "4" * n),
        ]
        for n in range(1, 200, 9)
    ]
    rows = [
        {"conversations": [{"from": who, "value": text} for who, text in [*chat, ("user", "end")]]} for chat in chats
    ]
    source = {"path": str(write_jsonl(tmp_path / "chats.jsonl", rows)), "format": "sharegpt"}
    options = {"tokenizer": str(make_tokenizer(tmp_path / "tokenizer")), "template": str(template)}
    config = {"sources": [source], **options, "overlong": "truncate"}
    shards = prepare(tmp_path / "out", config=write_json(tmp_path / "prep.yaml", config), seq_len=128)
    lengths = {doc_id: len(ids) for doc_id, ids, _ in documents(shards)}
    assert 128 in lengths.values(), "no document was cut"
    assert min(lengths.values()) < 128, "every document was cut"
    run = make_run(tmp_path / "run", tmp_path / "out" / "train", batch={"rows_per_step": 1000})
    output = blamed(capsys, run, 1)
    assert "NOTE" not in output
    texts = {one.doc_id: one.text for one in shown_documents(output)}
    assert texts[0] == "One 1 Two 1 Three → 4"
    assert len(texts) == len(rows)


def test_through_a_pipe_that_closes_and_in_ascii(tmp_path: Path) -> None:
    rows = [{"instruction": "\u001b[31mé", "input": "", "output": f"ß{number}"} for number in range(2000)]
    _, run = own_copy(tmp_path, tmp_path, rows)
    command = f"{sys.executable} -m sft.blame {run} --step 1"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    whole = run_command(shlex.split(command), environment=environment, cwd=REPO)
    assert whole.returncode == 0, whole.stderr
    assert "\\x1b[31m\\xe9 \\u2192 \\xdf1999" in whole.stdout
    assert "\x1b" not in whole.stdout
    piped = ["bash", "-c", f"set -o pipefail; {command} | head -1"]
    cut = run_command(piped, environment=environment, cwd=REPO)
    assert (cut.returncode, cut.stderr) == (0, "")
    assert len(cut.stdout.splitlines()) == 1
