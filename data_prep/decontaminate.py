"""Rows that overlap with evaluation items: n consecutive words shared, as in Brown et al. 2020, appendix C.

Words are folded and stand without punctuation. Items of fewer than n words must stand in a row as a whole.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.eval_files import HELLASWAG_FIELDS, MMLU_FIELDS, Row, read_eval_rows
from data_prep.words import WORD, fold, words
from sft.errors import UserError

MIN_WORDS = 5
"""Items with fewer words than this would match by chance; they are not checked."""
MIN_FIELD_WORDS = 8
"""A question without its choices is an item too from this many words on: the least that Brown et al. use."""
BITS_PER_KEY = 32
"""Size of the table that rules most n-grams out: at most 1 in 32 of the others passes on to the search."""
BASE = 0x2545F4914F6CDD1D
MIX = np.uint64(0x9E3779B97F4A7C15)

LETTERS = "ABCDEFGHIJ"
WIKIHOW_TAG = re.compile(r"\[.*?\]")
# a character with the marks that NFKC may join to it, or a Korean syllable spelt in letters
_CLUSTER = re.compile(
    "[\u1100-\u115f][\u1160-\u11a7]?[\u11a8-\u11ff]*"
    "|(?s:.)[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0903\u093c-\u094d\u3099\u309a]*"
)


class Item(NamedTuple):
    """A text of an evaluation item; an item may have several."""

    name: str
    text: str
    before: str = ""
    """Text in front of it that another of the item's texts already covers."""


class Hit(NamedTuple):
    """An overlap: the item, and the shared words as they stand in the row."""

    item_name: str
    overlap_text: str


def load_items(paths: list[str]) -> list[Item]:
    """Texts of all items in the files and folders: MMLU, HellaSwag, and the strings of other tables.

    Raises:
        UserError: a path or a file is not evaluation data; see `data_prep.eval_files`.
    """
    items = [item for row in read_eval_rows(paths) for item in _items_of(row)]
    if not items:
        raise UserError(f"decontaminate {', '.join(paths)}: no row holds text; give files of evaluation items")
    return items


def _items_of(row: Row) -> Iterator[Item]:
    fields = row.fields
    if fields.keys() >= HELLASWAG_FIELDS:
        context = f"{fields.get('activity_label') or ''}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b')}"
        endings = _texts(row, "endings")
        tags = any("[" in text for text in (context, *endings))
        for clean in (False, True) if tags else (False,):
            before, *texts = (_without_tags(text) if clean else text for text in (context, *endings))
            yield Item(row.name, f"{before} {texts[0]}" if texts else before)
            yield from (Item(row.name, text, before) for text in texts[1:])
    elif fields.keys() >= MMLU_FIELDS:
        question, choices = _text(row, "question"), _texts(row, "choices")
        yield Item(row.name, " ".join([question, *choices]))
        yield Item(
            row.name, " ".join(f"{letter} {text}" for letter, text in zip(LETTERS, choices, strict=False)), question
        )
        yield from _if_long(row.name, [question])
    else:
        texts = list(_strings(fields))
        if texts:
            yield Item(row.name, " ".join(texts))
        if len(texts) > 1:
            yield from _if_long(row.name, texts)


def _if_long(name: str, texts: Sequence[str]) -> Iterator[Item]:
    return (Item(name, text) for text in texts if len(words(text)) >= MIN_FIELD_WORDS)


def _without_tags(text: str) -> str:
    return WIKIHOW_TAG.sub("", text.replace(" [title]", ". "))


def _text(row: Row, field: str) -> str:
    value = row.fields[field]
    if not isinstance(value, str):
        raise UserError(f"decontaminate {row.name}: field '{field}' is {value!r:.80}; need a text")
    return value


def _texts(row: Row, field: str) -> list[str]:
    value = row.fields[field]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"decontaminate {row.name}: field '{field}' is {value!r:.80}; need a list of texts")
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class Decontaminator:
    """The items' n-grams, to look rows up in. Picklable; some 30 bytes per word of the items."""

    def __init__(self, items: Sequence[Item], ngram: int) -> None:
        """`ngram`: consecutive words that make an overlap, at least MIN_WORDS."""
        self.ngram = ngram
        self.vocabulary: dict[str, int] = {}
        ids, starts, names, too_short = self._number_words(items)
        self.num_items = len(set(names) | too_short)
        self.too_short = sorted(too_short - set(names))
        """Names of the items of which no text has MIN_WORDS words: they are not checked."""
        self.names = names
        self.ids = np.fromiter(ids, np.int32, len(ids))
        self.starts = np.array([*starts, len(ids)], dtype=np.int64)
        lengths = np.diff(self.starts)
        self.long = _Index(self.ids, _windows(self.starts, lengths, ngram), ngram)
        short = np.flatnonzero(lengths < ngram)
        self.short = _Index(self.ids, self.starts[short], MIN_WORDS)
        self.short_texts: dict[bytes, list[int]] = {}
        for text in short.tolist():
            start = self.starts[text]
            self.short_texts.setdefault(self.ids[start : start + MIN_WORDS].tobytes(), []).append(text)

    def find(self, text: str) -> Hit | None:
        """The longest overlap of a row's text with an item, the first of equally long ones; None without any.

        A run of words that several texts hold counts for the first of them, and runs of one item that touch are one.
        """
        get = self.vocabulary.get
        ids = np.array([get(word, 0) for word in words(text)], dtype=np.int32)
        best = run = (0, 0, 0)
        for at, position in self.long.find(ids):
            length, first, number = run
            if length and at + self.ngram <= first + length:  # inside the run that was found before
                continue
            run = self._extend(ids, at, position)
            if length and run[1] <= first + length and self.names[run[2]] == self.names[number]:
                run = (run[1] + run[0] - first, first, number)
            best = max(best, run, key=lambda run: run[0])
        for at, _ in self.short.find(ids):
            for number in self.short_texts.get(ids[at : at + MIN_WORDS].tobytes(), []):
                whole = self.ids[self.starts[number] : self.starts[number + 1]]
                if len(whole) > best[0] and np.array_equal(ids[at : at + len(whole)], whole):
                    best = (len(whole), at, number)
        length, at, number = best
        return Hit(self.names[number], _original(text, at, at + length)) if length else None

    def _number_words(self, items: Sequence[Item]) -> tuple[list[int], list[int], list[str], set[str]]:
        """Word ids of all texts end to end, where each text starts, its item's name; names of too short texts."""
        ids: list[int] = []
        starts: list[int] = []
        names: list[str] = []
        too_short: set[str] = set()
        vocabulary = self.vocabulary
        before, context = "", list[str]()
        for item in items:
            if item.before != before:
                before, context = item.before, words(item.before)
            text = words(item.text)
            if item.before and text:
                # enough of the context for every n-gram that ends in the text
                text = context[-(self.ngram - 1) :] + text
            if len(text) < MIN_WORDS:
                too_short.add(item.name)
                continue
            starts.append(len(ids))
            names.append(item.name)
            ids.extend([vocabulary.setdefault(word, len(vocabulary) + 1) for word in text])
        return ids, starts, names, too_short

    def _extend(self, ids: NDArray[np.int32], at: int, position: int) -> tuple[int, int, int]:
        """(words, start in the row, text) of the run of shared words around a shared n-gram."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        start, end = int(self.starts[number]), int(self.starts[number + 1])
        first, last = at, at + self.ngram
        while first > 0 and position > start and ids[first - 1] == self.ids[position - 1]:
            first, position = first - 1, position - 1
        while last < len(ids) and position + last - first < end and ids[last] == self.ids[position + last - first]:
            last += 1
        return last - first, first, number


class _Index:
    """Runs of `length` word ids, by hash, with the position of each run's first occurrence."""

    def __init__(self, ids: NDArray[np.int32], positions: NDArray[np.int64], length: int) -> None:
        self.ids, self.length = ids, length
        num_powers = length if len(positions) else 0  # an n far beyond every text is as good as a large one
        self.powers = np.array([pow(BASE, k, 2**64) for k in range(num_powers)], dtype=np.uint64)
        keys = _hashes(ids, self.powers)[positions] if len(positions) else np.empty(0, np.uint64)
        self.keys, first = np.unique(keys, return_index=True)
        self.positions = positions[first]
        num_bits = max(len(self.keys) * BITS_PER_KEY, 64)
        self.shift = np.uint64(64 - (num_bits - 1).bit_length())
        self.bits = np.zeros(1 << (61 - int(self.shift)), dtype=np.uint8)
        slot = self.keys >> self.shift
        np.bitwise_or.at(self.bits, (slot >> np.uint64(3)).astype(np.int64), _bit(slot))

    def find(self, ids: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
        """(start in `ids`, position of an equal run in the index), by start."""
        if len(ids) < self.length or not len(self.keys):
            return
        hashes = _hashes(ids, self.powers)
        slot = hashes >> self.shift
        maybe = np.flatnonzero(self.bits[(slot >> np.uint64(3)).view(np.int64)] & _bit(slot))
        if len(maybe):
            entries = np.searchsorted(self.keys, hashes[maybe]).clip(max=len(self.keys) - 1)
            found = self.keys[entries] == hashes[maybe]
            for at, position in zip(maybe[found].tolist(), self.positions[entries[found]].tolist(), strict=True):
                if np.array_equal(self.ids[position : position + self.length], ids[at : at + self.length]):
                    yield at, position


def _bit(slot: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (slot & np.uint64(7)).astype(np.uint8))


def _hashes(ids: NDArray[np.int32], powers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of each run of len(powers) ids: a polynomial in BASE modulo 2^64, mixed; needs at least one run."""
    hashes: NDArray[np.uint64] = np.correlate(ids.astype(np.uint64), powers, "valid")
    hashes ^= hashes >> np.uint64(32)
    hashes *= MIX
    return hashes


def _windows(starts: NDArray[np.int64], lengths: NDArray[np.int64], ngram: int) -> NDArray[np.int64]:
    """Where the runs of `ngram` words begin that lie within one text."""
    inside = np.arange(starts[-1]) + ngram <= np.repeat(starts[1:], lengths)
    return np.flatnonzero(inside)


def _original(text: str, first: int, last: int) -> str:
    """Words `first` to `last` (exclusive) of a text as they stand in it, with what is between them."""
    folded = ""
    origins: list[tuple[int, int]] = []
    for cluster in _CLUSTER.finditer(text):
        part = fold(cluster[0])
        folded += part
        origins += [cluster.span()] * len(part)
    found = list(WORD.finditer(folded))
    if [match[0] for match in found] != words(text):  # characters that fold together across clusters: rare scripts
        return " ".join(words(text)[first:last])
    return text[origins[found[first].start()][0] : origins[found[last - 1].end() - 1][1]]
