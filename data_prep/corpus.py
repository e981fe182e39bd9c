"""All documents of all sources in row order, and which of them each split uses.

Rows leave in this order: weights below one, duplicates, near-duplicates, held-out rows (used once, for measuring
only), balancing, replay. Everything is decided by a seeded hash of the row's text, so adding a source does not move a
row of another one between training and held-out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import filters
from data_prep.blocks import Block
from data_prep.dedup import first_occurrences
from data_prep.mixture import balanced, choose_heldout, copies, replay_copies
from data_prep.near import near_duplicates
from data_prep.report import SourceFate
from sft.errors import UserError
from sft.prep_options import PrepConfig

LARGEST_CLUSTERS = 20
ROWS_OF_CLUSTER = 20
"""What report.json lists of near-duplicates."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Per document, in row order; the ids themselves stay on disk."""

    source_ids: NDArray[np.int16]
    rows: NDArray[np.int64]
    """Row within its source, from 0."""
    keys: NDArray[np.uint64]
    lengths: NDArray[np.int32]
    num_runs: NDArray[np.int32]
    runs: NDArray[np.int32]
    """[sum of num_runs, 2]."""
    truncated: NDArray[np.bool_]
    signatures: NDArray[np.uint32] | None
    groups: dict[int, NDArray[np.int32]]
    """By source: a number for the balance_by value of each of its documents."""

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Rows that were dropped as near-duplicates, by the document that was kept."""

    kept: NDArray[np.int64]
    dropped: NDArray[np.int64]


def gather(blocks: Iterable[Block], fates: Sequence[SourceFate]) -> Corpus:
    """Join blocks in order, and count their rows into `fates`.

    Raises:
        UserError: no block holds a document.
    """
    kept: list[Block] = []
    rows: list[NDArray[np.int64]] = []
    for block in blocks:
        fate = fates[block.source_id]
        first = fate.rows
        for row, reason in block.dropped:
            fate.drop(reason, np.array([first + row]))
        for overlap in block.overlaps:
            fate.overlaps.append({"row": first + overlap.row + 1, "item": overlap.item, "text": overlap.text})
        fate.rows += block.num_rows
        if len(block.rows):
            kept.append(block)
            rows.append(first + block.rows.astype(np.int64))
    if not kept:
        raise nothing_left(fates)
    signatures = [block.signatures for block in kept if block.signatures is not None]
    values: dict[int, dict[str, int]] = {}
    groups: dict[int, list[int]] = {}
    for block in kept:
        if block.groups:
            known = values.setdefault(block.source_id, {})
            numbers = [known.setdefault(value, len(known)) for value in block.groups]
            groups.setdefault(block.source_id, []).extend(numbers)
    return Corpus(
        source_ids=np.repeat(
            np.array([block.source_id for block in kept], dtype=np.int16), [len(block.rows) for block in kept]
        ),
        rows=np.concatenate(rows),
        keys=np.concatenate([block.keys for block in kept]),
        lengths=np.concatenate([block.encoded.lengths for block in kept]),
        num_runs=np.concatenate([block.encoded.num_runs for block in kept]),
        runs=np.concatenate([block.encoded.runs for block in kept]),
        truncated=np.concatenate([block.truncated for block in kept]),
        signatures=np.concatenate(signatures) if signatures else None,
        groups={source: np.array(numbers, dtype=np.int32) for source, numbers in groups.items()},
    )


def choose(
    config: PrepConfig, corpus: Corpus, fates: Sequence[SourceFate]
) -> tuple[dict[str, NDArray[np.int64]], Clusters | None]:
    """Documents of each split in row order, repeated as often as they are used, and the near-duplicates found.

    Raises:
        UserError: the training split, or a held-out split that was asked for, is empty.
    """
    index, times = _weighted(config, corpus, fates)
    if config.dedup != "none" and len(index):
        index = _keep(index, first_occurrences(corpus.keys[index]), filters.DUPLICATE, corpus, fates)
    clusters = None
    if corpus.signatures is not None and len(index):
        first = index[near_duplicates(corpus.signatures[index], config.near)]
        clusters = Clusters(kept=first[first != index], dropped=index[first != index])
        index = _keep(index, first == index, filters.NEAR_DUPLICATE, corpus, fates)
    splits = {"train": index}
    if config.heldout > 0:
        heldout = choose_heldout(corpus.keys[index], config.heldout, config.seed)
        splits = {"train": index[~heldout], "heldout": index[heldout]}
        if len(index) and not heldout.any():
            raise UserError(
                f"heldout {config.heldout:g}: keeps none of the {len(index)} rows; raise it, or set it to 0"
            )
    train = _balanced(config, corpus, splits["train"], fates)
    train = _replayed(config, corpus, train, times, fates)
    _count(corpus, train, times, splits.get("heldout", index[:0]), fates)
    if not len(train):
        raise nothing_left(fates)
    return {**splits, "train": np.repeat(train, times[train])}, clusters


def targets_of(corpus: Corpus) -> NDArray[np.int64]:
    """Tokens of each document that enter the loss [documents]: the first of a document never does."""
    learned = np.cumsum(np.append(0, corpus.runs[:, 1] - np.maximum(corpus.runs[:, 0], 1)), dtype=np.int64)
    run_ends = np.cumsum(corpus.num_runs, dtype=np.int64)
    targets: NDArray[np.int64] = learned[run_ends] - learned[run_ends - corpus.num_runs]
    return targets


def describe_clusters(clusters: Clusters, corpus: Corpus, fates: Sequence[SourceFate]) -> dict[str, Any]:
    """How many clusters of near-duplicates there are, and the largest of them by source and row number."""
    kept, counts = np.unique(clusters.kept, return_counts=True)
    largest = kept[np.lexsort((kept, -counts))[:LARGEST_CLUSTERS]]

    def named(document: int) -> str:
        return f"{fates[corpus.source_ids[document]].name}:{int(corpus.rows[document]) + 1}"

    return {
        "clusters": len(kept),
        "rows_dropped": len(clusters.dropped),
        "largest_rows": int(counts.max(initial=0)) + 1 if len(kept) else 0,
        "largest": [
            {
                "kept": named(first),
                "dropped": [named(row) for row in clusters.dropped[clusters.kept == first].tolist()][:ROWS_OF_CLUSTER],
            }
            for first in largest.tolist()
        ],
    }


def nothing_left(fates: Sequence[SourceFate]) -> UserError:
    """The error of a job that has no row left to train on."""
    totals = {reason: sum(fate.count(reason) for fate in fates) for reason in filters.MEANING}
    told = [f"{count} {reason}" for reason, count in totals.items() if count]
    told += [f"{held} held out"] if (held := sum(fate.heldout_rows for fate in fates)) else []
    rows = sum(fate.rows for fate in fates)
    return UserError(
        f"sources: none of the {rows} rows is left for training ({', '.join(told)}); check input and settings"
    )


def _weighted(
    config: PrepConfig, corpus: Corpus, fates: Sequence[SourceFate]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    times = np.zeros(len(corpus), dtype=np.int64)
    for source_id, source in enumerate(config.sources):
        of_source = corpus.source_ids == source_id
        times[of_source] = copies(corpus.keys[of_source], source.weight, config.seed)
    return _keep(np.arange(len(corpus)), times > 0, filters.NOT_SAMPLED, corpus, fates), times


def _balanced(
    config: PrepConfig, corpus: Corpus, train: NDArray[np.int64], fates: Sequence[SourceFate]
) -> NDArray[np.int64]:
    for source_id, source in enumerate(config.sources):
        if source.balance_by is None or source_id not in corpus.groups:
            continue
        mine = corpus.source_ids[train] == source_id
        first = int(np.searchsorted(corpus.source_ids, source_id))
        keep = np.ones(len(train), dtype=np.bool_)
        keep[mine] = balanced(corpus.groups[source_id][train[mine] - first], corpus.keys[train[mine]], config.seed)
        train = _keep(train, keep, filters.NOT_BALANCED, corpus, fates)
    return train


def _replayed(
    config: PrepConfig,
    corpus: Corpus,
    train: NDArray[np.int64],
    times: NDArray[np.int64],
    fates: Sequence[SourceFate],
) -> NDArray[np.int64]:
    """Set `times` of replay documents so that each source has its share of the tokens; the unused ones leave."""
    ratios = {source_id: source.ratio for source_id, source in enumerate(config.sources) if source.ratio is not None}
    if not ratios:
        return train
    source_ids, lengths = corpus.source_ids[train], corpus.lengths[train].astype(np.int64)
    fresh = ~np.isin(source_ids, list(ratios))
    fresh_tokens = int((lengths * times[train])[fresh].sum())
    for source_id, ratio in ratios.items():
        mine = train[source_ids == source_id]
        if not len(mine):
            raise UserError(
                f"source {fates[source_id].path}: role replay, but none of its rows is left; give another file"
            )
        wanted = round(fresh_tokens * ratio / (1 - sum(ratios.values())))
        times[mine] = replay_copies(corpus.keys[mine], corpus.lengths[mine], wanted, config.seed)
    return _keep(train, times[train] > 0, filters.REPLAY_NOT_NEEDED, corpus, fates)


def _count(
    corpus: Corpus,
    train: NDArray[np.int64],
    times: NDArray[np.int64],
    heldout: NDArray[np.int64],
    fates: Sequence[SourceFate],
) -> None:
    """Write into `fates` what is used."""
    for source_id, fate in enumerate(fates):
        of_train = train[corpus.source_ids[train] == source_id]
        of_heldout = heldout[corpus.source_ids[heldout] == source_id]
        fate.train_rows, fate.heldout_rows = len(of_train), len(of_heldout)
        fate.train_documents = int(times[of_train].sum())
        fate.train_tokens = int((corpus.lengths[of_train] * times[of_train]).sum())
        used = np.sort(np.concatenate([of_train, of_heldout]))
        fate.truncated.add(corpus.rows[used[corpus.truncated[used]]])


def _keep(
    index: NDArray[np.int64], keep: NDArray[np.bool_], reason: str, corpus: Corpus, fates: Sequence[SourceFate]
) -> NDArray[np.int64]:
    gone = index[~keep]
    for source_id in np.unique(corpus.source_ids[gone]).tolist():
        fates[source_id].drop(reason, corpus.rows[gone[corpus.source_ids[gone] == source_id]])
    return index[keep]
