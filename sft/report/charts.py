"""A curve over optimizer steps as markup: shapes stretch with the page, labels stay as large as its text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from sft.html_page.axis import Axis
from sft.html_page.document import minus
from sft.report.curves import LogAxis, StepAxis, ceiling, smooth, thin, window

WIDTH, HEIGHT = 2000, 1000
"""Units of the shapes' own coordinates."""


@dataclass(frozen=True)
class Line:
    """One curve, or a set of dots."""

    name: str
    style: str
    """A class of page.css: raw, mean, held, spike, source0, ..."""
    steps: np.ndarray
    values: np.ndarray
    """Finite."""
    dots: bool = False
    interval: tuple[np.ndarray, np.ndarray] | None = None
    """Lower and upper ends, drawn as bars."""
    sets_range: bool = True
    """Whether the vertical axis must hold all of it."""
    key: bool = True
    """Whether the caption explains it."""
    read: str | None = None
    """Its name where values are read out, if shorter; "" where it is not."""


@dataclass(frozen=True)
class Chart:
    """One picture; `lines` without points are passed over."""

    name: str
    title: str
    unit: str
    lines: Sequence[Line]
    log: bool = False
    from_zero: bool = False
    rules: Sequence[tuple[float, str, str]] = ()
    """Horizontal lines, with what they say and their style: "" for a limit, or plain."""
    low_height: bool = False
    cut: bool = False
    """Leave a few spikes out of the vertical axis, and say so."""
    breaks: Sequence[int] = field(default=())
    """Steps at which a vertical line stands: restarts and rollbacks."""


def raw_and_mean(name: str, steps: np.ndarray, values: np.ndarray) -> list[Line]:
    """The curve as it is, thin, under its smoothed one where it is long enough for that."""
    if not window(len(values)):
        return [Line(name, "mean", steps, values)]
    mean = f"mean of {window(len(values)):,} steps"
    return [Line(name, "raw", steps, values), Line(mean, "mean", steps, smooth(values), sets_range=False, read="mean")]


def draw(chart: Chart, span: StepAxis) -> tuple[str, list[dict[str, Any]]]:
    """(markup, what page.js reads out: name, steps and values of each line); ("", []) without a point."""
    lines = [line for line in chart.lines if len(line.steps)]
    if not lines:
        return "", []
    axis, note = _vertical_axis(chart, lines)
    drawn = [(line, thin(line.steps, line.values)) for line in lines]
    shapes = "".join(_shape(line, places, span, axis) for line, places in drawn)
    rules = "".join(_rule(*rule, axis) for rule in chart.rules if 0 <= axis.place(rule[0]) <= 100)
    breaks = "".join(f'<i class="break" style="left:{span.place(step):.2f}%"></i>' for step in chart.breaks)
    side = "".join(f'<em style="bottom:{axis.place(value):.2f}%">{figure(value)}</em>' for value in axis.ticks())
    bottom = "".join(
        f'<span{" class=end" * (span.place(value) > 94)} style="left:{span.place(value):.2f}%">{int(value):,}</span>'
        for value in span.ticks()
    )
    keys = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines if line.key)
    low = " low" if chart.low_height else ""
    markup = (
        f'<figure class="chart" id="{chart.name}"><figcaption><h3>{escape(chart.title)}</h3><span>{escape(chart.unit)}'
        f'</span>{keys}</figcaption><p class="read" hidden></p><div class="plot steps{low}" role="img" '
        f'data-chart="{chart.name}" aria-label="{_told(chart, lines)}">{breaks}{rules}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>{side}'
        f'<div class="bottom" aria-hidden="true">{bottom}</div></div>{note}</figure>'
    )
    return markup, [_read_out(line, places) for line, places in drawn if line.read != ""]


def figure(value: float) -> str:
    """A number for people, four digits of it, as markup."""
    if abs(value) >= 1000 and abs(value) < 1e12:
        return minus(f"{value:,.0f}")
    return "0" if value == 0 else minus(f"{value:.4g}")


def _vertical_axis(chart: Chart, lines: Sequence[Line]) -> tuple[Axis, str]:
    """The axis, and a note about what lies above it."""
    ends = [end for line in lines if line.interval for end in line.interval]
    values = np.concatenate([*(line.values for line in lines if line.sets_range), *ends])
    values = values if len(values) else np.concatenate([line.values for line in lines])
    if chart.log:
        positive = values[values > 0]
        return LogAxis([*positive, *(value for value, _, _ in chart.rules)] or [1.0]), ""
    shown = [0.0] * chart.from_zero + [value for value, _, _ in chart.rules]
    if not chart.cut:
        return Axis([*shown, float(values.min()), float(values.max())]), ""
    ranging = [line for line in lines if line.sets_range]
    top = max(float(line.values.max()) if line.dots else ceiling(line.values) for line in ranging)
    highest = max(ranging, key=lambda line: float(line.values.max()))
    above = highest.values > top
    note = ""
    if above.any():
        place = int(highest.values.argmax())
        note = (
            f'<p class="note">{int(above.sum()):,} of {len(above):,} steps lie above the picture; the highest is '
            f"{figure(float(highest.values[place]))}, in step {int(highest.steps[place]):,}.</p>"
        )
    return Axis([*shown, float(values.min()), top]), note


def _shape(line: Line, places: np.ndarray, span: StepAxis, axis: Axis) -> str:
    across = [round(WIDTH * span.place(float(step)) / 100) for step in line.steps[places]]
    up = [_height(float(value), axis) for value in line.values[places]]
    if line.style == "bars":
        path = "".join(f"M{x},{HEIGHT}V{y}" for x, y in zip(across, up, strict=True) if y < HEIGHT)
    elif line.dots or len(places) == 1:
        path = "".join(f"M{x},{y}h0" for x, y in zip(across, up, strict=True))
    else:
        path = "M" + " ".join(f"{x},{y}" for x, y in zip(across, up, strict=True))
    dots = " dots" if line.dots or len(places) == 1 else ""
    markup = f'<path class="{line.style}{dots}" d="{path}" vector-effect="non-scaling-stroke"/>'
    if line.interval:
        ends = [[_height(float(value), axis) for value in end[places]] for end in line.interval]
        bars = "".join(f"M{x},{low}V{high}" for x, low, high in zip(across, *ends, strict=True))
        line_between = "M" + " ".join(f"{x},{y}" for x, y in zip(across, up, strict=True))
        markup += f'<path class="{line.style} error" d="{bars}" vector-effect="non-scaling-stroke"/>'
        markup += f'<path class="{line.style} error" d="{line_between}" vector-effect="non-scaling-stroke"/>'
    return markup


def _height(value: float, axis: Axis) -> int:
    """From the top, within the picture."""
    return round(HEIGHT * (1 - min(max(axis.place(value), 0.0), 100.0) / 100))


def _rule(value: float, words: str, style: str, axis: Axis) -> str:
    at = f'class="rule {style}" style="bottom:{axis.place(value):.2f}%"'
    return f"<i {at}></i><b {at}>{escape(words)}</b>"


def _told(chart: Chart, lines: Sequence[Line]) -> str:
    """The picture in a sentence, for those who do not see it."""
    parts = []
    for line in lines:
        low, high = figure(float(line.values.min())), figure(float(line.values.max()))
        last = f"{figure(float(line.values[-1]))} at step {int(line.steps[-1]):,}"
        parts.append(f"{line.name}: {last}, between {low} and {high}")
    return escape(f"{chart.title} over the steps. {'; '.join(parts)}.")


def _read_out(line: Line, places: np.ndarray) -> dict[str, Any]:
    values = [float(f"{value:.5g}") for value in line.values[places]]
    return {"name": line.read or line.name, "steps": line.steps[places].tolist(), "values": values}
