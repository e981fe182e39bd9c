"""What a run came to, from what it has written: its state in words, counts, sums."""

from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from sft.report.files import Event, RunFiles

BEGINS = ("start", "resume")
HANG_AFTER_S = 900.0
"""guard.hang_after_s where config.yaml does not say: a step that takes longer is stopped as a hang."""
ENDS = {
    "finish": ("Finished", "good"),
    "early_stop": ("Stopped early", "good"),
    "stop": ("Stopped at train.stop_after", "open"),
    "preempt": ("Stopped as asked; the same command goes on", "open"),
    "gate_failed": ("Stopped: the drift budget is exceeded", "bad"),
    "guard_stop": ("Stopped by the guard", "bad"),
    "rank_lost": ("Stopped: a rank was lost", "bad"),
    "error": ("Ended with an error", "bad"),
    "unseen_end": ("Killed, or its host was lost", "bad"),
}
"""Events that end a run, in words and with the tone of the page."""


@dataclass(frozen=True)
class State:
    """How a run stands."""

    words: str
    tone: str
    """good, open, warn or bad."""
    reason: str
    """Why it ended, as the run said it; "" where there is nothing to say."""
    is_over: bool


@dataclass(frozen=True)
class Facts:
    """The figures at the head of the page. None, or NaN in pairs, where the files do not say."""

    state: State
    step: int
    """The last one that was taken."""
    total_steps: int | None
    first_s: float | None
    last_s: float | None
    """When the run's first and last signs of life were, in seconds since 1970."""
    trained_s: float
    """Sum of the steps that count."""
    tokens: int
    loss: float | None
    """Of the last step that has one."""
    best_heldout: tuple[int, float] | None
    """(step, loss)."""
    last_heldout: tuple[int, float] | None
    tokens_per_s: float | None
    """Median over steps, as the two below."""
    tokens_per_s_per_gpu: float | None
    mfu: float | None
    peak_mem_gib: float | None
    """Highest of any rank's GPU."""
    peak_host_mem_gib: float | None
    """Highest of any rank's process."""
    save_stall_s: float
    data_stall_s: float
    """Seconds that training stood still, waiting for a save, or for packs."""
    eta_s: float | None
    """Time left, as of the last step; None once the run is over."""
    counts: dict[str, int]
    """How often: restarts, rollbacks, spikes, skipped (steps without an update)."""


def gather(run: RunFiles, now_s: float) -> Facts:
    """The facts of a run, seen at `now_s` (seconds since 1970)."""
    metrics = run.metrics
    step = int(metrics.step[-1]) if len(metrics.step) else max((event.step for event in run.events), default=0)
    times = [event.time_s for event in run.events if event.time_s is not None]
    last_s = last_sign(run)
    state = state_of(run, now_s, last_s)
    losses, heldout = metrics.known("loss")[1], metrics.known("heldout_loss")
    tokens_per_s = _median(metrics.known("tokens_per_s")[1])
    per_gpu = _median(metrics.known("tokens_per_s_per_gpu")[1])
    ranks = world_size(run.events)
    if per_gpu is None and tokens_per_s is not None and ranks:
        per_gpu = tokens_per_s / ranks
    best = int(np.argmin(heldout[1])) if len(heldout[1]) else None
    eta = metrics.columns["eta_s"][-1:]
    return Facts(
        state=state,
        step=step,
        total_steps=total_steps(run, step),
        first_s=min(times, default=None),
        last_s=last_s,
        trained_s=float(np.nansum(metrics.columns["step_time_s"])),
        tokens=int(np.nansum(metrics.columns["tokens"])),
        loss=float(losses[-1]) if len(losses) else None,
        best_heldout=None if best is None else (int(heldout[0][best]), float(heldout[1][best])),
        last_heldout=(int(heldout[0][-1]), float(heldout[1][-1])) if len(heldout[0]) else None,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=per_gpu,
        mfu=_median(metrics.known("mfu")[1]),
        peak_mem_gib=_highest(metrics.known("peak_mem_gib")[1]),
        peak_host_mem_gib=_highest(metrics.known("peak_host_mem_gib")[1]),
        save_stall_s=float(np.nansum(metrics.columns["save_stall_s"])),
        data_stall_s=float(np.nansum(metrics.columns["data_stall_s"])),
        eta_s=float(eta[0]) if len(eta) and np.isfinite(eta[0]) and not state.is_over else None,
        counts=count_events(run),
    )


def state_of(run: RunFiles, now_s: float, last_s: float | None) -> State:
    """How the run stands: by the last event that begins or ends it, and where it has not ended by its last sign."""
    last = next((event for event in reversed(run.events) if event.kind in ENDS or event.kind in BEGINS), None)
    if last is not None and last.kind in ENDS:
        words, tone = ENDS[last.kind]
        return State(words, tone, str(last.facts.get("reason", "")), is_over=True)
    if last is None and not len(run.metrics.step):
        return State("Nothing trained yet", "open", "", is_over=False)
    silent_s = None if last_s is None else now_s - last_s
    limit_s = run.setting("guard", "hang_after_s")
    if silent_s is not None and silent_s <= (limit_s if isinstance(limit_s, int | float) else HANG_AFTER_S):
        return State("Running", "open", "", is_over=False)
    seen = "" if last_s is None else f" Its last sign of life was on {clock(last_s)}."
    reason = f"The run has recorded no end.{seen} It was killed, or it hangs; the same command goes on."
    return State("No end recorded", "warn", reason, is_over=False)


def last_sign(run: RunFiles) -> float | None:
    """When the run last wrote something: its last event, or the steps behind that by how long they took.

    Not the files' times, which a copy of the folder changes.
    """
    last = next((event for event in reversed(run.events) if event.time_s is not None), None)
    if last is None or last.time_s is None:
        return None
    since = run.metrics.step > last.step
    return last.time_s + float(np.nansum(run.metrics.columns["step_time_s"][since]))


def total_steps(run: RunFiles, step: int) -> int | None:
    """Steps of the whole run: from the settings, or where epochs count, from how far a step is in its epoch."""
    last = next((event for event in reversed(run.events) if event.kind == "finish"), None)
    if last is not None:
        return max(last.step, step)
    longest, epochs = run.setting("train", "max_steps"), run.setting("train", "epochs")
    if isinstance(longest, int):
        return longest
    steps, done = run.metrics.known("epoch")
    if isinstance(epochs, int) and len(done) and done[-1] >= 0.05:  # rounded to 4 places: known to 1 in 1000 then
        return max(round(epochs * steps[-1] / done[-1]), step)
    return None


def count_events(run: RunFiles) -> dict[str, int]:
    """How often the run met with what a reader should know of."""
    kinds = [event.kind for event in run.events]
    return {
        "restarts": max(0, sum(kind in BEGINS for kind in kinds) - 1),
        "rollbacks": kinds.count("rollback"),
        "spikes": kinds.count("spike"),
        "skipped": len({event.step for event in run.events if event.kind == "skip"}),
    }


def world_size(events: list[Event]) -> int | None:
    """Ranks of the run's newest start."""
    sizes = [event.facts.get("world_size") for event in events if event.kind in BEGINS]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return known[-1] if known else None


def clock(time_s: float) -> str:
    """A moment for people."""
    return datetime.fromtimestamp(time_s, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _highest(values: np.ndarray) -> float | None:
    return float(values.max()) if len(values) else None
