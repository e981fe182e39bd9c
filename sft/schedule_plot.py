"""The learning rate of a whole run as a picture, with the steps at which something else happens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.config import ScheduleSection
from sft.lr_groups import Factors, factor_at
from sft.png import BLUE, GREY, new_figure
from sft.schedule import as_steps, lr_at, warmup_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2000
"""Of a curve: more than the picture has columns for it."""
MOST_CYCLES = 200
"""Whose corners are drawn exactly; more are a block of colour in any case."""
MOST_CURVES_NAMED = 8
MOST_MARKS = 120
"""Of a row; more would be a solid line, which is then drawn."""
FEW_STEPS = 50
"""Each of which is a dot."""


@dataclass(frozen=True)
class Marks:
    """What happens at multiples of some numbers of steps, and at the last step."""

    name: str
    every: tuple[int, ...]
    total_steps: int

    @property
    def count(self) -> int:
        """How often it happens."""
        first, *rest = self.every
        count = self.total_steps // first
        for other in rest:
            count += self.total_steps // other - self.total_steps // math.lcm(first, other)
        return count + all(self.total_steps % every for every in self.every)

    @property
    def steps(self) -> list[int]:
        """When it happens."""
        multiples = {step for every in self.every for step in range(every, self.total_steps + 1, every)}
        return sorted(multiples | {self.total_steps})


@dataclass(frozen=True)
class Curve:
    """Learning rates of the parameters that have the same factors."""

    factors: Factors
    steps: list[int]
    """From 1, rising; a straight line between two of them is right to the eye."""
    rates: list[float]


def curve(schedule: ScheduleSection, total_steps: int, peak_lr: float, factors: Factors) -> Curve:
    """The learning rate at up to about POINTS steps, at every corner exactly."""
    steps = _steps_to_draw(schedule, total_steps, factors)
    rates = [lr_at(step, total_steps, peak_lr, schedule) * factor_at(step, total_steps, factors) for step in steps]
    return Curve(factors, steps, rates)


def _steps_to_draw(schedule: ScheduleSection, total_steps: int, factors: Factors) -> list[int]:
    warmup = warmup_steps(schedule, total_steps)
    cycles = min(schedule.cycles, MOST_CYCLES)
    bounds = [warmup + (total_steps - warmup) * cycle // schedule.cycles for cycle in range(cycles + 1)]
    corners = [warmup, *bounds, *(as_steps(start, total_steps) for _, start in factors)]
    near = {step + shift for step in corners for shift in (-1, 0, 1)}
    even = {round(step) for step in np.linspace(1, total_steps, min(total_steps, POINTS))}
    return sorted(step for step in near | even if 1 <= step <= total_steps)


def share_of(factors: Factors) -> float:
    """What the learning rate of these parameters is multiplied with once all of them have begun."""
    return math.prod(factor for factor, _ in factors)


def first_step(factors: Factors, total_steps: int) -> int:
    """The first step that changes these parameters."""
    return 1 + max((as_steps(start, total_steps) for _, start in factors), default=0)


def draw(schedule: ScheduleSection, peak_lr: float, curves: Sequence[Curve], marks: Sequence[Marks]) -> "Figure":
    """Learning rates over steps, the end of the warm-up, and below, a row for each of `marks`."""
    total_steps = marks[0].total_steps
    figure = new_figure(9, 4.4 + 0.3 * len(marks))
    axes, rows = figure.subplots(2, 1, sharex=True, height_ratios=[4, 0.3 * len(marks)])
    axes.spines[["top", "right"]].set_visible(False)
    _draw_curves(axes, curves, total_steps)
    if 0 < (warmup := warmup_steps(schedule, total_steps)) <= total_steps:
        axes.axvline(warmup, color=GREY, linewidth=0.9, linestyle=":")
        axes.annotate(
            f" warm-up ends: step {warmup:,}",
            (warmup, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=GREY,
        )
    axes.set_ylim(0, 1.06 * max(peak_lr, *(max(one.rates) for one in curves)))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
    axes.set_ylabel("learning rate")
    axes.set_title(f"{schedule.name}, {total_steps:,} steps, optim.lr {peak_lr:g}", fontsize=10, loc="left")
    _draw_marks(rows, marks)
    margin = max(0.5, 0.01 * total_steps)
    rows.set_xlim(1 - margin, total_steps + margin)
    rows.xaxis.get_major_locator().set_params(integer=True)
    rows.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    rows.set_xlabel("optimizer step")
    return figure


def _draw_curves(axes: Any, curves: Sequence[Curve], total_steps: int) -> None:
    """Every curve; where they are many, only the first and the last are named."""
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(curves), 2)))
    marker = "o" if total_steps <= FEW_STEPS else ""
    for place, one in enumerate(curves):
        start = first_step(one.factors, total_steps)
        label = f"× {share_of(one.factors):.3g}" + (f" from step {start:,}" if start > 1 else "")
        named = len(curves) <= MOST_CURVES_NAMED or place in (0, len(curves) - 1)
        color = BLUE if len(curves) == 1 else shades[place]
        axes.plot(
            one.steps,
            one.rates,
            color=color,
            linewidth=1.6,
            marker=marker,
            markersize=3.5,
            label=label if named else None,
        )
    if len(curves) > 1:
        between = len(curves) - 2
        title = f"optim.lr ({between} more between)" if len(curves) > MOST_CURVES_NAMED else "optim.lr"
        axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, loc="upper right")


def _draw_marks(rows: Any, marks: Sequence[Marks]) -> None:
    rows.spines[["top", "right", "left"]].set_visible(False)
    for height, row in enumerate(reversed(marks)):
        if row.count > MOST_MARKS:
            rows.plot([min(row.every), row.total_steps], [height, height], color=GREY, linewidth=3)
        else:
            rows.plot(row.steps, [height] * row.count, "|", color=GREY, markersize=9, markeredgewidth=1.2)
    rows.set_yticks(range(len(marks)), [f"{row.name} ({row.count:,})" for row in reversed(marks)], fontsize=8)
    rows.tick_params(axis="y", length=0)
    rows.set_ylim(-0.7, len(marks) - 0.3)
