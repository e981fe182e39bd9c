"""When a run stops early, from held-out losses by hand. Run: pytest tests/unit/test_early_stop.py"""

import math
from types import SimpleNamespace

import pytest

from sft.checkpoint import step_of
from sft.config import EarlyStopSection, RunConfig
from sft.early_stop import Stalled, stalled
from sft.train import choose_checkpoint
from tests import saved


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
    assert verdict([2.0, 2.0, 2.0], patience=2).best_step == 10, "as low is not lower"
    assert verdict([2.0, 1.5, 1.0], patience=1, min_delta=0.5).best_step == 10


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_what_was_not_measured_does_not_count(nothing):
    assert verdict([2.0, nothing, 2.1], patience=2) is None
    assert verdict([2.0, nothing, 2.1, 2.1], patience=2).step == 40


def test_measurements_beside_the_beat_do_not_count():
    """Saving measures, too: how often a run is saved must not show."""
    assert stalled([(10, 2.0), (15, 2.1), (20, 2.1)], 10, EarlyStopSection(patience=2)) is None
    assert stalled([(10, 2.0), (15, 2.1), (20, 2.1)], 5, EarlyStopSection(patience=2)).step == 20


@pytest.fixture
def choose(tmp_path):
    """The step that is exported of a run whose checkpoints have these held-out losses."""

    def of(losses, patience=3, stalled=None):
        for step, loss in losses.items():
            saved.save(tmp_path / "checkpoints", step, loss)
        config = RunConfig(
            model={"path": "m"}, data={"train": "d", "heldout": "h"}, out=str(tmp_path),
            train={"early_stop": {"patience": patience}},
        )  # fmt: skip
        return step_of(choose_checkpoint(config, SimpleNamespace(out=tmp_path, step=max(losses), stalled=stalled)))

    return of


def test_the_best_checkpoint_is_exported_where_a_run_may_stop_early(choose, capsys):
    assert choose({2: 1.5, 4: 1.2, 6: 1.3}, stalled=Stalled(6, 4, 1.2, 1)) == 4
    assert choose({2: 1.5, 4: 1.2, 6: 1.3}) == 4, "it came to its last step"
    assert choose({2: 1.5, 4: 1.2, 6: 1.3}, patience=None) == 6, "control: it may not"
    assert capsys.readouterr().out == ""


def test_a_best_checkpoint_that_is_gone_is_told(choose, capsys):
    assert choose({4: 1.3, 6: 1.35}, stalled=Stalled(6, 2, 1.2, 2)) == 4
    said = capsys.readouterr().out
    assert said.startswith("WARNING: ")
    assert "no checkpoint of step 2; the best there is, of step 4, is exported" in said
