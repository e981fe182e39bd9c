"""Requests in, log-likelihoods out: work dealt over ranks, kept as it is done, and proved on the loaded model."""

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft.errors import UserError
from sft.eval.finished import Kept
from sft.eval.forward import Answers, idle, score_bin
from sft.eval.ranks import Ranks
from sft.eval.requests import Request
from sft.eval.results import Scores
from sft.eval.tasks.item import NUM_CHOICES
from sft.eval.tree import Bin, Row, deal, distinct_rows, plan_packed, plan_plain
from sft.progress import track

PROBE_ROWS = (4, 16)
PROBE_TOKENS = 4096
"""The engines are compared on inputs of neighbouring items, which share what the real ones share: 16 of them, or from
4 on as many as have this many tokens."""
PROBE_LIMIT = {torch.float32: (1e-3, 0.0), torch.bfloat16: (0.2, 0.05), torch.float16: (0.05, 0.01)}
"""Largest difference between the engines in nats: a constant, and so much per scored token. A branch that sees its
neighbour is off by whole nats; in bf16 another order of summation alone moves a token by a few hundredths."""


def score_requests(
    model: Any,
    bins: Sequence[Bin],
    count: int,
    *,
    ranks: Ranks,
    native: bool,
    lockstep: bool,
    kept: Kept,
    label: str,
) -> Scores:
    """What the model says to `count` requests; the same for every number of ranks.

    Args:
        model: transformers causal LM with sdpa attention, on `ranks.device`.
        bins: the plan, which holds every request once; see sft.eval.tree.
        count: number of requests.
        ranks: among whom the bins are dealt.
        native: softmax and sums in the model's dtype.
        lockstep: every rank calls the model equally often (its weights are spread over the ranks).
        kept: bins that need not be computed again, and where finished ones go.
        label: name of the progress bar.

    Raises:
        UserError: a score is not finite.
        OSError: finished bins cannot be kept.
    """
    done: dict[int, list[Answers]] = kept.read(bins) if ranks.rank == 0 else {}
    known = set(ranks.from_first(sorted(done)))
    if ranks.rank == 0 and done:
        sys.stderr.write(f"{label}: {len(done)} of {len(bins)} parts are kept from the interrupted run\n")
    todo = [index for index in range(len(bins)) if index not in known]
    dealt = [[todo[place] for place in places] for places in deal([bins[index] for index in todo], ranks.world)]
    with closing(kept):
        for index in track(dealt[ranks.rank], label, visible=ranks.rank == 0):
            answers = list(score_bin(model, bins[index], ranks.device, native))
            done[index] = answers
            kept.write(index, answers)
    if lockstep:
        calls = [sum(bins[index].num_forwards for index in own) for own in dealt]
        for _ in range(max(calls) - calls[ranks.rank]):
            idle(model, ranks.device)
    scores = _merge([part for answers in done.values() for part in answers], count, ranks)
    if not np.isfinite(scores.lls).all():
        raise UserError(
            f"{label}: {int((~np.isfinite(scores.lls)).sum())} of {count} scores are not finite; "
            "the weights hold NaN or infinite values, or overflow in this dtype (try --dtype fp32)"
        )
    return scores


def why_not_packed(config: Any, longest: int) -> str | None:
    """A reason, known from the config, for which rows may not be packed on this model; None without one.

    Args:
        config: transformers config.
        longest: ids of the longest input.
    """
    config = getattr(config, "text_config", None) or config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < longest:
        return f"its attention sees {window} tokens, the longest item has {longest}"
    other = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
    if other and window is None:
        return f"it has layers of type {', '.join(sorted(other))}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return f"its rotary frequencies ({rope['rope_type']}) depend on the length of a row"
    return None


def compare_engines(
    model: Any, requests: Sequence[Request], max_length: int, tokens_per_batch: int, ranks: Ranks
) -> tuple[float, float]:
    """(largest difference between plain and packed, the limit) in nats, on a few items in the middle. Collective.

    Every rank computes the same, so that a model in lock-step takes part; scores in fp32 whatever is chosen later. A
    model that cannot take the tree's mask, positions or kept keys at all differs by infinity.
    """
    sample, rows = _choose_sample(requests, max_length)
    lls = [_score_alone(model, plan_plain(rows, tokens_per_batch, None), len(sample), ranks)]
    try:
        lls.append(_score_alone(model, plan_packed(rows, tokens_per_batch), len(sample), ranks))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        lls.append(np.full(len(sample), np.nan))
    constant, per_token = PROBE_LIMIT[model.dtype]
    limits = constant + per_token * np.array([len(request.cont_ids) for request in sample])
    # where plain rows give NaN it is no matter of the engine, and score_requests refuses it by its right name
    differences = np.where(np.isfinite(lls[0]), np.nan_to_num(np.abs(lls[0] - lls[1]), nan=np.inf), 0.0)
    worst = int(np.argmax(differences / limits))
    found: list[Any] = [(float(differences[worst]), float(limits[worst]))] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(found, found[0])
    difference, limit = max(found, key=lambda pair: pair[0] / pair[1])  # of one rank: the limits may differ, too
    return difference, limit


def check_vocabulary(model: Any, requests: Sequence[Request]) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        UserError: naming the largest id and the number of embeddings.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = max((int(max(request.ctx_ids.max(), request.cont_ids.max())) for request in requests), default=0)
    if largest >= rows:
        raise UserError(
            f"the tokenizer gives id {largest}, the model has {rows} embeddings; is it the model's own tokenizer?"
        )


def _choose_sample(requests: Sequence[Request], max_length: int) -> tuple[Sequence[Request], list[Row]]:
    """Requests of whole items from the middle on, and their inputs."""
    fewest, most = PROBE_ROWS
    start = max(0, len(requests) // NUM_CHOICES // 2 - most // 2) * NUM_CHOICES
    for stop in range(start + NUM_CHOICES, len(requests) + 1, NUM_CHOICES):
        rows = distinct_rows(requests[start:stop], max_length)
        if len(rows) >= most or (len(rows) >= fewest and sum(len(row.ids) for row in rows) >= PROBE_TOKENS):
            break
    return requests[start:stop], rows


def _score_alone(model: Any, bins: Sequence[Bin], count: int, ranks: Ranks) -> np.ndarray:
    """Log-likelihoods by this rank, float64 [requests]."""
    parts = [part for bin in bins for part in score_bin(model, bin, ranks.device, native=False)]
    return _scatter(parts, count)[0]


def _scatter(parts: Sequence[Answers], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-likelihoods, greedy flags, how often each was written), float64 [requests]."""
    lls, greedy, written = np.zeros(count), np.zeros(count), np.zeros(count)
    for part in parts:
        np.add.at(lls, part.requests, part.lls)
        np.add.at(greedy, part.requests, part.greedy)
        np.add.at(written, part.requests, 1)
    return lls, greedy, written


def _merge(parts: Sequence[Answers], count: int, ranks: Ranks) -> Scores:
    """What all ranks scored, [items, choices].

    Raises:
        RuntimeError: a request was not scored exactly once; the dealing is wrong.
    """
    sums_3R = torch.from_numpy(np.stack(_scatter(parts, count))).to(ranks.device)
    if ranks.world > 1:
        dist.all_reduce(sums_3R)
    lls, greedy, written = sums_3R.cpu().numpy()
    if not (written == 1).all():
        raise RuntimeError(f"{int((written != 1).sum())} of {count} requests were not scored exactly once")
    return Scores(lls.reshape(-1, NUM_CHOICES), greedy.reshape(-1, NUM_CHOICES) > 0)
