"""The model's own tokenizer, loaded the same way for preparation, sampling, evaluation and export.

`transformers` is the reference wherever the folder has a tokenizer.json (or GPT-2's vocab and merges).
A folder that holds only a SentencePiece tokenizer.model is encoded by `sentencepiece` itself: the
conversion in transformers 5 ranks merges by id, which gives other ids on text with runs of spaces.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
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
CACHE_VERSION = 1
"""Raised whenever what is kept of a tokenizer changes."""


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
    unk_id: int | None
    special_ids: frozenset[int]
    backend: Any
    """tokenizers.Tokenizer: what transformers itself encodes and decodes with."""
    sentencepiece: Any
    """sentencepiece.SentencePieceProcessor that encodes, or None where transformers does."""

    @cached_property
    def hf(self) -> Any:
        """transformers.PreTrainedTokenizerBase: what lm_eval and users load. Imports transformers when first asked for.

        Raises:
            UserError: transformers cannot load the folder.
        """
        return _load_hf(self.path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS; threads are the library's own."""
        if self.sentencepiece is not None:
            return self.sentencepiece.encode(list(texts)) if texts else []
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included, nothing cleaned up."""
        if self.sentencepiece is not None:
            return str(self.sentencepiece.decode(list(ids)))
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """The vocabulary's own name of a token, as `</s>`."""
        return str(self.backend.id_to_token(token_id))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder, offline.

    What transformers makes of the folder is kept in the user's cache, because importing transformers takes longer than
    tokenising ten thousand rows. The entry's name is a digest of the folder's bytes and of the libraries' versions.

    Raises:
        UserError: the folder is missing, holds no tokenizer, the tokenizer cannot be loaded, or a bare
            tokenizer.model does not say whether texts start with BOS.
    """
    from tokenizers import Tokenizer as Backend

    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder; give the folder of the model or of its tokenizer")
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    names = {file.name for file in files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"tokenizer {folder}: holds no tokenizer.json, tokenizer.model or vocab.json")
    facts = _facts(path, files)
    bos = tuple(facts["bos"])
    bare = "tokenizer.model" in names and "tokenizer.json" not in names
    if bare:
        _check_bos_setting(path, bos)
    backend = Backend.from_str(facts["backend"])
    backend.encode_special_tokens = facts["encode_special_tokens"]
    return Tokenizer(
        path=path,
        digest=_digest(files),
        vocab_size=facts["vocab_size"],
        bos=bos,
        eos_id=facts["eos_id"],
        unk_id=facts["unk_id"],
        special_ids=frozenset(facts["special_ids"]),
        backend=backend,
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


def _load_hf(path: Path) -> Any:
    """The transformers tokenizer. Code that the folder brings is never run."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        hf.encode("a")
    except folder_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer {path}: transformers cannot load it, check its tokenizer files and config.json: {reason}"
        ) from error
    return hf


def _facts(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What transformers makes of the folder: its `tokenizers` backend, serialised, and its special tokens."""
    cache = _cache_file([*files, *([path / "config.json"] if (path / "config.json").is_file() else [])])
    with suppress(OSError, ValueError):
        digest, _, text = cache.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() == digest:  # else it would give wrong ids without a word
            return dict(json.loads(text))
    hf = _load_hf(path)
    first = hf.encode("a")[:1]
    special = set(hf.all_special_ids) | {id for id, token in hf.added_tokens_decoder.items() if token.special}
    facts = {
        "vocab_size": max(hf.get_vocab().values()) + 1,
        "bos": first if hf.bos_token_id is not None and first == [hf.bos_token_id] else [],
        "eos_id": hf.eos_token_id,
        "unk_id": hf.unk_token_id,
        "special_ids": sorted(special),
        "encode_special_tokens": hf.backend_tokenizer.encode_special_tokens,
        "backend": hf.backend_tokenizer.to_str(),
    }
    with suppress(OSError):  # a read-only home costs the time of an import, nothing else
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.name}.{uuid.uuid4().hex[:8]}")
        text = json.dumps(facts)
        temporary.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
        temporary.replace(cache)
    return facts


def _cache_file(files: Sequence[Path]) -> Path:
    made_by = [f"{name} {version(name)}" for name in ("transformers", "tokenizers", "sentencepiece")]
    name = hashlib.sha256("\0".join([str(CACHE_VERSION), *made_by, _digest(files)]).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sft" / "tokenizers" / f"{name}.facts"


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
