"""A run's model and shards on this host's own disk, once per host: `python -m sft.stage --config FILE --to FOLDER`."""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sft.config import RunConfig
from sft.errors import run_command
from sft.settings import load
from sft.staging import model_source, shard_source, stage


class StageConfig(RunConfig):
    to: str
    """Folder on this host's own disk; model and shards get folders of their own below it."""


def main(argv: Sequence[str]) -> None:
    """Stage, and print the options that make `sft train` read the copies: one line, quoted for a shell."""
    config = load(StageConfig, argv, prog="sft stage")
    with _stopped_in_order():
        sources = [model_source(Path(config.model.path)), shard_source("data.train", Path(config.data.train))]
        if config.data.heldout is not None:
            sources.append(shard_source("data.heldout", Path(config.data.heldout)))
        copies = stage(sources, Path(config.to).absolute(), _say)
    pairs = zip(sources, copies, strict=True)
    print(shlex.join([word for source, copy in pairs for word in (f"--{source.option}", str(copy))]))


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body as an exception, so that it can clear up.

    Raises:
        SystemExit: 128 + the signal's number, as a shell reports it.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        _say(f"stopped by {signal.Signals(number).name}: what was on its way is removed; run the same command again")
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
