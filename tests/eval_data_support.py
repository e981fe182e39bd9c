"""Invented results of `sft eval` and of lm_eval, written as those write them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sft.eval.results import Scores, make_records, write_results
from sft.eval.tasks.item import Item

DATE = "2026-03-04T05-06-07.123456"
SUBJECTS = ("anatomy", "virology")
ENDINGS = ("goes home.", "sings über alles.", " stays.", "")


def make_item(task: str, subject: str, doc_id: int) -> Item:
    return Item(
        task=task,
        subject=subject,
        doc_id=doc_id,
        description="",
        shots=(),
        question=f"What of {subject} {doc_id}?",
        choices=("A", "B", "C", "D") if task == "mmlu" else ENDINGS,
        gold=doc_id % 4,
        cluster=subject if task == "mmlu" else f"video~{doc_id // 2}",
    )


def make_items(task: str, count: int = 3) -> list[Item]:
    subjects = SUBJECTS if task == "mmlu" else ("hellaswag",)
    return [make_item(task, subject, doc_id) for subject in subjects for doc_id in range(count)]


def lls_of(items: list[Item], shift: float = 0.0) -> np.ndarray:
    """float64 [items, choices], clear of ties."""
    rng = np.random.RandomState(len(items))
    return -(10 + 20 * rng.rand(len(items), 4)) - shift


def write_sft(folder: Path, tasks: tuple[str, ...] = ("mmlu", "hellaswag"), **header: Any) -> Path:
    """A folder of `sft eval`."""
    records, facts = {}, {}
    for task in tasks:
        items = make_items(task)
        lls = lls_of(items)
        records[task] = make_records(items, [item.context for item in items], Scores(lls, lls > -12), 24)
        facts[task] = {"shots": 0, "items_sha256": "i" * 64, "requests_sha256": "r" * 64, "source": "invented"}
    write_results(
        folder,
        {
            "model": "m",
            "dtype": "float32",
            "score_dtype": "fp32",
            "max_length": 512,
            "engine": "packed",
            "compat": "lm_eval>=0.4.9.2",
            "chat": "none",
            "chat_template_sha256": None,
            "system_instruction": None,
            "versions": {"sft": "1"},
            "tasks": facts,
            **header,
        },
        records,
    )
    return folder


def sample_row(item: Item, lls: np.ndarray, delimiter: str = " ") -> dict[str, Any]:
    """One line of samples_<task>_<date>.jsonl, as lm_eval 0.4.13 writes it."""
    prompt = f"Before.\n\n{item.question}"
    doc: dict[str, Any] = {"subject": item.subject, "question": f" {item.question} ", "choices": ["w", "x", "y", "z"]}
    if item.task == "hellaswag":
        doc = {
            "source_id": item.cluster,
            "query": item.question,
            "choices": list(item.choices),
            "label": str(item.gold),
        }
    per_char = [ll / len(choice) if choice else -np.inf for ll, choice in zip(lls, item.choices, strict=True)]
    answers = [[str(ll), str(bool(ll > -12))] for ll in lls.tolist()]
    row = {
        "doc_id": item.doc_id,
        "doc": doc,
        "target": str(item.gold),
        "arguments": {
            f"gen_args_{number}": {"arg_0": prompt, "arg_1": delimiter + choice}
            for number, choice in enumerate(item.choices)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": "d" * 64,
        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest(),
        "target_hash": "t" * 64,
        "acc": float(np.argmax(lls) == item.gold),
    }
    return row if item.task == "mmlu" else row | {"acc_norm": float(np.argmax(per_char) == item.gold)}


def sample_rows(task: str, delimiter: str = " ") -> dict[str, list[dict[str, Any]]]:
    """Lines by lm_eval's task name."""
    items = make_items(task)
    rows: dict[str, list[dict[str, Any]]] = {}
    for item, lls in zip(items, lls_of(items), strict=True):
        name = item.subject if task == "hellaswag" else f"mmlu_{item.subject}"
        rows.setdefault(name, []).append(sample_row(item, lls, delimiter))
    return rows


def results_of(names: list[str], **changes: Any) -> dict[str, Any]:
    """results_<date>.json, as far as it is read."""
    return {
        "n-shot": dict.fromkeys(names, 0),
        "n-samples": {name: {"original": 100, "effective": 3} for name in names},
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "m", "dtype": "bfloat16", "softmax_dtype": "float32"},
            "model_dtype": "torch.bfloat16",
            "batch_size": "4",
            "device": "cpu",
            "limit": 3.0,
        },
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "max_length": 512,
        "model_name": "m",
        "system_instruction": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
    } | changes


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_samples(home: Path, date: str = DATE, delimiter: str = " ", **changes: Any) -> Path:
    """The folder that lm_eval makes below --output_path."""
    home.mkdir(parents=True, exist_ok=True)
    rows = sample_rows("mmlu", delimiter) | sample_rows("hellaswag", delimiter)
    for name, group in rows.items():
        write_lines(home / f"samples_{name}_{date}.jsonl", group)
    (home / f"results_{date}.json").write_text(json.dumps(results_of(list(rows), **changes)))
    return home
