"""The drift probe: a few MMLU and HellaSwag items, asked of the live engine before the first step and on the way.

A log-likelihood is minus the summed token loss of a continuation, as the loss head gives it by source: no second model,
no second forward path, and the engine's own ranks, precision and attention. The base model is asked before the first
step; its scores stay in <out>/probe.json, so that every later probe, a resumed run's too, is compared with the same.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sft import batch, checkpoint, resume
from sft.errors import GuardStop, UserError
from sft.eval.results import HEADLINE
from sft.eval.stats import paired_se, score_interval
from sft.eval.tasks.item import NUM_CHOICES, Item
from sft.probe_items import ProbeItems, cut_forwards
from sft.sequence import own_part
from sft.step import Run

CONFIDENCE = 0.95
"""One-sided, of the drift budget."""


@dataclass(frozen=True)
class Shift:
    """A task against the base model on the same n items; fractions (0.01 = one point)."""

    metric: str
    n: int
    base: float
    value: float
    delta: float
    interval: tuple[float, float]
    """Tango's, 95 %, two-sided."""
    at_most: float
    """Upper end of the delta with one-sided confidence."""
    right_to_wrong: int
    wrong_to_right: int
    p_gold_delta: float
    """Mean change of the right choice's probability among the four, softmax of the log-likelihoods; shows earlier than
    the accuracy."""
    p_gold_se: float
    """Standard error of that mean over items."""


@dataclass(frozen=True)
class Look:
    """What a probe came to; empty where none was due."""

    metrics: dict[str, float]
    """For the step's line in metrics.jsonl."""
    over_budget: str | None = None
    """Which task's drop is shown to be above eval.probe.max_drop, with its figures."""


NOT_DUE = Look({})


def measure_base(run: Run, newest: Path | None) -> np.ndarray | None:
    """The base model's scores: of this run's earlier start, or measured now. Before a checkpoint is loaded: the engine
    holds the base model only until then. Collective.

    Returns:
        float64 [items, 4] as `measure`; None without a probe, or where the run was asked to stop meanwhile.

    Raises:
        UserError: scores are not finite.
    """
    probe = run.inputs.probe
    if probe is None:
        return None
    path, identity = run.out / "probe.json", {"asked": probe.digest, "precision": str(run.numerics.dtype)}
    if newest is not None:  # without one the run begins anew, perhaps with another model
        kept = resume.on_first_rank(lambda: _read(path, identity, len(probe.items)))
        if kept is not None:
            return kept
        run.recorder.say(f"probe: {path} has no scores of these items; the base model in model.path is asked again")
    started_s = time.perf_counter()
    scores = measure(run, 0)
    if scores is not None:
        if broken := _count_not_finite(scores):
            raise UserError(
                f"model.path {run.config.model.path}: {broken} of {scores.size} probe scores are not finite; its "
                "weights are broken, or overflow in this precision (try --model.precision fp32)"
            )
        resume.on_first_rank(lambda: _write(path, identity, scores))
        shifts = compare(probe, scores, scores)
        tell(run, 0, shifts, time.perf_counter() - started_s)
        run.recorder.track(0, metrics_of(shifts))
    return scores


def look(run: Run, base: np.ndarray | None, step: int, *, is_last: bool = False) -> Look:
    """Probe after optimizer step `step`, where one is due; as it is after the last. Collective.

    Raises:
        GuardStop: scores are not finite.
    """
    probe, settings = run.inputs.probe, run.config.eval.probe
    is_due = step > 0 and (step % settings.every == 0 or is_last)
    if probe is None or base is None or not is_due:
        return NOT_DUE
    started_s = time.perf_counter()
    scores = measure(run, step)
    if scores is None:
        return NOT_DUE
    if broken := _count_not_finite(scores):
        run.saver.finish()
        raise GuardStop(
            f"step {step}: {broken} of {scores.size} scores of the drift probe are not finite; usual causes: a "
            "learning rate that is too high, a broken base model"
        )
    shifts = compare(probe, base, scores)
    tell(run, step, shifts, time.perf_counter() - started_s)
    return Look(metrics_of(shifts), over_budget(shifts, settings.max_drop))


def measure(run: Run, step: int) -> np.ndarray | None:
    """Log-likelihoods of all choices, float64 [items, 4], natural logarithm; every rank runs as many forwards.

    Returns:
        None where the run was asked to stop meanwhile.
    """
    probe, shares = run.inputs.probe, run.shares
    assert probe is not None
    tokens = run.inputs.micro_batch * run.inputs.train.manifest["seq_len"]  # what training shows to fit
    forwards = cut_forwards(probe.documents, tokens)  # before the ranks share them: the same for any number of ranks
    forwards += [[] for _ in range(-len(forwards) % shares.data_ranks)]
    device = run.numerics.device
    scores = torch.zeros(len(probe.items) * NUM_CHOICES, dtype=torch.float64, device=device)
    run.engine.eval()
    with torch.no_grad():
        for documents in forwards[shares.data_rank :: shares.data_ranks]:
            if run.stop.agreed():
                return None
            run.watch.mark("drift probe", step)
            asked = [(document.ids, document.continuations) for document in documents]
            _, losses_S = run.engine(own_part(batch.build_scored(asked, device), shares))
            cells = np.array([cell for document in documents for cell in document.cells], dtype=np.int64)
            scores[batch.to_device(cells, device)] = -losses_S[: len(cells)].double()
    run.engine.train()
    dist.all_reduce(scores)  # every cell was written by one rank, or in parts by those that shared its document
    return scores.reshape(-1, NUM_CHOICES).cpu().numpy()


def compare(probe: ProbeItems, base: np.ndarray, scores: np.ndarray) -> dict[str, Shift]:
    """Both models' scores, float64 [items, 4], by task."""
    return {task: _shift(probe.items[rows], base[rows], scores[rows]) for task, rows in probe.rows().items()}


def _shift(items: list[Item], base: np.ndarray, scores: np.ndarray) -> Shift:
    before, after = _right(items, base), _right(items, scores)
    lost, won, n = int((before & ~after).sum()), int((after & ~before).sum()), len(items)
    p_shift = _p_gold(items, scores) - _p_gold(items, base)
    return Shift(
        metric=HEADLINE[items[0].task],
        n=n,
        base=float(before.mean()),
        value=float(after.mean()),
        delta=(won - lost) / n,
        interval=score_interval(n, lost, won),
        at_most=score_interval(n, lost, won, 2 * CONFIDENCE - 1)[1],
        right_to_wrong=lost,
        wrong_to_right=won,
        p_gold_delta=float(p_shift.mean()),
        p_gold_se=paired_se(p_shift),
    )


def _right(items: list[Item], scores: np.ndarray) -> np.ndarray:
    """bool [items], by the task's headline metric; ties go to the first choice."""
    if HEADLINE[items[0].task] == "acc_norm":
        chars = np.array([[len(choice) for choice in item.choices] for item in items])
        scores = np.where(chars > 0, scores / np.maximum(chars, 1), -np.inf)  # as in lm_eval
    return scores.argmax(axis=1) == [item.gold for item in items]


def _p_gold(items: list[Item], scores: np.ndarray) -> np.ndarray:
    """Probability of the right choice among the four, float64 [items]."""
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds[np.arange(len(items)), [item.gold for item in items]] / odds.sum(axis=1)


def metrics_of(shifts: dict[str, Shift]) -> dict[str, float]:
    """Names and values for metrics.jsonl and the trackers."""
    values: dict[str, float] = {}
    for task, shift in shifts.items():
        values[f"probe_{task}_{shift.metric}"] = shift.value
        values[f"probe_{task}_delta"] = shift.delta
        values[f"probe_{task}_p_gold_delta"] = shift.p_gold_delta
    return values


def over_budget(shifts: dict[str, Shift], max_drop: float | None) -> str | None:
    """The tasks whose drop is SHOWN to be above `max_drop`, in one line; None where there is none, or no budget."""
    if max_drop is None:
        return None
    lines = [
        f"{task} {shift.metric} {shift.base:.3f} -> {shift.value:.3f} on {shift.n} items: with 95 % confidence the "
        f"drop is at least {-shift.at_most:.3f}, above eval.probe.max_drop {max_drop:g}"
        for task, shift in shifts.items()
        if shift.at_most < -max_drop
    ]
    return "; ".join(lines) or None


def tell(run: Run, step: int, shifts: dict[str, Shift], seconds: float) -> None:
    """The event, and a line for people."""
    parts = [
        f"{task} {shift.metric} {shift.value:.3f} ({shift.n} items)"
        + f" {shift.delta:+.3f} [{shift.interval[0]:+.3f}, {shift.interval[1]:+.3f}], p(gold) {shift.p_gold_delta:+.4f}"
        * (step > 0)
        for task, shift in shifts.items()
    ]
    run.recorder.say(f"probe {f'after step {step}' if step else 'of the base model'}: {'; '.join(parts)}")
    tasks = {task: asdict(shift) for task, shift in shifts.items()}
    run.recorder.event("probe", step, seconds=round(seconds, 3), tasks=tasks)


def _count_not_finite(scores: np.ndarray) -> int:
    return int((~np.isfinite(scores)).sum())


def _read(path: Path, identity: dict[str, str], num_items: int) -> np.ndarray | None:
    """Scores of an earlier start that asked the same; None where there are none, or what is there cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return np.array(kept["scores"], dtype=np.float64).reshape(num_items, NUM_CHOICES)
    return None


def _write(path: Path, identity: dict[str, str], scores: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.partial")
    checkpoint.write_json(partial, {"identity": identity, "scores": scores.tolist()})
    os.replace(partial, path)
