"""Every public layout gives the same items; every bad row is named. Run: pytest tests/unit/test_eval_data.py"""

import csv
import json
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.eval.tasks import hellaswag, mmlu
from sft.eval.tasks.data import load_hellaswag, load_mmlu

LETTERS = "ABCD"
ROWS = {
    "anatomy": [
        ('A comma, a "quote" and\na newline?', ["None", " edge ", "NaN", "1,5"], 0),
        ("Größe \u2028 你好\u00a0?", ["", "null", "b\nc", "🙂"], 3),
        ("question", ["A", "B", "C", "D"], 2),
    ],
    "island_trade": [(f"Question {number}?", ["w", "x", "y", "z"], number % 4) for number in range(4)],
}
HELLASWAG = [
    {
        "ind": number,
        "activity_label": "Fishing",
        "ctx_a": f"Cast {number}. [title] Wait",
        "ctx_b": "they SIT",
        "ctx": "not used",
        "endings": ["a", "b\u2028c", "ü", " d "],
        "source_id": f"wikihow~{number // 2}",
        "split": "val",
        "split_type": "indomain",
        "label": number % 4,
    }
    for number in range(5)
]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def table(path, rows, header, letters):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if header:
            writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
        writer.writerows([question, *choices, LETTERS[gold] if letters else gold] for question, choices, gold in rows)


def hub_rows(subject, rows):
    return [{"question": text, "subject": subject, "choices": choices, "answer": gold} for text, choices, gold in rows]


def write_hub_jsonl(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test", "validation"):
            lines(folder / "cais" / "mmlu" / subject / f"{split}.jsonl", hub_rows(subject, rows))


def write_hub_parquet(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test"):
            parquet(folder / "mmlu" / subject / f"{split}-00000-of-00001.parquet", hub_rows(subject, rows))
    parquet(folder / "mmlu" / "auxiliary_train" / "train-00000-of-00001.parquet", hub_rows("", ROWS["anatomy"]))


def write_hub_all(folder: Path):
    everything = [row for subject, rows in ROWS.items() for row in hub_rows(subject, rows)]
    interleaved = everything[::2] + everything[1::2]
    for subject, rows in ROWS.items():  # keep the order inside each subject
        places = [place for place, row in enumerate(interleaved) if row["subject"] == subject]
        for place, row in zip(places, hub_rows(subject, rows), strict=True):
            interleaved[place] = row
    for split in ("dev", "test"):
        parquet(folder / "all" / f"{split}-00000-of-00002.parquet", interleaved[:3])
        parquet(folder / "all" / f"{split}-00001-of-00002.parquet", interleaved[3:])


def write_hub_twice(folder: Path):
    write_hub_parquet(folder)
    write_hub_all(folder / "mmlu")


def write_hendrycks(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test", "val"):
            table(folder / "data" / split / f"{subject}_{split}.csv", rows, header=False, letters=True)
    table(folder / "data" / "auxiliary_train" / "mc_test.csv", ROWS["anatomy"], header=False, letters=True)


def write_csv_with_header(folder: Path):
    for subject, rows in ROWS.items():
        for split in ("dev", "test"):
            table(folder / split / f"{subject}_{split}.csv", rows, header=True, letters=False)


@pytest.mark.parametrize(
    "write",
    [write_hub_jsonl, write_hub_parquet, write_hub_all, write_hub_twice, write_hendrycks, write_csv_with_header],
)
def test_every_mmlu_layout_gives_the_same_items(tmp_path, write):
    write(tmp_path)
    subjects, source = load_mmlu(tmp_path)
    assert [subject.name for subject in subjects] == ["anatomy", "island_trade"]
    for subject in subjects:
        expected = [mmlu.MmluRow(question, tuple(choices), gold) for question, choices, gold in ROWS[subject.name]]
        assert subject.test == expected
        assert subject.dev == expected
    assert str(tmp_path) in source


def test_the_hub_wins_over_csv_and_says_so(tmp_path):
    write_hendrycks(tmp_path / "a")
    write_hub_jsonl(tmp_path / "b")
    _, source = load_mmlu(tmp_path)
    assert source == f"MMLU from {tmp_path}/b/cais/mmlu (jsonl), not from {tmp_path}/a/data (csv)"


@pytest.mark.parametrize("write", [lines, parquet])
@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("Rowan/hellaswag/{}train", "Rowan/hellaswag/{}validation"),
        ("Rowan/hellaswag/data/{}train-00000-of-00001", "Rowan/hellaswag/data/{}validation-00000-of-00001"),
        ("{}hellaswag_train", "{}hellaswag_val"),
    ],
)
@pytest.mark.parametrize("label_type", [str, int])
def test_every_hellaswag_layout_gives_the_same_items(tmp_path, write, train, validation, label_type):
    rows = [row | {"label": label_type(row["label"])} for row in HELLASWAG]
    suffix = ".jsonl" if write is lines else ".parquet"
    write(tmp_path / f"{train.format('')}{suffix}", rows)
    write(tmp_path / f"{validation.format('')}{suffix}", rows[:3])
    lines(
        tmp_path / "hellaswag_test.jsonl",
        [{key: value for key, value in row.items() if key != "label"} for row in rows],
    )
    validated, pool, _ = load_hellaswag(tmp_path, need_train=True)
    assert len(pool) == 5
    items = hellaswag.build_items(validated, [], 0, None)
    assert [item.gold for item in items] == [0, 1, 2]
    assert items[0].context == "Fishing: Cast 0.. Wait They sit"
    assert items[0].choices == ("a", "b\u2028c", "ü", "d")
    assert [item.cluster for item in items] == ["wikihow~0", "wikihow~0", "wikihow~1"]
    assert load_hellaswag(tmp_path, need_train=False)[1] == []


BAD_MMLU = [
    ({"choices": ["a", "b", "c"]}, r"row 1: field 'choices' is \['a', 'b', 'c'\]; need 4 texts"),
    ({"choices": ["a", "b", "c", None]}, r"row 1: field 'choices'"),
    ({"answer": 4}, r"row 1: field 'answer' is 4; need a letter A to D or a number 0 to 3"),
    ({"answer": "E"}, r"row 1: field 'answer' is 'E'"),
    ({"answer": True}, r"row 1: field 'answer' is True"),
    ({"question": None}, r"row 1: field 'question' is missing; need a text"),
]


@pytest.mark.parametrize(("change", "message"), BAD_MMLU)
def test_bad_mmlu_rows_are_named(tmp_path, change, message):
    rows = hub_rows("anatomy", ROWS["anatomy"])
    lines(tmp_path / "anatomy" / "dev.jsonl", rows)
    lines(tmp_path / "anatomy" / "test.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match=r"anatomy/test.jsonl " + message):
        load_mmlu(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "field 'label' is ''; need a number 0 to 3"),
        ({"ctx_b": None}, "field 'ctx_b' is missing; need a text"),
        ({"endings": ["a", "b"]}, r"field 'endings' is \['a', 'b'\]; need 4 texts"),
    ],
)
def test_bad_hellaswag_rows_are_named(tmp_path, change, message):
    lines(tmp_path / "hellaswag_val.jsonl", [HELLASWAG[0], HELLASWAG[1] | change])
    with pytest.raises(UserError, match=f"hellaswag_val.jsonl row 1: {message}"):
        load_hellaswag(tmp_path, need_train=False)


def test_bad_csv_is_named(tmp_path):
    write_hendrycks(tmp_path)
    file = tmp_path / "data" / "test" / "anatomy_test.csv"
    file.write_text('"Q, 1?",a,b,c,d,A\nQ2,a,b,c,A\n')
    with pytest.raises(UserError, match=r"anatomy_test.csv row 1 \(ends at line 2\): 5 columns, need 6"):
        load_mmlu(tmp_path)
    file.write_bytes("größe,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"anatomy_test.csv: not UTF-8 at byte"):
        load_mmlu(tmp_path)
    file.write_text('Q,a,b,c,d,"A\n')
    with pytest.raises(UserError, match=r"anatomy_test.csv line 1: not valid CSV"):
        load_mmlu(tmp_path)


def test_torn_files_are_named_and_never_skipped(tmp_path):
    write_hub_parquet(tmp_path)
    file = tmp_path / "mmlu" / "anatomy" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet: not a whole parquet file"):
        load_mmlu(tmp_path)


def test_torn_jsonl_is_named(tmp_path):
    write_hub_jsonl(tmp_path)
    file = tmp_path / "cais" / "mmlu" / "anatomy" / "test.jsonl"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UserError, match=r"anatomy/test.jsonl line 3: not valid JSON"):
        load_mmlu(tmp_path)
    file.write_text("")
    with pytest.raises(UserError, match=r"MMLU anatomy has dev rows but no test rows"):
        load_mmlu(tmp_path)


def test_missing_data_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"--data .*/absent: no such folder"):
        load_mmlu(tmp_path / "absent")
    lines(tmp_path / "test.jsonl", [{"text": "something else"}])
    (tmp_path / "dev.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"holds no MMLU test split"):
        load_mmlu(tmp_path)
    with pytest.raises(UserError, match=r"holds no HellaSwag validation split"):
        load_hellaswag(tmp_path, need_train=False)
