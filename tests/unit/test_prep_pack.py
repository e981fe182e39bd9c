"""Packing: nothing lost, nothing twice, nothing over seq_len, and never more packs than best-fit decreasing."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.pack import Packs, _exact_fill, pack


@st.composite
def lengths_and_seq_len(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    seq_len = draw(st.integers(8, 300))
    return np.array(draw(st.lists(st.integers(1, seq_len), max_size=200)), dtype=np.int32), seq_len


def check(packs: Packs, lengths: np.ndarray, seq_len: int) -> None:
    assert sorted(packs.order.tolist()) == list(range(len(lengths))), "every document once"
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(lengths)
    bins = bins_of(packs)
    assert all(1 <= sum(lengths[bin]) <= seq_len for bin in bins), "no empty pack, none over seq_len"
    assert all(bin == sorted(bin) for bin in bins), "document order within a pack"
    assert [bin[0] for bin in bins] == sorted(bin[0] for bin in bins), "packs by first document"


def bins_of(packs: Packs) -> list[list[int]]:
    return [part.tolist() for part in np.split(packs.order, packs.offsets[1:-1])] if len(packs) else []


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    """Packs of the textbook loop, one document at a time; TRL's pack_dataset(strategy="bfd") makes the same choices."""
    rooms: list[int] = []
    num_packs = 0
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            num_packs += 1
            room = seq_len
        else:
            room = rooms.pop(at)
        if room > length:
            insort(rooms, room - length)
    return num_packs


def lower_bound(lengths: np.ndarray, seq_len: int) -> int:
    return -(-int(lengths.sum()) // seq_len)


def instruction_lengths(count: int, seq_len: int, seed: int) -> np.ndarray:
    """Most are short, a few very long, as in Alpaca."""
    return np.random.default_rng(seed).lognormal(4.6, 0.8, size=count).clip(2, seq_len).astype(np.int32)


@settings(deadline=None, max_examples=200)
@given(lengths_and_seq_len())
@example((np.array([], dtype=np.int32), 8))
@example((np.array([8], dtype=np.int32), 8))
@example((np.array([1], dtype=np.int32), 8))
def test_invariants_and_no_more_packs_than_best_fit(case: tuple[np.ndarray, int]) -> None:
    lengths, seq_len = case
    packs = pack(lengths, seq_len)
    check(packs, lengths, seq_len)
    assert lower_bound(lengths, seq_len) <= len(packs) <= best_fit_decreasing(lengths, seq_len)


@pytest.mark.parametrize("seq_len", [1000, 2047, 2048, 4096, 8193])
@pytest.mark.parametrize("seed", [0, 1])
def test_instruction_lengths_reach_the_lower_bound(seq_len: int, seed: int) -> None:
    lengths = instruction_lengths(20_000, seq_len, seed)
    packs = pack(lengths, seq_len)
    check(packs, lengths, seq_len)
    assert len(packs) == lower_bound(lengths, seq_len)
    assert seq_len > 2048 or lengths.sum() / (len(packs) * seq_len) >= 0.999


@pytest.mark.parametrize("seq_len", [64, 129, 300])
def test_no_more_packs_than_best_fit_where_many_documents_are_long(seq_len: int) -> None:
    lengths = instruction_lengths(3000, seq_len, 0)
    packs = pack(lengths, seq_len)
    check(packs, lengths, seq_len)
    assert len(packs) <= best_fit_decreasing(lengths, seq_len)


def test_control_best_fit_alone_needs_more_packs_for_some_lengths() -> None:
    """The bound is not one that any packing reaches: here best-fit decreasing misses it."""
    lengths = np.array([4, 3, 2] * 40, dtype=np.int32)
    assert lower_bound(lengths, 9) == len(pack(lengths, 9)) == 40
    assert best_fit_decreasing(lengths, 9) == 44


def test_control_exact_fill_alone_is_not_always_better() -> None:
    """Lengths for which filling packs one by one wastes some, so that best-fit decreasing has to be tried, too."""
    lengths = np.array([15, 10, 10, 9, 9, 7, 5, 3], dtype=np.int32)
    by_length = np.arange(8, dtype=np.int32)
    assert _exact_fill(by_length, np.bincount(lengths), 23)[1] == 4
    assert best_fit_decreasing(lengths, 23) == len(pack(lengths, 23)) == 3


@pytest.mark.parametrize("seq_len", [1000, 8193])
def test_the_same_lengths_give_the_same_packs(seq_len: int) -> None:
    lengths = instruction_lengths(3000, seq_len, 0)
    one, other, reverse = pack(lengths, seq_len), pack(lengths.copy(), seq_len), pack(lengths[::-1].copy(), seq_len)
    assert one.order.tolist() == other.order.tolist()
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.order.dtype == np.int32
    assert reverse.order.tolist() != one.order.tolist(), "control: another order of documents is another packing"
    assert len(reverse) == len(one)


@pytest.mark.parametrize("length", [1, 7, 500, 501, 1000])
def test_equal_lengths(length: int) -> None:
    lengths = np.full(999, length, dtype=np.int32)
    packs = pack(lengths, 1000)
    check(packs, lengths, 1000)
    assert len(packs) == -(-999 // (1000 // length))


@pytest.mark.parametrize(
    ("lengths", "seq_len", "num_packs"),
    [
        ([1] * 1000, 9, 112),  # 9 in each
        ([9] * 50, 9, 50),
        ([5] * 50, 9, 50),  # one more than half: never two
        ([6, 3] * 40, 9, 40),
        ([4, 3, 2] * 40, 9, 40),
        ([1], 131072, 1),
        ([131072, 1, 131071], 131072, 2),
    ],
)
def test_worst_cases(lengths: list[int], seq_len: int, num_packs: int) -> None:
    array = np.array(lengths, dtype=np.int32)
    packs = pack(array, seq_len)
    check(packs, array, seq_len)
    assert len(packs) == num_packs


def test_a_large_set_of_every_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 2050, size=200_000).astype(np.int32)
    packs = pack(lengths, 2049)
    check(packs, lengths, 2049)
    assert lengths.sum() / (len(packs) * 2049) > 0.995


@pytest.mark.parametrize("bad", [0, -1, 10])
def test_a_length_out_of_range_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.9"):
        pack(np.array([3, bad], dtype=np.int32), 9)


@pytest.mark.parametrize(
    "broken",
    [
        Packs(np.array([0, 1]), np.array([0, 1, 2])),  # document 2 lost
        Packs(np.array([0, 1, 1]), np.array([0, 1, 2, 3])),  # document 1 twice
        Packs(np.array([0, 1, 2]), np.array([0, 3])),  # too long
        Packs(np.array([1, 0, 2]), np.array([0, 2, 3])),  # out of order
    ],
)
def test_control_the_checks_catch_broken_packs(broken: Packs) -> None:
    lengths = np.array([4, 4, 4], dtype=np.int32)
    check(pack(lengths, 8), lengths, 8)
    with pytest.raises(AssertionError):
        check(broken, lengths, 8)
