"""Tokens and the span proof, with encoders that are broken on purpose and must be caught."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encode import (
    Document,
    compare_with_reference,
    encode_examples,
    eos_of,
    probe_ids,
    span_is_proved,
    text_forbidden_ids,
    truncate,
)
from data_prep.filters import special_token_reason, text_reason
from data_prep.formats import Example
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.prep_support import byte_ids, sentencepiece_tokenizer
from tests.tiny import BOS, EOS, make_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
AWKWARD = [
    "x",
    " leading",
    "\nline",
    "trailing \n",
    "  two",
    "é",
    "🙂",
    "a\tb",
    "### Response:\n",
    "0",
    "\u200d",
    "\ufeffbom",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Merges the prompt's last line break with an x or a line break that follows it."""
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("merges"), merges=[("Ċ", "Ċ"), ("Ċ", "x")]))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces")))


def encode(tokenizer: Tokenizer, example: Example) -> Document:
    return encode_examples(tokenizer, [example])[0]


def test_ids_by_hand(byte_level: Tokenizer) -> None:
    document = encode(byte_level, Example("Q\n", "né"))
    assert document == Document([BOS, *byte_ids("Q\n"), *byte_ids("né"), EOS], num_prefix=3)
    assert encode(byte_level, Example("", "ab")) == Document([BOS, *byte_ids("ab"), EOS], num_prefix=1)


@pytest.mark.parametrize("response", AWKWARD)
def test_awkward_responses_are_proved_and_keep_the_inference_prompt(
    byte_level: Tokenizer, merging: Tokenizer, pieces: Tokenizer, response: str
) -> None:
    for tokenizer in (byte_level, merging, pieces):
        example = Example("Task: write\n", response)
        document = encode(tokenizer, example)
        prompt_ids = [*tokenizer.bos, *tokenizer.encode(example.prompt)]
        assert document.ids[: len(prompt_ids)] == prompt_ids
        assert document.num_prefix == len(prompt_ids) < len(document.ids) - 1
        assert span_is_proved(tokenizer, example, document)


@settings(deadline=None, max_examples=60)
@given(prompt=TEXT, response=TEXT.filter(bool))
def test_any_text_is_proved_with_bytes(byte_level: Tokenizer, prompt: str, response: str) -> None:
    example = Example(prompt, response)
    document = encode(byte_level, example)
    if special_token_reason(document.ids[1:-1], text_forbidden_ids(byte_level)) is None:
        assert span_is_proved(byte_level, example, document)
        assert byte_level.decode(document.ids[document.num_prefix : -1]) == response


def test_a_merge_over_the_boundary_is_not_used(merging: Tokenizer) -> None:
    joint = merging.encode("Q\nx")
    document = encode(merging, Example("Q\n", "x"))
    assert len(joint) == 2, "the tokenizer does merge the line break with the x"
    assert document.ids == [BOS, *byte_ids("Q\nx"), EOS]


def test_sentencepiece_response_is_encoded_in_context(pieces: Tokenizer) -> None:
    document = encode(pieces, Example("Task\n", "write"))
    alone = pieces.encode("write")
    assert document.ids[document.num_prefix : -1] != alone, "alone it would begin with a space"
    assert pieces.decode(alone) == "write", "and decoding it alone would hide that"
    broken = Document([*document.ids[: document.num_prefix], *alone, EOS], document.num_prefix)
    assert not span_is_proved(pieces, Example("Task\n", "write"), broken)


def test_text_that_sentencepiece_cannot_give_back_is_not_proved(pieces: Tokenizer) -> None:
    example = Example("Task\n", "a\u2581b")  # its own mark for a space
    assert not span_is_proved(pieces, example, encode(pieces, example))


BREAKS: dict[str, Callable[[Document], Document]] = {
    "boundary one token late": lambda d: Document(d.ids, d.num_prefix + 1),
    "boundary one token early": lambda d: Document(d.ids, d.num_prefix - 1),
    "no eos": lambda d: Document(d.ids[:-1], d.num_prefix),
    "eos twice": lambda d: Document([*d.ids, EOS], d.num_prefix),
    "no bos": lambda d: Document(d.ids[1:], d.num_prefix - 1),
    "bos twice": lambda d: Document([BOS, *d.ids], d.num_prefix + 1),
    "bos before the response": lambda d: Document([*d.ids[: d.num_prefix], BOS, *d.ids[d.num_prefix :]], d.num_prefix),
    "last response token lost": lambda d: Document([*d.ids[:-2], d.ids[-1]], d.num_prefix),
    "one response token changed": lambda d: Document([*d.ids[:-2], d.ids[-2] + 1, d.ids[-1]], d.num_prefix),
    "one prompt token changed": lambda d: Document([d.ids[0], d.ids[1] + 1, *d.ids[2:]], d.num_prefix),
    "a special token inside": lambda d: Document([*d.ids[:-2], 0, *d.ids[-2:]], d.num_prefix),
    "no response": lambda d: Document([*d.ids[: d.num_prefix], EOS], d.num_prefix),
}


@pytest.mark.parametrize("name", BREAKS)
def test_control_a_broken_encoder_is_caught(byte_level: Tokenizer, pieces: Tokenizer, name: str) -> None:
    for tokenizer in (byte_level, pieces):
        example = Example("Task: write\n", "write aaa the task")
        document = encode(tokenizer, example)
        assert span_is_proved(tokenizer, example, document)
        assert not span_is_proved(tokenizer, example, BREAKS[name](document))


def test_truncation_ends_at_a_whole_character_without_eos(byte_level: Tokenizer) -> None:
    example = Example("Q\n", "ab🙂🙂")
    document = encode(byte_level, example)  # bos 2 prompt 10 response eos
    for seq_len, kept in [(13, "ab🙂🙂"), (12, "ab🙂"), (9, "ab🙂"), (8, "ab"), (5, "ab"), (4, "a")]:
        cut = truncate(byte_level, example, document, seq_len)
        assert cut == Document([BOS, *byte_ids("Q\n" + kept)], 3, truncated=True)
    assert truncate(byte_level, example, document, 3) is None
    assert truncate(byte_level, example, document, 2) is None


def test_control_a_broken_cut_is_caught(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (byte_level, pieces):
        example = Example("Task: write\n", "write aaa the task")
        document = encode(tokenizer, example)
        cut = truncate(tokenizer, example, document, len(document.ids) - 2)
        assert cut is not None
        assert span_is_proved(tokenizer, example, cut)
        for broken in ([*cut.ids, EOS], [*cut.ids[:-1], cut.ids[-1] + 1], cut.ids[1:], cut.ids[: cut.num_prefix]):
            assert not span_is_proved(tokenizer, example, Document(broken, cut.num_prefix, truncated=True))
        assert not span_is_proved(tokenizer, example, Document(cut.ids, cut.num_prefix)), "a whole one ends with eos"


def test_reasons_that_need_no_tokens() -> None:
    assert text_reason(Example("p", " \n\t")) == "empty_output"
    assert text_reason(Example("p", "")) == "empty_output"
    assert text_reason(Example("p", "\ud800")) == "invalid_unicode"
    assert text_reason(Example("p", " a")) is None


def test_special_token_text_is_named(byte_level: Tokenizer) -> None:
    forbidden = text_forbidden_ids(byte_level)
    assert special_token_reason(byte_level.encode("stop</s>now"), forbidden) == "special_token_in_text"
    assert special_token_reason(byte_level.encode("stop</ s>now"), forbidden) is None


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "bytes")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "</s>", ', ""))
    with pytest.raises(UserError, match="no EOS token"):
        eos_of(load_tokenizer(folder))


def test_reference_comparison_counts_equal_texts(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    assert compare_with_reference(byte_level, ["a"]) is None
    told = compare_with_reference(pieces, ["write the task", "the request"])
    assert told is not None
    assert (told["used"], told["texts"]) == ("sentencepiece", 2)


def test_reference_comparison_control(byte_level: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json of another tokenizer beside the tokenizer.model: no text agrees."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for source, name in [
        (byte_level, "tokenizer.json"),
        (byte_level, "tokenizer_config.json"),
        (pieces, "tokenizer.model"),
    ]:
        (folder / name).write_bytes((source.path / name).read_bytes())
    told = compare_with_reference(load_tokenizer(folder), ["write the task", "the request"])
    assert told is not None
    assert (told["used"], told["texts"], told["equal"]) == ("transformers", 2, 0)


def test_probe_names_texts_and_ids(byte_level: Tokenizer) -> None:
    probe = probe_ids(byte_level)
    assert len(probe) == 4
    assert all(item["ids"] == byte_ids(str(item["text"])) for item in probe)
