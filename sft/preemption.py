"""Asked to stop: signals to any rank and the run's time limit, agreed over all ranks once per forward.

A signal sets a flag and nothing else. The flags are reduced over a process group on the host, whose result is read one
forward later, so that no rank waits for it: when a scheduler signals one rank, every rank learns of it before the same
forward, drops what it has accumulated, saves the state of the last complete step, and leaves.
"""

import os
import time
from collections.abc import Callable
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist

from sft.engine import GROUP_TIMEOUT
from sft.errors import UserError
from sft.signals import Inbox

TIME_IS_UP = 64
"""In the place of a signal's number; signals end at 64."""
RANKS = 2**20


class StopRequest:
    """Whether this run was asked to stop."""

    def __init__(self, inbox: Inbox, ends_at_s: float | None) -> None:
        """Collective.

        Args:
            ends_at_s: time.monotonic() at which everything must be saved; None: no limit.

        Raises:
            UserError: the ranks' hosts do not reach each other over TCP.
        """
        self._inbox = inbox
        self._ends_at_s = ends_at_s
        self._save_s: Callable[[], float] = lambda: 0.0
        try:
            self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        except RuntimeError as error:
            raise UserError(
                f"rank {dist.get_rank()} on {os.uname().nodename}: no TCP connection with the others "
                f"({str(error).splitlines()[0][:120]}); name the network interface in GLOO_SOCKET_IFNAME"
            ) from error
        self._flags = torch.zeros(2, dtype=torch.int64)
        self._work: Any = None
        self.reason: str | None = None
        """Set on every rank in the same step and forward: "rank 3 received SIGTERM"."""

    def allow_for(self, save_s: Callable[[], float]) -> None:
        """From now on, leave so much time for a last save before the limit."""
        self._save_s = save_s

    def agreed(self) -> bool:
        """Whether any rank had been asked by the time of the call before this one. Collective; waits for nobody."""
        if self.reason is None:
            if self._work is not None:
                self._work.wait()
                self.learn(*self._flags.tolist())
            self._flags = torch.tensor(self.own_request(), dtype=torch.int64)
            self._work = dist.all_reduce(self._flags, group=self._group, async_op=True)
        return self.reason is not None

    def settle(self) -> bool:
        """Whether any rank has been asked by now. Collective; waits for the slowest rank."""
        return self.agreed() or self.agreed()

    def own_request(self) -> tuple[int, int]:
        """What this rank has to add to a sum over ranks, for `learn`: 1 and a code if it was asked, else 0 and 0."""
        asked = int(self._inbox.received or 0)
        rank = dist.get_rank()
        if not asked and rank == 0 and self._time_is_up():
            asked = TIME_IS_UP
        return (1, asked * RANKS + rank) if asked else (0, 0)

    def learn(self, asked: float, code: float) -> None:
        """Take in the sum of all ranks' `own_request`."""
        if not asked or self.reason is not None:
            return
        number, rank = divmod(int(code), RANKS)
        if asked > 1:
            own = self._inbox.received
            self.reason = f"{int(asked)} ranks received signals" + (
                f", rank {dist.get_rank()} {own.name}" if own else ""
            )
        elif number == TIME_IS_UP:
            self.reason = "max_hours is nearly over"
        else:
            self.reason = f"rank {rank} received {Signals(number).name}"

    def close(self) -> None:
        """Wait for the reduction that is under way. Collective."""
        if self._work is not None:
            self._work.wait()

    def _time_is_up(self) -> bool:
        return self._ends_at_s is not None and time.monotonic() + self._save_s() >= self._ends_at_s
