"""Documents and packs to Arrow shards; `data_prep.shards` says what is in them."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.pack import Packs
from data_prep.shards import COLUMNS, IGNORE, MANIFEST, SCHEMA_VERSION, arrow_schema, features, file_sha256

TOKENS_PER_SHARD = 1 << 23
"""64 MiB of ids and labels: small enough to copy one at a time, large enough that few files are open."""


class Ids(Protocol):
    """Token ids end to end: an int32 array, or a file that is read document by document."""

    def __getitem__(self, piece: slice, /) -> NDArray[np.int32]:
        """The ids [start, stop)."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Encoded documents; document d has `ids[starts[d]:starts[d] + lengths[d]]` and the supervised
    `runs[first_run[d]:first_run[d] + num_runs[d]]`."""

    ids: Ids
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    runs: NDArray[np.int32]
    """[all runs, 2]: supervised tokens [start, end) within the document, ascending."""
    first_run: NDArray[np.int64]
    num_runs: NDArray[np.int32]
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]

    def take(self, index: NDArray[Any]) -> "Documents":
        """The documents at `index`, which may repeat; tokens and runs are shared."""
        return Documents(
            ids=self.ids,
            starts=self.starts[index],
            lengths=self.lengths[index],
            runs=self.runs,
            first_run=self.first_run[index],
            num_runs=self.num_runs[index],
            doc_ids=self.doc_ids[index],
            source_ids=self.source_ids[index],
        )


def write_shards(
    folder: Path,
    documents: Documents,
    packs: Packs,
    manifest: dict[str, Any],
    tokens_per_shard: int = TOKENS_PER_SHARD,
    threads: int = 1,
) -> dict[str, Any]:
    """Write packs of `documents` into the new `folder` and return the manifest, completed with shards and totals.

    The bytes depend on the arguments alone, but not on `threads`, each of which holds one shard in memory. `manifest`
    brings content_key, seq_len and whatever else describes the build; a reader refuses the folder until the manifest,
    which is written last, is there.
    """
    folder.mkdir()
    num_tokens = np.add.reduceat(documents.lengths[packs.order].astype(np.int64), packs.offsets[:-1])
    ranges = list(_shard_ranges(num_tokens, tokens_per_shard))
    names = [f"data-{index:05d}-of-{len(ranges):05d}.arrow" for index in range(len(ranges))]

    def write(name: str, packs_of_shard: tuple[int, int]) -> tuple[dict[str, Any], int]:
        return _write_shard(folder / name, documents, packs, *packs_of_shard)

    with ThreadPoolExecutor(threads) as pool:
        written = list(pool.map(write, names, ranges))
    _write_dataset_files(folder, names, manifest["content_key"])
    tokens, labels = int(num_tokens.sum()), sum(labels for _, labels in written)
    complete = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "totals": {"packs": len(packs), "documents": len(packs.order), "tokens": tokens, "labels": labels},
        "fill": tokens / (len(packs) * manifest["seq_len"]),
        "shards": [entry for entry, _ in written],
    }
    write_json(folder / MANIFEST, complete)
    return complete


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; the file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _shard_ranges(num_tokens: NDArray[np.int64], tokens_per_shard: int) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(num_tokens)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + tokens_per_shard, side="right")))
        yield first, end
        first = end


def _write_shard(path: Path, documents: Documents, packs: Packs, first: int, end: int) -> tuple[dict[str, Any], int]:
    """(the shard's entry in the manifest, its labels) of packs first..end."""
    batch = _record_batch(documents, packs, first, end)
    labels = int(batch.column("num_labels").to_numpy().sum(dtype=np.int64))
    with pa.OSFile(os.fsencode(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    size = path.stat().st_size
    return {"file": path.name, "packs": end - first, "bytes": size, "sha256": file_sha256(path)}, labels


def _record_batch(documents: Documents, packs: Packs, first: int, end: int) -> pa.RecordBatch:
    chosen = documents.take(packs.order[packs.offsets[first] : packs.offsets[end]])
    doc_offsets = packs.offsets[first : end + 1] - packs.offsets[first]
    lengths = chosen.lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths  # of each document within this shard
    from_to = zip(chosen.starts.tolist(), (chosen.starts + lengths).tolist(), strict=True)
    ids = np.concatenate([documents.ids[start:end] for start, end in from_to])
    supervised, targets = _supervised(chosen, starts, len(ids))
    token_offsets = np.append(starts, len(ids))[doc_offsets]
    values = {
        "input_ids": _list_array(token_offsets, ids),
        "labels": _list_array(token_offsets, np.where(supervised, ids, np.int32(IGNORE))),
        "seq_lens": _list_array(doc_offsets, chosen.lengths),
        "num_labels": pa.array(np.add.reduceat(targets, doc_offsets[:-1]), type=pa.int32()),
        "doc_ids": _list_array(doc_offsets, chosen.doc_ids),
        "source_ids": _list_array(doc_offsets, chosen.source_ids),
    }
    return pa.RecordBatch.from_arrays([values[name] for name in COLUMNS], schema=arrow_schema())


def _supervised(
    chosen: Documents, starts: NDArray[np.int64], num_tokens: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(which tokens of the shard are supervised, targets of each document: its first token is never one)."""
    num_runs = chosen.num_runs.astype(np.int64)
    run_ends = np.cumsum(num_runs)
    within = np.arange(int(num_runs.sum())) - np.repeat(run_ends - num_runs, num_runs)
    runs = chosen.runs[np.repeat(chosen.first_run, num_runs) + within].astype(np.int64)
    change = np.zeros(num_tokens + 1, dtype=np.int8)
    document_start = np.repeat(starts, num_runs)
    change[document_start + runs[:, 0]] += 1
    change[document_start + runs[:, 1]] -= 1
    learned = np.cumsum(np.append(0, runs[:, 1] - np.maximum(runs[:, 0], 1)))
    return np.cumsum(change[:-1], dtype=np.int8).view(np.bool_), learned[run_ends] - learned[run_ends - num_runs]


def _list_array(offsets: NDArray[np.int64], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _write_dataset_files(folder: Path, names: list[str], content_key: str) -> None:
    """The two files by which `datasets.load_from_disk` knows a saved data set."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": content_key[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "dataset_info.json", {"citation": "", "description": "", "features": features()})
    write_json(folder / "state.json", state)
