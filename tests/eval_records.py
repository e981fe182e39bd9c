"""Records of invented items, for tests of the statistics."""

import math

import numpy as np

from sft.eval.results import Record


def invented_record(
    lls, gold, *, task="mmlu", subject=None, doc_id=0, chars=(1, 1, 1, 1), utf8_bytes=None, cluster="x"
) -> Record:
    """What a model with these log-likelihoods leaves of an item."""
    per_char = [ll / length if length else -math.inf for ll, length in zip(lls, chars, strict=True)]
    pred, pred_norm = int(np.argmax(lls)), int(np.argmax(per_char))
    return Record(
        task=task,
        subject=subject or cluster,
        doc_id=doc_id,
        gold=gold,
        lls=tuple(float(ll) for ll in lls),
        pred=pred,
        pred_norm=pred_norm,
        correct=pred == gold,
        correct_norm=pred_norm == gold,
        prompt_sha256="",
        cluster=cluster,
        greedy=(False,) * 4,
        chars=chars,
        utf8_bytes=utf8_bytes or chars,
        gap=0.0,
        near_tie=False,
    )
