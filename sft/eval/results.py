"""What a scored model leaves on disk: one record per item, and the accuracies computed from the records."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import UserError
from sft.eval.stats import mean_stderr, pooled_stderr
from sft.eval.tasks.item import Item
from sft.eval.tasks.mmlu import category_of

HEADLINE = {"mmlu": "acc", "hellaswag": "acc_norm"}
"""The metric of each task that papers quote, and that the gate looks at."""
RESULT_FILES = ("results.json", *(f"items-{task}.jsonl" for task in HEADLINE))
"""All that a scored model may leave; results.json vouches for the records beside it: written last, removed first."""


@dataclass(frozen=True)
class Record:
    """One scored item; ties go to the first choice, as in numpy.argmax."""

    task: str
    subject: str
    doc_id: int
    gold: int
    lls: tuple[float, ...]
    """Log-likelihood of each choice, natural logarithm."""
    pred: int
    """Most likely choice."""
    pred_norm: int
    """Choice with the highest log-likelihood per character (code points, without the delimiter)."""
    correct: bool
    correct_norm: bool
    prompt_sha256: str
    """sha256 of the context; lm_eval's prompt_hash."""
    cluster: str

    def is_right(self, metric: str) -> bool:
        """Whether the item counts as right under acc or acc_norm."""
        return self.correct if metric == "acc" else self.correct_norm


def make_records(items: Sequence[Item], scores: np.ndarray) -> list[Record]:
    """Records of items in order. `scores`: float64 [items, choices]."""
    records = []
    for item, lls in zip(items, scores, strict=True):
        # An ending that consisted of tags only has no characters left: lm_eval divides by zero and gets -inf.
        per_char = [ll / len(text) if text else -np.inf for ll, text in zip(lls, item.choices, strict=True)]
        pred, pred_norm = int(np.argmax(lls)), int(np.argmax(per_char))
        records.append(
            Record(
                task=item.task,
                subject=item.subject,
                doc_id=item.doc_id,
                gold=item.gold,
                lls=tuple(lls.tolist()),
                pred=pred,
                pred_norm=pred_norm,
                correct=pred == item.gold,
                correct_norm=pred_norm == item.gold,
                prompt_sha256=hashlib.sha256(item.context.encode()).hexdigest(),
                cluster=item.cluster,
            )
        )
    return records


def summarize(task: str, records: Sequence[Record]) -> dict[str, Any]:
    """Accuracies of one task. MMLU: also per category and subject; all means are over items, as in lm_eval."""
    if task == "hellaswag":
        return _accuracy(records) | _accuracy(records, "_norm")
    by_subject: dict[str, list[Record]] = defaultdict(list)
    by_category: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_subject[record.subject].append(record)
        if category := category_of(record.subject):
            by_category[category].append(record)
    pooled = pooled_stderr([[record.correct for record in group] for group in by_subject.values()])
    return _accuracy(records) | {
        "stderr_pooled": pooled,
        "categories": {name: _accuracy(group) for name, group in sorted(by_category.items())},
        "subjects": {name: _accuracy(group) for name, group in sorted(by_subject.items())},
    }


def _accuracy(records: Sequence[Record], suffix: str = "") -> dict[str, Any]:
    right = [record.is_right("acc" + suffix) for record in records]
    return {"acc" + suffix: sum(right) / len(right), "stderr" + suffix: mean_stderr(right), "n": len(right)}


def write_results(out: Path, header: dict[str, Any], records: dict[str, list[Record]]) -> dict[str, Any]:
    """Write items-<task>.jsonl and, last, results.json, whose content is returned.

    Raises:
        UserError: the folder cannot be written.
    """
    tasks = {task: summarize(task, group) | header["tasks"][task] for task, group in records.items()}
    results = {"header": {key: value for key, value in header.items() if key != "tasks"}, "tasks": tasks}
    make_folder(out, RESULT_FILES)
    try:
        for task, group in records.items():
            lines = [json.dumps(asdict(record)) + "\n" for record in group]
            write_atomically(out / f"items-{task}.jsonl", "".join(lines))
        write_atomically(out / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    return results


def make_folder(out: Path, names: Sequence[str]) -> None:
    """Create a folder, remove the files of these names that an earlier run left, and prove that it can be written.

    Called before the scoring too: hours of it are not lost to a typo, and a run that fails leaves no older results.

    Raises:
        UserError: the folder cannot be created or written, or one of the names is taken by a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created: {error.strerror or error}; choose another folder") from None
    probe = out / ".write-test"
    path = probe
    try:
        probe.write_text("")
        probe.unlink()
        for path in [out / name for name in names]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}; choose another folder") from None


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
