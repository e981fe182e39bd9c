"""The page of a run: what it is at a glance, its curves, events, samples, checkpoints and settings."""

import json
from html import escape
from typing import Any

from sft.errors import shorten
from sft.html_page.document import document
from sft.report.facts import Facts, clock, gather
from sft.report.figures import draw_all
from sft.report.files import RunFiles
from sft.report.samples import sample_section
from sft.report.tables import ROUTINE, checkpoint_table, event_table, figures_table

MAX_CONFIG = 100_000
"""Characters of config.yaml."""


def to_html(run: RunFiles, now_s: float) -> str:
    """The whole page, as seen at `now_s` (seconds since 1970). It loads nothing, and reads without its script."""
    facts = gather(run, now_s)
    curves, data = draw_all(run, facts)
    sections = [
        ("curves", "Curves", _curves(run, curves)),
        ("events", "Events", _events(run)),
        ("samples", "Samples", sample_section(run.samples)),
        ("checkpoints", "Checkpoints", checkpoint_table(run, facts)),
        ("settings", "Settings", _settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    name = run.folder.resolve().name
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in sections
    )
    head = f'{_head(run, facts, name)}{_tiles(facts)}<nav aria-label="Sections">{links}</nav>'
    foot = (
        f'<footer class="note">Made on {clock(now_s)} from the files in {escape(str(run.folder))}. '
        f"Steps that were undone by a rollback or taken again after a restart are not in the curves.</footer>"
    )
    return document(f"Run {name}", f"{head}\n{body}\n{foot}\n{_data(data)}", beside=__file__)


def _head(run: RunFiles, facts: Facts, name: str) -> str:
    state = facts.state
    pairs = [
        ("model", run.setting("model", "path")),
        ("data", run.setting("data", "train")),
        ("learning rate", run.setting("optim", "lr")),
        ("packs per step", run.setting("batch", "rows_per_step")),
    ]
    told = "".join(f"<dt>{key}</dt><dd>{escape(shorten(str(value)))}</dd>" for key, value in pairs if value is not None)
    reason = f'<p class="next">{escape(state.reason)}</p>' if state.reason else ""
    return (
        f'<header><h1>Run {escape(name)}</h1><dl class="pair">{told}</dl></header>'
        f'<section class="verdict {state.tone}"><p class="word {state.tone}">{escape(state.words)}</p>'
        f'<p class="lead">{_progress(facts)}</p>{reason}{_bar(facts)}</section>'
    )


def _progress(facts: Facts) -> str:
    """How far the run is, in a sentence."""
    if not facts.step:
        return "No step has been taken."
    steps = f"{facts.step:,} step{'s' if facts.step > 1 else ''}"
    if facts.total_steps is None:
        return f"{steps} taken."
    if facts.step >= facts.total_steps:
        return f"All {steps} taken."
    left = f", about {duration(facts.eta_s)} left" if facts.eta_s is not None else ""
    return f"{facts.step:,} of {facts.total_steps:,} steps taken{left}."


def _bar(facts: Facts) -> str:
    """How far it is, as a bar."""
    if not facts.total_steps or facts.step >= facts.total_steps:
        return ""
    return f'<progress max="{facts.total_steps}" value="{facts.step}">{facts.step} of {facts.total_steps}</progress>'


def _tiles(facts: Facts) -> str:
    """The figures of the run."""
    tiles: list[tuple[str, str, str]] = []
    if facts.best_heldout is not None and facts.last_heldout is not None:
        step, loss = facts.best_heldout
        tiles.append(("lowest held-out loss", f"{loss:.4f}", f"after step {step:,}"))
        tiles.append(("last held-out loss", f"{facts.last_heldout[1]:.4f}", f"after step {facts.last_heldout[0]:,}"))
    if facts.loss is not None:
        tiles.append(("final loss" if facts.state.is_over else "loss", f"{facts.loss:.4f}", "of the last step"))
    if facts.first_s is not None and facts.last_s is not None:
        note = f"{duration(facts.trained_s)} in steps"
        note += f", {duration(facts.save_stall_s)} waiting for saves" if facts.save_stall_s >= 1 else ""
        note += f", {duration(facts.data_stall_s)} waiting for data" if facts.data_stall_s >= 1 else ""
        tiles.append(("time", duration(facts.last_s - facts.first_s), note))
    if facts.tokens:
        tiles.append(("tokens", _amount(facts.tokens), f"{facts.tokens:,}"))
    if facts.tokens_per_s is not None:
        device = "rank" if facts.peak_mem_gib is None else "GPU"
        note = f"{facts.tokens_per_s_per_gpu:,.0f} per {device}" if facts.tokens_per_s_per_gpu is not None else ""
        tiles.append(("tokens/s", f"{facts.tokens_per_s:,.0f}", f"median{'; ' if note else ''}{note}"))
    if facts.mfu is not None:
        tiles.append(("MFU", f"{100 * facts.mfu:.1f} %", "median of the steps"))
    if facts.peak_mem_gib is not None:
        tiles.append(("peak memory", f"{facts.peak_mem_gib:,.1f} GiB", "highest of any GPU"))
    elif facts.peak_host_mem_gib is not None:
        tiles.append(("peak memory", f"{facts.peak_host_mem_gib:,.1f} GiB", "on the host, highest of any rank"))
    notes = {
        "restarts": "went on from a checkpoint",
        "rollbacks": "went back before a spike",
        "spikes": "loss far above the usual",
        "skipped": "steps without an update",
    }
    tiles += [(kind, f"{facts.counts[kind]:,}", note) for kind, note in notes.items()]
    cells = (
        f'<div class="{"quiet" if value == "0" else ""}"><dt>{escape(key)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for key, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _curves(run: RunFiles, curves: str) -> str:
    if not curves:
        return '<p class="soft">metrics.jsonl holds no step.</p>'
    figures = f"<details><summary>Figures behind the curves</summary>{figures_table(run)}</details>"
    hint = (
        '<p class="note hint" hidden>Point at a curve, or choose one with the tab key and move with the arrow keys, '
        "to read its values. Dashed vertical lines: restarts and rollbacks.</p>"
    )
    return hint + curves + figures


def _events(run: RunFiles) -> str:
    notable = [event for event in run.events if event.kind not in ROUTINE]
    routine = [event for event in run.events if event.kind in ROUTINE]
    parts = [event_table(notable)] if notable else ['<p class="soft">None is recorded.</p>']
    if routine:
        kinds = ", ".join(kind for kind in ROUTINE if any(event.kind == kind for event in routine))
        parts.append(
            f"<details><summary>{len(routine):,} everyday ones: {kinds}</summary>{event_table(routine)}</details>"
        )
    return "".join(parts)


def _settings(run: RunFiles) -> str:
    if not run.config_text:
        return '<p class="soft">There is no config.yaml.</p>'
    text = run.config_text[:MAX_CONFIG]
    more = "\n…" if len(run.config_text) > MAX_CONFIG else ""
    return (
        "<details><summary>config.yaml: every option as the run resolved it</summary>"
        f'<pre class="box" tabindex="0">{escape(text)}{more}</pre></details>'
    )


def _data(data: dict[str, Any]) -> str:
    """What page.js reads out. No text in it can end the element: < is written as an escape of JSON."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def duration(seconds: float) -> str:
    """A time span for people, two units of it."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _amount(number: int) -> str:
    """A large number by its magnitude."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"
