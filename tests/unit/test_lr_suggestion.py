"""The learning rate that a sweep suggests, on invented curves. Run: pytest tests/unit/test_lr_suggestion.py"""

import math

import numpy as np
import pytest

from sft.lr_finder import STEPS, lr_of
from sft.lr_suggestion import BELOW_LOWEST, FEWEST_STEPS, smooth, suggest

LRS = [lr_of(step) for step in range(STEPS)]


def falling(middle: float, rise: float = math.inf, noise: float = 0.0, seed: int = 0) -> list[float]:
    """A loss that falls from 3 to 1 around the learning rate `middle`, and grows tenfold per decade above `rise`."""
    random = np.random.RandomState(seed)
    return [3 - 2 / (1 + (middle / lr) ** 2) + (lr / rise) * (rise < math.inf) + noise * random.randn() for lr in LRS]


def test_the_sweep_is_even_in_its_ratios_and_includes_both_ends():
    assert LRS[0] == pytest.approx(1e-8)
    assert LRS[-1] == pytest.approx(1e-1)
    assert np.diff(np.log10(LRS)) == pytest.approx(7 / 99)


def test_smoothing_by_hand_does_not_begin_at_zero():
    assert smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.8 * 0.2 * 1 + 0.2 * 2) / 0.36])


@pytest.mark.parametrize("middle", [1e-6, 1e-5, 1e-4])
def test_the_steepest_place_is_found(middle):
    found = suggest(LRS, falling(middle, rise=1e4 * middle))
    assert found.steepest_lr == pytest.approx(middle, rel=0.25)
    assert found.lr == pytest.approx(middle, rel=0.25)
    assert found.lowest_lr > BELOW_LOWEST * middle


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_it_by_less_than_half_a_decade(seed):
    found = suggest(LRS, falling(1e-5, rise=1e-2, noise=0.1, seed=seed))
    assert abs(math.log10(found.lr / 1e-5)) < 0.5


def test_close_to_the_lowest_loss_a_tenth_of_it_is_suggested():
    losses = falling(1e-5, rise=2e-5)
    found = suggest(LRS, losses)
    lowest = LRS[int(np.argmin(losses)) - 1]  # whose update the loss of the next step shows
    assert found.lowest_lr == pytest.approx(lowest, rel=0.3)
    assert found.lr == pytest.approx(found.lowest_lr / 10, rel=0.05)
    assert found.lr < 0.5 * found.steepest_lr


def test_a_flat_curve_suggests_nothing_and_says_why():
    found = suggest(LRS, [2.5] * STEPS)
    assert found.lr is None
    assert "does not clearly fall" in found.reason
    assert "2.5000" in found.reason


def test_a_curve_that_only_rises_suggests_nothing():
    found = suggest(LRS, [2.0 + lr / 1e-4 for lr in LRS])
    assert found.lr is None
    assert "does not clearly fall" in found.reason


def test_noise_alone_suggests_nothing_and_a_fall_in_it_does():
    falls = [suggest(LRS, list(2 + 0.3 * np.random.RandomState(seed).randn(STEPS))).lr for seed in range(500)]
    assert falls == [None] * 500
    assert suggest(LRS, falling(1e-5, noise=0.3)).lr is not None


def test_a_sweep_that_ended_at_once_suggests_nothing():
    assert "ended after 0 steps" in suggest([], []).reason
    short = FEWEST_STEPS - 1
    assert f"ended after {short} steps" in suggest(LRS[:short], falling(1e-7)[:short]).reason
