"""The tables of the page: events, sources, checkpoints, and the figures behind the curves."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from sft.html_page.document import minus
from sft.report.charts import figure
from sft.report.curves import smooth
from sft.report.facts import Facts, clock
from sft.report.files import Event, RunFiles

ROUTINE = ("evaluate", "save", "delete", "probe", "samples")
"""Events of a run in which nothing happens; folded on the page."""
MAX_EVENTS = 400
"""Rows of a table of events; the rest is in events.jsonl."""
LONGEST = 300
"""Characters of what an event says."""
MAX_FIGURES = 16
"""Rows of the figures behind the curves."""


def event_table(events: Sequence[Event]) -> str:
    """Events in order; of more than MAX_EVENTS the first and last half of that."""
    shown = list(events)
    note = ""
    if len(events) > MAX_EVENTS:
        half = MAX_EVENTS // 2
        shown = [*events[:half], *events[-half:]]
        note = f'<p class="note">{len(events) - MAX_EVENTS:,} between them are only in events.jsonl.</p>'
    rows = "".join(
        f'<tr><td class="when">{clock(event.time_s) if event.time_s is not None else ""}</td>'
        f'<td class="n">{event.step:,}</td><th scope="row">{escape(event.kind.replace("_", " "))}</th>'
        f"<td>{escape(event_words(event))}</td></tr>"
        for event in shown
    )
    heads = "".join(
        f'<th scope="col"{" class=n" * (name == "step")}>{name}</th>'
        for name in ("time", "step", "event", "what it says")
    )
    return note + _boxed(heads, rows, "events")


def event_words(event: Event) -> str:
    """What an event says, in a line."""
    facts = dict(event.facts)
    reason = facts.pop("reason", None)
    if event.kind == "save" and _are_numbers(facts, "gib", "save_time_s"):
        return f"{facts['gib']:,.2f} GiB in {facts['save_time_s']:,.1f} s"
    if event.kind == "evaluate" and _are_numbers(facts, "heldout_loss"):
        return f"held-out loss {facts['heldout_loss']:.4f}"
    if event.kind == "probe" and isinstance(facts.get("tasks"), dict):
        return "; ".join(f"{task} {_shift_words(shift)}" for task, shift in facts["tasks"].items())
    if event.kind in ("spike", "early_stop") and reason:
        return _short(str(reason))
    facts.pop("identity", None)
    documents = facts.pop("doc_ids", None)
    words = [str(reason)] if reason else []
    if isinstance(documents, list):
        words.append(f"documents {', '.join(str(document) for document in documents[:20])}")
        words[-1] += f" and {len(documents) - 20:,} more" if len(documents) > 20 else ""
    words += [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in facts.items() if value is not None]
    return _short("; ".join(words))


def source_table(run: RunFiles) -> str:
    """Each source's part in the tokens, and its loss at both ends of the run."""
    metrics, rows = run.metrics, []
    tokens = np.nan_to_num(metrics.columns["tokens"])
    part = {name: float(np.nansum(values * tokens)) for name, values in metrics.share_by_source.items()}
    total = sum(part.values())
    for name in sorted(metrics.loss_by_source, key=lambda name: -part.get(name, 0.0)):
        losses = metrics.loss_by_source[name]
        losses = smooth(losses[np.isfinite(losses)])
        first, last = (f"{losses[place]:.4f}" if len(losses) else "" for place in (0, -1))
        share = f"{100 * part.get(name, 0.0) / total:.1f} %" if total else ""
        rows.append(_row(name, share, first, last))
    return _table(("source", "share of tokens", "first loss, smoothed", "last loss, smoothed"), rows)


def checkpoint_table(run: RunFiles, facts: Facts) -> str:
    """What is on the disk to go on from, or to export."""
    rows = []
    best = min((saved.heldout_loss for saved in run.checkpoints if saved.heldout_loss is not None), default=None)
    for saved in run.checkpoints:
        loss = "" if saved.heldout_loss is None else f"{saved.heldout_loss:.4f}"
        mark = " (lowest)" if saved.heldout_loss is not None and saved.heldout_loss == best else ""
        state = "complete" if saved.is_complete else "not complete"
        gib = saved.num_bytes / 2**30
        size = f"{gib:,.2f}" if gib >= 0.1 else f"{gib:.2g}"
        ranks = "" if saved.ranks is None else f"{saved.ranks:,}"
        rows.append(_row(f"{saved.step:,}", loss + mark, size, ranks, state))
    return _table(("step", "held-out loss", "GiB", "ranks", "state"), rows)


def figures_table(run: RunFiles) -> str:
    """The curves at a few steps, as numbers."""
    metrics = run.metrics
    places = np.unique(np.linspace(0, len(metrics.step) - 1, min(MAX_FIGURES, len(metrics.step))).round().astype(int))
    names = {
        "loss": "loss",
        "heldout_loss": "held-out loss",
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens/s",
    }
    rows = []
    for place in places:
        cells = (metrics.columns[name][place] for name in names)
        rows.append(_row(f"{metrics.step[place]:,}", *(figure(c) if np.isfinite(c) else "" for c in cells)))
    return _table(("step", *names.values()), rows)


def _shift_words(shift: Any) -> str:
    if not isinstance(shift, dict) or not _are_numbers(shift, "value", "delta"):
        return _plain(shift)
    return f"{100 * shift['value']:.1f} % ({100 * shift['delta']:+.1f} points)"


def _are_numbers(facts: dict[str, Any], *names: str) -> bool:
    return all(isinstance(facts.get(name), int | float) for name in names)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _row(name: str, *cells: str) -> str:
    tds = "".join(f'<td class="n">{minus(cell)}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{tds}</tr>'


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    body = "".join(rows)
    if not body:
        return ""
    first, *others = head
    heads = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="n">{name}</th>' for name in others)
    return _boxed(heads, body, "figures")


def _boxed(heads: str, rows: str, kind: str) -> str:
    return (
        f'<div class="box" tabindex="0"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )
