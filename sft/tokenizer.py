"""The model's own tokenizer, loaded the same way for preparation, sampling, evaluation and export.

`transformers` is the reference wherever the folder has a tokenizer.json (or GPT-2's vocab and merges).
A folder that holds only a SentencePiece tokenizer.model is encoded by `sentencepiece` itself: the
conversion in transformers 5 ranks merges by id, which gives other ids on text with runs of spaces.
"""

import hashlib
import json
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
        UserError: the folder is missing, holds no tokenizer, the tokenizer cannot be loaded, or a bare
            tokenizer.model does not say whether texts start with BOS.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give the folder of the model or of its tokenizer")
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    names = {file.name for file in files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"tokenizer {folder}: holds no tokenizer.json, tokenizer.model or vocab.json")
    hf, bos = _load_hf(path)
    bare = "tokenizer.model" in names and "tokenizer.json" not in names
    if bare:
        _check_bos_setting(path, bos)
    return Tokenizer(
        path=path,
        digest=_digest(files),
        vocab_size=max(hf.get_vocab().values()) + 1,
        bos=bos,
        eos_id=hf.eos_token_id,
        special_ids=frozenset(hf.all_special_ids)
        | {token_id for token_id, token in hf.added_tokens_decoder.items() if token.special},
        hf=hf,
        sentencepiece=load_sentencepiece(path / "tokenizer.model") if bare else None,
    )


def load_sentencepiece(model: Path) -> Any:
    """The sentencepiece.SentencePieceProcessor of a tokenizer.model.

    Raises:
        UserError: sentencepiece cannot read the file.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {model}: sentencepiece cannot read it; is the file whole?") from error


def folder_errors() -> tuple[type[Exception], ...]:
    """What a nonsense value in a model folder's JSON shows up as: whichever of these transformers stumbles into."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        ImportError,
        StrictDataclassError,
    )


def _load_hf(path: Path) -> tuple[Any, tuple[int, ...]]:
    """The transformers tokenizer, and what it puts before a text. Code that the folder brings is never run."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        first = hf.encode("a")[:1]
    except folder_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer {path}: transformers cannot load it, check its tokenizer files and config.json: {reason}"
        ) from error
    return hf, tuple(first) if hf.bos_token_id is not None and first == [hf.bos_token_id] else ()


def _check_bos_setting(path: Path, bos: tuple[int, ...]) -> None:
    """transformers 5 takes a missing add_bos_token for false, where 4 and Meta's own code start texts with BOS."""
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    setting = config.get("add_bos_token")
    if not isinstance(setting, bool):
        raise UserError(
            f"tokenizer {file}: does not say whether texts start with BOS, and tokenizer.model cannot; write "
            '{"add_bos_token": true} as Llama was trained, or false'
        )
    if setting and not bos:
        raise UserError(f"tokenizer {file}: add_bos_token is true, but bos_token names no token; name it")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
