"""`python -m sft.launch deepspeed ... --module sft.train OPTIONS`: a launcher of one's own choice, with the signals and
exit codes of `sft train`. The files in launch/ are built on it."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.config import RunConfig
from sft.errors import UserError, run_command
from sft.settings import load
from sft.supervisor import TRAINER, supervise


def main(argv: Sequence[str]) -> None:
    """Check the options, then run the command under supervision and leave with the ranks' exit code.

    Raises:
        UserError: the command does not start sft.train, or its options are wrong.
    """
    if TRAINER not in argv:
        raise UserError(f"sft.launch: no {TRAINER} in the command; expected: deepspeed ... --module {TRAINER} OPTIONS")
    options = argv[list(argv).index(TRAINER) + 1 :]
    out = Path(load(RunConfig, options, prog="sft train").out)
    if code := supervise(argv, options, out, functools.partial(print, file=sys.stderr, flush=True)):
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(run_command(main))
