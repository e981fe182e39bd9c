"""Earlier scores are read whole or refused in one line. Run: pytest tests/unit/test_eval_earlier.py"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sft.errors import UserError
from sft.eval.earlier import read_scored
from sft.eval.results import Scores, make_records
from tests.eval_data_support import DATE, lls_of, make_items, results_of, write_lines, write_samples, write_sft
from tests.tiny import read_jsonl

BOTH = ("mmlu", "hellaswag")


def expected_records(task: str, significand_bits: int):
    items = make_items(task)
    lls = lls_of(items)
    prompts = [f"Before.\n\n{item.question}" for item in items]
    return make_records(items, prompts, Scores(lls, lls > -12), significand_bits)


def edit_row(path: Path, number: int, **changes) -> None:
    rows = read_jsonl(path)
    rows[number] = {key: value for key, value in (rows[number] | changes).items() if value is not ...}
    write_lines(path, rows)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# what a folder is


# results of `sft eval`


def test_sft_results_come_back_as_they_were_written(tmp_path):
    scored = read_scored(write_sft(tmp_path), BOTH)
    for task in BOTH:
        items = make_items(task)
        lls = lls_of(items)
        prompts = [item.context for item in items]
        assert scored.records[task] == make_records(items, prompts, Scores(lls, lls > -12), 24)
    assert scored.header["dtype"] == "float32"
    assert scored.header["tasks"]["mmlu"] == {
        "shots": 0, "items_sha256": "i" * 64, "requests_sha256": "r" * 64, "source": "invented"
    }  # fmt: skip
    assert scored.asked == {}
    assert list(read_scored(tmp_path, ["hellaswag"]).records) == ["hellaswag"]


def test_half_written_sft_results_are_refused(tmp_path):
    write_sft(tmp_path / "a", ("mmlu",))
    with pytest.raises(UserError, match=r"results.json: holds mmlu, not hellaswag; give --tasks without it"):
        read_scored(tmp_path / "a", BOTH)
    write_sft(tmp_path / "b")
    (tmp_path / "b" / "items-mmlu.jsonl").unlink()
    with pytest.raises(UserError, match=r"results.json: vouches for items-mmlu.jsonl, which is missing"):
        read_scored(tmp_path / "b", BOTH)
    (tmp_path / "b" / "results.json").unlink()
    with pytest.raises(UserError, match=r"b: has no results.json, which is written last: the run .* was interrupted"):
        read_scored(tmp_path / "b", BOTH)


def test_items_that_results_json_does_not_count_are_refused(tmp_path):
    file = write_sft(tmp_path) / "items-mmlu.jsonl"
    rows = read_jsonl(file)
    write_lines(file, rows[:-1])
    with pytest.raises(UserError, match=r"items-mmlu.jsonl: 5 items, but results.json counts 6"):
        read_scored(tmp_path, BOTH)
    write_lines(file, [*rows, rows[2]])
    with pytest.raises(UserError, match=r"line 3 and .*items-mmlu.jsonl line 7: anatomy item 2 twice"):
        read_scored(tmp_path, BOTH)
    file.write_text(file.read_text()[:-80])
    with pytest.raises(UserError, match=r"items-mmlu.jsonl line 7: not valid JSON"):
        read_scored(tmp_path, BOTH)
    wrong = rows[0]["gold"] if not rows[0]["correct"] else (rows[0]["gold"] + 1) % 4
    lls = [-20.0, -20.0, -20.0, -20.0]
    lls[wrong] = -10.0
    flipped = {"lls": lls, "pred": wrong, "pred_norm": wrong}
    right = {"correct": wrong == rows[0]["gold"], "correct_norm": wrong == rows[0]["gold"]}
    write_lines(file, [rows[0] | flipped | right, *rows[1:]])
    with pytest.raises(UserError, match=r"items-mmlu.jsonl: is not the file that results.json vouches for"):
        read_scored(tmp_path, BOTH)
    write_lines(file, [rows[0] | {"gap": rows[0]["gap"] + 1}, *rows[1:]])  # accuracies as before
    with pytest.raises(UserError, match=r"items-mmlu.jsonl: is not the file that results.json vouches for"):
        read_scored(tmp_path, BOTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lls": [-1.0, -2.0, float("nan"), -3.0]}, "not valid JSON: NaN is no number"),
        ({"lls": [-1.0, -2.0, float("-inf"), -3.0]}, "not valid JSON: -Infinity is no number"),
        ({"lls": [-1.0, -2.0, -3.0]}, "field 'lls' is .*; need 4 finite numbers"),
        ({"lls": "x"}, "field 'lls' is 'x'"),
        ({"gold": 4}, "field 'gold' is 4; need a number 0 to 3"),
        ({"doc_id": -1}, "field 'doc_id' is -1; need a row number"),
        ({"doc_id": True}, "field 'doc_id' is True"),
        ({"subject": None}, "field 'subject' is missing"),
        ({"task": "hellaswag"}, "field 'task' is 'hellaswag'; need 'mmlu'"),
        ({"greedy": [0, 0, 0, 0]}, "field 'greedy' is .*; need 4 times true or false"),
        ({"chars": [1, 1, 1, -1]}, "are no scores"),
        ({"near_tie": ...}, "field 'near_tie' is missing; need a bool; score the model again"),
    ],
)
def test_bad_sft_records_are_named(tmp_path, changes, message):
    edit_row(write_sft(tmp_path) / "items-mmlu.jsonl", 1, **changes)
    with pytest.raises(UserError, match=f"items-mmlu.jsonl line 2: .*{message}"):
        read_scored(tmp_path, BOTH)


@pytest.mark.parametrize("field", ["pred", "pred_norm", "correct", "correct_norm"])
def test_a_decision_that_does_not_follow_from_the_scores_is_refused(tmp_path, field):
    file = write_sft(tmp_path) / "items-hellaswag.jsonl"
    value = read_jsonl(file)[0][field]
    edit_row(file, 0, **{field: not value if isinstance(value, bool) else (value + 1) % 4})
    with pytest.raises(UserError, match=r"items-hellaswag.jsonl line 1: pred, .* does not follow from lls"):
        read_scored(tmp_path, BOTH)


# lm_eval's samples


@pytest.mark.parametrize("delimiter", [" ", ""])
@pytest.mark.parametrize("below", [False, True])
def test_samples_become_records(tmp_path, delimiter, below):
    write_samples(tmp_path / "org__name", delimiter=delimiter)
    scored = read_scored(tmp_path if below else tmp_path / "org__name", BOTH)
    for task in BOTH:
        assert scored.records[task] == expected_records(task, significand_bits=8)
    assert scored.asked["mmlu"][1].question == "What of anatomy 1?"
    assert scored.asked["mmlu"][1].choices == ("w", "x", "y", "z")
    assert scored.asked["hellaswag"][2].choices == make_items("hellaswag")[2].choices
    assert [record.cluster for record in scored.records["hellaswag"]] == ["video~0", "video~0", "video~1"]
    facts = {key: scored.header[key] for key in ("model", "dtype", "score_dtype", "engine", "compat", "chat", "limit")}
    assert facts == {
        "model": "m", "dtype": "bfloat16", "score_dtype": "fp32", "engine": "lm_eval",
        "compat": "lm_eval>=0.4.9.2", "chat": "none", "limit": 3.0,
    }  # fmt: skip
    assert scored.header["tasks"]["mmlu"]["shots"] == 0
    assert scored.header["tasks"]["mmlu"]["source"].endswith(
        f"org__name, {DATE}: 2 subjects, 6 test rows; the public release has 57 and 14,042"
    )
    json.dumps(scored.header)


def test_rows_of_several_ranks_are_put_in_order(tmp_path):
    home = write_samples(tmp_path)
    file = home / f"samples_mmlu_anatomy_{DATE}.jsonl"
    rows = read_jsonl(file)
    write_lines(file, [rows[0], rows[2], rows[1]])
    assert read_scored(home, BOTH).records["mmlu"] == expected_records("mmlu", 8)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"lm_eval_version": "0.4.9.1"}, {"compat": "lm_eval<=0.4.9.1"}),
        ({"lm_eval_version": "0.4.9.2"}, {"compat": "lm_eval>=0.4.9.2"}),
        ({"lm_eval_version": "0.4.10"}, {"compat": "lm_eval>=0.4.9.2"}),
        ({"lm_eval_version": "0.4.8"}, {"compat": "lm_eval<=0.4.9.1"}),
        ({"lm_eval_version": None}, {"compat": None}),
        ({"chat_template": "{{x}}", "chat_template_sha": "s", "fewshot_as_multiturn": True}, {"chat": "multi_turn"}),
        ({"chat_template": "{{x}}", "fewshot_as_multiturn": False}, {"chat": "single_turn"}),
        ({"config": {"model": "hf", "model_args": "pretrained=p,dtype=float16"}}, {"dtype": "float16", "model": "p"}),
        ({"config": {"model": "hf", "model_args": "pretrained=p,dtype=float16"}}, {"score_dtype": "native"}),
        (
            {"config": {"model": "a/path", "model_args": None, "model_dtype": "torch.bfloat16"}},
            {"model": "a/path", "engine": "lm_eval", "dtype": "bfloat16", "score_dtype": None},
        ),
        ({"config": {"model_dtype": "torch.float32"}}, {"dtype": "float32", "score_dtype": "fp32"}),
        ({"config": {"model": "vllm", "model_args": {}}}, {"engine": "lm_eval vllm", "score_dtype": None}),
        (
            {"config": {"model_args": "add_bos_token=False"}},
            {"compat": "lm_eval>=0.4.9.2, add_bos_token=False", "dtype": None},
        ),
    ],
)
def test_what_the_run_says_of_itself(tmp_path, changes, facts):
    header = read_scored(write_samples(tmp_path, **changes), BOTH).header
    assert {key: header[key] for key in facts} == facts


def test_the_newest_date_is_read_and_said(tmp_path):
    write_samples(tmp_path, "2026-03-04T05-06-07.123456")
    write_samples(tmp_path, "2026-03-05T00-00-00")
    for file in tmp_path.glob("samples_*_2026-03-04*"):
        file.write_text("an older file that must not be read\n")
    source = read_scored(tmp_path, BOTH).header["tasks"]["hellaswag"]["source"]
    assert ", 2026-03-05T00-00-00: 3 validation rows" in source
    assert source.endswith("; 3 older samples files left out")


def test_dates_of_different_settings_are_not_mixed(tmp_path):
    write_samples(tmp_path, "2026-03-04T05-06-07.1")
    (tmp_path / "samples_hellaswag_2026-03-04T05-06-07.1.jsonl").unlink()
    write_samples(tmp_path, "2026-03-05T05-06-07.1", max_length=1024)
    for file in tmp_path.glob("samples_mmlu_*_2026-03-05*"):
        file.unlink()
    with pytest.raises(UserError, match=r"results_2026-03-04.* and .*results_2026-03-05.*: max_length is 512 and 1024"):
        read_scored(tmp_path, BOTH)
    assert len(read_scored(tmp_path, ["mmlu"]).records["mmlu"]) == 6


def test_other_filters_and_other_tasks_are_left_out_with_the_reason(tmp_path):
    home = write_samples(tmp_path)
    file = home / f"samples_hellaswag_{DATE}.jsonl"
    rows = read_jsonl(file)
    write_lines(file, [*rows, rows[0] | {"filter": "strict-match"}])
    write_lines(home / f"samples_mmlu_anatomy_generative_{DATE}.jsonl", [{"doc_id": 0}])
    scored = read_scored(home, BOTH)
    assert len(scored.records["hellaswag"]) == 3
    assert scored.header["tasks"]["hellaswag"]["source"].endswith(
        "; rows of other filters left out, which score something else: 1 of strict-match"
    )
    assert len(scored.records["mmlu"]) == 6


def test_samples_of_several_models_or_without_results_are_refused(tmp_path):
    write_samples(tmp_path / "org__one")
    write_samples(tmp_path / "org__two")
    with pytest.raises(UserError, match=r"holds samples of 2 models; give one of their folders: .*one or .*two"):
        read_scored(tmp_path, BOTH)
    (tmp_path / "org__one" / f"results_{DATE}.json").unlink()
    with pytest.raises(UserError, match=rf"no results_{DATE}.json beside it"):
        read_scored(tmp_path / "org__one", BOTH)
    for file in (tmp_path / "org__two").glob("samples_*"):
        file.unlink()
    with pytest.raises(UserError, match=r"results but no samples_<task>_<date>.jsonl; run it with --log_samples"):
        read_scored(tmp_path / "org__two", BOTH)
    for file in (tmp_path / "org__one").glob("samples_mmlu*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no samples of mmlu; run lm_eval with --tasks mmlu --log_samples"):
        read_scored(tmp_path / "org__one", BOTH)


def test_an_output_path_that_ends_in_json_is_found(tmp_path):
    home = write_samples(tmp_path)
    (home / f"results_{DATE}.json").rename(home / f"mine_{DATE}.json")
    assert len(read_scored(home, BOTH).records["mmlu"]) == 6


def arguments_with(number: int, **changes: str):
    def change(row):
        return row["arguments"] | {f"gen_args_{number}": row["arguments"][f"gen_args_{number}"] | changes}

    return change


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("acc", lambda row: 1 - row["acc"], r"doc_id 1 has acc .*, but its log-likelihoods and target give"),
        ("acc_norm", lambda row: 1 - row["acc_norm"], r"doc_id 1 has acc_norm .*, but its log-likelihoods"),
        ("acc", "1.0", r"doc_id 1 has acc '1.0'"),
        ("target", "4", r"field 'target' is '4'; need a number 0 to 3"),
        ("target", lambda row: (row["doc"]["label"] == "0") and "1" or "0", r"doc_id 1 has acc"),
        ("doc", None, r"field 'doc' is missing"),
        ("doc_id", "1", r"field 'doc_id' is '1'; need a row number"),
        ("doc_id", 0, r"doc_id 0 for the second time"),
        ("resps", lambda row: row["resps"][:3], r"field 'resps' is .*; need 4 answers"),
        ("resps", lambda row: [[["nan", "False"]], *row["resps"][1:]], r".*log-likelihood 'nan'; need a finite number"),
        ("resps", lambda row: [[["-inf", "False"]], *row["resps"][1:]], r".*log-likelihood '-inf'"),
        ("resps", lambda row: [[["x", "False"]], *row["resps"][1:]], r".*log-likelihood 'x'"),
        ("resps", lambda row: [[["-1.0", "No"]], *row["resps"][1:]], r".*need a log-likelihood and True or False"),
        ("resps", lambda row: [["-1.0"], *row["resps"][1:]], r".*need a log-likelihood and True or False"),
        ("prompt_hash", "0" * 64, r"prompt_hash is not the prompt's; the line was changed"),
        ("arguments", arguments_with(2, arg_0="Other"), r"gen_args_2 has another prompt than gen_args_0"),
        ("arguments", arguments_with(2, arg_1=" Z"), r"gen_args_2 continues with ' Z'; need the choice ' stays.'"),
        ("arguments", arguments_with(1, arg_1="sings über alles."), r"gen_args_1 continues with 'sings über alles.'"),
        (
            "arguments",
            lambda row: {"gen_args_0": {}},
            r"field 'arguments' is \['gen_args_0'\]; need those of 4 choices",
        ),
        ("arguments", lambda row: dict.fromkeys(row["arguments"], 1), r"field 'gen_args_0' is 1; need arg_0 and arg_1"),
    ],
)
def test_bad_samples_are_named(tmp_path, field, value, message):
    file = write_samples(tmp_path) / f"samples_hellaswag_{DATE}.jsonl"
    row = read_jsonl(file)[1]
    edit_row(file, 1, **{field: value(row) if callable(value) else value})
    with pytest.raises(UserError, match=rf"samples_hellaswag_{re.escape(DATE)}.jsonl line 2: {message}"):
        read_scored(tmp_path, BOTH)


def test_samples_that_results_do_not_count_are_refused(tmp_path):
    file = write_samples(tmp_path) / f"samples_mmlu_virology_{DATE}.jsonl"
    rows = read_jsonl(file)
    write_lines(file, rows[:2])
    with pytest.raises(UserError, match=r"virology.*: 2 items, but results_.*.json counts 3; the file is not whole"):
        read_scored(tmp_path, BOTH)
    write_lines(file, [])
    with pytest.raises(UserError, match=r"virology.*: 0 items"):
        read_scored(tmp_path, BOTH)
    write_lines(file, [rows[0] | {"doc": rows[0]["doc"] | {"subject": "anatomy"}}])
    with pytest.raises(UserError, match=r"the row's subject is 'anatomy', the file's 'virology'"):
        read_scored(tmp_path, BOTH)


def test_subjects_with_unequal_shots_are_refused(tmp_path):
    results = write_samples(tmp_path) / f"results_{DATE}.json"
    edit(results, lambda content: content["n-shot"].update(mmlu_virology=5))
    with pytest.raises(UserError, match=r"mmlu_anatomy was given 0 solved examples, mmlu_virology 5"):
        read_scored(tmp_path, BOTH)


# damage: refused in one line, whatever was damaged

VALUES = (None, True, 7, -1.5, "text", [], [1], {}, {"a": 1}, float("nan"), "\ud800")


def assert_one_line_or_fine(folder: Path) -> bool:
    """True if refused. Anything but a UserError of one line fails the test."""
    try:
        scored = read_scored(folder, BOTH)
    except UserError as error:
        if "\n" in str(error):
            raise
        return True
    assert [len(scored.records[task]) for task in BOTH] == [6, 3]
    return False


def leaves(value, path=()):
    """Paths of every field and element."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def replaced(content, path, value):
    content = json.loads(json.dumps(content))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return content


@pytest.mark.parametrize("write", [write_sft, write_samples])
def test_cut_files_are_refused(tmp_path, write):
    """At each of the last bytes, and at every 23rd before them, so that it does not take a minute."""
    write(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for length in [*range(0, len(whole) - 30, 23), *range(len(whole) - 30, len(whole))]:
            file.write_bytes(whole[:length])
            refused = assert_one_line_or_fine(tmp_path)
            assert refused or not whole[length:].strip(), f"{file.name} was read although cut at byte {length}"
        file.write_bytes(whole)
        assert not assert_one_line_or_fine(tmp_path)


@pytest.mark.parametrize("write", [write_sft, write_samples])
def test_values_of_any_type_in_any_place_give_no_traceback(tmp_path, write):
    write(tmp_path)
    refusals = tries = 0
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_text()
        first, *others = whole.splitlines() if file.suffix == ".jsonl" else [whole]
        content = json.loads(first)
        for number, path in enumerate(leaves(content)):
            for value in (VALUES * 2)[number % len(VALUES) :][:3]:
                file.write_text("\n".join([json.dumps(replaced(content, path, value)), *others]))
                refusals += assert_one_line_or_fine(tmp_path)
                tries += 1
        file.write_text(whole)
    assert refusals > tries / 2


def test_the_support_file_writes_what_it_says():
    """Its rows must hold wrong and right items, or the checks of acc would prove nothing."""
    records = expected_records("mmlu", 8) + expected_records("hellaswag", 8)
    assert {record.correct for record in records} == {True, False}
    assert {record.correct_norm for record in records if record.task == "hellaswag"} == {True, False}
    assert np.isfinite([record.lls for record in records]).all()
    assert results_of(["x"])["n-samples"]["x"]["effective"] == 3
