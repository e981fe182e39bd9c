"""A bin of token trees in, log-likelihoods out.

Shapes: B trees of a batch, T padded tokens of each, P tokens of the prefix, N positions with logits, R requests,
L scored tokens of the longest of them, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft.eval.tree import Bin, Tree

POSITIONS_PER_SOFTMAX = 128
"""Positions whose logits are widened to fp32 at a time: what a CPU's cache holds at a vocabulary of 32k."""


@dataclass(frozen=True)
class Answers:
    """What one forward says: of R requests."""

    requests: np.ndarray
    """int64 [R]: their numbers."""
    lls: np.ndarray
    """float64 [R]: log-likelihoods, natural logarithm, summed over the scored tokens."""
    greedy: np.ndarray
    """bool [R]: every scored token is the most likely one."""


@torch.inference_mode()
def score_bin(model: Any, bin: Bin, device: torch.device, native: bool) -> Iterator[Answers]:
    """Answers to the requests of a bin, batch by batch; `bin.num_forwards` calls of the model.

    Args:
        model: transformers causal LM with sdpa attention.
        bin: what to compute.
        device: where the model is.
        native: log-softmax and sums in the model's dtype, as lm_eval's default; else in fp32 and float64.
    """
    cache = None
    if len(bin.prefix):
        from sft.eval.prefix_keys import compute_prefix

        cache = compute_prefix(model, torch.from_numpy(bin.prefix.astype(np.int64)).to(device)[None])
    for trees in bin.batches:
        yield _score_batch(model, trees, len(bin.prefix), cache, device, native)


@torch.inference_mode()
def idle(model: Any, device: torch.device) -> None:
    """A forward of one token, whose collectives other ranks of a partitioned model wait for."""
    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False, logits_to_keep=1)


def _score_batch(
    model: Any, trees: Sequence[Tree], prefix: int, cache: Any, device: torch.device, native: bool
) -> Answers:
    width = max(len(tree.ids) for tree in trees)
    ids_BT = np.zeros((len(trees), width), dtype=np.int64)
    pos_BT = np.zeros_like(ids_BT)
    end_BT = np.tile(np.arange(1, width + 1), (len(trees), 1))  # padding sees itself: no row of the mask is empty
    keep_BT = np.zeros(ids_BT.shape, dtype=bool)
    for row, tree in enumerate(trees):
        length = len(tree.ids)
        ids_BT[row, :length], pos_BT[row, :length], end_BT[row, :length] = tree.ids, tree.depth, tree.end
        for scored in tree.scored:
            keep_BT[row, scored.positions] = True
    is_causal = not prefix and all(bool((tree.end == len(tree.ids)).all()) for tree in trees)
    ids, keep = torch.from_numpy(ids_BT).to(device), torch.from_numpy(keep_BT).to(device)
    if is_causal:  # rows without branches: padding stands right of all that counts, as in lm_eval
        logits_NV = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    else:
        logits_NV = model(
            input_ids=ids,
            position_ids=torch.from_numpy(pos_BT + prefix).to(device),
            attention_mask=_ancestors(torch.from_numpy(end_BT).to(device), prefix, model.dtype),
            past_key_values=cache,
            use_cache=False,
            logits_to_keep=keep,
        ).logits
    place_BT = (np.cumsum(keep_BT.reshape(-1)) - 1).reshape(keep_BT.shape)
    places = [place_BT[row, scored.positions] for row, tree in enumerate(trees) for scored in tree.scored]
    asked = [scored for tree in trees for scored in tree.scored]
    lls, greedy = _log_likelihoods(logits_NV, places, [scored.targets for scored in asked], native)
    return Answers(np.array([scored.request for scored in asked]), lls, greedy)


def _ancestors(end_BT: torch.Tensor, prefix: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, P + T], added to attention's scores: 0 for the prefix, itself and its ancestors, else -inf.

    (Of truth values every layer would make the same sums anew.)
    """
    order_T = torch.arange(end_BT.shape[1], device=end_BT.device)
    mask_BTT = (order_T[None, :, None] >= order_T) & (order_T[None, :, None] < end_BT[:, None, :])
    added_BTT = torch.zeros(mask_BTT.shape, dtype=dtype, device=end_BT.device).masked_fill_(~mask_BTT, -torch.inf)
    return torch.nn.functional.pad(added_BTT, (prefix, 0))[:, None]


def _log_likelihoods(
    logits_NV: torch.Tensor, places: Sequence[np.ndarray], targets: Sequence[np.ndarray], native: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(log-likelihood float64 [R], greedy bool [R]); places index N, and may occur several times."""
    length = max(len(ids) for ids in targets)
    both_RL = np.zeros((2, len(targets), length), dtype=np.int64)
    counts_RL = np.zeros((len(targets), length), dtype=bool)
    for row, (at, ids) in enumerate(zip(places, targets, strict=True)):
        both_RL[0, row, : len(ids)], both_RL[1, row, : len(ids)], counts_RL[row, : len(ids)] = at, ids, True
    device = logits_NV.device
    place_RL, target_RL = torch.from_numpy(both_RL).to(device)
    is_scored_RL = torch.from_numpy(counts_RL).to(device)
    if native:
        logits_NV = logits_NV.log_softmax(dim=-1)
    chunks = torch.split(logits_NV, POSITIONS_PER_SOFTMAX)
    picked_RL = logits_NV[place_RL, target_RL]
    is_best_RL = picked_RL == torch.cat([chunk.amax(dim=-1) for chunk in chunks])[place_RL]
    contested = place_RL[is_best_RL]  # several tokens may share the maximum: the first of them is the greedy one
    first = [logits_NV[part].argmax(dim=-1) for part in torch.split(contested, POSITIONS_PER_SOFTMAX)]
    is_best_RL[is_best_RL.clone()] = torch.cat(first) == target_RL[is_best_RL]
    if not native:
        norm_N = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in chunks])
        picked_RL = (picked_RL.float() - norm_N[place_RL]).double()
    sums_R = picked_RL.masked_fill(~is_scored_RL, 0).sum(dim=-1).double()
    return sums_R.cpu().numpy(), (is_best_RL | ~is_scored_RL).all(dim=-1).cpu().numpy()
