"""The ways a command may end early, and the exit codes that callers rely on.

Exit codes of every command: 0 success, 1 crash (with traceback), 2 the user's input, 3 a gate failed. Of training also:
4 its guard stopped it, 5 another rank died or hung, 75 it was asked to stop and saved (EX_TEMPFAIL: run it again).
"""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

EXIT_BAD_INPUT = 2
EXIT_GATE_FAILED = 3
EXIT_GUARD = 4
EXIT_RANK_LOST = 5
EXIT_PREEMPTED = 75
OTHER_RANKS_WAIT_S = 5
EXIT_CODES_FOLDER = "SFT_EXIT_CODES"
"""Environment variable: a folder in which every rank leaves its exit code in a file named by its number."""


class UserError(Exception):
    """A mistake in the input: one line that says what, where, which value and what to do."""


class GateFailed(Exception):
    """A measured value is beyond the limit that the user set; the report has been written."""


class GuardStop(Exception):
    """Training must not go on: numbers that no healthy run shows. The last checkpoint is untouched."""


class RankLost(Exception):
    """Another rank died or hangs; the message names it and its host."""


class Preempted(Exception):
    """The run was asked to stop, or its time is up; everything is saved, and the same command goes on."""


EXIT_CODES: dict[type[Exception], tuple[int, str]] = {
    UserError: (EXIT_BAD_INPUT, "error"),
    GateFailed: (EXIT_GATE_FAILED, "gate failed"),
    GuardStop: (EXIT_GUARD, "stopped"),
    RankLost: (EXIT_RANK_LOST, "stopped"),
    Preempted: (EXIT_PREEMPTED, "stopped as asked"),
}
"""Expected endings: exit code, and the word before the message."""


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and turn the expected endings into exit codes, without a traceback."""
    try:
        main(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)  # a reader that left shows here at the latest, not when Python has ended
    except tuple(EXIT_CODES) as error:
        code, word = next(ending for kind, ending in EXIT_CODES.items() if isinstance(error, kind))
        _say(f"{word}: {error}", agreed=isinstance(error, GateFailed | GuardStop | Preempted))
        return code
    except BrokenPipeError:  # the reader left, as in `sft show runs/x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            _say(f"error: {error.strerror}: nothing more can be written; free disk space, or write elsewhere")
            return EXIT_BAD_INPUT
        if error.filename is None or error.strerror is None:
            raise
        _say(f"error: {shorten(str(error.filename))}: {error.strerror}; check the path, its permissions and the disk")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_rank(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """`run_command` for one process of a group: leaves at once, with the exit code that it earned.

    An orderly exit waits for nothing here: threads of the process group that are still alive would abort it
    (SIGABRT), and the launcher would report that instead of the mistake.
    """
    sys.stdout, sys.stderr = _Tolerant.over(sys.stdout), _Tolerant.over(sys.stderr)
    try:
        code = run_command(main)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process at once, from any thread; the code also goes to the supervisor above the launcher, if any."""
    if folder := os.environ.get(EXIT_CODES_FOLDER):
        path = os.path.join(folder, os.environ.get("RANK", "0"))
        with suppress(OSError), open(path, "w", encoding="ascii") as file:  # the folder goes when the supervisor does
            file.write(str(code))
    os._exit(code)


class _Tolerant(io.TextIOWrapper):
    """A stream whose reader may leave: a run must not end because a terminal was closed or a pipe was cut."""

    @classmethod
    def over(cls, stream: TextIO) -> "TextIO":
        if isinstance(stream, cls):
            return stream
        return cls(stream.buffer, stream.encoding, stream.errors, line_buffering=True)

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _say(line: str, *, agreed: bool = False) -> None:
    """Plainly from a host's first rank. The others mostly find the same mistake: they name themselves, after a pause
    in which a launcher that has seen the first one end will have ended them. What all ranks agreed on, rank 0 says."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT_S)
        line = f"[rank {rank} on {os.uname().nodename}] {line}"
    if rank == "0" or not agreed:
        print(line, file=sys.stderr)


def shorten(text: str, limit: int = 120) -> str:
    """`text`, or its beginning and end where it is long."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"
