"""Learning-rate schedules against hand-computed values. Run: pytest tests/unit/test_schedule.py"""

import pytest

from sft.config import ScheduleSection
from sft.schedule import lr_at, warmup_steps


def lr(step, **options):
    return lr_at(step, 100, 1.0, ScheduleSection(**options))


def test_warmup_is_linear_and_ends_at_the_peak():
    assert lr(1, warmup=10) == pytest.approx(0.1)
    assert lr(5, warmup=10) == pytest.approx(0.5)
    assert lr(10, warmup=10) == 1.0


def test_warmup_below_one_is_a_fraction():
    assert warmup_steps(ScheduleSection(warmup=0.03), 100) == 3
    assert warmup_steps(ScheduleSection(warmup=0.03), 10) == 1
    assert warmup_steps(ScheduleSection(warmup=7), 100) == 7
    assert warmup_steps(ScheduleSection(warmup=0.07), 100) == 7
    with pytest.raises(ValueError, match="whole number of steps"):
        ScheduleSection(warmup=1.5)


@pytest.mark.parametrize(
    ("name", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)  # halfway between peak 1 and floor 0.1
def test_middle_and_end(name, middle):
    options = {"name": name, "warmup": 0, "min_lr_ratio": 0.1}
    assert lr(50, **options) == pytest.approx(middle)
    assert lr(100, **options) == pytest.approx(1.0 if name == "constant" else 0.1)


def test_cosine_quarter():
    assert lr(25, name="cosine", warmup=0, min_lr_ratio=0.0) == pytest.approx(0.5 * (1 + 2**-0.5))


def test_restarts_return_to_the_peak_and_end_on_the_floor():
    options = {"name": "cosine_restarts", "warmup": 0, "min_lr_ratio": 0.2, "cycles": 2}
    assert lr(25, **options) == pytest.approx(0.6)
    assert lr(50, **options) == pytest.approx(1.0)
    assert lr(75, **options) == pytest.approx(0.6)
    assert lr(100, **options) == pytest.approx(0.2)


def test_the_floor_holds_beyond_the_end():
    assert lr(150, name="cosine", min_lr_ratio=0.1) == pytest.approx(0.1)
