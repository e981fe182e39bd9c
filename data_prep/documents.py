"""Documents: token ids and supervised runs, one by one as lists or many in flat arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.errors import UserError
from sft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    ids: list[int]
    runs: list[tuple[int, int]]
    """Supervised tokens [start, end), ascending."""
    truncated: bool = False


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents in flat arrays."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    """[documents]."""
    num_runs: NDArray[np.int32]
    """[documents]."""
    runs: NDArray[np.int32]
    """[sum of num_runs, 2]: start and end of each supervised run within its document."""

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        """Document `index` as lists."""
        start, first = int(self.lengths[:index].sum()), int(self.num_runs[:index].sum())
        runs = self.runs[first : first + int(self.num_runs[index])]
        return Document(self.ids[start : start + int(self.lengths[index])].tolist(), [(a, b) for a, b in runs.tolist()])


def join_documents(documents: Sequence[Document]) -> Encoded:
    """Flat arrays of a few documents."""
    runs = [run for document in documents for run in document.runs]
    return Encoded(
        ids=np.array([token for document in documents for token in document.ids], dtype=np.int32),
        lengths=np.array([len(document.ids) for document in documents], dtype=np.int32),
        num_runs=np.array([len(document.runs) for document in documents], dtype=np.int32),
        runs=np.array(runs, dtype=np.int32).reshape(-1, 2),
    )


def replace_documents(encoded: Encoded, replacements: dict[int, Document | None]) -> Encoded:
    """The documents with some of them replaced, or left without tokens where the replacement is None."""
    if not replacements:
        return encoded
    ends, run_ends = np.cumsum(encoded.lengths), np.cumsum(encoded.num_runs)
    parts: list[Encoded] = []
    for position in range(len(encoded)):
        if position in replacements:
            document = replacements[position]
            parts.append(join_documents([document or Document([], [])]))
            continue
        length, num_runs = encoded.lengths[position], encoded.num_runs[position]
        parts.append(
            Encoded(
                ids=encoded.ids[ends[position] - length : ends[position]],
                lengths=encoded.lengths[position : position + 1],
                num_runs=encoded.num_runs[position : position + 1],
                runs=encoded.runs[run_ends[position] - num_runs : run_ends[position]],
            )
        )
    return Encoded(
        ids=np.concatenate([part.ids for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        num_runs=np.concatenate([part.num_runs for part in parts]),
        runs=np.concatenate([part.runs for part in parts]),
    )


def keep_documents(encoded: Encoded, keep: NDArray[np.bool_]) -> Encoded:
    """The documents where `keep` [documents] is true."""
    if keep.all():
        return encoded
    return Encoded(
        ids=encoded.ids[np.repeat(keep, encoded.lengths)],
        lengths=encoded.lengths[keep],
        num_runs=encoded.num_runs[keep],
        runs=encoded.runs[np.repeat(keep, encoded.num_runs)],
    )


def eos_of(tokenizer: Tokenizer) -> int:
    """The id that ends every document.

    Raises:
        UserError: the tokenizer has none; a model trained without it never learns to stop.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            f"tokenizer {tokenizer.path}: has no EOS token, so the model could not learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_id
