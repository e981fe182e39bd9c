"""What a scored model leaves on disk: one record per item, and the accuracies computed from the records."""

import hashlib
import json
import math
import os
import sys
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


@dataclass(frozen=True)
class Scores:
    """What a model says to items of four choices."""

    lls: np.ndarray
    """float64 [items, choices]: log-likelihoods, natural logarithm, summed over the scored tokens."""
    greedy: np.ndarray
    """bool [items, choices]: every scored token is the most likely one."""


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
    """Items that share a source (subject, video, article) have correlated scores."""
    greedy: tuple[bool, ...]
    """Whether each choice is what greedy decoding would have written."""
    chars: tuple[int, ...]
    """Code points of each choice as scored, without the delimiter."""
    utf8_bytes: tuple[int, ...]
    """The same in UTF-8 bytes."""
    gap: float
    """Score of the best choice minus that of the second, under the task's headline metric; the largest float where no
    other choice has a score: JSON knows no infinity."""
    near_tie: bool
    """The gap is within what rounding may move: see tie_width."""

    def is_right(self, metric: str) -> bool:
        """Whether the item counts as right under acc or acc_norm."""
        return self.correct if metric == "acc" else self.correct_norm


@dataclass(frozen=True)
class Asked:
    """What a reader of the report sees of an item."""

    question: str
    """Without description and solved examples."""
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """One model's records by task, and what they depend on."""

    header: dict[str, Any]
    """What results.json holds under "header"; of each task under header["tasks"][task]."""
    records: dict[str, list[Record]]
    asked: dict[str, list[Asked]]
    """Beside the records, item by item; {} where the texts are not at hand."""


def make_records(items: Sequence[Item], prompts: Sequence[str], scores: Scores, significand_bits: int) -> list[Record]:
    """Records of items in order.

    Args:
        items: what was asked.
        prompts: the context of each, as it was tokenised.
        scores: log-likelihoods and greedy flags.
        significand_bits: of the dtype that was computed in: 8 for bf16, 24 for fp32.
    """
    rows = zip(items, prompts, scores.lls, scores.greedy, strict=True)
    return [_make_record(item, prompt, lls, greedy, significand_bits) for item, prompt, lls, greedy in rows]


def _make_record(item: Item, prompt: str, lls: np.ndarray, greedy: np.ndarray, significand_bits: int) -> Record:
    chars = tuple(len(text) for text in item.choices)
    # An ending that consisted of tags only has no characters left: lm_eval divides by zero and gets -inf.
    per_char = [ll / length if length else -np.inf for ll, length in zip(lls, chars, strict=True)]
    pred, pred_norm = int(np.argmax(lls)), int(np.argmax(per_char))
    is_norm = HEADLINE[item.task] == "acc_norm"
    best, second = sorted(per_char if is_norm else lls.tolist(), reverse=True)[:2]
    gap = 0.0 if best == second else min(float(best - second), sys.float_info.max)
    width = tie_width(float(lls[pred_norm if is_norm else pred]), significand_bits)
    return Record(
        task=item.task,
        subject=item.subject,
        doc_id=item.doc_id,
        gold=item.gold,
        lls=tuple(lls.tolist()),
        pred=pred,
        pred_norm=pred_norm,
        correct=pred == item.gold,
        correct_norm=pred_norm == item.gold,
        prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
        cluster=item.cluster,
        greedy=tuple(bool(flag) for flag in greedy),
        chars=chars,
        utf8_bytes=tuple(len(text.encode()) for text in item.choices),
        gap=gap,
        near_tie=bool(gap <= (width / chars[pred_norm] if is_norm and chars[pred_norm] else width)),
    )


def tie_width(ll: float, significand_bits: int) -> float:
    """Two units in the last place of a log-likelihood stored in a dtype: closer scores may change places by rounding.

    (lm_eval's bf16 sums have a spacing of 0.5 between 64 and 128.)
    """
    exponent = math.frexp(ll)[1]  # |ll| in [2^(exponent - 1), 2^exponent)
    return 2 * math.ldexp(1.0, exponent - significand_bits)


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
    return _group_accuracy(records) | {
        "categories": {name: _group_accuracy(group) for name, group in sorted(by_category.items())},
        "subjects": {name: _accuracy(group) for name, group in sorted(by_subject.items())},
    }


def _group_accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Of several subjects: also the standard error that lm_eval prints for a group."""
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        by_subject[record.subject].append(record.correct)
    return _accuracy(records) | {"stderr_pooled": pooled_stderr(list(by_subject.values()))}


def _accuracy(records: Sequence[Record], suffix: str = "") -> dict[str, Any]:
    right = [record.is_right("acc" + suffix) for record in records]
    return {"acc" + suffix: sum(right) / len(right), "stderr" + suffix: mean_stderr(right), "n": len(right)}


def write_results(out: Path, header: dict[str, Any], records: dict[str, list[Record]]) -> dict[str, Any]:
    """Write items-<task>.jsonl and, last, results.json, whose content is returned.

    Raises:
        UserError: the folder cannot be written.
    """
    texts = {
        task: "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in group)
        for task, group in records.items()
    }
    tasks = {
        task: summarize(task, group)
        | header["tasks"][task]
        | {"records_sha256": hashlib.sha256(texts[task].encode()).hexdigest()}
        for task, group in records.items()
    }
    results = {"header": {key: value for key, value in header.items() if key != "tasks"}, "tasks": tasks}
    make_folder(out)
    try:
        for task, text in texts.items():
            write_atomically(out / f"items-{task}.jsonl", text)
        write_atomically(out / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    return results


def make_folder(out: Path) -> None:
    """Create a folder, and prove that it can be written: hours of scoring are not lost to a typo.

    Raises:
        UserError: the folder cannot be created or written.
    """
    probe = out / ".write-test"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
