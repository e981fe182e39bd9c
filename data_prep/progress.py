"""Progress of the encoding: a bar with rates and the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_prep.blocks import Block

PLAIN_EVERY_S = 10.0


def with_progress(blocks: Iterator[tuple[int, Block]], total_bytes: int) -> Iterator[Block]:
    """Pass blocks on; each comes with the bytes of input it stands for."""
    console = Console(stderr=True)
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    start_s = told_s = time.perf_counter()
    rows = tokens = done_bytes = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=total_bytes, rates="")
        for input_bytes, block in blocks:
            rows, tokens = rows + block.num_rows, tokens + int(block.encoded.lengths.sum())
            done_bytes += input_bytes
            now_s = time.perf_counter()
            spent_s = max(now_s - start_s, 1e-9)
            rates = f"{rows:,} rows · {rows / spent_s:,.0f} rows/s · {tokens / spent_s:,.0f} tokens/s"
            bar.update(task, completed=done_bytes, rates=rates)
            if not console.is_terminal and now_s - told_s > PLAIN_EVERY_S:
                told_s = now_s
                left_s = spent_s * (total_bytes / max(done_bytes, 1) - 1)
                with suppress(OSError):  # nobody reads it any more; the job goes on
                    sys.stderr.write(f"encoded {rates} · {done_bytes / total_bytes:.0%} · {left_s:.0f} s left\n")
            yield block
