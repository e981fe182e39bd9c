"""Many texts to ids at once with gigatoken, and the bytes that each id stands for. Used only where it is proved equal.

gigatoken (github.com/marcelroed/gigatoken) encodes some hundred times faster than `tokenizers`. What it returns is
compared with the reference in every build, and what every id spells is compared with the text in every document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.tokenizer import Tokenizer

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece writes a space as this character."""


@dataclass(frozen=True, eq=False)
class FastTokens:
    """A gigatoken backend and the spelling of its vocabulary."""

    backend: Any
    pieces: pa.BinaryArray
    """[vocab]: the bytes each id adds to a text; a special token's are its name."""
    gap: str
    """What the tokenizer puts before every text: a space with SentencePiece, else nothing."""

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
    import gigatoken

    try:
        backend = gigatoken.Tokenizer(
            tokenizer.backend if tokenizer.sentencepiece is None else tokenizer.path / "tokenizer.model"
        )
    except (ValueError, RuntimeError, LookupError, TypeError):
        return None
    vocab = backend.vocab
    by_id = [vocab.get(token, b"") for token in range(backend.vocab_size)]
    is_pieces = type(backend.backend).__name__ == "SentencePieceTokenizer"
    if is_pieces:
        by_id = [piece.replace(WORD_START.encode(), b" ") for piece in by_id]
    return FastTokens(backend=backend, pieces=pa.array(by_id, type=pa.binary()), gap=" " if is_pieces else "")


def count_equal(fast: FastTokens, tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """On how many texts gigatoken gives the ids of the reference."""
    ids, offsets = fast.encode(texts)
    ours = np.split(ids, offsets[1:-1])
    return sum(mine.tolist() == theirs for mine, theirs in zip(ours, tokenizer.encode_batch(texts), strict=True))
