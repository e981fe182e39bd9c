"""Learning-rate finder: the loss while the learning rate rises from step to step (Smith 2017, arXiv:1506.01186).

A sweep is the run's own first steps, with its optimizer, parameter groups, batches and order, at learning rates that
the schedule does not know. Nothing is saved but its result, and the weights are put back.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sft
from sft import batch, checkpoint, order, resume, zero_state
from sft.config import RunConfig
from sft.errors import Preempted, UserError
from sft.lr_finder_plot import draw
from sft.lr_suggestion import RULE, SMOOTHING, Suggestion, smooth, suggest
from sft.metrics import Recorder
from sft.png import save_png
from sft.sequence import own_part
from sft.step import Run, train_step

START_LR = 1e-8
"""Far below any learning rate that changes a model in a few steps: the sweep begins with a flat part."""
END_LR = 1e-1
"""Above what any of the optimizers bears on a language model."""
STEPS = 100
"""14 per decade, as many as smoothing needs; more would teach the model much before the sweep is over."""
STOP_AT = 4.0
"""The sweep is over when the smoothed loss is so many times the lowest: the weights are wrecked."""
STEPS_BETWEEN_LINES = 10
JSON_FILE, PNG_FILE = "lr-finder.json", "lr-finder.png"


@dataclass(frozen=True)
class Sweep:
    """What was measured; of steps that had labels."""

    lrs: list[float]
    """Of each step's update."""
    losses: list[float]
    """Of each step, before its update."""
    ended: str
    """Why it went no further."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of weights and optimizer state, by flat tensor, on the host.

    None stands for a tensor of zeros, as moments are before the first step: no memory for these.
    """

    weights: list[torch.Tensor | None]
    states: list[dict[str, Any]]


def refuse_begun(out: Path) -> None:
    """Only a folder without a run's steps can take the sweep: it is of the base model.

    Raises:
        UserError: there are checkpoints, or steps.
    """
    steps = out / "metrics.jsonl"
    begun = checkpoint.newest_complete(out / "checkpoints") or (steps if steps.is_file() else None)
    if begun is not None:
        raise UserError(
            f"lr_finder: {begun} is of a run that has begun, and the sweep is of the base model; choose another --out"
        )


def find(run: Run) -> None:
    """Sweep, put the weights back, prove it, and write lr-finder.json and lr-finder.png. Collective.

    Raises:
        Preempted: the run was asked to stop meanwhile; nothing is written.
        RuntimeError: the first batch has another loss than before, and nothing is written.
    """
    before = first_batch_loss(run)
    taken = snapshot(run.engine.optimizer)
    swept = sweep(run)
    restore(run.engine.optimizer, taken)
    if run.stop.reason is not None:
        run.stop.close()
        raise Preempted(f"{run.stop.reason}; the sweep is not over and nothing is written; run the same command again")
    after = first_batch_loss(run)
    run.stop.close()
    if before.hex() != after.hex():
        raise RuntimeError(f"weights not restored after the sweep: the first batch's loss was {before}, is {after}")
    suggestion = suggest(swept.lrs, swept.losses)
    resume.on_first_rank(lambda: write(run, swept, suggestion, before, after))
    tell(run, swept, suggestion)


def tell(run: Run, swept: Sweep, suggestion: Suggestion) -> None:
    """What came of it, for people."""
    run.recorder.say(f"sweep ended: {swept.ended}")
    if suggestion.lr is None:
        run.recorder.say(f"no learning rate to suggest: {suggestion.reason}")
    else:
        present = f"the run file has {run.config.optim.lr:.1e}"
        run.recorder.say(f"suggested: --optim.lr {suggestion.lr:.1e} ({present}): {suggestion.reason}")
    run.recorder.say(f"{run.out / JSON_FILE}, {run.out / PNG_FILE}; the weights are as they were")


def lr_of(step: int) -> float:
    """Learning rate of step `step` of the sweep, from 0: evenly spaced by ratio, both ends included."""
    return START_LR * (END_LR / START_LR) ** (step / (STEPS - 1))


def sweep(run: Run) -> Sweep:
    """Train on the run's first batches at rising learning rates. Collective; leaves the weights changed."""
    quiet = replace(run, recorder=Recorder(run.config, run.out, False, STEPS))  # skipped steps are not the run's
    run.recorder.say(f"learning-rate finder: up to {STEPS} steps from {START_LR:.0e} to {END_LR:.0e}")
    lrs: list[float] = []
    losses: list[float] = []
    for step in range(STEPS):
        lr = lr_of(step)
        metrics = train_step(quiet, step, lr=lr)
        if metrics is None:
            return Sweep(lrs, losses, "asked to stop")
        if metrics["loss"] is None:
            continue
        if not math.isfinite(metrics["loss"]):
            return Sweep(lrs, losses, f"the loss is not finite at {lr:.1e}")
        lrs.append(lr)
        losses.append(metrics["loss"])
        if not metrics["applied"]:
            return Sweep(lrs, losses, f"the gradient is not finite at {lr:.1e}")
        smoothed = smooth(losses)
        if smoothed[-1] > STOP_AT * min(smoothed):
            return Sweep(lrs, losses, f"the smoothed loss is above {STOP_AT:g} times its lowest at {lr:.1e}")
        if (step + 1) % STEPS_BETWEEN_LINES == 0:
            run.recorder.say(f"sweep {step + 1}/{STEPS}  lr {lr:.1e}  smoothed loss {smoothed[-1]:.4f}")
    return Sweep(lrs, losses, f"it reached {END_LR:.0e}")


def first_batch_loss(run: Run) -> float:
    """Mean loss per label over the run's first batch, without noise, dropout and smoothing of labels. Collective."""
    config, shards, shares = run.config, run.inputs.train, run.shares
    rows = order.step_rows(config.data.seed, 0, len(shards), config.batch.rows_per_step)
    total = torch.zeros((), dtype=torch.float64, device=run.numerics.device)
    run.engine.eval()
    with torch.no_grad():
        for part in order.cut(rows, shares.data_rank, shares.data_ranks, run.inputs.micro_batch):
            run.watch.mark("loss of the first batch", 0)
            total += run.engine(own_part(batch.from_shards(shards, part, run.numerics.device), shares))[0]
    dist.all_reduce(total)
    return total.item() / max(batch.num_labels(shards, rows), 1)


def snapshot(optimizer: Any) -> Snapshot:
    """Copy to the host what this rank owns: 4 bytes per parameter of it, or 8 with a moving average of the weights."""
    flats, states = zero_state.flat_tensors(optimizer), optimizer.optimizer.state
    return Snapshot(
        [_kept(flat.detach()) for flat in flats],
        [{key: _kept(value) for key, value in states[flat].items()} for flat in flats],
    )


@torch.no_grad()
def restore(optimizer: Any, taken: Snapshot) -> None:
    """Put back what `snapshot` has taken. Collective."""
    states = optimizer.optimizer.state
    zero_state.before_loading(optimizer)
    for flat, weights, kept in zip(zero_state.flat_tensors(optimizer), taken.weights, taken.states, strict=True):
        _put_back(flat.detach(), weights)
        for key, value in states[flat].items():
            if isinstance(value, torch.Tensor):
                _put_back(value, kept[key])
            else:
                states[flat][key] = kept[key]
    zero_state.refresh_compute_weights(optimizer)
    dist.barrier()


def _kept(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cpu", copy=True) if bool(value.any()) else None


def _put_back(live: torch.Tensor, kept: torch.Tensor | None) -> None:
    if kept is None:
        live.zero_()
    else:
        live.copy_(kept)


def write(run: Run, swept: Sweep, suggestion: Suggestion, before: float, after: float) -> None:
    """The picture, then the JSON, each whole or not at all. For rank 0."""
    smoothed = smooth(swept.losses)
    save_png(draw(swept.lrs, swept.losses, smoothed, suggestion, run.config.optim.lr), run.out / PNG_FILE)
    result = {
        "suggestion": asdict(suggestion),
        "rule": RULE,
        "ended": swept.ended,
        "first_batch_loss": {"before": _finite(before), "after": _finite(after)},
        "settings": settings(run.config) | {"world_size": run.inputs.world_size, "dtype": str(run.numerics.dtype)},
        "identity": run.identity,
        "versions": {"sft": sft.__version__} | {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "lrs": swept.lrs,
        "losses": swept.losses,
        "smoothed": smoothed,
    }
    partial = run.out / f".{JSON_FILE}.partial"
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, run.out / JSON_FILE)


def settings(config: RunConfig) -> dict[str, Any]:
    """What the sweep was made with."""
    return {
        "model": config.model.path,
        "data": config.data.train,
        "optim_lr": config.optim.lr,
        "rows_per_step": config.batch.rows_per_step,
        "start_lr": START_LR,
        "end_lr": END_LR,
        "steps": STEPS,
        "smoothing": SMOOTHING,
        "stop_at": STOP_AT,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
