"""The words and number formats of the drift report, the same on the page, in markdown and on the terminal."""

from collections.abc import Sequence
from typing import Any

TASK_NAMES = {"mmlu": "MMLU", "hellaswag": "HellaSwag"}
MARKS = {
    "degraded beyond margin": "▼",
    "degraded": "▼",
    "degraded within margin": "▽",
    "inconclusive": "?",
    "non-inferior": "✓",
    "improved": "▲",
    "identical": "=",
}
"""Every verdict, the worst first, with a sign for readers who do not tell its colour from another."""
TONES = {
    "degraded beyond margin": "bad",
    "degraded": "bad",
    "degraded within margin": "warn",
    "inconclusive": "open",
    "non-inferior": "good",
    "improved": "good",
    "identical": "good",
}
SENTENCES = {
    "degraded beyond margin": "{tuned} lost more than {margin} on {tasks}.",
    "degraded": "{tuned} lost accuracy on {tasks}; whether more than {margin} is open.",
    "degraded within margin": "{tuned} lost accuracy on {tasks}, but less than {margin}.",
    "inconclusive": "Undecided on {tasks}: neither is a loss shown, nor is one of {margin} or more ruled out.",
    "non-inferior": "On {tasks}, a loss of {margin} or more is ruled out; a smaller one is not.",
    "improved": "{tuned} is better on {tasks}.",
    "identical": "On {tasks}, both models give the same scores to every item.",
}
"""What each verdict says, in plain words."""

HOW_TO_READ = (
    ("Δ points", "accuracy of the tuned model minus that of the base, in percentage points, on the same items."),
    (
        "interval",
        "true differences that fit what was seen, at the confidence level named. The widest of the standard errors "
        "decides: independent items, items within their subjects (stratified), and items that change together because "
        "they share a subject, video or article (clustered). Tango's interval holds for few items too; the bootstrap "
        "makes no assumption on the shape.",
    ),
    (
        "right→wrong, wrong→right",
        "items that only the base, or only the tuned model, answers right. Both may be large while Δ is near zero: the "
        "model changed, its accuracy did not.",
    ),
    (
        "McNemar",
        "test that losses and gains are equally likely. The exact one is cautious, mid-p less so. Below six changed "
        "items neither can show anything.",
    ),
    (
        "degraded, improved",
        "the whole interval lies on one side of zero, and McNemar's exact p agrees. Beyond margin: the whole interval "
        "lies beyond it; within margin: a drop as large as the margin is ruled out at the gate's one-sided confidence.",
    ),
    (
        "non-inferior",
        "a drop as large as the margin is ruled out at the gate's one-sided confidence. A smaller drop is not.",
    ),
    (
        "inconclusive",
        "no proof of equality: drops as large as the interval's lower end remain possible. More items narrow it.",
    ),
    (
        "Holm, BH",
        "with dozens of subjects a few look degraded or improved by chance. Holm's p keeps the chance of even one "
        "false alarm below 5 %; Benjamini and Hochberg's q the expected share of false alarms among those marked. "
        "Subjects are exploratory: an unmarked one is not shown to be unharmed.",
    ),
    (
        "score shifts",
        "tuned minus base, item by item; they see changes that flip no answer. The margin (score of the right answer "
        "minus that of the best wrong one) also moves when a model merely grows more or less sure, so read the "
        "probability of the right answer and the rank tests beside it.",
    ),
    (
        "noise",
        "answers that change when the base is asked again in other batches: flips up to this share mean nothing.",
    ),
    (
        "not covered",
        "the intervals say nothing about the choice of prompts and solved examples, about items that were in the "
        "training data, about tasks that were not asked, nor about the quality of longer answers.",
    ),
)
"""(term, explanation) for readers of every version of the report."""


def task_name(task: str) -> str:
    """As papers write it."""
    return TASK_NAMES.get(task, task)


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage, without the sign."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, with its sign; what rounds to zero is +0.00."""
    return "–" if value is None else f"{round(100 * value, 2) + 0.0:+.2f}"


def interval(bounds: Sequence[float] | None) -> str:
    """Both ends in percentage points."""
    return "–" if bounds is None else f"{points(bounds[0])} to {points(bounds[1])}"


def p_value(value: float | None) -> str:
    """Four decimals; never zero."""
    return "–" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def number(value: float | None, digits: int = 4, sign: str = "") -> str:
    """Decimals with (`sign` = "+") or without a sign."""
    return "–" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return "–" if value is None else f"{value:,.0f}"


def margin_words(value: float) -> str:
    """`1 point`, `0.5 points`."""
    return f"{100 * value:.4g} point{'' if round(100 * value, 4) == 1 else 's'}"


def worst_verdict(report: dict[str, Any]) -> str:
    """The worst of the tasks' verdicts on their headline metrics."""
    found = {result["verdict"] for result in report["tasks"].values()}
    return next(verdict for verdict in MARKS if verdict in found)


def verdict_sentences(report: dict[str, Any]) -> list[str]:
    """One sentence for each verdict that was reached, the worst first."""
    lines = []
    for verdict, sentence in SENTENCES.items():
        names = [task_name(task) for task, result in report["tasks"].items() if result["verdict"] == verdict]
        if names:
            margin = margin_words(report["margin"])
            lines.append(sentence.format(tuned="The tuned model", margin=margin, tasks=" and ".join(names)))
    return lines


def gate_line(report: dict[str, Any]) -> str:
    """One sentence on the gate."""
    gate = report["gate"]
    if gate["max_drop"] is None:
        return "No gate was set (--gate.max_drop)."
    if gate["failed"]:
        return f"Gate failed: {'; '.join(gate['failed'])}."
    allowed, sure = _allowed(gate)
    if gate["rule"] == "non_inferiority":
        return f"Gate passed: on every task, a drop of {allowed} is ruled out ({sure})."
    return f"Gate passed: no task's drop is shown to be larger than {allowed} ({sure}); that rules none out."


def gate_rule(report: dict[str, Any]) -> str:
    """What a gate that was set asks for."""
    gate = report["gate"]
    allowed, sure = _allowed(gate)
    if gate["rule"] == "non_inferiority":
        return f"It asks that on every task a drop of {allowed} be ruled out ({sure})."
    return f"It fails only where a drop larger than {allowed} is shown ({sure}); passing rules none out."


def _allowed(gate: dict[str, Any]) -> tuple[str, str]:
    """The drop, and the confidence as it was given: 0.975 is not 98 %."""
    return f"{100 * gate['max_drop']:.2f} points", f"one-sided confidence {100 * gate['confidence']:.6g} %"


def meaning(report: dict[str, Any], task: str) -> list[str]:
    """What the figures of one task mean: what changed, what noise explains, what could not have been seen."""
    result, power, noise = report["tasks"][task], report["tasks"][task]["power"], report["tasks"][task]["noise"]
    changed = result["right_to_wrong"] + result["wrong_to_right"] + result["wrong_to_other"]
    lines = [
        f"{count(changed)} of {count(result['n'])} answers changed ({percent(result['changed'])} %): "
        f"{count(result['right_to_wrong'])} from right to wrong, {count(result['wrong_to_right'])} from wrong to "
        f"right, {count(result['wrong_to_other'])} from one wrong answer to another."
    ]
    if noise is None:
        lines.append("How many answers change by numerical noise alone was not measured.")
    else:
        lines.append(
            f"Noise: asked again in other batches, the base changed {count(noise['flips'])} of {count(noise['items'])} "
            f"answers ({percent(noise['rate'])} %); its log-likelihoods moved by at most {noise['max_abs_ll']:.3g}."
        )
    if not changed:
        return lines  # figures of power go by the flips, and there are none
    if power["mde"] is not None:
        lines.append(
            f"What could not have been seen: a true change smaller than {percent(power['mde'])} points goes unnoticed "
            "more often than one time in five."
        )
    if power["items_needed"] is not None:
        lines.append(
            f"To notice a change of {margin_words(power['margin'])} four times in five takes "
            f"{count(power['items_needed'])} items, at this share of flips."
        )
    return lines
