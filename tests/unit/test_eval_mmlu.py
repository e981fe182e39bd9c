"""MMLU prompts, asserted as literal strings. Run: pytest tests/unit/test_eval_mmlu.py"""

import pytest

from sft.errors import UserError
from sft.eval.tasks.item import digest_items
from sft.eval.tasks.mmlu import CATEGORIES, MmluRow, MmluSubject, build_items, category_of

DEV = [
    MmluRow(" Is water wet? \n", ("yes", " no", "None", "maybe "), 1),
    MmluRow("Two\nlines?", ("a", "b", "c", "d"), 3),
]
TEST = [MmluRow("\u00a0What, then?\u00a0", ("", "x\ny", '"q"', "größe"), 2), MmluRow("Next?", ("1", "2", "3", "4"), 0)]
SUBJECT = MmluSubject("high_school_us_history", DEV, TEST)


def test_two_shot_prompt_literally():
    first, second = build_items(SUBJECT, shots=2, limit=None)
    assert first.context == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "Is water wet?\nA. yes\nB.  no\nC. None\nD. maybe \nAnswer: B\n\n"
        "Two\nlines?\nA. a\nB. b\nC. c\nD. d\nAnswer: D\n\n"
        'What, then?\nA. \nB. x\ny\nC. "q"\nD. größe\nAnswer:'
    )
    assert (first.choices, first.gold, first.doc_id, first.cluster) == (("A", "B", "C", "D"), 2, 0, SUBJECT.name)
    assert (second.doc_id, second.gold) == (1, 0)


def test_zero_shots_keep_the_description():
    (item,) = build_items(SUBJECT, shots=0, limit=1)
    assert item.context.startswith("The following are multiple choice questions (with answers) about high school us")
    assert item.context.count("Answer:") == 1


def test_more_shots_than_dev_rows_is_an_error():
    with pytest.raises(UserError, match=r"high_school_us_history: --shots.mmlu 3, but its dev split has 2 rows"):
        build_items(SUBJECT, shots=3, limit=None)


def test_categories_are_lm_evals():
    assert {name: len(subjects) for name, subjects in CATEGORIES.items()} == {
        "stem": 19,
        "humanities": 13,
        "social_sciences": 12,
        "other": 13,
    }
    assert category_of("anatomy") == "stem"  # hendrycks/test has it under other
    assert category_of("island_trade") is None


def test_categories_equal_the_installed_tags():
    lm_eval = pytest.importorskip("lm_eval")
    from pathlib import Path

    tags = {}
    for file in (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"):
        tag = next(line for line in file.read_text().splitlines() if line.startswith('"tag"'))
        tags[file.stem.removeprefix("mmlu_")] = tag.split('"')[3].removeprefix("mmlu_").removesuffix("_tasks")
    assert len(tags) == 57
    assert {subject: category_of(subject) for subject in tags} == tags


def test_digest_sees_every_character_and_the_gold():
    items = build_items(SUBJECT, shots=1, limit=None)
    other_gold = MmluSubject(SUBJECT.name, DEV, [TEST[0], MmluRow("Next?", ("1", "2", "3", "4"), 1)])
    assert digest_items(items) == digest_items(build_items(SUBJECT, shots=1, limit=None))
    assert digest_items(items) != digest_items(build_items(other_gold, shots=1, limit=None))
    assert digest_items(items) != digest_items(build_items(SUBJECT, shots=2, limit=None))
