"""What follows from the signs of life of many ranks, and what can be read of a process. Real ranks: tests/dist."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sft.errors import GuardStop, UserError
from sft.vitals import (
    Beat,
    Member,
    Progress,
    Verdict,
    describe_error,
    is_gone,
    is_stopped,
    judge_progress,
    take_beat,
    this_member,
)
from sft.watchdog import is_failed_collective

MEMBERS = {rank: Member(rank, f"node{rank // 4}", "", 100 + rank, 0) for rank in range(8)}


def beat(marks: int, stuck_s: float, limit_s: float = 10.0, in_collective: bool = True, ended: bool = False) -> Beat:
    return Beat(1, marks, "forward", 7, stuck_s, limit_s, "loop.py:1 (f)", in_collective, ended)


@pytest.mark.parametrize(
    ("beats", "culprits"),
    [
        ({0: beat(5, 11), 1: beat(4, 11)}, (1,)),
        ({0: beat(5, 11), 1: beat(5, 11), 2: beat(4, 12), 3: beat(4, 12, in_collective=False)}, (3,)),
        ({0: beat(5, 11), 1: beat(5, 11), 2: beat(5, 11, in_collective=False)}, (2,)),
        ({0: beat(5, 11), 1: beat(5, 11)}, ()),
        ({rank: beat(5, 11, in_collective=rank == 0) for rank in range(4)}, ()),
        ({0: beat(5, 11)}, (0,)),
        ({0: beat(5, 11), 1: beat(4, 99, ended=True)}, (0,)),
    ],
    ids=["behind", "behind and not waiting", "equal but not waiting", "all wait", "most do not", "alone", "one ended"],
)
def test_who_hangs(beats, culprits):
    verdict = judge_progress(beats, MEMBERS)
    assert verdict is not None
    assert verdict.culprits == culprits
    assert verdict.survivors(beats) == sorted(beats), "a rank that hangs still speaks"
    if not culprits:
        assert "no rank is behind: all wait for 11 s in step 7, forward: a collective hangs" in verdict.reason
    for rank in culprits:
        assert f"rank {rank} on node0 (pid {100 + rank}) hangs for " in verdict.reason


@pytest.mark.parametrize(
    "beats",
    [
        {0: beat(5, 9), 1: beat(4, 9)},
        {0: beat(5, 11), 1: beat(4, 11, limit_s=60)},
        {0: beat(5, 11, ended=True), 1: beat(6, 1)},
        {},
    ],
    ids=["in time", "those ahead wait for one with a higher limit", "ended", "nobody"],
)
def test_nobody_hangs(beats):
    assert judge_progress(beats, MEMBERS) is None


def test_many_are_named_by_a_few():
    verdict = judge_progress({rank: beat(4 if rank else 5, 11) for rank in range(8)}, MEMBERS)
    assert verdict is not None
    assert verdict.reason.startswith("rank 1 on node0 (pid 101), rank 2 on")
    assert "rank 4 on node1 (pid 104) and 3 more hang for 11 s" in verdict.reason


def test_survivors():
    assert Verdict("gone", (1,), "").survivors([2, 1, 0]) == [0, 2]


def test_life_and_death_of_a_process():
    """A killed child stays a zombie until it is waited for; then its pid may belong to another process."""
    me = this_member(3)
    assert (me.rank, me.host, me.pid) == (3, os.uname().nodename, os.getpid())
    assert not is_gone(me)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        member = Member(1, me.host, me.place, child.pid, started)
        assert not is_gone(member)
        assert is_gone(Member(1, me.host, me.place, child.pid, started - 1)), "another process with its pid"
        child.send_signal(signal.SIGSTOP)
        assert eventually(lambda: is_stopped(member))
        assert not is_gone(member), "it may go on"
        child.kill()
        assert eventually(lambda: is_gone(member)), "a zombie"
    finally:
        child.kill()
        child.communicate()
    assert is_gone(member)
    assert not is_stopped(member)


def eventually(holds) -> bool:
    deadline_s = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return holds()


def test_a_beat_says_where_the_thread_is():
    now = time.monotonic()
    thread = threading.get_ident()
    sign = take_beat(9, Progress(4, "save", 12, now - 5, 60.0), float("-inf"), thread, ended=False)
    assert (sign.number, sign.marks, sign.place, sign.limit_s, sign.ended) == (9, 4, "step 12, save", 60.0, False)
    assert 5 <= sign.stuck_s < 10
    assert sign.where.startswith("vitals.py:"), "the innermost frame of this thread, which takes the beat itself"
    assert not sign.in_collective
    woken = take_beat(10, Progress(4, "save", 12, now - 5, 60.0), now, thread, ended=False)
    assert woken.stuck_s < 4, "time in which the process was stopped does not count"


def test_a_beat_sees_a_wait_inside_torch_distributed():
    class Peers:
        """A store whose first use, by torch.distributed, takes a beat."""

        def add(self, key: str, value: int) -> int:
            raise Taken(take_beat(1, Progress(0, "", 0, 0.0, 0.0), 0.0, threading.get_ident(), ended=False))

    class Taken(Exception):
        pass

    with pytest.raises(Taken) as taken:
        dist.distributed_c10d._store_based_barrier(0, Peers(), "group", 2, timedelta(seconds=1))
    assert taken.value.args[0].in_collective


@pytest.mark.parametrize(
    ("error", "is_of_a_peer"),
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:2"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("shape mismatch"), False),
        (torch.OutOfMemoryError("CUDA out of memory; see /gloo/"), False),
        (UserError("x"), False),
    ],
)
def test_errors_of_peers(error, is_of_a_peer):
    assert is_failed_collective(error) is is_of_a_peer


def test_errors_in_one_line():
    assert describe_error(UserError("--out x: no")) == "error: --out x: no"
    assert describe_error(GuardStop("loss is 0")) == "stopped: loss is 0"
    assert describe_error(ValueError("one\ntwo")) == "ValueError: one"
    assert describe_error(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(describe_error(ValueError("x" * 9999))) < 500
