"""Order of packs: every pack once per epoch, whatever the ranks. Run: pytest tests/unit/test_order.py"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.order import FILLER, cut, order, pad, step_rows, steps_per_epoch


def test_the_stream_is_frozen():
    """A run that is resumed by a later version must see the same order: these literals never change."""
    assert order(0, 0, 8).tolist() == [6, 3, 7, 5, 0, 1, 4, 2]


@given(num_packs=st.integers(1, 60), rows_per_step=st.integers(1, 20), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_an_epoch_takes_each_pack_once_and_pads_only_its_last_step(num_packs, rows_per_step, seed, epoch):
    steps = steps_per_epoch(num_packs, rows_per_step)
    taken = [step_rows(seed, epoch * steps + step, num_packs, rows_per_step) for step in range(steps)]
    assert all(len(rows) == rows_per_step for rows in taken)
    assert all((rows != FILLER).all() for rows in taken[:-1])
    rows = np.concatenate(taken)
    assert sorted(rows[rows != FILLER]) == list(range(num_packs))


@given(ranks=st.sampled_from([1, 2, 4]), micro_batch=st.sampled_from([1, 2]), accumulation=st.integers(1, 3))
def test_ranks_cut_a_step_into_equal_parts_that_cover_it(ranks, micro_batch, accumulation):
    rows = np.arange(ranks * micro_batch * accumulation)
    parts = [cut(rows, rank, ranks, micro_batch) for rank in range(ranks)]
    assert {len(mine) for mine in parts} == {accumulation}
    assert sorted(np.concatenate([part for mine in parts for part in mine])) == rows.tolist()


def test_epochs_and_seeds_differ():
    assert order(0, 0, 50).tolist() != order(0, 1, 50).tolist()
    assert order(0, 0, 50).tolist() != order(1, 0, 50).tolist()


@pytest.mark.parametrize(("length", "multiple", "padded"), [(5, 2, 6), (6, 2, 6), (1, 4, 4)])
def test_pad(length, multiple, padded):
    assert len(pad(np.arange(length), multiple)) == padded
