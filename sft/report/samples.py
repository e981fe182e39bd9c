"""What the model answered to the same prompts, before and after."""

from html import escape

from sft.report.files import Sample

MAX_PROMPTS = 24
MAX_BETWEEN = 8
"""Answers of one prompt between the first and the last."""
LONGEST, LONGEST_BETWEEN = 3000, 1000
"""Characters of a text on the page."""


def sample_section(samples: list[Sample]) -> str:
    """First and last answer of each prompt side by side, the others folded; "" without samples."""
    prompts: dict[str, dict[int, Sample]] = {}
    for sample in samples:  # after a restart a step may be answered again: the last answer counts
        prompts.setdefault(sample.prompt, {})[sample.step] = sample
    if not prompts:
        return ""
    shown = list(prompts.items())[:MAX_PROMPTS]
    left_out = len(prompts) - len(shown)
    note = "The same prompts, answered by the model as it was after each of these steps."
    note += f" {left_out:,} more prompts are in samples.jsonl." if left_out else ""
    cards = "".join(_prompt(prompt, [by_step[step] for step in sorted(by_step)]) for prompt, by_step in shown)
    return f'<p class="note">{note}</p>{cards}'


def _prompt(prompt: str, answers: list[Sample]) -> str:
    ends = answers if len(answers) == 1 else [answers[0], answers[-1]]
    sides = "".join(_answer(sample, LONGEST) for sample in ends)
    between = answers[1:-1]
    folded = ""
    if between:
        chosen = [between[place * len(between) // MAX_BETWEEN] for place in range(MAX_BETWEEN)]
        chosen = between if len(between) <= MAX_BETWEEN else chosen
        few = f", {len(chosen)} of them" if len(chosen) < len(between) else ""
        inner = f'<div class="between">{"".join(_answer(sample, LONGEST_BETWEEN) for sample in chosen)}</div>'
        folded = f"<details><summary>{len(between):,} in between{few}</summary>{inner}</details>"
    return (
        f'<article class="answer"><h3 class="prompt">{escape(_cut(prompt, LONGEST))}</h3>'
        f'<div class="sides">{sides}</div>{folded}</article>'
    )


def _answer(sample: Sample, longest: int) -> str:
    when = "before the first step" if sample.step == 0 else f"after step {sample.step:,}"
    text = escape(_cut(sample.answer, longest)) or '<span class="note">(nothing)</span>'
    cut = "" if sample.is_finished else '<span class="note"> … (longest answer reached)</span>'
    return f"<div><b>{when}</b>{text}{cut}</div>"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
