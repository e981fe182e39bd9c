"""Learning rate as a pure function of the step: nothing to restore, nothing to drift."""

import math

from sft.config import ScheduleSection


def warmup_steps(schedule: ScheduleSection, total_steps: int) -> int:
    """Steps of linear warm-up: a fraction of the run below 1, else a number of steps."""
    return as_steps(schedule.warmup, total_steps)


def as_steps(value: float, total_steps: int) -> int:
    """A fraction of all steps below 1, rounded up, else a number of steps."""
    if value < 1:
        return math.ceil(value * total_steps - 1e-9)  # 0.07 of 100 is 7.000000000000001 in binary
    return int(value)


def lr_at(step: int, total_steps: int, peak_lr: float, schedule: ScheduleSection) -> float:
    """Learning rate of optimizer step `step`, 1-based: peak at the end of the warm-up, the floor at `total_steps`.

    Cosine: Loshchilov & Hutter 2017 (SGDR); with restarts the cycles are of equal length and full height.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step <= warmup:
        return peak_lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = schedule.min_lr_ratio
    if schedule.name == "constant":
        return peak_lr
    if schedule.name == "linear":
        return peak_lr * (floor + (1 - floor) * (1 - progress))
    if schedule.name == "cosine_restarts" and progress < 1:
        progress = progress * schedule.cycles % 1
    return peak_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
