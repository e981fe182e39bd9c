"""Rows to turns: what each format means, and the one line that each malformed row is refused with."""

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.example import Turn
from data_prep.formats import ROLES, RowError, check_columns, parse_row, shorten
from sft.errors import UserError
from sft.prep_options import Source

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def source(format: str = "alpaca", **options: Any) -> Source:
    return Source(path="a.json", format=format, **options)


def learn(text: str) -> Turn:
    return Turn("assistant", text, supervised=True)


def supervised(row: dict[str, Any], format: str, **options: Any) -> list[str]:
    return [turn.text for turn in parse_row(row, source(format, **options)) if turn.supervised]


def problem(value: Any, where: Source) -> str:
    with pytest.raises(RowError) as caught:
        parse_row(value, where)
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 400
    return caught.value.problem


def test_alpaca_rows() -> None:
    assert parse_row(ROW, source()) == [Turn("user", "Add.", "1 2"), learn("3")]
    assert parse_row({"instruction": "Sing.", "output": "la", "id": 7}, source()) == [
        Turn("user", "Sing."),
        learn("la"),
    ]
    assert parse_row({"instruction": "", "output": ""}, source()) == [Turn("user", ""), learn("")]


def test_alpaca_with_system_and_history() -> None:
    row = {**ROW, "system": "Be brief.", "history": [["a", "b"], ["c", "d"]]}
    past = [Turn("system", "Be brief."), Turn("user", "a"), learn("b"), Turn("user", "c"), learn("d")]
    assert parse_row(row, source()) == [*past, Turn("user", "Add.", "1 2"), learn("3")]
    assert supervised(row, "alpaca", train_on="last") == ["3"]
    for empty in ({"system": "", "history": []}, {"system": None, "history": None}):
        assert parse_row({**ROW, **empty}, source()) == parse_row(ROW, source())


def test_output_may_be_named_response() -> None:
    assert supervised({"instruction": "a", "response": "b"}, "alpaca") == ["b"]
    assert supervised({"instruction": "a", "response": "b", "output": "b"}, "alpaca") == ["b"]
    message = problem({"instruction": "a", "response": "b", "output": "c"}, source())
    assert "'output' and 'response' differ" in message


def test_text() -> None:
    assert parse_row({"text": " a ", "b": 1}, source("text")) == " a "


@pytest.mark.parametrize(
    ("format", "row"), [("messages", {"messages": TALK}), ("sharegpt", {"conversations": SHARED, "id": "x"})]
)
def test_conversations(format: str, row: dict[str, Any]) -> None:
    assert parse_row(row, source(format)) == [Turn("user", "a"), learn("b")]


@pytest.mark.parametrize("role", ROLES)
def test_roles_have_several_names(role: str) -> None:
    row = {"messages": [{"role": role, "content": "a"}, *TALK]}
    assert parse_row(row, source("messages"))[0].role == ROLES[role]


def test_the_system_field_of_sharegpt() -> None:
    row = {"conversations": SHARED, "system": "Be brief."}
    assert parse_row(row, source("sharegpt"))[0] == Turn("system", "Be brief.")
    twice = {**row, "conversations": [{"from": "system", "value": "s"}, *SHARED]}
    assert "keep one" in problem(twice, source("sharegpt"))
    assert parse_row({**twice, "system": ""}, source("sharegpt"))[0] == Turn("system", "s")


def test_text_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    row = {"messages": [{"role": "user", "content": parts}, TALK[1]]}
    assert parse_row(row, source("messages"))[0] == Turn("user", "ab")


def test_what_follows_the_last_answer_is_cut() -> None:
    after = [{"role": "user", "content": "c"}, {"role": "tool", "content": "d"}]
    assert parse_row({"messages": TALK + after}, source("messages")) == [Turn("user", "a"), learn("b")]


def test_the_assistant_may_begin() -> None:
    assert parse_row({"messages": TALK[1:] + TALK}, source("messages")) == [learn("b"), Turn("user", "a"), learn("b")]


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": None, "train": None}, True),
        ({"train": True}, True),
        ({"weight": 0}, False),
        ({"train": False}, False),
        ({"weight": 1, "train": False}, False),
    ],
)
def test_turns_may_be_excluded(mark: dict[str, Any], trained: bool) -> None:
    first = {"role": "assistant", "content": "x", **mark}
    row = {"messages": [TALK[0], first, *TALK]}
    assert supervised(row, "messages") == (["x", "b"] if trained else ["b"])
    assert supervised(row, "messages", train_on="last") == ["b"]
    assert supervised({"messages": [*TALK, TALK[0], first]}, "messages", train_on="last") == (["x"] if trained else [])


def test_a_users_turn_is_never_learned() -> None:
    row = {"messages": [{**TALK[0], "train": True, "weight": 1}, TALK[1]]}
    assert supervised(row, "messages") == ["b"]


def test_columns_map_our_names_to_the_sources() -> None:
    mapped = source(columns={"instruction": "question", "output": "answer", "history": "before"})
    row = {"question": "a", "answer": "b", "before": [["c", "d"]], "instruction": 3}
    assert parse_row(row, mapped) == [Turn("user", "c"), learn("d"), Turn("user", "a"), learn("b")]
    assert "'answer' is missing, found \"before, instruction, question\"" in problem(
        {key: row[key] for key in ("question", "before", "instruction")}, mapped
    )
    speakers = source("messages", columns={"messages": "dialog", "role": "speaker", "content": "says"})
    turns = [{"speaker": "user", "says": "a"}, {"speaker": "model", "says": "b"}]
    assert parse_row({"dialog": turns}, speakers) == [Turn("user", "a"), learn("b")]
    assert parse_row({"body": "x"}, source("text", columns={"text": "body"})) == "x"


def test_columns_of_another_format_are_refused() -> None:
    check_columns(source("sharegpt", columns={"conversations": "dialog", "from": "who"}))
    with pytest.raises(UserError, match='a.json: columns: format sharegpt has no field "role"; its fields are conv'):
        check_columns(source("sharegpt", columns={"role": "who"}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], ["[1]", "object", "alpaca"]),
        ({"instruction": "a", "input": ""}, ["'output'", "missing", "input, instruction"]),
        ({}, ["'instruction'", "missing", "none"]),
        ({**ROW, "output": 3}, ["'output'", "3", "text"]),
        ({**ROW, "output": None}, ["'output'", "null"]),
        ({**ROW, "input": None}, ["'input'", "null"]),
        ({**ROW, "instruction": ["x" * 500]}, ["'instruction'", "..."]),
        ({**ROW, "system": 5}, ["'system'", "5"]),
        ({**ROW, "history": "a"}, ["'history'", '"a"', "pairs"]),
        ({**ROW, "history": [["a", "b"], ["c"]]}, ["history[1]", '["c"]']),
        ({**ROW, "history": [["a", None]]}, ["history[0]", '["a", null]']),
        ({**ROW, "output": datetime.date(2024, 1, 2)}, ["'output'", "datetime.date(2024, 1, 2)"]),
    ],
)
def test_a_malformed_alpaca_row_names_field_and_value(value: Any, words: list[str]) -> None:
    message = problem(value, source())
    assert all(word in message for word in words), message


def say(**fields: Any) -> list[dict[str, Any]]:
    return [TALK[0], {**TALK[1], **fields}]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (None, ["'messages'", "null"]),
        ([], ["'messages'", "[]"]),
        ("hello", ["'messages'", '"hello"']),
        ([TALK[0]], ["no turn of the assistant"]),
        (["a"], ["messages[0]", '"a"']),
        (say(role="narrator"), ["messages[1].role", '"narrator"', "user, human"]),
        (say(role=None), ["messages[1].role", "null"]),
        (say(role=["user"]), ["messages[1].role", '["user"]']),
        (say(content=None), ["messages[1].content", "null"]),
        (say(content=7), ["messages[1].content", "7"]),
        (say(content=[]), ["messages[1].content", "[]"]),
        (say(content=[{"type": "image_url", "image_url": "x"}]), ["messages[1].content[0]", "image_url"]),
        (say(content=[{"type": "text", "text": None}]), ["messages[1].content[0]", "null"]),
        (say(weight=0.5), ["messages[1].weight", "0.5", "0 or 1"]),
        (say(train="no"), ["messages[1].train", '"no"', "true or false"]),
        (say(train=0), ["messages[1].train", "0", "true or false"]),
        (say(tool_calls=[{"id": 1}]), ["messages[1].tool_calls", "not text"]),
    ],
)
def test_a_malformed_conversation_names_turn_and_value(turns: Any, words: list[str]) -> None:
    message = problem({"messages": turns}, source("messages"))
    assert all(word in message for word in words), message


def test_empty_tool_calls_are_none() -> None:
    assert supervised({"messages": say(tool_calls=[], function_call=None)}, "messages") == ["b"]


def test_other_formats_name_their_own_fields() -> None:
    assert "'conversations' is missing, found \"messages\"" in problem({"messages": TALK}, source("sharegpt"))
    assert "'text' is 3" in problem({"text": 3}, source("text"))
    assert "conversations[0].value is null" in problem({"conversations": [{"from": "gpt"}]}, source("sharegpt"))


def test_values_are_shown_short() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in shorten(deep)
    assert shorten("é\n") == '"\\u00e9\\n"'
    assert len(shorten("x" * 10**6)) == len(shorten([1] * 10**6)) == 80


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["role", "content", "from", "value", "weight", "train", "type", "tool_calls"]
ENTRIES = st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from([*ROLES, 0, 1]), max_size=2)
TALKS = st.lists(
    st.builds(lambda turn, changes: {**turn, **changes}, st.sampled_from(TALK + SHARED), ENTRIES), max_size=4
)
FIELDS = st.dictionaries(
    st.sampled_from(["instruction", "input", "output", "response", "system", "history", "messages", "conversations"]),
    JSON | TALKS | st.lists(st.lists(st.text(max_size=2), min_size=2, max_size=2), max_size=2),
    max_size=3,
)
ROWS = JSON | st.builds(
    lambda fields: {**ROW, "messages": TALK, "conversations": SHARED, "text": "a", **fields}, FIELDS
)


def turns_or_problem(value: Any, where: Source) -> list[Turn] | str | RowError:
    try:
        return parse_row(value, where)
    except RowError as error:
        return error


@settings(max_examples=300, deadline=None)
@given(
    value=ROWS,
    format=st.sampled_from(["alpaca", "messages", "sharegpt", "text"]),
    train_on=st.sampled_from(["all", "last"]),
)
def test_any_value_gives_turns_or_one_line(value: Any, format: str, train_on: str) -> None:
    found = turns_or_problem(value, source(format, train_on=train_on))
    if isinstance(found, RowError):
        assert found.problem.isprintable()
    elif isinstance(found, str):
        assert format == "text"
    else:
        assert found[-1].role == "assistant"
        assert {turn.role for turn in found if turn.supervised} <= {"assistant"}
        assert all(isinstance(turn.text, str) and isinstance(turn.input, str) for turn in found)
        assert train_on == "all" or not any(turn.supervised for turn in found[:-1])
