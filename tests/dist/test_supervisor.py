"""Signals and exit codes through DeepSpeed's own launcher, with a stand-in for the trainer (tests/dist/stand_in.py).

All runs have the same command line and go on at the same time, in folders of their own.
Run: pytest tests/dist/test_supervisor.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from sft.ranks import exit_code, find_ranks, read_exit_codes
from tests.dist import stand_in
from tests.dist.stand_in import have_begun, launcher_in, processes_in, wait_until

TERM, USR1, INT, HUP, KILL = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGKILL,
)
LONG_S = [300, 300]


@dataclass
class Ended:
    code: int
    said: str
    saved: int
    """Ranks that got to the end of their save."""
    left: int
    """Processes that outlived the command."""


def send(*numbers: int, apart_s: float = 0.0) -> Callable[[subprocess.Popen, Path], None]:
    """Signals to the supervising process, once both ranks have begun."""

    def act(command: subprocess.Popen, _folder: Path) -> None:
        for number in numbers:
            command.send_signal(number)
            time.sleep(apart_s)

    return act


def to_launcher(number: int) -> Callable[[subprocess.Popen, Path], None]:
    return lambda _command, folder: launcher_in(folder).send_signal(number)


def nothing(_command: subprocess.Popen, _folder: Path) -> None:
    pass


CASES: dict[str, tuple[dict[str, Any], Callable[[subprocess.Popen, Path], None]]] = {
    "SIGUSR1": ({"save_s": [2, 4]}, send(USR1)),
    "one wish, many signals": ({"save_s": [2, 2]}, send(TERM, TERM, USR1, HUP, apart_s=0.1)),
    "Ctrl-C again": ({"save_s": LONG_S}, send(INT, INT, apart_s=3)),
    "before they listen": ({"listens": False}, send(TERM)),
    "launcher killed": ({"save_s": [2, 2]}, to_launcher(KILL)),
    "launcher killed early": ({"listens": False}, to_launcher(KILL)),
    "launcher terminated": ({"save_s": [2, 2]}, to_launcher(TERM)),
    "guard": ({"end": {"0": 4, "1": 4}, "event": "guard_stop"}, nothing),
    "killed rank": ({"listens": False, "end": {"1": -9}, "after_s": 4}, nothing),
    "finished": ({"end": {"0": 0, "1": 0}, "event": "finish"}, nothing),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """What every case came to."""
    folder = tmp_path_factory.mktemp("supervised")
    with ThreadPoolExecutor(len(CASES)) as pool:
        runs = {
            name: pool.submit(run_case, folder / str(number), *case)
            for number, (name, case) in enumerate(CASES.items())
        }
    return {name: run.result() for name, run in runs.items()}


def run_case(folder: Path, plan: dict[str, Any], act: Callable[[subprocess.Popen, Path], None]) -> Ended:
    stand_in.make_workplace(folder)
    environment = stand_in.environment(json.dumps(plan))
    port = ["--master_port", environment["MASTER_PORT"]]
    launch = [sys.executable, "-m", "sft.launch", stand_in.COMMAND[0], *port, *stand_in.COMMAND[1:]]
    command = subprocess.Popen(launch, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: have_begun(folder) or command.poll() is not None)
    act(command, folder)
    _, said = command.communicate(timeout=120)
    left = processes_in(folder)
    for process in left:
        process.kill()
    return Ended(command.returncode, said, len(list(folder.glob("*.saved"))), len(left))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "code", "saved"),
    [
        ("SIGUSR1", 75, 2),
        ("one wish, many signals", 75, 2),
        ("Ctrl-C again", 128 + INT, 0),
        ("before they listen", 75, 0),
        ("launcher killed", 75, 2),
        ("launcher killed early", 1, 0),
        ("launcher terminated", 75, 2),
        ("guard", 4, 0),
        ("killed rank", 128 + KILL, 0),
        ("finished", 0, 0),
    ],
)
def test_every_ending_comes_back(ended, case, code, saved):
    assert (ended[case].code, ended[case].saved, ended[case].left) == (code, saved, 0), ended[case].said


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("SIGUSR1", "SIGUSR1: saving, then stopping\n"),
        ("Ctrl-C again", "SIGINT: saving, then stopping; once more to stop at once without saving\n"),
        ("Ctrl-C again", "stopped at once, without saving\n"),
        ("before they listen", "stopped: the ranks had not begun, and there is nothing to save\n"),
        ("launcher killed", "error: the launcher was killed and left its ranks\n"),
        ("killed rank", f" on {os.uname().nodename} ended without a word: killed, out of memory"),
    ],
)
def test_the_user_is_told(ended, case, line):
    assert line in ended[case].said
    assert line not in ended["finished"].said


@pytest.mark.dist
def test_control_what_a_bare_deepspeed_makes_of_it(tmp_path):
    """It says 0 where launch.py was killed, and leaves the ranks. If this fails, sft.supervisor can shrink."""
    folder = stand_in.make_workplace(tmp_path / "bare")
    command = subprocess.Popen(stand_in.COMMAND, cwd=folder, env=stand_in.environment("{}"))
    try:
        wait_until(lambda: have_begun(folder))
        launcher_in(folder).kill()
        assert command.wait(timeout=60) == 0
        assert len(processes_in(folder)) == 2
    finally:
        for process in processes_in(folder):
            process.kill()


# Its parts


@pytest.mark.parametrize(
    ("launcher", "codes", "code"),
    [
        (0, {0: 0, 1: 0}, 0),
        (0, {}, 1),  # launch.py was killed
        (0, {0: 75, 1: 75}, 75),
        (1, {0: 75, 1: 75}, 75),  # launch.py was sent the signal, too
        (1, {0: 4, 1: 4}, 4),
        (1, {0: 1}, 1),
        (1, {0: 5, 1: 1}, 1),  # the cause is on rank 1
        (1, {0: 0, 1: 2}, 2),
        (2, {}, 2),
        (75, {}, 75),
        (247, {0: 5}, 5),
        (247, {}, 137),
        (247, {0: 0}, 137),
        (241, {}, 143),
        (255, {}, 1),  # ssh's own failure
        (-9, {}, 137),
        (-15, {0: 75}, 75),
        (130, {}, 130),
    ],
)
def test_exit_code(launcher, codes, code):
    assert exit_code(launcher, codes) == code


def test_exit_codes_of_ranks_that_have_written_them(tmp_path):
    assert read_exit_codes(tmp_path) == {}
    for name, text in (("0", "75"), ("12", "0"), ("3", ""), ("notes", "1")):
        (tmp_path / name).write_text(text)
    assert read_exit_codes(tmp_path) == {0: 75, 12: 0}


def test_a_rank_is_known_by_the_folder_of_its_launch(tmp_path):
    """Not launch.py, which has the folder and no rank; not a rank's own children, nor another launch's ranks."""
    waiting = "import os, subprocess, sys, time; print(); sys.stdout.flush(); "
    parent = waiting + "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    base = {name: value for name, value in os.environ.items() if name != "RANK"}
    ours, others = {"SFT_EXIT_CODES": str(tmp_path)}, {"SFT_EXIT_CODES": str(tmp_path / "other")}
    processes = [
        subprocess.Popen([sys.executable, "-c", parent], env={**base, **more}, stdout=subprocess.PIPE)
        for more in ({**ours, "RANK": "3"}, {**ours, "RANK": "12"}, ours, {**others, "RANK": "3"}, {"RANK": "3"})
    ]
    try:
        for process in processes:
            process.stdout.readline()
        found = {process.pid: rank for process, rank in find_ranks(tmp_path).items()}
        assert found == {processes[0].pid: 3, processes[1].pid: 12}
    finally:
        for process in processes:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()
            process.communicate()
