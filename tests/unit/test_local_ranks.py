"""Ranks of one command end together, with one exit code. Run: pytest tests/unit/test_local_ranks.py"""

import os
import signal
import threading
import time

import pytest

from sft import local_ranks
from sft.cli import dispatch
from sft.errors import UserError

MEMBER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == os.environ["RANK"]
def say(line, code):
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
{body}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run two ranks of a program; (exit code, seconds)."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local_ranks, "GRACE_S", 3.0)

    def run(body: str) -> tuple[int, float]:
        (tmp_path / "member.py").write_text(MEMBER.format(body=body))
        started_s = time.monotonic()
        return local_ranks.run_ranks("member", [], 2), time.monotonic() - started_s

    return run


def test_all_went_well(start):
    assert start("time.sleep(rank / 5)")[0] == 0


def test_a_mistake_that_all_ranks_find_is_said_once_and_at_once(start, capfd):
    code, seconds = start("time.sleep(20 * rank)\nsay('what, where', 2)")
    assert (code, capfd.readouterr().err) == (2, "what, where\n")
    assert seconds < 3


@pytest.mark.parametrize("first", [0, 1])
def test_the_rank_that_says_why_is_believed_before_one_that_crashed_for_it(start, first, capfd):
    """A rank that leaves breaks the others' collectives at once, and speaks after a pause where it is not the first."""
    assert start(f"if rank == {first}:\n    sys.exit(1)\ntime.sleep(1)\nsay('disk full', 2)")[0] == 2
    assert capfd.readouterr().err == "disk full\n"


def test_a_gate_that_failed_on_the_first_rank_is_the_commands_end(start):
    assert start("sys.exit(0 if rank else 3)")[0] == 3


def test_a_killed_rank_is_the_cause_not_those_that_wait_for_it(start):
    body = "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(1)\nsys.exit(1)"
    assert start(body)[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_hang_after_a_crash_are_killed(start, first):
    """As in a collective over GPUs, which another rank's end does not interrupt."""
    code, seconds = start(f"sys.exit(1) if rank == {first} else time.sleep(60)")
    assert code == 1
    assert seconds < 20


def test_a_signal_ends_all_ranks(start):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, seconds = start("time.sleep(60)")
    assert code == 128 + signal.SIGTERM
    assert seconds < 20


def test_more_ranks_than_gpus_are_refused_before_one_starts(monkeypatch):
    """On a GPU host only; on CPU ranks share the processor."""
    import torch

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--ranks 3: only 2 GPUs are visible"):
        dispatch(["eval", "--ranks", "3", "--model", "m", "--data", "d", "--out", "o"])
