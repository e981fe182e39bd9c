"""The pictures of drift.html as markup: shapes stretch with the page, their labels stay as large as its text."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sft.eval.report.grids import known_gains
from sft.eval.report.wording import points, task_name
from sft.html_page.axis import Axis

NUDGE = 0.8
"""Per cent of the width by which the curves of two tasks stand apart, so that equal points do not hide each other."""


def forest_axis(rows: Sequence[dict[str, Any]], margin: float) -> Axis:
    """One axis for all rows: every interval, zero and the margin are on it."""
    return Axis([0.0, -margin, *(end for row in rows for end in row["interval"])])


def forest_scale(axis: Axis) -> str:
    """The axis of a forest plot, in points."""
    marks = (f'<span style="left:{axis.place(value):.2f}%">{_signed(100 * value)}</span>' for value in axis.ticks())
    return f'<div class="scale" aria-hidden="true">{"".join(marks)}</div>'


def forest_bar(row: dict[str, Any], axis: Axis, margin: float, tone: str) -> str:
    """One interval with its estimate, the zero line and the margin's."""
    low, high = (axis.place(end) for end in row["interval"])
    label = f"{points(row['delta'])}, {points(row['interval'][0])} to {points(row['interval'][1])} points"
    return (
        f'<div class="bar {tone}" role="img" aria-label="{label}">'
        f'<i class="margin" style="left:{axis.place(-margin):.2f}%"></i>'
        f'<i class="zero" style="left:{axis.place(0):.2f}%"></i>'
        f'<i class="span" style="left:{low:.2f}%;width:{max(high - low, 0.3):.2f}%"></i>'
        f'<i class="dot" style="left:{axis.place(row["delta"]):.2f}%"></i></div>'
    )


def histogram(data: dict[str, Any]) -> str:
    """Counts of the margin of the right answer: base as an area, tuned as a line."""
    edges, axis = data["edges"], Axis([data["edges"][0], data["edges"][-1]])
    top = max([*data["base"], *data["tuned"], 1])
    shapes = [
        f'<path class="{side}" d="{_steps(edges, data[side], axis, top)}" vector-effect="non-scaling-stroke"/>'
        for side in ("base", "tuned")
    ]
    zero = (
        f'<i class="zero" style="left:{axis.place(0):.2f}%"></i><b style="right:{100 - axis.place(0):.2f}%">wrong</b>'
        f'<b style="left:{axis.place(0):.2f}%">right</b>'
        if edges[0] < 0 < edges[-1]
        else ""
    )
    return (
        '<figure class="chart"><figcaption>Score of the right answer minus that of the best wrong one, items counted; '
        'the outermost bars hold all beyond <span class="key base">base</span> <span class="key tuned">tuned</span>'
        '</figcaption><div class="plot histogram"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(shapes)}</svg>{zero}{_bottom(axis)}</div></figure>'
    )


def curve(report: dict[str, Any]) -> str:
    """What each model gained on held-out data against what it lost; "" where no gain is known."""
    gains = known_gains(report)
    if not gains:
        return ""
    tasks, models = list(report["tasks"]), report["models"]
    ends = [end for place in gains for task in tasks for end in models[place]["tasks"][task]["interval"]]
    across, up = Axis([0.0, *gains.values()]), Axis([0.0, -report["margin"], *ends])
    series = [
        _series(k, task, {place: models[place] for place in gains}, gains, across, up) for k, task in enumerate(tasks)
    ]
    keys = " ".join(f'<span class="key line{k}">{task_name(task)}</span>' for k, task in enumerate(tasks))
    lines = (
        f'<i class="level" style="bottom:{up.place(0):.2f}%"></i>'
        f'<i class="level margin" style="bottom:{up.place(-report["margin"]):.2f}%"></i>'
    )
    side = "".join(f'<em style="bottom:{up.place(value):.2f}%">{_signed(100 * value)}</em>' for value in up.ticks())
    return (
        '<figure class="chart"><figcaption>Change of accuracy in points (up) against the fall of the held-out loss in '
        f'nats per token (to the right), by number of the model {keys}</figcaption><div class="plot curve">{lines}'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(shapes for shapes, _ in series)}</svg>{side}{''.join(spots for _, spots in series)}"
        f"{_bottom(across)}</div></figure>"
    )


def _series(
    order: int, task: str, models: dict[int, dict[str, Any]], gains: dict[int, float], across: Axis, up: Axis
) -> tuple[str, str]:
    """(shapes, numbered spots) of one task's curve, which begins at the base; a nudge apart from the other task's."""
    style, nudge = f"line{order}", NUDGE * (2 * order - 1)
    ends = [(0.0, 0.0), *((gains[place], model["tasks"][task]["delta"]) for place, model in models.items())]
    line = " ".join(f"{across.place(x) + nudge:.2f},{100 - up.place(y):.2f}" for x, y in sorted(ends))
    shapes = [f'<polyline class="{style}" points="{line}" vector-effect="non-scaling-stroke"/>']
    spots = []
    for place, model in models.items():
        row, x = model["tasks"][task], across.place(gains[place]) + nudge
        low, high = (100 - up.place(end) for end in row["interval"])
        shapes.append(
            f'<path class="{style} error" d="M{x:.2f},{low:.2f}V{high:.2f}" vector-effect="non-scaling-stroke"/>'
        )
        told = escape(f"{model['name']}: {task_name(task)} {points(row['delta'])} points")
        at = f"left:{x:.2f}%;bottom:{up.place(row['delta']):.2f}%"
        spots.append(f'<b class="spot {style}" style="{at}" title="{told}">{place}</b>')
    return "".join(shapes), "".join(spots)


def chance(value: float, side: str, *, is_chosen: bool) -> str:
    """The probability that a model gives to a choice, as a bar with its figure."""
    chosen = " chosen" if is_chosen else ""
    return (
        f'<div class="chance {side}{chosen}"><span>{side}</span><i style="width:{min(100 * value, 100):.1f}%"></i>'
        f"<b>{100 * value:.1f} %{chosen}</b></div>"
    )


def _bottom(axis: Axis) -> str:
    marks = (f'<span style="left:{axis.place(value):.2f}%">{_plain(value)}</span>' for value in axis.ticks())
    return f'<div class="bottom" aria-hidden="true">{"".join(marks)}</div>'


def _steps(edges: Sequence[float], counts: Sequence[int], axis: Axis, top: int) -> str:
    """A staircase from the floor to the floor."""
    path = [f"M{axis.place(edges[0]):.2f},100"]
    for left, right, height in zip(edges, edges[1:], counts, strict=False):
        level = 100 - 92 * height / top
        path.append(f"L{axis.place(left):.2f},{level:.2f}L{axis.place(right):.2f},{level:.2f}")
    return "".join([*path, f"L{axis.place(edges[-1]):.2f},100"])


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:+.4g}".replace("-", "−")


def _plain(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:.4g}".replace("-", "−")
