"""Invented contents of drift.json (schema 2): plausible figures, no model behind them."""

import math
import random
from typing import Any

from sft.eval.tasks.mmlu import CATEGORIES

MARGIN = 0.01
EVIL = "<script>alert(\"owned\")</script> & 'quotes' | pipes"
"""Stands in names and texts: whoever forgets to escape runs it."""


def comparison(n: int, right: int, lost: int, won: int, other: int) -> dict[str, Any]:
    """One block of figures: `lost` items right to wrong, `won` wrong to right, `other` from one wrong to another."""
    delta, flips = (won - lost) / n, (won + lost) / n
    se = math.sqrt(max(flips - delta**2, 1 / n**2) / max(n - 1, 1))
    low, high = max(delta - 1.96 * se, -1.0), min(delta + 1.96 * se, 1.0)
    p = math.erfc(abs(delta) / se / math.sqrt(2))
    return {
        "n": n,
        "base": right / n,
        "tuned": (right - lost + won) / n,
        "delta": delta,
        "drop": -delta,
        "se_iid": se,
        "se_stratified": se * 0.98 if n > 200 else None,
        "se_clustered": se * 1.07 if n > 200 else None,
        "se": se * 1.07,
        "interval": [low, high],
        "interval_wald": [low + 1e-4, high - 1e-4],
        "interval_tango": [low - 2e-4, high + 2e-4],
        "interval_bootstrap": [low + 3e-4, high + 3e-4],
        "interval_bootstrap_clustered": [low - 4e-4, high + 4e-4] if n > 200 else None,
        "lower_one_sided": delta - 1.645 * se,
        "upper_one_sided": delta + 1.645 * se,
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "wrong_to_other": other,
        "changed": (lost + won + other) / n,
        "mcnemar_p": min(1.0, p * 1.1),
        "mcnemar_midp": p,
        "verdict": verdict(low, high, delta - 1.645 * se, lost + won + other),
    }


def verdict(low: float, high: float, lower: float, changed: int) -> str:
    if not changed:
        return "identical"
    if high < 0:
        return "degraded beyond margin" if high < -MARGIN else "degraded" if low < -MARGIN else "degraded within margin"
    if low > 0:
        return "improved"
    return "non-inferior" if lower > -MARGIN else "inconclusive"


def subjects(rng: random.Random, loss: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(categories, subjects) of MMLU."""
    counts = {
        name: (n := rng.choice([100, 100, 110, 200, 310, 895, 1534]), int(n * rng.uniform(0.3, 0.7)))
        for names in CATEGORIES.values()
        for name in names
    }
    flips = {}
    for name, (n, right) in counts.items():
        lost, won = draw(rng, right, 0.06 + loss), draw(rng, n - right, 0.05)
        flips[name] = (n, right, lost, won, draw(rng, n, 0.02))
    groups = {
        category: comparison(*(sum(column) for column in zip(*(flips[name] for name in names), strict=True)))
        for category, names in CATEGORIES.items()
    }
    rows = {name: comparison(*flip) for name, flip in sorted(flips.items())}
    ranked = sorted(rows.values(), key=lambda row: row["mcnemar_p"])
    for rank, row in enumerate(ranked):
        row["p_holm"] = min(1.0, row["mcnemar_p"] * (len(ranked) - rank))
        row["q_bh"] = min(1.0, row["mcnemar_p"] * len(ranked) / (rank + 1))
    return groups, rows


def draw(rng: random.Random, n: int, p: float) -> int:
    """One draw of a binomial."""
    return sum(rng.random() < p for _ in range(n))


def shift(n: int, mean: float, spread: float) -> dict[str, Any]:
    return {
        "n": n,
        "mean": mean,
        "se": spread / math.sqrt(n),
        "z": mean / spread * math.sqrt(n),
        "median": mean * 0.9,
        "p05": mean - 1.6 * spread,
        "p25": mean - 0.6 * spread,
        "p75": mean + 0.6 * spread,
        "p95": mean + 1.6 * spread,
        "wilcoxon_p": 0.00021,
        "sign_p": 0.0123,
    }


def histogram(rng: random.Random, n: int, move: float) -> dict[str, Any]:
    edges = [-6 + 0.5 * k for k in range(25)]

    def count(center: float) -> list[int]:
        draws = [min(max(rng.gauss(center, 1.8), -5.99), 5.99) for _ in range(n)]
        return [sum(low <= draw < low + 0.5 for draw in draws) for low in edges[:-1]]

    return {"edges": edges, "base": count(0.2), "tuned": count(0.2 + move)}


def example(number: int, kind: str) -> dict[str, Any]:
    gold, base, tuned = {"right_to_wrong": (0, 0, 2), "wrong_to_right": (1, 3, 1), "wrong_to_other": (2, 0, 3)}[kind]
    return {
        "item": f"anatomy item {number}",
        "question": f"Which of these holds, if x < {number} & y > 2?\nThink of the second line, too. {EVIL}",
        "choices": ["the first one", "a longer second answer that needs more than one line on a phone: " + "word " * 12,
                    "x <= 3", "none of \"these\""],
        "gold": gold,
        "base_pred": base,
        "tuned_pred": tuned,
        "base_p": [0.7 if k == base else 0.1 for k in range(4)],
        "tuned_p": [0.55 if k == tuned else 0.15 for k in range(4)],
        "kind": kind,
    }  # fmt: skip


def task_report(rng: random.Random, metrics: dict[str, dict[str, Any]], *, texts: bool, move: float) -> dict[str, Any]:
    metric, head = next(iter(metrics.items()))
    n = head["n"]
    flips = (head["right_to_wrong"] + head["wrong_to_right"]) / n
    kinds = ("right_to_wrong", "wrong_to_right", "wrong_to_other")
    return head | {
        "metric": metric,
        "metrics": metrics,
        "power": {
            "flip_rate": flips,
            "mde": 2.8 * math.sqrt(flips / n),
            "margin": MARGIN,
            "power_non_inferior": 0.9731,
            "items_needed": 7847,
        },
        "noise": {"items": 256, "flips": 1, "rate": 1 / 256, "max_abs_ll": 0.0831},
        "scores": {
            "margin": shift(n, move, 0.9),
            "p_gold": shift(n, move / 9, 0.11),
            "brier": shift(n, -move / 12, 0.2),
            "bits_per_byte": shift(n, -move / 5, 0.33),
            "kl": {"mean": 0.0341, "p95": 0.1477, "max": 2.713},
        },
        "margin_histogram": histogram(rng, n, move),
        "examples": [example(number, kind) for number, kind in enumerate(kinds)] if texts else [],
    }


def header(model: str, tasks: dict[str, int], digest: str) -> dict[str, Any]:
    details = {
        task: {
            "shots": 5 if task == "mmlu" else 0,
            "items_sha256": "a1" * 32,
            "requests_sha256": "b2" * 32,
            "source": f"{task}: 57 files under evals/{task}, {n} items",
            "truncated_items": 3,
            "near_ties": 17,
        }
        for task, n in tasks.items()
    }
    return {
        "model": model,
        "weights_sha256": digest * 32,
        "tokenizer_sha256": "0d" * 32,
        "bos": True,
        "data": "evals",
        "max_length": 4096,
        "dtype": "bf16",
        "score_dtype": "fp32",
        "engine": "packed",
        "fallback": None,
        "compat": "lm_eval>=0.4.9.2",
        "chat": "none",
        "system_instruction": None,
        "chat_template_sha256": None,
        "device": "NVIDIA H100 80GB HBM3",
        "ranks": 8,
        "attention": "sdpa",
        "tokens_per_batch": 16384,
        "batch_size": None,
        "placement": "replicas",
        "limit": None,
        "parity_with": "lm_eval 0.4.13",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "sft": "0.9.0"},
        "tasks": details,
    }


def full(*, loss: float = 0.03, seed: int = 0, max_drop: float | None = MARGIN) -> dict[str, Any]:
    """Two tasks, 57 subjects, three tuned models with a held-out loss, texts, answers, and markup in every text."""
    rng = random.Random(seed)
    categories, by_subject = subjects(rng, loss)
    columns = [
        [row[key] for row in by_subject.values()] for key in ("n", "right_to_wrong", "wrong_to_right", "wrong_to_other")
    ]
    n, lost, won, other = map(sum, columns)
    right = round(sum(row["base"] * row["n"] for row in by_subject.values()))
    mmlu = task_report(rng, {"acc": comparison(n, right, lost, won, other)}, texts=True, move=-0.21)
    mmlu |= {"categories": categories, "subjects": by_subject}
    metrics = {"acc_norm": comparison(10042, 7633, 281, 274, 90), "acc": comparison(10042, 5749, 301, 262, 95)}
    tasks = {"mmlu": mmlu, "hellaswag": task_report(rng, metrics, texts=True, move=-0.02)}
    tuned = ["runs/alpaca/checkpoint-200", f"runs/alpaca/{EVIL}", "runs/alpaca/merged-0.5"]
    models = [model_row("base 7B", "models/base-7b", 1.8123, tasks, None)]
    models += [
        model_row(path.removeprefix("runs/alpaca/"), path, 1.8123 - 0.22 * (k + 1) ** 0.5, tasks, 0.4 + 0.5 * k)
        for k, path in enumerate(tuned)
    ]
    decisions = {
        task: f"{task} {row['metric']} changed by {100 * row['delta']:+.2f} points on {row['n']:,} items: the reason"
        for task, row in tasks.items()
    }
    failed = [decisions[task] for task, row in tasks.items() if row["lower_one_sided"] <= -MARGIN]
    counts = {task: row["n"] for task, row in tasks.items()}
    return {
        "schema": 2,
        "level": 0.95,
        "margin": MARGIN,
        "names": {"base": "base 7B", "tuned": EVIL},
        "base": header("models/base-7b", counts, "1f"),
        "tuned": header(tuned[1], counts, "2e"),
        "tasks": tasks,
        "any_degradation": [
            {"task": "mmlu", "metric": "acc", "p": 0.00031, "p_holm": 0.00062},
            {"task": "hellaswag", "metric": "acc_norm", "p": 0.412, "p_holm": 0.412},
        ],
        "gate": {
            "max_drop": max_drop,
            "confidence": 0.95,
            "rule": "non_inferiority",
            "passed": None if max_drop is None else not failed,
            "failed": [] if max_drop is None else failed,
            "decisions": {} if max_drop is None else decisions,
        },
        "models": models,
        "answers": [
            {"prompt": f"Name three primary colours. {EVIL}", "base": "Red, green\nand blue.", "tuned": "Red & <blue>"},
            {"prompt": "Say it again.", "base": "It " * 90, "tuned": ""},
        ],
    }


def model_row(name: str, path: str, loss: float | None, tasks: dict[str, Any], scale: float | None) -> dict[str, Any]:
    rows = {}
    for task, result in tasks.items():
        row = {"metric": result["metric"], "n": result["n"], "value": result["base"]}
        if scale is not None:
            delta = result["delta"] * scale
            half = (result["interval"][1] - result["interval"][0]) / 2
            row |= {
                "value": result["base"] + delta,
                "delta": delta,
                "interval": [delta - half, delta + half],
                "verdict": verdict(delta - half, delta + half, delta - half * 0.84, 1),
                "right_to_wrong": result["right_to_wrong"],
                "wrong_to_right": result["wrong_to_right"],
            }
        rows[task] = row
    return {"name": name, "path": path, "heldout_loss": loss, "tasks": rows}


def small() -> dict[str, Any]:
    """One task of four items, nothing optional: no gate, no texts, no noise, no held-out loss, little known."""
    result = task_report(random.Random(0), {"acc_norm": comparison(4, 2, 1, 0, 0)}, texts=False, move=-0.1)
    result["noise"] = None
    result["scores"]["bits_per_byte"] = None
    result["power"] |= {"mde": None, "items_needed": None}
    tasks = {"hellaswag": result}
    unknown = dict.fromkeys(header("x", {}, "00"), None)
    task = {"hellaswag": header("x", {"hellaswag": 4}, "00")["tasks"]["hellaswag"] | {"truncated_items": None}}
    return {
        "schema": 2,
        "level": 0.95,
        "margin": MARGIN,
        "names": {"base": "samples-a", "tuned": "samples-b"},
        "base": unknown | {"model": "samples-a", "versions": {}, "tasks": task},
        "tuned": unknown | {"model": "samples-b", "versions": {}, "tasks": task},
        "tasks": tasks,
        "any_degradation": [{"task": "hellaswag", "metric": "acc_norm", "p": 1.0, "p_holm": 1.0}],
        "gate": {
            "max_drop": None,
            "confidence": 0.95,
            "rule": "non_inferiority",
            "passed": None,
            "failed": [],
            "decisions": {},
        },
        "models": [model_row("samples-a", "a", None, tasks, None), model_row("samples-b", "b", None, tasks, 1.0)],
        "answers": None,
    }
