"""How often each row is used and in which split: decided by a seeded hash of the row's text, never by order.

Rows with equal text always share their fate, so a repeated or duplicate row cannot be in both splits. A row keeps
its fate when other rows are added or removed (with `heldout` as a fraction).
"""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray


def text_key(content: str) -> bytes:
    """16 bytes that stand for the text of a row; its Unicode form (NFC, NFD) and the width of its white space (ASCII)
    do not count."""
    if not content.isascii():
        content = unicodedata.normalize("NFC", content)
    return xxhash.xxh3_128_digest(b" ".join(content.encode().split()))


def keys_to_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """[n, 2] uint64 of n keys of 16 bytes."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2).astype(np.uint64)


def seeded_hash(keys: NDArray[np.uint64], seed: int, purpose: str) -> NDArray[np.uint64]:
    """Uniform uint64 [n] from keys [n, 2]; seeds and purposes give independent values.

    The mixing steps are those of SplitMix64 (Steele, Lea & Flood 2014).
    """
    salt = np.frombuffer(hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=16).digest(), dtype="<u8")
    return _mix(keys[:, 0] ^ _mix(keys[:, 1] ^ salt[0]) ^ salt[1])


def copies(keys: NDArray[np.uint64], weight: float, seed: int) -> NDArray[np.int64]:
    """How often each of n rows is used [n]: floor(weight), and once more for a seeded share of them."""
    whole = int(weight)
    extra = seeded_hash(keys, seed, "weight") < _threshold(weight - whole)
    return whole + extra.astype(np.int64)


def choose_heldout(keys: NDArray[np.uint64], heldout: float, seed: int) -> NDArray[np.bool_]:
    """Which of n rows are held out [n]: a fraction below 1, or `heldout` rows.

    Rows of equal text are taken together; a group that would exceed the number is passed over.
    """
    hashes = seeded_hash(keys, seed, "heldout")
    if heldout < 1:
        return hashes < _threshold(heldout)
    order = np.lexsort((keys[:, 1], keys[:, 0], hashes))
    ordered = keys[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
    sizes = np.diff(np.r_[starts, len(order)])
    chosen = np.zeros(len(keys), dtype=np.bool_)
    room = int(heldout)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        if size <= room:
            chosen[order[start : start + size]] = True
            room -= size
        if room == 0:
            break
    return chosen


def balanced(values: NDArray[np.generic], keys: NDArray[np.uint64], seed: int) -> NDArray[np.bool_]:
    """Which of n rows stay [n] so that every value is as frequent as the rarest: those with the smallest hashes."""
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.lexsort((keys[:, 1], keys[:, 0], seeded_hash(keys, seed, "balance"), codes))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    stays = np.zeros(len(values), dtype=np.bool_)
    stays[order] = rank < counts.min()
    return stays


def replay_copies(
    keys: NDArray[np.uint64], lengths: NDArray[np.int32], wanted_tokens: int, seed: int
) -> NDArray[np.int64]:
    """How often each of n rows is used [n] so that together they have about `wanted_tokens`.

    All rows as often as they go whole, then rows in the order of their hash until the next one would take the sum
    farther from what is wanted; at least one row.
    """
    tokens = lengths.astype(np.int64)
    whole, rest = divmod(wanted_tokens, int(tokens.sum()))
    order = np.lexsort((keys[:, 1], keys[:, 0], seeded_hash(keys, seed, "replay")))
    ends = np.cumsum(tokens[order])
    times = np.full(len(tokens), whole, dtype=np.int64)
    times[order[ends - tokens[order] // 2 <= rest]] += 1
    if not times.any():
        times[order[0]] = 1
    return times


def _threshold(fraction: float) -> np.uint64:
    return np.uint64(int(fraction * 2.0**64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
