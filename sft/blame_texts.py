"""Whether a row is the one that a document was made of, and what the two say: pure functions of texts and tokens."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.shards import IGNORE
from sft.tokenizer import Tokenizer

MAX_IDS = 20
"""Shown where there is neither a row nor a tokenizer."""


class Texts(NamedTuple):
    """What a document says."""

    prompt: str
    response: str
    """What was learned last."""
    is_rows: bool
    """Taken from the row, not from the tokens."""


def texts_of(
    ids: NDArray[np.int32], labels: NDArray[np.int32], texts: Sequence[str], tokenizer: Tokenizer | None
) -> Texts:
    """What a document says: `texts` of its row where they are what was trained on, else its decoded tokens.

    Without a tokenizer nothing can be compared: the row is taken as it is, and ids are shown where there is none.
    """
    if tokenizer is None:
        if texts:
            return Texts(" ".join(texts[:-1]), texts[-1], True)
        return Texts("", f"ids {' '.join(map(str, ids[:MAX_IDS].tolist()))}", False)
    start, end = _last_supervised(labels)
    learned = _decode(tokenizer, ids[start:end])
    is_cut = int(ids[end - 1]) not in tokenizer.special_ids
    response = find_response(texts, _decode(tokenizer, ids), learned, is_cut)
    if response is None:
        return Texts(_decode(tokenizer, ids[:start]), learned, False)
    return Texts(" ".join(texts[:response]), texts[response], True)


def row_texts(value: Any, source: Mapping[str, Any]) -> list[str]:
    """The texts of a row in the order in which a document has them, without system prompts, which whole sources share.

    `source` is the manifest's. A value that has not the source's format gives no texts, or too few.
    """
    if not isinstance(value, dict):
        return []
    columns: Mapping[str, str] = source["columns"]

    def field(of: Mapping[str, Any], name: str) -> Any:
        return of.get(columns.get(name, name))

    if source["format"] == "text":
        texts = [field(value, "text")]
    elif source["format"] == "alpaca":
        history = field(value, "history")
        pairs = [pair for pair in history if isinstance(pair, list)] if isinstance(history, list) else []
        response = field(value, "response")
        texts = [text for pair in pairs for text in pair] + [field(value, "instruction"), field(value, "input")]
        texts += [field(value, "output") if response is None else response]
    else:
        is_messages = source["format"] == "messages"
        turns, role, text = ("messages", "role", "content") if is_messages else ("conversations", "from", "value")
        said = field(value, turns)
        said = [turn for turn in said if isinstance(turn, dict)] if isinstance(said, list) else []
        texts = [_joined(field(turn, text)) for turn in said if field(turn, role) not in ("system", "developer")]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def find_response(texts: Sequence[str], document: str, learned: str, is_cut: bool) -> int | None:
    """Which of a row's texts is the one that a document learned last; None where it was not made of this row.

    It was where every text stands in the document, in order, until the document ends, and where `learned` is one of
    them: the whole of it, or its beginning where the document was cut to seq_len, which leaves no stop token
    (`is_cut`). As in `sft prep`, Unicode form and white space do not count. What the template puts between the texts
    is not compared.
    """
    document, learned = _plain(document), _plain(learned)
    at, response = 0, None
    for number, text in enumerate(map(_plain, texts)):
        start = document.find(text, at)
        rest = document[at:].strip()
        if start < 0 and not rest:  # turns behind the last of the assistant, or behind the cut
            break
        if start < 0:
            return number if is_cut and learned and rest.endswith(learned) and text.startswith(learned) else None
        at = start + len(text)
        response = number if text == learned else response
    return response


def _last_supervised(labels: NDArray[np.int32]) -> tuple[int, int]:
    """[start, end) of the last supervised run; (length, length) where there is none."""
    edges = np.flatnonzero(np.diff(np.pad((labels != IGNORE).astype(np.int8), 1)))
    return (int(edges[-2]), int(edges[-1])) if len(edges) else (len(labels), len(labels))


def _decode(tokenizer: Tokenizer, ids: NDArray[np.int32]) -> str:
    return tokenizer.decode([token for token in ids.tolist() if token not in tokenizer.special_ids])


def _joined(content: Any) -> Any:
    """The text of a turn, which may be a list of parts."""
    if not isinstance(content, list):
        return content
    return "".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
