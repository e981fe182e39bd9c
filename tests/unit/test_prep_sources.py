"""Every format, template and kind of file through the whole job: what is supervised, read back from the shards."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.template import alpaca_prompt
from sft.tokenizer import load_tokenizer
from tests.prep_support import documents, prepare, write_json, write_jsonl
from tests.tiny import BOS, EOS, make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte tokenizer with ChatML's two special tokens."""
    folder = make_tokenizer(tmp_path_factory.mktemp("chatml"))
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>"), start=259):
        described["model"]["vocab"][token] = number
        described["added_tokens"].append(
            {
                "id": number,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        )
    file.write_text(json.dumps(described))
    (folder / "chat.jinja").write_text(CHATML)
    return folder


def spans(folder: Path, out: Path, rows: Any, **options: Any) -> list[tuple[str, list[str]]]:
    """(whole text, texts of the supervised runs) of each document by its row, decoded from the shards."""
    source = {key: options.pop(key) for key in ("format", "columns", "train_on") if key in options}
    path = rows if isinstance(rows, Path) else write_jsonl(out.with_suffix(".jsonl"), rows)
    sources = json.dumps([{"path": str(path), **source}])
    loaded = load_tokenizer(folder)
    found = {}
    for doc_id, ids, labels in documents(prepare(out, sources=sources, tokenizer=folder, **options)):
        runs: list[list[int]] = [[]]
        for token, label in zip(ids, labels, strict=True):
            assert label in (-100, token)
            if label != -100:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        found[doc_id] = (loaded.decode(ids), [loaded.decode(run) for run in runs if run])
    return [found[doc_id] for doc_id in sorted(found)]


def test_plain_text_is_supervised_whole(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"text": "né"}, {"text": " "}, {"text": "b"}]
    found = spans(tokenizer, tmp_path / "out", rows, format="text")
    assert found == [("<s>né</s>", ["né</s>"]), ("<s>b</s>", ["b</s>"])]


def test_system_and_history(tmp_path: Path, tokenizer: Path) -> None:
    row = {"system": "Be brief.", "history": [["Hi", "Hello"]], "instruction": "Add", "input": "1+1", "output": "2 é"}
    text = (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
        "\n\n### Instruction:\nAdd\n\n### Input:\n1+1\n\n### Response:\n2 é</s>"
    )
    [found] = spans(tokenizer, tmp_path / "all", [row])
    assert found == (text, ["Hello</s>", "2 é</s>"])
    [found] = spans(tokenizer, tmp_path / "last", [row], train_on="last")
    assert found == (text, ["2 é</s>"])


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\n\nyou"},
    {"role": "user", "content": "Add 1+1"},
    {"role": "assistant", "content": "2 é"},
]


def test_messages_in_a_chat_template(tmp_path: Path, chatml: Path) -> None:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    options = {"format": "messages", "template": chatml / "chat.jinja"}
    [found] = spans(chatml, tmp_path / "all", [{"messages": MESSAGES}], **options)
    assert found == (f"<s>{text}", ["Hello\n\nyou<|im_end|>", "2 é<|im_end|>"])
    [found] = spans(chatml, tmp_path / "last", [{"messages": MESSAGES}], **options, train_on="last")
    assert found == (f"<s>{text}", ["2 é<|im_end|>"])


def test_the_tokenizers_own_chat_template(tmp_path: Path, chatml: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((chatml / file).read_bytes())
    (folder / "chat_template.jinja").write_text(CHATML)
    rows = [{"messages": MESSAGES}]
    own = spans(folder, tmp_path / "a", rows, format="messages", template="chat")
    assert own == spans(chatml, tmp_path / "b", rows, format="messages", template=chatml / "chat.jinja")


def test_alpaca_rows_in_a_chat_template(tmp_path: Path, chatml: Path) -> None:
    rows = [{"instruction": "Add", "input": "1+1", "output": "2"}]
    [found] = spans(chatml, tmp_path / "out", rows, template=chatml / "chat.jinja")
    text = "<s><|im_start|>user\nAdd\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert found == (text, ["2<|im_end|>"])


def test_sharegpt(tmp_path: Path, tokenizer: Path) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "left out"},
    ]
    [found] = spans(tokenizer, tmp_path / "out", [{"conversations": turns}], format="sharegpt")
    assert found == (f"<s>{alpaca_prompt('Hi')}Hello</s>", ["Hello</s>"])


def test_columns(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"question": "Q", "answer": "A"}]
    columns = {"instruction": "question", "output": "answer"}
    [found] = spans(tokenizer, tmp_path / "out", rows, columns=columns)
    assert found == (f"<s>{alpaca_prompt('Q')}A</s>", ["A</s>"])


def test_response_is_another_name_of_output(tmp_path: Path, tokenizer: Path) -> None:
    [found] = spans(tokenizer, tmp_path / "out", [{"instruction": "Q", "response": "A"}])
    assert found[1] == ["A</s>"]


ROWS = [{"instruction": f"Q{n}", "input": "", "output": f"Ä{n}"} for n in range(5)]


def as_array(path: Path) -> Path:
    return write_json(path / "rows.json", ROWS)


def as_lines_with_bom_and_crlf(path: Path) -> Path:
    file = path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in ROWS).encode())
    return file


def as_gzip(path: Path) -> Path:
    file = path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return file


def as_zstd(path: Path) -> Path:
    file = path / "rows.json.zst"
    with pa.CompressedOutputStream(str(file), "zstd") as stream:
        stream.write(json.dumps(ROWS).encode())
    return file


def as_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "rows.parquet")
    return path / "rows.parquet"


def as_folder(path: Path) -> Path:
    folder = path / "rows"
    (folder / "sub").mkdir(parents=True)
    write_json(folder / "a.json", ROWS[:2])
    write_jsonl(folder / "sub" / "b.jsonl", ROWS[2:])
    (folder / "README.md").write_text("no rows")
    return folder


def as_glob(path: Path) -> Path:
    as_folder(path)
    return path / "rows" / "**" / "*.json*"


def as_saved_dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "rows", num_shards=2)
    return path / "rows"


@pytest.mark.parametrize(
    "write",
    [
        as_array,
        as_lines_with_bom_and_crlf,
        as_gzip,
        as_zstd,
        as_parquet,
        as_folder,
        as_glob,
        as_saved_dataset,
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, tokenizer: Path, write: Any) -> None:
    found = spans(tokenizer, tmp_path / "out", write(tmp_path))
    assert found == [
        (f"<s>{alpaca_prompt(row['instruction'])}{row['output']}</s>", [f"{row['output']}</s>"]) for row in ROWS
    ]


def test_the_same_rows_give_the_same_shards_from_any_kind_of_text(tmp_path: Path, tokenizer: Path) -> None:
    made = []
    for name, write in (("array", as_array), ("gzip", as_gzip), ("zstd", as_zstd)):
        (tmp_path / name).mkdir()
        shards = prepare(tmp_path / name / "out", sources=write(tmp_path / name), tokenizer=tokenizer)
        made.append([entry["sha256"] for entry in shards.manifest["shards"]])
    assert made[0] == made[1] == made[2]
    other = prepare(tmp_path / "control", sources=write_json(tmp_path / "c.json", ROWS[::-1]), tokenizer=tokenizer)
    assert [entry["sha256"] for entry in other.manifest["shards"]] != made[0]


def test_ids_of_special_tokens_are_what_they_say(tmp_path: Path, chatml: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": MESSAGES[1:3]}])
    sources = json.dumps([{"path": str(path), "format": "messages"}])
    shards = prepare(tmp_path / "out", sources=sources, tokenizer=chatml, template=chatml / "chat.jinja")
    [(_, ids, labels)] = documents(shards)
    assert (ids[0], ids[1], ids.count(BOS), ids.count(259), ids.count(260), EOS in ids) == (BOS, 259, 1, 2, 2, False)
    assert [token for token in labels if token != -100][-1] == 260
