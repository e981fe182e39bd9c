"""Signals that ask a rank to stop: noted here, acted upon where all ranks can agree. Free of slow imports."""

import signal
from types import FrameType

from sft.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What schedulers send before they kill, what a terminal sends, and what a lost terminal sends."""


class Inbox:
    """The first signal that this process was sent."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        """Note signals from now on, instead of dying of them."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def end_at_once(self) -> None:
        """For what follows the last step and needs no other rank: leave at the next signal, or now if one came."""
        for number in SIGNALS:
            signal.signal(number, self._leave)
        if self.received is not None:
            self._leave(self.received, None)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Preempted(f"received {name} after the last step, which is saved; run the same command again to export")
