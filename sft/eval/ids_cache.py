"""Token requests kept in the user's cache: the tuned model, and the next run, tokenise nothing.

An entry's name is a digest of all that decides its ids. One array holds the ids of all items, each context once.
"""

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sft.eval.requests import Prompting, Request, TokenRequests, build_requests, check_lengths, render_prompts
from sft.eval.tasks.item import NUM_CHOICES, Item, digest_items
from sft.tokenizer import Tokenizer

CACHE_VERSION = 1
"""Raised whenever the same items give other requests, or are kept in another form."""
MAX_ENTRIES = 24
"""All of MMLU takes 45 MB; the entry that was not used for longest goes first."""


def read_or_build(items: Sequence[Item], tokenizer: Tokenizer, max_length: int, prompting: Prompting) -> TokenRequests:
    """What `build_requests` gives, from the cache where it was built before.

    Torn and altered entries are built anew; a cache that cannot be written costs time, nothing else.

    Raises:
        UserError: as `build_requests`.
    """
    file = _file(items, tokenizer, prompting)
    # BadZipFile and the others: whatever numpy stumbles into where the file was torn or altered.
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        found = _unpack(_read(file), items, tokenizer, prompting)
        check_lengths(items, found.requests, max_length)
        return found
    built = build_requests(items, tokenizer, max_length, prompting)
    with suppress(OSError):
        _write(file, _pack(built, prompting))
    return built


def _file(items: Sequence[Item], tokenizer: Tokenizer, prompting: Prompting) -> Path:
    """Context length is no part of it: it decides which requests are refused, not their ids."""
    decides = {
        "version": CACHE_VERSION,
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece", "jinja2")},
        "files": tokenizer.digest,
        # Which class transformers makes of the same files depends on config.json; this is what came out.
        "backend": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        "splits_special_tokens": tokenizer.backend.encode_special_tokens,
        "bos": tokenizer.bos,
        "items": digest_items(items),
        "prompting": asdict(prompting),
    }
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sft" / "requests" / f"{name}.npz"


def _pack(built: TokenRequests, prompting: Prompting) -> dict[str, np.ndarray]:
    """int32 lengths [items, 1 + choices] and ids of (context, choice, choice, ...) item by item.

    Prompts are kept only where a chat template made them: plain ones are put together faster than read.
    """
    parts: list[np.ndarray] = []
    for start in range(0, len(built.requests), NUM_CHOICES):
        group = built.requests[start : start + NUM_CHOICES]
        parts += [group[0].ctx_ids, *(request.cont_ids for request in group)]
    prompts = [] if prompting.chat == "none" else built.prompts
    return {
        "lengths": np.array([len(part) for part in parts], dtype=np.int32).reshape(-1, 1 + NUM_CHOICES),
        "ids": np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, dtype=np.int32),
        "prompt_chars": np.array([len(prompt) for prompt in prompts], dtype=np.int64),
        "prompts": np.frombuffer("".join(prompts).encode(), dtype=np.uint8),
        "system_dropped": np.array([built.system_dropped]),
    }


def _unpack(
    arrays: dict[str, np.ndarray], items: Sequence[Item], tokenizer: Tokenizer, prompting: Prompting
) -> TokenRequests:
    if prompting.chat == "none":
        prompts, _ = render_prompts(items, tokenizer, prompting)
    else:
        prompts = _cut(arrays["prompts"].tobytes().decode(), arrays["prompt_chars"])
    parts = _cut(arrays["ids"], arrays["lengths"])
    requests = [
        Request(parts[start], parts[start + choice])
        for start in range(0, len(parts), 1 + NUM_CHOICES)
        for choice in range(1, 1 + NUM_CHOICES)
    ]
    return TokenRequests(prompts, requests, bool(arrays["system_dropped"][0]))


def _cut(whole: Any, lengths: np.ndarray) -> list[Any]:
    """Consecutive pieces of a text or an array; views of the array, not copies."""
    return [whole[start:end] for start, end in pairwise([0, *np.cumsum(lengths, dtype=np.int64).tolist()])]


def _read(file: Path) -> dict[str, np.ndarray]:
    """Raises ValueError where the content is not what was written: it would give wrong ids without a word."""
    with np.load(file, allow_pickle=False) as entry:
        arrays = dict(entry)
    digest = arrays.pop("sha256").tobytes()
    if digest != _digest(arrays):
        raise ValueError(f"{file}: altered")
    with suppress(OSError):
        os.utime(file)  # used now, see MAX_ENTRIES
    return arrays


def _write(file: Path, arrays: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, sha256=np.frombuffer(_digest(arrays), dtype=np.uint8), **arrays)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk is not left fuller
    entries = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for entry in entries[MAX_ENTRIES:]:
        entry.unlink(missing_ok=True)


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
