"""What a learning-rate sweep says: pure functions of learning rates and losses (Smith 2017, arXiv:1506.01186).

The loss of a step is measured before its update: what a learning rate does shows in the loss of the step after.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.8
"""Decay of the moving average of losses: it looks back 4 steps, a quarter of a decade of the sweep."""
LAG = round(SMOOTHING / (1 - SMOOTHING))
"""Mean age in steps of what the moving average holds."""
FLAT_STEPS = 20
"""First steps of the sweep, at learning rates that change nothing yet: their mean is the loss to start from."""
HALF_WINDOW = 7
"""A slope is that of a line through this many losses on either side, a decade in all."""
FEWEST_STEPS = FLAT_STEPS + 2 * HALF_WINDOW
CLEAR_FALL = 2.0
"""In standard deviations of the noise between batches. Of sweeps of noise alone, 2 in 1,000 seem to fall as far."""
SMALLEST_FALL = 0.01
"""Of the loss to start from; anything less is no use, whatever its cause."""
BELOW_LOWEST = 10.0
"""The suggestion lies at least by this factor below the learning rate of the lowest loss, where it is about to rise."""
RULE = (
    f"the learning rate at which the loss falls fastest (slope of a line through {2 * HALF_WINDOW + 1} losses over "
    f"log10 lr, before the lowest smoothed loss), and at most 1/{BELOW_LOWEST:.0f} of that at the lowest smoothed loss"
)


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, or none and why."""

    lr: float | None
    reason: str
    steepest_lr: float | None = None
    lowest_lr: float | None = None


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, divided by its weights so that it does not begin at 0 (Kingma & Ba 2015)."""
    smoothed, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return smoothed


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """A learning rate by RULE, to two digits.

    Args:
        lrs: learning rate of each step's update, rising by the same factor from step to step.
        losses: finite loss of each step, before that update.
    """
    if len(losses) < FEWEST_STEPS:
        return Suggestion(None, f"the sweep ended after {len(losses)} steps; {FEWEST_STEPS} are needed to see a slope")
    smoothed = smooth(losses)
    lowest = FLAT_STEPS + int(np.argmin(smoothed[FLAT_STEPS:]))
    noise = _noise(losses[: lowest + 1])
    start = float(np.mean(losses[:FLAT_STEPS]))
    fall = start - smoothed[lowest]
    if fall <= max(CLEAR_FALL * noise, SMALLEST_FALL * start):
        return Suggestion(
            None,
            f"the loss does not clearly fall anywhere: from {start:.4f} to {smoothed[lowest]:.4f} at its lowest, with "
            f"a noise of {noise:.4f} between batches; raise batch.rows_per_step, or see whether anything is trained",
        )
    steepest_lr = _before(lrs, _steepest(lrs, losses, lowest))
    lowest_lr = _before(lrs, lowest - LAG)
    lr = float(f"{min(steepest_lr, lowest_lr / BELOW_LOWEST):.1e}")
    reason = (
        f"the loss falls from {start:.4f} to {smoothed[lowest]:.4f}, fastest at {steepest_lr:.1e}, and is lowest at "
        f"{lowest_lr:.1e}"
    )
    return Suggestion(lr, reason, steepest_lr, lowest_lr)


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of losses around their slow course: robust, from differences of neighbours."""
    return float(1.4826 * np.median(np.abs(np.diff(losses))) / math.sqrt(2))


def _steepest(lrs: Sequence[float], losses: Sequence[float], end: int) -> int:
    """Middle of the window up to `end` through whose losses the steepest falling line goes."""
    log_lrs = np.log10(lrs)
    last = max(end - HALF_WINDOW, HALF_WINDOW)
    windows = {middle: slice(middle - HALF_WINDOW, middle + HALF_WINDOW + 1) for middle in range(HALF_WINDOW, last + 1)}
    slopes = {middle: np.polyfit(log_lrs[window], losses[window], 1)[0] for middle, window in windows.items()}
    return min(slopes, key=lambda middle: slopes[middle])


def _before(lrs: Sequence[float], step: int) -> float:
    """The last learning rate whose update shows in the loss of `step`."""
    return lrs[max(step - 1, 0)]
