"""The model's own tokenizer, loaded the same way for preparation, sampling, evaluation and export.

`transformers` is the reference wherever the folder has a tokenizer.json (or GPT-2's vocab and merges).
A folder that holds only a SentencePiece tokenizer.model is encoded by `sentencepiece` itself: the
conversion in transformers 5 ranks merges by id, which gives other ids on text with runs of spaces.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `encode` adds no special token; `bos` is what a document starts with."""

    path: Path
    digest: str
    """sha256 over the names and bytes of the tokenizer's files."""
    vocab_size: int
    """Largest id + 1."""
    bos: tuple[int, ...]
    """(bos id,) where the tokenizer itself starts a text with one, else ()."""
    eos_id: int | None
    special_ids: frozenset[int]
    hf: Any
    """transformers.PreTrainedTokenizerBase: what lm_eval and users load."""
    sentencepiece: Any
    """sentencepiece.SentencePieceProcessor that encodes, or None where transformers does."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS; threads are the library's own."""
        if self.sentencepiece is not None:
            return self.sentencepiece.encode(list(texts)) if texts else []
        encodings = self.hf.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included, nothing cleaned up."""
        if self.sentencepiece is not None:
            return str(self.sentencepiece.decode(list(ids)))
        return str(self.hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder, offline.

    Raises:
        UserError: the folder is missing, holds no tokenizer, or the tokenizer cannot be loaded.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give the folder of the model or of its tokenizer")
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    names = {file.name for file in files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"tokenizer {folder}: holds no tokenizer.json, tokenizer.model or vocab.json")
    hf = _load_hf(path)
    bare = "tokenizer.model" in names and "tokenizer.json" not in names
    first = hf.encode("a")[:1]
    bos = tuple(first) if hf.bos_token_id is not None and first == [hf.bos_token_id] else ()
    return Tokenizer(
        path=path,
        digest=_digest(files),
        vocab_size=max(hf.get_vocab().values()) + 1,
        bos=bos,
        eos_id=hf.eos_token_id,
        special_ids=frozenset(hf.all_special_ids)
        | {token_id for token_id, token in hf.added_tokens_decoder.items() if token.special},
        hf=hf,
        sentencepiece=_load_sentencepiece(path / "tokenizer.model") if bare else None,
    )


def _load_hf(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer {path}: transformers cannot load it: {reason}") from error


def _load_sentencepiece(model: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {model}: sentencepiece cannot read it; is the file whole?") from error


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
