"""What three trainings of the same model say about overlap_comm. Nothing is measured here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from sft.doctor.finding import Finding, Status

CHECK = "overlap_comm"


@dataclass(frozen=True)
class Trained:
    """What was seen of one training, the same on all ranks."""

    losses: list[float]
    norms: list[float]
    """Gradient norm of each step; infinite where the step was not taken."""
    step_s: float


@dataclass(frozen=True)
class Difference:
    """Of two trainings."""

    losses: float
    """Largest relative one of a step."""
    norms: float
    """The same of the gradient norms."""
    weights: float
    """L2 distance of the final weights, relative to what the training has changed."""

    def exceeds(self, limit: "Difference") -> bool:
        """Any of them; not a number exceeds everything."""
        return not (self.losses <= limit.losses and self.norms <= limit.norms and self.weights <= limit.weights)

    def __str__(self) -> str:
        return f"losses {self.losses:.1g}, norms {self.norms:.1g}, weights {self.weights:.1g}"


CONTROL_FACTOR = 4
"""Two pairs of equal runs differ by unequal amounts; a race shows as far more."""
ROUNDING = {torch.float32: Difference(1e-6, 1e-5, 1e-3), torch.bfloat16: Difference(1e-4, 1e-3, 1e-2)}
"""What sums in another order may come to, where the control happens to be equal to the last bit. Weights are more
sensitive: Adam's first steps go by the sign of a gradient, however small."""
TOO_UNLIKE = Difference(1e-2, 5e-2, 0.5)
"""Where even two runs without overlap_comm differ by more, a wrong gradient could hide."""


def judge(
    *,
    wanted: bool,
    off: Trained,
    on: Trained,
    control: Difference,
    difference: Difference,
    dtype: torch.dtype,
    file: str,
    has_streams: bool,
) -> Finding:
    """The finding.

    Args:
        wanted: the run's file has it on.
        control: of two trainings without it.
        difference: of a training with it and one without.
        has_streams: the device can compute and communicate at the same time.
    """
    rounding = ROUNDING[dtype]
    limit = Difference(*(max(CONTROL_FACTOR * own, least) for own, least in zip(
        asdict(control).values(), asdict(rounding).values(), strict=True)))  # fmt: skip
    figures = {
        "difference": asdict(difference),
        "control": asdict(control),
        "limit": asdict(limit),
        "step_s": {"off": off.step_s, "on": on.step_s},
        "losses": {"off": off.losses, "on": on.losses},
        "norms": {"off": off.norms, "on": on.norms},
    }
    leave_off = f"set zero_optimization.overlap_comm to false in {file}" if wanted else f"leave it off in {file}"
    if problem := _broken(off):
        text = f"without it, on a small model: {problem}"
        remedy = "training itself goes wrong on these hosts: see the findings on bandwidth and on the GPUs first"
        return Finding(CHECK, "fail", "all ranks", text, remedy, figures)
    if problem := _broken(on) or (_apart(difference, control) if difference.exceeds(limit) else None):
        status: Status = "fail" if wanted else "warn"
        return Finding(CHECK, status, "all ranks", f"with it, on a small model: {problem}", leave_off, figures)
    if control.exceeds(TOO_UNLIKE):
        text = f"cannot be told: two trainings without it differ already ({control})"
        return Finding(CHECK, "warn", "all ranks", text, leave_off, figures)
    text = f"same gradients with and without it on a small model ({difference}; two without it: {control})"
    return Finding(CHECK, "pass", "all ranks", f"{text}; {_speed(off, on, wanted, file, has_streams)}", figures=figures)


def largest_relative(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest |one - other| / |one|; infinite where one of them is no number."""
    parts = [abs(a - b) / abs(a) if a else float(a != b) for a, b in zip(one, other, strict=True)]
    return max(part if math.isfinite(part) else math.inf for part in parts)


def _broken(trained: Trained) -> str | None:
    """The first step with a loss or a norm that no training has."""
    for step, (loss, norm) in enumerate(zip(trained.losses, trained.norms, strict=True), start=1):
        if not (math.isfinite(loss) and loss > 0 and math.isfinite(norm) and norm > 0):
            return f"loss {loss:.3g} and gradient norm {norm:.3g} in step {step}"
    return None


def _apart(difference: Difference, control: Difference) -> str:
    return f"other gradients than without it ({difference}; two trainings without it: {control})"


def _speed(off: Trained, on: Trained, wanted: bool, file: str, has_streams: bool) -> str:
    if not has_streams:
        return "on CPU nothing overlaps: it gains nothing"
    gain = off.step_s / on.step_s - 1
    text = f"{abs(gain):.0%} {'faster' if gain >= 0 else 'slower'} with it ({on.step_s:.3g} s, {off.step_s:.3g} s)"
    return text if wanted or gain < 0 else f"{text}; it may be turned on in {file}"
