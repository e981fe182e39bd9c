"""Asked to stop: signals to any rank and the run's time limit, agreed over all ranks once per forward.

A signal sets a flag and nothing else. The flags are reduced over a process group on the host, whose result is read one
forward later, so that no rank waits for it: when a scheduler signals one rank, every rank learns of it before the same
forward, drops what it has accumulated, saves the state of the last complete step, and leaves.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sft.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What schedulers send before they kill, what a terminal sends, and what a lost terminal sends."""
TIME_IS_UP = 64
"""In the place of a signal's number; signals end at 64."""
RANKS = 2**20


class StopRequest:
    """Whether this run was asked to stop."""

    def __init__(self, ends_at_s: float | None) -> None:
        """Collective.

        Args:
            ends_at_s: time.monotonic() at which everything must be saved; None: no limit.
        """
        self._ends_at_s = ends_at_s
        self._save_s: Callable[[], float] = lambda: 0.0
        self._group = dist.new_group(backend="gloo")
        self._received = 0
        self._flags = torch.zeros(2, dtype=torch.int64)
        self._work: Any = None
        self.reason: str | None = None
        """Set on every rank in the same step and forward: "rank 3 received SIGTERM"."""

    def listen(self) -> None:
        """Take the signals over; before this, and after `ignore`, they end the process."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def allow_for(self, save_s: Callable[[], float]) -> None:
        """From now on, leave so much time for a last save before the limit."""
        self._save_s = save_s

    def end_at_once(self) -> None:
        """For what follows the last step and needs no other rank: leave at the next signal, with the same code."""

        def leave(number: int, _frame: FrameType | None) -> None:
            raise Preempted(f"received {signal.Signals(number).name} after the last step; run the same command again")

        for number in SIGNALS:
            signal.signal(number, leave)

    def agreed(self) -> bool:
        """Whether any rank had been asked by the time of the call before this one. Collective; waits for nobody."""
        if self.reason is None:
            if self._work is not None:
                self._work.wait()
                self.learn(*self._flags.tolist())
            self._flags = torch.tensor(self.own_request(), dtype=torch.int64)
            self._work = dist.all_reduce(self._flags, group=self._group, async_op=True)
        return self.reason is not None

    def own_request(self) -> tuple[int, int]:
        """What this rank has to add to a sum over ranks, for `learn`: 1 and a code if it was asked, else 0 and 0."""
        if not self._received and self._ends_at_s is not None and time.monotonic() + self._save_s() >= self._ends_at_s:
            self._received = TIME_IS_UP
        return (1, self._received * RANKS + dist.get_rank()) if self._received else (0, 0)

    def learn(self, asked: float, code: float) -> None:
        """Take in the sum of all ranks' `own_request`."""
        if not asked or self.reason is not None:
            return
        number, rank = divmod(int(code), RANKS)
        if asked > 1:
            self.reason = f"{int(asked)} ranks were asked to"
        elif number == TIME_IS_UP:
            self.reason = "max_hours is nearly over"
        else:
            self.reason = f"rank {rank} received {signal.Signals(number).name}"

    def close(self) -> None:
        """Wait for the reduction that is under way. Collective."""
        if self._work is not None:
            self._work.wait()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number
