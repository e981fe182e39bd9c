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

Shape legend: T tokens of the micro-batch, N targets, 1 the batch axis that transformers expects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document."""
        return max(self.seq_lens)


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank."""

    ids_1T: torch.Tensor
    pos_1T: torch.Tensor
    layout: Layout
    predict_N: torch.Tensor
    targets_N: torch.Tensor


def build(documents: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> MicroBatch:
    """Flatten (input_ids, labels) documents, in order. Both int [length]; labels not shifted, -100 = unsupervised."""
    seq_lens = tuple(len(ids) for ids, _ in documents)
    starts = np.cumsum((0, *seq_lens))
    ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    labels = np.concatenate([labels for _, labels in documents]).astype(np.int64)
    labels[starts[:-1]] = IGNORE  # no token before it in its document: never a target
    target_positions = np.flatnonzero(labels != IGNORE)
    positions = np.arange(len(ids)) - np.repeat(starts[:-1], seq_lens)
    return MicroBatch(
        ids_1T=_to_device(ids, device)[None],
        pos_1T=_to_device(positions, device)[None],
        layout=Layout(seq_lens, _to_device(starts.astype(np.int32), device)),
        predict_N=_to_device(target_positions - 1, device),
        targets_N=_to_device(labels[target_positions], device),
    )


def from_shards(shards: Shards, rows: Rows, device: torch.device) -> MicroBatch:
    """The micro-batch of the given packs; FILLER rows become one token that weighs nothing."""
    documents = [document for row in rows for document in _documents(shards, int(row))]
    return build(documents, device)


def num_labels(shards: Shards, rows: Rows) -> int:
    """Targets in the given rows: read from the shards' index, known before any forward."""
    return int(shards.num_labels[rows[rows != FILLER]].sum())


def num_tokens(shards: Shards, rows: Rows) -> int:
    """Tokens in the given rows."""
    return int(shards.num_tokens[rows[rows != FILLER]].sum())


def _documents(shards: Shards, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if row == FILLER:
        return [(np.zeros(1, np.int32), np.full(1, IGNORE, np.int32))]
    return split_documents(shards.pack(row))


def split_documents(pack: Pack) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of each document of a pack."""
    cuts = np.cumsum(pack.seq_lens)[:-1]
    return list(zip(np.split(pack.input_ids, cuts), np.split(pack.labels, cuts), strict=True))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
