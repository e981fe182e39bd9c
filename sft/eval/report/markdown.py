"""The drift report as markdown and as tables on the terminal, from the content of drift.json."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from sft.eval.report import grids
from sft.eval.report.grids import Grid
from sft.eval.report.wording import HOW_TO_READ, gate_line, meaning, task_name, verdict_sentences

TERMINAL = {"base %": "base", "tuned %": "tuned", "Δ points": "Δ", "held-out loss": "loss"}
"""Shorter headings, so that the tables fit a terminal of 100 columns."""
TOO_WIDE = ("McNemar p", "lost", "won")
"""Columns that only drift.md and drift.html show."""


def to_markdown(report: dict[str, Any]) -> str:
    """drift.md: the verdict, the gate, every figure that drift.html shows, and how to read them."""
    names = report["names"]
    parts = [
        "# Drift report",
        f"base: {_code(names['base'])}  \ntuned: {_code(names['tuned'])}",
        " ".join(f"**{sentence}**" for sentence in verdict_sentences(report)),
        _escape(gate_line(report)),
        _list(line for line in report["gate"]["decisions"].values() if line not in report["gate"]["failed"]),
        _table(grids.headline(report)),
        _table(grids.any_degradation(report)),
    ]
    if len(report["models"]) > 2:
        parts += ["## Models", _table(grids.models(report))]
        parts.append(_list(f"{model['name']}: {model['path']}" for model in report["models"]))
    for task in report["tasks"]:
        parts += _task_parts(report, task)
    if report["answers"]:
        parts += ["## Answers", *(part for answer in report["answers"] for part in _answer_parts(answer))]
    explained = (f"**{term}**: {_escape(text)}" for term, text in HOW_TO_READ)
    parts += ["## How to read this", "\n".join(f"* {line}" for line in explained)]
    parts += ["## Computed from", _table(grids.provenance(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_table(report: dict[str, Any]) -> Table:
    """The headline table for a terminal of 100 columns."""
    return _terminal_table(grids.headline(report), "Drift: tuned against base (%, Δ in points)")


def models_table(report: dict[str, Any]) -> Table:
    """All models for a terminal of 100 columns."""
    return _terminal_table(grids.models(report), "Models (%, Δ in points)")


def _task_parts(report: dict[str, Any], task: str) -> list[str]:
    result = report["tasks"][task]
    parts = [f"## {task_name(task)}", _list(meaning(report, task)), _table(grids.statistics(report, task))]
    parts += [_table(grids.power(report, task)), _table(grids.shifts(report, task))]
    parts.append(_table(grids.divergence(report, task)))
    if result.get("categories"):
        parts += ["### By category", _table(grids.groups(report, result["categories"], "category"))]
    if result.get("subjects"):
        parts += ["### By subject", _table(grids.groups(report, result["subjects"], "subject"))]
    return [part for part in parts if part]


def _answer_parts(answer: dict[str, str]) -> list[str]:
    """Fenced, so that an answer's own markdown stays what the model wrote."""
    sides = [part for side in ("base", "tuned") for part in (f"{side}:", _fence(answer[side]))]
    return ["**prompt**", _fence(answer["prompt"]), *sides]


def _fence(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _code(text: str) -> str:
    """Inline code; a backtick within it would end it."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _list(lines: Any) -> str:
    return "\n".join(f"* {_escape(line)}" for line in lines)


def _escape(text: str) -> str:
    """Nothing in a name may act as markup or end a table's cell."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(mark, safe)
    return text


def _table(grid: Grid) -> str:
    """A markdown table; "" where it would have no rows."""
    if not grid.rows:
        return ""
    ruler = ["---" if place == 0 or name in grid.words else "---:" for place, name in enumerate(grid.head)]
    lines = [[_escape(cell) for cell in row] for row in (grid.head, *grid.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], ruler, *lines[1:]))


def _terminal_table(grid: Grid, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    places = [place for place, name in enumerate(grid.head) if name not in TOO_WIDE]
    for place in places:
        name = grid.head[place]
        is_word = place == 0 or name in grid.words
        table.add_column(TERMINAL.get(name, name), justify="left" if is_word else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(escape(row[place]) for place in places))
    return table
