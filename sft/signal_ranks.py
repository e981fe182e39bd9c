"""`python -m sft.signal_ranks NUMBER MODULE OPTIONS`: signals a run's ranks on this host; the launcher's arm over ssh.

Prints how many were reached. Those that would die of a signal for which they are not ready yet are left alone.
"""

import signal
import sys
from collections.abc import Sequence

from sft.errors import run_command
from sft.ranks import find_ranks, listens, send


def main(argv: Sequence[str]) -> None:
    """Signal the ranks that run in this folder with exactly these options."""
    number, module, options = int(argv[0]), argv[1], argv[2:]
    ranks = set(find_ranks(module, options))
    print(len(send(number, ranks if number == signal.SIGKILL else {rank for rank in ranks if listens(rank)})))


if __name__ == "__main__":
    sys.exit(run_command(main))
