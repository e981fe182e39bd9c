"""Near duplicates: MinHash signatures of shingles (rensa), candidate pairs by banding, clusters by union-find.

Broder 1997 for MinHash, Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, section 3.4 for the bands.
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.words import pieces
from sft.prep_options import NearSection

NUM_PERMUTATIONS = 128
"""uint32 per row: 512 bytes; the estimate's standard deviation is at most sqrt(s (1 - s) / 128), 0.035 at s = 0.8."""
MIN_RECALL = 0.99
"""Probability that a pair just as similar as the threshold becomes a candidate."""
ROWS_PER_CALL = 128
"""rensa starts threads of its own from 256 rows on, which neither survive a fork nor leave the other cores alone."""
PATIENCE = 32
LARGE_BUCKET = 256
"""Rows. After PATIENCE rows of a bucket with more than this left, the rest is compared by rarer values only."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: an odd number with evenly spread bits (Knuth, section 6.4)."""
PAIRS_AT_ONCE = 1 << 14
"""Bounds the memory of a comparison: 2 MiB of equal or unequal values."""

Signatures = NDArray[np.uint32]


class Signer:
    """Texts to signatures, the same in every process and on every platform for one version of rensa."""

    def __init__(self, section: NearSection) -> None:
        self.ngram = section.ngram
        self.seed = section.seed % 2**64

    def signatures(self, texts: list[str]) -> Signatures:
        """[n, 128]: for each permutation the smallest value over the text's shingles."""
        from rensa import RMinHash

        found = np.empty((len(texts), NUM_PERMUTATIONS), dtype=np.uint32)
        for start in range(0, len(texts), ROWS_PER_CALL):
            sets = [shingles(text, self.ngram) for text in texts[start : start + ROWS_PER_CALL]]
            matrix = RMinHash.digest_matrix_from_token_sets(sets, NUM_PERMUTATIONS, self.seed)
            found[start : start + len(sets)] = matrix.to_rows()
        return found


def algorithm() -> str:
    """What the signatures depend on besides the options; belongs into whatever identifies stored signatures."""
    from rensa import RMinHash

    return f"rensa R-MinHash {RMinHash.ALGORITHM_VERSION}, {NUM_PERMUTATIONS} permutations"


def shingles(text: str, ngram: int) -> list[str]:
    """Every run of `ngram` pieces (words with their punctuation; characters in Chinese, Japanese, Thai), folded.

    A text with fewer pieces is one shingle: it is similar only to its equals.
    """
    parts = pieces(text)
    if len(parts) <= ngram:
        return [" ".join(parts)]
    return [" ".join(run) for run in zip(*(parts[start:] for start in range(ngram)), strict=False)]


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows per band): a pair of similarity s becomes a candidate with probability 1 - (1 - s^rows)^bands.

    The most rows per band, hence the fewest needless comparisons, with which a pair at the threshold is still found
    with MIN_RECALL. Candidates are then compared on the whole signature, so more of them cost time and nothing else.
    """
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= MIN_RECALL:
            return bands, rows
    return NUM_PERMUTATIONS, 1


def near_duplicates(signatures: Signatures, section: NearSection) -> NDArray[np.int64]:
    """Cluster of each row, int64 [n]: the index of the cluster's first row.

    Two rows are joined where they share a band and at least `threshold` of their signature's values are equal;
    clusters are the connected components. Above LARGE_BUCKET rows with one band in common, pairs that have only very
    common values in common may be left apart.
    """
    if not len(signatures):
        return np.empty(0, dtype=np.int64)
    distinct, first, inverse = _distinct_rows(signatures)
    parents = np.arange(len(distinct), dtype=np.int64)
    bands, rows = bands_for(section.threshold)
    needed = _values_needed(section.threshold)
    for band in range(bands):
        part = np.ascontiguousarray(distinct[:, band * rows : (band + 1) * rows])
        for bucket in _buckets(part):
            _join_bucket(distinct, bucket, needed, parents)
    roots = _roots(parents)
    smallest = np.full(len(distinct), len(signatures), dtype=np.int64)
    np.minimum.at(smallest, roots, first)
    return smallest[roots][inverse]


def _values_needed(threshold: float) -> int:
    """Equal values of a signature that make an estimate of at least the threshold; 0.8 of 128 is 102.4, hence 103."""
    return int(np.ceil(threshold * NUM_PERMUTATIONS - 1e-9))


def _distinct_rows(signatures: Signatures) -> tuple[Signatures, NDArray[np.int64], NDArray[np.int64]]:
    """Distinct signatures, the first row of each, and each row's index among them: equal texts are compared once."""
    order = np.argsort(_keys(signatures), kind="stable")
    is_new = np.ones(len(order), dtype=np.bool_)
    for start in range(1, len(order), PAIRS_AT_ONCE):
        rows = order[start - 1 : start + PAIRS_AT_ONCE]
        is_new[start : start + PAIRS_AT_ONCE] = (signatures[rows[1:]] != signatures[rows[:-1]]).any(axis=1)
    first = order[is_new]
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.cumsum(is_new) - 1
    return signatures[first], first, inverse


def _keys(part: Signatures) -> NDArray[np.uint64]:
    """One number per row, equal for equal rows; that unequal ones agree by chance only adds a comparison."""
    key = np.zeros(len(part), dtype=np.uint64)
    for column in part.T:
        key = (key ^ column) * MIX
        key ^= key >> np.uint64(32)
    return key


def _buckets(part: Signatures) -> list[NDArray[np.int64]]:
    """Groups of two rows or more with equal values in a band."""
    keys = _keys(part)
    order = np.argsort(keys, kind="stable")
    same_as_next = np.append(keys[order[1:]] == keys[order[:-1]], False)
    shared = same_as_next.copy()
    shared[1:] |= same_as_next[:-1]
    order, same_as_next = order[shared], same_as_next[shared]
    return np.split(order, np.flatnonzero(~same_as_next)[:-1] + 1)


def _join_bucket(signatures: Signatures, bucket: NDArray[np.int64], needed: int, parents: NDArray[np.int64]) -> None:
    """Join the bucket's rows that are similar: from each row to all that are not yet in its cluster.

    Cheap where most rows are alike, or few; where many differ it would take the square of their number.
    """
    left, compared = bucket, 0
    while len(left):
        reached, left = left[:1], left[1:]
        while len(reached) and len(left):
            if compared == PATIENCE and len(left) > LARGE_BUCKET:
                _join_by_values(signatures, np.concatenate([reached, left]), needed, parents)
                return
            compared += 1
            row, reached = reached[0], reached[1:]
            similar = _similar(signatures, row, left, needed)
            for other in left[similar]:
                _join(parents, row, other)
            reached = np.concatenate([reached, left[similar]])
            left = left[~similar]


def _join_by_values(signatures: Signatures, rows: NDArray[np.int64], needed: int, parents: NDArray[np.int64]) -> None:
    """The same for many rows that mostly differ, as where all begin with one long instruction.

    Compared are the rows that share at least one value which few have; those of the instruction, many have.
    """
    for column in range(NUM_PERMUTATIONS):
        for group in _buckets(signatures[rows, column : column + 1]):
            if len(group) <= LARGE_BUCKET:
                _join_bucket(signatures, rows[group], needed, parents)


def _similar(signatures: Signatures, row: np.int64, others: NDArray[np.int64], needed: int) -> NDArray[np.bool_]:
    """Whether each of the others agrees with the row in enough values."""
    found = np.empty(len(others), dtype=np.bool_)
    for start in range(0, len(others), PAIRS_AT_ONCE):
        some = others[start : start + PAIRS_AT_ONCE]
        equal = (signatures[some] == signatures[row]).view(np.uint8)
        found[start : start + len(some)] = equal.sum(axis=1, dtype=np.uint8) >= needed
    return found


def _join(parents: NDArray[np.int64], one: np.int64, other: np.int64) -> None:
    a, b = _root(parents, one), _root(parents, other)
    if a != b:
        parents[max(a, b)] = min(a, b)


def _root(parents: NDArray[np.int64], row: np.int64) -> np.int64:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def _roots(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The root of every row, by halving all paths at once."""
    while (parents[parents] != parents).any():
        parents = parents[parents]
    return parents
