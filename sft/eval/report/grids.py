"""The tables of the drift report as rows of text: drift.md, drift.html and the terminal show the same cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sft.eval.report.wording import count, interval, margin_words, number, p_value, percent, points, task_name

SHIFT_NAMES = {
    "margin": "margin of the right answer",
    "p_gold": "probability of the right answer",
    "brier": "Brier score",
    "bits_per_byte": "bits per byte of the right answer",
}
PROVENANCE = (
    "model",
    "weights_sha256",
    "tokenizer_sha256",
    "bos",
    "data",
    "limit",
    "max_length",
    "dtype",
    "score_dtype",
    "engine",
    "fallback",
    "tokens_per_batch",
    "batch_size",
    "compat",
    "parity_with",
    "chat",
    "system_instruction",
    "chat_template_sha256",
    "attention",
    "placement",
    "device",
    "ranks",
)
TASK_PROVENANCE = ("source", "shots", "items_sha256", "requests_sha256", "truncated_items", "near_ties")


@dataclass(frozen=True)
class Grid:
    """A table. The first column names its row; `words` are the other columns that are no numbers."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[str, ...] = ()


def headline(report: dict[str, Any]) -> Grid:
    """Every task and metric, the headline metric of each task first."""
    head = ("task", "n", "base %", "tuned %", "Δ points", interval_name(report), "lost", "won", "McNemar p", "verdict")
    rows = []
    for task, result in report["tasks"].items():
        for metric, row in result["metrics"].items():
            rows.append((f"{task_name(task)} {metric}", *_figures(row), row["verdict"]))
    return Grid(head, rows, ("verdict",))


def interval_name(report: dict[str, Any]) -> str:
    """Heading of a column of intervals."""
    return f"{percent(report['level'], 0)} % interval"


def statistics(report: dict[str, Any], task: str) -> Grid:
    """Standard errors, intervals and tests: one column for each metric of the task."""
    metrics = report["tasks"][task]["metrics"]
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("items", "n", count),
        ("base %", "base", percent),
        ("tuned %", "tuned", percent),
        ("Δ points", "delta", points),
        ("SE, items independent (points)", "se_iid", _three),
        ("SE, within subjects (points)", "se_stratified", _three),
        ("SE, clustered by source (points)", "se_clustered", _three),
        ("SE used (points)", "se", _three),
        (f"{interval_name(report)}, used", "interval", interval),
        (f"{interval_name(report)}, Wald", "interval_wald", interval),
        (f"{interval_name(report)}, Tango", "interval_tango", interval),
        (f"{interval_name(report)}, bootstrap of items", "interval_bootstrap", interval),
        (f"{interval_name(report)}, bootstrap of clusters", "interval_bootstrap_clustered", interval),
        ("one-sided lower end (points)", "lower_one_sided", points),
        ("one-sided upper end (points)", "upper_one_sided", points),
        ("McNemar p, exact", "mcnemar_p", p_value),
        ("McNemar p, mid-p", "mcnemar_midp", p_value),
        ("right→wrong", "right_to_wrong", count),
        ("wrong→right", "wrong_to_right", count),
        ("wrong→other wrong", "wrong_to_other", count),
        ("answers that changed %", "changed", percent),
        ("verdict", "verdict", str),
    ]
    return Grid(
        ("", *metrics), [(name, *(form(metrics[metric][key]) for metric in metrics)) for name, key, form in rows]
    )


def power(report: dict[str, Any], task: str) -> Grid:
    """What the items could show, and the noise floor."""
    block, noise = report["tasks"][task]["power"], report["tasks"][task]["noise"]
    margin = margin_words(block["margin"])
    rows = [
        ("items that flipped between right and wrong (%)", percent(block["flip_rate"])),
        ("smallest change seen four times in five (points)", percent(block["mde"])),
        (f"chance to rule out a loss of {margin} where nothing changed (%)", percent(block["power_non_inferior"])),
        (f"items needed to see a change of {margin}", count(block["items_needed"])),
    ]
    if noise is None:
        rows.append(("noise floor: flips of the base against itself", "not measured"))
    else:
        flips = f"{count(noise['flips'])} of {count(noise['items'])} ({percent(noise['rate'])} %)"
        rows.append(("noise floor: flips of the base against itself", flips))
        rows.append(("noise floor: largest |Δ log-likelihood| (nats)", number(noise["max_abs_ll"])))
    return Grid(("", task_name(task)), rows)


def shifts(report: dict[str, Any], task: str) -> Grid:
    """How the scores moved, tuned minus base."""
    scores, metric = report["tasks"][task]["scores"], report["tasks"][task]["metric"]
    head = ("tuned - base", "items", "mean", "SE", "z", "p05", "p25", "median", "p75", "p95", "Wilcoxon p", "sign p")
    rows = []
    for key, name in SHIFT_NAMES.items():
        if shift := scores.get(key):
            moved = [number(shift[part], 4, "+") for part in ("p05", "p25", "median", "p75", "p95")]
            tests = (p_value(shift["wilcoxon_p"]), p_value(shift["sign_p"]))
            mean = (number(shift["mean"], 4, "+"), number(shift["se"]), number(shift["z"], 2, "+"))
            unit = "" if key != "margin" else " (nats)" if metric == "acc" else " (nats per character)"
            rows.append((name + unit, count(shift["n"]), *mean, *moved, *tests))
    return Grid(head, rows)


def divergence(report: dict[str, Any], task: str) -> Grid:
    """KL(base || tuned) over the four choices."""
    kl = report["tasks"][task]["scores"].get("kl")
    rows = [] if not kl else [("nats", *(number(kl[part]) for part in ("mean", "p95", "max")))]
    return Grid(("KL(base‖tuned) over the choices", "mean", "p95", "max"), rows)


def groups(report: dict[str, Any], rows: dict[str, dict[str, Any]], kind: str) -> Grid:
    """Categories or subjects by name, with Holm's p and BH's q where they were computed."""
    corrected = any("p_holm" in row for row in rows.values())
    head = (kind, "n", "base %", "tuned %", "Δ points", interval_name(report), "lost", "won", "McNemar p")
    cells = []
    for name, row in rows.items():
        adjusted = (p_value(row["p_holm"]), p_value(row["q_bh"])) if corrected else ()
        cells.append((name, *_figures(row), *adjusted, row["verdict"]))
    return Grid((*head, *(("Holm p", "BH q") if corrected else ()), "verdict"), cells, ("verdict",))


def any_degradation(report: dict[str, Any]) -> Grid:
    """One-sided p of every headline metric, and Holm's over all of them."""
    rows = [
        (f"{task_name(row['task'])} {row['metric']}", p_value(row["p"]), p_value(row["p_holm"]))
        for row in report["any_degradation"]
    ]
    return Grid(("was anything degraded?", "one-sided p", "Holm p"), rows)


def models(report: dict[str, Any]) -> Grid:
    """Every model, a row for each task: what it gained on held-out data beside what it lost."""
    head = ("model", "held-out loss", "task", "%", "Δ points", interval_name(report), "lost", "won", "verdict")
    rows = []
    for place, model in enumerate(report["models"]):
        name, loss = f"{place}. {model['name']}", number(model["heldout_loss"])
        for task in report["tasks"]:
            row = model["tasks"][task]
            moved = (percent(row["value"]), points(row.get("delta")), interval(row.get("interval")))
            flips = (count(row.get("right_to_wrong")), count(row.get("wrong_to_right")), row.get("verdict", "–"))
            rows.append((name, loss, f"{task_name(task)} {row['metric']}", *moved, *flips))
            name, loss = "", ""  # the rows below are the same model's
    return Grid(head, rows, ("task", "verdict"))


def known_gains(report: dict[str, Any]) -> dict[int, float]:
    """How much lower than the base's the held-out loss of each tuned model is, by its number in the models' table.

    Nats per token. {} where fewer than two are known: there is no curve through one point.
    """
    base, *others = (model["heldout_loss"] for model in report["models"])
    gains = {place: base - loss for place, loss in enumerate(others, 1) if base is not None and loss is not None}
    return gains if len(gains) > 1 else {}


def provenance(report: dict[str, Any]) -> Grid:
    """What the figures depend on, of both models; digests by their beginning, in full in drift.json."""
    sides = (report["base"], report["tuned"])
    found = [(key, [side.get(key) for side in sides]) for key in PROVENANCE]
    versions = dict.fromkeys(name for side in sides for name in side["versions"] or {})
    found += [(f"version of {name}", [(side["versions"] or {}).get(name) for side in sides]) for name in versions]
    for task in report["tasks"]:
        found += [
            (f"{task}: {key}", [side["tasks"].get(task, {}).get(key) for side in sides]) for key in TASK_PROVENANCE
        ]
    rows = [(key, *(_known(key, value) for value in values)) for key, values in found if values != [None, None]]
    unknown = ", ".join(key for key, values in found if values == [None, None])
    rows += [("not set, or not recorded", unknown, unknown)] if unknown else []
    return Grid(("", "base", "tuned"), rows, ("base", "tuned"))


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells from `n` to `McNemar p`."""
    return (
        count(row["n"]),
        percent(row["base"]),
        percent(row["tuned"]),
        points(row["delta"]),
        interval(row["interval"]),
        count(row["right_to_wrong"]),
        count(row["wrong_to_right"]),
        p_value(row["mcnemar_p"]),
    )


def _three(value: float | None) -> str:
    return percent(value, 3)


def _known(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)[:16] if key.endswith("sha256") else str(value)
