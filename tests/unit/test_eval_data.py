"""Every public layout gives the same items; every bad row is named. Run: pytest tests/unit/test_eval_data.py"""

import csv
import json
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.eval.tasks import hellaswag, mmlu
from sft.eval.tasks.data import describe_subjects, load_hellaswag, load_mmlu
from tests.eval_layouts import (
    HELLASWAG,
    ROWS,
    hub_rows,
    lines,
    parquet,
    table,
    write_csv_with_header,
    write_hendrycks,
    write_hub_all,
    write_hub_jsonl,
    write_hub_parquet,
    write_hub_twice,
)


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
    counts = (
        "2 subjects (1 not among MMLU's own, first island_trade), 7 test rows; the public release has 57 and 14,042"
    )
    assert source == f"MMLU from {tmp_path}/b/cais/mmlu (jsonl), not from {tmp_path}/a/data (csv): {counts}"


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


def test_the_rows_own_subject_is_used(tmp_path):
    """One file per split, the subject in a column: the folder's name is none."""
    for split in ("dev", "test"):
        rows = hub_rows("virology", ROWS["island_trade"]) + hub_rows("anatomy", ROWS["anatomy"])
        lines(tmp_path / "mmlu" / f"{split}.jsonl", rows)
    subjects, source = load_mmlu(tmp_path)
    assert [(subject.name, len(subject.dev), len(subject.test)) for subject in subjects] == [
        ("anatomy", 3, 3),
        ("virology", 4, 4),
    ]
    assert source.endswith(": 2 subjects, 7 test rows; the public release has 57 and 14,042")
    assert "about anatomy." in mmlu.build_items(subjects[0], 0, None)[0].context


def test_a_folder_without_subject_column_gives_its_name_even_as_a_dot(tmp_path, monkeypatch):
    for split in ("dev", "test"):
        rows = [{key: row[key] for key in ("question", "choices", "answer")} for row in hub_rows("", ROWS["anatomy"])]
        lines(tmp_path / "anatomy" / f"{split}.jsonl", rows)
    monkeypatch.chdir(tmp_path / "anatomy")
    subjects, source = load_mmlu(Path())
    assert [subject.name for subject in subjects] == ["anatomy"]
    assert source == f"MMLU from {tmp_path} (jsonl): 1 subject, 3 test rows; the public release has 57 and 14,042"


def test_a_subject_that_contradicts_the_folder_is_refused(tmp_path):
    lines(tmp_path / "anatomy" / "test.jsonl", hub_rows("virology", ROWS["anatomy"]))
    with pytest.raises(UserError, match=r"test.jsonl row 0: field 'subject' is 'virology', but .* says 'anatomy'"):
        load_mmlu(tmp_path)
    lines(tmp_path / "anatomy" / "test.jsonl", hub_rows("anatomy", ROWS["anatomy"]))
    assert [subject.name for subject in load_mmlu(tmp_path)[0]] == ["anatomy"]


def test_two_folders_with_one_subject_are_refused(tmp_path):
    for folder in ("first", "second"):
        lines(tmp_path / folder / "test.jsonl", hub_rows("anatomy", ROWS["anatomy"]))
    with pytest.raises(UserError, match=r"first/test.jsonl and .*second/test.jsonl: both hold test rows of anatomy"):
        load_mmlu(tmp_path)


def test_all_fills_in_the_subjects_that_have_no_folder(tmp_path):
    for split in ("dev", "test"):
        rows = [row for subject, group in ROWS.items() for row in hub_rows(subject, group)]
        lines(tmp_path / "all" / f"{split}.jsonl", rows)
        lines(tmp_path / "anatomy" / f"{split}.jsonl", hub_rows("anatomy", ROWS["anatomy"][:2]))
    subjects, _ = load_mmlu(tmp_path)
    assert [(subject.name, len(subject.test)) for subject in subjects] == [("anatomy", 2), ("island_trade", 4)]


@pytest.mark.parametrize("name", ["test-00000-of-00001", "anatomy_test"])
def test_two_tables_of_one_mmlu_split_are_refused(tmp_path, name):
    write_hub_jsonl(tmp_path)
    folder = tmp_path / "cais" / "mmlu"
    copy = folder / f"{name}.jsonl" if "_" in name else folder / "anatomy" / f"{name}.jsonl"
    copy.write_bytes((folder / "anatomy" / "test.jsonl").read_bytes())
    with pytest.raises(UserError, match=rf"(?=.*anatomy/test\.jsonl).*{name}\.jsonl.*: two tables for one split"):
        load_mmlu(tmp_path)


def test_two_tables_of_one_hellaswag_split_are_refused(tmp_path):
    for name in ("validation", "hellaswag_val"):
        lines(tmp_path / f"{name}.jsonl", HELLASWAG)
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl and .*/validation.jsonl: two tables for one split"):
        load_hellaswag(tmp_path, need_train=False)


@pytest.mark.parametrize("present", [(1,), (0, 2), (0, 1, 3)])
def test_missing_shards_are_refused(tmp_path, present):
    for shard in present:
        lines(tmp_path / f"validation-{shard:05d}-of-00003.jsonl", HELLASWAG)
    with pytest.raises(UserError, match=r"validation-0000.-of-00003.jsonl: rows of shards .* need those of 0 to 2"):
        load_hellaswag(tmp_path, need_train=False)


def test_shards_are_read_in_order(tmp_path):
    for shard in (2, 0, 1):
        lines(tmp_path / f"validation-{shard:05d}-of-00003.jsonl", HELLASWAG[shard : shard + 1])
    validation, _, source = load_hellaswag(tmp_path, need_train=False)
    assert [row.label for row in validation] == [0, 1, 2]
    assert source.endswith(": 3 validation rows (the public release has 10,042)")


def test_folders_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for data in (tmp_path / "loop", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"--data .*give the folder that holds MMLU and HellaSwag"):
            load_mmlu(data)


BAD_MMLU = [
    ({"choices": ["a", "b", "c"]}, r"row 1: field 'choices' is \['a', 'b', 'c'\]; need 4 texts"),
    ({"choices": ["a", "b", "c", None]}, r"row 1: field 'choices'"),
    ({"answer": 4}, r"row 1: field 'answer' is 4; need a letter A to D or a number 0 to 3"),
    ({"answer": "E"}, r"row 1: field 'answer' is 'E'"),
    ({"answer": True}, r"row 1: field 'answer' is True"),
    ({"question": None}, r"row 1: field 'question' is missing; need a text"),
    ({"question": "a \ud800"}, r"row 1: field 'question' holds '\\ud800' at character 2, half of a surrogate pair"),
    ({"choices": ["a", "b", "c", "\ud800"]}, r"row 1: field 'choices' holds '\\ud800' at character 0"),
    ({"subject": 7}, r"row 1: field 'subject' is 7; need a text"),
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
        ({"label": ""}, "has no label, as in the public test split, .*; use the validation split"),
        ({"label": None}, "has no label, as in the public test split"),
        ({"label": "4"}, "field 'label' is '4'; need a number 0 to 3"),
        ({"label": -1}, "field 'label' is -1; need a number 0 to 3"),
        ({"ctx_b": None}, "field 'ctx_b' is missing; need a text"),
        ({"endings": ["a", "b"]}, r"field 'endings' is \['a', 'b'\]; need 4 texts"),
        ({"ctx_a": "\udfff"}, r"field 'ctx_a' holds '\\udfff'"),
        ({"endings": ["a", "b", "c", "\ud800"]}, r"field 'endings' holds '\\ud800'"),
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
    file.unlink()
    with pytest.raises(UserError, match=r"MMLU anatomy has dev rows but no test rows"):
        load_mmlu(tmp_path)


def test_jsonl_that_json_loads_would_let_through_is_named(tmp_path):
    file = tmp_path / "anatomy" / "test.jsonl"
    row = json.dumps(hub_rows("anatomy", ROWS["anatomy"][2:])[0])
    lines(file, [])
    file.write_text(row[:-1] + ', "answer": 1}\n')
    with pytest.raises(UserError, match=r"test.jsonl line 1: not valid JSON: key 'answer' is given twice"):
        load_mmlu(tmp_path)
    file.write_text('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match=r"test.jsonl line 1: JSON nested too deeply"):
        load_mmlu(tmp_path)
    file.write_text(row + "\n")
    assert len(load_mmlu(tmp_path)[0]) == 1


def test_long_csv_fields_are_read_and_endless_ones_named(tmp_path):
    """The limit of csv is the process's: another reader may have lowered it before."""
    file = tmp_path / "test" / "anatomy_test.csv"
    for length in (200_000, 11_000_000):
        csv.field_size_limit(131_072)
        table(file, [("x" * length, ["a", "b", "c", "d"], 0)], header=False, letters=True)
        if length < 10_000_000:
            assert len(load_mmlu(tmp_path)[0][0].test[0].question) == length
        else:
            with pytest.raises(UserError, match=r"anatomy_test.csv line 1: not valid CSV: field larger than"):
                load_mmlu(tmp_path)


def test_missing_data_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"--data .*/absent: no such folder"):
        load_mmlu(tmp_path / "absent")
    lines(tmp_path / "test.jsonl", [{"text": "something else"}])
    (tmp_path / "dev.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"holds no MMLU test split.* see docs/evaluation-data.md"):
        load_mmlu(tmp_path)
    with pytest.raises(UserError, match=r"holds no HellaSwag validation split"):
        load_hellaswag(tmp_path, need_train=False)


@pytest.mark.parametrize("write", [write_hub_jsonl, write_hub_parquet, write_hendrycks, write_csv_with_header])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_an_empty_split_is_named_and_never_left_out(tmp_path, write, split):
    write(tmp_path)
    [file] = [path for path in tmp_path.rglob(f"*{split}*.*") if "anatomy" in f"{path.parent.name}/{path.name}"]
    if file.suffix == ".parquet":
        parquet_head(file)
    else:
        file.write_text("question,A,B,C,D,answer\n" if file.suffix == ".csv" and split == "dev" else "\n")
    with pytest.raises(UserError, match=rf"{file.name}: no rows; complete the file"):
        load_mmlu(tmp_path)


def parquet_head(file: Path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, 0), file)


def test_an_empty_hellaswag_split_or_a_missing_one_is_named(tmp_path):
    lines(tmp_path / "validation.jsonl", HELLASWAG)
    with pytest.raises(UserError, match=r"has no train split, which --shots.hellaswag above 0 draws from"):
        load_hellaswag(tmp_path, need_train=True)
    lines(tmp_path / "train.jsonl", [])
    with pytest.raises(UserError, match=r"train.jsonl: no rows"):
        load_hellaswag(tmp_path, need_train=True)
    assert len(load_hellaswag(tmp_path, need_train=False)[0]) == 5
    lines(tmp_path / "validation.jsonl", [])
    with pytest.raises(UserError, match=r"holds no HellaSwag validation split"):
        load_hellaswag(tmp_path, need_train=False)


def test_empty_shards_are_no_empty_split(tmp_path):
    for shard in range(2):
        lines(tmp_path / f"validation-{shard:05d}-of-00002.jsonl", HELLASWAG if shard else [])
    assert len(load_hellaswag(tmp_path, need_train=False)[0]) == 5


def test_the_line_says_when_the_set_is_not_the_public_one(tmp_path):
    lines(tmp_path / "validation.jsonl", HELLASWAG)
    lines(tmp_path / "train.jsonl", HELLASWAG)
    line = load_hellaswag(tmp_path, need_train=True)[2]
    assert line.endswith(
        ": 5 validation rows (the public release has 10,042), 5 train rows (the public release has 39,905: "
        "the solved examples, and so the prompts, differ from published ones)"
    )


def test_the_public_sizes_are_told_as_such(tmp_path):
    rows = [HELLASWAG[0] | {"ctx_a": f"Row {number}."} for number in range(39_905)]
    parquet(tmp_path / "train.parquet", rows)
    parquet(tmp_path / "validation.parquet", rows[:10_042])
    assert load_hellaswag(tmp_path, need_train=True)[2].endswith(": 10,042 validation rows, 39,905 train rows")
    assert describe_subjects([name for names in mmlu.CATEGORIES.values() for name in names], 14_042) == (
        "57 subjects, 14,042 test rows"
    )


def repeated(count: int, copies: int):
    rows = [(f"Question {number}?", ["w", "x", "y", "z"], number % 4) for number in range(count)]
    return rows + rows[3 : 3 + copies]


def test_a_few_duplicate_items_are_told_and_many_refused(tmp_path):
    file = tmp_path / "us_foreign_policy" / "test.jsonl"
    lines(file, hub_rows("us_foreign_policy", repeated(98, 2)))
    line = load_mmlu(tmp_path)[1]
    assert line.endswith(f"; 2 items stand there twice, first: {file} row 3 and {file} row 98")
    lines(file, hub_rows("us_foreign_policy", repeated(99, 1)))
    assert load_mmlu(tmp_path)[1].endswith(f"; 1 item stands there twice: {file} row 3 and {file} row 99")
    lines(file, hub_rows("us_foreign_policy", repeated(97, 3)))
    with pytest.raises(UserError, match=r"test.jsonl row 3 and .*test.jsonl row 97: the same item twice, 3 such rows"):
        load_mmlu(tmp_path)


def test_equal_questions_with_other_choices_or_answers_are_no_duplicates(tmp_path):
    rows = [
        ("Which?", ["w", "x", "y", "z"], 0),
        ("Which?", ["w", "x", "y", "z"], 1),
        ("Which?", ["x", "w", "y", "z"], 0),
    ]
    lines(tmp_path / "anatomy" / "test.jsonl", hub_rows("anatomy", rows))
    assert "twice" not in load_mmlu(tmp_path)[1]


def test_duplicates_across_shards_are_found_whatever_their_source(tmp_path):
    """HellaSwag: what is scored decides, not the row's number or video; train rows may repeat."""
    for shard in range(2):
        rows = [row | {"ind": 10 * shard + number, "source_id": f"s{shard}"} for number, row in enumerate(HELLASWAG)]
        lines(tmp_path / f"validation-{shard:05d}-of-00002.jsonl", rows)
    with pytest.raises(UserError, match=r"00000-of-00002.jsonl row 0 and .*00001-of-00002.jsonl row 0: the same item"):
        load_hellaswag(tmp_path, need_train=False)
    other = tmp_path / "other"
    lines(other / "validation.jsonl", HELLASWAG)
    lines(other / "train.jsonl", HELLASWAG * 3)
    assert len(load_hellaswag(other, need_train=True)[1]) == 15
