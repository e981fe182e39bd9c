"""What a model answers to a few fixed instructions: greedy decoding, for a reader's eyes beside the scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.template import alpaca_prompt
from sft.errors import UserError
from sft.eval.options import AnswersSection
from sft.eval.ranks import Ranks
from sft.prompt_file import A_FILE, Prompt, read_prompts
from sft.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 16


DEFAULT_PROMPTS = (
    Prompt("Name the three longest rivers of Europe."),
    Prompt("Why is the sky blue? Answer in two sentences."),
    Prompt("In which year did the Second World War end, and where was the peace with Japan signed?"),
    Prompt("A train leaves at 14:35 and arrives at 17:10. How long does the journey take?"),
    Prompt("Anna is older than Ben, and Ben is older than Carl. Who is the youngest? Explain briefly."),
    Prompt("Write a Python function that returns the sum of the even numbers of a list."),
    Prompt("What does this SQL query return?", "SELECT city, COUNT(*) FROM customers GROUP BY city;"),
    Prompt("Translate into French.", "The library opens at nine in the morning."),
    Prompt("Summarize the text in one sentence.",
           "Bees visit flowers to collect nectar. Pollen sticks to their legs and is carried to the next flower. "
           "Without this, many fruits and vegetables would not grow."),
    Prompt("Correct the spelling.", "Teh wether was realy beutiful yesterday."),
    Prompt("Give three tips for sleeping better."),
    Prompt("Write a haiku about autumn."),
)  # fmt: skip
"""Knowledge, arithmetic, logic, code, translation, summary, correction, advice, style; nothing that a model refuses."""


def load_prompts(section: AnswersSection) -> list[Prompt]:
    """The instructions that both models answer; [] where none are wanted.

    Raises:
        UserError: as `read_prompts`.
    """
    if section.prompts in ("default", "none"):
        return list(DEFAULT_PROMPTS) if section.prompts == "default" else []
    return read_prompts("answers.prompts", Path(section.prompts), f"{A_FILE}, or default, or none")


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    section: AnswersSection,
    ranks: Ranks,
    *,
    lockstep: bool = False,
) -> list[str]:
    """The model's greedy answer to each prompt, up to a stop token or section.max_new_tokens, special tokens left out.

    In fp32 an answer does not depend on the others of its batch, up to ties of the logits.

    Args:
        model: transformers causal LM on `ranks.device`, in eval mode; of its generation config only the stop tokens
            count, not sampling, beams or penalties.
        tokenizer: the model's.
        prompts: what to answer.
        section: template and length.
        ranks: without lockstep only rank 0 answers, and the other ranks get [].
        lockstep: all ranks run the same forwards, as weights that are spread over the ranks need; all get the answers.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not render a single question; a prompt leaves
            no room for an answer in the model's context.
    """
    if ranks.rank and not lockstep:
        return []
    inputs = encode_prompts(model.config, tokenizer, prompts, section)
    stops = _stop_ids(model, tokenizer)
    replies: list[list[int]] = []
    with _plain_greedy(model, stops, section.max_new_tokens):
        for start in range(0, len(inputs), PROMPTS_PER_BATCH):
            replies += _generate(model, inputs[start : start + PROMPTS_PER_BATCH], ranks.device, lockstep)
    return [_decode(tokenizer, ids, stops) for ids in replies]


def encode_prompts(
    config: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], section: AnswersSection
) -> list[list[int]]:
    """Ids of each prompt; `config` is the model's, of transformers.

    Raises:
        UserError: as `answer`.
    """
    inputs = [_encode(tokenizer, prompt, section.template) for prompt in prompts]
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(inputs, 1):
        if context is not None and len(ids) + section.max_new_tokens > context:
            raise UserError(
                f"answers.prompts: prompt {number} has {len(ids)} tokens and answers.max_new_tokens is "
                f"{section.max_new_tokens}, but {tokenizer.path} attends to {context}; shorten one of them"
            )
    return inputs


def _encode(tokenizer: Tokenizer, prompt: Prompt, template: str) -> list[int]:
    """Ids of the text that the answer follows, as the fine-tuning showed it."""
    from jinja2 import TemplateError

    if template == "alpaca":
        return [*tokenizer.bos, *tokenizer.encode(alpaca_prompt(prompt.instruction, prompt.input))]
    if template == "none":
        return [*tokenizer.bos, *tokenizer.encode(prompt.shown)]
    if tokenizer.hf.chat_template is None:
        raise UserError(f"answers.template chat: the tokenizer of {tokenizer.path} has no chat template; use alpaca")
    messages = [{"role": "user", "content": prompt.shown}]
    try:
        return list(tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except (TemplateError, ValueError, TypeError, LookupError) as error:  # whatever a template's own code runs into
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"answers.template chat: the chat template of {tokenizer.path} does not render a question: {reason}; "
            "correct it, or use alpaca"
        ) from None


def _stop_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Stop tokens of the folder's generation config, and the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, tokenizer.eos_id) if token is not None})


@contextmanager
def _plain_greedy(model: Any, stops: list[int], max_new_tokens: int) -> Iterator[None]:
    """Set the folder's generation config aside: `generate` would take from it whatever its arguments leave open."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,  # what follows a stop token is cut off
    )
    try:
        yield
    finally:
        model.generation_config = own


def _generate(model: Any, inputs: Sequence[list[int]], device: torch.device, lockstep: bool) -> list[list[int]]:
    """New ids of each prompt, padded left so that all answers begin at the same place."""
    width = max(map(len, inputs))
    ids_BT = torch.zeros((len(inputs), width), dtype=torch.long)
    mask_BT = torch.zeros((len(inputs), width), dtype=torch.long)
    for row, ids in enumerate(inputs):
        ids_BT[row, width - len(ids) :] = torch.tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    output_BT = model.generate(ids_BT.to(device), attention_mask=mask_BT.to(device), synced_gpus=lockstep)
    replies: list[list[int]] = output_BT[:, width:].tolist()
    return replies


def _decode(tokenizer: Tokenizer, ids: list[int], stops: Sequence[int]) -> str:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.hf.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
