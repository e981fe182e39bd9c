"""Examples to token ids and supervised runs, with the proof that the runs are right.

A document is `bos`, then each text of the example, each followed by EOS where the example says `stop`. The ids of a
text are those of the whole text wherever they begin with the ids of every prompt in it, so that what the model reads
at inference is a strict prefix of what it was trained on. `reference_document` is the definition: it asks the
reference tokenizer, and decodes. `data_prep.at_once` is many times faster and proves the same by other means; a
document that it cannot prove comes here.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_prep import filters
from data_prep.at_once import encode_at_once
from data_prep.documents import Document, Encoded, eos_of, join_documents, replace_documents
from data_prep.example import Example
from data_prep.fast import FastTokens
from data_prep.specials import decode_with_specials, encode_with_specials
from sft.tokenizer import Tokenizer


def encode_examples(
    tokenizer: Tokenizer, fast: FastTokens | None, examples: Sequence[Example]
) -> tuple[Encoded, dict[int, str]]:
    """Documents of the examples, proved; those of the second value, by position, have a reason and no tokens."""
    if fast is None:
        return _by_reference(tokenizer, examples, None, np.zeros(len(examples), dtype=np.bool_))
    encoded, proved = encode_at_once(tokenizer, fast, examples)
    return (encoded, {}) if proved.all() else _by_reference(tokenizer, examples, encoded, proved)


def reference_document(tokenizer: Tokenizer, example: Example) -> Document | str:
    """The document by the reference tokenizer, or the reason why there is none: the definition of both ways.

    Decoded in context, the ids up to the end of a supervised run must read as the ids up to its start, followed by
    the supervised text: decoding a run alone would lose a leading space with SentencePiece tokenizers. Special tokens
    stand only where the template or this function put them.
    """
    ids, runs = list(tokenizer.bos), []
    for text, spans in zip(example.texts, example.spans, strict=True):
        whole, inner = _ids_and_runs(tokenizer, text, spans, specials_meant=not example.stop)
        if inner is None or not whole:
            return filters.SPAN_UNPROVED
        if example.stop:
            if not _text_forbidden_ids(tokenizer).isdisjoint(whole):
                return filters.SPECIAL_TOKEN_IN_TEXT
            if not tokenizer.special_ids.isdisjoint(whole):
                return filters.SPAN_UNPROVED
            # sentencepiece decodes control tokens to nothing, so the text alone would not show one that slipped in.
        elif any(not _stops_once(tokenizer, whole[start:end]) for start, end in inner):
            return filters.SPAN_UNPROVED
        at = len(ids)
        ids += whole
        runs += [(at + start, at + end) for start, end in inner]
        if example.stop:
            ids.append(eos_of(tokenizer))
            if inner and inner[-1][1] == len(whole):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    return Document(ids, runs)


def _ids_and_runs(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], specials_meant: bool
) -> tuple[list[int], list[tuple[int, int]] | None]:
    """(ids, supervised runs) of one text; None for the runs where they cannot be proved."""
    encode = encode_with_specials if specials_meant else Tokenizer.encode
    whole = encode(tokenizer, text)
    runs = []
    for start, end in spans:
        before = encode(tokenizer, text[:start])
        if whole[: len(before)] != before:
            if len(spans) > 1 or end < len(text):
                return whole, None
            whole = before + encode(tokenizer, text[start:])
        until = encode(tokenizer, text[:end]) if end < len(text) else whole
        if whole[: len(until)] != until or len(until) <= len(before):
            return whole, None
        if decode_with_specials(tokenizer, until) != decode_with_specials(tokenizer, before) + text[start:end]:
            return whole, None
        runs.append((len(before), len(until)))
    return whole, runs


def _stops_once(tokenizer: Tokenizer, run: Sequence[int]) -> bool:
    return run[-1] in tokenizer.special_ids and tokenizer.special_ids.isdisjoint(run[:-1]) and len(run) > 1


def _text_forbidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Special ids that the text of a row must not encode to.

    The unknown token is left to the span proof, unless the tokenizer uses it as BOS or EOS too (GPT-2).
    """
    unknown = {tokenizer.unk_id} - {tokenizer.eos_id, *tokenizer.bos}
    return tokenizer.special_ids - unknown


def _by_reference(
    tokenizer: Tokenizer, examples: Sequence[Example], encoded: Encoded | None, proved: NDArray[np.bool_]
) -> tuple[Encoded, dict[int, str]]:
    replacements: dict[int, Document | None] = {}
    reasons: dict[int, str] = {}
    for position in np.flatnonzero(~proved).tolist():
        document = reference_document(tokenizer, examples[position])
        replacements[position] = None if isinstance(document, str) else document
        if isinstance(document, str):
            reasons[position] = document
    if encoded is None:
        return join_documents([replacements[position] or Document([], []) for position in replacements]), reasons
    return replace_documents(encoded, replacements), reasons


def truncate(tokenizer: Tokenizer, example: Example, document: Document, seq_len: int) -> Document | None:
    """Cut the document to at most `seq_len` tokens, so that it ends with supervised tokens and without a stop token.

    The cut moves back to where the tokens of the last response end with a whole character, or to the end of an earlier
    response, with its stop token. None where no supervised token is left.
    """
    responses = example.responses()
    for position in range(len(document.runs) - 1, -1, -1):
        start, end = document.runs[position]
        if end <= seq_len:
            return replace(document, ids=document.ids[:end], runs=document.runs[: position + 1], truncated=True)
        before = decode_with_specials(tokenizer, document.ids[len(tokenizer.bos) : start])
        for cut in range(min(seq_len, end - 1), start, -1):
            shown = decode_with_specials(tokenizer, document.ids[len(tokenizer.bos) : cut])
            whole = not shown.endswith("\ufffd")  # half a character decodes to it, also where the text itself holds one
            if whole and len(shown) > len(before) and (before + responses[position]).startswith(shown):
                runs = [*document.runs[:position], (start, cut)]
                return Document(document.ids[:cut], runs, truncated=True)
    return None
