"""What the picture of a schedule shows, as data. Run: pytest tests/unit/test_schedule_plot.py"""

import numpy as np
import pytest

from sft.config import ScheduleSection
from sft.lr_groups import factor_at
from sft.png import save_png
from sft.schedule import lr_at
from sft.schedule_plot import POINTS, Marks, curve, draw, first_step, share_of

NAMES = ["cosine", "linear", "constant", "cosine_restarts"]
UNFROZEN = ((0.5, 0.25), (0.9, 0.0))


def schedule(name="cosine", **more):
    return ScheduleSection(name=name, **({"cycles": 3} if name == "cosine_restarts" else {}), **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [1, 3, 700])
def test_a_short_run_is_drawn_step_by_step(name, total):
    drawn = curve(schedule(name), total, 2e-5, UNFROZEN)
    assert drawn.steps == list(range(1, total + 1))
    expected = [lr_at(step, total, 2e-5, schedule(name)) * factor_at(step, total, UNFROZEN) for step in drawn.steps]
    assert drawn.rates == expected


def straight(drawn, total):
    """The learning rate of every step as the picture's lines have it."""
    return np.interp(np.arange(1, total + 1), drawn.steps, drawn.rates)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_run_is_drawn_as_it_is(name):
    total = 1_000_000
    settings = schedule(name, warmup=12_345)
    drawn = curve(settings, total, 1.0, UNFROZEN)
    assert len(drawn.steps) < POINTS + 30
    true = np.array([lr_at(step, total, 1.0, settings) for step in range(1, total + 1, 97)])
    true *= [factor_at(step, total, UNFROZEN) for step in range(1, total + 1, 97)]
    assert np.abs(straight(drawn, total)[::97] - true).max() < 1e-4
    coarse = curve(settings, total, 1.0, ())  # control: without the step at which parameters begin to move
    without = np.interp(np.arange(1, total + 1), coarse.steps[::50], coarse.rates[::50])
    assert np.abs(without[::97] - true).max() > 0.1


def test_when_parameters_begin_and_their_share():
    assert first_step(UNFROZEN, 1000) == 251
    assert share_of(UNFROZEN) == 0.45
    assert first_step((), 1000) == 1
    assert share_of(()) == 1
    assert factor_at(250, 1000, UNFROZEN) == 0
    assert factor_at(251, 1000, UNFROZEN) == 0.45


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [
        ((4,), 10, [4, 8, 10]),
        ((5,), 10, [5, 10]),
        ((500,), 3, [3]),
        ((4, 6), 13, [4, 6, 8, 12, 13]),
        ((4, 6), 12, [4, 6, 8, 12]),
    ],
)
def test_marks_by_hand(every, total, steps):
    marks = Marks("save", every, total)
    assert marks.steps == steps
    assert marks.count == len(steps)


@pytest.mark.parametrize("total", [1, 3, 1_000_000])
def test_the_picture_has_every_curve_and_row(tmp_path, total):
    factors = [(), *(((0.9**depth, 0.0),) for depth in range(1, 20))]
    curves = [curve(schedule(), total, 2e-5, one) for one in factors]
    marks = [Marks("checkpoint", (500,), total), Marks("held-out loss", (1,), total)]
    figure = draw(schedule(), 2e-5, curves, marks)
    rates, rows = figure.axes
    assert [list(line.get_ydata()) for line in rates.get_lines()[: len(curves)]] == [one.rates for one in curves]
    assert rows.get_xlim()[0] < 1 <= total < rows.get_xlim()[1]
    assert [label.get_text() for label in rows.get_yticklabels()] == [
        f"held-out loss ({total:,})", f"checkpoint ({marks[0].count:,})",
    ]  # fmt: skip
    assert len(rates.get_legend().get_texts()) == 2
    save_png(figure, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]


@pytest.mark.parametrize("warmup", [4, 100_000])
def test_a_warm_up_longer_than_the_run_is_drawn_without_its_end(tmp_path, warmup):
    settings = schedule().model_copy(update={"warmup": float(warmup)})
    figure = draw(settings, 2e-5, [curve(settings, 6, 2e-5, ())], [Marks("checkpoint", (500,), 6)])
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["warm-up ends: step 4"] * (warmup < 6)
    save_png(figure, tmp_path / "a.png")  # matplotlib cannot render a text that lies so far outside
    assert (tmp_path / "a.png").stat().st_size > 0
