"""Invented documents, step by step, in several packings: what the gradient contract and the golden run train on.

Everything comes from numpy's RandomState, whose stream never changes (NEP 19), and one epoch spans the whole run, so
that a step holds the same documents however they are packed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.pack import Packs
from data_prep.probe import probe_ids
from data_prep.shard_writer import Documents, write_shards
from sft.order import order
from sft.tokenizer import load_tokenizer

SEQ_LEN = 96
DOCS_PER_STEP = 16
DOCS_OF_LAST_STEP = 10
LONGEST = 24
ALPHABET = 32


def make_documents(steps: int, unlabelled: Sequence[int] = (), seed: int = 0) -> Documents:
    """DOCS_PER_STEP documents for each step but the last, which has fewer: a tail with filler rows.

    Each counts on from a random letter in strides of 1 to 3, so that there is something to learn. Lengths are 4 to
    LONGEST, and a random part from the end is supervised; documents named in `unlabelled` are prompts only.
    """
    random = np.random.RandomState(seed)
    count = (steps - 1) * DOCS_PER_STEP + DOCS_OF_LAST_STEP
    lengths = random.randint(4, LONGEST + 1, size=count).astype(np.int32)
    ids = [3 + (random.randint(ALPHABET) + random.randint(1, 4) * np.arange(length)) % ALPHABET for length in lengths]
    first_target = [random.randint(0, length) for length in lengths]
    supervised = ~np.isin(np.arange(count), unlabelled)
    return Documents(
        ids=np.concatenate(ids).astype(np.int32),
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        runs=np.stack([first_target, lengths], axis=1).astype(np.int32)[supervised],
        first_run=(np.cumsum(supervised) - supervised).astype(np.int64),
        num_runs=supervised.astype(np.int32),
        doc_ids=np.arange(count, dtype=np.int64),
        source_ids=np.zeros(count, np.int16),
    )


def in_rows(documents: Documents, docs_per_row: int, shuffle_seed: int | None = None) -> list[list[list[int]]]:
    """Documents of each row of each step: each step's own, in order or shuffled among themselves."""
    steps = []
    for first in range(0, len(documents.lengths), DOCS_PER_STEP):
        own = np.arange(first, min(first + DOCS_PER_STEP, len(documents.lengths)))
        if shuffle_seed is not None:
            own = np.random.RandomState(shuffle_seed + first).permutation(own)
        steps.append([own[at : at + docs_per_row].tolist() for at in range(0, len(own), docs_per_row)])
    return steps


def write(folder: Path, documents: Documents, rows_of_steps: list[list[list[int]]], tokenizer_folder: Path) -> Path:
    """Shards <folder>/train in which step s of a run with data.seed 0 takes rows_of_steps[s]."""
    folder.mkdir(parents=True)
    rows = [row for step in rows_of_steps for row in step]
    packs: list[list[int]] = [[] for _ in rows]
    for taken, pack in enumerate(order(0, 0, len(rows))):
        packs[pack] = rows[taken]
    tokenizer = load_tokenizer(tokenizer_folder)
    facts = {
        "path": "tiny", "digest": tokenizer.digest, "vocab_size": 259, "bos_id": 1, "eos_id": 2, "stop_id": 2,
        "probe": probe_ids(tokenizer),
    }  # fmt: skip
    manifest = {
        "content_key": "0" * 64, "seq_len": SEQ_LEN, "template": [], "sources": [{"name": "made"}], "tokenizer": facts,
    }  # fmt: skip
    offsets = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    write_shards(folder / "train", documents, Packs(np.concatenate(packs).astype(np.int32), offsets), manifest)
    return folder
