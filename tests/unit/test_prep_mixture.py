"""Weights, balance, replay and the held-out split: seeded, order-free, and equal rows never part."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.mixture import (
    balanced,
    choose_heldout,
    copies,
    keys_to_array,
    replay_copies,
    seeded_hash,
    text_key,
)


def keys(count: int, first: int = 0) -> np.ndarray:
    return keys_to_array([text_key(f"row {number}") for number in range(first, first + count)])


@pytest.mark.parametrize(
    "other",
    ["Caf\u00e9 au lait", "Cafe\u0301 au lait", " Café  au\tlait\n", "Café\r\nau\r\nlait"],
)
def test_unicode_form_and_ascii_white_space_do_not_part_texts(other: str) -> None:
    assert text_key(other) == text_key("Café au lait")


@pytest.mark.parametrize(
    "other",
    [
        "Cafe au lait",
        "Caféaulait",
        "café au lait",
        "Café au\u3000lait",
        "Café au lait.",
        "Café au\u200blait",
        "au lait Café",
        "",
    ],
)
def test_control_another_text_has_another_key(other: str) -> None:
    assert text_key(other) != text_key("Café au lait")
    assert len(text_key(other)) == 16


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_unicode_form_has_one_key(text: str) -> None:
    assert (
        text_key(unicodedata.normalize("NFD", text)) == text_key(unicodedata.normalize("NFC", text)) == text_key(text)
    )


def test_no_keys_are_an_empty_array() -> None:
    assert keys_to_array([]).shape == (0, 2)
    assert keys_to_array([text_key("a"), text_key("b")]).shape == (2, 2)


@pytest.mark.parametrize("purpose", ["weight", "heldout"])
def test_hashes_are_uniform_and_depend_on_seed_and_purpose(purpose: str) -> None:
    hashes = seeded_hash(keys(20_000), 3, purpose)
    counts = np.histogram(hashes.astype(np.float64) / 2.0**64, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)
    others = [seeded_hash(keys(20_000), 4, purpose), seeded_hash(keys(20_000), 3, "other")]
    assert all(abs(np.corrcoef(hashes.astype(float), other.astype(float))[0, 1]) < 0.03 for other in others)
    assert seeded_hash(keys(9), 3, purpose).tolist() == hashes[:9].tolist()


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
    values, lengths = np.array(["a", "b", "b", "c"] * 250), np.arange(1, 1001, dtype=np.int32)
    assert (balanced(values[shuffled], rows[shuffled], 0) == balanced(values, rows, 0)[shuffled]).all()
    found = replay_copies(rows[shuffled], lengths[shuffled], 9000, 0)
    assert (found == replay_copies(rows, lengths, 9000, 0)[shuffled]).all()


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


def test_a_fraction_held_out_is_stable_when_rows_are_added() -> None:
    before = choose_heldout(keys(1000), 0.1, 0)
    assert abs(int(before.sum()) - 100) < 5 * np.sqrt(90)
    after = choose_heldout(np.concatenate([keys(500, first=5000), keys(1000)]), 0.1, 0)
    assert (after[500:] == before).all()
    assert (choose_heldout(keys(1000), 0.1, 1) != before).any(), "control: the seed does move rows"


@settings(deadline=None)
@given(values=st.lists(st.sampled_from("abcd"), max_size=60))
def test_balance_makes_every_value_as_frequent_as_the_rarest(values: list[str]) -> None:
    array = np.array(values, dtype=np.str_)
    stays = balanced(array, keys(len(values)), 0)
    rarest = min((values.count(value) for value in set(values)), default=0)
    assert all(int(stays[array == value].sum()) == rarest for value in set(values))


def test_balance_keeps_rows_by_their_hash() -> None:
    values, rows = np.array(["a"] * 900 + ["b"] * 100), keys(1000)
    stays = balanced(values, rows, 0)
    hashes = seeded_hash(rows, 0, "balance")[:900]
    assert hashes[stays[:900]].max() < hashes[~stays[:900]].min()
    assert stays[100:900].any(), "not the first of them"
    assert (balanced(values, rows, 1) != stays).any()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=50),
    wanted=st.integers(1, 40_000),
    seed=st.integers(0, 3),
)
def test_replay_is_within_half_a_document_of_what_is_wanted(lengths: list[int], wanted: int, seed: int) -> None:
    array = np.array(lengths, dtype=np.int32)
    times = replay_copies(keys(len(lengths)), array, wanted, seed)
    assert times.max() - times.min() <= 1, "no row is repeated before all are used"
    assert times.max() >= 1
    off = abs(int((array * times).sum()) - wanted)
    assert off <= (max(lengths) + 1) // 2 or times.sum() == 1


def test_replay_samples_by_hash_and_repeats_when_it_must() -> None:
    rows, lengths = keys(1000), np.full(1000, 10, dtype=np.int32)
    some, more = replay_copies(rows, lengths, 2000, 0), replay_copies(rows, lengths, 4000, 0)
    assert (some.sum(), more.sum()) == (200, 400)
    assert (more >= some).all()
    assert set(replay_copies(rows, lengths, 25_000, 0).tolist()) == {2, 3}
    assert set(replay_copies(rows, lengths, 20_000, 0).tolist()) == {2}
    assert replay_copies(rows, lengths, 0, 0).sum() == 1, "at least one row"
    assert (replay_copies(rows, lengths, 2000, 1) != some).any()
