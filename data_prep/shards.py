"""Packed shards on disk: Arrow stream files that `datasets.load_from_disk` also reads, and a manifest written last.

One row is one pack: documents laid end to end, no padding. Columns: input_ids, labels (not shifted, -100 where not
supervised), seq_lens, num_labels (targets after the shift; the first token of a document is never one), doc_ids
(input row over all sources, from 0), source_ids. Reading needs neither torch nor `datasets`, and copies nothing.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from sft.errors import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
IGNORE = -100

LISTS = {"input_ids": "int32", "labels": "int32", "seq_lens": "int32", "doc_ids": "int64", "source_ids": "int16"}
COLUMNS = ("input_ids", "labels", "seq_lens", "num_labels", "doc_ids", "source_ids")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _ShardEntry(_Strict):
    file: str
    packs: int
    bytes: int
    sha256: str


class _Totals(_Strict):
    packs: int
    documents: int
    tokens: int
    labels: int


class _ProbeText(_Strict):
    text: str
    ids: list[int]


class _MadeWith(_Strict):
    path: str
    digest: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    stop_id: int
    probe: list[_ProbeText]


class _NamedSource(_Strict):
    name: str


class _Manifest(_Strict):
    """What readers of a manifest rely on; it holds more."""

    template: str | list[str]
    """A chat template's text, or those of the Alpaca prompts."""

    content_key: str
    seq_len: int
    totals: _Totals
    shards: list[_ShardEntry]
    sources: list[_NamedSource]
    tokenizer: _MadeWith


@dataclass(frozen=True, eq=False)
class Pack:
    """One training row. The arrays are read-only views of the mapped file."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    num_labels: int
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Shards:
    """An opened shard folder. `num_labels` and `num_tokens` are int32 [packs]."""

    folder: Path
    manifest: dict[str, Any]
    num_labels: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    _batches: tuple["_Batch", ...]
    _first_pack: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.num_labels)

    def pack(self, index: int) -> Pack:
        """Pack `index`, without a copy.

        Raises:
            IndexError: there is no such pack.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        batch = int(np.searchsorted(self._first_pack, index, side="right")) - 1
        return self._batches[batch].pack(index - int(self._first_pack[batch]))


def features() -> dict[str, Any]:
    """The columns as `datasets` describes them."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    return {
        name: {"feature": value(LISTS[name]), "_type": "List"} if name in LISTS else value("int32") for name in COLUMNS
    }


def arrow_schema() -> pa.Schema:
    """The columns as Arrow types, with what `datasets` reads from the metadata."""
    arrow = {"int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64()}
    fields = [(name, pa.list_(arrow[LISTS[name]]) if name in LISTS else pa.int32()) for name in COLUMNS]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features()}})})


@dataclass(frozen=True, eq=False)
class _Batch:
    """Buffers of one Arrow record batch as arrays; `tokens` and `docs` are list offsets [packs + 1]."""

    tokens: NDArray[np.int32]
    docs: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    num_labels: NDArray[np.int32]
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]

    def pack(self, index: int) -> Pack:
        tokens = slice(int(self.tokens[index]), int(self.tokens[index + 1]))
        docs = slice(int(self.docs[index]), int(self.docs[index + 1]))
        return Pack(
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens],
            seq_lens=self.seq_lens[docs],
            num_labels=int(self.num_labels[index]),
            doc_ids=self.doc_ids[docs],
            source_ids=self.source_ids[docs],
        )


def open_shards(folder: str | Path) -> Shards:
    """Map a shard folder into memory; checks what is cheap to check (`verify_digests` reads every byte).

    Raises:
        UserError: the folder or its manifest is missing, the manifest is of another version, or a shard is missing,
            cut short, unreadable or holds another number of packs than the manifest says.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    batches: list[_Batch] = []
    for entry in manifest["shards"]:
        shard = _open_shard(path / entry["file"], entry)
        if (found := sum(len(batch.num_labels) for batch in shard)) != entry["packs"]:
            raise UserError(
                f"shard {path / entry['file']}: {found} packs, the manifest says {entry['packs']}; prepare again"
            )
        batches += shard
    sizes = np.array([len(batch.num_labels) for batch in batches], dtype=np.int64)
    if int(sizes.sum()) != manifest["totals"]["packs"] or not batches:
        raise UserError(
            f"shards {path}: {int(sizes.sum())} packs, the manifest says {manifest['totals']['packs']}; prepare again"
        )
    return Shards(
        folder=path,
        manifest=manifest,
        num_labels=np.concatenate([batch.num_labels for batch in batches]),
        num_tokens=np.concatenate([np.diff(batch.tokens) for batch in batches]),
        _batches=tuple(batches),
        _first_pack=np.cumsum(sizes) - sizes,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete shard folder.

    Raises:
        UserError: there is no folder or no manifest, or it is not one that this version reads.
    """
    if not folder.is_dir():
        raise UserError(f"shards {folder}: no such folder; give the train/ or heldout/ folder that sft prep wrote")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        below = " (did you mean its train/ folder?)" if (folder / "train" / MANIFEST).is_file() else ""
        raise UserError(f"shards {folder}: no {MANIFEST}, so no complete shard set{below}; run sft prep") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"shards {folder}: {MANIFEST} cannot be read: {error}; prepare again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"shards {folder}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; prepare again"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"shards {folder}: {MANIFEST}: '{where}': {reason}; prepare again") from None
    return dict(manifest)


def verify_digests(shards: Shards) -> None:
    """Read every byte of every shard and compare its sha256 with the manifest.

    Raises:
        UserError: a shard is not the one that was written.
    """
    for entry in shards.manifest["shards"]:
        if file_sha256(shards.folder / entry["file"]) != entry["sha256"]:
            raise UserError(f"shard {shards.folder / entry['file']}: its sha256 is not the manifest's; prepare again")


def _open_shard(path: Path, entry: dict[str, Any]) -> list[_Batch]:
    if not path.is_file():
        raise UserError(f"shard {path}: missing, the manifest lists it; copy the folder again or prepare again")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise UserError(
            f"shard {path}: {size} bytes, the manifest says {entry['bytes']}; copy it again or prepare again"
        )
    try:
        with pa.memory_map(os.fsencode(path)) as source, pa.ipc.open_stream(source) as reader:
            if not reader.schema.equals(arrow_schema()):
                raise UserError(
                    f"shard {path}: columns {reader.schema.names} are not those of packed shards; prepare again"
                )
            return [_batch_arrays(batch) for batch in reader]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"shard {path}: not a readable Arrow file: {str(error)[:200]}; prepare again") from None


def _batch_arrays(batch: pa.RecordBatch) -> _Batch:
    lists = {name: batch.column(name) for name in LISTS}
    return _Batch(
        tokens=lists["input_ids"].offsets.to_numpy(),
        docs=lists["seq_lens"].offsets.to_numpy(),
        num_labels=batch.column("num_labels").to_numpy(),
        **{name: column.values.to_numpy() for name, column in lists.items()},
    )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
