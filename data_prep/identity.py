"""Which job this is: the content key over everything that the shards' bytes follow from, and whether it is done."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from data_prep import near, readers, template
from data_prep.blocks import Encoder
from data_prep.probe import HARD_TEXTS, PROBE_TEXTS
from data_prep.readers import file_digest, source_files
from data_prep.shards import MANIFEST, open_shards, read_manifest
from data_prep.source_files import kind_of
from sft.errors import UserError
from sft.prep_options import PrepConfig
from sft.tokenizer import Tokenizer

CODE_VERSION = 4
"""Raised whenever the same input would give other bytes."""
PACKAGES = ("sft-pipeline", "gigatoken", "tokenizers", "transformers", "sentencepiece", "jinja2", "rensa")
"""What a block's bytes may depend on besides the content key."""
NOT_CONTENT = {"sources", "tokenizer", "out", "workers", "engine", "dry_run", "decontaminate", "template"}


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    source_id: int
    path: Path
    digest: str
    stamp: tuple[int, int]
    """Size in bytes and time of last change when it was digested."""

    def check_unchanged(self) -> None:
        """Compare size and time of change with what they were.

        Raises:
            UserError: the file has been written to.
        """
        if _stamp(self.path) != self.stamp:
            raise UserError(f"source {self.path}: changed while it was read; run again when nobody writes it")


def find_inputs(config: PrepConfig) -> list[InputFile]:
    """All input files, source by source, with their digests.

    Raises:
        UserError: a path leads to no readable file.
    """
    found = [(number, path) for number, source in enumerate(config.sources) for path in source_files(source.path)]

    def look(entry: tuple[int, Path]) -> InputFile:
        number, path = entry
        stamp = _stamp(path)
        return InputFile(number, path, file_digest(path), stamp)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(look, found))


def content_key(config: PrepConfig, encoder: Encoder, inputs: Sequence[InputFile]) -> str:
    """sha256 over input bytes, tokenizer (its files, and the ids it gives a few texts), template, evaluation items,
    refusal list, settings and code version."""
    identity = {
        "code_version": CODE_VERSION,
        "sources": [
            [source_name(config, number), source.model_dump(mode="json", exclude={"name", "path"})]
            for number, source in enumerate(config.sources)
        ],
        "inputs": [[file.source_id, kind_of(file.path), file.digest] for file in inputs],
        "tokenizer": [encoder.tokenizer.digest, *_behaviour(encoder.tokenizer)],
        "template": template_text(encoder),
        "decontaminate": encoder.items_digest,
        "signatures": near.algorithm() if encoder.signer else "",
        "refusals": [pattern.pattern for pattern in encoder.text_reason.refusals],
        # the list of refusals counts by its expressions, wherever it is
        "settings": config.model_dump(
            mode="json", exclude={**dict.fromkeys(NOT_CONTENT, True), "filters": {"refusals"}}
        ),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def blocks_key(key: str) -> str:
    """What finished blocks of an earlier run must have been made with: how rows are cut into blocks changes no byte of
    the output, but no block of another cut can be used; packages may have been replaced since the job was killed."""
    made_with = [f"{name} {version(name)}" for name in PACKAGES]
    return hashlib.sha256("\0".join([key, str(readers.BLOCK_BYTES), *made_with]).encode()).hexdigest()


def template_text(encoder: Encoder) -> str | list[str]:
    """The text of the prompt template in use."""
    if encoder.chat is not None:
        return encoder.chat.text
    return [template.ALPACA_WITH_INPUT, template.ALPACA_WITHOUT_INPUT]


def source_name(config: PrepConfig, number: int) -> str:
    """The name of a source in report and manifest: its own, or the stem of its path."""
    source = config.sources[number]
    if source.name is not None:
        return source.name
    name = Path(source.path).name
    return name.split(".")[0] or name


def is_up_to_date(out: Path, key: str, with_heldout: bool) -> bool:
    """True where `out` already holds the whole output of this very job, False where it is free.

    Raises:
        UserError: `out` holds something else, a torn shard set, or only a part of the output.
        OSError: `out` cannot be looked at: its name is too long, or a loop of symbolic links.
    """
    try:
        out.stat()
    except FileNotFoundError:
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / "train" / MANIFEST).is_file():
        raise UserError(f"out {out}: exists and is no output of sft prep; choose another folder")
    found = read_manifest(out / "train").get("content_key")
    if found != key:
        raise UserError(
            f"out {out}: holds shards of other input or settings (content key {str(found)[:12]}, now {key[:12]}); "
            "remove it or choose another folder"
        )
    splits = ("train", "heldout") if with_heldout else ("train",)
    for name in (*splits, "report.json"):
        if not (out / name).exists():
            raise UserError(f"out {out}: {name} is missing, so it is not the whole output; remove {out} and run again")
    for split in splits:
        open_shards(out / split)
    return True


def _behaviour(tokenizer: Tokenizer) -> list[object]:
    """What the installed libraries make of the tokenizer's files: another version may read them otherwise."""
    ids = tokenizer.encode_batch([*PROBE_TEXTS, *HARD_TEXTS])
    return [tokenizer.bos, tokenizer.eos_id, tokenizer.unk_id, sorted(tokenizer.special_ids), ids]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"source {path}: no such file; check sources[].path") from None
    return found.st_size, found.st_mtime_ns
