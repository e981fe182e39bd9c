"""Items to token requests: what lm_eval's `fewshot_context` and `_encode_pair` make, with the checks they lack.

A folder with a bare tokenizer.model is encoded by sentencepiece here, while lm_eval would go through
transformers' conversion of it: there, and only there, the ids may differ.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from sft.errors import UserError
from sft.eval.tasks.item import NUM_CHOICES, Item
from sft.tokenizer import Tokenizer, folder_errors

ITEMS_PER_CALL = 256
"""Items encoded in one call: bounds the memory that the tokenizer's own lists take."""


@dataclass(frozen=True)
class Prompting:
    """How an item becomes text and ids; the options of the same names say what the values mean."""

    chat: Literal["none", "multi_turn", "single_turn"] = "none"
    system_instruction: str | None = None
    compat: Literal["lm_eval>=0.4.9.2", "lm_eval<=0.4.9.1"] = "lm_eval>=0.4.9.2"

    @property
    def delimiter(self) -> str:
        """What stands between context and choice: with a chat template the answer begins a turn of its own."""
        return " " if self.chat == "none" else ""


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to be scored behind its context; int32 ids, BOS included, not truncated."""

    ctx_ids: np.ndarray
    """The same array in all requests of an item."""
    cont_ids: np.ndarray

    def clip(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, scored ids): the last max_length + 1 tokens; the model reads all but the last of them."""
        ids = np.concatenate([self.ctx_ids, self.cont_ids])
        return ids[-(max_length + 1) :][:-1], self.cont_ids

    def is_cut(self, max_length: int) -> bool:
        """Whether `clip` drops tokens from the beginning."""
        return len(self.ctx_ids) + len(self.cont_ids) > max_length + 1


@dataclass(frozen=True)
class TokenRequests:
    """What a model is asked about a list of items."""

    prompts: list[str]
    """The context of each item as text; its sha256 is lm_eval's prompt_hash."""
    requests: list[Request]
    """Choice by choice: request 4 i + c scores choice c of item i."""
    system_dropped: bool
    """The chat template takes no system message: the description and the system instruction are not in the prompts."""


def build_requests(items: Sequence[Item], tokenizer: Tokenizer, max_length: int, prompting: Prompting) -> TokenRequests:
    """Requests of all items.

    BOS stands where the tokenizer itself puts one, unless `prompting.compat` asks for the older harness, or the text
    brings its own, as chat templates do.

    Raises:
        UserError: the tokenizer appends tokens to a text, or does not keep an item's context as a prefix of
            context + continuation; a continuation is empty or longer than max_length; a chat is asked of a tokenizer
            that has no usable template.
    """
    if prompting.compat == "lm_eval>=0.4.9.2":
        check_special_tokens(tokenizer)
    prompts, system_dropped = render_prompts(items, tokenizer, prompting)
    requests: list[Request] = []
    for start in range(0, len(items), ITEMS_PER_CALL):
        part = slice(start, start + ITEMS_PER_CALL)
        requests += _encode_items(items[part], prompts[part], tokenizer, prompting)
    check_lengths(items, requests, max_length)
    return TokenRequests(prompts, requests, system_dropped)


def check_lengths(items: Sequence[Item], requests: Sequence[Request], max_length: int) -> None:
    """Refuse continuations that no model of this context length can score.

    Raises:
        UserError: a continuation is empty or longer than max_length.
    """
    lengths = np.array([len(request.cont_ids) for request in requests])
    for number in np.flatnonzero((lengths < 1) | (lengths > max_length))[:1].tolist():
        item = items[number // NUM_CHOICES]
        raise UserError(
            f"{item.name}, choice {number % NUM_CHOICES}: {lengths[number]} tokens to score; need 1 to "
            f"{max_length} (the model's context length)"
        )


def count_truncated(requests: Sequence[Request], max_length: int) -> int:
    """Items of which at least one request loses its beginning, as in lm_eval."""
    return len({number // NUM_CHOICES for number, request in enumerate(requests) if request.is_cut(max_length)})


def digest_requests(requests: Sequence[Request]) -> str:
    """sha256 over all ids and where the scored ones begin: equal if two tokenizers ask the same of their models."""
    digest = hashlib.sha256()
    before = None
    for request in requests:
        ctx_ids = request.ctx_ids
        is_same = before is not None and (ctx_ids is before or np.array_equal(ctx_ids, before))
        digest.update(np.array([-1 if is_same else len(ctx_ids), len(request.cont_ids)], dtype="<i8").tobytes())
        if not is_same:  # an item's context is read once, not four times
            digest.update(ctx_ids.astype("<i4").tobytes())
        digest.update(request.cont_ids.astype("<i4").tobytes())
        before = ctx_ids
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


def render_prompts(items: Sequence[Item], tokenizer: Tokenizer, prompting: Prompting) -> tuple[list[str], bool]:
    """(the context of each item as text, whether the chat template refused a system message).

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be used.
    """
    if prompting.chat == "none":
        return [_lead(item, prompting) + item.solved for item in items], False
    check_template(tokenizer)
    prompts, dropped = [], False
    for item in items:
        prompt, without_system = _render_chat(tokenizer, item, prompting)
        prompts.append(prompt)
        dropped |= without_system
    return prompts, dropped


def digest_template(tokenizer: Tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template; None where it has none."""
    template = tokenizer.hf.chat_template
    text = template.get("default") if isinstance(template, dict) else template
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def check_template(tokenizer: Tokenizer) -> None:
    """Refuse a chat that lm_eval could not render, or that could not be tokenised as it renders it.

    Raises:
        UserError: there is no chat template, or none is the default, or special tokens in a text are not recognised.
    """
    template = tokenizer.hf.chat_template
    if template is None:
        raise UserError(
            f"tokenizer {tokenizer.path}: has no chat template (chat_template.jinja), as a base model has none; "
            "use --chat none"
        )
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"tokenizer {tokenizer.path}: its chat templates are {', '.join(template)}; need one named default"
        )
    if tokenizer.sentencepiece is not None:
        raise UserError(
            f"tokenizer {tokenizer.path}: a bare tokenizer.model does not recognise the special tokens of a chat "
            "template; add its tokenizer.json or use --chat none"
        )


def _lead(item: Item, prompting: Prompting) -> str:
    """System instruction and description, two newlines between them unless one side brings its own blank."""
    instruction, description = prompting.system_instruction or "", item.description
    is_apart = not (instruction and description) or instruction[-1].isspace() or description[0].isspace()
    return instruction + ("" if is_apart else "\n\n") + description


def _render_chat(tokenizer: Tokenizer, item: Item, prompting: Prompting) -> tuple[str, bool]:
    """One item through the chat template; without the system message if the template refuses that."""
    lead = _lead(item, prompting)
    system = [{"role": "system", "content": lead}] if lead else []
    if prompting.chat == "multi_turn":
        texts = [text for shot in item.shots for text in shot] + [item.question]
        roles = ["user", "assistant"] * len(item.shots) + ["user"]
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    else:
        turns = [{"role": "user", "content": item.solved}]
    errors: tuple[type[Exception], ...] = (*folder_errors(), TemplateError)
    try:
        try:
            return _apply_template(tokenizer, [*system, *turns]), False
        except TemplateError:
            if not system:
                raise
            return _apply_template(tokenizer, turns), True
    except errors as error:
        raise UserError(
            f"tokenizer {tokenizer.path}: its chat template fails on {item.name}: {' '.join(str(error).split())[:200]}"
        ) from None


def _apply_template(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _encode_items(
    items: Sequence[Item], prompts: Sequence[str], tokenizer: Tokenizer, prompting: Prompting
) -> list[Request]:
    texts: list[str] = []
    for item, prompt in zip(items, prompts, strict=True):
        context = prompt.rstrip()  # trailing blanks go to the continuation, where tokenizers expect them
        if not context:
            raise UserError(f"{item.name}: its context is blank; remove the row")
        texts += [context, *(f"{prompt}{prompting.delimiter}{choice}" for choice in item.choices)]
    bos = tokenizer.bos if prompting.compat == "lm_eval>=0.4.9.2" else ()
    bos_text = tokenizer.decode(bos) if bos else ""
    encoded = [
        np.array(ids if bos_text and text.startswith(bos_text) else [*bos, *ids], dtype=np.int32)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    requests = []
    for item, start in zip(items, range(0, len(encoded), 1 + NUM_CHOICES), strict=True):
        ctx_ids, *wholes = encoded[start : start + 1 + NUM_CHOICES]
        requests += [_split(item, choice, ctx_ids, whole) for choice, whole in enumerate(wholes)]
    return requests


def _split(item: Item, choice: int, ctx_ids: np.ndarray, whole: np.ndarray) -> Request:
    if not np.array_equal(whole[: len(ctx_ids)], ctx_ids):
        raise UserError(
            f"{item.name}, choice {choice}: the tokenizer merges the end of the context with the choice, "
            "so the choice's own tokens are not defined; this tokenizer cannot be scored this way"
        )
    return Request(ctx_ids, whole[len(ctx_ids) :].copy())
