"""The noise floor: what a model answers differently when nothing changed but the batches it was asked in."""

from typing import Any

import numpy as np

from sft.eval.finished import Kept
from sft.eval.options import ScoreOptions
from sft.eval.ranks import Ranks
from sft.eval.results import HEADLINE, Record, Scored, make_records
from sft.eval.run import SIGNIFICAND_BITS, Prepared, plan
from sft.eval.score import score_requests
from sft.eval.tasks.item import NUM_CHOICES


def measure_noise(
    prepared: Prepared, model: Any, options: ScoreOptions, ranks: Ranks, scored: Scored, count: int
) -> dict[str, dict[str, Any]]:
    """Ask `count` items of each task, spread evenly, once more with half the tokens in a batch. Collective.

    Returns:
        By task: items, flips of the headline metric's choice, their rate, and the largest change of a log-likelihood.
    """
    halved = options.model_copy(
        update={
            "tokens_per_batch": max(1, options.tokens_per_batch // 2),
            "batch_size": options.batch_size and max(1, options.batch_size // 2),
        }
    )
    noise = {}
    for task, asked in prepared.asked.items():
        items = prepared.questions.items[task]
        chosen = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)).tolist()
        requests = [asked.requests[NUM_CHOICES * item + choice] for item in chosen for choice in range(NUM_CHOICES)]
        scores = score_requests(
            model,
            plan(requests, prepared.max_length, halved, scored.header["engine"]),
            len(requests),
            ranks=ranks,
            native=options.score_dtype == "native",
            lockstep=prepared.is_partitioned,
            kept=Kept(None, task, ranks.rank),
            label=f"{task}: noise floor of {prepared.folder}",
        )
        prompts = [asked.prompts[item] for item in chosen]
        again = make_records([items[item] for item in chosen], prompts, scores, SIGNIFICAND_BITS[prepared.dtype])
        before = [scored.records[task][item] for item in chosen]
        changed = [_choice(one) != _choice(other) for one, other in zip(before, again, strict=True)]
        largest = max(np.abs(np.subtract(one.lls, other.lls)).max() for one, other in zip(before, again, strict=True))
        noise[task] = {
            "items": len(chosen),
            "flips": sum(changed),
            "rate": sum(changed) / len(chosen),
            "max_abs_ll": float(largest),
        }
    return noise


def _choice(record: Record) -> int:
    return record.pred if HEADLINE[record.task] == "acc" else record.pred_norm
