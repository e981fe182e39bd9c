"""Prompt text: the only place that knows it. Preparation, sampling and evaluation call the same function."""

# PROMPT_DICT of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), with a line break at the end.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of one Alpaca row; the response follows it directly. An empty `input` leaves its section out."""
    if input == "":
        return ALPACA_WITHOUT_INPUT.format(instruction=instruction)
    return ALPACA_WITH_INPUT.format(instruction=instruction, input=input)
