"""A block of examples to documents at once: gigatoken encodes, and what every id spells is compared with the text.

All comparisons run over flat arrays: the bytes of all ids against those of all texts, and the ids of every prompt
against the first ids of its text. They are sufficient for what `encode.reference_document` proves, not necessary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_prep.documents import Encoded, eos_of
from data_prep.example import Example
from data_prep.fast import FastTokens
from sft.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class _Texts:
    """The texts of several examples in a row, and their spans with byte offsets."""

    texts: list[str]
    doc_of: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    span_text: NDArray[np.int64]
    span_start: NDArray[np.int64]
    span_end: NDArray[np.int64]
    prompts: list[str]


def _flatten(examples: Sequence[Example]) -> _Texts:
    texts: list[str] = []
    doc_of: list[int] = []
    num_bytes: list[int] = []
    span_text: list[int] = []
    span_start: list[int] = []
    span_end: list[int] = []
    prompts: list[str] = []
    for number, example in enumerate(examples):
        for text, spans in zip(example.texts, example.spans, strict=True):
            ascii_only = text.isascii()
            size = len(text) if ascii_only else len(text.encode())
            for start, end in spans:
                prompt = text[:start]
                prompts.append(prompt)
                span_text.append(len(texts))
                span_start.append(start if ascii_only else len(prompt.encode()))
                span_end.append(
                    size if end == len(text) else end if ascii_only else span_start[-1] + len(text[start:end].encode())
                )
            texts.append(text)
            doc_of.append(number)
            num_bytes.append(size)
    return _Texts(
        texts=texts,
        doc_of=np.array(doc_of, dtype=np.int64),
        num_bytes=np.array(num_bytes, dtype=np.int64),
        span_text=np.array(span_text, dtype=np.int64),
        span_start=np.array(span_start, dtype=np.int64),
        span_end=np.array(span_end, dtype=np.int64),
        prompts=prompts,
    )


def encode_at_once(
    tokenizer: Tokenizer, fast: FastTokens, examples: Sequence[Example]
) -> tuple[Encoded, NDArray[np.bool_]]:
    """(documents, which of them are proved [examples]); what stands for the others is not to be used."""
    flat = _flatten(examples)
    stop = np.array([example.stop for example in examples], dtype=np.bool_)[flat.doc_of]
    ids, offsets = fast.encode(flat.texts)
    flat, spellings = _with_inner_gaps(flat, np.flatnonzero(~stop), tokenizer, fast)
    spelled, ends = fast.spell(ids)
    right_size = np.diff(ends[offsets]) == flat.num_bytes + len(fast.gap)
    good = right_size & (offsets[1:] > offsets[:-1])
    expected = np.frombuffer(fast.gap.join(["", *spellings]).encode(), dtype=np.uint8)
    if not right_size.all() or not np.array_equal(expected, spelled):
        good &= _spelled_right(expected, spelled, np.cumsum(flat.num_bytes + len(fast.gap)), ends[offsets])
    special = np.zeros(max(tokenizer.vocab_size, int(ids.max(initial=0)) + 1), dtype=np.bool_)
    special[list(tokenizer.special_ids)] = True
    is_special = special[ids]
    before = _counted_before(is_special)
    num_special = np.diff(before[offsets])
    good &= ~stop | (num_special == 0)
    if tokenizer.sentencepiece is not None and not stop.all():
        # gigatoken reads some names of special tokens as those tokens, the reference all of them.
        names = [tokenizer.token(token) for token in tokenizer.special_ids]
        good &= stop | (num_special == [sum(map(text.count, names)) for text in flat.texts])
    run_starts, run_ends, run_good = _runs(flat, fast, ids, offsets, ends)
    inside = before[offsets[flat.span_text] + run_ends] - before[offsets[flat.span_text] + run_starts]
    last = special[ids[np.maximum(offsets[flat.span_text] + run_ends - 1, 0)]] if len(ids) else inside > 0
    spans_stop = stop[flat.span_text]
    to_the_end = flat.span_end == flat.num_bytes[flat.span_text]
    # Before a special token the ids are those of the text up to there alone; elsewhere the reference must look.
    run_good &= np.where(spans_stop, to_the_end, (inside == 1) & last & (run_ends - run_starts > 1))
    np.logical_and.at(good, flat.span_text, run_good)
    proved = np.ones(len(examples), dtype=np.bool_)
    np.logical_and.at(proved, flat.doc_of, good)
    return _assemble(tokenizer, flat, ids, offsets, stop, run_starts, run_ends, len(examples)), proved


def _with_inner_gaps(
    flat: _Texts, chats: NDArray[np.int64], tokenizer: Tokenizer, fast: FastTokens
) -> tuple[_Texts, list[str]]:
    """(the texts with offsets into their spellings, what their ids spell but for the first gap). With SentencePiece a
    text begins anew behind each special token in a chat, with a gap of its own."""
    names = sorted((tokenizer.token(token).encode() for token in tokenizer.special_ids), key=len, reverse=True)
    if not fast.gap or not len(chats) or not names or not _begins_anew(fast, names):
        return flat, flat.texts
    special = b"|".join(map(re.escape, names))
    border = re.compile(b"(?:%b)(?!%b|\\Z)" % (special, special))
    gap = fast.gap.encode()
    spellings = list(flat.texts)
    num_bytes, span_start, span_end = flat.num_bytes.copy(), flat.span_start.copy(), flat.span_end.copy()
    for number in chats.tolist():
        text = flat.texts[number].encode()
        borders = np.array([match.end() for match in border.finditer(text)], dtype=np.int64)
        if len(borders):
            spellings[number] = border.sub(lambda match: match[0] + gap, text).decode()
            num_bytes[number] += len(borders) * len(gap)
            spans = slice(*np.searchsorted(flat.span_text, [number, number + 1]))
            span_start[spans] += len(gap) * np.searchsorted(borders, flat.span_start[spans])
            span_end[spans] += len(gap) * np.searchsorted(borders, flat.span_end[spans])
    return replace(flat, num_bytes=num_bytes, span_start=span_start, span_end=span_end), spellings


def _begins_anew(fast: FastTokens, names: Sequence[bytes]) -> bool:
    """Whether a gap follows a special token, as before a text."""
    texts = [f"{name.decode()}x" for name in names]
    ids, offsets = fast.encode(texts)
    spelled, ends = fast.spell(ids)
    behind = {name + fast.gap.encode() + b"x" for name in names}
    return any(
        spelled[start:end].tobytes() in behind for start, end in zip(ends[offsets[:-1]], ends[offsets[1:]], strict=True)
    )


def _spelled_right(
    expected: NDArray[np.uint8], spelled: NDArray[np.uint8], byte_ends: NDArray[np.int64], ends: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Per text [texts]: what its ids spell is the text. `ends` [texts + 1] are its borders in `spelled`."""
    starts = np.append(0, byte_ends[:-1])
    return np.array(
        [
            np.array_equal(expected[start:end], spelled[ours:theirs])
            for start, end, ours, theirs in zip(starts, byte_ends, ends[:-1], ends[1:], strict=True)
        ],
        dtype=np.bool_,
    )


def _runs(
    flat: _Texts,
    fast: FastTokens,
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    ends: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """(start, end, proved) of each span [spans] in tokens of its text: what stands before is the prompt's own ids."""
    prompt_ids, prompt_offsets = fast.encode(flat.prompts)
    sizes = np.diff(prompt_offsets)
    first = offsets[flat.span_text]
    room = offsets[flat.span_text + 1] - first
    good = sizes < room
    starts = np.where(good, sizes, 0)
    # Token by token: the ids of every prompt against the first ids of its text.
    where = np.repeat(first - prompt_offsets[:-1], sizes) + np.arange(len(prompt_ids))
    differs = prompt_ids != ids[np.minimum(where, max(len(ids) - 1, 0))] if len(ids) else np.ones(len(prompt_ids), bool)
    wrong = _counted_before(differs)
    good &= wrong[prompt_offsets[1:]] == wrong[prompt_offsets[:-1]]
    text_start = ends[first] + len(fast.gap)
    good &= (ends[first + starts] == text_start + flat.span_start) | (flat.span_start == 0)
    target = text_start + flat.span_end
    run_ends = np.searchsorted(ends, target.astype(ends.dtype)) - first  # of another type: ends would be copied
    run_ends = np.where((run_ends > starts) & (run_ends <= room), run_ends, 0)
    good &= (ends[first + run_ends] == target) & (run_ends > starts)
    return starts, np.maximum(run_ends, starts), good


def _counted_before(marks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many of n marks are set before each position [n + 1]."""
    counts = np.zeros(len(marks) + 1, dtype=np.int32)
    np.cumsum(marks, out=counts[1:])
    return counts


def _assemble(
    tokenizer: Tokenizer,
    flat: _Texts,
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    stop: NDArray[np.bool_],
    run_starts: NDArray[np.int64],
    run_ends: NDArray[np.int64],
    num_docs: int,
) -> Encoded:
    """Put BOS before each document and EOS behind each text that wants one."""
    sizes = np.diff(offsets)
    opens = np.append(True, flat.doc_of[1:] != flat.doc_of[:-1])[: len(sizes)]
    num_bos = opens * len(tokenizer.bos)
    placed = num_bos + sizes + stop
    text_ends = np.cumsum(placed)
    out = np.empty(int(text_ends[-1]) if len(placed) else 0, dtype=np.int32)
    is_text = np.ones(len(out), dtype=np.bool_)
    if tokenizer.bos:
        at_bos = (text_ends - placed)[opens]
        out[at_bos] = tokenizer.bos[0]
        is_text[at_bos] = False
    at_eos = text_ends[stop] - 1
    out[at_eos] = eos_of(tokenizer)
    is_text[at_eos] = False
    out[is_text] = ids
    lengths = np.bincount(flat.doc_of, weights=placed, minlength=num_docs).astype(np.int32)
    doc_starts = np.cumsum(lengths) - lengths
    first = (text_ends - placed + num_bos)[flat.span_text] - doc_starts[flat.doc_of[flat.span_text]]
    to_the_end = (run_ends == sizes[flat.span_text]) & stop[flat.span_text]
    runs = np.stack([first + run_starts, first + run_ends + to_the_end], axis=1).astype(np.int32)
    num_runs = np.bincount(flat.doc_of[flat.span_text], minlength=num_docs).astype(np.int32)
    return Encoded(ids=out, lengths=lengths, num_runs=num_runs, runs=runs)
