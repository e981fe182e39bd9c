"""What a model gained: its mean loss on held-out shards of the fine-tuning data, equal to the one that training logs.

Every document is a row of its own, so it cannot see a neighbour of its pack, whatever the attention.

Shape legend: B rows of a batch, T padded tokens, N supervised positions of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from data_prep.shards import Shards
from sft.batch import IGNORE, split_documents
from sft.errors import UserError
from sft.eval.ranks import Ranks
from sft.model_shards import open_model_shards
from sft.tokenizer import Tokenizer

POSITIONS_PER_SOFTMAX = 1024
"""Positions whose logits are widened to fp32 at a time: 0.5 GB at a vocabulary of 128k."""

Document = tuple[np.ndarray, np.ndarray]
"""(input_ids, labels), both int [length]; labels not shifted, -100 = unsupervised."""


def open_heldout(folder: str, tokenizer: Tokenizer, config: Any) -> Shards:
    """The held-out shards, for the model of this tokenizer and transformers config; reads no weights.

    Raises:
        UserError: they are missing or torn, of another tokenizer, too long for the model, or hold nothing supervised.
    """
    shards = open_model_shards("heldout", folder, tokenizer, config.get_text_config().to_dict(), str(tokenizer.path))
    if not shards.num_labels.any():
        raise UserError(
            f"heldout {folder}: holds no supervised token; give the heldout/ folder of the fine-tuning data"
        )
    return shards


@torch.inference_mode()
def heldout_loss(
    model: Any, folder: str, ranks: Ranks, tokenizer: Tokenizer, *, tokens_per_batch: int, lockstep: bool = False
) -> float:
    """Mean of -log p per supervised token, natural logarithm, over all held-out documents; collective.

    Softmax in fp32, sums in float64: training's held-out loss in the same dtype, within what the order of sums moves.

    Args:
        model: transformers causal LM on `ranks.device`, in eval mode.
        folder: heldout/ of a preparation.
        ranks: the processes that share the documents.
        tokenizer: the model's.
        tokens_per_batch: padded tokens of one forward at most; a single longer document still runs.
        lockstep: every rank runs the same number of forwards, as weights that are spread over the ranks need.

    Raises:
        UserError: the shards cannot be used with this model (see open_heldout), or the loss is not finite.
    """
    shards = open_heldout(folder, tokenizer, model.config)
    documents = [document for row in range(len(shards)) for document in split_documents(shards.pack(row))]
    batches = _make_batches([document for document in documents if _num_targets(document)], tokens_per_batch)
    own = batches[ranks.rank :: ranks.world]
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in own:
        total += _summed_loss(model, batch, ranks.device)
    if lockstep:
        for _ in range(-(-len(batches) // ranks.world) - len(own)):
            _summed_loss(model, [_FILLER], ranks.device)
    if ranks.world > 1:
        dist.all_reduce(total)
    loss = total.item() / int(shards.num_labels.sum())
    if not np.isfinite(loss):
        raise UserError(
            f"heldout {folder}: the loss of {tokenizer.path} is not finite; its weights hold NaN or infinite values, "
            "or overflow in this dtype (try --dtype fp32)"
        )
    return loss


_FILLER: Document = (np.zeros(2, np.int32), np.zeros(2, np.int32))
"""What a rank without work computes; its loss is not used."""


def _num_targets(document: Document) -> int:
    """Supervised tokens that have a token before them."""
    return int((document[1][1:] != IGNORE).sum())


def _make_batches(documents: Sequence[Document], tokens_per_batch: int) -> list[list[Document]]:
    """Documents of falling length, so that a batch holds little padding; formed before they are dealt to ranks."""
    batches: list[list[Document]] = []
    for document in sorted(documents, key=lambda document: -len(document[0])):
        if batches and len(batches[-1][0][0]) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(document)
        else:
            batches.append([document])
    return batches


def _summed_loss(model: Any, batch: Sequence[Document], device: torch.device) -> torch.Tensor:
    """Sum of -log p over the supervised tokens of a batch: float64 scalar."""
    width = max(len(ids) for ids, _ in batch)
    ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
    next_BT = torch.full((len(batch), width), IGNORE, dtype=torch.long)
    for row, (ids, labels) in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        next_BT[row, : len(ids) - 1] = torch.from_numpy(labels[1:].astype(np.int64))
    keep_BT = next_BT != IGNORE
    targets_N = next_BT[keep_BT].to(device)
    # Padding stands right of all that counts, where causal attention cannot see it: no mask.
    logits_NV = model(input_ids=ids_BT.to(device), use_cache=False, logits_to_keep=keep_BT.to(device)).logits
    chunks = zip(logits_NV.split(POSITIONS_PER_SOFTMAX), targets_N.split(POSITIONS_PER_SOFTMAX), strict=True)
    losses = [cross_entropy(logits.float(), targets, reduction="none").double().sum() for logits, targets in chunks]
    return torch.stack(losses).sum()
