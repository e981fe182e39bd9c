"""drift.html: the report as one page that needs nothing but itself, from the content of drift.json."""

from collections.abc import Iterable
from html import escape
from typing import Any

from sft.eval.report import charts, grids
from sft.eval.report.grids import Grid
from sft.eval.report.wording import (
    HOW_TO_READ,
    MARKS,
    TONES,
    count,
    gate_line,
    gate_rule,
    interval,
    margin_words,
    meaning,
    p_value,
    percent,
    points,
    task_name,
    verdict_sentences,
    worst_verdict,
)
from sft.html_page.axis import Axis
from sft.html_page.document import document, minus

KINDS = {
    "right_to_wrong": "right → wrong",
    "wrong_to_right": "wrong → right",
    "wrong_to_other": "wrong → another wrong",
}
"""How an example flipped, in the order in which they are shown."""
ORDERS = {"delta": "largest loss first", "p": "smallest p first", "n": "most items first", "name": "by name"}
"""What page.js sorts subjects by; the first is how they come."""
METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, scores per character"}


def to_html(report: dict[str, Any]) -> str:
    """The whole page. It loads nothing, and reads without its script, which sorts and filters the subjects."""
    names = report["names"]
    several = len(report["models"]) > 2
    sections = [
        _summary(report),
        *([_models(report)] if several else []),
        *(_task(report, task) for task in report["tasks"]),
        *([_answers(report["answers"])] if report["answers"] else []),
        _how_to_read(),
        _provenance(report),
    ]
    return document(f"Drift: {names['base']} to {names['tuned']}", _join(sections), beside=__file__)


def _summary(report: dict[str, Any]) -> str:
    """What a manager reads: the verdict in words, the gate, the headline figures, what they mean."""
    worst = worst_verdict(report)
    lead, *rest = verdict_sentences(report)
    links = [("models", "Models")] if len(report["models"]) > 2 else []
    links += [(task, task_name(task)) for task in report["tasks"]]
    links += [("answers", "Answers")] if report["answers"] else []
    links += [("reading", "How to read this"), ("provenance", "Computed from")]
    bullets = [
        f"<li><strong>{task_name(task)}.</strong> {escape(meaning(report, task)[0])}</li>" for task in report["tasks"]
    ]
    bullets += [f"<li>{escape(line)}</li>" for line in _reach(report)]
    return (
        f'<header><h1>Drift report</h1><dl class="pair"><dt>base</dt><dd>{escape(report["names"]["base"])}</dd>'
        f"<dt>tuned</dt><dd>{escape(report['names']['tuned'])}</dd></dl></header>"
        f'<section class="verdict {TONES[worst]}"><p class="word">{_tag(worst, capital=True)}</p>'
        f'<p class="lead">{escape(lead)}</p>{"".join(f"<p class=next>{escape(line)}</p>" for line in rest)}</section>'
        f"{_gate(report)}"
        f"{_headline(report)}<h3>What it means</h3><ul>{''.join(bullets)}</ul>"
        f'<nav aria-label="Sections">{"".join(f"<a href=#{anchor}>{name}</a>" for anchor, name in links)}</nav>'
    )


def _gate(report: dict[str, Any]) -> str:
    gate = report["gate"]
    if gate["passed"] is None:
        return f'<section class="gate"><p class="soft">{escape(gate_line(report))}</p></section>'
    tone, word = ("good", "✓ Gate passed.") if gate["passed"] else ("bad", "✗ Gate failed.")
    lines = (f"<li>{'✗' if line in gate['failed'] else '✓'} {escape(line)}</li>" for line in gate["decisions"].values())
    return (
        f'<section class="gate"><p><strong class="{tone}">{word}</strong> {escape(gate_rule(report))}</p>'
        f"<ul>{''.join(lines)}</ul></section>"
    )


def _reach(report: dict[str, Any]) -> list[str]:
    """How far the verdict carries."""
    unseen = [
        f"{percent(result['power']['mde'])} points on {task_name(task)}"
        for task, result in report["tasks"].items()
        if result["power"]["mde"] is not None and result["changed"]
    ]
    lines = []
    if unseen:
        lines.append(f"A true change smaller than {' or '.join(unseen)} would often have gone unnoticed.")
    lines.append(
        "Only these tasks were asked. The figures do not speak for others, nor for the quality of longer answers."
    )
    return lines


def _headline(report: dict[str, Any]) -> str:
    rows = report["tasks"]
    axis = charts.forest_axis(list(rows.values()), report["margin"])
    head = ("task", "base %", "tuned %", "Δ points", grids.interval_name(report), "", "verdict")
    body = []
    for task, row in rows.items():
        figures = (percent(row["base"]), percent(row["tuned"]), points(row["delta"]), interval(row["interval"]))
        cells = "".join(
            f'<td class="n" data-name="{escape(name)}"><span>{minus(cell)}</span></td>'
            for name, cell in zip(head[1:], figures, strict=False)
        )
        bar = charts.forest_bar(row, axis, report["margin"], TONES[row["verdict"]])
        body.append(
            f'<tr><th scope="row"><span>{task_name(task)}<span class="note">{METRIC_NAMES[row["metric"]]}, '
            f'{count(row["n"])} items</span></span></th>{cells}<td class="strip">{bar}</td>'
            f'<td class="told">{_tag(row["verdict"])}</td></tr>'
        )
    heads = _heads(head, ("task", "", "verdict"))
    return (
        f'<div class="box"><table class="headline stack"><thead><tr>{heads}</tr></thead><tbody>'
        f'{"".join(body)}</tbody></table></div><p class="note">Bars: interval around the change; solid line: no '
        f"change; dashed line: a loss of {margin_words(report['margin'])}.</p>"
    )


def _models(report: dict[str, Any]) -> str:
    paths = "".join(
        f"<li>{escape(model['name'])}: <code>{escape(model['path'])}</code></li>" for model in report["models"]
    )
    return (
        f'<section id="models"><h2>Models</h2>{_table(grids.models(report), "wide")}{charts.curve(report)}'
        f'<ul class="soft">{paths}</ul></section>'
    )


def _task(report: dict[str, Any], task: str) -> str:
    """What a statistician reads about one task."""
    result = report["tasks"][task]
    parts = [
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in meaning(report, task))}</ul>",
        '<div class="columns"><div><h3>Errors, intervals, tests</h3>',
        _table(grids.statistics(report, task)),
        "</div><div><h3>What the items can show</h3>",
        _table(grids.power(report, task)),
        "<h3>Divergence of the scores</h3>",
        _table(grids.divergence(report, task)),
        "<h3>All headline metrics</h3>",
        _table(grids.any_degradation(report)),
        "</div></div>",
        "<h3>How the scores moved</h3>",
        _table(grids.shifts(report, task), "wide"),
        charts.histogram(result["margin_histogram"]),
        _forest(report, result.get("categories"), "Categories"),
        _forest(report, result.get("subjects"), "Subjects"),
        _examples(result["examples"]),
    ]
    return f'<section id="{task}"><h2>{task_name(task)}</h2>{"".join(parts)}</section>'


def _forest(report: dict[str, Any], groups: dict[str, dict[str, Any]] | None, title: str) -> str:
    """Rows with intervals on one axis, the largest loss first; subjects can be sorted and filtered."""
    if not groups:
        return ""
    axis = charts.forest_axis(list(groups.values()), report["margin"])
    corrected = any("p_holm" in row for row in groups.values())
    rows = "".join(
        _forest_row(name, row, axis, report) for name, row in sorted(groups.items(), key=lambda pair: pair[1]["delta"])
    )
    note = f"Dashed line: a loss of {margin_words(report['margin'])}."
    if corrected:
        level = f"{1 - report['level']:.2g}"
        note += (
            f" Holm: p below {level} after correction for all {len(groups)}; BH: expected share of false alarms below "
            f"{level}. No mark is no proof that nothing changed: the interval shows what remains possible."
        )
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in ORDERS.items())
    tools = (
        '<div class="tools" hidden><label>Show <input type="search" placeholder="part of a name"></label>'
        f"<label>Sort <select>{options}</select></label></div>"
    )
    columns = [("Δ points", "delta"), (grids.interval_name(report), "ends"), ("items", "items"), ("McNemar p", "p")]
    columns += [("Holm p", "adjusted"), ("BH q", "adjusted")] if corrected else []
    heads = "".join(f'<th class="{kind} n" scope="col">{name}</th>' for name, kind in columns)
    return (
        f'<h3>{title}</h3><p class="note">{note}</p>{tools if corrected else ""}<table class="forest"><thead><tr>'
        f'<th class="name" scope="col">name</th><th class="plotted" scope="col">{charts.forest_scale(axis)}</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _forest_row(name: str, row: dict[str, Any], axis: Axis, report: dict[str, Any]) -> str:
    """Coloured where the correction for many subjects leaves something; there are none to correct for in categories."""
    alpha, p, shown = 1 - report["level"], row["mcnemar_p"], escape(name.replace("_", " "))
    chip, adjusted = "", ""
    notable = row["interval"][0] > 0 or row["interval"][1] < 0
    if "p_holm" in row:
        chip = "Holm" if row["p_holm"] < alpha else "BH" if row["q_bh"] < alpha else ""
        notable = bool(chip)
        adjusted = "".join(f'<td class="adjusted n">{escape(p_value(row[key]))}</td>' for key in ("p_holm", "q_bh"))
    tone = ("bad" if row["delta"] < 0 else "good") if notable else "plain"
    mark = f' <span class="chip {tone}">{chip}</span>' if chip else ""
    told = f"{row['right_to_wrong']} right to wrong, {row['wrong_to_right']} wrong to right"
    return (
        f'<tr data-name="{shown.lower()}" data-delta="{row["delta"]:.6f}" data-p="{p:.6g}" data-n="{row["n"]}" '
        f'title="{told}"><th class="name" scope="row">{shown}{mark}</th>'
        f'<td class="plotted">{charts.forest_bar(row, axis, report["margin"], tone)}</td>'
        f'<td class="delta n">{minus(points(row["delta"]))}</td><td class="ends n">{minus(interval(row["interval"]))}'
        f'</td><td class="items n">{count(row["n"])}</td><td class="p n">{escape(p_value(p))}</td>{adjusted}</tr>'
    )


def _examples(examples: list[dict[str, Any]]) -> str:
    if not examples:
        return ""
    cards = (_example(example) for kind in KINDS for example in examples if example["kind"] == kind)
    note = "Chances are those of the four choices among themselves."
    return f'<h3>Answers that changed</h3><p class="note">{note}</p><div class="cards">{"".join(cards)}</div>'


def _example(example: dict[str, Any]) -> str:
    choices = []
    for place, text in enumerate(example["choices"]):
        bars = "".join(
            charts.chance(example[f"{side}_p"][place], side, is_chosen=example[f"{side}_pred"] == place)
            for side in ("base", "tuned")
        )
        is_gold = place == example["gold"]
        gold = "<em>✓ right answer</em>" if is_gold else ""
        choices.append(
            f"<li><div{' class=gold' if is_gold else ''}>{'ABCD'[place]}. {escape(text)}{gold}</div>{bars}</li>"
        )
    item = escape(example["item"].strip())
    return (
        f'<article class="card"><h4><span class="kind">{KINDS[example["kind"]]}</span> · {item}</h4>'
        f'<p class="question">{escape(example["question"])}</p><ul class="choices">{"".join(choices)}</ul></article>'
    )


def _answers(answers: list[dict[str, str]]) -> str:
    blocks = (
        f'<div class="answer"><p class="prompt">{escape(answer["prompt"])}</p><div class="sides">'
        + "".join(f"<div><b>{side}</b>{escape(answer[side]) or _NOTHING}</div>" for side in ("base", "tuned"))
        + "</div></div>"
        for answer in answers
    )
    return (
        '<section id="answers"><h2>Answers</h2><p class="note">The same prompts, decoded greedily by both models. They '
        f"are samples to look at: no figure above depends on them.</p>{''.join(blocks)}</section>"
    )


_NOTHING = '<span class="note">(nothing)</span>'


def _how_to_read() -> str:
    terms = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text[:1].upper() + text[1:])}</dd>" for term, text in HOW_TO_READ
    )
    return f'<section id="reading"><h2>How to read this</h2><dl class="terms">{terms}</dl></section>'


def _provenance(report: dict[str, Any]) -> str:
    table = _table(grids.provenance(report), kind="provenance")
    return f'<section id="provenance"><h2>Computed from</h2>{table}</section>'


def _table(grid: Grid, frame: str = "", kind: str = "") -> str:
    """A table in a box of its own, which scrolls where the screen is narrower; "" without rows."""
    if not grid.rows:
        return ""
    body = []
    for name, *cells in grid.rows:
        tds = (
            f"<td>{_tag(cell) if cell in MARKS else escape(cell)}</td>"
            if column in grid.words
            else f'<td class="n">{_tag(cell) if cell in MARKS else minus(cell)}</td>'
            for column, cell in zip(grid.head[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(tds)}</tr>')
    head = _heads(grid.head, (grid.head[0], *grid.words))
    return (
        f'<div class="box {frame}" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _heads(names: Iterable[str], words: Iterable[str]) -> str:
    left = set(words)
    return "".join(
        f'<th scope="col"{"" if name in left else " class=n"}>{escape(name)}</th>' if name else "<td></td>"
        for name in names
    )


def _tag(verdict: str, *, capital: bool = False) -> str:
    text = verdict.capitalize() if capital else verdict
    return f'<span class="tag {TONES[verdict]}" data-mark="{MARKS[verdict]}">{text}</span>'


def _join(sections: Iterable[str]) -> str:
    return "\n".join(sections)
