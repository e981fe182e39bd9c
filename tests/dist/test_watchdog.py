"""Real ranks of which one is killed, stopped, hangs or fails: the others leave in time and name it.

Run: pytest tests/dist/test_watchdog.py. All cases run at once: most of the time is waiting. See watchdog_worker.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from sft.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RANK_LOST
from tests import tiny

pytestmark = pytest.mark.dist

WORKER = "tests.dist.watchdog_worker"
LOST_AFTER_S = 4.0
HANG_AFTER_S = 7.0
LATE_S = 4.0
"""For a busy machine."""
HOST = os.uname().nodename
KILLED = -signal.SIGKILL
LOST = EXIT_RANK_LOST

CODES = {
    "kill_1": [LOST, KILLED], "kill_0": [KILLED, LOST], "stop_1": [LOST, LOST], "stop_0": [LOST, LOST],
    "hang_1": [LOST, LOST], "hang_0": [LOST, LOST], "error_1": [LOST, EXIT_BAD_INPUT],
    "error_0": [EXIT_BAD_INPUT, LOST], "crash_1": [LOST, 1],
    "broken_1": [LOST, 1], "absent_1": [LOST, 0],
    "mistake_0": [EXIT_BAD_INPUT] * 2, "mistake_1": [EXIT_BAD_INPUT] * 2,
    "preempted_0": [EXIT_PREEMPTED] * 2, "preempted_1": [EXIT_PREEMPTED] * 2,
    "none_0": [0, 0], "slow_1": [0, 0], "suspend_0": [0, 0], "export_0": [0, 0],
    "far_kill_1": [LOST, KILLED, LOST], "far_kill_0": [KILLED, LOST, LOST], "far_stop_1": [LOST] * 3,
    "far_stop_0": [LOST] * 3, "far_error_1": [LOST, EXIT_BAD_INPUT, LOST], "far_hang_2": [LOST] * 3,
    "blind_stop_1": [KILLED, KILLED],
}  # fmt: skip
"""Exit codes by case and rank."""

AT_ONCE_S = 1.0 + LATE_S  # a look at /proc, a broken connection
SILENCE_S = LOST_AFTER_S * 4 / 3 + LATE_S  # found at the next question, read at the one after
HANG_S = HANG_AFTER_S + LOST_AFTER_S / 3 + LATE_S
TOLD_S = 5.0 + LATE_S  # other ranks than a host's first wait for five seconds before they tell their error and end

LOSSES = {
    "kill_1": ("is gone: last seen in step ", AT_ONCE_S),
    "kill_0": ("is gone: last seen in step ", AT_ONCE_S),
    "stop_1": (", stopped by a signal, gives no sign of life for ", SILENCE_S),
    "stop_0": (", stopped by a signal, does not answer for ", SILENCE_S),
    "hang_1": (" s in step 3, forward, at watchdog_worker.py:", HANG_S),
    "hang_0": (" s in step 3, forward, at watchdog_worker.py:", HANG_S),
    "error_1": (" ended in step 3, forward: error: --data.train x: a mistake on one rank; ", TOLD_S),
    "error_0": (" ended in step 3, forward: error: --data.train x: a mistake on one rank; ", AT_ONCE_S),
    "crash_1": (" ended in step 3, forward: ZeroDivisionError: a bug; ", AT_ONCE_S),
    "broken_1": (" ended in step 3, forward: RuntimeError: [x/gloo/", SILENCE_S + 1.0 + LOST_AFTER_S),
    "far_kill_1": (" gives no sign of life for ", SILENCE_S),
    "far_kill_0": (" closed its connection: last seen in step ", AT_ONCE_S),
    "far_stop_1": (" gives no sign of life for ", SILENCE_S),
    "far_stop_0": (" does not answer for ", SILENCE_S),
    "far_error_1": (" ended in step 3, forward: error: --data.train x: a mistake on one rank; ", AT_ONCE_S),
    "far_hang_2": (" s in step 3, forward, at watchdog_worker.py:", HANG_S),
}
"""What is said of the rank at fault, and how long after the last step the others may still be there."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the traces of all cases."""
    folder = tmp_path_factory.mktemp("watchdog")
    environment = {**tiny.rank_environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", WORKER, str(folder), str(LOST_AFTER_S), str(HANG_AFTER_S), *CODES]
    done = tiny.run(command, timeout_s=150, environment=environment, cwd=tiny.REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def exit_codes(folder: Path) -> list[int]:
    return [end["code"] for end in sorted(tiny.read_jsonl(folder / "ends.jsonl"), key=lambda end: end["rank"])]


def seconds_left(folder: Path, rank: int) -> float:
    """From the last step to the end of a rank."""
    (end,) = [end for end in tiny.read_jsonl(folder / "ends.jsonl") if end["rank"] == rank]
    return end["time"] - tiny.read_jsonl(folder / f"rank-{rank}.log")[-1]["time"]


def events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return tiny.read_jsonl(path) if path.exists() else []


def said(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank-{rank}.err").read_text().splitlines()


@pytest.mark.parametrize("case", CODES)
def test_exit_codes(cases, case):
    assert exit_codes(cases / case) == CODES[case], json.dumps([said(cases / case, rank) for rank in (0, 1)])


@pytest.mark.parametrize("case", LOSSES)
def test_the_rank_at_fault_is_named_in_time_and_once(cases, case):
    folder, (words, limit_s) = cases / case, LOSSES[case]
    culprit = int(case[-1])
    survivors = [rank for rank in range(len(CODES[case])) if rank != culprit]
    host = f"node{culprit}" if case.startswith("far_") else HOST
    for rank in survivors:
        assert seconds_left(folder, rank) < limit_s
        named = [line for line in said(folder, rank) if line.startswith(f"stopped: rank {culprit} on {host} (pid ")]
        is_told_by_a_neighbour = case == "hang_0"
        assert len(named) == (0 if is_told_by_a_neighbour else 1), said(folder, rank)
        assert not any("Traceback" in line for line in said(folder, rank))
        assert all(words in line and line.endswith("start it again to resume") for line in named), named
    recorder = 0 if "hang" in case else survivors[0]
    assert [event["rank"] for event in events(folder)] == [recorder]
    assert words in events(folder)[0]["reason"]


@pytest.mark.parametrize("case", sorted(CODES.keys() - LOSSES.keys() - {"absent_1"}))
def test_healthy_runs_and_errors_of_all_ranks_are_left_alone(cases, case):
    """Slow, suspended as a whole and continued, asked to stop, wrong on every rank: nobody is lost."""
    assert events(cases / case) == []
    assert not any(line.startswith("stopped: ") for rank in (0, 1) for line in said(cases / case, rank))


@pytest.mark.parametrize("case", ["none_0", "slow_1", "suspend_0", "export_0"])
def test_healthy_runs_finish(cases, case):
    assert [tiny.read_jsonl(cases / case / f"rank-{rank}.log")[-1]["step"] for rank in (0, 1)] == [4, 4]


def test_a_rank_that_never_comes(cases):
    (line,) = said(cases / "absent_1", 0)
    assert line.startswith(f"stopped: rank 1: not up within 7 s of rank 0 on {HOST}; ")
    assert [event["reason"] for event in events(cases / "absent_1")] == [line.removeprefix("stopped: ")]


def test_an_error_for_which_nobody_can_be_named_is_shown(cases):
    """Its own traceback, after the search; the others then name this rank."""
    assert "Connection reset by peer" in said(cases / "broken_1", 1)[-1]
    assert any("Traceback" in line for line in said(cases / "broken_1", 1))


def test_the_control_waits_for_ever(cases):
    """Without a watchdog the same loop, with the same stopped rank, stays until the test kills it."""
    assert seconds_left(cases / "blind_stop_1", 0) > SILENCE_S - LATE_S


@pytest.mark.parametrize("case", ["stop_1", "stop_0", "far_stop_1", "far_stop_0"])
def test_a_rank_that_was_stopped_does_not_go_on_without_the_others(cases, case):
    culprit = int(case[-1])
    steps = tiny.read_jsonl(cases / case / f"rank-{culprit}.log")
    assert steps[-1]["step"] == 3
    assert [event["rank"] for event in events(cases / case)] == [1 - culprit], "it records nothing"
    (line,) = said(cases / case, culprit)
    assert "was itself stopped for" in line


@pytest.mark.parametrize("case", ["hang_0", "hang_1", "far_hang_2"])
def test_stacks_of_the_rank_that_hangs(cases, case):
    (file,) = (cases / case / "stacks").iterdir()
    assert file.name == f"rank-0000{case[-1]}.txt"
    assert "in dream_on" in file.read_text()


def test_the_launcher_hands_the_exit_code_on(tmp_path):
    done = tiny.run_module(2, WORKER, "hang_1", str(tmp_path), "3", "3")
    assert done.returncode == EXIT_RANK_LOST, done.stdout + done.stderr
    assert done.stderr.count(f"stopped: rank 1 on {HOST} (pid ") == 1, done.stderr
    assert "Traceback" not in done.stderr
