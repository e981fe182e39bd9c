"""Items to token requests: what lm_eval's `_encode_pair` gives its models, with the checks it lacks.

A folder with a bare tokenizer.model is encoded by sentencepiece here, while lm_eval would go through
transformers' conversion of it: there, and only there, the ids may differ.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft.errors import UserError
from sft.eval.tasks.item import NUM_CHOICES, Item
from sft.tokenizer import Tokenizer

ITEMS_PER_CALL = 256
"""Items encoded in one call: bounds the memory that the tokenizer's own lists take."""


@dataclass(frozen=True)
class Request:
    """One continuation to be scored behind its context; int32 ids, BOS included, not truncated."""

    ctx_ids: np.ndarray
    cont_ids: np.ndarray

    def clip(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, scored ids): the last max_length + 1 tokens; the model reads all but the last of them."""
        ids = np.concatenate([self.ctx_ids, self.cont_ids])
        return ids[-(max_length + 1) :][:-1], self.cont_ids

    def is_cut(self, max_length: int) -> bool:
        """Whether `clip` drops tokens from the beginning."""
        return len(self.ctx_ids) + len(self.cont_ids) > max_length + 1


def build_requests(items: Sequence[Item], tokenizer: Tokenizer, max_length: int) -> list[Request]:
    """Requests of all items, choice by choice: request 4 i + c scores choice c of item i.

    BOS stands where the tokenizer itself puts one (lm_eval >= 0.4.9.2; older versions scored Llama without).

    Raises:
        UserError: the tokenizer appends tokens to a text, or does not keep an item's context as a prefix of
            context + continuation, or a continuation is empty or longer than max_length.
    """
    check_special_tokens(tokenizer)
    requests: list[Request] = []
    for start in range(0, len(items), ITEMS_PER_CALL):
        requests += _encode_items(items[start : start + ITEMS_PER_CALL], tokenizer, max_length)
    return requests


def count_truncated(requests: Sequence[Request], max_length: int) -> int:
    """Items of which at least one request loses its beginning, as in lm_eval."""
    return len({number // NUM_CHOICES for number, request in enumerate(requests) if request.is_cut(max_length)})


def digest_requests(requests: Sequence[Request]) -> str:
    """sha256 over all ids and where the scored ones begin: equal if two tokenizers ask the same of their models."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(np.array([len(request.ctx_ids), len(request.cont_ids)], dtype="<i8").tobytes())
        digest.update(request.ctx_ids.astype("<i4").tobytes())
        digest.update(request.cont_ids.astype("<i4").tobytes())
    return digest.hexdigest()


def check_special_tokens(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that adds more than a BOS: with an EOS after the context all choices score the same.

    Raises:
        UserError: naming the tokens that the tokenizer adds.
    """
    plain = tokenizer.hf.encode("a", add_special_tokens=False)
    added = tokenizer.hf.encode("a")[len(tokenizer.bos) :]
    if added != plain:
        extra = tokenizer.hf.convert_ids_to_tokens(added[len(plain) :])
        raise UserError(
            f"tokenizer {tokenizer.path}: adds {', '.join(map(str, extra)) or 'special tokens'} after every text, so "
            "that no continuation can be scored; set add_eos_token to false (in tokenizer.json: the post_processor)"
        )


def _encode_items(items: Sequence[Item], tokenizer: Tokenizer, max_length: int) -> list[Request]:
    texts: list[str] = []
    for item in items:
        context = item.context.rstrip()  # trailing blanks go to the continuation, where tokenizers expect them
        if not context:
            raise UserError(f"{item.task} {item.name}: its context is blank; remove the row")
        blanks = item.context[len(context) :]
        texts += [context, *(f"{context}{blanks} {choice}" for choice in item.choices)]
    bos_text = tokenizer.decode(tokenizer.bos) if tokenizer.bos else ""
    encoded = [
        np.array(ids if bos_text and text.startswith(bos_text) else [*tokenizer.bos, *ids], dtype=np.int32)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    requests = []
    per_item = 1 + len(items[0].choices)
    for item, start in zip(items, range(0, len(encoded), per_item), strict=True):
        ctx_ids, *wholes = encoded[start : start + per_item]
        requests += [_split(item, choice, ctx_ids, whole, max_length) for choice, whole in enumerate(wholes)]
    return requests


def _split(item: Item, choice: int, ctx_ids: np.ndarray, whole: np.ndarray, max_length: int) -> Request:
    if not np.array_equal(whole[: len(ctx_ids)], ctx_ids):
        raise UserError(
            f"{item.task} {item.name}, choice {choice}: the tokenizer merges the end of the context with the choice, "
            "so the choice's own tokens are not defined; this tokenizer cannot be scored this way"
        )
    cont_ids = whole[len(ctx_ids) :]
    if not 0 < len(cont_ids) <= max_length:
        raise UserError(
            f"{item.task} {item.name}, choice {choice}: {len(cont_ids)} tokens to score; need 1 to {max_length} "
            "(the model's context length)"
        )
    return Request(ctx_ids, cont_ids)
