"""The reference document: ids by hand, the span proof with encoders that are broken on purpose, and cutting."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import filters
from data_prep.documents import Document, eos_of, join_documents, keep_documents, replace_documents
from data_prep.encode import encode_examples, reference_document, truncate
from data_prep.example import Example
from data_prep.filters import SPAN_UNPROVED, SPECIAL_TOKEN_IN_TEXT
from sft.errors import UserError
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.prep_support import answer, byte_bpe_tokenizer, byte_ids, sentencepiece_tokenizer
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
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_bpe_tokenizer(tmp_path_factory.mktemp("byte_bpe")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(params=["byte_level", "merging", "byte_bpe", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def proved(tokenizer: Tokenizer, example: Example) -> Document:
    document = reference_document(tokenizer, example)
    assert isinstance(document, Document), document
    return document


def test_ids_by_hand(byte_level: Tokenizer) -> None:
    ids = [BOS, *byte_ids("Q\n"), *byte_ids("né"), EOS]
    assert proved(byte_level, answer("Q\n", "né")) == Document(ids, [(3, 7)])
    assert proved(byte_level, answer("", "ab")) == Document([BOS, *byte_ids("ab"), EOS], [(1, 4)])


def test_several_texts_by_hand(byte_level: Tokenizer) -> None:
    """One BOS, EOS after each text; it is supervised where the text's response is."""
    example = Example(("Qa", "Rb", "Sc"), (((1, 2),), (), ((1, 2),)), True)
    ids = [BOS, *byte_ids("Qa"), EOS, *byte_ids("Rb"), EOS, *byte_ids("Sc"), EOS]
    assert proved(byte_level, example) == Document(ids, [(2, 4), (8, 10)])


def test_a_span_within_a_text_does_not_take_the_stop_token(byte_level: Tokenizer) -> None:
    example = Example(("QaRb",), (((1, 2), (3, 4)),), True)
    assert proved(byte_level, example) == Document([BOS, *byte_ids("QaRb"), EOS], [(2, 3), (4, 6)])
    assert proved(byte_level, Example(("Qab",), (((1, 2),),), True)).runs == [(2, 3)]


def test_a_chat_brings_its_own_stop_tokens(byte_level: Tokenizer) -> None:
    example = Example(("Qa</s>R<s>b</s>\n",), (((1, 6), (10, 15)),), False)
    ids = [BOS, *byte_ids("Qa"), EOS, *byte_ids("R"), BOS, *byte_ids("b"), EOS, *byte_ids("\n")]
    assert proved(byte_level, example) == Document(ids, [(2, 4), (6, 8)])


def test_a_chat_with_a_bare_sentencepiece_model_has_special_tokens_too(pieces: Tokenizer) -> None:
    document = proved(pieces, Example(("the task</s>",), (((3, 12),),), False))
    assert document.ids == [BOS, *pieces.encode("the task"), EOS]
    assert document.runs[0][1] == len(document.ids)
    assert EOS not in pieces.encode("</s>"), "sentencepiece itself takes the name for text"


@pytest.mark.parametrize("response", AWKWARD)
def test_the_prompt_is_a_strict_prefix_and_the_rest_is_the_response(tokenizer: Tokenizer, response: str) -> None:
    prompt = "Task: write\n"
    document = proved(tokenizer, answer(prompt, response))
    asked = [*tokenizer.bos, *tokenizer.encode(prompt)]
    [(start, end)] = document.runs
    assert document.ids[:start] == asked
    assert start < end - 1
    assert end == len(document.ids)
    assert document.ids[-1] == tokenizer.eos_id
    assert [id for id in document.ids[:-1] if id in tokenizer.special_ids] == list(tokenizer.bos)
    before, after = tokenizer.decode(asked), tokenizer.decode([*asked, *document.ids[start : end - 1]])
    assert after == before + response


@settings(deadline=None, max_examples=60)
@given(prompt=TEXT, response=TEXT.filter(bool))
def test_any_text_is_proved_with_bytes(byte_level: Tokenizer, prompt: str, response: str) -> None:
    document = reference_document(byte_level, answer(prompt, response))
    if any(name in prompt + response for name in ("<s>", "</s>", "<unk>")):
        assert document in (SPECIAL_TOKEN_IN_TEXT, SPAN_UNPROVED)
        return
    assert isinstance(document, Document)
    [(start, end)] = document.runs
    assert byte_level.decode(document.ids[start:end]) == response + "</s>"


def test_a_merge_over_the_boundary_is_not_used(merging: Tokenizer) -> None:
    assert len(merging.encode("Q\nx")) == 2, "the tokenizer does merge the line break with the x"
    assert proved(merging, answer("Q\n", "x")).ids == [BOS, *byte_ids("Q\nx"), EOS]


def test_sentencepiece_response_is_encoded_in_context(pieces: Tokenizer) -> None:
    document = proved(pieces, answer("Task\n", "write"))
    alone = pieces.encode("write")
    assert document.ids[document.runs[0][0] : -1] != alone, "alone it would begin with a space"
    assert pieces.decode(alone) == "write", "and decoding it alone would hide that"


@pytest.mark.parametrize(
    ("kind", "example", "reason"),
    [
        ("byte_level", answer("Q\n", "stop</s>now"), SPECIAL_TOKEN_IN_TEXT),
        ("byte_level", answer("Q<s>\n", "a"), SPECIAL_TOKEN_IN_TEXT),
        ("byte_level", answer("Q<unk>\n", "a"), SPAN_UNPROVED),
        ("byte_level", Example(("Qa", "</s>b"), ((), ((4, 5),)), True), SPECIAL_TOKEN_IN_TEXT),
        ("pieces", answer("Task\n", "a\u2581b"), SPAN_UNPROVED),  # its own mark for a space
        ("merging", Example(("Q\nxa",), (((2, 3),),), True), SPAN_UNPROVED),  # \nx is one token
        ("merging", Example(("Q\nxa",), (((0, 2),),), True), SPAN_UNPROVED),
        ("byte_level", Example(("Qa</s>",), (((1, 2),),), False), SPAN_UNPROVED),  # the stop token left out
        ("byte_level", Example(("Qa</s></s>",), (((1, 10),),), False), SPAN_UNPROVED),
        ("byte_level", Example(("Q</s>",), (((1, 5),),), False), SPAN_UNPROVED),  # nothing before it
    ],
)
def test_what_cannot_be_proved_has_a_reason(
    request: pytest.FixtureRequest, kind: str, example: Example, reason: str
) -> None:
    assert reference_document(request.getfixturevalue(kind), example) == reason
    assert reason in filters.MEANING


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("byte_level", answer("Q\n", "stop</ s>now")),
        ("pieces", answer("Task\n", "a b")),
        ("merging", Example(("Q\nya",), (((2, 3),),), True)),
        ("byte_level", Example(("Qa</s>",), (((1, 6),),), False)),
    ],
)
def test_control_what_is_only_like_it_is_proved(request: pytest.FixtureRequest, kind: str, example: Example) -> None:
    proved(request.getfixturevalue(kind), example)


BREAKS: dict[str, Callable[[list[int]], list[int]]] = {
    "the last token lost": lambda ids: ids[:-1],
    "a token in the middle lost": lambda ids: [*ids[:-2], *ids[-1:]],
    "a token twice": lambda ids: [*ids, *ids[-1:]],
    "a token changed": lambda ids: [*ids[:-1], ids[-1] + 1],
    "a special token in front": lambda ids: [0, *ids],
    "a special token behind": lambda ids: [*ids, 0],
    "nothing": lambda ids: [],
}


@pytest.mark.parametrize("only_whole", [True, False])
@pytest.mark.parametrize("name", BREAKS)
def test_control_a_broken_encoder_is_caught(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, only_whole: bool
) -> None:
    """Broken for every text, or for the whole one and not its prompt; then prompt and rest apart may still be right."""
    example = answer("Task: write\n", "write aaa the tasy")
    sound = proved(tokenizer, example)
    encode = Tokenizer.encode_batch

    def broken(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        found = zip(texts, encode(self, texts), strict=True)
        return [ids if only_whole and text != example.texts[0] else BREAKS[name](ids) for text, ids in found]

    monkeypatch.setattr(Tokenizer, "encode_batch", broken)
    found = reference_document(tokenizer, example)
    assert found in (SPAN_UNPROVED, SPECIAL_TOKEN_IN_TEXT) or (only_whole and found == sound)


def test_truncation_ends_at_a_whole_character_without_eos(byte_level: Tokenizer) -> None:
    example = answer("Q\n", "ab🙂🙂")
    document = proved(byte_level, example)  # bos 2 prompt 10 response eos
    for seq_len, kept in [(13, "ab🙂🙂"), (12, "ab🙂"), (9, "ab🙂"), (8, "ab"), (5, "ab"), (4, "a")]:
        ids = [BOS, *byte_ids("Q\n" + kept)]
        assert truncate(byte_level, example, document, seq_len) == Document(ids, [(3, len(ids))], truncated=True)
    assert truncate(byte_level, example, document, 3) is None
    assert truncate(byte_level, example, document, 2) is None


def test_a_cut_within_a_replacement_character_is_seen(byte_level: Tokenizer) -> None:
    """Half of U+FFFD decodes to U+FFFD, so that the text alone would not show it."""
    example = answer("Q\n", "ab\ufffd\ufffd")
    cut = truncate(byte_level, example, proved(byte_level, example), 7)
    assert cut is not None
    assert cut.ids == [BOS, *byte_ids("Q\nab")]


def test_a_cut_among_several_runs(byte_level: Tokenizer) -> None:
    example = Example(("Qab", "long prompt Rcd"), (((1, 3),), ((13, 15),)), True)
    document = proved(byte_level, example)  # bos Q ab eos | 13 prompt, cd, eos
    assert document.runs == [(2, 5), (18, 21)]
    assert truncate(byte_level, example, document, 20) == Document(
        document.ids[:20], [(2, 5), (18, 20)], truncated=True
    )
    assert truncate(byte_level, example, document, 19) == Document(
        document.ids[:19], [(2, 5), (18, 19)], truncated=True
    )
    for within_prompt in (18, 17, 6, 5):  # back to the first response, which keeps its stop token
        assert truncate(byte_level, example, document, within_prompt) == Document(
            document.ids[:5], [(2, 5)], truncated=True
        )
    assert truncate(byte_level, example, document, 4) == Document(document.ids[:4], [(2, 4)], truncated=True)
    assert truncate(byte_level, example, document, 2) is None


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_cut_is_a_prefix_of_whole_characters(tokenizer_of: Sequence[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(tokenizer_of))
    turns = data.draw(st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=3))
    spans = tuple(((len(prompt), len(prompt + response)),) for prompt, response in turns)
    example = Example(tuple(prompt + response for prompt, response in turns), spans, True)
    document = reference_document(tokenizer, example)
    if isinstance(document, str):
        return
    seq_len = data.draw(st.integers(1, len(document.ids) - 1))
    cut = truncate(tokenizer, example, document, seq_len)
    if cut is None:
        return
    assert len(cut.ids) <= seq_len
    assert document.ids[: len(cut.ids)] == cut.ids
    assert cut.truncated
    *whole, (start, end) = cut.runs
    assert whole == document.runs[: len(whole)]
    assert start == document.runs[len(whole)][0] < end == len(cut.ids)
    if (start, end) != document.runs[len(whole)]:
        first = whole[-1][1] if whole else len(tokenizer.bos)  # of the text that is cut
        shown, asked = tokenizer.decode(cut.ids[first:]), tokenizer.decode(cut.ids[first:start])
        assert shown.startswith(asked)
        assert turns[len(whole)][1].startswith(shown[len(asked) :])
        assert cut.ids[-1] != tokenizer.eos_id


@pytest.fixture(scope="module")
def tokenizer_of(byte_level: Tokenizer, byte_bpe: Tokenizer, pieces: Tokenizer) -> list[Tokenizer]:
    return [byte_level, byte_bpe, pieces]


def test_without_gigatoken_every_document_is_the_reference(byte_level: Tokenizer) -> None:
    examples = [answer("Q\n", "a"), answer("Q\n", "</s>"), answer("", "né"), answer("Q", "<unk>")]
    encoded, reasons = encode_examples(byte_level, None, examples)
    assert reasons == {1: SPECIAL_TOKEN_IN_TEXT, 3: SPAN_UNPROVED}
    assert encoded.lengths.tolist() == [5, 0, 5, 0]
    for position in (0, 2):
        assert encoded.document(position) == proved(byte_level, examples[position])
    empty, reasons = encode_examples(byte_level, None, [])
    assert (len(empty), empty.ids.dtype, empty.runs.shape, reasons) == (0, np.int32, (0, 2), {})


def test_documents_are_kept_and_replaced_one_by_one() -> None:
    documents = [Document([1, 2], [(1, 2)]), Document([3], []), Document([4, 5, 6], [(0, 1), (2, 3)])]
    encoded = join_documents(documents)
    assert [encoded.document(number) for number in range(3)] == documents
    kept = keep_documents(encoded, np.array([True, False, True]))
    assert [kept.document(number) for number in range(len(kept))] == [documents[0], documents[2]]
    replaced = replace_documents(encoded, {0: None, 2: documents[0]})
    assert [replaced.document(number) for number in range(3)] == [Document([], []), documents[1], documents[0]]
    assert [encoded.document(number) for number in range(3)] == documents, "the original is as it was"


def test_a_tokenizer_without_eos_is_refused(byte_level: Tokenizer) -> None:
    assert eos_of(byte_level) == EOS
    with pytest.raises(UserError, match="no EOS token") as caught:
        eos_of(replace(byte_level, eos_id=None))
    assert str(byte_level.path) in str(caught.value)
