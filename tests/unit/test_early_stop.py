"""When a run stops early, from held-out losses by hand. Run: pytest tests/unit/test_early_stop.py"""

import math

import pytest

from sft.config import EarlyStopSection
from sft.early_stop import stalled


def verdict(losses, every=10, **rule):
    """Of losses measured after steps 10, 20, ..."""
    measured = [(10 * (place + 1), loss) for place, loss in enumerate(losses)]
    return stalled(measured, every, EarlyStopSection(**rule))


def test_without_patience_never():
    assert verdict([1.0, 2.0, 3.0, 4.0]) is None


def test_a_falling_loss_goes_on():
    assert verdict([3.0, 2.0, 1.0, 0.9], patience=1) is None


def test_it_stops_after_so_many_measurements_without_a_new_lowest():
    found = verdict([3.0, 2.0, 2.1, 2.05], patience=2)
    assert (found.step, found.best_step, found.best_loss, found.measurements) == (40, 20, 2.0, 2)
    assert "2 measurements up to step 40; the lowest was 2.0000 after step 20" in str(found)
    assert verdict([3.0, 2.0, 2.1], patience=2) is None


def test_a_new_lowest_begins_anew():
    assert verdict([3.0, 3.1, 2.9, 3.0, 2.8], patience=2) is None


def test_it_is_the_first_moment():
    """A longer history of the same run must give the same verdict: a resume looks at all of it."""
    losses = [2.0, 2.1, 2.2, 1.0, 0.5]
    assert verdict(losses, patience=2).step == verdict(losses[:3], patience=2).step == 30


def test_a_new_lowest_must_be_lower_by_min_delta():
    assert verdict([2.0, 1.95, 1.91], patience=2, min_delta=0.1).best_step == 10
    assert verdict([2.0, 1.95, 1.89], patience=2, min_delta=0.1) is None


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_what_was_not_measured_does_not_count(nothing):
    assert verdict([2.0, nothing, 2.1], patience=2) is None
    assert verdict([2.0, nothing, 2.1, 2.1], patience=2).step == 40


def test_measurements_beside_the_beat_do_not_count():
    """Saving measures, too: how often a run is saved must not show."""
    assert stalled([(10, 2.0), (15, 2.1), (20, 2.1)], 10, EarlyStopSection(patience=2)) is None
    assert stalled([(10, 2.0), (15, 2.1), (20, 2.1)], 5, EarlyStopSection(patience=2)).step == 20
