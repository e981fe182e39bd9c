"""Document lengths to packs of at most `seq_len` tokens: two heuristics over the histogram of lengths, the better wins.

*Exact fill*: open a pack with the longest document left, then look for one or two documents that fill the rest to the
last token; where none do, add the longest that fits and look again (in the spirit of minimum bin slack, Gupta & Ho
1999). On instruction data, where lengths are many and short, it reaches the lower bound ceil(tokens / seq_len).
*Best-fit decreasing*: every document, longest first, into the open pack with the least room that still holds it
(Johnson 1974: at most 11/9 of the optimum); better where lengths are few. Documents of equal length are
interchangeable, so both move them in groups: time grows with the number of distinct lengths, not of documents.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 4096
"""Lengths looked at when two documents are sought that fill a pack: bounds the work where seq_len is huge."""


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack p holds documents `order[offsets[p]:offsets[p + 1]]`."""

    order: NDArray[np.int32] | NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: NDArray[np.int32], seq_len: int) -> Packs:
    """Pack documents of `lengths` [n]; deterministic. Each length must be in 1..seq_len.

    Within a pack documents keep their order, and packs are ordered by their first document.

    Raises:
        ValueError: a length is out of range.
    """
    if len(lengths) and (int(lengths.min()) < 1 or int(lengths.max()) > seq_len):
        raise ValueError(f"lengths must be in 1..{seq_len}, got {int(lengths.min())}..{int(lengths.max())}")
    counts = np.bincount(lengths, minlength=2)
    by_length = np.argsort(-lengths, kind="stable").astype(np.int32)
    lower_bound = -(-int(lengths.sum(dtype=np.int64)) // seq_len)
    bin_of, num_bins = _exact_fill(by_length, counts, seq_len)
    if num_bins > lower_bound:
        other, other_bins = _best_fit_decreasing(by_length, counts, seq_len)
        if other_bins < num_bins:
            bin_of, num_bins = other, other_bins
    return _in_document_order(bin_of, num_bins)


def _exact_fill(by_length: NDArray[np.int32], counts: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int32], int]:
    """(bin of each document, number of bins)."""
    bin_of = np.empty(len(by_length), dtype=np.int32)
    next_doc = np.cumsum(counts[::-1])[::-1] - counts  # first unplaced position in by_length, for each length
    num_bins = 0
    for times, needs in _patterns(counts.copy(), seq_len):
        bins = np.arange(num_bins, num_bins + times, dtype=np.int32)
        for length, need in needs.items():
            start = int(next_doc[length])
            bin_of[by_length[start : start + need * times]] = np.repeat(bins, need)
            next_doc[length] += need * times
        num_bins += times
    return bin_of, num_bins


def _patterns(left: NDArray[np.int64], seq_len: int) -> Iterator[tuple[int, dict[int, int]]]:
    """Uses up the histogram `left`, and yields (how many packs, {length: documents of it in each}).

    `lengths` are those of which documents are left, ascending.
    """
    lengths: list[int] = np.flatnonzero(left).tolist()

    def use(length: int, count: int) -> None:
        left[length] -= count
        if not left[length]:
            del lengths[bisect_left(lengths, length)]

    while lengths:
        needs: dict[int, int] = {}
        room = seq_len
        chosen: tuple[int, ...] = (lengths[-1],)
        while chosen:
            for length in chosen:
                needs[length] = needs.get(length, 0) + 1
                use(length, 1)
                room -= length
            chosen = _next_lengths(left, lengths, room)
        more = min(int(left[length]) // need for length, need in needs.items())
        if more:
            for length, need in needs.items():
                use(length, more * need)
        yield 1 + more, needs


def _next_lengths(left: NDArray[np.int64], lengths: Sequence[int], room: int) -> tuple[int, ...]:
    """One length, or two, that fill `room` exactly; else the longest that fits; () where none does."""
    fitting = bisect_right(lengths, room)
    if not fitting:
        return ()
    longest = lengths[fitting - 1]
    if longest == room:
        return (room,)
    low = max((room + 1) // 2, longest - WINDOW + 1)
    if low <= longest:
        fits = (left[low : longest + 1] > 0) & (left[room - longest : room - low + 1][::-1] > 0)
        if 2 * low == room and left[low] < 2:
            fits[0] = False
        if fits.any():
            larger = longest - int(fits[::-1].argmax())
            return larger, room - larger
    return (longest,)


def _best_fit_decreasing(
    by_length: NDArray[np.int32], counts: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int32], int]:
    """(bin of each document, number of bins)."""
    bin_of = np.empty(len(by_length), dtype=np.int32)
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
    return bin_of, free.num_bins


class _FreeSpace:
    """Open bins by the room they have left; a sorted list finds the smallest room that is large enough."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.num_bins = 0
        self._bins: dict[int, list[NDArray[np.int32]]] = {}
        self._rooms: list[int] = []

    def take(self, length: int, num_docs: int) -> tuple[int, NDArray[np.int32]]:
        """(room, bins): the fullest bins that hold `length`, no more than `num_docs` documents need, or new ones."""
        smallest = bisect_left(self._rooms, length)
        if smallest == len(self._rooms):
            needed = -(-num_docs // (self.seq_len // length))
            self.num_bins += needed
            return self.seq_len, np.arange(self.num_bins - needed, self.num_bins, dtype=np.int32)
        room = self._rooms.pop(smallest)
        needed = -(-num_docs // (room // length))
        bins = np.concatenate(self._bins.pop(room))
        self.put(room, bins[needed:])
        return room, bins[:needed]

    def put(self, room: int, bins: NDArray[np.int32]) -> None:
        if room and len(bins):
            if room not in self._bins:
                insort(self._rooms, room)
            self._bins.setdefault(room, []).append(bins)


def _in_document_order(bin_of: NDArray[np.int32], num_bins: int) -> Packs:
    first = np.full(num_bins, len(bin_of), dtype=np.int64)
    np.minimum.at(first, bin_of, np.arange(len(bin_of)))
    rank = np.empty(num_bins, dtype=np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(num_bins, dtype=np.int32)
    pack_of = rank[bin_of]
    offsets = np.zeros(num_bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_bins), out=offsets[1:])
    return Packs(order=np.argsort(pack_of, kind="stable").astype(np.int32), offsets=offsets)
