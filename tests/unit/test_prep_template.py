"""The alpaca template: Stanford's text, one stretch per answer, and the conversations it has no place for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.example import Example, Rejected, Turn
from data_prep.filters import MEANING
from data_prep.template import alpaca_prompt, render_alpaca, render_text


def user(text: str, input: str = "") -> Turn:
    return Turn("user", text, input)


def learn(text: str) -> Turn:
    return Turn("assistant", text, supervised=True)


def context(text: str) -> Turn:
    return Turn("assistant", text)


def reason_of(*turns: Turn) -> str | None:
    try:
        render_alpaca(turns)
    except Rejected as rejected:
        return rejected.reason
    return None


def test_prompt_with_input_is_stanfords() -> None:
    assert alpaca_prompt("Add {x}.", "1 {y}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 {y}\n\n### Response:\n"
    )


def test_prompt_without_input_is_stanfords() -> None:
    assert alpaca_prompt("Sing.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )


def test_one_answer_is_the_prompt_and_the_answer() -> None:
    prompt = alpaca_prompt("Add.", "1 2")
    expected = Example((f"{prompt}3",), (((len(prompt), len(prompt) + 1),),), True)
    assert render_alpaca([user("Add.", "1 2"), learn("3")]) == expected


def test_later_prompts_have_no_preamble() -> None:
    example = render_alpaca([user("a"), learn("b"), user("c"), context("d"), user("e", "f"), learn("g\n")])
    assert example.texts == (
        alpaca_prompt("a") + "b",
        "\n\n### Instruction:\nc\n\n### Response:\nd",
        "\n\n### Instruction:\ne\n\n### Input:\nf\n\n### Response:\ng\n",
    )
    assert example.responses() == ["b", "g\n"]
    assert example.spans[1] == ()
    assert example.stop is True


def test_a_system_text_replaces_the_preamble() -> None:
    system = Turn("system", "Be {brief}.")
    texts = render_alpaca([system, user("a"), learn("b"), user("c"), learn("d")]).texts
    assert texts[0] == "Be {brief}.\n\n### Instruction:\na\n\n### Response:\nb"
    assert texts[1] == "\n\n### Instruction:\nc\n\n### Response:\nd"
    with_input = render_alpaca([system, user("a", "x"), learn("b")]).texts[0]
    assert with_input == "Be {brief}.\n\n### Instruction:\na\n\n### Input:\nx\n\n### Response:\nb"
    assert render_alpaca([Turn("system", ""), user("a"), learn("b")]).texts == (alpaca_prompt("a") + "b",)


def test_instructions_in_a_row_are_joined() -> None:
    example = render_alpaca([user("a", "x"), user("b"), user("c", "y"), learn("d")])
    assert example.texts == (alpaca_prompt("a\n\nb\n\nc", "x\n\ny") + "d",)


def test_turns_without_a_place() -> None:
    for turns in (
        [user("a"), Turn("tool", "42"), learn("b")],
        [learn("a"), user("b"), learn("c")],
        [user("a"), learn("b"), learn("c")],
        [user("a"), Turn("system", "s"), learn("b")],
    ):
        assert reason_of(*turns) == "template_refuses_row"
    assert reason_of(Turn("system", "s"), user("a"), learn("b"), user("c"), learn("d")) is None


def test_blank_and_unsupervised_turns() -> None:
    assert reason_of(user("a"), learn(" \n")) == "empty_output"
    assert reason_of(user("a"), context(" \n"), user(""), learn("b")) is None
    assert reason_of(user("a"), context("b")) == "nothing_supervised"


def test_plain_text_is_supervised_whole() -> None:
    assert render_text(" a ") == Example((" a ",), (((0, 3),),), True)
    with pytest.raises(Rejected, match="empty_output"):
        render_text(" \n")


TEXT = st.text(max_size=5) | st.sampled_from(["### Response:\n", "{instruction}", "{", " "])
ANSWERS = st.builds(lambda text, learned: Turn("assistant", text, "", learned), TEXT, st.booleans())
EXCHANGES = st.tuples(st.lists(st.builds(user, TEXT, TEXT), min_size=1, max_size=2), ANSWERS).map(
    lambda exchange: [*exchange[0], exchange[1]]
)
STRAY = st.builds(lambda role, text: [Turn(role, text)], st.sampled_from(["system", "tool", "assistant"]), TEXT)
TALKS = st.lists(EXCHANGES | EXCHANGES | EXCHANGES | STRAY, max_size=4).map(lambda parts: sum(parts, []))


@settings(max_examples=300, deadline=None)
@given(TALKS)
def test_spans_are_the_supervised_turns_in_order(turns: list[Turn]) -> None:
    reason = reason_of(*turns)
    if reason is not None:
        assert reason in MEANING
        return
    example = render_alpaca(turns)
    assert example.responses() == [turn.text for turn in turns if turn.supervised]
    answers = [turn for turn in turns if turn.role == "assistant"]
    for text, spans, turn in zip(example.texts, example.spans, answers, strict=True):
        assert text.endswith(f"### Response:\n{turn.text}")
        assert spans == (((len(text) - len(turn.text), len(text)),) if turn.supervised else ())
