"""A model folder and token requests in, log-likelihoods out.

Shapes: B rows of a batch, T padded tokens, N scored positions of a batch, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft.errors import UserError
from sft.eval.ranks import Ranks, merge
from sft.eval.requests import Request
from sft.pretrained import load_causal_lm
from sft.progress import track
from sft.tokenizer import folder_errors

ATTENTION = "sdpa"
DEFAULT_MAX_LENGTH = 2048
UNSET_MAX_LENGTH = int(1e30)
"""What transformers puts for a tokenizer without a limit."""
POSITIONS_PER_SOFTMAX = 1024
"""Positions whose logits are widened to fp32 at a time: 0.5 GB at a vocabulary of 128k."""


@dataclass(frozen=True)
class Forward:
    """One row of a batch: input ids, and the requests whose scored tokens are predicted at its end."""

    ids: np.ndarray
    scored: tuple[tuple[int, np.ndarray], ...]
    """(request number, its scored ids): they end one position after the last input id."""


def read_config(folder: str) -> Any:
    """The transformers config of a model folder.

    Raises:
        UserError: the folder or its config.json is missing, torn, or holds values that no model can have.
    """
    from transformers import AutoConfig

    path = Path(folder)
    try:
        if not path.is_dir():
            raise UserError(
                f"model {folder}: no such folder; give a local folder with config.json, safetensors and tokenizer"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"model {folder}: holds no config.json; is it a Hugging Face model folder?")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except folder_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {folder}/config.json: cannot be used: {reason}; correct or complete it") from error


def read_max_length(config: Any, tokenizer: Any) -> int:
    """Context length in tokens: the config's, else the (transformers) tokenizer's, else 2048, as lm_eval decides.

    Raises:
        UserError: the config's is not positive.
    """
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text_config, name, None)) is not None:
            if value < 1:
                raise UserError(f"model {config.name_or_path}/config.json: {name} is {value}; need at least 1 token")
            return int(value)
    limit = tokenizer.model_max_length
    return DEFAULT_MAX_LENGTH if limit is None or limit == UNSET_MAX_LENGTH else int(limit)


def load_model(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers causal LM in eval mode, from local safetensors only.

    Raises:
        UserError: config or weights are missing, torn, pickled, or do not fit each other.
    """
    read_config(folder)
    return load_causal_lm(folder, dtype=dtype, attention=ATTENTION).to(device).eval()


def score_requests(
    model: Any, requests: Sequence[Request], *, max_length: int, tokens_per_batch: int, ranks: Ranks, label: str
) -> np.ndarray:
    """Log-likelihood of every request: float64 [requests], natural logarithm, summed over the scored tokens.

    Equal inputs share one forward (MMLU's four letters do). Batches are formed before they are dealt to the
    ranks, so every rank count gives the same forwards.

    Args:
        model: transformers causal LM on `ranks.device`.
        requests: what to score.
        max_length: input tokens at most; longer ones lose their beginning.
        tokens_per_batch: padded tokens of one forward at most; a single longer row still runs.
        ranks: the replicas that share the work.
        label: name of the progress bar.

    Raises:
        UserError: a token id is outside of the model's vocabulary, or a score is not finite.
    """
    batches = make_batches(group_forwards(requests, max_length), tokens_per_batch)
    _check_vocabulary(model, requests)
    sums = torch.zeros(len(requests), dtype=torch.float64)
    written = torch.zeros(len(requests), dtype=torch.float64)
    for batch in track(batches[ranks.rank :: ranks.world], label, visible=ranks.rank == 0):
        for number, log_likelihood in _score_batch(model, batch, ranks.device):
            sums[number] += log_likelihood
            written[number] += 1
    scores = merge(sums, written, ranks).numpy()
    if not np.isfinite(scores).all():
        raise UserError(
            f"{label}: {int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite; "
            "the weights hold NaN or infinite values, or overflow in this dtype (try --dtype fp32)"
        )
    return scores


def group_forwards(requests: Sequence[Request], max_length: int) -> list[Forward]:
    """One forward per distinct input, longest first; the order does not depend on the order of the requests."""
    groups: dict[bytes, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, request in enumerate(requests):
        ids, scored_ids = request.clip(max_length)
        groups[ids.astype(">i4").tobytes()].append((number, scored_ids))
    forwards = [Forward(np.frombuffer(key, dtype=">i4"), tuple(scored)) for key, scored in groups.items()]
    return sorted(forwards, key=lambda forward: (-len(forward.ids), forward.ids.tobytes()))


def make_batches(forwards: Sequence[Forward], tokens_per_batch: int) -> list[list[Forward]]:
    """Cut forwards, sorted by falling length, into batches of at most `tokens_per_batch` padded tokens."""
    batches: list[list[Forward]] = []
    for forward in forwards:
        if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(forward)
        else:
            batches.append([forward])
    return batches


@torch.inference_mode()
def _score_batch(model: Any, batch: Sequence[Forward], device: torch.device) -> list[tuple[int, float]]:
    """(request number, log-likelihood) of a batch; log-softmax in fp32, sums in float64."""
    width = max(len(forward.ids) for forward in batch)
    ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
    keep_BT = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, forward in enumerate(batch):
        length = len(forward.ids)
        ids_BT[row, :length] = torch.from_numpy(forward.ids.astype(np.int64))
        keep_BT[row, length - max(len(scored_ids) for _, scored_ids in forward.scored) : length] = True
    # Padding stands right of all that counts, where causal attention cannot see it: no mask, as in lm_eval.
    logits_NV = model(input_ids=ids_BT.to(device), use_cache=False, logits_to_keep=keep_BT.to(device)).logits
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    end = 0
    for forward in batch:
        end += max(len(scored_ids) for _, scored_ids in forward.scored)
        for number, scored_ids in forward.scored:
            positions += range(end - len(scored_ids), end)
            targets += scored_ids.tolist()
            owners += [number] * len(scored_ids)
    log_probs = _gather_log_probs(logits_NV, torch.tensor(positions), torch.tensor(targets))
    sums: dict[int, float] = defaultdict(float)
    for number, log_prob in zip(owners, log_probs.tolist(), strict=True):
        sums[number] += log_prob
    return list(sums.items())


def _gather_log_probs(logits_NV: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) at each position, float64 on the host; a position may occur several times."""
    positions, targets = positions.to(logits_NV.device), targets.to(logits_NV.device)
    chunks = torch.split(logits_NV, POSITIONS_PER_SOFTMAX)
    logsumexp_N = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in chunks])
    return (logits_NV[positions, targets].float() - logsumexp_N[positions]).double().cpu()


def _check_vocabulary(model: Any, requests: Sequence[Request]) -> None:
    rows = model.get_input_embeddings().num_embeddings
    largest = max((int(max(request.ctx_ids.max(), request.cont_ids.max())) for request in requests), default=0)
    if largest >= rows:
        raise UserError(
            f"the tokenizer gives id {largest}, the model has {rows} embeddings; is it the model's own tokenizer?"
        )
