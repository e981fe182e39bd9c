"""What is sampled during training: prompts of a file as the training data would show them, before any process group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.chat import compile_chat_template, question_ids
from data_prep.template import alpaca_prompt
from sft.config import SamplesSection
from sft.errors import UserError
from sft.prompt_file import Prompt, read_prompts
from sft.tokenizer import Tokenizer

MAX_PROMPTS = 64
"""All of them are computed anew for every token of the longest answer, each time."""


@dataclass(frozen=True)
class SamplePrompts:
    """What is asked, the same each time."""

    shown: list[str]
    """Instruction and input of each prompt, as the file has them."""
    ids: list[np.ndarray]
    """Of each prompt, int32: BOS, template and instruction, up to where the answer begins."""
    stops: frozenset[int]
    """Tokens that end an answer: the one that training puts behind every answer, and the tokenizer's EOS."""


def open_samples(
    settings: SamplesSection, tokenizer: Tokenizer, manifest: dict[str, Any], context: int | None
) -> SamplePrompts | None:
    """Read and tokenise the prompts; None where none are set.

    Args:
        settings: the file, and how long an answer may be.
        tokenizer: the model's own.
        manifest: of the training shards: whose template the prompts are put into.
        context: tokens that the model attends to; None where it does not say.

    Raises:
        UserError: the file is no file of prompts, or holds too many; a prompt leaves no room for an answer, or cannot
            be put into the data's chat template.
    """
    if settings.prompts is None:
        return None
    what = f"eval.samples.prompts {settings.prompts}"
    prompts = read_prompts("eval.samples.prompts", Path(settings.prompts))
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{what}: holds {len(prompts)} prompts, each computed anew for every token; keep {MAX_PROMPTS} at most"
        )
    ids = encode_prompts(prompts, tokenizer, manifest["template"], what)
    for number, one in enumerate(ids, 1):
        if context is not None and len(one) + settings.max_new_tokens > context:
            raise UserError(
                f"{what}: prompt {number} has {len(one)} tokens and eval.samples.max_new_tokens is "
                f"{settings.max_new_tokens}, but the model attends to {context}; shorten one of them"
            )
    return SamplePrompts(
        shown=[prompt.shown for prompt in prompts],
        ids=[np.array(one, dtype=np.int32) for one in ids],
        stops=frozenset({manifest["tokenizer"]["stop_id"], tokenizer.eos_id} - {None}),
    )


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, template: str | list[str], what: str
) -> list[list[int]]:
    """Ids of each prompt in the template of a manifest: the text of a chat template, or the list of Alpaca's.

    Raises:
        UserError: the chat template does not render a prompt; told of after `what`, and by its number.
    """
    if not isinstance(template, str):
        return [[*tokenizer.bos, *tokenizer.encode(alpaca_prompt(one.instruction, one.input))] for one in prompts]
    chat = compile_chat_template(template, "of the training data", tokenizer)
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(question_ids(chat, tokenizer, prompt.instruction, prompt.input))
        except UserError as error:
            raise UserError(f"{what}, prompt {number}: {error}") from None
    return ids
