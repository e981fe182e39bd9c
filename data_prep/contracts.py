"""What must hold for every pack, document and token of a shard: checked over Arrow's own buffers, some packs at a time.

`check_batch` returns what it counted and names the first place that breaks each rule.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.shards import IGNORE, LISTS

TOKENS_AT_A_TIME = 1 << 18
"""The masks of so many tokens stay in the processor's cache; memory does not grow with the shard."""


class Problem(NamedTuple):
    check: str
    """The row of the table that it belongs to."""
    text: str


@dataclass(frozen=True)
class Contract:
    """What the manifest of a shard folder promises of its arrays."""

    seq_len: int
    vocab_size: int
    bos_id: int | None
    stop_ids: frozenset[int]
    """A supervised run ends with one of these."""
    special_ids: frozenset[int]
    repeats_bos: bool
    """Whether a chat template may write BOS again after another special token, as Llama-2's does."""
    truncates: bool
    """Whether a document that was cut may end without a stop token."""
    rows_of_sources: tuple[int, ...]
    """Input rows of each source: document ids run over them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One record batch as arrays; `tokens` and `docs` are list offsets [packs + 1]."""

    tokens: NDArray[np.int32]
    docs: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    num_labels: NDArray[np.int32]
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Counted:
    """Totals of one batch, recomputed from its arrays, and its documents [documents]."""

    packs: int
    tokens: int
    labels: int
    doc_ids: NDArray[np.int64]
    source_ids: NDArray[np.int16]
    cut: NDArray[np.int64]
    """Ids of documents whose last supervised run reaches their end without a stop token."""


def check_batch(
    arrow: pa.RecordBatch, contract: Contract, first_pack: int, where: str
) -> tuple[Counted | None, list[Problem]]:
    """Check one record batch of the data contract's columns; `first_pack` is the index of its first pack.

    Counts are None where the lists do not fit together, so that nothing in them can be told apart.
    """
    problems = [Problem("packs", f"{where}: {reason}") for reason in _layout_problems(arrow)]
    if problems:
        return None, problems
    batch = _arrays(arrow)

    def tell(check: str, packs: NDArray[np.int64], text: Callable[[int], str]) -> None:
        if len(packs):
            problems.append(Problem(check, f"{where}: {text(int(packs[0]))}{_more(len(packs))}"))

    num_tokens, num_docs = np.diff(batch.tokens), np.diff(batch.docs)
    in_docs = np.append(0, np.cumsum(batch.seq_lens, dtype=np.int64))[batch.docs]
    tell("packs", np.flatnonzero(num_docs == 0), lambda at: f"pack {first_pack + at} has no document")
    tell(
        "packs",
        np.flatnonzero(np.diff(in_docs) != num_tokens),
        lambda at: f"pack {first_pack + at}: seq_lens sum to {np.diff(in_docs)[at]}, it has {num_tokens[at]} tokens",
    )
    tell(
        "packs",
        np.unique(np.searchsorted(batch.docs, np.flatnonzero(batch.seq_lens <= 0), side="right") - 1),
        lambda at: f"pack {first_pack + at} has a document without tokens",
    )
    if problems:
        return None, problems
    tell(
        "packs",
        np.flatnonzero(num_tokens > contract.seq_len),
        lambda at: f"pack {first_pack + at}: {num_tokens[at]} tokens, seq_len is {contract.seq_len}",
    )
    problems += _source_problems(batch, contract, where)
    counted, found = _check_tokens(batch, contract, first_pack, where)
    return counted, problems + found


def _layout_problems(arrow: pa.RecordBatch) -> Iterator[str]:
    """Reasons why the buffers of a batch cannot be read as packs."""
    try:
        arrow.validate(full=True)
    except pa.ArrowInvalid as error:
        yield f"not a valid Arrow batch: {' '.join(str(error).split())[:200]}"
        return
    for name in arrow.schema.names:
        column = arrow.column(name)
        if column.null_count or (name in LISTS and column.values.null_count):
            yield f"column {name} holds null"
            return
    for name, like in (("labels", "input_ids"), ("doc_ids", "seq_lens"), ("source_ids", "seq_lens")):
        if not arrow.column(name).offsets.equals(arrow.column(like).offsets):
            yield f"the lists of {name} and {like} have other lengths"


def _arrays(arrow: pa.RecordBatch) -> Batch:
    lists = {name: arrow.column(name) for name in LISTS}
    tokens, docs = lists["input_ids"].offsets.to_numpy(), lists["seq_lens"].offsets.to_numpy()
    ranges = {name: (tokens if name in ("input_ids", "labels") else docs)[[0, -1]] for name in LISTS}
    return Batch(
        tokens=tokens - tokens[0],
        docs=docs - docs[0],
        num_labels=arrow.column("num_labels").to_numpy(),
        **{name: column.values.to_numpy()[slice(*ranges[name])] for name, column in lists.items()},
    )


def _source_problems(batch: Batch, contract: Contract, where: str) -> Iterator[Problem]:
    """Sources that do not exist, and documents whose id is no row of their source."""
    ends = np.cumsum([0, *contract.rows_of_sources])
    known = (batch.source_ids >= 0) & (batch.source_ids < len(contract.rows_of_sources))
    if len(bad := np.flatnonzero(~known)):
        value = int(batch.source_ids[bad[0]])
        text = f"source_ids hold {value}, the manifest has {len(contract.rows_of_sources)} sources"
        yield Problem("sources", f"{where}: {text}{_more(len(bad))}")
    source = np.where(known, batch.source_ids, 0)
    outside = (batch.doc_ids < ends[source]) | (batch.doc_ids >= ends[source + 1])
    if len(bad := np.flatnonzero(outside & known & (batch.doc_ids >= 0))):
        doc, name = int(batch.doc_ids[bad[0]]), int(source[bad[0]])
        text = f"doc {doc} is no row of source {name}, whose rows are {ends[name]} to {ends[name + 1] - 1}"
        yield Problem("sources", f"{where}: {text}{_more(len(bad))}")
    if len(bad := np.flatnonzero(batch.doc_ids < 0)):
        text = f"doc_ids hold {int(batch.doc_ids[bad[0]])}, rows are numbered from 0"
        yield Problem("document ids", f"{where}: {text}{_more(len(bad))}")


def _check_tokens(batch: Batch, contract: Contract, first_pack: int, where: str) -> tuple[Counted, list[Problem]]:
    doc_ends = np.cumsum(batch.seq_lens, dtype=np.int64)
    found: defaultdict[tuple[str, str], list[NDArray[np.int64]]] = defaultdict(list)
    targets, cut = [], []
    for first, end in _stretches(batch.tokens):
        docs = slice(int(batch.docs[first]), int(batch.docs[end]))
        tokens = slice(int(batch.tokens[first]), int(batch.tokens[end]))
        stretch = _Stretch(batch.input_ids[tokens], batch.labels[tokens], doc_ends[docs] - tokens.start)
        at_end, inside = stretch.ends_without_stop(contract)
        cut.append(docs.start + stretch.documents_of(at_end))
        found["stop tokens", "has a supervised run without a stop token at its end"] += [
            docs.start + stretch.documents_of(inside if contract.truncates else np.append(inside, at_end))
        ]
        for kind, bad in _broken_rules(stretch, contract):
            found[kind].append(docs.start + stretch.documents_of(bad))
        targets.append(stretch.targets_per_document())
    per_document = np.concatenate(targets)
    found["labels", "has no target"].append(np.flatnonzero(per_document == 0))
    problems = []
    for (check, text), parts in found.items():
        bad = np.unique(np.concatenate(parts))
        if len(bad):
            pack = first_pack + int(np.searchsorted(batch.docs, bad[0], side="right")) - 1
            at = f"doc {batch.doc_ids[bad[0]]} in pack {pack}"
            problems.append(Problem(check, f"{where}: {at} {text}{_more(len(bad))}"))
    num_labels = np.add.reduceat(per_document, batch.docs[:-1])
    if len(bad := np.flatnonzero(num_labels != batch.num_labels)):
        text = f"pack {first_pack + bad[0]}: num_labels is {batch.num_labels[bad[0]]}, its labels give"
        problems.append(Problem("labels", f"{where}: {text} {num_labels[bad[0]]}{_more(len(bad))}"))
    cut_ids = batch.doc_ids[np.concatenate(cut)]
    labels = int(num_labels.sum(dtype=np.int64))
    counted = Counted(
        len(batch.num_labels), len(batch.input_ids), labels, batch.doc_ids.copy(), batch.source_ids.copy(), cut_ids
    )
    return counted, problems


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Whole packs, some hundred thousand tokens of them; `doc_ends` [documents] are positions in `ids`."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    doc_ends: NDArray[np.int64]

    @property
    def doc_starts(self) -> NDArray[np.int64]:
        return np.append(0, self.doc_ends[:-1])

    def documents_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document of each token position."""
        return np.searchsorted(self.doc_ends, positions, side="right")

    def targets_per_document(self) -> NDArray[np.int32]:
        """Supervised tokens of each document but its first, which nothing predicts."""
        before = np.cumsum(self.labels != IGNORE, dtype=np.int32)
        return before[self.doc_ends - 1] - before[self.doc_starts]

    def ends_without_stop(self, contract: Contract) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Last positions of supervised runs that no stop token ends: at the end of their document, and before it."""
        supervised = self.labels != IGNORE
        goes_on = np.append(supervised[1:], False)
        goes_on[self.doc_ends - 1] = False
        last = np.flatnonzero(supervised & ~goes_on)
        open_ended = last[~np.isin(self.ids[last], list(contract.stop_ids))]
        at_end = np.isin(open_ended + 1, self.doc_ends, assume_unique=True)
        return open_ended[at_end], open_ended[~at_end]


def _broken_rules(stretch: _Stretch, contract: Contract) -> Iterator[tuple[tuple[str, str], NDArray[np.int64]]]:
    """((check, what is wrong), token positions where it is) of the rules for single tokens."""
    ids, labels = stretch.ids, stretch.labels
    yield (
        ("labels", f"has a label that is neither {IGNORE} nor its input id"),
        np.flatnonzero((labels != ids) & (labels != IGNORE)),
    )
    outside = (ids < 0) | (ids >= contract.vocab_size)
    yield ("vocabulary", f"has an id outside the vocabulary of {contract.vocab_size}"), np.flatnonzero(outside)
    if contract.bos_id is None:
        return
    starts = stretch.doc_starts
    without = starts[ids[starts] != contract.bos_id]
    yield ("BOS", f"does not start with BOS (id {contract.bos_id})"), without
    if contract.bos_id in contract.stop_ids:  # then it also ends a response, and says nothing
        return
    again = np.setdiff1d(np.flatnonzero(ids == contract.bos_id), starts, assume_unique=True)
    if contract.repeats_bos:
        after_special = list(contract.special_ids - {contract.bos_id})
        again = again[~np.isin(ids[again - 1], after_special)]
    yield ("BOS", f"holds BOS (id {contract.bos_id}) more than once"), again


def _stretches(offsets: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Ranges of packs with about TOKENS_AT_A_TIME tokens."""
    first, num_packs = 0, len(offsets) - 1
    while first < num_packs:
        wanted = int(offsets[first]) + TOKENS_AT_A_TIME
        end = max(first + 1, int(np.searchsorted(offsets, wanted, side="right")) - 1)
        yield first, end
        first = end


def _more(count: int) -> str:
    return f" (and {count - 1} more like it)" if count > 1 else ""


def arrow_type(name: str) -> Any:
    """Arrow type of a column of the data contract."""
    return pa.list_(pa.type_for_alias(LISTS[name])) if name in LISTS else pa.int32()
