"""Early stopping on held-out loss: a pure function of what was measured, so that a resumed run stops there, too.

The classic rule (Prechelt 1998, "Early stopping - but when?"): no new lowest loss in `patience` measurements in a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sft.config import EarlyStopSection


@dataclass(frozen=True)
class Stalled:
    """The held-out loss has stopped falling."""

    step: int
    """After which that was seen."""
    best_step: int
    best_loss: float
    measurements: int
    """Since the best."""

    def __str__(self) -> str:
        return (
            f"held-out loss has not fallen in {self.measurements} measurements up to step {self.step}; the lowest was "
            f"{self.best_loss:.4f} after step {self.best_step}"
        )


def stalled(measured: Sequence[tuple[int, float | None]], every: int, rule: EarlyStopSection) -> Stalled | None:
    """The first moment at which the rule says stop, or None.

    Args:
        measured: (step, held-out loss) in order of steps. None, where measuring was cut short, and NaN do not count:
            metrics.jsonl, from which a resumed run knows them, holds null for either.
        every: eval.every; only its multiples count, for how often a run is saved must not show.
    """
    if rule.patience is None:
        return None
    best_step, best_loss, waited = 0, float("inf"), 0
    for step, loss in measured:
        if step % every or loss is None or not math.isfinite(loss):
            continue
        if loss < best_loss - rule.min_delta:
            best_step, best_loss, waited = step, loss, 0
        else:
            waited += 1
        if waited >= rule.patience:
            return Stalled(step, best_step, best_loss, waited)
    return None
