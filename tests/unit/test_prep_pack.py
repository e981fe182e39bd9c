"""Packing: nothing lost, nothing twice, nothing over seq_len, and as full as the textbook algorithm."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.pack import Packs, pack


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


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> list[int]:
    """The textbook loop, one document at a time: the tokens in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(seq_len - length)
    return sorted(seq_len - room for room in rooms)


def first_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for index, room in enumerate(rooms):
            if room >= length:
                rooms[index] -= length
                break
        else:
            rooms.append(seq_len - length)
    return len(rooms)


@settings(deadline=None)
@given(lengths_and_seq_len())
@example((np.array([], dtype=np.int32), 8))
@example((np.array([8], dtype=np.int32), 8))
def test_invariants_and_textbook_equality(case: tuple[np.ndarray, int]) -> None:
    lengths, seq_len = case
    packs = pack(lengths, seq_len)
    check(packs, lengths, seq_len)
    assert sorted(int(sum(lengths[bin])) for bin in bins_of(packs)) == best_fit_decreasing(lengths, seq_len)


@pytest.mark.parametrize("seq_len", [17, 1000, 2047, 2048, 4097, 8193])
@pytest.mark.parametrize("seed", [0, 1])
def test_not_worse_than_first_fit_on_instruction_lengths(seq_len: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(5, 0.8, size=1500).clip(2, seq_len).astype(np.int32)
    packs = pack(lengths, seq_len)
    check(packs, lengths, seq_len)
    assert len(packs) <= first_fit_decreasing(lengths, seq_len)


@pytest.mark.parametrize(
    ("lengths", "seq_len", "num_packs"),
    [
        ([1] * 1000, 9, 112),  # 9 in each
        ([9] * 50, 9, 50),
        ([5] * 50, 9, 50),  # one more than half: never two
        ([6, 3] * 40, 9, 40),
        ([4, 3, 2] * 40, 9, 44),  # 40 is possible; 4 + 4 leaves a gap that nothing fits, within the 11/9 bound
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
