"""Two models are compared only where they were asked the same. Run: pytest tests/unit/test_eval_comparable.py"""

from dataclasses import replace
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.eval.earlier import check_same_items, kind_of, read_scored
from sft.eval.results import Scored
from tests.eval_data_support import write_samples, write_sft

BOTH = ("mmlu", "hellaswag")


def test_kinds(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_sft(tmp_path / "scored")
    write_samples(tmp_path / "lm" / "org__name")
    assert kind_of(tmp_path / "model") == "model"
    assert kind_of(tmp_path / "scored") == "results"
    assert kind_of(tmp_path / "lm") == kind_of(tmp_path / "lm" / "org__name") == "lm_eval"
    write_sft(tmp_path / "model")
    assert kind_of(tmp_path / "model") == "model"
    (tmp_path / "scored" / "results.json").unlink()
    assert kind_of(tmp_path / "scored") == "results"  # read_scored says what is wrong with it


def test_what_is_nothing_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"neither a model \(config.json\) nor results .* \(results.json\) nor lm_eval"):
        kind_of(tmp_path)
    with pytest.raises(UserError, match=r"absent: no such folder; give a model"):
        kind_of(tmp_path / "absent")
    write_sft(tmp_path / "base")
    with pytest.raises(UserError, match=r"results lie one folder below: give .*/base$"):
        kind_of(tmp_path)


def two(tmp_path: Path, **header) -> tuple[Scored, Scored]:
    return (
        read_scored(write_sft(tmp_path / "base"), BOTH),
        read_scored(write_sft(tmp_path / "tuned", **header), BOTH),
    )


def test_equal_sides_pass_in_any_order_and_come_back_in_the_order_of_base(tmp_path):
    base, tuned = two(tmp_path, weights_sha256="other", device="other")
    shuffled = replace(tuned, records={task: records[::-1] for task, records in tuned.records.items()})
    checked = check_same_items(base, shuffled, "a", "b")
    assert checked.records == base.records
    assert checked.header == tuned.header


def test_texts_follow_their_records(tmp_path):
    base = read_scored(write_samples(tmp_path), BOTH)
    shuffled = replace(
        base,
        records={task: records[::-1] for task, records in base.records.items()},
        asked={task: texts[::-1] for task, texts in base.asked.items()},
    )
    assert check_same_items(base, shuffled, "a", "b") == base


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("dtype", "bfloat16", "dtype: A has 'float32', B 'bfloat16'; score both with the same --dtype"),
        ("score_dtype", "native", "score_dtype: A has 'fp32', B 'native'"),
        ("max_length", 1024, "max_length: A has 512, B 1024; long items would be cut at different places"),
        ("engine", "plain", "engine: A has 'packed', B 'plain'"),
        ("compat", "lm_eval<=0.4.9.1", "compat: .*BOS would differ"),
        ("chat", "multi_turn", "chat: A has 'none', B 'multi_turn'"),
        ("system_instruction", "Be brief.", "system_instruction: A has missing, B 'Be brief.'"),
    ],
)
def test_other_settings_are_named(tmp_path, fact, value, message):
    base, tuned = two(tmp_path, **{fact: value})
    with pytest.raises(UserError, match=message):
        check_same_items(base, tuned, "A", "B")
    unknown = replace(tuned, header={key: known for key, known in tuned.header.items() if key != fact})
    check_same_items(base, unknown, "A", "B")


def test_a_chat_template_counts_only_where_it_was_used(tmp_path):
    base, tuned = two(tmp_path, chat_template_sha256="y")
    base.header["chat_template_sha256"] = "x"
    check_same_items(base, tuned, "A", "B")
    base.header["chat"] = tuned.header["chat"] = "multi_turn"
    with pytest.raises(UserError, match="chat_template_sha256: A has 'x', B 'y'; use the base model's chat template"):
        check_same_items(base, tuned, "A", "B")


def change_first(scored: Scored, task: str, **changes) -> Scored:
    first, *others = scored.records[task]
    return replace(scored, records=scored.records | {task: [replace(first, **changes), *others]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_sha256": "0" * 64}, "mmlu: A and B were given other prompts, first anatomy item 0; score both with"),
        ({"gold": 3}, "mmlu: A and B have another answer or other choices at anatomy item 0"),
        ({"chars": (2, 1, 1, 1)}, "another answer or other choices at anatomy item 0"),
        ({"doc_id": 9}, r"mmlu: A holds anatomy item 0, B does not \(6 and 6 items\)"),
    ],
)
def test_other_items_are_named(tmp_path, changes, message):
    base, tuned = two(tmp_path)
    with pytest.raises(UserError, match=message):
        check_same_items(base, change_first(tuned, "mmlu", **changes), "A", "B")


def test_missing_and_additional_items_are_named(tmp_path):
    base, tuned = two(tmp_path)
    fewer = replace(base, records=base.records | {"mmlu": base.records["mmlu"][:-1]})
    with pytest.raises(UserError, match=r"A holds virology item 2, B does not \(6 and 5 items\).*--limit"):
        check_same_items(base, fewer, "A", "B")
    with pytest.raises(UserError, match=r"B holds virology item 2, A does not \(5 and 6 items\)"):
        check_same_items(fewer, tuned, "A", "B")
    with pytest.raises(UserError, match=r"A and B: only one of them has hellaswag"):
        check_same_items(base, replace(tuned, records={"mmlu": tuned.records["mmlu"]}), "A", "B")


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("shots", 5, "mmlu: A and B were given 0 and 5 solved examples; score both with the same --shots.mmlu"),
        ("items_sha256", "x", "mmlu: A and B were given other choices or answers"),
        (
            "requests_sha256",
            "x",
            "gave different ids .*; was BOS lost, or a token added, when the tuned model was saved",
        ),
    ],
)
def test_digests_are_compared_where_both_sides_know_them(tmp_path, fact, value, message):
    base, tuned = two(tmp_path)
    tuned.header["tasks"]["mmlu"][fact] = value
    with pytest.raises(UserError, match=message):
        check_same_items(base, tuned, "A", "B")
    tuned.header["tasks"]["mmlu"][fact] = None
    check_same_items(base, tuned, "A", "B")


def test_endings_of_equal_length_that_differ_are_refused(tmp_path):
    """They are no part of the prompt, and lm_eval's samples have no digest of the items."""
    base = read_scored(write_samples(tmp_path), BOTH)
    first, *others = base.asked["hellaswag"]
    other = replace(base, asked=base.asked | {"hellaswag": [replace(first, choices=first.choices[::-1]), *others]})
    with pytest.raises(UserError, match="hellaswag: A and B were given other choices at hellaswag item 0"):
        check_same_items(base, other, "A", "B")
