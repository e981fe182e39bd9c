"""Prompt text: the only place that knows it. Preparation, sampling and evaluation call the same function."""

from collections.abc import Sequence

from data_prep.example import Example, Rejected, Turn
from data_prep.filters import EMPTY_OUTPUT, NOTHING_SUPERVISED, TEMPLATE_REFUSES_ROW

# PROMPT_DICT of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), with a line break at the end.
TURN_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
TURN_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n" + TURN_WITH_INPUT
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n" + TURN_WITHOUT_INPUT
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of one Alpaca row; the response follows it directly. An empty `input` leaves its section out."""
    if input == "":
        return ALPACA_WITHOUT_INPUT.format(instruction=instruction)
    return ALPACA_WITH_INPUT.format(instruction=instruction, input=input)


def render_alpaca(turns: Sequence[Turn]) -> Example:
    """One stretch of text per assistant turn: the prompt of its instruction, then the turn; EOS follows each.

    The first prompt is `alpaca_prompt`'s, or begins with the system text instead of the preamble; later prompts
    have no preamble. Instructions in a row are joined with an empty line, and so are their inputs.

    Raises:
        Rejected: template_refuses_row where an assistant turn answers nothing, a system turn is not the first, or a
            turn is a tool's; empty_output where a supervised turn is blank; nothing_supervised.
    """
    texts: list[str] = []
    spans: list[tuple[tuple[int, int], ...]] = []
    system: str | None = None
    asked: list[Turn] = []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            asked.append(turn)
        elif turn.role == "assistant" and asked:
            prompt = _prompt(asked, system, first=not texts)
            text = prompt + turn.text
            if turn.supervised and not turn.text.strip():
                raise Rejected(EMPTY_OUTPUT)
            texts.append(text)
            spans.append(((len(prompt), len(text)),) if turn.supervised else ())
            asked = []
        elif turn.role == "system" and index == 0:
            system = turn.text
        else:
            raise Rejected(TEMPLATE_REFUSES_ROW)
    if not any(spans):
        raise Rejected(NOTHING_SUPERVISED)
    return Example(tuple(texts), tuple(spans), True)


def render_text(text: str) -> Example:
    """Plain text: all of it is supervised, and EOS ends it.

    Raises:
        Rejected: empty_output where the text is blank.
    """
    if not text.strip():
        raise Rejected(EMPTY_OUTPUT)
    return Example((text,), (((0, len(text)),),), True)


def _prompt(asked: Sequence[Turn], system: str | None, first: bool) -> str:
    instruction, context = asked[0].text, asked[0].input
    if len(asked) > 1:
        instruction = "\n\n".join(turn.text for turn in asked)
        context = "\n\n".join(turn.input for turn in asked if turn.input)
    if first and not system:
        return alpaca_prompt(instruction, context)
    turn = TURN_WITH_INPUT if context else TURN_WITHOUT_INPUT
    before = f"{system}\n\n" if first else "\n\n"
    return before + turn.format(instruction=instruction, input=context)
