"""Document lengths to packs of at most `seq_len` tokens: best-fit decreasing over a histogram of free space.

Every document goes, longest first, into the open pack with the least room that still holds it (Johnson 1974:
at most 11/9 of the optimum). Packs with equal room are interchangeable, and so are documents of equal length, so
both are moved in groups: the work is O(n + seq_len^2) at worst and a few thousand steps on real data.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack p holds documents `order[offsets[p]:offsets[p + 1]]`."""

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: NDArray[np.int32], seq_len: int) -> Packs:
    """Pack documents of `lengths` [n]; deterministic. Each length must be in 1..seq_len.

    Within a pack documents keep their order, and packs are ordered by their first document.

    Raises:
        ValueError: a length is out of range.
    """
    num_docs = len(lengths)
    if num_docs and (int(lengths.min()) < 1 or int(lengths.max()) > seq_len):
        raise ValueError(f"lengths must be in 1..{seq_len}, got {int(lengths.min())}..{int(lengths.max())}")
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    counts = np.bincount(lengths, minlength=1)
    bin_of = np.empty(num_docs, dtype=np.int64)
    free = _FreeSpace(seq_len)
    start = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = start + int(counts[length])
        while start < end:
            room, bins = free.take(length, end - start)
            each = room // length
            placed = min(each * len(bins), end - start)
            bin_of[by_length[start : start + placed]] = np.repeat(bins, each)[:placed]
            start += placed
            full, rest = divmod(placed, each)
            free.put(room - each * length, bins[:full])
            free.put(room - rest * length, bins[full:])
    return _in_document_order(bin_of, free.num_bins)


class _FreeSpace:
    """Open bins by the room they have left; a bit set finds the smallest room that is large enough."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.num_bins = 0
        self._bins: dict[int, list[NDArray[np.int64]]] = {}
        self._rooms = 0

    def take(self, length: int, num_docs: int) -> tuple[int, NDArray[np.int64]]:
        """(room, bins): the fullest bins that hold `length`, no more than `num_docs` documents need, or new ones."""
        fitting = self._rooms >> length
        if not fitting:
            needed = -(-num_docs // (self.seq_len // length))
            self.num_bins += needed
            return self.seq_len, np.arange(self.num_bins - needed, self.num_bins, dtype=np.int64)
        room = length + (fitting & -fitting).bit_length() - 1
        needed = -(-num_docs // (room // length))
        bins = np.concatenate(self._bins.pop(room))
        self._rooms &= ~(1 << room)
        self.put(room, bins[needed:])
        return room, bins[:needed]

    def put(self, room: int, bins: NDArray[np.int64]) -> None:
        if room and len(bins):
            self._bins.setdefault(room, []).append(bins)
            self._rooms |= 1 << room


def _in_document_order(bin_of: NDArray[np.int64], num_bins: int) -> Packs:
    first = np.full(num_bins, len(bin_of), dtype=np.int64)
    np.minimum.at(first, bin_of, np.arange(len(bin_of)))
    rank = np.empty(num_bins, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_bins)
    pack_of = rank[bin_of]
    offsets = np.zeros(num_bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_bins), out=offsets[1:])
    return Packs(order=np.argsort(pack_of, kind="stable"), offsets=offsets)
