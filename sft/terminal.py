"""What people see of a run: a bar in a terminal; plain lines under Slurm, in files and in pipes."""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 2.0
"""Without a bar, at most one step is printed in this time; metrics.jsonl has them all."""
RECENT_STEPS = 100
"""Their median says how long a step takes."""
FULL_DETAIL = 4


class TimeLeft:
    """Estimate of the time to the last step; to be asked once after each step."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_s: float | None = None
        self._between_s = 0.0
        self._steps = 0

    def after(self, step: int, step_time_s: float | None) -> float | None:
        """Seconds from now, or None after the first step of this start, which has to warm up.

        Steps left x (median of the recent steps' own times + mean of what lies between two steps). The median passes
        over a step that was held up once; held-out loss, probes and waits for checkpoints come seldom and take long,
        so what they take is spread evenly over all steps since the start.
        """
        now_s, before_s = self._clock(), self._last_s
        self._last_s = now_s
        if before_s is None:
            return None
        self._steps += 1
        self._between_s += max(0.0, now_s - before_s - (step_time_s or 0.0))
        if step_time_s is not None:
            self._recent_s.append(step_time_s)
        if not self._recent_s:
            return None
        per_step_s = statistics.median(self._recent_s) + self._between_s / self._steps
        return per_step_s * max(0, self._total_steps - step)


class Terminal:
    """Lines for people, and how far the run is."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._console = Console(highlight=False)
        plain = "SLURM_JOB_ID" in os.environ or not sys.stdout.isatty() or self._console.is_dumb_terminal
        self._bar = None if plain else _Bar(self._console, total_steps)
        self._said_s = float("-inf")

    def start(self) -> None:
        """Show the bar, where there is to be one."""
        if self._bar:
            self._bar.start()

    def stop(self) -> None:
        """Leave the bar as it is, for what is printed next."""
        if self._bar:
            self._bar.stop()

    def say(self, line: str, style: str | None = None) -> None:
        """One line, however long."""
        self._console.print(line, style=style, markup=False, soft_wrap=True)

    def show(self, values: dict[str, Any], best: float | None) -> None:
        """A line of metrics.jsonl; `best` is the lowest held-out loss so far, in nats per label."""
        step = values["step"]
        if self._bar:
            self._bar.show(values, best)
        elif step in (1, self._total_steps) or time.monotonic() - self._said_s >= SECONDS_BETWEEN_LINES:
            self._said_s = time.monotonic()
            left = [f"left {duration(values['eta_s'])}"] if values["eta_s"] is not None else []
            self.say("  ".join([f"step {step}/{self._total_steps}", *describe(values, None), *left]))


class _Bar(Progress):
    """Two lines: how far the run is, and how it goes, as much of it as the terminal is wide."""

    def __init__(self, console: Console, total_steps: int) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[epoch]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._status: tuple[dict[str, Any], float | None] | None = None
        super().__init__(*columns, console=console, expand=True, refresh_per_second=4)
        self._train = self.add_task("train", total=total_steps, epoch="", left="")

    def show(self, values: dict[str, Any], best: float | None) -> None:
        """A line of metrics.jsonl, and the lowest held-out loss so far."""
        self._status = (values, best)
        left = "" if values["eta_s"] is None else f"left {duration(values['eta_s'])}"
        self.update(self._train, completed=values["step"], epoch=f"epoch {values['epoch']:.2f}", left=left)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the figures below it."""
        yield self.make_tasks_table(self.tasks)
        if self._status is not None:
            yield Text(fit(*self._status, self.console.width), no_wrap=True, overflow="ellipsis")


def fit(values: dict[str, Any], best: float | None, width: int) -> str:
    """The figures of a step in one line of at most `width` characters; the least of them always."""
    lines = ("  ".join(describe(values, best, detail)) for detail in range(FULL_DETAIL, 0, -1))
    return next((line for line in lines if len(line) <= width), "  ".join(describe(values, best, 0)))


def describe(values: dict[str, Any], best: float | None, detail: int = FULL_DETAIL) -> list[str]:
    """The figures of a line of metrics.jsonl; fewer of them with less `detail`, which counts from 0."""
    if values["loss"] is None:
        return ["passed over"]
    parts = [f"loss {values['loss']:.4f}"]
    if detail >= 2:
        parts.append(f"lr {values['lr']:.2e}")
    if detail >= 3:
        parts.append(f"grad norm {values['grad_norm']:.3f}")
    parts.append(_speed(values, each=detail >= FULL_DETAIL))
    if values["mfu"] is not None and detail >= 1:
        parts.append(f"MFU {values['mfu']:.1%}")
    if best is not None and detail >= FULL_DETAIL:
        parts.append(f"lowest held-out loss {best:.4f}")
    return parts


def duration(seconds: float) -> str:
    """45 s, 12 min, 2 h 05 min, 3 d 04 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def _speed(values: dict[str, Any], *, each: bool) -> str:
    total, own = values["tokens_per_s"], values["tokens_per_s_per_gpu"]
    unit = "rank" if values["peak_mem_gib"] is None else "GPU"
    return f"{total:,.0f} tokens/s" + f" ({own:,.0f}/{unit})" * (each and own != total)
