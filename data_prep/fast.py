"""Many texts to ids at once with gigatoken, and the bytes that each id stands for. Used only where it is proved equal.

gigatoken (github.com/marcelroed/gigatoken) encodes some hundred times faster than `tokenizers`. What it returns is
compared with the reference in every build, and what every id spells is compared with the text in every document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.specials import encode_with_specials
from sft.tokenizer import Tokenizer

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece writes a space as this character."""


NOT_TEXT = b"\xff"
"""Stands for what some added tokens spell: no text has this byte, so none that holds such a token is proved."""


@dataclass(frozen=True, eq=False)
class FastTokens:
    """A gigatoken backend and the spelling of its vocabulary."""

    backend: Any
    pieces: pa.BinaryArray
    """[vocab]: the bytes each id adds to a text; a special token's are its name."""
    gap: str
    """What the tokenizer puts before a text and takes away in decoding: a space with most SentencePiece models."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(ids of all texts end to end, offsets [texts + 1]); no BOS, no EOS. Runs on the calling thread."""
        if not texts:
            return np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
        layout = self.backend.encode_batch(list(texts), parallel=False).layout
        return np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data)

    def spell(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """(bytes of all ids end to end, offsets [ids + 1])."""
        taken = self.pieces.take(pa.array(ids))
        _, offsets, data = taken.buffers()
        ends = np.frombuffer(offsets, dtype=np.int32)[: len(ids) + 1]
        return np.frombuffer(data, dtype=np.uint8)[: ends[-1]] if data else np.empty(0, np.uint8), ends


def load_fast(tokenizer: Tokenizer) -> FastTokens | None:
    """gigatoken's form of `tokenizer`, or None where it has none for this kind."""
    # gigatoken imports it when it first returns ids, and takes a Ctrl-C at that moment for its absence.
    import awkward  # noqa: F401
    import gigatoken

    try:
        backend = gigatoken.Tokenizer(
            tokenizer.backend if tokenizer.sentencepiece is None else tokenizer.path / "tokenizer.model"
        )
    except (ValueError, RuntimeError, LookupError, TypeError):
        return None
    vocab = backend.vocab
    by_id = [vocab.get(token, b"") for token in range(backend.vocab_size)]
    if type(backend.backend).__name__ == "SentencePieceTokenizer":
        by_id = [piece.replace(WORD_START.encode(), b" ") for piece in by_id]
    for token in _doubtful_tokens(tokenizer):
        by_id[token] = NOT_TEXT
    fast = FastTokens(backend=backend, pieces=pa.array(by_id, type=pa.binary()), gap="")
    return replace(fast, gap=_gap(fast, tokenizer))


def _gap(fast: FastTokens, tokenizer: Tokenizer) -> str:
    """What stands before a text in its tokens but not in what they decode to."""
    if tokenizer.decode(tokenizer.encode("x")) != "x":
        return ""
    spelled, _ = fast.spell(fast.encode(["x"])[0])
    return spelled.tobytes().removesuffix(b"x").decode(errors="replace")


def _doubtful_tokens(tokenizer: Tokenizer) -> list[int]:
    """Added tokens that gigatoken may find where the reference does not, or that the reference decodes to other text.

    gigatoken looks for all of them at once and anywhere. The reference looks for some only as whole words, and for
    those that are normalised after the others.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    at_first = [token.content for token in added.values() if not token.normalized]
    before = tokenizer.encode("x")
    shown = tokenizer.decode(before)
    return [
        number
        for number, token in added.items()
        if number not in tokenizer.special_ids
        and (
            token.single_word
            or token.normalized
            and any(_may_overlap(token.content, other) for other in at_first)
            or tokenizer.decode([*before, number]) != shown + token.content
        )
    ]


def _may_overlap(one: str, other: str) -> bool:
    """Whether a text can hold both so that they share characters."""
    edges = range(1, min(len(one), len(other)) + 1)
    return one in other or other in one or any(one[-n:] == other[:n] or other[-n:] == one[:n] for n in edges)


def count_equal(fast: FastTokens, tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """On how many texts gigatoken gives the ids of the reference; names of special tokens mean those tokens."""
    ids, offsets = fast.encode(texts)
    ours = np.split(ids, offsets[1:-1])
    return sum(mine.tolist() == encode_with_specials(tokenizer, text) for mine, text in zip(ours, texts, strict=True))
