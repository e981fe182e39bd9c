"""`batch.micro_batch: auto`: the largest micro-batch that fits, found by trial before the first step.

A trial is what training does, with the packs that need most: forwards and backwards of those with the most tokens and
of those with the most labels (the loss head's part grows with labels), and an update with learning rate 0. Other packs
cannot need more. All ranks try the same numbers of packs and see each other's memory, so they find the same.

A rank that runs out of memory within collectives leaves the others waiting in them, so nothing is tried that could
fail. The first trial is one token: what does not depend on the number of packs. From then on, with f(m) bytes at the
peak of a trial with m packs and r bytes at rest:

    f(m) + (f(m) - f(m')) (n - m) / (m - m')     expected at n: the line through the last two trials
    r + (f(m) - r) n / m                         f(n) is no more, if f is the largest of several phases, each of which
                                                 takes something fixed and something for each pack

The first must lie within the limit, and the second within the device; where what is fixed makes the second too large
for even one pack more, the first with a slope twice as steep must, for that one pack.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft import batch, order, peak_memory
from sft.engine import data_parallel_size
from sft.errors import UserError
from sft.optim import MOMENTS_DTYPE, set_rates
from sft.resume import on_first_rank
from sft.sequence import own_part
from sft.step import SLOW_LIMIT_S, Run, noise_seeds, seed_dropout
from sft.zero_state import EMA, flat_tensors, make_states

LIMIT = 0.92
"""Share of the device that a trial may fill. The rest is for what trials do not see: gaps between blocks that grow in a
run of days, buffers that NCCL makes later, forwards of held-out packs, probes and samples between updates."""
FILE = "micro_batch.json"
CHUNK = 2**24
"""Elements compared at a time."""


@dataclass(frozen=True)
class Trial:
    """What a number of packs took; bytes, float64 [ranks]."""

    packs: int
    rest: np.ndarray
    """Before it."""
    peak: np.ndarray
    """Of its forwards and backwards."""
    update: np.ndarray
    """Peak of its update, which does not depend on the number of packs."""
    capacity: np.ndarray
    """Of the device."""

    @property
    def limit(self) -> np.ndarray:
        """What may be filled."""
        return LIMIT * self.capacity

    @property
    def highest(self) -> np.ndarray:
        """Of the whole trial."""
        return np.maximum(self.peak, self.update)

    def fits(self) -> bool:
        """Within the limit, on every rank."""
        return bool((self.highest <= self.limit).all())

    def at_most(self, packs: int) -> np.ndarray:
        """Bytes: upper bound for more packs; see above."""
        return np.maximum(self.rest + np.maximum(self.peak - self.rest, 0) * packs / self.packs, self.update)

    def expected(self, packs: int, before: "Trial", steeper: float = 1.0) -> np.ndarray:
        """Bytes for other packs, by the line through this trial and the one before it."""
        slope = np.maximum(self.peak - before.peak, 0) / (self.packs - before.packs)
        return np.maximum(self.peak + steeper * slope * (packs - self.packs), self.update)


# The search


def choose_next(trials: Sequence[Trial], sizes: Sequence[int]) -> int | None:
    """Packs to try next; None: what fits best of `sizes`, which ascend from 1, has been found.

    It may be a number that is not in `sizes`, on the way to one.
    """
    if len(trials) < 2:
        return len(trials)  # none, one
    before, last = trials[-2:]
    larger = [size for size in sizes if size > last.packs]
    if not larger or not last.fits():
        return None
    if sure := [size for size in larger if (last.at_most(size) <= last.limit).all()]:
        return max(sure)
    if not (last.expected(larger[0], before) <= last.limit).all():
        return None
    one_more = last.packs + 1
    if safe := [n for n in range(one_more, larger[0] + 1) if (last.at_most(n) <= last.capacity).all()]:
        return max(safe)
    return one_more if (last.expected(one_more, before, steeper=2) <= last.capacity).all() else None


def choose(trials: Sequence[Trial], sizes: Sequence[int]) -> int:
    """The largest of `sizes` that was tried and fits; 1 where none does."""
    return max((trial.packs for trial in trials if trial.packs in sizes and trial.fits()), default=1)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


# On a run


def resolve(run: Run, leave_if_asked: Callable[[], None]) -> Run:
    """`run` with the micro-batch that its options name, or, for auto, the largest that fits. Collective.

    To be called before a checkpoint is loaded: the optimizer's state is afterwards what it is at the start.

    Args:
        leave_if_asked: called between trials.

    Raises:
        OutOfMemoryError: not even one pack fits.
        UserError: a trial has changed weights.
    """
    sizes = divisors(run.config.batch.rows_per_step // run.inputs.data_ranks)
    if run.config.batch.micro_batch != "auto" or sizes == [1]:
        return run
    holds_for = circumstances(run)
    known = on_first_rank(lambda: read_record(run.out, holds_for))
    if known not in sizes:  # none, or edited
        # of other circumstances: advice to a rank that runs out of memory in a trial would build on it
        on_first_rank(lambda: (run.out / FILE).unlink(missing_ok=True))
        began_s = time.perf_counter()
        trials = search(run, sizes, leave_if_asked)
        check_smallest(trials)
        found, told = choose(trials, sizes), [_facts(trial) for trial in trials]
        record = {"micro_batch": found, "trials": told, "holds_for": holds_for}
        on_first_rank(lambda: write_record(run.out, record))
        seconds = round(time.perf_counter() - began_s, 1)
        tell(run, micro_batch=found, trials=told, trial_time_s=seconds)
        run.recorder.say(describe(trials, sizes))
    else:
        found = known
        tell(run, micro_batch=found, trials=[])
        run.recorder.say(f"micro-batch {found}: found when this run was started here before ({run.out / FILE})")
    accumulation = run.config.batch.rows_per_step // (run.inputs.data_ranks * found)
    return replace(run, inputs=replace(run.inputs, micro_batch=found, accumulation=accumulation))


def search(run: Run, sizes: Sequence[int], leave_if_asked: Callable[[], None]) -> list[Trial]:
    """Trials up to the largest that fits; weights, moments and averages are as before. Collective.

    Raises:
        UserError: the weights are not.
    """
    optimizer = run.engine.optimizer
    weights = fingerprint(optimizer)
    trials: list[Trial] = []
    while (packs := choose_next(trials, sizes)) is not None:
        leave_if_asked()
        run.watch.mark(f"trying micro_batch {packs}", 0, SLOW_LIMIT_S)
        trials.append(try_packs(run, packs))
    forget_updates(optimizer, MOMENTS_DTYPE[run.config.optim.states])
    peak_memory.begin(run.numerics.device)  # the run's own peak is the metrics'
    if fingerprint(optimizer) != weights:
        raise UserError(
            f"batch.micro_batch auto: updates with learning rate 0 have changed weights (optim.name "
            f"{run.config.optim.name}, deepspeed {run.config.deepspeed}); nothing was trained: give a number"
        )
    return trials


def try_packs(run: Run, packs: int) -> Trial:
    """Forwards and backwards with the heaviest `packs` packs (0: one token), and an update that changes nothing."""
    shards, engine, device = run.inputs.train, run.engine, run.numerics.device
    rest = peak_memory.in_use(device)
    total = peak_memory.capacity(device, _local_ranks())
    peak_memory.begin(device)
    set_rates(engine.optimizer.param_groups, 1, run.inputs.total_steps, 0.0, run.config.train.ema_decay)
    engine.train()
    for rows in heaviest(shards.num_tokens, shards.num_labels, packs):
        seeds = list(range(len(rows))) if noise_seeds(run, 0)[0] else []
        seed_dropout(seeds, run.shares)
        loss, _ = engine(own_part(batch.from_shards(shards, rows, device, seeds), run.shares))
        labels = max(1, batch.num_labels(shards, rows) * run.inputs.data_ranks)
        engine.backward(loss * data_parallel_size(engine) / labels, scale_wrt_gas=False)
        del loss
    peak = peak_memory.peak(device)
    peak_memory.begin(device)
    engine.step()
    return gather(packs, [rest, peak, peak_memory.peak(device), total])


def heaviest(num_tokens: np.ndarray, num_labels: np.ndarray, packs: int) -> list[order.Rows]:
    """The packs with the most tokens, and those with the most labels; FILLER where there are not so many."""
    if packs == 0:
        return 2 * [np.array([order.FILLER], dtype=np.int64)]
    tokens, labels = np.asarray(num_tokens).astype(np.int64), np.asarray(num_labels).astype(np.int64)
    found = [np.lexsort((-labels, -tokens))[:packs], np.lexsort((-tokens, -labels))[:packs]]
    return [np.pad(rows, (0, packs - len(rows)), constant_values=order.FILLER).astype(np.int64) for rows in found]


def gather(packs: int, own: Sequence[int]) -> Trial:
    """The trial of all ranks from what each has measured. Collective."""
    found: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, list(own))
    return Trial(packs, *np.array(found, dtype=np.float64).T)


def forget_updates(optimizer: Any, dtype: torch.dtype) -> None:
    """Moments, of `dtype`, and their step as before the first update; an average of the weights is still them."""
    states = optimizer.optimizer.state
    averages = {flat: states[flat][EMA] for flat in flat_tensors(optimizer) if EMA in states[flat]}
    make_states(optimizer, dtype)
    for flat, average in averages.items():
        states[flat][EMA] = average


@torch.no_grad()
def fingerprint(optimizer: Any) -> int:
    """Of this rank's master weights, bit by bit, but for the sign of zeros."""
    flats = flat_tensors(optimizer)
    parts = [part for flat in flats for part in flat.detach().split(CHUNK)]
    return sum(int((part + 0.0).view(torch.int32).sum(dtype=torch.int64)) for part in parts)


# What is told and kept


def check_smallest(trials: Sequence[Trial]) -> None:
    """One pack must fit into the device, if not within the limit.

    Raises:
        OutOfMemoryError: it does not.
    """
    one = trials[1]
    rank = _worst_rank(one)
    if one.highest[rank] > one.capacity[rank]:
        raise torch.OutOfMemoryError(
            f"one pack takes {_gib(one.highest[rank])} GiB, rank {rank} has {_gib(one.capacity[rank])} GiB"
        )


def tell(run: Run, **facts: Any) -> None:
    """The event; none of a sweep of the learning-rate finder, which is no part of a run."""
    if not run.config.lr_finder:
        run.recorder.event("micro_batch", run.recorder.step, **facts)


def describe(trials: Sequence[Trial], sizes: Sequence[int]) -> str:
    """For people: what was found, how full it makes the worst rank's device, and what the next would take."""
    found = choose(trials, sizes)
    trial = next(trial for trial in trials if trial.packs == found)
    rank = _worst_rank(trial)
    line = f"micro-batch {found}: {_gib(trial.highest[rank])} of {_gib(trial.limit[rank])} GiB"
    larger = [size for size in sizes if size > found]
    if not larger:
        return f"{line}; a step has no more packs for a rank"
    last, before = trials[-1], trials[-2]
    tried = next((trial.highest[rank] for trial in trials if trial.packs == larger[0]), None)
    needed = last.expected(larger[0], before)[rank] if tried is None else tried
    return f"{line}; {larger[0]} would need about {_gib(needed)}"


def circumstances(run: Run) -> dict[str, Any]:
    """Everything that what fits depends on. Collective."""
    devices: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(devices, peak_memory.describe(run.numerics.device))
    config, numerics = run.config, run.numerics
    return {
        "devices": {name: devices.count(name) for name in sorted(set(devices))},
        "torch": torch.__version__,
        "model": run.identity["model_config"],
        "data": run.identity["data_key"],
        "dtype": str(numerics.dtype),
        "attention": numerics.attention,
        "liger": numerics.liger,
        "model options": config.model.model_dump(mode="json", exclude={"path"}),
        "train options": config.train.model_dump(mode="json", include={"label_smoothing", "neftune_alpha"}),
        "averaged": config.train.ema_decay is not None,
        "optimizer": [config.optim.name, config.optim.states, config.optim.l2_sp > 0],
        "rows_per_step": config.batch.rows_per_step,
        "sequence_parallel": config.batch.sequence_parallel,
        "strategy": run.inputs.strategy,
    }


def read_record(out: Path, holds_for: dict[str, Any] | None = None) -> int | None:
    """What an earlier start of this run has found, if it was one like `holds_for`."""
    try:
        record = json.loads((out / FILE).read_text(encoding="utf-8"))
        same = holds_for is None or record["holds_for"] == json.loads(json.dumps(holds_for))
        return int(record["micro_batch"]) if same else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = out / f"{FILE}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / FILE)


def _facts(trial: Trial) -> dict[str, Any]:
    rank = _worst_rank(trial)
    return {
        "micro_batch": trial.packs,
        "rank": rank,
        "peak_gib": round(float(trial.peak[rank]) / 2**30, 3),
        "update_gib": round(float(trial.update[rank]) / 2**30, 3),
        "limit_gib": round(float(trial.limit[rank]) / 2**30, 3),
    }


def _worst_rank(trial: Trial) -> int:
    return int((trial.limit - trial.highest).argmin())


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
