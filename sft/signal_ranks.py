"""`python -m sft.signal_ranks NUMBER EXIT_CODES`: signals one launch's ranks here; its arm through ssh.

Prints how many were reached. Those that would die of a signal for which they are not ready yet are left alone.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.errors import run_command
from sft.ranks import find_ranks, listens, send


def main(argv: Sequence[str]) -> None:
    """Signal the ranks that leave their exit codes in this folder."""
    number, ranks = int(argv[0]), set(find_ranks(Path(argv[1])))
    print(len(send(number, ranks if number == signal.SIGKILL else {rank for rank in ranks if listens(rank)})))


if __name__ == "__main__":
    sys.exit(run_command(main))
