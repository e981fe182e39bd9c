"""Packs to tensors: the only place that knows how rows lie on the device.

A micro-batch is flattened: its documents lie end to end in one sequence without padding, positions
restart with each document, and the boundaries travel explicitly.

    documents   [a a a a] [b b b]
    ids_1T       a0 a1 a2 a3 b0 b1 b2
    pos_1T        0  1  2  3  0  1  2
    cu_seqlens    0           4        7
    labels_T      .  .  a2 a3 .  b1 b2      supervised where not -100
    predict_N        1  2     4  5          positions whose NEXT token is supervised, in the same document
    targets_N        a2 a3    b1 b2         the token each of them must predict
    source_N         0  0     1  1          where a is of the manifest's source 0 and b of source 1

Shape legend: T tokens of the micro-batch, N targets, S data sources, 1 the batch axis that transformers expects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_prep.shards import Pack, Shards
from sft.order import FILLER, Rows

IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """Where the documents of a flattened micro-batch begin and end."""

    seq_lens: tuple[int, ...]
    """Document lengths, on the host."""
    cu_seqlens: torch.Tensor
    """int32 [documents + 1] on the device: cumulative lengths from 0, as FlashAttention takes them."""
    group: Any = None
    """The process group whose ranks hold equal parts of these tokens, in order; None: they are all here."""

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document."""
        return max(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return sum(self.seq_lens)


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank."""

    ids_1T: torch.Tensor
    pos_1T: torch.Tensor
    layout: Layout
    predict_N: torch.Tensor
    predict_on_host: np.ndarray
    """predict_N again, int64: to choose among them without waiting for a GPU."""
    targets_N: torch.Tensor
    source_N: torch.Tensor
    """int64, below num_sources: the data source of each target."""
    num_sources: int
    rows: tuple[tuple[int, int], ...] = ()
    """(tokens, seed of its noise) of each pack, where training asks for noise."""
    start: int = 0
    """Place of ids_1T's first token in the micro-batch: other than 0 where ranks share packs."""


def build(
    documents: Sequence[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    sources: Sequence[int] | None = None,
    num_sources: int = 1,
) -> MicroBatch:
    """Flatten (input_ids, labels) documents, in order. Both int [length]; labels not shifted, -100 = unsupervised.

    `sources` gives the data source of each document, from 0 to num_sources - 1; without it all are of source 0.
    """
    seq_lens = tuple(len(ids) for ids, _ in documents)
    starts = np.cumsum((0, *seq_lens))
    ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    labels = np.concatenate([labels for _, labels in documents]).astype(np.int64)
    labels[starts[:-1]] = IGNORE  # no token before it in its document: never a target
    target_positions = np.flatnonzero(labels != IGNORE)
    predict = target_positions - 1
    positions = np.arange(len(ids)) - np.repeat(starts[:-1], seq_lens)
    source_of_token = np.repeat(np.zeros(len(seq_lens), np.int64) if sources is None else sources, seq_lens)
    return MicroBatch(
        ids_1T=to_device(ids, device)[None],
        pos_1T=to_device(positions, device)[None],
        layout=Layout(seq_lens, to_device(starts.astype(np.int32), device)),
        predict_N=to_device(predict, device),
        predict_on_host=predict,
        targets_N=to_device(labels[target_positions], device),
        source_N=to_device(source_of_token[target_positions].astype(np.int64), device),
        num_sources=num_sources,
    )


def build_scored(documents: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], device: torch.device) -> MicroBatch:
    """Flatten inputs behind which continuations are scored; int ids. Several may share an input: it is computed once.

    A continuation's last token is predicted by its input's last one: all but that token stand in the input. Each
    continuation is a source of its own, numbered through in order. No document: one token that weighs nothing.
    """
    filler = (np.zeros(1, np.int64), ())
    inputs = [(ids, np.full(len(ids), IGNORE)) for ids, _ in documents or [filler]]
    ends = np.cumsum([len(ids) for ids, _ in inputs])
    scored = [(end, ids) for end, (_, parts) in zip(ends, documents, strict=False) for ids in parts]
    nothing = np.zeros(0, np.int64)
    predict = np.concatenate([nothing, *(np.arange(end - len(ids), end) for end, ids in scored)])
    sources = [np.full(len(ids), number) for number, (_, ids) in enumerate(scored)]
    return replace(
        build(inputs, device),
        predict_N=to_device(predict, device),
        predict_on_host=predict,
        targets_N=to_device(np.concatenate([nothing, *(ids.astype(np.int64) for _, ids in scored)]), device),
        source_N=to_device(np.concatenate([nothing, *sources]), device),
        num_sources=max(1, len(scored)),
    )


def from_shards(shards: Shards, rows: Rows, device: torch.device, seeds: Sequence[int] = ()) -> MicroBatch:
    """The micro-batch of the given packs; FILLER rows become one token that weighs nothing.

    `seeds`: of the noise of each pack, where training asks for noise.
    """
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    sources: list[int] = []
    lengths: list[int] = []
    for row in rows:
        if row == FILLER:
            documents.append((np.zeros(1, np.int32), np.full(1, IGNORE, np.int32)))
            sources.append(0)
            lengths.append(1)
        else:
            pack = shards.pack(int(row))
            documents += split_documents(pack)
            sources += pack.source_ids.tolist()
            lengths.append(len(pack.input_ids))
    built = build(documents, device, sources, len(shards.manifest["sources"]))
    return replace(built, rows=tuple(zip(lengths, seeds, strict=True))) if seeds else built


def num_labels(shards: Shards, rows: Rows) -> int:
    """Targets in the given rows: read from the shards' index, known before any forward."""
    return int(shards.num_labels[rows[rows != FILLER]].sum())


def num_tokens(shards: Shards, rows: Rows) -> int:
    """Tokens in the given rows."""
    return int(shards.num_tokens[rows[rows != FILLER]].sum())


def source_counts(shards: Shards, rows: Rows) -> np.ndarray:
    """Tokens and targets of each data source in the given rows, int64 [2, S].

    Their sums over S are num_tokens and num_labels. It reads the labels of the rows: ask for a rank's own, which the
    forward reads as well, and add up over ranks.
    """
    counts = np.zeros((2, len(shards.manifest["sources"])), np.int64)
    packs = [shards.pack(int(row)) for row in rows[rows != FILLER]]
    if packs:
        lengths = np.concatenate([pack.seq_lens for pack in packs])
        sources = np.concatenate([pack.source_ids for pack in packs])
        starts = np.cumsum(lengths) - lengths
        is_target = np.concatenate([pack.labels for pack in packs]) != IGNORE
        is_target[starts] = False  # as in build
        np.add.at(counts[0], sources, lengths)
        np.add.at(counts[1], sources, np.add.reduceat(is_target, starts, dtype=np.int64))
    return counts


def split_documents(pack: Pack) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of each document of a pack."""
    cuts = np.cumsum(pack.seq_lens)[:-1]
    return list(zip(np.split(pack.input_ids, cuts), np.split(pack.labels, cuts), strict=True))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Same values and dtype on the device, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
