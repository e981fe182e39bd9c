"""What may stop a run, or undo a step: numbers that are not finite, that repeat, or that lie far above the usual.

Every rank feeds the same numbers (from all-reduces) and so reaches the same verdict: no clock, no randomness.

How a spike is told from noise, and why so:

* Usual is the median of the last `spike_window` losses of steps taken, with a spread of 1.4826 x their median absolute
  deviation (what the standard deviation would be, were they normal). Spikes are not left out: up to half of the window
  moves neither much, and after a lasting shift the new level is the usual one when it fills more than half.
* The median lags behind a falling loss, so early training and the drop where an epoch begins cannot alarm. Until the
  fall has left the window its spread is wide, and only a larger spike is seen.
* The spread counts as at least 3 % of the median, and 0.02 nats: with large batches 10 deviations would otherwise be a
  few per cent, and with memorised data a change of 0.01.
* The last step of an epoch may hold a single pack and be that much noisier: its limit is three times as far away.
* A loss that creeps up takes the window with it. So it is also compared with 1.5 x the mean of the whole epoch before,
  or with that mean + `spike_deviations` x the noise of single steps where this is more. Noise is taken from differences
  of neighbours, which a slope does not widen. In the first epoch only the held-out loss shows a rise that creeps.
* One alarm per spike: by the same rule there is no other until ALARM_REST steps in a row lay below its limit.

For scale: OLMo-core skips steps at 6 standard deviations above the mean of 128 (its SkipStepOptimizer); PaLM went back
about 100 steps and past 200 to 500 batches (Chowdhery et al. 2022, section 5.1).
"""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sft.config import GuardSection
from sft.errors import GuardStop

MIN_SAMPLES = 20
"""Losses before the first verdict on a spike (the whole window, if shorter): the median absolute deviation of
20 normal samples is below half of the true one in 2 % of cases, below a third in 0.1 %."""
MIN_SPREAD_OF_MEDIAN = 0.03
MIN_SPREAD = 0.02
"""Nats per token."""
TIMES_EPOCH_MEAN = 1.5
LAST_STEP_ALLOWANCE = 3.0
ALARM_REST = 10
REPEATS = 3
"""Steps in a row with a loss of exactly 0, or with one and the same gradient norm, that stop a run."""

NOT_FINITE_CAUSES = (
    "a learning rate that is too high, a broken base model, damaged data (the doc_ids are in events.jsonl), "
    "overlap_comm in the DeepSpeed file"
)
ZERO_LOSS_CAUSES = (
    "overlap_comm in the DeepSpeed file (set it to false), a broken base model or kernel, "
    "data learned by heart to the last bit"
)
SAME_NORM_CAUSES = (
    "gradients that are not refreshed (overlap_comm in the DeepSpeed file: set it to false), no parameter that is "
    "trained, a loss that does not depend on the weights, data that is the same row over and over"
)


@dataclass(frozen=True)
class Spike:
    """A step whose loss lies far above the usual; losses in nats per label."""

    step: int
    loss: float
    usual: float
    """Median of the window, or mean of the epoch before."""
    limit: float
    rule: str
    """window or epoch."""

    def __str__(self) -> str:
        usual = "the median of the last steps" if self.rule == "window" else "the mean of the epoch before"
        return f"step {self.step}: loss {self.loss:.4g} is above {self.limit:.4g}; {usual} is {self.usual:.4g}"


class Guard:
    """Judges every optimizer step of a run; what it remembers follows from `history` alone, so a resumed run judges
    as the uninterrupted one.

    Args:
        settings: the limits.
        steps_per_epoch: optimizer steps of one pass over the data.
        history: (step, loss, gradient norm) of every step judged so far, in order; NaN for one that was not applied.
            Without those, a resumed run counts steps that are not finite from 0.
    """

    def __init__(
        self, settings: GuardSection, steps_per_epoch: int, history: Sequence[tuple[int, float, float]] = ()
    ) -> None:
        self._settings = settings
        self._steps_per_epoch = steps_per_epoch
        self._replay(history)

    def judge(self, step: int, loss: float | None, grad_norm: float | None, applied: bool) -> Spike | None:
        """Note the outcome of optimizer step `step` (from 1) and say whether its loss is a spike.

        Args:
            loss: nats per label, mean over the step; NaN or infinite as measured. None where nothing was computed (no
                labels, or a step that is passed over): such a step is not judged and leaves no trace.
            grad_norm: global norm before clipping; None only with a loss of None.
            applied: whether the weights were changed.

        Raises:
            GuardStop: `max_skipped` steps in a row were not applied; a step was applied though its numbers are not
                finite; the loss was exactly 0, or the norm the same to the last bit, REPEATS applied steps in a row.
                Healthy runs do neither: a memorised set has a small loss, not 0, and of a loss that is 0 nothing is
                left to learn; other data gives another norm even at a learning rate of 0. Where every step holds the
                same data (one step per epoch) a repeated norm proves nothing, and only a norm of 0 stops.
        """
        if loss is None or grad_norm is None:
            return None
        if applied and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise GuardStop(
                f"step {step} changed the weights though its loss is {loss} and its gradient norm {grad_norm}; "
                f"usual causes: {NOT_FINITE_CAUSES}"
            )
        spike = self._note(step, loss, grad_norm) if applied else self._note(step, math.nan, math.nan)
        self._stop_if_hopeless(step)
        return spike

    def forget_after(self, step: int) -> None:
        """Judge as if nothing after `step` had happened: the run went back to it."""
        self._replay([past for past in self._history if past[0] <= step])

    def _replay(self, history: Sequence[tuple[int, float, float]]) -> None:
        self._history: list[tuple[int, float, float]] = []
        self._losses: deque[float] = deque(maxlen=self._settings.spike_window)
        self._last: deque[tuple[float, float]] = deque(maxlen=REPEATS)
        self._epochs: dict[int, list[float]] = {}  # sum and number of the losses, by epoch from 0
        self._skipped = 0
        self._calm = {"window": ALARM_REST, "epoch": ALARM_REST}  # applied steps since one lay above the limit
        for past in history:
            self._note(*past)

    def _note(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        self._history.append((step, loss, grad_norm))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped += 1
            return None
        self._skipped = 0
        spike = None
        for rule, usual, limit in self._limits(step):
            if loss > limit and self._calm[rule] >= ALARM_REST and spike is None:
                spike = Spike(step, loss, usual, limit, rule)
            self._calm[rule] = 0 if loss > limit else self._calm[rule] + 1
        self._losses.append(loss)
        self._last.append((loss, grad_norm))
        epoch = self._epochs.setdefault((step - 1) // self._steps_per_epoch, [0.0, 0])
        epoch[0] += loss
        epoch[1] += 1
        return spike

    def _limits(self, step: int) -> list[tuple[str, float, float]]:
        """(rule, usual loss, limit) of the rules that can judge this step by the losses before it."""
        if len(self._losses) < min(MIN_SAMPLES, self._settings.spike_window):
            return []
        middle = median(self._losses)
        spread = 1.4826 * median(abs(past - middle) for past in self._losses)
        margin = self._settings.spike_deviations * max(spread, MIN_SPREAD_OF_MEDIAN * middle, MIN_SPREAD)
        is_last = self._steps_per_epoch > 1 and step % self._steps_per_epoch == 0
        allowance = LAST_STEP_ALLOWANCE if is_last else 1.0
        limits = [("window", middle, middle + allowance * margin)]
        mean = self._mean_of_epoch((step - 1) // self._steps_per_epoch - 1)
        if mean is not None:
            changes = (abs(after - before) for before, after in itertools.pairwise(self._losses))
            noise = max(1.4826 * median(changes) / math.sqrt(2), MIN_SPREAD)
            margin = max((TIMES_EPOCH_MEAN - 1) * mean, self._settings.spike_deviations * noise)
            limits.append(("epoch", mean, mean + allowance * margin))
        return limits

    def _mean_of_epoch(self, epoch: int) -> float | None:
        """None where fewer than half of its steps are known: too few to stand for the whole."""
        total, number = self._epochs.get(epoch, (0.0, 0))
        return total / number if 2 * number >= self._steps_per_epoch else None

    def _stop_if_hopeless(self, step: int) -> None:
        if self._skipped >= self._settings.max_skipped:
            raise GuardStop(
                f"step {step}: loss or gradient was not finite {self._skipped} steps in a row, none of them taken; "
                f"usual causes: {NOT_FINITE_CAUSES}"
            )
        if len(self._last) < REPEATS:
            return
        if all(loss == 0 for loss, _ in self._last):
            raise GuardStop(
                f"step {step}: the loss was exactly 0 in {REPEATS} steps in a row; usual causes: {ZERO_LOSS_CAUSES}"
            )
        norms = {norm for _, norm in self._last}
        if norms == {0.0} or (len(norms) == 1 and self._steps_per_epoch > 1):
            raise GuardStop(
                f"step {step}: the gradient norm was exactly {norms.pop()!r} in {REPEATS} steps in a row; "
                f"usual causes: {SAME_NORM_CAUSES}"
            )
