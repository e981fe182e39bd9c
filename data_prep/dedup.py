"""Exact deduplication: of rows with equal prompt and response, the first is kept."""

import numpy as np
from numpy.typing import NDArray


def first_occurrences(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True [n] for each row whose text key [n, 2] has not been seen in an earlier row."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in row order
    ordered = keys[order]
    first = np.ones(len(keys), dtype=np.bool_)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first
