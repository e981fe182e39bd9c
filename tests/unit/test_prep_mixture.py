"""Weights, duplicates and the held-out split: seeded, order-free, and equal rows never part."""

import numpy as np
import pytest

from data_prep.dedup import first_occurrences
from data_prep.formats import Example
from data_prep.mixture import choose_heldout, copies, keys_to_array, seeded_hash, text_key


def keys(count: int) -> np.ndarray:
    return keys_to_array([text_key(Example("p", str(number))) for number in range(count)])


def test_keys_tell_prompt_from_response() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    assert len({text_key(Example(*pair)) for pair in pairs}) == len(pairs)
    assert text_key(Example("ab", "c")) == text_key(Example("ab", "c"))


@pytest.mark.parametrize("purpose", ["weight", "heldout"])
def test_hashes_are_uniform_and_depend_on_seed_and_purpose(purpose: str) -> None:
    hashes = seeded_hash(keys(20_000), 3, purpose)
    counts = np.histogram(hashes.astype(np.float64) / 2.0**64, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)
    others = [seeded_hash(keys(20_000), 4, purpose), seeded_hash(keys(20_000), 3, "other")]
    assert all(abs(np.corrcoef(hashes.astype(float), other.astype(float))[0, 1]) < 0.03 for other in others)


def test_whole_weights_repeat_and_fractions_sample() -> None:
    rows = keys(10_000)
    assert set(copies(rows, 2.0, 0).tolist()) == {2}
    quarter = copies(rows, 0.25, 0)
    assert set(quarter.tolist()) == {0, 1}
    assert abs(int(quarter.sum()) - 2500) < 5 * np.sqrt(10_000 * 0.25 * 0.75)
    assert (copies(rows, 2.25, 0) == 2 + quarter).all()
    assert (copies(rows, 0.25, 1) != quarter).any()


def test_a_larger_sample_holds_the_smaller_and_order_does_not_matter() -> None:
    rows = keys(1000)
    assert (copies(rows, 0.5, 0) >= copies(rows, 0.25, 0)).all()
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (copies(rows[shuffled], 0.5, 0) == copies(rows, 0.5, 0)[shuffled]).all()
    assert (choose_heldout(rows[shuffled], 37, 0) == choose_heldout(rows, 37, 0)[shuffled]).all()


@pytest.mark.parametrize("wanted", [1, 37, 999])
def test_a_number_of_heldout_rows_is_exact(wanted: int) -> None:
    assert int(choose_heldout(keys(1000), wanted, 0).sum()) == wanted


@pytest.mark.parametrize("heldout", [0.3, 50])
def test_equal_rows_are_on_one_side(heldout: float) -> None:
    rows = keys(400)[np.random.default_rng(0).integers(0, 400, size=2000)]
    chosen = choose_heldout(rows, heldout, 0)
    sides: dict[bytes, set[bool]] = {}
    for row, side in zip(rows, chosen.tolist(), strict=True):
        sides.setdefault(row.tobytes(), set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < chosen.sum() < 2000
    assert heldout < 1 or chosen.sum() <= heldout


def test_the_first_of_equal_rows_is_kept() -> None:
    rows = keys(3)[[2, 0, 2, 1, 0, 0]]
    assert first_occurrences(rows).tolist() == [True, True, False, True, False, False]
    assert first_occurrences(keys(1)).tolist() == [True]
