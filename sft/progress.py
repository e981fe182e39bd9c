"""Progress of long loops: a bar on a terminal, a line at every tenth elsewhere; always on stderr."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Step = TypeVar("Step")
QUIET_S = 10.0
"""Without a terminal, work shorter than this says nothing."""


def track(steps: Sequence[Step], label: str, *, visible: bool) -> Iterator[Step]:
    """Yield the steps and show how many are done; silent where not `visible` (ranks other than the first)."""
    console = Console(stderr=True)
    if visible and not console.is_terminal:
        yield from _with_lines(steps, label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not visible) as progress:
        yield from progress.track(steps, description=label)


def _with_lines(steps: Sequence[Step], label: str) -> Iterator[Step]:
    start_s = said_s = time.monotonic()
    for done, step in enumerate(steps, start=1):
        yield step
        now_s = time.monotonic()
        is_tenth = done * 10 // len(steps) > (done - 1) * 10 // len(steps)
        if is_tenth and now_s - said_s >= QUIET_S:
            said_s = now_s
            sys.stderr.write(f"{label}: {done}/{len(steps)}, {now_s - start_s:.0f} s\n")
