"""Which packs an optimizer step takes: a pure function of (seed, step), the same for any number of ranks.

    step s of epoch e takes packs order(seed, e)[s * R : (s + 1) * R], R = rows_per_step

Ranks, micro-batch and accumulation only cut that list. The tail of an epoch is filled with FILLER rows,
which weigh nothing, so that every rank runs the same number of forwards. Nothing here is saved in a
checkpoint: the step says it all.
"""

import functools
import hashlib

import numpy as np
import numpy.typing as npt

FILLER = -1

Rows = npt.NDArray[np.int64]


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, num_packs: int) -> Rows:
    """The permutation of pack indices of one epoch.

    numpy guarantees the stream of RandomState for ever (NEP 19), not that of Generator: a run
    resumed under a newer numpy must see the same order. The array is shared and read-only.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    words = np.frombuffer(digest, dtype=np.uint32)
    rows = np.random.RandomState(words).permutation(num_packs).astype(np.int64)
    rows.flags.writeable = False
    return rows


def seed_at(seed: int, step: int, place: int) -> int:
    """Seed of what is random about the pack at `place` of optimizer step `step` (both from 0): below 2 ** 63.

    Of nothing else, so that ranks, accumulation and micro-batch do not show in it, and a resume has nothing to restore.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def steps_per_epoch(num_packs: int, rows_per_step: int) -> int:
    """Optimizer steps of one pass, the last one possibly padded with filler rows."""
    return -(-num_packs // rows_per_step)


def step_rows(seed: int, step: int, num_packs: int, rows_per_step: int) -> Rows:
    """Pack indices of optimizer step `step` (0-based, counted over the whole run), FILLER at the tail.

    Example: 5 packs, 2 rows per step: step 2 is the last of epoch 0 and gives [order(seed, 0)[4], FILLER].
    """
    epoch, position = divmod(step, steps_per_epoch(num_packs, rows_per_step))
    rows = order(seed, epoch, num_packs)[position * rows_per_step : (position + 1) * rows_per_step]
    return pad(rows, rows_per_step)


def pad(rows: Rows, multiple: int) -> Rows:
    """`rows` with FILLER appended up to a multiple of `multiple`."""
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=FILLER)


def cut(rows: Rows, rank: int, world_size: int, micro_batch: int) -> list[Rows]:
    """This rank's micro-batches of a step: equally many for every rank.

    len(rows) must be a multiple of world_size * micro_batch. Together the ranks take each row once.
    """
    return list(rows.reshape(-1, world_size, micro_batch)[:, rank])
