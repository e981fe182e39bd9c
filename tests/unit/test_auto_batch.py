"""The search for a micro-batch on invented memory; what is told and kept. Run: pytest tests/unit/test_auto_batch.py"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft import peak_memory
from sft.auto_batch import (
    LIMIT,
    Trial,
    check_smallest,
    choose,
    choose_next,
    describe,
    divisors,
    heaviest,
    read_record,
    write_record,
)

DEVICE = 80.0
"""GiB; also bytes where only proportions matter."""
GIB = 2**30
START = 10.0

sizes = st.integers(1, 512).map(divisors)
ranks = st.integers(1, 3)


def run_search(need, sizes, rest=0.0, update=0.0, device=DEVICE):
    """Trials on ranks that need `need(packs)`, an array over ranks."""
    trials = []
    while (packs := choose_next(trials, sizes)) is not None:
        found = np.broadcast_to(np.asarray(need(packs), dtype=float), np.shape(need(1)))
        trials.append(Trial(packs, *(np.broadcast_to(value, found.shape) for value in (rest, found, update, device))))
        assert len(trials) < 40
    return trials


@given(
    sizes=sizes,
    lines=st.lists(
        st.tuples(
            st.floats(0, 20),  # rest
            st.floats(0, (1 - LIMIT) * DEVICE),  # fixed part of a forward and backward
            st.floats(0.01, 30),  # for each pack
        ),
        min_size=1,
        max_size=3,
    ),
    update=st.floats(0, 60),
)
def test_the_largest_that_fits_every_rank_is_found_and_nothing_beyond_the_limit_is_tried(sizes, lines, update):
    rest, fixed, slope = (np.array(column) for column in zip(*lines, strict=True))

    def need(packs):
        return rest + fixed + slope * packs

    trials = run_search(need, sizes, rest, update)
    limit = LIMIT * DEVICE
    fitting = [size for size in sizes if (need(size) <= limit).all()]
    assert choose(trials, sizes) == max(fitting, default=1)
    assert all((trial.peak <= limit * (1 + 1e-9)).all() for trial in trials[2:])
    assert [trial.packs for trial in trials] == sorted({trial.packs for trial in trials})


@given(
    sizes=sizes,
    rest=st.floats(0, 40),
    phases=st.lists(st.tuples(st.floats(0, 40), st.floats(0, 30)), min_size=2, max_size=5),
)
def test_a_bend_costs_at_most_a_smaller_result(sizes, rest, phases):
    """The peak is the largest of several phases, so the line may bend upwards behind the last trial. No trial needs
    more than the device has, but for one pack more than fitted, and only where the slope more than doubles there."""

    def need(packs):
        return np.array([rest + max(fixed + slope * packs for fixed, slope in phases)])

    trials = run_search(need, sizes, rest)
    for earlier, before, trial in zip(trials, trials[1:], trials[2:], strict=False):
        slopes = [(b.peak - a.peak)[0] / (b.packs - a.packs) for a, b in ((earlier, before), (before, trial))]
        if trial.packs > before.packs + 1 or slopes[1] <= 2 * slopes[0] * (1 + 1e-9):
            assert trial.peak[0] <= DEVICE * (1 + 1e-9)
    found = choose(trials, sizes)
    assert found == 1 or need(found)[0] <= LIMIT * DEVICE


@given(sizes=sizes, slope=st.floats(0.1, 20), more=st.floats(1, 100))
def test_a_larger_device_never_gives_less(sizes, slope, more):
    found = [
        choose(run_search(lambda packs: np.array([5 + slope * packs]), sizes, 5.0, device=device), sizes)
        for device in (DEVICE, DEVICE + more)
    ]
    assert found[0] <= found[1]


def test_it_jumps_where_that_is_safe_and_climbs_where_it_is_not():
    def tried(rest, fixed, slope, sizes):
        return [t.packs for t in run_search(lambda n: np.array([rest + fixed + slope * n]), sizes, rest)]

    assert tried(10, 0, 1, divisors(64)) == [0, 1, 32]
    assert tried(10, 0, 1, [1, 2, 4]) == [0, 1, 4]
    assert tried(20, 5, 4, divisors(8)) == [0, 1, 4, 8]  # 20 + 17 / 4 x 8 is beyond the limit; at 57 of 80 it is not
    assert tried(70, 1, 3, divisors(8)) == [0, 1]
    assert tried(70, 30, 3, divisors(8)) == [0, 1], "not even one pack"


def test_the_worst_rank_decides():
    roomy, tight = np.array([10.0, 10.0]), np.array([1.0, 20.0])
    assert choose(run_search(lambda n: roomy + n, divisors(32), 10.0), divisors(32)) == 32
    assert choose(run_search(lambda n: roomy + tight * n, divisors(32), 10.0), divisors(32)) == 2


def test_a_search_that_trusted_the_line_alone_would_run_out_of_memory():
    """Control of the bound: flat, then steep."""

    def need(packs):
        return np.array([20.0 + max(30.0, 16.0 * packs)])

    trials = run_search(need, divisors(8), 20.0)
    before, last = trials[1:3]
    assert last.expected(4, before)[0] <= LIMIT * DEVICE < DEVICE < need(4)[0]
    assert [trial.packs for trial in trials] == [0, 1, 2, 3]


def test_the_update_counts_and_does_not_grow():
    trials = run_search(lambda n: np.array([10.0 + n]), divisors(64), 10.0, update=70.0)
    assert choose(trials, divisors(64)) == 32
    assert choose(run_search(lambda n: np.array([10.0 + n]), divisors(64), 10.0, update=79.0), divisors(64)) == 1


def test_one_pack_must_fit_the_device():
    check_smallest(run_search(lambda n: np.array([70.0 * n + 9]), divisors(4), 9.0))  # beyond the limit only
    with pytest.raises(torch.OutOfMemoryError, match=r"one pack takes 90\.0 GiB, rank 1 has 80\.0 GiB"):
        check_smallest(
            run_search(lambda n: GIB * np.array([9.0, 10 + 80 * n]), divisors(4), GIB * 9.0, device=DEVICE * GIB)
        )


def test_what_is_told():
    def told(slope, sizes):
        trials = run_search(lambda n: GIB * (10 + slope * n) * np.ones(2), sizes, GIB * 10.0, device=GIB * DEVICE)
        return describe(trials, sizes)

    assert told(6, divisors(64)) == "micro-batch 8: 58.0 of 73.6 GiB; 16 would need about 106.0"
    assert told(1, divisors(4)) == "micro-batch 4: 14.0 of 73.6 GiB; a step has no more packs for a rank"
    assert told(40, divisors(4)) == "micro-batch 1: 50.0 of 73.6 GiB; 2 would need about 90.0"


def test_heaviest_packs():
    tokens, labels = np.array([5, 9, 9, 2, 7]), np.array([5, 1, 3, 2, 4])
    assert [rows.tolist() for rows in heaviest(tokens, labels, 2)] == [[2, 1], [0, 4]]
    assert [rows.tolist() for rows in heaviest(tokens, labels, 0)] == [[-1], [-1]]
    assert [rows.tolist() for rows in heaviest(tokens[:2], labels[:2], 3)] == [[1, 0, -1], [0, 1, -1]]


def test_a_record_holds_only_for_the_same(tmp_path):
    here = {"devices": {"H100": 8}, "optimizer": ["adamw", "fp32", False]}
    write_record(tmp_path, {"micro_batch": 8, "trials": [], "holds_for": here})
    assert read_record(tmp_path, here) == read_record(tmp_path) == 8
    assert read_record(tmp_path, {**here, "devices": {"H100": 4}}) is None
    (path,) = tmp_path.iterdir()
    for broken in ("", "[]", "{", json.dumps({"holds_for": here}), json.dumps({"holds_for": here, "micro_batch": "x"})):
        path.write_text(broken)
        assert read_record(tmp_path, here) is None
    path.unlink()
    assert read_record(tmp_path, here) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_peak_of_this_process():
    device, size = torch.device("cpu"), 2**28
    peak_memory.begin(device)
    before = peak_memory.peak(device)
    kept = torch.ones(size // 4)
    del kept
    assert size * 0.9 < peak_memory.peak(device) - before < size * 1.2
    peak_memory.begin(device)
    assert peak_memory.peak(device) - before < size * 0.5, "control: the peak is counted anew"
    assert peak_memory.in_use(device) < peak_memory.capacity(device, 4) < peak_memory.capacity(device, 1)
    assert "CPU" in peak_memory.describe(device)
