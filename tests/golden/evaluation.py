"""Golden evaluation: what lm_eval asks and answers on invented text, against ours, without lm_eval being installed.

Text, tokenizers and weights are in tests/parity and the same for ever, so that what differs is ours or that of the
libraries in the stamp.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft.eval.requests import Prompting, build_requests
from sft.eval.results import Record
from sft.eval.tasks.item import Item
from sft.tokenizer import load_tokenizer
from tests.parity.jobs import BY_NAME, Job
from tests.parity.world import ask_lm_eval

FILE = Path(__file__).with_name("evaluation.json")
JOBS = [
    BY_NAME[name]
    for name in (
        "hellaswag-0",
        "mmlu-5-short",
        "hellaswag-10-short",
        "mmlu-5-bytes",
        "hellaswag-10-bytes",
        "mmlu-5-old",
        "mmlu-2-turns-system",
        "mmlu-2-turn",
        "mmlu-2-turns-refused",
        "hellaswag-2-turns",
    )
]
LARGEST = 1e-3
"""Difference of a log-likelihood at most, absolute: the specification's; fp32 differs by 6e-5."""


def record(world: Path) -> dict[str, Any]:
    """What is committed: lm_eval's requests and answers about a world that holds the jobs' models."""
    answers = ask_lm_eval(world, JOBS)
    return {
        "stamp": stamp(),
        "jobs": {
            job.name: {key: _sample(sample) for key, sample in answers[job.name]["samples"].items()} for job in JOBS
        },
    }


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Ids of a context, which may be a thousand, as their digest."""
    contexts = {digest_ids(ctx) for ctx, _ in sample["requests"]}
    [ctx_sha256] = contexts
    return {
        "prompt_sha256": sample["prompt_hash"],
        "ctx_sha256": ctx_sha256,
        "cont_ids": [cont for _, cont in sample["requests"]],
        "lls": [round(ll, 6) for ll in sample["lls"]],
        "pred": int(np.argmax(sample["lls"])),
        "acc": sample["acc"],
        "acc_norm": sample["acc_norm"],
    }


def digest_ids(ids: Sequence[int]) -> str:
    """sha256 of int32 ids."""
    return hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()


def asked(world: Path, job: Job, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Our requests in the form of the file, by document."""
    prompting = Prompting(job.chat, job.system_instruction, job.compat)
    found = build_requests(items, load_tokenizer(world / job.model), 2048, prompting)
    return {
        key_of(item): {
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
            "ctx_sha256": digest_ids(found.requests[4 * number].ctx_ids),
            "cont_ids": [request.cont_ids.tolist() for request in found.requests[4 * number : 4 * number + 4]],
        }
        for number, (item, prompt) in enumerate(zip(items, found.prompts, strict=True))
    }


def answered(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Our scores in the form of the file, by document."""
    return {
        key_of(record): {
            "lls": list(record.lls),
            "pred": record.pred,
            "acc": float(record.correct),
            "acc_norm": float(record.correct_norm) if record.task == "hellaswag" else None,
        }
        for record in records
    }


def key_of(entry: Item | Record) -> str:
    """lm_eval's task and the document's number."""
    return f"mmlu_{entry.subject}/{entry.doc_id}" if entry.task == "mmlu" else f"hellaswag/{entry.doc_id}"


def differences(ours: dict[str, dict[str, Any]], golden: dict[str, dict[str, Any]]) -> list[str]:
    """One line for every field of a document that is not lm_eval's."""
    if ours.keys() != golden.keys():
        return [f"documents: {len(ours)} against {len(golden)}, or other ones"]
    return [
        f"{key}: {field} is {value}, lm_eval's {golden[key][field]}"
        for key, sample in ours.items()
        for field, value in sample.items()
        if not _is_equal(field, value, golden[key][field])
    ]


def _is_equal(field: str, ours: Any, theirs: Any) -> bool:
    if field == "lls":
        return bool(np.abs(np.subtract(ours, theirs)).max() <= LARGEST)
    return bool(ours == theirs)


def stamp() -> dict[str, str]:
    """What recorded the file."""
    names = ("lm_eval", "torch", "transformers", "tokenizers", "numpy")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def read() -> dict[str, Any]:
    """The committed file."""
    return dict(json.loads(FILE.read_text()))
