"""Which pictures a run has."""

from html import escape
from typing import Any

import numpy as np

from sft.report.charts import Chart, Line, draw, raw_and_mean
from sft.report.curves import StepAxis, smooth, window
from sft.report.facts import Facts
from sft.report.files import Event, RunFiles
from sft.report.tables import event_words, source_table

MAX_SOURCES = 6
"""Curves in one picture, those of the sources with the most tokens: more cannot be told apart."""
MAX_MARKS = 150
"""Of one kind on the time axis; more would not be told apart."""
RAIL = {
    "restarts": ("resume", "start"),
    "rollbacks": ("rollback",),
    "spikes": ("spike",),
    "skipped": ("skip",),
    "saves": ("save",),
}
"""Rows of marks below the loss, and the events that each shows."""
GLYPHS = {"restarts": "▶", "rollbacks": "↩", "spikes": "▲", "skipped": "×", "saves": "|"}
TASK_NAMES = {"mmlu": "MMLU", "hellaswag": "HellaSwag"}


def draw_all(run: RunFiles, facts: Facts) -> tuple[str, dict[str, Any]]:
    """(markup of all pictures, data of page.js)."""
    steps = run.metrics.step
    span = StepAxis(0.0, float(max([1, facts.step, *(event.step for event in run.events)])))
    charts: dict[str, Any] = {}
    parts = []
    for chart in (_loss(run, facts), _by_source(run), _rate(run), _norm(run), _speed(run), _stalls(run), _probe(run)):
        markup, read = draw(chart, span)
        if not markup:
            continue
        charts[chart.name] = read
        parts.append(markup)
        if chart.name == "loss":
            parts.append(_rail(run.events, span))
        if chart.name == "sources":
            parts.append(source_table(run))
    told = [(event.step, event.kind.replace("_", " ")) for event in run.events if _is_told(event)]
    data = {"low": span.low, "high": span.high, "charts": charts, "events": sorted(told)[: 4 * MAX_MARKS]}
    return "".join(parts) if len(steps) else "", data


def _loss(run: RunFiles, facts: Facts) -> Chart:
    steps, losses = run.metrics.known("loss")
    held_steps, held = run.metrics.known("heldout_loss")
    lines = raw_and_mean("loss", steps, losses)
    spikes = {event.step: event.facts.get("loss") for event in run.events if event.kind == "spike"}
    known = {step: loss for step, loss in spikes.items() if isinstance(loss, int | float)}
    at, height = np.array(list(known), dtype=np.int64), np.array(list(known.values()), dtype=np.float64)
    lines.append(Line("spike", "spike", at, height, dots=True, sets_range=False, read=""))
    lines.append(Line("held-out", "held", held_steps, held, dots=True))
    if facts.best_heldout is not None and len(held) > 1:
        step, loss = facts.best_heldout
        name = "lowest held-out"
        lines.append(Line(name, "best", np.array([step]), np.array([loss]), dots=True, read=""))
    return Chart("loss", "Loss", "nats per supervised token", lines, cut=True, breaks=_breaks(run.events))


def _by_source(run: RunFiles) -> Chart:
    metrics = run.metrics
    share = {name: float(np.nansum(values)) for name, values in metrics.share_by_source.items()}
    sources = sorted(metrics.loss_by_source, key=lambda name: -share.get(name, 0.0))[:MAX_SOURCES]
    lines = []
    for order, name in enumerate(sources if len(metrics.loss_by_source) > 1 else []):
        values = metrics.loss_by_source[name]
        there = np.isfinite(values)
        lines.append(Line(name, f"source{order}", metrics.step[there], smooth(values[there])))
    width = max((window(len(line.steps)) for line in lines), default=0)
    unit = f"nats per supervised token{f', mean of {width:,} steps' if width else ''}"
    return Chart("sources", "Loss by source", unit, lines, cut=True, breaks=_breaks(run.events))


def _rate(run: RunFiles) -> Chart:
    line = Line("learning rate", "mean", *run.metrics.known("lr"), key=False)
    return Chart("rate", "Learning rate", "", [line], from_zero=True, breaks=_breaks(run.events))


def _norm(run: RunFiles) -> Chart:
    steps, norms = run.metrics.known("grad_norm")
    clip = run.setting("optim", "grad_clip")
    clips = isinstance(clip, int | float) and clip > 0
    rules = [(float(clip), f"clipped above {clip:g}", "")] if clips and len(norms) else []
    unit = "before clipping, logarithmic"
    lines = raw_and_mean("gradient norm", steps, norms)
    return Chart("norm", "Gradient norm", unit, lines, log=True, rules=rules, breaks=_breaks(run.events))


def _speed(run: RunFiles) -> Chart:
    lines = raw_and_mean("tokens/s", *run.metrics.known("tokens_per_s"))
    unit = "tokens per second, all ranks"
    return Chart("speed", "Throughput", unit, lines, from_zero=True, breaks=_breaks(run.events))


def _stalls(run: RunFiles) -> Chart:
    steps, stalls = run.metrics.known("save_stall_s")
    lines = [Line("seconds", "bars", steps[stalls > 0], stalls[stalls > 0], key=False)]
    unit = f"seconds that training stood still; {stalls.sum():,.2f} s in all"
    return Chart("stalls", "Waiting for saves", unit, lines, from_zero=True, low_height=True)


def _probe(run: RunFiles) -> Chart:
    """Change of accuracy in points since the base model, from the newest event of each step."""
    latest = {event.step: event for event in run.events if event.kind == "probe" and event.step <= run_end(run)}
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for step, event in sorted(latest.items()):
        tasks = event.facts.get("tasks")
        for task, shift in tasks.items() if isinstance(tasks, dict) else ():
            figures = _shift(shift)
            if step and figures:
                found.setdefault(str(task), []).append((step, *figures))
    lines = []
    for order, (task, rows) in enumerate(found.items()):
        steps, delta, low, high = (np.array(column) for column in zip(*rows, strict=True))
        name = TASK_NAMES.get(task, task)
        lines.append(Line(name, f"source{order % MAX_SOURCES}", steps, delta, dots=True, interval=(low, high)))
    budget = run.setting("eval", "probe", "max_drop")
    rules = [(0.0, "base model", "plain")] if lines else []
    rules += [(-100.0 * budget, "budget", "")] if lines and isinstance(budget, int | float) else []
    unit = "change of accuracy in points against the base model, 95 % intervals"
    return Chart("probe", "Drift probe", unit, lines, rules=rules)


def run_end(run: RunFiles) -> int:
    """The last step in metrics.jsonl: later events are of steps that were undone."""
    return int(run.metrics.step[-1]) if len(run.metrics.step) else 0


def _shift(shift: Any) -> tuple[float, float, float] | None:
    """(delta, lower end, upper end) in points."""
    if not isinstance(shift, dict):
        return None
    interval = shift.get("interval")
    ends = interval if isinstance(interval, list) and len(interval) == 2 else [shift.get("delta")] * 2
    values = [shift.get("delta"), *ends]
    if not all(isinstance(value, int | float) for value in values):
        return None
    return 100 * values[0], 100 * values[1], 100 * values[2]


def _breaks(events: list[Event]) -> list[int]:
    """Steps where a run began again or went back."""
    begun = [event.step for event in events if event.kind in ("resume", "start")][1:]
    back = [event.step for event in events if event.kind == "rollback"]
    return sorted({*begun, *back})[:MAX_MARKS]


def _rail(events: list[Event], span: StepAxis) -> str:
    """Marks on the time axis, a row for each kind that occurred."""
    rows = []
    for name, kinds in RAIL.items():
        chosen = [event for event in events if event.kind in kinds]
        chosen = chosen[1:] if name == "restarts" else chosen
        if not chosen:
            continue
        places = {round(span.place(event.step), 1): event for event in chosen}
        marks = "".join(
            f'<b style="left:{place:g}%" title="{escape(f"step {event.step:,}: {event_words(event)}")}">'
            f"{GLYPHS[name]}</b>"
            for place, event in list(places.items())[: 4 * MAX_MARKS]
        )
        rows.append(
            f'<div class="row {name}"><span>{name}</span><div class="track" role="img" '
            f'aria-label="{len(chosen):,} {name}">{marks}</div></div>'
        )
    return f'<div class="rail">{"".join(rows)}</div>' if rows else ""


def _is_told(event: Event) -> bool:
    """What the read-out names when the pointer is near."""
    return event.kind in ("resume", "rollback", "spike", "skip", "early_stop", "guard_stop", "rank_lost", "unseen_end")
