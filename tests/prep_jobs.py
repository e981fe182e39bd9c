"""Whole `sft prep` jobs for tests: compared byte by byte, in processes of their own that may be killed anywhere."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_prep import build, readers
from data_prep.blocks import Block
from data_prep.spill import Spill
from sft.errors import run_command
from tests.prep_support import flags

IMPORTED = ["tests.prep_jobs", "gigatoken", "tokenizers", "awkward", "pandas"]
"""Once for all jobs of a test process: the last two, which gigatoken and pyarrow import when they are used, take a
job nine tenths of its time."""
SMALL_BLOCK_BYTES = 4000
"""Some 25 rows of `alpaca_rows`: a job of 700 rows has many blocks."""


def report_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def reasons(source: dict[str, Any]) -> dict[str, int]:
    return {reason: item["count"] for reason, item in source["dropped"].items()}


def content(out: Path) -> dict[str, bytes]:
    """Every file of an output by its path, but the times in the report."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    report = json.loads(found["report.json"])
    del report["timings_s"]
    return {**found, "report.json": json.dumps(report).encode()}


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Size, time of change and bytes of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_size if path.is_file() else 0,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Stop:
    """Where a job ends itself by a signal."""

    at_event: int | None = None
    """Before its n-th change to a file or folder of the output, from 0."""
    after_s: float | None = None
    """Seconds after its first block is encoded: before that, a busy machine may take any time."""
    number: int = signal.SIGKILL
    whole_group: bool = False


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def reused(self) -> int:
        """Blocks of an earlier run that this one used again."""
        told = [line for line in self.stderr.splitlines() if "finished blocks of an earlier run" in line]
        return int(told[0].split()[0]) if told else 0

    @property
    def changes(self) -> int:
        """Changes to files and folders of the output, where a Stop at one of them was set."""
        return self.stdout.count("a change\n")

    @property
    def error(self) -> str:
        """The one line that tells the user's mistake."""
        [line] = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert self.code == 2
        assert "Traceback" not in self.stderr
        return line


@dataclass(frozen=True)
class Started:
    process: BaseProcess
    told: Path

    def end(self, timeout_s: float = 60) -> Ended:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout_s} s")
        return Ended(self.process.exitcode, *(self.told.with_suffix(end).read_text() for end in (".out", ".err")))


def start(
    tmp_path: Path, *, stop: Stop | None = None, patch: Callable[[], None] | None = None, **options: Any
) -> Started:
    """Start a job of small blocks in a process of its own, that has its own group; `patch` runs there first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    told = tmp_path / f"told-{len(list(tmp_path.glob('told-*.err')))}"
    argv = flags(**{"seq_len": 1024, "workers": 1, "out": tmp_path / "out", **options})
    # not a daemon: those may have no workers of their own
    process = context.Process(target=_job, args=(argv, stop, patch, told), daemon=False)
    process.start()
    return Started(process, told)


def run(tmp_path: Path, **options: Any) -> Ended:
    return start(tmp_path, **options).end()


def _job(argv: list[str], stop: Stop | None, patch: Callable[[], None] | None, told: Path) -> None:
    os.setsid()
    for number, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(told.with_suffix(ending), os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    readers.BLOCK_BYTES = SMALL_BLOCK_BYTES
    if patch:
        patch()
    if stop:
        _arm(stop, argv[argv.index("--out") + 1])
    code = 1
    try:
        code = run_command(build.main, argv)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(stop: Stop, out: str) -> None:
    kill = os.killpg if stop.whole_group else os.kill
    pid = os.getpid()
    if stop.after_s is not None:
        timer = threading.Timer(stop.after_s, kill, (pid, stop.number))
        timer.daemon = True
        add = Spill.add

        def timed(spill: Spill, number: int, block: Block) -> Block:
            if not timer.is_alive():
                timer.start()
            return add(spill, number, block)

        Spill.add = timed
    if stop.at_event is not None:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if os.getpid() == pid and is_change(event, arguments, out):
                if count == stop.at_event:
                    kill(pid, stop.number)
                count += 1
                os.write(1, b"a change\n")

        sys.addaudithook(watch)


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def is_change(event: str, arguments: tuple[Any, ...], out: str) -> bool:
    """Whether an audit event is about to change what lies at `out` or in the work folder beside it."""
    if event == "open":
        path, mode, open_flags = arguments
        writes = isinstance(open_flags, int) and open_flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(out)
    return event in CHANGES and str(arguments[0]).startswith(out)


# Processes


def state(pid: int) -> tuple[str, int]:
    """(state letter, parent) of a process; Z where it has ended or is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[1])


def children(pid: int) -> list[int]:
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [child for child in found if state(child)[1] == pid]


def wait_until(done: Callable[[], bool], timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end_s, f"waited {timeout_s} s in vain"
        time.sleep(0.02)


@contextlib.contextmanager
def killed_at_end(started: Started) -> Iterator[Started]:
    """Whatever is left of a job is killed when the body ends."""
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.join()
