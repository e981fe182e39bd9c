"""The content of drift.json: base against tuned on the same items, verdicts in words, and the gate."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft.eval.options import GateSection
from sft.eval.power import MARGIN, items_needed, items_to_rule_out, minimum_detectable, power_non_inferior
from sft.eval.results import HEADLINE, Asked, Record, Scored
from sft.eval.shift import compare_scores, margin_histogram, probabilities
from sft.eval.stats import DRAWS, LEVEL, Paired, benjamini_hochberg, compare_pairs, holm
from sft.eval.tasks.mmlu import category_of

SCHEMA = 2
METRICS = {"mmlu": ("acc",), "hellaswag": ("acc_norm", "acc")}
"""Metrics of each task, the headline first."""
NUM_EXAMPLES = 12
KINDS = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
"""How an answer may change; in this order examples take turns."""


@dataclass(frozen=True)
class Side:
    """One model of the comparison."""

    name: str
    """What the report calls it."""
    scored: Scored
    heldout_loss: float | None = None
    """Nats per answer token on the held-out part of the fine-tuning data."""


@dataclass(frozen=True)
class Rules:
    """What verdicts go by."""

    margin: float
    """Drops below it are acceptable: a fraction."""
    confidence: float
    """Of the one-sided bounds."""


def compare(
    base: Side,
    tuned: Sequence[Side],
    gate: GateSection,
    noise: dict[str, dict[str, Any]] | None,
    answers: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Every figure of the report, schema 2; the details and the gate are about the first tuned model.

    Accuracies, deltas and bounds are fractions (0.01 = one point). JSON as it is: no NaN, no infinity.

    Args:
        base: the model before training.
        tuned: models after training, at least one; their records beside the base's, item by item.
        gate: what is allowed; its max_drop is also the margin of the verdicts, one point where it is None.
        noise: by task what the base answered differently when asked once more: items, flips, rate, max_abs_ll.
        answers: what both models wrote to the same prompts.

    Raises:
        ValueError: the items are not the same in the same order, which sft.eval.earlier.check_same_items provides.
    """
    for side in tuned:
        _check_aligned(base, side)
    first = tuned[0]
    rules = Rules(MARGIN if gate.max_drop is None else gate.max_drop, gate.confidence)
    pairs: dict[str, Paired] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for task in base.scored.records:
        pairs[task], tasks[task] = _compare_task(task, base.scored, first.scored, rules)
        tasks[task]["noise"] = (noise or {}).get(task)
    return {
        "schema": SCHEMA,
        "level": LEVEL,
        "margin": rules.margin,
        "names": {"base": base.name, "tuned": first.name},
        "base": base.scored.header,
        "tuned": first.scored.header,
        "tasks": tasks,
        "any_degradation": any_degradation(pairs),
        "gate": decide(tasks, gate),
        "models": [_describe_model(base, base, rules), *(_describe_model(base, side, rules) for side in tuned)],
        "answers": answers,
    }


def _check_aligned(base: Side, tuned: Side) -> None:
    """Pairs are made by place: records in another order would give figures, and wrong ones."""
    before, after = base.scored.records, tuned.scored.records
    if list(before) != list(after):
        raise ValueError(f"{tuned.name} has {', '.join(after)}, {base.name} has {', '.join(before)}")
    for task, records in before.items():
        if [_identity(record) for record in records] != [_identity(record) for record in after[task]]:
            raise ValueError(f"{task}: {tuned.name} does not hold the items of {base.name} in the same order")


def _identity(record: Record) -> tuple[str, int, int]:
    return record.subject, record.doc_id, record.gold


def _compare_task(task: str, base: Scored, tuned: Scored, rules: Rules) -> tuple[Paired, dict[str, Any]]:
    """The headline metric's pair, and all that is reported of the task."""
    before, after, metric = base.records[task], tuned.records[task], HEADLINE[task]
    pairs = {name: _pair(before, after, name, rules, DRAWS) for name in METRICS[task]}
    metrics = {name: _describe_pair(pair, before, after, name, rules) for name, pair in pairs.items()}
    result = metrics[metric] | {"metric": metric, "metrics": metrics}
    if task == "mmlu":
        result["categories"] = _compare_groups(before, after, "category", rules)
        result["subjects"] = _compare_groups(before, after, "subject", rules)
        p_values = [row["mcnemar_p"] for row in result["subjects"].values()]
        for row, p_holm, q_bh in zip(
            result["subjects"].values(), holm(p_values), benjamini_hochberg(p_values), strict=True
        ):
            row |= {"p_holm": p_holm, "q_bh": q_bh}
    result["power"] = _describe_power(pairs[metric], rules)
    result["scores"] = compare_scores(before, after, metric)
    result["margin_histogram"] = margin_histogram(before, after, metric)
    result["examples"] = pick_examples(before, after, base.asked.get(task) or tuned.asked.get(task), metric)
    return pairs[metric], result


def _compare_groups(base: Sequence[Record], tuned: Sequence[Record], key: str, rules: Rules) -> dict[str, Any]:
    """MMLU's comparisons by category or by subject; a subject without a category is in none."""
    categories = {subject: category_of(subject) for subject in {record.subject for record in base}}
    groups: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for before, after in zip(base, tuned, strict=True):
        if name := before.subject if key == "subject" else categories[before.subject]:
            groups[name][0].append(before)
            groups[name][1].append(after)
    metric, draws = HEADLINE["mmlu"], DRAWS if key == "category" else 0
    return {
        name: _describe_pair(_pair(*groups[name], metric, rules, draws), *groups[name], metric, rules)
        for name in sorted(groups)
    }


def _pair(base: Sequence[Record], tuned: Sequence[Record], metric: str, rules: Rules, draws: int) -> Paired:
    subjects = np.array([record.subject for record in base])
    return compare_pairs(
        np.array([record.is_right(metric) for record in base]),
        np.array([record.is_right(metric) for record in tuned]),
        clusters=np.array([record.cluster for record in base]),
        strata=subjects if (subjects != subjects[0]).any() else None,
        confidence=rules.confidence,
        draws=draws,
    )


def _describe_pair(
    pair: Paired, base: Sequence[Record], tuned: Sequence[Record], metric: str, rules: Rules
) -> dict[str, Any]:
    changed = [prediction(b, metric) != prediction(t, metric) for b, t in zip(base, tuned, strict=True)]
    is_identical = all(before.lls == after.lls for before, after in zip(base, tuned, strict=True))
    return {
        "n": pair.n,
        "base": pair.base,
        "tuned": pair.tuned,
        "delta": pair.delta,
        "drop": pair.drop,
        "se_iid": pair.errors.iid,
        "se_stratified": pair.errors.stratified,
        "se_clustered": pair.errors.clustered,
        "se": pair.errors.largest,
        "interval": list(pair.interval),
        "interval_wald": list(pair.interval_wald),
        "interval_tango": list(pair.interval_tango),
        "interval_bootstrap": pair.interval_bootstrap and list(pair.interval_bootstrap),
        "interval_bootstrap_clustered": pair.interval_bootstrap_clustered and list(pair.interval_bootstrap_clustered),
        "lower_one_sided": pair.lower_one_sided,
        "upper_one_sided": pair.upper_one_sided,
        "right_to_wrong": pair.right_to_wrong,
        "wrong_to_right": pair.wrong_to_right,
        "wrong_to_other": sum(changed) - pair.right_to_wrong - pair.wrong_to_right,
        "changed": sum(changed) / pair.n,
        "mcnemar_p": pair.mcnemar_p,
        "mcnemar_midp": pair.mcnemar_midp,
        "verdict": "identical" if is_identical else verdict(pair, rules.margin),
    }


def prediction(record: Record, metric: str) -> int:
    """The choice that the metric takes for the answer."""
    return record.pred if metric == "acc" else record.pred_norm


def verdict(pair: Paired, margin: float) -> str:
    """What the items show, in words; a change only where the interval and the exact test agree.

    Both are approximate where few items changed. "non-inferior" and "degraded within margin" go by the one-sided
    bound at the gate's confidence, as the gate does. That no change is shown is no verdict: it is "inconclusive"
    until a drop of the margin is ruled out.
    """
    low, high = pair.interval
    is_within = pair.lower_one_sided > -margin
    is_significant = pair.mcnemar_p < 1 - LEVEL
    if is_significant and high < 0:
        if high < -margin:
            return "degraded beyond margin"
        return "degraded within margin" if is_within else "degraded"
    if is_significant and low > 0:
        return "improved"
    return "non-inferior" if is_within else "inconclusive"


def any_degradation(pairs: dict[str, Paired]) -> list[dict[str, Any]]:
    """Whether any headline metric fell: one-sided p of each, and Holm's over all of them."""
    p_values = [pair.degradation_p for pair in pairs.values()]
    return [
        {"task": task, "metric": HEADLINE[task], "p": p, "p_holm": p_holm}
        for task, p, p_holm in zip(pairs, p_values, holm(p_values), strict=True)
    ]


def _describe_power(pair: Paired, rules: Rules) -> dict[str, Any]:
    """With at least one flip: none seen does not mean that none can happen."""
    flips = pair.right_to_wrong + pair.wrong_to_right
    rate = max(flips, 1) / pair.n
    margin = rules.margin or MARGIN
    return {
        "flip_rate": flips / pair.n,
        "mde": minimum_detectable(pair.n, rate),
        "margin": margin,
        "power_non_inferior": power_non_inferior(pair.n, rate, margin, rules.confidence),
        "items_needed": items_needed(rate, margin),
    }


def decide(tasks: dict[str, dict[str, Any]], gate: GateSection) -> dict[str, Any]:
    """The gate on the headline metric of every task, one line of reason each.

    All tasks must pass, so no correction for their number is due (intersection-union test: Berger 1982): the chance
    that a model that is inferior in one of them passes is at most 1 - confidence. Models with identical scores pass.
    """
    decisions, failed = {}, []
    for task, row in tasks.items() if gate.max_drop is not None else ():
        passed, decisions[task] = _decide_task(task, row, gate)
        if not passed:
            failed.append(decisions[task])
    return {
        "max_drop": gate.max_drop,
        "confidence": gate.confidence,
        "rule": gate.rule,
        "passed": None if gate.max_drop is None else not failed,
        "failed": failed,
        "decisions": decisions,
    }


def _decide_task(task: str, row: dict[str, Any], gate: GateSection) -> tuple[bool, str]:
    allowed = float(gate.max_drop or 0.0)
    seen = f"{task} {row['metric']} changed by {_points(row['delta'])} points on {row['n']:,} items"
    if row["verdict"] == "identical":
        return True, f"{seen}: not one score differs"
    limit, at = f"a drop of {100 * allowed:.2f} points", f"at {100 * gate.confidence:.6g} % confidence"
    lower, upper = row["lower_one_sided"], row["upper_one_sided"]
    if upper < -allowed:
        return False, f"{seen}: more than {limit} is shown (at best {_points(upper)} {at})"
    if lower > -allowed:
        return True, f"{seen}: {limit} is ruled out (at worst {_points(lower)} {at})"
    if gate.rule == "degradation":
        return True, f"{seen}: more than {limit} is not shown (at best {_points(upper)} {at})"
    return False, (
        f"{seen}: {limit} is not ruled out (at worst {_points(lower)} {at}); {_remedy(row, allowed, gate.confidence)}"
    )


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _remedy(row: dict[str, Any], allowed: float, confidence: float) -> str:
    flips = max(row["right_to_wrong"] + row["wrong_to_right"], 1) / row["n"]
    variance = max(row["n"] * row["se"] ** 2, flips - row["delta"] ** 2)
    needed = items_to_rule_out(variance, row["delta"], allowed, confidence)
    if needed is None:
        return "more items would not help: the drop seen is as large itself"
    return f"about {max(needed, row['n'] + 1):,} items could rule it out if that is the true change"


def pick_examples(
    base: Sequence[Record], tuned: Sequence[Record], asked: Sequence[Asked] | None, metric: str
) -> list[dict[str, Any]]:
    """Up to NUM_EXAMPLES changed answers: kinds take turns; in a kind the best of every source first.

    The best: largest change of p(right choice), which is softmax(log-likelihoods) for acc_norm, too.
    """
    if not asked:
        return []
    p, q = probabilities(base), probabilities(tuned)
    change = np.abs(q - p)[np.arange(len(base)), [record.gold for record in base]]
    queues: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for i in np.argsort(-change, kind="stable").tolist():
        if kind := _kind_of_change(base[i], tuned[i], metric):
            queues[kind].append(i)
    queues = {kind: _sources_in_turn(queue, base) for kind, queue in queues.items()}
    turns = [(turn, kind, i) for kind, queue in queues.items() for turn, i in enumerate(queue[:NUM_EXAMPLES])]
    chosen = sorted(turns, key=lambda entry: (entry[0], KINDS.index(entry[1])))[:NUM_EXAMPLES]
    return [
        {
            "item": f"{base[i].subject} item {base[i].doc_id}",
            "question": asked[i].question,
            "choices": list(asked[i].choices),
            "gold": base[i].gold,
            "base_pred": prediction(base[i], metric),
            "tuned_pred": prediction(tuned[i], metric),
            "base_p": p[i].tolist(),
            "tuned_p": q[i].tolist(),
            "kind": kind,
        }
        for _, kind, i in chosen
    ]


def _kind_of_change(before: Record, after: Record, metric: str) -> str | None:
    if prediction(before, metric) == prediction(after, metric):
        return None
    if before.is_right(metric):
        return "right_to_wrong"
    return "wrong_to_right" if after.is_right(metric) else "wrong_to_other"


def _sources_in_turn(queue: Sequence[int], records: Sequence[Record]) -> list[int]:
    """The first of every cluster, then the second of every cluster, and so on."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for place, i in enumerate(queue):
        ranked.append((seen[records[i].cluster], place, i))
        seen[records[i].cluster] += 1
    return [i for _, _, i in sorted(ranked)]


def _describe_model(base: Side, side: Side, rules: Rules) -> dict[str, Any]:
    """A row of the table of models; the base has no change to report."""
    tasks = {}
    for task, records in side.scored.records.items():
        metric = HEADLINE[task]
        row: dict[str, Any] = {"metric": metric, "n": len(records)}
        row["value"] = sum(record.is_right(metric) for record in records) / len(records)
        if side is not base:
            before = base.scored.records[task]
            pair = _pair(before, records, metric, rules, draws=0)
            described = _describe_pair(pair, before, records, metric, rules)
            keys = ("delta", "interval", "verdict", "right_to_wrong", "wrong_to_right")
            row |= {key: described[key] for key in keys}
        tasks[task] = row
    return {
        "name": side.name,
        "path": side.scored.header["model"],
        "heldout_loss": side.heldout_loss,
        "tasks": tasks,
    }
