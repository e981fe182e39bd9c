"""Many documents at once: equal to the reference wherever it says that they are proved, and broken parts are caught."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import filters
from data_prep.at_once import encode_at_once
from data_prep.documents import Document, Encoded
from data_prep.encode import encode_examples, reference_document
from data_prep.example import Example
from data_prep.fast import FastTokens, load_fast
from data_prep.template import alpaca_prompt
from sft.tokenizer import Tokenizer, load_sentencepiece, load_tokenizer
from tests.prep_support import answer, byte_bpe_tokenizer, needs_shared, sentencepiece_tokenizer, shared_examples
from tests.tiny import SHARED, make_tokenizer

Pair = tuple[Tokenizer, FastTokens]
KINDS: dict[str, Callable[[Path], Path]] = {
    "bytes": make_tokenizer,
    "byte_bpe": byte_bpe_tokenizer,
    "pieces": sentencepiece_tokenizer,
}


def load(folder: Path) -> Pair:
    tokenizer = load_tokenizer(folder)
    fast = load_fast(tokenizer)
    assert fast is not None
    return tokenizer, fast


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(KINDS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces")))


def check(tokenizer: Tokenizer, examples: Sequence[Example], encoded: Encoded, proved: Sequence[bool]) -> None:
    """Every proved document is the reference's."""
    for number, example in enumerate(examples):
        if proved[number]:
            assert encoded.document(number) == reference_document(tokenizer, example), example


def same(one: tuple[Encoded, dict[int, str]], other: tuple[Encoded, dict[int, str]]) -> bool:
    names = ("ids", "lengths", "num_runs", "runs")
    equal = [np.array_equal(getattr(one[0], name), getattr(other[0], name)) for name in names]
    types = [getattr(one[0], name).dtype == getattr(other[0], name).dtype == np.int32 for name in names]
    return all([*equal, *types]) and one[1] == other[1]


@needs_shared
@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_all_shared_rows_are_proved_and_have_the_librarys_own_ids(name: str) -> None:
    tokenizer, fast = load(SHARED / "tokenizers" / name)
    examples = shared_examples()
    assert len(examples) > 4000
    assert sum("\u4e00" <= example.texts[0][-2] <= "\u9fff" for example in examples) > 500, (
        "Chinese rows are among them"
    )
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    assert proved.all()
    check(tokenizer, examples, encoded, proved)
    if name == "llama2":
        encode = load_sentencepiece(SHARED / "tokenizers" / name / "tokenizer.model").encode
    else:
        encode = lambda text: tokenizer.hf.encode(text, add_special_tokens=False)  # noqa: E731
    ends = np.cumsum(encoded.lengths)
    for example, start, end in zip(examples, (ends - encoded.lengths).tolist(), ends.tolist(), strict=True):
        assert encoded.ids[start:end].tolist() == [*tokenizer.bos, *encode(example.texts[0]), tokenizer.eos_id]


ORDINARY = ["x", " leading", "\nline", "trailing \n", "  two", "é", "🙂", "a\tb", "0", "\u200d", "\ufeffbom", "你好。"]


def ordinary_examples() -> list[Example]:
    """Of every shape that preparation makes, all of which every tokenizer here can prove."""
    rows = [answer(alpaca_prompt("Write the task", "a request"), response) for response in ORDINARY]
    turns = Example(("Task\nyes", "\nTask\nno", "\nTask\n ok"), (((5, 8),), (), ((6, 9),)), True)
    return [*rows, answer("", "plain text"), answer("", " indented"), turns, *rows[::-1]]


def test_ordinary_rows_are_all_proved_in_any_batch(pair: Pair) -> None:
    tokenizer, fast = pair
    examples = ordinary_examples()
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    assert proved.all()
    check(tokenizer, examples, encoded, proved)
    for size in (1, 2, 7):
        starts = range(0, len(examples), size)
        parts = [encode_at_once(tokenizer, fast, examples[start : start + size])[0] for start in starts]
        assert np.concatenate([part.ids for part in parts]).tolist() == encoded.ids.tolist()
        assert np.concatenate([part.runs for part in parts]).tolist() == encoded.runs.tolist()


def test_control_the_comparison_sees_a_changed_id_and_a_moved_run(pair: Pair) -> None:
    tokenizer, fast = pair
    examples = ordinary_examples()
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    other_ids, other_runs = encoded.ids.copy(), encoded.runs.copy()
    other_ids[-3] += 1
    other_runs[4, 0] -= 1
    for broken in (replace(encoded, ids=other_ids), replace(encoded, runs=other_runs)):
        with pytest.raises(AssertionError):
            check(tokenizer, examples, broken, proved)
        assert not same((encoded, {}), (broken, {}))


FRAGMENTS = st.one_of(
    st.sampled_from(
        [" ", "  ", "\n", "\n\n", "\r\n", "\t", "task", " the", "write", "don't", "12", "é", "e\u0301", "你好"]
    ),
    st.sampled_from(
        ["🙂", "\u200d", "\u3000", "\ufeff", "▁", "<0x41>", "</s", "</s>", "<s>", "<unk>", "<|end|>", "\ufffd"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
TEXTS = st.lists(FRAGMENTS, max_size=6).map("".join)
NOT_EMPTY = TEXTS.filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """Stretches of text with a stop token each, not all of them supervised."""
    turns = draw(st.lists(st.tuples(TEXTS, NOT_EMPTY, st.booleans()), min_size=1, max_size=3))
    spans = tuple(((len(prompt), len(prompt + response)),) if learn else () for prompt, response, learn in turns)
    return Example(tuple(prompt + response for prompt, response, _ in turns), spans, True)


@st.composite
def chats(draw: st.DrawFn, special: str = "</s>") -> Example:
    """One text in which special tokens stand between the turns, as chat templates write them."""
    text, spans = "", []
    for question, reply in draw(st.lists(st.tuples(TEXTS, NOT_EMPTY), min_size=1, max_size=3)):
        text += f"{draw(st.sampled_from(['<s>', 'user: ', '</s>']))}{question}\nassistant:"
        start = len(text)
        text += reply + draw(st.sampled_from(["</s>", "<|end|>", ""]))
        spans.append((start, len(text)))
        text += draw(st.sampled_from(["\n", "", " "]))
    return Example((text,), (tuple(spans),), False)


@st.composite
def cut_texts(draw: st.DrawFn) -> Example:
    """Spans anywhere in a text, also in the middle of what becomes one token."""
    text = draw(NOT_EMPTY)
    borders = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=6)))
    return Example((text,), (tuple(zip(borders[::2], borders[1::2], strict=False)),), draw(st.booleans()))


ANY = st.lists(st.one_of(conversations(), chats(), cut_texts()), max_size=5)


@settings(deadline=None, max_examples=100)
@given(examples=ANY)
def test_any_examples_equal_the_reference_where_proved(pair: Pair, examples: list[Example]) -> None:
    tokenizer, fast = pair
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    check(tokenizer, examples, encoded, proved)
    assert same(encode_examples(tokenizer, fast, examples), encode_examples(tokenizer, None, examples))


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, response=NOT_EMPTY)
def test_every_row_that_the_reference_accepts_is_proved(pair: Pair, prompt: str, response: str) -> None:
    """But for what merges over the border, holds a special token, or a prompt with SentencePiece's mark for a space.

    So the comparison above is not an empty one.
    """
    tokenizer, fast = pair
    example = answer(prompt, response)
    merges = tokenizer.encode(prompt + response)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)
    named = not tokenizer.special_ids.isdisjoint(fast.encode([prompt + response])[0].tolist())
    accepted = isinstance(reference_document(tokenizer, example), Document)
    marked = bool(fast.gap) and "▁" in prompt
    assert encode_at_once(tokenizer, fast, [example])[1].tolist() == [accepted and not (merges or named or marked)]


def test_a_block_without_rows_and_texts_without_ids(pair: Pair) -> None:
    tokenizer, fast = pair
    encoded, proved = encode_at_once(tokenizer, fast, [])
    assert (len(encoded), len(encoded.ids), encoded.runs.shape, len(proved)) == (0, 0, (0, 2), 0)
    examples = [answer("a", "b"), Example(("a</s>", ""), (((0, 5),), ()), True), answer("a", "b")]
    assert encode_at_once(tokenizer, fast, examples)[1].tolist() == [True, False, True]


Ids = tuple[np.ndarray, np.ndarray]


def with_id(at: int, value: int) -> Callable[[np.ndarray, np.ndarray], Ids]:
    def change(ids: np.ndarray, offsets: np.ndarray) -> Ids:
        ids = ids.copy()
        ids[offsets[1] + at if at >= 0 else offsets[2] + at] = value
        return ids, offsets

    return change


def moved_border(ids: np.ndarray, offsets: np.ndarray) -> Ids:
    offsets = offsets.copy()
    offsets[2] -= 1
    return ids, offsets


def lost_token(ids: np.ndarray, offsets: np.ndarray) -> Ids:
    return np.delete(ids, offsets[2] - 1), np.append(offsets[:2], offsets[2:] - 1)


def one_more_token(ids: np.ndarray, offsets: np.ndarray) -> Ids:
    return np.insert(ids, offsets[2], ids[0]), np.append(offsets[:2], offsets[2:] + 1)


def without_ids(ids: np.ndarray, offsets: np.ndarray) -> Ids:
    return ids[:0], np.zeros_like(offsets)


CHANGES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Ids], list[bool]]] = {
    "an id of the prompt": (with_id(2, 60), [True, False, True]),
    "an id of the response": (with_id(-2, 60), [True, False, True]),
    "the last id": (with_id(-1, 60), [True, False, True]),
    "a special token": (with_id(-2, 0), [True, False, True]),
    "a border one token early": (moved_border, [True, False, False]),
    "a token lost": (lost_token, [True, False, True]),
    "a token too many": (one_more_token, [True, False, True]),
    "no ids at all": (without_ids, [False, False, False]),
}


@pytest.mark.parametrize("call", ["texts", "prompts"])
@pytest.mark.parametrize("name", CHANGES)
def test_control_a_broken_backend_is_caught_and_the_reference_takes_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    tokenizer, fast = pair
    examples = [answer(f"Task {number}: write\n", f"answer {number} zz") for number in range(3)]
    expected = encode_examples(tokenizer, None, examples)
    assert encode_at_once(tokenizer, fast, examples)[1].all()
    change, proved = CHANGES[name]
    encode, calls = FastTokens.encode, []

    def broken(self: FastTokens, texts: Sequence[str]) -> Ids:
        calls.append(texts)
        found = encode(self, texts)
        return change(*found) if len(calls) % 2 == (call == "texts") else found

    monkeypatch.setattr(FastTokens, "encode", broken)
    assert encode_at_once(tokenizer, fast, examples)[1].tolist() == proved
    assert same(encode_examples(tokenizer, fast, examples), expected)
    assert len(calls) == 4


def test_control_a_wrong_spelling_is_caught_and_the_reference_takes_over(pair: Pair) -> None:
    tokenizer, fast = pair
    examples = [answer("Task: write\n", "zz"), answer("Task: write\n", "yy")]
    [wrong] = set(tokenizer.encode("Task: write\nzz")) - set(tokenizer.encode("Task: write\nyy"))
    spelling = fast.pieces.to_pylist()
    for other in (b"y" * len(spelling[wrong]), b"", b"longer"):
        broken = replace(fast, pieces=pa.array([*spelling[:wrong], other, *spelling[wrong + 1 :]], type=pa.binary()))
        assert encode_at_once(tokenizer, broken, examples)[1].tolist() == [False, True]
        expected = encode_examples(tokenizer, None, examples)
        assert same(encode_examples(tokenizer, broken, examples), expected)


def test_replaced_and_dropped_documents_keep_their_places(pieces: Pair) -> None:
    """Rows that only the reference can judge, between rows that are proved: each keeps its own ids and reason."""
    tokenizer, fast = pieces
    examples = [answer("a\n", "b"), answer("a\n", "c </s>"), answer("a\n", "▁"), answer("", "d"), answer("", "e▁")]
    assert encode_at_once(tokenizer, fast, examples)[1].tolist() == [True, False, False, True, False]
    encoded, reasons = encode_examples(tokenizer, fast, examples)
    assert reasons == {2: filters.SPAN_UNPROVED, 4: filters.SPAN_UNPROVED}
    for number, example in enumerate(examples):
        expected = reference_document(tokenizer, example)
        found = encoded.document(number)
        assert found == (Document([], []) if isinstance(expected, str) else expected)
