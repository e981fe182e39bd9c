"""The drift report: base against tuned on the same items, as JSON, markdown and a table on the terminal."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from sft.eval.results import HEADLINE, Record
from sft.eval.run import Scored
from sft.eval.stats import LEVEL, compare_pairs
from sft.eval.tasks.mmlu import category_of

COLUMNS = ("n", "base %", "tuned %", "Δ points", "95 % interval", "right→wrong", "wrong→right", "McNemar p", "verdict")
SHORT_COLUMNS = ("n", "base", "tuned", "Δ points", "95 % interval", "lost", "won", "p", "verdict")
METRICS = {"mmlu": ("acc",), "hellaswag": ("acc_norm", "acc")}
"""Metrics of each task, the headline first."""

HOW_TO_READ = """\
## How to read this

* **Δ points**: accuracy of the tuned model minus that of the base, in percentage points, on the same items.
* **95 % interval**: range of true differences that fit what was seen: Tango's score interval of the paired answers,
  which holds for few items too. From 10 sources (subjects, videos, articles) on it is widened, where needed, to the
  interval that allows for items of one source changing together.
* **right→wrong / wrong→right**: items that only the base, or only the tuned model, answers right. Both may be large
  while Δ is near zero: the model changed, its accuracy did not.
* **McNemar p**: exact two-sided test that losses and gains are equally likely.
* **Verdict**: *degraded* or *improved* only where the whole interval lies on one side of zero and McNemar's p is below
  0.05; below six changed items it cannot be. *No change shown* is no proof of equality: drops as large as the
  interval's lower end remain possible. More items narrow it.
* Subjects are exploratory: with dozens of them, a few look degraded or improved by chance.
* The intervals do not cover the choice of prompts and solved examples, nor items that were in the training data.
"""


def compare(base: Scored, tuned: Scored, max_drop: float | None) -> dict[str, Any]:
    """The content of drift.json: every figure of the report."""
    tasks = {task: _compare_task(task, base.records[task], tuned.records[task]) for task in base.records}
    failed = [
        f"{task} {result['metric']} dropped by {100 * result['drop']:.2f} points, allowed are {100 * max_drop:.2f}"
        for task, result in tasks.items()
        if max_drop is not None and result["drop"] > max_drop
    ]
    return {
        "base": base.header,
        "tuned": tuned.header,
        "level": LEVEL,
        "tasks": tasks,
        "gate": {"max_drop": max_drop, "passed": not failed if max_drop is not None else None, "failed": failed},
    }


def to_markdown(report: dict[str, Any]) -> str:
    """drift.md: the headline table, the gate, subjects, how to read it, and what it was computed from."""
    lines = ["# Drift report", "", f"base: `{report['base']['model']}`  ", f"tuned: `{report['tuned']['model']}`", ""]
    lines += _markdown_table("task", task_rows(report))
    lines += ["", gate_line(report), ""]
    for task, result in report["tasks"].items():
        if "subjects" in result:
            rows = [(name, row) for part in ("categories", "subjects") for name, row in result[part].items()]
            lines += [f"## {task} by category and subject", "", *_markdown_table("subject", rows), ""]
    lines += [HOW_TO_READ, "## Computed from", ""]
    for key in ("data", "dtype", "device", "attention", "max_length", "tokens_per_batch", "limit", "parity_with"):
        lines.append(f"* {key}: {report['base'][key]}")
    for task, details in report["base"]["tasks"].items():
        lines.append(f"* {details['source']}")
        lines.append(
            f"* {task}: {details['shots']}-shot, items sha256 `{details['items_sha256'][:16]}`, "
            f"{details['truncated_items']} of {report['tasks'][task]['n']} items longer than max_length, cut at their "
            "beginning"
        )
    lines += [
        f"* weights sha256: base `{report['base']['weights_sha256'][:16]}`, "
        f"tuned `{report['tuned']['weights_sha256'][:16]}`"
    ]
    return "\n".join(lines) + "\n"


def to_table(report: dict[str, Any]) -> Table:
    """The headline table for the terminal."""
    table = Table("task", *SHORT_COLUMNS, title="Drift: tuned against base", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, row in task_rows(report):
        table.add_row(name, *_cells(row))
    return table


def task_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, figures) of every task and metric, the headline metric of each task first."""
    return [
        (f"{task} {metric}", result["metrics"][metric])
        for task, result in report["tasks"].items()
        for metric in METRICS[task]
    ]


def gate_line(report: dict[str, Any]) -> str:
    """One sentence on the gate."""
    gate = report["gate"]
    if gate["max_drop"] is None:
        return "No gate was set (--gate.max_drop)."
    allowed = f"{100 * gate['max_drop']:.2f} points"
    return f"Gate failed: {'; '.join(gate['failed'])}." if gate["failed"] else f"Gate passed: no drop beyond {allowed}."


def _compare_task(task: str, base: Sequence[Record], tuned: Sequence[Record]) -> dict[str, Any]:
    metrics = {metric: _compare_records(base, tuned, metric) for metric in METRICS[task]}
    headline = HEADLINE[task]
    result = metrics[headline] | {"metric": headline, "metrics": metrics}
    if task == "mmlu":
        result["categories"] = _compare_groups(base, tuned, headline, "category")
        result["subjects"] = _compare_groups(base, tuned, headline, "subject")
    return result


def _compare_groups(base: Sequence[Record], tuned: Sequence[Record], metric: str, key: str) -> dict[str, Any]:
    groups: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for before, after in zip(base, tuned, strict=True):
        if name := before.subject if key == "subject" else category_of(before.subject):
            groups[name][0].append(before)
            groups[name][1].append(after)
    return {name: _compare_records(*groups[name], metric) for name in sorted(groups)}


def _compare_records(base: Sequence[Record], tuned: Sequence[Record], metric: str) -> dict[str, Any]:
    pair = compare_pairs(
        [record.is_right(metric) for record in base],
        [record.is_right(metric) for record in tuned],
        [record.cluster for record in base],
    )
    return asdict(pair) | {"interval": list(pair.interval), "drop": pair.drop, "verdict": pair.verdict}


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [
        str(row["n"]),
        f"{100 * row['base']:.2f}",
        f"{100 * row['tuned']:.2f}",
        f"{100 * row['delta']:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        str(row["right_to_wrong"]),
        str(row["wrong_to_right"]),
        f"{row['mcnemar_p']:.3g}",
        row["verdict"],
    ]


def _markdown_table(first: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    head = [first, *COLUMNS]
    body = [[name, *_cells(row)] for name, row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
