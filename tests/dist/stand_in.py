"""A stand-in for sft.train below the real launcher: it takes signals, "saves", and ends as a plan says."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import sft
from sft.ports import free_port
from tests import tiny

OPTIONS = ["--config", "run.yaml"]
COMMAND = ["deepspeed", "--log_level", "error", "--module", "sft.train", *OPTIONS]

PACKAGE = f"""
__path__.append({os.path.dirname(sft.__file__)!r})  # everything but train.py is the real one
__version__ = "0"
"""
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path

# listens: takes the signals; save_s: per rank; end: rank -> exit code, or a signal's negative number to die of;
# after_s: that comes so late; event: what rank 0 writes before it ends without having been asked
plan = {"listens": True, "save_s": [0, 0], "end": {}, "after_s": 0, "event": None, **json.loads(os.environ["PLAN"])}
rank = int(os.environ["RANK"])
received = []


def leave(code):
    (Path(os.environ.get("SFT_EXIT_CODES", ".")) / str(rank)).write_text(str(code))
    sys.exit(code)


def record(event):
    if rank == 0:
        Path("o").mkdir(exist_ok=True)
        with open("o/events.jsonl", "a") as file:
            file.write(json.dumps({"event": event}) + "\\n")


if plan["listens"]:
    record("start")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
Path(f"rank{rank}.args").write_text("\\n".join(sys.argv[1:]))
Path(f"rank{rank}.begun").touch()
while not received and str(rank) not in plan["end"]:
    time.sleep(0.05)
if received:
    time.sleep(plan["save_s"][rank])
    record("preempt")
    Path(f"rank{rank}.saved").touch()
    leave(75)
time.sleep(plan["after_s"])
if plan["event"]:
    record(plan["event"])
code = plan["end"][str(rank)]
if code < 0:
    os.kill(os.getpid(), -code)
leave(code)
"""


def make_workplace(folder: Path) -> Path:
    """A folder in which `python -m sft.train` is the stand-in, with a run file."""
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "__init__.py").write_text(PACKAGE)
    (folder / "sft" / "train.py").write_text(TRAINER)
    (folder / "run.yaml").write_text("model: {path: m}\ndata: {train: d}\nout: o\n")
    return folder


def environment(plan: str, **more: str) -> dict[str, str]:
    """Two CPU ranks that follow a plan (JSON); `deepspeed` and `python` of this environment; a port of one's own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    base = {key: value for key, value in tiny.rank_environment().items() if key != "PYTHONPATH"}
    return {**base, "PATH": path, "LOCAL_SIZE": "2", "MASTER_PORT": free_port(), "PLAN": plan, **more}


def processes_in(folder: Path) -> list[psutil.Process]:
    """Every living process that runs in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def launcher_in(folder: Path) -> psutil.Process:
    """launch.py, the parent of the ranks."""
    return next(one for one in processes_in(folder) if "deepspeed.launcher.launch" in one.cmdline())


def have_begun(folder: Path, ranks: int = 2) -> bool:
    return len(list(folder.glob("rank*.begun"))) == ranks


def wait_until(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
